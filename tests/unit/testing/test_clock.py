"""Virtual time passes only while nothing else can happen."""

from __future__ import annotations

import asyncio
import time

import pytest

from hyperseaport.testing import clock
from hyperseaport.testing.clock import Deadlock, run_virtual


def test_a_day_passes_at_once_and_exactly() -> None:
    async def program() -> float:
        loop = asyncio.get_running_loop()
        before = loop.time()
        await asyncio.sleep(86_400)
        return loop.time() - before

    began = time.perf_counter()
    assert run_virtual(program()) == pytest.approx(86_400)
    assert time.perf_counter() - began < 10


def test_timers_fire_in_order_of_time() -> None:
    fired: list[float] = []

    async def sleeper(delay: float) -> None:
        await asyncio.sleep(delay)
        fired.append(delay)

    async def program() -> None:
        await asyncio.gather(*(sleeper(delay) for delay in (3.0, 1.0, 2.0)))

    run_virtual(program())
    assert fired == [1.0, 2.0, 3.0]


def test_time_starts_where_it_is_told() -> None:
    async def program() -> float:
        return asyncio.get_running_loop().time()

    assert run_virtual(program(), start=1000.0) == 1000.0


def test_time_stands_still_while_there_is_work() -> None:
    async def program() -> float:
        for _ in range(1000):
            await asyncio.sleep(0)
        return asyncio.get_running_loop().time()

    assert run_virtual(program()) == 0.0


def test_waiting_for_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "STALL", 0.01)

    async def program() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock):
        run_virtual(program())


def test_threads_may_still_report() -> None:
    async def program() -> str:
        return await asyncio.to_thread(lambda: "done")

    assert run_virtual(program()) == "done"
