"""Deadlines of many things, of which most are put off before they come."""

from __future__ import annotations

import math
from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, Protocol, TypeVar

#: Cancelled deadlines that may lie in the heap beside as many living ones, before it is made anew.
SLACK = 1024


class Ending(Protocol):
    """What has a deadline: ``ends`` is it, and infinite for none; ``scheduled`` belongs to
    `Deadlines` and is infinite at first."""

    ends: float
    scheduled: float


T = TypeVar("T", bound=Ending)


class Deadlines(Generic[T]):
    """A heap in which a thing lies at ``scheduled``, which is at most its ``ends``. To put a
    deadline off costs nothing: the thing is moved only when the earlier time has come."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._serial = count()
        self._living = 0

    def set(self, thing: T) -> None:
        """Note that ``ends`` has changed."""
        if thing.ends >= thing.scheduled:
            return
        if thing.scheduled == math.inf:
            self._living += 1
        self._push(thing)
        if len(self._heap) > 2 * self._living + SLACK:
            self._heap = [item for item in self._heap if item[0] == item[2].scheduled]
            heapify(self._heap)

    def set_first(self, things: Iterable[T]) -> None:
        """`set` for many that had none before."""
        heap = self._heap
        for thing in things:
            ends = thing.scheduled = thing.ends
            heap.append((ends, next(self._serial), thing))
            self._living += 1
        heapify(heap)

    def cancel(self, thing: T) -> None:
        if thing.scheduled != math.inf:
            thing.scheduled = math.inf
            self._living -= 1

    def first(self) -> float | None:
        """When to call `pop`: not after the first deadline, and possibly before it."""
        while self._heap and self._heap[0][0] != self._heap[0][2].scheduled:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop(self, now: float) -> list[T]:
        """Those whose deadline has come, in that order; they have none any more."""
        due: list[T] = []
        while (first := self.first()) is not None and first <= now:
            _, _, thing = heappop(self._heap)
            if thing.ends <= now:
                due.append(thing)
                self.cancel(thing)
            elif thing.ends == math.inf:
                self.cancel(thing)
            else:
                self._push(thing)
        return due

    def _push(self, thing: T) -> None:
        thing.scheduled = thing.ends
        heappush(self._heap, (thing.ends, next(self._serial), thing))
