"""What tests of pipes need: channels in memory, loopback connections, what a process has open."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from hyperseaport.actors.endpoint import EndpointActor
from hyperseaport.supervisor import ChildSpec, SupervisorSpec
from hyperseaport.testing.channels import MemoryChannel

from .endpoint import MemoryEndpoint, MemoryNetwork

#: Seconds in which what has to happen happens, on a busy machine.
SOON = 20.0


class PipeChannel(MemoryChannel):
    """A memory channel that also counts, as pipes want to know."""

    #: Bytes that have left and are not acknowledged; tests may claim some.
    unacked = 0
    piped = False

    @property
    def stream(self) -> PipeChannel:
        return self

    def write_eof(self) -> None:
        super().write_eof()
        if self._eof_delivered and not self._lost:
            # Both directions have ended, so the connection is over, as a stream's is.
            self._closing = True
            self._loop.call_soon(self._deliver)

    def get_write_buffer_size(self) -> int:
        """Also what was written in this turn of the loop."""
        under_way = sum(len(data) for _, data in self._under_way if isinstance(data, bytes))
        return super().get_write_buffer_size() + under_way

    @property
    def ended(self) -> bool:
        return self._eof_written and self._eof_delivered

    @property
    def relayed(self) -> bool:
        return False

    @property
    def bytes_read(self) -> int:
        return len(self.peer.written)

    @property
    def bytes_written(self) -> int:
        return len(self.written)

    @property
    def bytes_moved(self) -> int:
        return self.bytes_read + self.bytes_written


def pipe_channels(
    left_key: bytes = b"\x01" * 32, right_key: bytes = b"\x02" * 32, *, delay: float = 0.0
) -> tuple[PipeChannel, PipeChannel]:
    """As `channel_pair`, for both ends of pipes."""
    left = PipeChannel(left_key, right_key, delay)
    right = PipeChannel(right_key, left_key, delay)
    left.peer, right.peer = right, left
    return left, right


class Peer(asyncio.Protocol):
    """Whoever sits at the far end of a channel, and remembers what it saw."""

    def __init__(self, channel: MemoryChannel) -> None:
        self.channel = channel
        self.received = bytearray()
        self.ended = False
        self.lost = False
        self.error: Exception | None = None
        self.paused = False
        channel.set_protocol(self)

    def data_received(self, data: bytes) -> None:
        self.received += data

    def eof_received(self) -> bool:
        self.ended = True
        return True

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False

    def connection_lost(self, error: Exception | None) -> None:
        self.lost, self.error = True, error


async def soon(condition: Callable[[], Any], what: str = "it") -> None:
    """Let the loop run until the condition holds; sockets of the kernel tell nobody."""
    async with asyncio.timeout(SOON):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def reset_by_client(client: socket.socket) -> None:
    """Close a socket so that its peer gets ECONNRESET."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


async def outcome(client: socket.socket) -> bytes | type[Exception]:
    """What a client reads until the end: bytes, or `ConnectionResetError`."""
    loop = asyncio.get_running_loop()
    received = b""
    try:
        while data := await asyncio.wait_for(loop.sock_recv(client, 65_536), SOON):
            received += data
    except ConnectionResetError as error:
        return type(error)
    return received


def descriptors() -> int:
    """How many this process has open."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def in_memory(tree: SupervisorSpec, network: MemoryNetwork) -> SupervisorSpec:
    """The tree of a command, with its endpoint on a memory network."""

    def adapted(child: ChildSpec) -> ChildSpec:
        if child.actor is EndpointActor:
            return replace(child, actor=MemoryEndpoint, args=network)
        if isinstance(child.args, SupervisorSpec):
            return replace(child, args=in_memory(child.args, network))
        return child

    return replace(tree, children=tuple(map(adapted, tree.children)))
