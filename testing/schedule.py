"""Things that happen later on a running event loop, in the order of their times."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable


class Schedule:
    """Runs actions at times of the loop's clock, those of one time in the order they were given,
    which timers of the loop do not promise. ``after()`` is called once for all that were due."""

    def __init__(self, after: Callable[[], None] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._after = after
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Actions that have not happened."""
        return len(self._agenda)

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Run ``action`` when the loop's clock reaches ``when``; at once if it has."""
        if when <= self._loop.time() and not self._overdue():
            action()
            return
        self._sequence += 1
        heapq.heappush(self._agenda, (when, self._sequence, action))
        self._arm()

    def cancel(self) -> None:
        """Forget everything."""
        self._agenda.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _overdue(self) -> bool:
        return bool(self._agenda) and self._agenda[0][0] <= self._loop.time()

    def _arm(self) -> None:
        first = self._agenda[0][0]
        if self._timer is not None:
            if self._timer.when() <= first:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(first, self._ring)

    def _ring(self) -> None:
        self._timer = None
        while self._overdue():
            heapq.heappop(self._agenda)[2]()
        if self._after is not None:
            self._after()
        if self._agenda:
            self._arm()
