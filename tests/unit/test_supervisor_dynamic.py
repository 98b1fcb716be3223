"""Children started on demand."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.supervised import AT_ONCE, Plan, Worker, end, supervisor

from hyperseaport.actors.actor import (
    KILLED,
    NORMAL,
    SHUTDOWN,
    ExitReason,
)
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.supervisor import (
    Backoff,
    ChildRefused,
    Children,
    ChildSpec,
    ChildStarted,
    ChildTerminated,
    StartChild,
    Supervisor,
    SupervisorSpec,
    TerminateChild,
    WhichChildren,
)
from hyperseaport.testing.clock import run_virtual


def pool(**options: Any) -> SupervisorSpec:
    restart = options.pop("restart", "temporary")
    wait_ready = options.pop("wait_ready", None)
    plan = options.pop("plan", Plan())
    template = ChildSpec("template", Worker, plan, restart, wait_ready=wait_ready)
    return supervisor("simple_one_for_one", template, **options)


def test_children_are_started_and_terminated_on_demand() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            pipes = runtime.spawn(Supervisor, pool(), name="pipes")
            await runtime.ready(pipes)
            first = await runtime.call(pipes, StartChild())
            named = await runtime.call(pipes, StartChild(Plan(), "named"))
            assert (first.id, first.address.path) == ("1", "/pipes/1")
            assert (named.id, named.address.path) == ("named", "/pipes/named")
            children = await runtime.call(pipes, WhichChildren())
            assert isinstance(children, Children)
            assert [child.address for child in children.children] == [first.address, named.address]

            for unfit in ("named", "a/b"):
                assert isinstance(await runtime.call(pipes, StartChild(None, unfit)), ChildRefused)
            assert await runtime.call(pipes, TerminateChild("named")) == ChildTerminated("named")
            assert not named.address.alive
            assert isinstance(await runtime.call(pipes, TerminateChild("named")), ChildRefused)
            assert isinstance(await runtime.call(pipes, StartChild(None, "named")), ChildStarted)

    run_virtual(program())


@pytest.mark.parametrize(
    ("restart", "reason", "stays"),
    [
        ("temporary", KILLED, False),
        ("transient", NORMAL, False),
        ("transient", KILLED, True),
        ("permanent", NORMAL, True),
    ],
)
@pytest.mark.parametrize("backoff", [AT_ONCE, Backoff(initial=0.5)])
def test_a_dynamic_child_restarts_under_its_id_or_is_forgotten(
    restart: str, reason: ExitReason, stays: bool, backoff: Backoff
) -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            pipes = runtime.spawn(Supervisor, pool(restart=restart, backoff=backoff), name="pipes")
            started = await runtime.call(pipes, StartChild())
            for _ in range(2):
                if runtime.find("/pipes/1"):
                    end(runtime, "/pipes/1", reason)
                await asyncio.sleep(1)
            children = (await runtime.call(pipes, WhichChildren())).children
            assert [child.id for child in children] == (["1"] if stays else [])
            successor = runtime.find("/pipes/1")
            assert (successor is not None) == stays
            assert all(child.address is successor for child in children)
            assert not started.address.alive

    run_virtual(program())


def test_the_answer_waits_until_the_child_serves() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            pipes = runtime.spawn(Supervisor, pool(wait_ready=5.0))
            assert isinstance(
                await runtime.call(pipes, StartChild(Plan(ready_after=3.0))), ChildStarted
            )
            assert runtime.loop.time() == pytest.approx(3)
            refused = await runtime.call(pipes, StartChild(Plan(ready_after=30.0)))
            assert refused == ChildRefused("it exited: not ready within 5 s")

    run_virtual(program())


def test_only_dynamic_supervisors_start_on_demand() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            fixed = runtime.spawn(Supervisor, supervisor("one_for_one"))
            assert isinstance(await runtime.call(fixed, StartChild()), ChildRefused)

    run_virtual(program())


def test_a_terminated_child_stays_down() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            children = [ChildSpec(name, Worker, Plan()) for name in "ab"]
            fixed = runtime.spawn(Supervisor, supervisor("one_for_one", *children), name="fixed")
            for _ in range(2):
                assert await runtime.call(fixed, TerminateChild("a")) == ChildTerminated("a")
            await asyncio.sleep(10)
            a, b = (await runtime.call(fixed, WhichChildren())).children
            assert (a.address, a.ready) == (None, False)
            assert (b.address, b.ready) == (runtime.find("/fixed/b"), True)

    run_virtual(program())


def test_ten_thousand_dynamic_children_stop_together() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            pipes = runtime.spawn(Supervisor, pool(plan=Plan(stop_after=2.0)))
            for _ in range(10_000):
                runtime.tell(pipes, StartChild())
            await asyncio.sleep(1)
            assert runtime.actor_count == 10_001
            runtime.stop(pipes)
            assert await runtime.stopped(pipes) == SHUTDOWN
            assert runtime.loop.time() == pytest.approx(3)

    run_virtual(program())


def test_a_bounded_supervisor_refuses_what_is_beyond_and_gives_the_args_back() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            pipes = runtime.spawn(Supervisor, pool(limit=2), name="pipes")
            plans = [Plan(["mine"]) for _ in range(3)]
            answers = [await runtime.call(pipes, StartChild(plan)) for plan in plans]
            assert [type(answer) for answer in answers] == [
                ChildStarted,
                ChildStarted,
                ChildRefused,
            ]
            refused = answers[2]
            assert refused.args is plans[2]
            assert "2" in refused.reason
            # It never had them in its hands.
            assert plans[2].journal == ["mine"]
            assert await runtime.call(pipes, TerminateChild("1")) == ChildTerminated("1")
            assert isinstance(await runtime.call(pipes, StartChild(plans[2])), ChildStarted)
            end(runtime, "/pipes/2")
            await asyncio.sleep(1)
            assert isinstance(await runtime.call(pipes, StartChild()), ChildStarted)
            assert isinstance(await runtime.call(pipes, StartChild()), ChildRefused)

    run_virtual(program())


@pytest.mark.parametrize("unfit", ["1", "a/b", ""])
def test_every_refusal_to_start_gives_the_args_back(unfit: str) -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            pipes = runtime.spawn(Supervisor, pool(), name="pipes")
            assert isinstance(await runtime.call(pipes, StartChild(None, "1")), ChildStarted)
            plan = Plan()
            refused = await runtime.call(pipes, StartChild(plan, unfit))
            assert isinstance(refused, ChildRefused)
            assert refused.args is plan

    run_virtual(program())
