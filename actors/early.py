"""The beginning of a proxied connection: until the service's first byte has arrived, the client can
be moved to another service without noticing.

What the client has sent is kept meanwhile, and every service that it is joined with gets all of it
from the beginning. A service may so see, and act on, what another one has seen before: only its
answer tells that it got there. A client that sends more than `REPLAY` bytes before any answer stays
with the service that has them; before there is a service, no more than that is read.

With the first byte, or with the end of the service's direction (no answer is an answer too), the
two connections become a `Splice`, and nothing of this is left in the way of their bytes.
"""

from __future__ import annotations

import asyncio
from typing import Protocol, cast

from ..transport.channel import Channel
from .splice import TCP_HIGH, ChannelSide, Splice, abort, reading_buffer

#: Bytes of a client that are kept to be sent again: what fits requests, and not uploads.
REPLAY = 65_536


class Owner(Protocol):
    """Who is told what happens, in the event loop's callbacks."""

    def client_gone(self, error: Exception | None) -> None:
        """Before any answer. There is nobody left to serve."""

    def service_broke(self, error: Exception | None) -> None:
        """Before any answer. The client waits, and can be joined with another channel."""

    def service_answered(self) -> None:
        """From now on the client stays where it is."""

    def side_closed(self, error: Exception | None) -> None:
        """As of a `Splice`."""


class Early:
    """One client's TCP connection, whose protocol is ``tcp``, and its channels, one at a time."""

    __slots__ = ("_ended", "_kept", "_owner", "_splice", "_waiting", "tcp", "transport")

    def __init__(self, owner: Owner) -> None:
        self._owner: Owner = owner
        self.tcp = _ClientSide(self)
        self.transport: asyncio.Transport | None = None
        # A channel that came before the TCP connection was made.
        self._waiting: Channel | None = None
        self._splice: Splice | None = None
        # None once the client has to stay.
        self._kept: bytearray | None = bytearray()
        self._ended = False

    @property
    def kept(self) -> int | None:
        """Bytes that the next channel would get at once; None once there can be no other."""
        return None if self._kept is None else len(self._kept)

    def join(self, channel: Channel) -> None:
        """Let bytes flow: first what the client has sent up to now."""
        if self.transport is None:
            self._waiting = channel
            return
        transport, kept = self.transport, cast(bytearray, self._kept)
        self._splice = Splice(channel, self._owner.side_closed)
        self._splice.transport = transport
        channel.set_protocol(_ServiceSide(self._splice, self))
        # Before anything is written: the channel may ask for a pause.
        self._pace()
        if kept:
            channel.write(bytes(kept))
        if self._ended:
            channel.write_eof()

    def settle(self) -> None:
        """The client stays with the channel that it has, if any, and bytes take the short way."""
        if self._splice is not None:
            self._kept = None
            self._splice.take_over()

    def abort(self) -> None:
        """Reset all there is, without another word."""
        self._owner = _Nobody()
        if self._splice is not None:
            self._splice.abort()
        elif self.transport is not None:
            abort(self.transport)
        if self._waiting is not None:
            self._waiting.abort()

    # What the client does

    def tcp_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(high=TCP_HIGH)
        channel, self._waiting = self._waiting, None
        if channel is not None:
            self.join(channel)

    def room(self) -> memoryview:
        if self._splice is None:
            return reading_buffer[: REPLAY - len(cast(bytearray, self._kept))]
        return reading_buffer

    def client_sent(self, data: memoryview) -> None:
        splice, kept = self._splice, cast(bytearray, self._kept)
        if splice is None:
            kept += data
            self._pace()
            return
        if len(kept) + len(data) <= REPLAY:
            kept += data
        else:
            # More than can be sent again. The channel still tells of its first byte.
            self._kept = None
            cast(asyncio.Transport, self.transport).set_protocol(splice.tcp)
        splice.channel.write(data)

    def client_ended(self) -> None:
        self._ended = True
        if self._splice is not None:
            self._splice.tcp.eof_received()

    def client_lost(self, error: Exception | None) -> None:
        self._owner.client_gone(error)

    # What the service does

    def answered(self) -> None:
        self.settle()
        self._owner.service_answered()

    def broke(self, error: Exception | None) -> bool:
        """Returns whether the client can be moved."""
        if self._kept is None:
            return False
        self._splice = None
        self._pace()
        self._owner.service_broke(error)
        return True

    def _pace(self) -> None:
        """Read, unless there is neither a channel for more nor room to keep it."""
        transport = cast(asyncio.Transport, self.transport)
        if transport.is_closing():
            return
        if self._splice is None and self.kept == REPLAY:
            transport.pause_reading()
        else:
            transport.resume_reading()


class _ClientSide(asyncio.BufferedProtocol):
    def __init__(self, early: Early) -> None:
        self._early = early

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._early.tcp_made(cast(asyncio.Transport, transport))

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._early.room()

    def buffer_updated(self, size: int) -> None:
        self._early.client_sent(reading_buffer[:size])

    def eof_received(self) -> bool:
        self._early.client_ended()
        return True

    def pause_writing(self) -> None:
        """Nothing is written before the first byte."""

    def resume_writing(self) -> None:
        """See above."""

    def connection_lost(self, error: Exception | None) -> None:
        self._early.client_lost(error)


class _ServiceSide(ChannelSide):
    """The channel's protocol until its first byte. A pause of the channel is the client's."""

    def __init__(self, splice: Splice, early: Early) -> None:
        super().__init__(splice)
        self._early = early

    def data_received(self, data: bytes) -> None:
        self._early.answered()
        super().data_received(data)

    def eof_received(self) -> bool:
        self._early.answered()
        return super().eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._early.broke(error):
            super().connection_lost(error)


class _Nobody:
    """Owns what is aborted."""

    def client_gone(self, _error: Exception | None) -> None:
        pass

    def service_broke(self, _error: Exception | None) -> None:
        pass

    def service_answered(self) -> None:
        pass

    def side_closed(self, _error: Exception | None) -> None:
        pass
