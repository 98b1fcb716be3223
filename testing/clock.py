"""Virtual time for asyncio: a loop whose clock jumps to the next timer when there is nothing to do.

Hours pass in milliseconds, and the order of events is the same in each run. For programs that wait
for timers and for each other; what waits for a real socket or thread sees its time-outs expire at
once, as no real time passes for them.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

STALL = 1.0
"""Real seconds for a thread to report when no timer is left; then nothing can ever happen again."""


class Deadlock(Exception):
    """All tasks wait, and no timer is left that could wake one of them."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time()` starts at `start` seconds and passes only while it is idle."""

    def __init__(self, start: float = 0.0) -> None:
        self._clock = _Clock(start)
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def run_virtual(coroutine: Coroutine[Any, Any, T], *, start: float = 0.0) -> T:
    """`asyncio.run` in virtual time.

    Raises Deadlock: the coroutine waits for what can never happen.
    """
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(start)) as runner:
        return runner.run(coroutine)


class _Clock(selectors.DefaultSelector):
    """A selector that, where others wait, advances the time instead."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.now = start

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            events = super().select(STALL)
            if not events:
                raise Deadlock("every task waits, and there is no timer that could wake one")
            return events
        events = super().select(0)
        if not events:
            self.now += max(timeout, 0.0)
        return events
