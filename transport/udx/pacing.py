"""Spreads what is sent over time: a token bucket, counted in packets.

Packets leave in bursts that are worth a system call, so its cost is one timer for each burst.
"""

from __future__ import annotations

#: Seconds of sending that a late timer may make up for.
_CATCH_UP = 0.005
#: Packets that may leave at once after a pause: a request or an answer, as a rule.
_FIRST = 10.0
#: A share of a packet that rounding may have lost.
_EPSILON = 1e-6


class Pacer:
    """How many packets may leave now. Times are seconds, rates packets a second; a rate of None
    sets no limit."""

    __slots__ = ("_at", "_tokens")

    def __init__(self) -> None:
        self._tokens = 0.0
        self._at = 0.0

    def grant(self, wanted: int, rate: float | None, burst: int, now: float) -> int:
        """How many of ``wanted`` packets may leave: none, or enough to make up a burst."""
        if rate is None:
            self._tokens, self._at = float(burst), now
            return wanted
        most = max(2.0 * burst, rate * _CATCH_UP, _FIRST)
        self._tokens = min(self._tokens + (now - self._at) * rate, most)
        self._at = now
        if self._tokens + _EPSILON < min(wanted, burst):
            return 0
        return min(wanted, int(self._tokens + _EPSILON))

    def spend(self, packets: int) -> None:
        """So many have left."""
        self._tokens -= packets

    def ready_at(self, wanted: int, rate: float, burst: int) -> float:
        """When `grant` will grant something again."""
        return self._at + max(0.0, min(wanted, burst) - self._tokens) / rate
