"""Order of start and stop, what children know of each other, specifications."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import structlog
from support.supervised import Journal, Plan, Worker, end, supervisor

from hyperseaport.actors.actor import (
    SHUTDOWN,
    ActorAddress,
    InvalidInput,
)
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.supervisor import (
    ChildSpec,
    GaveUp,
    Strategy,
    Supervisor,
)
from hyperseaport.testing.clock import run_virtual

# Order of start and stop.


def test_each_child_starts_when_the_one_before_is_ready() -> None:
    journal: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            slow = Plan(journal, ready_after=2.0)
            nested = supervisor("one_for_one", ChildSpec("inner", Worker, slow, wait_ready=5))
            root = runtime.spawn(
                Supervisor,
                supervisor(
                    "rest_for_one",
                    ChildSpec("first", Worker, slow, wait_ready=5),
                    ChildSpec("nested", Supervisor, nested, wait_ready=5),
                    ChildSpec("last", Worker, Plan(journal)),
                ),
            )
            for time, started in ((1, 1), (3, 2), (5, 3)):
                await asyncio.sleep(time - runtime.loop.time())
                assert journal == ["+first", "+inner", "+last"][:started]
            await runtime.ready(root)
            assert runtime.loop.time() == pytest.approx(5)

    run_virtual(program())


@pytest.mark.parametrize(
    ("strategy", "at_start", "after_failure"),
    [("one_for_one", "+a", "-a +a"), ("rest_for_one", "+a", "-a -c -b +a")],
)
def test_a_restart_waits_for_elders_only_where_the_strategy_is_about_order(
    strategy: Strategy, at_start: str, after_failure: str
) -> None:
    journal: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            slow = Plan(journal, ready_after=2.0)
            children = [ChildSpec(name, Worker, slow, wait_ready=5) for name in "abc"]
            root = runtime.spawn(Supervisor, supervisor(strategy, *children), name="root")
            await asyncio.sleep(1)
            assert " ".join(journal) == at_start
            await runtime.ready(root)
            journal.clear()
            end(runtime, "/root/a")
            await asyncio.sleep(1)
            assert " ".join(journal) == after_failure
            if strategy == "one_for_one":
                # While its elder is not ready, b comes back.
                end(runtime, "/root/b")
                await asyncio.sleep(0.5)
                assert journal[-2:] == ["-b", "+b"]

    run_virtual(program())


def test_a_child_that_does_not_get_ready_is_a_failure() -> None:
    journal: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            spec = ChildSpec("a", Worker, Plan(journal), wait_ready=3)
            never = runtime.spawn(
                Supervisor, supervisor("one_for_one", spec, intensity=1, period=10)
            )
            assert await runtime.stopped(never) == GaveUp(
                "/a failed 2 times in 10 s, the last time: not ready within 3 s"
            )
            assert runtime.loop.time() == pytest.approx(6)

    with structlog.testing.capture_logs() as entries:
        run_virtual(program())
    assert journal == ["+a", "-a", "+a", "-a"]
    reasons = [entry["reason"] for entry in entries if entry["event"] == "child.restarting"]
    assert reasons == ["not ready within 3 s"]


@pytest.mark.parametrize(
    ("shutdown", "lasts", "reasons"),
    [(5.0, 6.0, "shutdown shutdown shutdown"), (1.0, 3.0, "killed killed killed")],
)
def test_children_stop_one_by_one_and_are_killed_after_their_time(
    shutdown: float, lasts: float, reasons: str
) -> None:
    journal: Journal = []
    plan = Plan(journal, stop_after=2.0)

    async def program() -> None:
        async with ActorRuntime() as runtime:
            children = [ChildSpec(name, Worker, plan, shutdown=shutdown) for name in "abc"]
            root = runtime.spawn(Supervisor, supervisor("one_for_one", *children), name="root")
            await runtime.ready(root)
            found = [runtime.find(f"/root/{name}") for name in "abc"]
            addresses = [address for address in found if address is not None]
            runtime.stop(root, timeout=60)
            assert await runtime.stopped(root) == SHUTDOWN
            assert runtime.loop.time() == pytest.approx(lasts)
            assert " ".join(address.reason.text for address in addresses) == reasons

    run_virtual(program())
    assert journal == ["+a", "+b", "+c", "-c", "-b", "-a"]


def test_a_killed_supervisor_takes_its_children_along() -> None:
    journal: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            children = [ChildSpec(name, Worker, Plan(journal, stop_after=2)) for name in "ab"]
            root = runtime.spawn(Supervisor, supervisor("one_for_one", *children), name="root")
            await runtime.ready(root)
            runtime.kill("/root")
            assert runtime.actor_count == 0

    run_virtual(program())
    assert journal == ["+a", "+b", "-b", "-a"]


# Context.


def test_a_child_knows_its_elders_and_those_of_its_ancestors() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            plan = Plan()
            inner = supervisor(
                "rest_for_one", ChildSpec("c", Worker, plan), ChildSpec("d", Worker, plan)
            )
            root = runtime.spawn(
                Supervisor,
                supervisor(
                    "rest_for_one",
                    ChildSpec("a", Worker, plan),
                    ChildSpec("inner", Supervisor, inner, wait_ready=5),
                    ChildSpec("z", Worker, plan),
                ),
                name="root",
            )
            await runtime.ready(root)

            async def context(path: str) -> dict[str, ActorAddress]:
                address = runtime.find(path)
                assert address is not None
                known = await runtime.call(address, {})
                assert isinstance(known, dict)
                return known

            def living(**paths: str) -> dict[str, ActorAddress | None]:
                return {name: runtime.find(path) for name, path in paths.items()}

            async def check() -> None:
                assert await context("/root/a") == {}
                assert await context("/root/inner/c") == living(a="/root/a")
                assert await context("/root/inner/d") == living(a="/root/a", c="/root/inner/c")
                assert await context("/root/z") == living(a="/root/a", inner="/root/inner")

            await check()
            for victim in ("/root/a", "/root/inner/c", "/root/inner"):
                runtime.kill(victim)
                await asyncio.sleep(1)
                await check()

    run_virtual(program())


def test_a_restarted_child_does_not_get_to_know_younger_ones() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            children = [ChildSpec(name, Worker, Plan()) for name in "ab"]
            root = runtime.spawn(Supervisor, supervisor("one_for_one", *children), name="root")
            await runtime.ready(root)
            runtime.kill("/root/a")
            await asyncio.sleep(1)
            restarted = runtime.find("/root/a")
            assert restarted is not None
            assert await runtime.call(restarted, {}) == {}

    run_virtual(program())


# Specifications that cannot work.


@pytest.mark.parametrize(
    "make",
    [
        lambda: ChildSpec("", Worker),
        lambda: ChildSpec("a/b", Worker),
        lambda: ChildSpec("a", Worker, restart="sometimes"),  # type: ignore[arg-type]
        lambda: supervisor("one_for_none"),  # type: ignore[arg-type]
        lambda: supervisor("simple_one_for_one"),
        lambda: supervisor("one_for_one", ChildSpec("a", Worker), ChildSpec("a", Worker)),
        lambda: supervisor("one_for_one", intensity=-1),
        lambda: supervisor("one_for_one", period=0),
    ],
)
def test_specifications_that_cannot_work_are_refused(make: Any) -> None:
    with pytest.raises(InvalidInput):
        make()
