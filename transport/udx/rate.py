"""How fast the path delivers, measured for each acknowledgement.

Packets that leave together share one `Departure`, which remembers how much had been delivered by
then. When the newest of them is acknowledged, what was delivered in between, over the time that
took, is a sample of the path's rate (draft-cheng-iccrg-delivery-rate-estimation; spec: udx 5.1).
"""

from __future__ import annotations

from typing import NamedTuple

#: Seconds; what takes less time tells nothing.
_SHORTEST = 1e-6


class Departure(NamedTuple):
    """When packets left, and what had been delivered then. Times are seconds."""

    sent: float
    #: Packets delivered by then, and when the last of them was.
    delivered: int = 0
    delivered_at: float = 0.0
    #: When the newest packet left that was acknowledged by then.
    first_sent: float = 0.0
    #: The writer or the peer's window, not the path, held back what was sent.
    limited: bool = False


class Sample(NamedTuple):
    """What one acknowledgement tells about the path."""

    #: Packets delivered since the one before, and in all.
    packets: int
    total: int
    #: Packets delivered when the newest acknowledged packet left; None if that is not known.
    prior: int | None = None
    #: Packets a second; None if the time was too short to tell.
    rate: float | None = None
    #: The rate is only a lower bound.
    limited: bool = False


class Delivery:
    """Counts what is delivered."""

    __slots__ = ("_at", "_first_sent", "_limited_until", "total")

    def __init__(self) -> None:
        #: Packets delivered ever.
        self.total = 0
        self._at = 0.0
        self._first_sent = 0.0
        # Samples are lower bounds until so many are delivered.
        self._limited_until = 1

    def depart(self, now: float, *, idle: bool) -> Departure:
        """Packets leave; ``idle`` says that nothing was in flight before."""
        if idle:
            self._at = self._first_sent = now
        limited = self._limited_until > 0
        return Departure(now, self.total, self._at, self._first_sent, limited)

    def limit(self, in_flight: int) -> None:
        """More could be in flight than there is to send."""
        self._limited_until = max(1, self.total + in_flight)

    def arrived(self, packets: int, newest: Departure | None, min_rtt: float, now: float) -> Sample:
        """So many packets were acknowledged, the newest of which left with ``newest``."""
        self.total += packets
        self._at = now
        if self.total > self._limited_until:
            self._limited_until = 0
        if newest is None:
            return Sample(packets, self.total)
        sent, prior, delivered_at, first_sent, limited = newest
        if sent > self._first_sent:
            self._first_sent = sent
        # Acknowledgements can bunch up, and so can departures: neither makes a path faster.
        interval = max(sent - first_sent, now - delivered_at)
        long_enough = interval >= min_rtt and interval >= _SHORTEST
        rate = (self.total - prior) / interval if long_enough else None
        return Sample(packets, self.total, prior, rate, limited)
