"""Timers of one core: a heap of callbacks, one deadline."""

from __future__ import annotations

import heapq
from collections.abc import Callable

#: Below this many entries cancelled timers are not worth a sweep.
_SWEEP_FROM = 64


class Timer:
    """One callback to come; `cancel` makes sure that it does not."""

    __slots__ = ("_owner", "callback")

    def __init__(self, owner: Timers, callback: Callable[[float], None]) -> None:
        self._owner = owner
        #: None once it was called or cancelled.
        self.callback: Callable[[float], None] | None = callback

    def cancel(self) -> None:
        """Harmless when it has fired."""
        if self.callback is not None:
            self.callback = None
            self._owner.cancelled()


class Timers:
    """Callbacks by time, each called once with the time that `run` was given."""

    __slots__ = ("_cancelled", "_heap", "_sequence")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._sequence = 0
        self._cancelled = 0

    def at(self, when: float, callback: Callable[[float], None]) -> Timer:
        """Call ``callback(now)`` when `run` is called at ``when`` (seconds) or later."""
        timer = Timer(self, callback)
        self._sequence += 1
        heapq.heappush(self._heap, (when, self._sequence, timer))
        return timer

    def deadline(self) -> float | None:
        """When the next timer fires, or None."""
        heap = self._heap
        while heap and heap[0][2].callback is None:
            heapq.heappop(heap)
            self._cancelled -= 1
        return heap[0][0] if heap else None

    def run(self, now: float) -> None:
        """Fire all that is due, in order of time and then of creation. What is created meanwhile
        waits for the next call, so that this ends."""
        last = self._sequence
        late: list[tuple[float, int, Timer]] = []
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            callback = entry[2].callback
            if callback is None:
                self._cancelled -= 1
            elif entry[1] > last:
                late.append(entry)
            else:
                entry[2].callback = None
                callback(now)
        for entry in late:
            heapq.heappush(self._heap, entry)

    def cancelled(self) -> None:
        """Count a cancelled timer, and sweep when most of them are."""
        self._cancelled += 1
        if self._cancelled * 2 > len(self._heap) >= _SWEEP_FROM:
            self._heap = [entry for entry in self._heap if entry[2].callback is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0
