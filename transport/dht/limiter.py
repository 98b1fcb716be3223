"""Token buckets by host: how much of our work or bandwidth one host may ask for."""

from __future__ import annotations

#: Hosts remembered; the one heard from longest ago is forgotten first, and starts anew.
MAX_HOSTS = 4096


class Limiter:
    """``rate`` a second for each host, up to ``burst`` at once."""

    __slots__ = ("_buckets", "_burst", "_rate")

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        # Host to what is left and when that was so, in order of use.
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, host: str, now: float) -> bool:
        """Spend one, unless the host has none left."""
        left = self._left(host, now)
        if left < 1:
            return False
        self._buckets.pop(host, None)
        if len(self._buckets) >= MAX_HOSTS:
            del self._buckets[next(iter(self._buckets))]
        self._buckets[host] = left - 1, now
        return True

    def allows(self, host: str, now: float) -> bool:
        """Whether `take` would succeed."""
        return self._left(host, now) >= 1

    def _left(self, host: str, now: float) -> float:
        bucket = self._buckets.get(host)
        if bucket is None:
            return self._burst
        left, then = bucket
        return min(self._burst, left + (now - then) * self._rate)
