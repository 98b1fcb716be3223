"""What a supervisor tells of its children."""

from __future__ import annotations

import asyncio

from support.supervised import Plan, Worker, end, supervisor

from hyperseaport.actors.actor import KILLED, NORMAL
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.supervisor import (
    Backoff,
    Children,
    ChildSpec,
    ChildStatus,
    StartChild,
    Supervisor,
    TerminateChild,
    WhichChildren,
)
from hyperseaport.testing.clock import run_virtual

LATE = Backoff(initial=8.0, jitter=0.0)


async def children(
    runtime: ActorRuntime, path: str = "/root", limit: int | None = None
) -> Children:
    address = runtime.find("/root")
    assert address is not None
    answer = await runtime.call(address, WhichChildren(limit))
    assert isinstance(answer, Children)
    return answer


async def status(runtime: ActorRuntime, child: str) -> ChildStatus:
    return next(each for each in (await children(runtime)).children if each.id == child)


def test_states_and_ages_as_they_pass() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            slow = Plan(ready_after=2.0, stop_after=3.0)
            specs = [ChildSpec(name, Worker, slow, wait_ready=5.0) for name in "ab"]
            root = runtime.spawn(Supervisor, supervisor("one_for_one", *specs), name="root")
            await asyncio.sleep(0.5)
            whole = await children(runtime)
            assert (whole.state, whole.since) == ("starting", 0.5)
            a, b = whole.children
            assert a == ChildStatus(
                "a", Worker, runtime.find("/root/a"), "starting", 0.5, 0, "", None
            )
            # It waits for its elder, and has never been started.
            assert b == ChildStatus("b", Worker, None, "waiting", 0.0, 0, "", None)

            await runtime.ready(root)
            whole = await children(runtime)
            assert (whole.state, whole.strategy, whole.more) == ("serving", "one_for_one", 0)
            assert [(each.state, each.since) for each in whole.children] == [
                ("serving", 4.0),
                ("serving", 2.0),
            ]
            assert all(each.ready for each in whole.children)

            runtime.tell(root, TerminateChild("a"))
            await asyncio.sleep(1.0)
            assert (await status(runtime, "a")).state == "stopping"
            await asyncio.sleep(4.0)
            stopped = await status(runtime, "a")
            assert (stopped.state, stopped.since) == ("down", 2.0)
            assert (stopped.address, stopped.restarts, stopped.last_reason) == (None, 0, "")

            runtime.stop(root, timeout=60.0)
            await asyncio.sleep(1.0)
            whole = await children(runtime)
            assert whole.state == "stopping"
            assert [each.state for each in whole.children] == ["down", "stopping"]

    run_virtual(program())


def test_failures_are_counted_and_the_last_is_remembered() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            specs = [ChildSpec(name, Worker, Plan()) for name in "ab"]
            spec = supervisor("one_for_one", *specs, backoff=LATE)
            runtime.spawn(Supervisor, spec, name="root")
            await asyncio.sleep(1.0)
            end(runtime, "/root/a", KILLED)
            await asyncio.sleep(1.0)
            a = await status(runtime, "a")
            assert (a.state, a.restarts, a.last_reason) == ("serving", 1, "killed")
            assert a.since == 1.0

            address = runtime.find("/root/a")
            assert address is not None
            runtime.tell(address, OSError("no space left on device\nsecond line"))
            await asyncio.sleep(3.0)
            a = await status(runtime, "a")
            assert (a.state, a.address, a.ready) == ("waiting", None, False)
            assert (a.since, a.restarts_in) == (3.0, 5.0)
            assert (a.restarts, a.last_reason) == (1, "OSError: no space left on device")
            await asyncio.sleep(6.0)
            a = await status(runtime, "a")
            assert (a.state, a.restarts, a.restarts_in) == ("serving", 2, None)
            assert a.last_reason == "OSError: no space left on device"
            b = await status(runtime, "b")
            assert (b.restarts, b.last_reason) == (0, "")

    run_virtual(program())


def test_siblings_of_a_failure_are_restarted_but_have_no_reason() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            specs = [ChildSpec(name, Worker, Plan()) for name in "abc"]
            spec = supervisor("rest_for_one", *specs, backoff=LATE)
            runtime.spawn(Supervisor, spec, name="root")
            await asyncio.sleep(1.0)
            end(runtime, "/root/b")
            await asyncio.sleep(1.0)
            whole = await children(runtime)
            assert [(each.restarts, each.last_reason) for each in whole.children] == [
                (0, ""),
                (1, "killed"),
                (1, ""),
            ]
            end(runtime, "/root/b")
            await asyncio.sleep(2.0)
            whole = await children(runtime)
            assert [(each.state, each.restarts_in) for each in whole.children] == [
                ("serving", None),
                ("waiting", 6.0),
                ("waiting", 6.0),
            ]

    run_virtual(program())


def test_one_that_was_asked_to_stop_and_had_to_be_killed_has_not_failed() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            spec = ChildSpec("a", Worker, Plan(stop_after=60.0), shutdown=1.0)
            root = runtime.spawn(Supervisor, supervisor("one_for_one", spec), name="root")
            await runtime.call(root, TerminateChild("a"))
            assert (await status(runtime, "a")).last_reason == ""

    run_virtual(program())


def test_a_transient_child_that_has_done_its_work_is_down() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            spec = ChildSpec("a", Worker, Plan(), "transient")
            runtime.spawn(Supervisor, supervisor("one_for_one", spec), name="root")
            await asyncio.sleep(1.0)
            end(runtime, "/root/a", NORMAL)
            await asyncio.sleep(1.0)
            a = await status(runtime, "a")
            assert (a.state, a.restarts_in, a.last_reason) == ("down", None, "")

    run_virtual(program())


def test_a_wide_supervisor_is_told_of_in_part() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            spec = supervisor(
                "simple_one_for_one", ChildSpec("each", Worker, Plan(), "transient"), backoff=LATE
            )
            pipes = runtime.spawn(Supervisor, spec, name="root")
            for _ in range(100):
                runtime.tell(pipes, StartChild())
            some = await children(runtime, limit=3)
            assert ([each.id for each in some.children], some.more) == (["1", "2", "3"], 97)
            assert (some.strategy, some.state) == ("simple_one_for_one", "serving")
            none = await children(runtime, limit=0)
            assert (none.children, none.more) == ((), 100)
            everybody = await children(runtime)
            assert (len(everybody.children), everybody.more) == (100, 0)
            for _ in range(2):
                end(runtime, "/root/1")
                await asyncio.sleep(1.0)
            first = (await children(runtime, limit=1)).children[0]
            assert (first.state, first.restarts) == ("waiting", 1)
            assert first.restarts_in == 7.0

    run_virtual(program())


def test_a_supervisor_of_few_tells_of_all_whatever_the_limit() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            specs = [ChildSpec(name, Worker, Plan()) for name in "abc"]
            runtime.spawn(Supervisor, supervisor("one_for_all", *specs), name="root")
            whole = await children(runtime, limit=1)
            assert [each.id for each in whole.children] == list("abc")

    run_virtual(program())
