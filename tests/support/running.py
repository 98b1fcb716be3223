"""Runs one test's coroutine on a fresh event loop and fails when it leaves a task behind."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

#: How long the tasks of a finished test may take to wind up, in seconds; then they are leaks.
WIND_UP = 2.0


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run `test` to its end; AssertionError if tasks it started outlive it by WIND_UP seconds."""
    asyncio.run(_without_leaks(test), debug=False)


async def _without_leaks(test: Coroutine[Any, Any, None]) -> None:
    await test
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:
        _, left = await asyncio.wait(left, timeout=WIND_UP)
    assert not left, f"the test left tasks behind: {[task.get_coro() for task in left]}"
