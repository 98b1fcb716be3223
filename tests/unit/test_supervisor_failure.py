"""Intensity, backoff, giving up, and what no restart mends."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from support.supervised import EXACT, Journal, Plan, Worker, end, supervisor

from hyperseaport.actors.actor import (
    KILLED,
    SHUTDOWN,
    Actor,
    ActorAddress,
    Crashed,
    ExitReason,
    InvalidInput,
    LocalError,
    handles,
)
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.supervisor import (
    Backoff,
    ChildRefused,
    ChildSpec,
    GaveUp,
    StartChild,
    Strategy,
    Supervisor,
    SupervisorSpec,
)
from hyperseaport.testing.clock import run_virtual
from hyperseaport.transport.errors import PeerNotFound

# Intensity, escalation, backoff.


@pytest.mark.parametrize(
    ("intensity", "gaps", "survives"),
    [
        (0, [1], False),
        (1, [1], True),
        (1, [1, 1], False),
        (1, [1, 5.1], True),
        (3, [1, 1, 1], True),
        (3, [1, 1, 1, 1], False),
        (3, [1, 2, 2, 2, 2], True),
    ],
)
def test_more_than_intensity_restarts_within_period_are_too_many(
    intensity: int, gaps: list[float], survives: bool
) -> None:
    journal: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            children = [ChildSpec(name, Worker, Plan(journal)) for name in "ab"]
            spec = supervisor("one_for_one", *children, intensity=intensity, period=5.0)
            root = runtime.spawn(Supervisor, spec, name="root")
            await runtime.ready(root)
            for gap in gaps:
                await asyncio.sleep(gap)
                end(runtime, "/root/a")
            await asyncio.sleep(1)
            assert root.alive == survives
            if not survives:
                assert isinstance(root.reason, GaveUp)
                assert journal[-2:] == ["-a", "-b"]

    run_virtual(program())


def test_the_parent_decides_about_a_supervisor_that_gave_up() -> None:
    journal: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            hopeless = Plan(journal, exit_after=0.1)
            inner = supervisor("one_for_one", ChildSpec("a", Worker, hopeless), intensity=1)
            root = runtime.spawn(
                Supervisor,
                supervisor(
                    "one_for_one",
                    ChildSpec("inner", Supervisor, inner, "transient"),
                    intensity=2,
                ),
            )
            assert await runtime.stopped(root) == GaveUp(
                "/inner/a failed 2 times in 5 s, the last time: killed, "
                "and so /inner failed 3 times in 5 s"
            )

    run_virtual(program())
    # Two starts in each of three incarnations of the inner supervisor.
    assert journal == ["+a", "-a"] * 6


@pytest.mark.parametrize(
    ("intensity", "victims", "text"),
    [
        (0, "a", "/a failed: killed"),
        (1, "aa", "/a failed 2 times in 5 s, the last time: killed"),
        (1, "ba", "/a failed once and its siblings once in 5 s, the last time: killed"),
        (3, "aaba", "/a failed 3 times and its siblings once in 5 s, the last time: killed"),
        (3, "bbba", "/a failed once and its siblings 3 times in 5 s, the last time: killed"),
    ],
)
def test_who_gives_up_says_who_failed_how_often_and_why(
    intensity: int, victims: str, text: str
) -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            children = [ChildSpec(name, Worker, Plan()) for name in "ab"]
            spec = supervisor("one_for_one", *children, intensity=intensity)
            root = runtime.spawn(Supervisor, spec, name="root")
            await runtime.ready(root)
            for victim in victims:
                end(runtime, f"/root/{victim}")
                await asyncio.sleep(1)
            assert root.reason == GaveUp(text)

    run_virtual(program())


def test_failures_before_the_period_are_not_told() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            spec = supervisor("one_for_one", ChildSpec("a", Worker, Plan()), intensity=1, period=2)
            root = runtime.spawn(Supervisor, spec, name="root")
            for gap in (1, 3, 1):
                await asyncio.sleep(gap)
                end(runtime, "/root/a")
            assert await runtime.stopped(root) == GaveUp(
                "/a failed 2 times in 2 s, the last time: killed"
            )

    run_virtual(program())


@pytest.mark.parametrize("strategy", ["one_for_one", "rest_for_one", "one_for_all"])
def test_the_reason_goes_up_through_every_level_that_fails_because_of_it(
    strategy: Strategy,
) -> None:
    starts: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            fault = Fault(OSError("no space left on device"), starts, serves_for=0.01)
            spec = supervisor(strategy, ChildSpec("endpoint", Faulty, fault), intensity=1)
            for name in ("inner", "node"):
                spec = supervisor(strategy, ChildSpec(name, Supervisor, spec), intensity=1)
            assert await death(runtime, spec) == GaveUp(
                "/node/inner/endpoint failed 2 times in 5 s, "
                "the last time: OSError: no space left on device, "
                "and so /node/inner failed 2 times in 5 s, and so /node failed 2 times in 5 s"
            )

    run_virtual(program())
    assert len(starts) == 8


def test_a_dynamic_child_that_is_restarted_too_often_is_named() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            template = ChildSpec("template", Worker, Plan(exit_after=1.0), "permanent")
            pipes = runtime.spawn(
                Supervisor, supervisor("simple_one_for_one", template, intensity=2), name="pipes"
            )
            runtime.tell(pipes, StartChild(id="42"))
            assert await runtime.stopped(pipes) == GaveUp(
                "/42 failed 3 times in 5 s, the last time: killed"
            )

    run_virtual(program())


def test_restarts_back_off_and_a_quiet_time_forgets() -> None:
    starts: list[float] = []

    class Failing(Actor):
        def on_start(self, args: float) -> None:
            starts.append(round(self.now, 6))
            lasts = 40.0 if len(starts) == 6 else args
            self.after(lasts, "fail")

        @handles(str)
        def _on_time(self, _message: str, _sender: ActorAddress) -> None:
            self.stop(KILLED)

    async def program() -> None:
        async with ActorRuntime() as runtime:
            spec = ChildSpec("a", Failing, 1.0)
            runtime.spawn(Supervisor, supervisor("one_for_one", spec, intensity=100, backoff=EXACT))
            await asyncio.sleep(50)

    run_virtual(program())
    waits = [b - a for a, b in pairwise(starts)]
    expected = [1.0, 1.1, 1.2, 1.4, 1.8, 40.0, 1.1, 1.2]
    assert waits[: len(expected)] == pytest.approx(expected)


def test_backoff_has_a_maximum_and_jitter() -> None:
    rng = random.Random(7)
    backoff = Backoff(initial=1.0, maximum=8.0, factor=2.0, jitter=0.5)
    assert backoff.delay(1, rng) == 0.0
    for failures, longest in ((2, 1.0), (3, 2.0), (4, 4.0), (5, 8.0), (6, 8.0), (10_000, 8.0)):
        delays = [backoff.delay(failures, rng) for _ in range(100)]
        assert longest / 2 <= min(delays) < max(delays) <= longest


def test_a_group_waits_for_the_backoff_of_the_one_that_failed() -> None:
    journal: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            children = [ChildSpec(name, Worker, Plan(journal)) for name in "abc"]
            backoff = Backoff(initial=4.0, jitter=0.0)
            root = runtime.spawn(
                Supervisor, supervisor("one_for_all", *children, backoff=backoff), name="root"
            )
            await runtime.ready(root)
            end(runtime, "/root/b")
            await asyncio.sleep(1)
            assert len(journal) == 9  # The first restart is immediate.
            end(runtime, "/root/b")
            await asyncio.sleep(3)
            assert len(journal) == 12
            await asyncio.sleep(2)
            assert journal[12:] == ["+a", "+b", "+c"]

    run_virtual(program())


def test_a_stop_during_backoff_is_immediate() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            backoff = Backoff(initial=1000.0, maximum=1000.0)
            spec = ChildSpec("a", Worker, Plan(exit_after=1.0))
            root = runtime.spawn(Supervisor, supervisor("one_for_one", spec, backoff=backoff))
            await asyncio.sleep(5)
            runtime.stop(root)
            assert await runtime.stopped(root) == SHUTDOWN
            assert runtime.loop.time() == pytest.approx(5)

    run_virtual(program())


# What no restart mends.


@dataclass(frozen=True)
class Fault:
    """An error that a worker dies of, when it starts or some seconds after it serves."""

    error: Exception
    journal: Journal = field(default_factory=list)
    serves_for: float | None = None


class Faulty(Actor):
    def on_start(self, args: Fault) -> None:
        args.journal.append(round(self.now, 3))
        if args.serves_for is None:
            raise args.error
        self.ready()
        self.run(self._fail(args.serves_for, args.error))

    async def _fail(self, seconds: float, error: Exception) -> None:
        await asyncio.sleep(seconds)
        raise error


async def death(runtime: ActorRuntime, spec: SupervisorSpec) -> ExitReason:
    return await runtime.stopped(runtime.spawn(Supervisor, spec, name="root"))


@pytest.mark.parametrize("error", [LocalError("port 1 is in use"), InvalidInput("no such thing")])
@pytest.mark.parametrize("restart", ["permanent", "transient"])
def test_the_callers_fault_ends_the_tree_at_once(error: Exception, restart: Any) -> None:
    journal: Journal = []
    starts: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            reason = await death(
                runtime,
                supervisor(
                    "rest_for_one",
                    ChildSpec("elder", Worker, Plan(journal)),
                    ChildSpec("faulty", Faulty, Fault(error, starts), restart, wait_ready=5),
                    ChildSpec("younger", Worker, Plan(journal)),
                ),
            )
            assert isinstance(reason, Crashed)
            assert reason.exception is error
            assert runtime.loop.time() == 0
            assert runtime.actor_count == 0

    run_virtual(program())
    assert starts == [0]
    assert journal == ["+elder", "-elder"]


def test_the_callers_fault_comes_through_nested_supervisors() -> None:
    error, starts = LocalError("port 1 is in use"), list[Any]()

    async def program() -> None:
        async with ActorRuntime() as runtime:
            spec = supervisor(
                "one_for_one", ChildSpec("faulty", Faulty, Fault(error, starts), wait_ready=5)
            )
            for name in ("inner", "outer"):
                spec = supervisor("one_for_one", ChildSpec(name, Supervisor, spec, wait_ready=5))
            reason = await death(runtime, spec)
            assert isinstance(reason, Crashed)
            assert reason.exception is error

    run_virtual(program())
    assert starts == [0]


def test_a_nested_supervisor_that_counts_as_serving_from_the_start_is_restarted() -> None:
    """Its parent cannot know that it never served: without `wait_ready` everybody does."""
    starts: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            fault = Fault(LocalError("port 1 is in use"), starts)
            inner = supervisor("one_for_one", ChildSpec("faulty", Faulty, fault, wait_ready=5))
            spec = supervisor("one_for_one", ChildSpec("inner", Supervisor, inner), intensity=2)
            assert await death(runtime, spec) == GaveUp(
                "/inner failed 3 times in 5 s, the last time: LocalError: port 1 is in use"
            )

    run_virtual(program())
    assert len(starts) == 3


def test_who_has_served_once_is_restarted_whatever_it_dies_of() -> None:
    starts: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            fault = Fault(LocalError("the port was taken meanwhile"), starts, serves_for=1.0)
            inner = supervisor("one_for_one", ChildSpec("a", Faulty, fault, wait_ready=5))
            spec = supervisor("one_for_one", ChildSpec("inner", Supervisor, inner, wait_ready=5))
            root = runtime.spawn(Supervisor, spec, name="root")
            await asyncio.sleep(3.5)
            assert root.alive

    run_virtual(program())
    assert starts == [0, 1, 2, 3]


def test_other_errors_before_it_serves_are_restarted() -> None:
    starts: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            fault = Fault(PeerNotFound("nobody there"), starts)
            spec = supervisor("one_for_one", ChildSpec("a", Faulty, fault, wait_ready=5))
            assert await death(runtime, spec) == GaveUp(
                "/a failed 4 times in 5 s, the last time: PeerNotFound: nobody there"
            )

    run_virtual(program())
    assert len(starts) == 4


def test_a_temporary_child_may_fail_by_the_callers_fault() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            template = ChildSpec("a", Faulty, None, "temporary", wait_ready=5)
            pipes = runtime.spawn(Supervisor, supervisor("simple_one_for_one", template))
            answer = await runtime.call(pipes, StartChild(Fault(LocalError("its own affair"))))
            assert answer == ChildRefused("it exited: LocalError: its own affair")
            assert pipes.alive

    run_virtual(program())
