"""The window that a receiver offers: it follows the application and the path.

The right edge is a stream offset, in bytes: what lies before it may be sent. It never moves back,
moves on as the application consumes, and faster while the capacity grows. Both are the receiver's
own affair (spec: udx 3.3).
"""

from __future__ import annotations

#: Bytes that a long path may need to be filled: as much as the reference offers.
MAX_RECEIVE_WINDOW = 4 * 1024 * 1024
#: Seconds. On a shorter path the base is enough for 28 MB/s and more; what looks longer to a busy
#: process is its own delay, and a larger window would only add to that.
_LONG_PATH = 0.008


class Window:
    """How many bytes a peer may send. Times are seconds."""

    __slots__ = (
        "_behind_since",
        "_consumed",
        "_epoch",
        "_fill_time",
        "_mark",
        "_mark_at",
        "_told",
        "base",
        "capacity",
        "credited",
        "edge",
    )

    def __init__(self, capacity: int) -> None:
        #: The least and the present number of bytes that may be held when nothing is.
        self.base = capacity
        self.capacity = capacity
        #: Bytes consumed so far, and the offset before which the peer may send.
        self.credited = 0
        self.edge = capacity
        # Bytes consumed since the epoch began: an epoch is a round trip, at most.
        self._epoch = 0.0
        self._consumed = 0
        # The edge as last told, one whose time is taken and since when, and how long the last took.
        self._told = capacity
        self._mark: int | None = None
        self._mark_at = 0.0
        self._fill_time: float | None = None
        # Since when the reader has held more than the base.
        self._behind_since: float | None = None

    @property
    def room(self) -> int:
        """Bytes that may be held."""
        return self.edge - self.credited

    def credit(self, size: int) -> None:
        """The application has consumed so many bytes."""
        self.credited += size
        self._consumed += size
        edge = self.credited + self.capacity
        if edge > self.edge:
            self.edge = edge

    def follow(self, held: int, arrived: int, rtt: float | None, now: float) -> None:
        """Adapt, after the application had its turn: ``held`` bytes in order are not consumed yet,
        the peer has sent ``arrived`` in all, and ``rtt`` is the path's round trip if known."""
        if self.edge != self._told or (self._mark is not None and arrived >= self._mark):
            self._time_edge(arrived, now)
        rtt = 0.0 if rtt is None or self._fill_time is None else min(rtt, self._fill_time)
        behind = False
        if held <= self.base:
            self._behind_since = None
        else:
            behind = self._falls_behind(rtt, now)
        if behind:
            self.capacity = self.base
        elif rtt >= _LONG_PATH and self._consumed > self.capacity // 2:
            self.capacity = max(self.capacity, min(2 * self.capacity, MAX_RECEIVE_WINDOW))
            self.edge = max(self.edge, self.credited + self.capacity)
            self._epoch, self._consumed = now, 0
        if now - self._epoch >= rtt:
            self._epoch, self._consumed = now, 0
        self._told = self.edge

    def _time_edge(self, arrived: int, now: float) -> None:
        """Take the time until the peer has reached an edge: at least a round trip from when it is
        told of it, which is now if the edge has just moved."""
        if self._mark is not None and arrived >= self._mark:
            self._fill_time = now - self._mark_at
            self._mark = None
        if self._mark is None and self.edge > self._told:
            self._mark, self._mark_at = self.edge, now

    def _falls_behind(self, rtt: float, now: float) -> bool:
        """Whether more than the base, which is held now, has been held for a round trip; what a
        gap had kept back may be more for a moment."""
        if self._behind_since is None:
            self._behind_since = now
        return now - self._behind_since >= rtt
