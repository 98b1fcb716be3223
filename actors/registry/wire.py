"""JSON-RPC on a channel, for the actor at either end of a registry connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from msgspec import Struct

from ...transport.rpc import RpcPeer, RpcRequest

if TYPE_CHECKING:
    from ...transport.channel import Channel

#: Requests delivered and not settled at which reading pauses, so that a peer that floods waits
#: for its answers.
MAX_PIPELINED = 128


class StreamEnded(Struct, frozen=True):
    """The peer sends nothing more, and may still read."""


class StreamLost(Struct, frozen=True):
    """The connection is over; None when both sides had ended it."""

    error: Exception | None


class RpcProtocol(asyncio.Protocol):
    """Hands to ``deliver`` what the channel brings: `RpcRequest`, `RpcResponse`, `RpcFailure`,
    `StreamEnded` and `StreamLost`.

    Reading pauses while the peer does not take the answers, and while too many requests wait for
    `settled`.
    """

    def __init__(self, channel: Channel, deliver: Callable[[object], None]) -> None:
        self.peer = RpcPeer()
        self._channel = channel
        self._deliver: Callable[[object], None] | None = deliver
        self._unsettled = 0
        self._writing_paused = False
        self._reading_paused = False
        self._lost = False

    @property
    def unwritten(self) -> int:
        """Bytes that wait for the peer to take what came before them."""
        return self._channel.get_write_buffer_size()

    def start(self) -> None:
        """Take the channel over and begin to read."""
        self._channel.set_protocol(self)
        # A channel that was lost before anybody had it does not say so a second time.
        if self._channel.is_closing():
            self.connection_lost(None)

    def write(self, line: bytes) -> None:
        if line and not self._lost:
            self._channel.write(line)

    def settled(self) -> None:
        """One request has been answered or will wait without bound: it no longer counts."""
        self._unsettled -= 1
        self._control_reading()

    def close(self) -> None:
        """End the connection in order, and deliver nothing more."""
        self._deliver = None
        self._channel.close()

    def abort(self) -> None:
        """Destroy the connection, and deliver nothing more."""
        self._deliver = None
        self._channel.abort()

    # What the channel calls. Nothing may be raised here: these are turns of its owner.

    def data_received(self, data: bytes) -> None:
        for event in self.peer.receive(data):
            if isinstance(event, RpcRequest):
                self._unsettled += 1
            self._tell(event)
        self._control_reading()

    def eof_received(self) -> bool:
        self._tell(StreamEnded())
        return True

    def pause_writing(self) -> None:
        self._writing_paused = True
        self._control_reading()

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._control_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._lost:
            self._lost = True
            self._tell(StreamLost(exc))

    def _tell(self, event: object) -> None:
        if self._deliver is not None:
            self._deliver(event)

    def _control_reading(self) -> None:
        if self._lost or self._deliver is None:
            return
        pause = self._writing_paused or self._unsettled > MAX_PIPELINED
        if pause == self._reading_paused:
            return
        self._reading_paused = pause
        if pause:
            self._channel.pause_reading()
        else:
            self._channel.resume_reading()
