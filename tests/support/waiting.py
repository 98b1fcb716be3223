"""Bounded polling, for what happens in other processes and tells nobody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def until(
    condition: Callable[[], Awaitable[T]], what: str, *, deadline: float, every: float = 0.05
) -> T:
    """The first true result of `condition`, asked every `every` seconds for `deadline` seconds."""
    end = time.monotonic() + deadline
    while True:
        result = await condition()
        if result:
            return result
        left = end - time.monotonic()
        assert left > 0, f"{what}: not so within {deadline:g} s, last seen {result!r}"
        await asyncio.sleep(min(every, left))
