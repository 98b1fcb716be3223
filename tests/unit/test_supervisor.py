"""OTP's meanings, one by one; then faults at random, from which the tree has to heal."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import structlog

from hyperseaport.actors.actor import (
    KILLED,
    NORMAL,
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
    GAVE_UP,
    Backoff,
    ChildRefused,
    Children,
    ChildSpec,
    ChildStarted,
    ChildTerminated,
    StartChild,
    Strategy,
    Supervisor,
    SupervisorSpec,
    TerminateChild,
    WhichChildren,
)
from hyperseaport.testing.clock import run_virtual
from hyperseaport.transport.errors import PeerNotFound

AT_ONCE = Backoff(initial=0.0)
EXACT = Backoff(jitter=0.0)

Journal = list[Any]


@dataclass(frozen=True)
class Plan:
    """What a worker does, and where it writes that it did."""

    journal: Journal = field(default_factory=list)
    # Seconds after its start: says that it serves; takes to stop; exits by itself.
    ready_after: float | None = None
    stop_after: float = 0.0
    exit_after: float | None = None
    exit_reason: ExitReason = KILLED


class Worker(Actor):
    def on_start(self, args: Plan) -> None:
        self.plan = args
        self.name = self.path.rpartition("/")[2]
        args.journal.append(f"+{self.name}")
        if args.ready_after is not None:
            self.after(args.ready_after, "ready")
        if args.exit_after is not None:
            self.after(args.exit_after, args.exit_reason)

    def on_stop(self, reason: ExitReason) -> None:
        self.after(self.plan.stop_after, reason)

    def on_exit(self, reason: ExitReason) -> None:
        self.plan.journal.append(f"-{self.name}")

    @handles(str)
    def _on_ready(self, _message: str, _sender: ActorAddress) -> None:
        self.ready()

    @handles(ExitReason)
    def _on_end(self, reason: ExitReason, _sender: ActorAddress) -> None:
        self.stop(reason)

    @handles(dict)
    def _on_context(self, _message: object, sender: ActorAddress) -> None:
        self.send(sender, dict(self.context))


def supervisor(strategy: Strategy, *children: ChildSpec, **options: Any) -> SupervisorSpec:
    options.setdefault("backoff", AT_ONCE)
    return SupervisorSpec(strategy, children, rng=random.Random(1), **options)


def end(runtime: ActorRuntime, path: str, reason: ExitReason = KILLED) -> None:
    """Let the worker at a path exit by itself."""
    address = runtime.find(path)
    assert address is not None
    runtime.tell(address, reason)


# What is restarted.


@pytest.mark.parametrize(
    ("strategy", "restart", "reason", "events"),
    [
        # Restart types: permanent always, transient when abnormal, temporary never.
        ("one_for_one", "permanent", KILLED, "-b +b"),
        ("one_for_one", "permanent", NORMAL, "-b +b"),
        ("one_for_one", "permanent", SHUTDOWN, "-b +b"),
        ("one_for_one", "transient", KILLED, "-b +b"),
        ("one_for_one", "transient", NORMAL, "-b"),
        ("one_for_one", "transient", SHUTDOWN, "-b"),
        ("one_for_one", "temporary", KILLED, "-b"),
        ("one_for_one", "temporary", NORMAL, "-b"),
        # Those after it: stopped in reverse, started in order.
        ("rest_for_one", "permanent", KILLED, "-b -d -c +b +c +d"),
        ("rest_for_one", "transient", KILLED, "-b -d -c +b +c +d"),
        ("rest_for_one", "transient", NORMAL, "-b"),
        ("rest_for_one", "temporary", KILLED, "-b"),
        # All.
        ("one_for_all", "permanent", KILLED, "-b -d -c -a +a +b +c +d"),
        ("one_for_all", "permanent", NORMAL, "-b -d -c -a +a +b +c +d"),
        ("one_for_all", "transient", NORMAL, "-b"),
        ("one_for_all", "temporary", KILLED, "-b"),
    ],
)
def test_strategies_and_restart_types(
    strategy: Strategy, restart: Any, reason: ExitReason, events: str
) -> None:
    journal: Journal = []
    plan = Plan(journal)
    children = [ChildSpec(name, Worker, plan, restart) for name in "abcd"]

    async def program() -> None:
        async with ActorRuntime() as runtime:
            root = runtime.spawn(Supervisor, supervisor(strategy, *children), name="root")
            await runtime.ready(root)
            assert journal == ["+a", "+b", "+c", "+d"]
            journal.clear()
            end(runtime, "/root/b", reason)
            await asyncio.sleep(1)
            assert " ".join(journal) == events
            expected = "acd" if events == "-b" else "abcd"
            assert sorted(runtime.tree()) == ["/root", *(f"/root/{name}" for name in expected)]
            journal.clear()
        assert journal == [f"-{name}" for name in reversed(expected)]

    run_virtual(program())


def test_a_group_restart_takes_finished_siblings_along_but_no_temporary_ones() -> None:
    journal: Journal = []
    plan = Plan(journal)

    async def program() -> None:
        async with ActorRuntime() as runtime:
            root = runtime.spawn(
                Supervisor,
                supervisor(
                    "one_for_all",
                    ChildSpec("fails", Worker, plan),
                    ChildSpec("finished", Worker, plan, "transient"),
                    ChildSpec("temporary", Worker, plan, "temporary"),
                ),
                name="root",
            )
            await runtime.ready(root)
            end(runtime, "/root/finished", NORMAL)
            await asyncio.sleep(1)
            journal.clear()
            end(runtime, "/root/fails")
            await asyncio.sleep(1)
            assert journal == ["-fails", "-temporary", "+fails", "+finished"]

    run_virtual(program())


def test_an_elder_that_fails_while_younger_ones_restart_widens_the_restart() -> None:
    journal: Journal = []
    slow = Plan(journal, stop_after=2.0)

    async def program() -> None:
        async with ActorRuntime() as runtime:
            children = [ChildSpec(name, Worker, slow) for name in "abcd"]
            root = runtime.spawn(Supervisor, supervisor("rest_for_one", *children), name="root")
            await runtime.ready(root)
            journal.clear()
            end(runtime, "/root/c")
            await asyncio.sleep(1)
            end(runtime, "/root/a")
            await asyncio.sleep(10)
            assert " ".join(journal) == "-c -a -d -b +a +b +c +d"

    run_virtual(program())


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
            assert await runtime.stopped(never) == GAVE_UP
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
                assert root.reason == GAVE_UP
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
            assert await runtime.stopped(root) == GAVE_UP

    run_virtual(program())
    # Two starts in each of three incarnations of the inner supervisor.
    assert journal == ["+a", "-a"] * 6


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


# Dynamic children.


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
            assert await death(runtime, spec) == GAVE_UP

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
            assert await death(runtime, spec) == GAVE_UP

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


# Faults.


def random_tree(rng: random.Random, depth: int) -> tuple[SupervisorSpec, dict[str, int]]:
    """A supervisor of permanent children, and the paths of all supervisors, with their number of
    children. Its own path is empty."""
    children: list[ChildSpec] = []
    sizes: dict[str, int] = {}
    for name in "abc"[: rng.randint(1, 3)]:
        wait_ready = rng.choice([None, 20.0])
        if depth and rng.random() < 0.6:
            nested, below = random_tree(rng, depth - 1)
            children.append(ChildSpec(name, Supervisor, nested, wait_ready=wait_ready))
            sizes |= {f"/{name}{path}": size for path, size in below.items()}
        else:
            plan = Plan(ready_after=rng.uniform(0, 2), stop_after=rng.uniform(0, 2))
            children.append(ChildSpec(name, Worker, plan, wait_ready=wait_ready))
    sizes[""] = len(children)
    strategies: list[Strategy] = ["one_for_one", "rest_for_one", "one_for_all"]
    backoff = Backoff(maximum=2.0)
    return supervisor(rng.choice(strategies), *children, intensity=1000, backoff=backoff), sizes


def hurt_somebody(runtime: ActorRuntime, rng: random.Random) -> None:
    """Kill, or ask to stop, anybody but the root."""
    victims = [path for path in runtime.tree() if path != "/root"]
    victim = runtime.find(rng.choice(victims)) if victims else None
    if victim is None:
        return
    if rng.random() < 0.5:
        runtime.kill(victim)
    else:
        runtime.stop(victim, timeout=rng.uniform(0, 3))


@pytest.mark.parametrize("seed", range(30))
def test_a_tree_heals_whatever_is_killed_whenever(seed: int) -> None:
    rng = random.Random(seed)
    spec, sizes = random_tree(rng, depth=3)

    async def program() -> None:
        async with ActorRuntime() as runtime:
            root = runtime.spawn(Supervisor, spec, name="root")
            for _ in range(30):
                hurt_somebody(runtime, rng)
                # Also in the middle of a restart, and before the first turn.
                await asyncio.sleep(rng.choice([0, 0, 0.01, 0.3, 2]))
            await asyncio.sleep(300)
            await runtime.ready(root)
            assert runtime.actor_count == sum(sizes.values()) + 1
            for path, size in sizes.items():
                address = runtime.find(f"/root{path}")
                assert address is not None
                children = (await runtime.call(address, WhichChildren())).children
                assert [child.id for child in children] == list("abc")[:size]
                assert all(child.ready for child in children)
                assert [child.address for child in children] == [
                    runtime.find(f"/root{path}/{child.id}") for child in children
                ]
        assert runtime.actor_count == 0

    run_virtual(program())
