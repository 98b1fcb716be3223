"""Two protocols back to back: what arrives on a TCP connection is written into a channel, and the
reverse. Everything here runs in the event loop's callbacks, with no task and no queue of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable
from typing import cast

from ..transport.channel import MESSAGE, Channel

#: Plain bytes taken from a TCP socket at once.
READ = MESSAGE
#: Bytes that wait for a TCP socket which takes no more, before the channel is paused. What the
#: channel holds besides counts against its receive window.
TCP_HIGH = 32_768

#: Messages of at most this many bytes go to the kernel at once, past the TCP transport: uvloop's
#: keeps them until the end of its turn, when everything else of the turn has been done.
DIRECT = 4096

#: Every splice reads into the same: what is read is encrypted before the next socket is read.
reading_buffer = memoryview(bytearray(READ))


class Splice:
    """Joins a channel with the TCP connection of protocol ``tcp``, as soon as that is made.

    ``on_closed(error)`` is called twice in the end, once for each side: None when it closed in
    order, else what broke it.
    """

    __slots__ = ("_on_closed", "channel", "channel_side", "descriptor", "tcp", "transport")

    def __init__(self, channel: Channel, on_closed: Callable[[Exception | None], None]) -> None:
        self._on_closed = on_closed
        self.channel_side = ChannelSide(self)
        self.tcp = TcpSide(self)
        self.transport: asyncio.Transport | None = None
        #: The TCP connection's, while it may be written to; -1 where there is none.
        self.descriptor = -1
        self.channel = channel
        channel.piped = True

    def tcp_made(self, transport: asyncio.Transport) -> None:
        """Let bytes flow: some event loops read before anybody can ask them to wait."""
        self.transport = transport
        self.descriptor = _descriptor(transport)
        transport.set_write_buffer_limits(high=TCP_HIGH)
        self.channel.set_protocol(self.channel_side)

    def take_over(self) -> None:
        """The same for a ``transport`` and a channel that somebody else has served until now."""
        transport = cast(asyncio.Transport, self.transport)
        self.descriptor = _descriptor(transport)
        transport.set_protocol(self.tcp)
        self.channel.set_protocol(self.channel_side)

    def abort(self) -> None:
        """Reset both sides, without another word."""
        self._on_closed = _nobody
        self.channel.abort()
        if self.transport is not None:
            abort(self.transport)

    def tcp_closed(self, error: Exception | None) -> None:
        self.descriptor = -1
        channel = self.channel
        if error is not None or not (channel.ended or channel.is_closing()):
            # What the peer has not got is lost with the connection: it must not look whole.
            channel.abort()
        self._on_closed(error)

    def channel_closed(self, error: Exception | None) -> None:
        transport = cast(asyncio.Transport, self.transport)
        if error is not None:
            abort(transport)
        else:
            transport.close()
        self._on_closed(error)


class TcpSide(asyncio.BufferedProtocol):
    def __init__(self, splice: Splice) -> None:
        self._splice = splice

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._splice.tcp_made(cast(asyncio.Transport, transport))

    def get_buffer(self, _sizehint: int) -> memoryview:
        return reading_buffer

    def buffer_updated(self, size: int) -> None:
        self._splice.channel.write(reading_buffer[:size])

    def eof_received(self) -> bool:
        channel = self._splice.channel
        if not channel.is_closing():
            channel.write_eof()
        return True

    def pause_writing(self) -> None:
        self._splice.channel.pause_reading()

    def resume_writing(self) -> None:
        self._splice.channel.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._splice.tcp_closed(error)


class ChannelSide(asyncio.Protocol):
    def __init__(self, splice: Splice) -> None:
        self._splice = splice

    def data_received(self, data: bytes) -> None:
        splice = self._splice
        transport = cast(asyncio.Transport, splice.transport)
        if (
            len(data) <= DIRECT
            and splice.descriptor >= 0
            and not transport.get_write_buffer_size()
            # From then on the descriptor is no longer ours.
            and not transport.is_closing()
        ):
            try:
                written = os.write(splice.descriptor, data)
            except OSError:
                # The kernel takes no more, or never will: the transport finds out which.
                written = 0
            if written == len(data):
                return
            data = data[written:]
        transport.write(data)

    def eof_received(self) -> bool:
        transport = cast(asyncio.Transport, self._splice.transport)
        if not transport.is_closing():
            try:
                transport.write_eof()
            except OSError:
                # It was reset, and nobody has read that yet.
                transport.abort()
        return True

    def pause_writing(self) -> None:
        transport = cast(asyncio.Transport, self._splice.transport)
        if not transport.is_closing():
            transport.pause_reading()

    def resume_writing(self) -> None:
        transport = cast(asyncio.Transport, self._splice.transport)
        if not transport.is_closing():
            transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._splice.channel_closed(error)


def _nobody(_error: Exception | None) -> None:
    """Hears of the end of a splice whose owner has ended it."""


def _descriptor(transport: asyncio.Transport) -> int:
    """Of the transport's socket; -1 for none, and where sockets are no files."""
    found = transport.get_extra_info("socket") if os.name == "posix" else None
    return -1 if found is None else cast(int, found.fileno())


def abort(transport: asyncio.Transport) -> None:
    """Close a TCP connection so that its peer sees a reset, not an end."""
    found = transport.get_extra_info("socket")
    if found is not None and found.fileno() >= 0:
        _linger_zero(found)
    transport.abort()


def reset(tcp: socket.socket) -> None:
    """The same for a plain socket."""
    _linger_zero(tcp)
    tcp.close()


def _linger_zero(tcp: socket.socket) -> None:
    with contextlib.suppress(OSError):
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
