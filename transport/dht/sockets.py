"""Sockets beside the two main ones: what a core asks its shell to open and to close.

Their numbers follow those of the main sockets and are never used again.
"""

from __future__ import annotations

from functools import partial

from ..transmit import CLIENT_SOCKET
from ..udx.stream import Stream
from .timers import Timers

#: Open at once: those of one search through a random NAT, and some for other purposes.
MAX_SOCKETS = 320
#: Seconds that a socket stays open after its last stream has closed. Peers that were told that it
#: can be used again try that for 3 s (spec: hyperdht 4.5).
LINGER = 5.0
#: Seconds between two looks at whether the streams of a socket have closed.
_LOOK = 2.0


class Sockets:
    """Who asks for a socket gets its number at once; the shell opens it before it sends what the
    core has to send, and closes it after that."""

    __slots__ = ("_closing", "_held", "_last", "_open", "_opening", "_timers")

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._last = CLIENT_SOCKET
        self._open: set[int] = set()
        # What the shell has not been told yet.
        self._opening: list[int] = []
        self._closing: list[int] = []
        # Streams by the socket that stays open for them.
        self._held: dict[int, list[Stream]] = {}

    def __len__(self) -> int:
        """Sockets that are open."""
        return len(self._open)

    def open(self) -> int | None:
        """A new socket on a random port; None beyond `MAX_SOCKETS`."""
        if len(self._open) >= MAX_SOCKETS:
            return None
        self._last += 1
        self._open.add(self._last)
        self._opening.append(self._last)
        return self._last

    def close(self, socket: int) -> None:
        """Close a socket, unless it is held for streams. Harmless for a main socket and twice."""
        if socket not in self._open or socket in self._held:
            return
        self._open.discard(socket)
        if socket in self._opening:
            self._opening.remove(socket)
        else:
            self._closing.append(socket)

    def hold(self, socket: int, stream: Stream, now: float) -> None:
        """Keep a socket open until `LINGER` after this stream, and all others it is held for, have
        closed. Without effect for a main socket."""
        if socket not in self._open:
            return
        if socket in self._held:
            self._held[socket].append(stream)
            return
        self._held[socket] = [stream]
        self._timers.at(now + _LOOK, partial(self._look, socket))

    @property
    def changed(self) -> bool:
        """Whether `opened` or `closed` have something to say."""
        return bool(self._opening or self._closing)

    def usable(self, socket: int) -> bool:
        """Whether datagrams can leave from it."""
        return socket <= CLIENT_SOCKET or socket in self._open

    def opened(self) -> list[int]:
        """What the shell has to open now."""
        opening, self._opening = self._opening, []
        return opening

    def closed(self) -> list[int]:
        """What the shell has to close now."""
        closing, self._closing = self._closing, []
        return closing

    def failed(self, socket: int) -> None:
        """The shell could not open it."""
        self._open.discard(socket)
        self._held.pop(socket, None)

    def _look(self, socket: int, now: float) -> None:
        streams = self._held.get(socket)
        if streams is None:
            return
        streams[:] = [stream for stream in streams if not stream.closed]
        if streams:
            self._timers.at(now + _LOOK, partial(self._look, socket))
        else:
            self._timers.at(now + LINGER, partial(self._let_go, socket))

    def _let_go(self, socket: int, now: float) -> None:
        if self._held.get(socket):
            # Somebody has connected over it in between.
            self._timers.at(now + _LOOK, partial(self._look, socket))
            return
        self._held.pop(socket, None)
        self.close(socket)
