"""Pairs of encrypted channels without a network: what actors see of a connection, in memory.

Bytes arrive in order at the other side with the next turn of the loop, or after ``delay`` seconds.
The peers' keys are whatever the test says.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from ..transport.errors import StreamReset

#: Bytes written and not delivered at which a channel asks its protocol to pause, and to go on.
WRITE_HIGH = 65_536
WRITE_LOW = 16_384


def channel_pair(
    left_key: bytes = b"\x01" * 32,
    right_key: bytes = b"\x02" * 32,
    *,
    delay: float = 0.0,
) -> tuple[MemoryChannel, MemoryChannel]:
    """Two ends of one connection; each has the other's key as its ``remote_public_key``. Delay in
    seconds, one way."""
    left, right = (
        MemoryChannel(left_key, right_key, delay),
        MemoryChannel(right_key, left_key, delay),
    )
    left.peer, right.peer = right, left
    return left, right


class MemoryChannel(asyncio.Transport):
    """One end. The same calls and callbacks as `hyperseaport.transport.channel.Channel`: reading
    starts with `set_protocol`, a pausing reader makes the writer pause."""

    peer: MemoryChannel

    def __init__(self, public_key: bytes, remote_public_key: bytes, delay: float) -> None:
        super().__init__()
        self.public_key = public_key
        self.remote_public_key = remote_public_key
        self.delay = delay
        #: Everything ever written here, for assertions.
        self.written = bytearray()
        self._loop = asyncio.get_running_loop()
        self._protocol: asyncio.BaseProtocol | None = None
        self._inbox: deque[bytes | None] = deque()  # None is the end of the peer's direction
        self._under_way: deque[tuple[Callable[[Any], None], object]] = deque()
        self._reading_paused = False
        self._writing_paused = False
        self._eof_written = False
        self._eof_delivered = False
        self._closing = False
        self._lost = False
        self._silent = False

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        first = self._protocol is None
        self._protocol = protocol
        if first:
            protocol.connection_made(self)
            self._loop.call_soon(self._deliver)

    def get_protocol(self) -> asyncio.BaseProtocol:
        if self._protocol is None:
            raise RuntimeError("the channel has no protocol yet: call set_protocol first")
        return self._protocol

    @property
    def has_protocol(self) -> bool:
        return self._protocol is not None

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name in {"public_key", "remote_public_key"}:
            return getattr(self, name)
        return default

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._eof_written:
            raise RuntimeError("the channel's writing side has ended")
        if self._lost or not data:
            return
        self.written += data
        self._send(bytes(data))
        if not self._writing_paused and self.get_write_buffer_size() > WRITE_HIGH:
            self._writing_paused = True
            if self._protocol is not None:
                self._protocol.pause_writing()

    def write_eof(self) -> None:
        if self._eof_written or self._lost:
            return
        self._eof_written = True
        self._send(None)

    def can_write_eof(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        """Bytes that the other side has not taken."""
        return sum(len(data) for data in self.peer._inbox if data is not None)

    def is_reading(self) -> bool:
        return not self._reading_paused and not self._closing

    def pause_reading(self) -> None:
        self._reading_paused = True

    def resume_reading(self) -> None:
        self._reading_paused = False
        self._loop.call_soon(self._deliver)

    def is_closing(self) -> bool:
        return self._closing or self._lost

    def close(self) -> None:
        """End our direction; closed once the peer has ended too."""
        if self._closing or self._lost:
            return
        self._closing = True
        self._reading_paused = False
        self.write_eof()
        self._loop.call_soon(self._deliver)

    def abort(self) -> None:
        """Both sides lose the connection; the peer sees a reset."""
        if self._lost:
            return
        if not self._silent:
            self._later(self.peer._lose, StreamReset("the peer destroyed the connection"))
        self._lose(None)

    def blackhole(self) -> None:
        """From now on nothing written on either side arrives, and nobody is told."""
        self._silent = self.peer._silent = True

    def fail(self, error: Exception) -> None:
        """This side alone loses the connection, as when its peer stopped answering."""
        self._lose(error)

    def _send(self, item: bytes | None) -> None:
        if not self._silent:
            self._later(self.peer._receive, item)

    def _later(self, callback: Callable[[Any], None], argument: object) -> None:
        # Timers of the same time come in any order, so what is under way is a queue of its own.
        self._under_way.append((callback, argument))
        if self.delay:
            self._loop.call_later(self.delay, self._arrive)
        else:
            self._loop.call_soon(self._arrive)

    def _arrive(self) -> None:
        callback, argument = self._under_way.popleft()
        callback(argument)

    def _receive(self, item: bytes | None) -> None:
        if not self._lost:
            self._inbox.append(item)
            self._deliver()

    def _deliver(self) -> None:
        while self._inbox and self._protocol is not None and not self._lost:
            if self._reading_paused:
                return
            self._deliver_one(self._inbox.popleft())
            self.peer._drained()
        if self._closing and self._eof_delivered:
            self._lose(None)

    def _deliver_one(self, item: bytes | None) -> None:
        protocol = cast(asyncio.Protocol, self._protocol)
        if item is not None:
            if not self._closing:
                protocol.data_received(item)
            return
        self._eof_delivered = True
        if not self._closing and not protocol.eof_received():
            self.close()
        if self._eof_written:
            self._closing = True

    def _drained(self) -> None:
        if self._writing_paused and self.get_write_buffer_size() <= WRITE_LOW:
            self._writing_paused = False
            if self._protocol is not None and not self._lost:
                self._protocol.resume_writing()

    def _lose(self, error: Exception | None) -> None:
        if self._lost:
            return
        self._lost = True
        self._inbox.clear()
        if self._protocol is not None:
            self._loop.call_soon(self._protocol.connection_lost, error)
