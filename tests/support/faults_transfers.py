"""Transfers through a proxy that can be held in the middle: both ends of each are in the test."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable
from typing import cast

#: What every transfer takes its bytes from: each direction of each one begins elsewhere in it.
SIZE = 1 << 20
_BYTES = random.Random(11).randbytes(SIZE)
_SOURCE = memoryview(_BYTES + _BYTES)
#: Bytes written at once.
PIECE = 32_768
#: A client first says in so many bytes which transfer it is.
NUMBER = 4


class End(asyncio.Protocol):
    """One end of a transfer: sends what it is asked to, and compares what it gets with what it
    should get. Its first bytes are the transfer's number, if it is a client's."""

    def __init__(self, changed: Callable[[], None], number: int | None = None) -> None:
        self._changed = changed
        #: Keeps its direction open when the other end has ended; health checks come and go without
        #: a word.
        self.patient = number is not None
        self.number = number
        self.is_client = number is not None
        self.transport: asyncio.Transport
        #: Bytes to be sent in sum, and sent, and received.
        self.goal = 0
        self.sent = 0
        self.received = 0
        #: Where it first got something else than it should.
        self.wrong_at: int | None = None
        #: The other end has ended its direction.
        self.ended = False
        self.lost = False
        self.error: Exception | None = None
        self._paused = False
        self._head = b""

    def push(self, count: int) -> None:
        """Send so many bytes more."""
        self.goal += count
        self._write()

    def end(self) -> None:
        """End our direction."""
        self.transport.write_eof()

    def _write(self) -> None:
        while self.sent < self.goal and not (self._paused or self.transport.is_closing()):
            size = min(PIECE, self.goal - self.sent)
            self.transport.write(self._bytes(self.is_client, self.sent, size))
            self.sent += size

    def _bytes(self, by_client: bool, start: int, size: int) -> memoryview:
        base = (cast(int, self.number) * 7919 + by_client * 104_729 + start) % SIZE
        return _SOURCE[base : base + size]

    # asyncio's part

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self.is_client:
            self.transport.write(cast(int, self.number).to_bytes(NUMBER, "big"))

    def data_received(self, data: bytes) -> None:
        if self.number is None:
            self._head += data
            if len(self._head) < NUMBER:
                return
            data = self._head[NUMBER:]
            self.number = int.from_bytes(self._head[:NUMBER], "big")
        expected = self._bytes(not self.is_client, self.received, len(data))
        if self.wrong_at is None and data != expected:
            self.wrong_at = self.received
        self.received += len(data)
        self._changed()

    def eof_received(self) -> bool:
        self.ended = True
        self._changed()
        return self.patient

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._write()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost, self.error = True, error
        self._changed()


class Transfer:
    """Both ends. The service's is known once the client's number has arrived there."""

    def __init__(self, number: int, changed: Callable[[], None]) -> None:
        self._all_changed = changed
        self._change = asyncio.Event()
        self.client = End(self.changed, number)
        #: The service keeps its direction open when its client has ended.
        self.patient = True
        #: Each one that the client was joined with; all but the last were given up for it.
        self.servers: list[End] = []

    def changed(self) -> None:
        self._change.set()
        self._all_changed()

    async def until(self, condition: Callable[[], bool], what: str, within: float) -> None:
        """Fails if it is not so within seconds."""
        try:
            async with asyncio.timeout(within):
                while not condition():
                    self._change.clear()
                    await self._change.wait()
        except TimeoutError:
            raise AssertionError(f"{what}: not so within {within:g} s") from None

    def joined(self, server: End) -> None:
        """A connection of the service turned out to be this one's."""
        server.patient = self.patient
        self.servers.append(server)

    @property
    def server(self) -> End | None:
        return self.servers[-1] if self.servers else None

    @property
    def level(self) -> bool:
        """Both ends have what the other was to send."""
        client, server = self.client, self.server
        return (
            server is not None and client.received == server.goal and server.received == client.goal
        )

    @property
    def under_way(self) -> bool:
        """Both ends have got something since `mark`, and neither has all."""
        client, server = self.client, self.server
        assert server is not None
        return (
            self._marks[0] < client.received < server.goal
            and self._marks[1] < server.received < client.goal
        )

    @property
    def begun(self) -> bool:
        server = self.server
        assert server is not None
        return self.client.received > self._marks[0] and server.received > self._marks[1]

    def mark(self) -> None:
        server = self.server
        assert server is not None
        self._marks = self.client.received, server.received

    @property
    def dead(self) -> bool:
        return self.client.lost and all(server.lost for server in self.servers)

    def push(self, count: int) -> None:
        server = self.server
        assert server is not None
        for end in (self.client, server):
            end.push(count)

    def judge(self) -> None:
        """Fails unless each end has got nothing wrong and no end of a whole that is none."""
        for end in (self.client, *self.servers):
            who = "client" if end.is_client else "service"
            assert end.wrong_at is None, f"the {who} got wrong bytes at {end.wrong_at}"
            assert not end.ended, f"the {who} got a part, with an end as of the whole"
            assert not end.lost or isinstance(end.error, ConnectionResetError | BrokenPipeError), (
                f"the {who} was closed by {end.error!r}, not reset"
            )


class Transfers:
    """All that run, and the TCP service behind the hyperseaport service."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._server: asyncio.Server
        self._count = 0
        self._by_number: dict[int, Transfer] = {}
        self.open: list[Transfer] = []
        #: TCP port of the service.
        self.port = 0

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        self._server.close()
        for transfer in self._by_number.values():
            for end in (transfer.client, *transfer.servers):
                end.transport.abort()

    def _accept(self) -> End:
        def came() -> None:
            transfer = self._by_number.get(-1 if end.number is None else end.number)
            if transfer is None:
                self._changed()
                return
            if end not in transfer.servers:
                transfer.joined(end)
            transfer.changed()

        end = End(came)
        return end

    async def connect(self, through: int | socket.socket) -> Transfer:
        """A client of the proxy on this port, or one that is connected already."""
        loop = asyncio.get_running_loop()
        self._count += 1
        transfer = self._by_number[self._count] = Transfer(self._count, self._changed)
        if isinstance(through, int):
            await loop.create_connection(lambda: transfer.client, "127.0.0.1", through)
        else:
            await loop.create_connection(lambda: transfer.client, sock=through)
        return transfer

    def forget(self, transfer: Transfer) -> None:
        if transfer in self.open:
            self.open.remove(transfer)
        del self._by_number[cast(int, transfer.client.number)]
