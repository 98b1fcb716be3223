"""Who is restarted when somebody exits: OTP's rules (supervisor(3)), in all their combinations."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import product
from typing import Literal, get_args

import pytest
from support.supervised import Journal, Plan, Worker, end, supervisor

from hyperseaport.actors.actor import NORMAL, SHUTDOWN
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.supervisor import (
    Backoff,
    ChildSpec,
    GaveUp,
    Restart,
    StartChild,
    Strategy,
    Supervisor,
    TerminateChild,
)
from hyperseaport.testing.clock import run_virtual

Exit = Literal["normal", "shutdown", "crash", "kill"]
#: Of the one that exits: it does not serve yet; it serves; it serves while a sibling, which has
#: failed too, waits for its restart; it was asked to stop.
Phase = Literal["starting", "ready", "backoff", "stopping"]
Case = tuple[Strategy, Restart, Exit, Phase]

ABNORMAL = ("crash", "kill")


def cases() -> Iterator[Case]:
    for case in product(*map(get_args, (Strategy, Restart, Exit, Phase))):
        strategy, restart, _, phase = case
        # In a backoff of one_for_all nobody is up who could exit, and temporary children, as all
        # of a pool are or none, never wait for a restart.
        if phase == "backoff" and strategy == "one_for_all":
            continue
        if phase == "backoff" and (strategy, restart) == ("simple_one_for_one", "temporary"):
            continue
        yield case


def expected(strategy: Strategy, restart: Restart, exit_: Exit, phase: Phase) -> str:
    """What has to happen, as the manual has it: children start in order and stop in reverse."""
    back = restart == "permanent" or (restart == "transient" and exit_ in ABNORMAL)
    alone = strategy in ("one_for_one", "simple_one_for_one")
    match phase:
        case "starting" if strategy == "simple_one_for_one":
            return "-b +b" if back else "-b"
        case "starting":
            # Those after it wait for it, or for nobody once it is done.
            elders = "-a +a " if strategy == "one_for_all" and back else ""
            return f"-b {elders}+b +c +d" if back else "-b +c +d"
        case "ready" if alone or not back:
            return "-b +b" if back else "-b"
        case "ready":
            return "-b -d -c +b +c +d" if strategy == "rest_for_one" else "-b -d -c -a +a +b +c +d"
        case "backoff" if alone:
            return "-a +a +b" if back else "-a +b"
        case "backoff":
            return "-a +a +b +c +d" if back else "-a +b +c +d"
        case "stopping" if alone:
            # Whoever is asked to stop has not failed, however it ends.
            return "-b"
        case "stopping":
            return "-a -d -c -b +a +c +d" if restart == "temporary" else "-a -d -c -b +a +b +c +d"


async def start(runtime: ActorRuntime, case: Case, journal: Journal) -> None:
    """A supervisor that survives the failures of the case, but not one more."""
    strategy, restart, _, phase = case
    victim = "a" if phase == "backoff" else "b"
    slow = 3.0 if phase == "starting" else 0.0
    plan = Plan(journal, ready_after=slow, stop_after=2.0 if phase == "stopping" else 0.0)
    quick = Plan(journal, ready_after=0.0)
    children = [
        ChildSpec(name, Worker, plan, restart, wait_ready=5.0)
        if name == victim
        else ChildSpec(name, Worker, quick, wait_ready=5.0)
        for name in "abcd"
    ]
    simple = strategy == "simple_one_for_one"
    if simple:
        children = [ChildSpec("template", Worker, plan, restart, wait_ready=5.0)]
    failures = {"starting": 1, "ready": 1, "backoff": 3, "stopping": 1}[phase]
    spec = supervisor(
        strategy,
        *children,
        intensity=failures,
        period=1000.0,
        backoff=Backoff(initial=10.0, jitter=0.0),
    )
    root = runtime.spawn(Supervisor, spec, name="root")
    for name in "abcd" if simple else "":
        runtime.tell(root, StartChild(id=name))
    # Not yet all of those that are slow.
    await asyncio.sleep(1.0)


async def bring_about(runtime: ActorRuntime, case: Case) -> str:
    """Lead to the phase of the case. Returns whom it has exit."""
    strategy, _, _, phase = case
    if phase == "backoff":
        for _ in range(2):
            runtime.kill("/root/b")
            await asyncio.sleep(1.0)
        return "/root/a"
    if phase == "stopping" and strategy in ("one_for_all", "rest_for_one"):
        runtime.kill("/root/a")
    elif phase == "stopping":
        root = runtime.find("/root")
        assert root is not None
        runtime.tell(root, TerminateChild("b"))
    await asyncio.sleep(1.0)
    return "/root/b"


def let_exit(runtime: ActorRuntime, path: str, exit_: Exit) -> None:
    if exit_ == "kill":
        runtime.kill(path)
    elif exit_ == "crash":
        address = runtime.find(path)
        assert address is not None
        runtime.tell(address, RuntimeError("a crash"))
    else:
        end(runtime, path, NORMAL if exit_ == "normal" else SHUTDOWN)


@pytest.mark.parametrize("case", [*cases()], ids="-".join)
def test_as_otp_has_it(case: Case) -> None:
    journal: Journal = []
    strategy, _, exit_, phase = case

    async def program() -> None:
        async with ActorRuntime() as runtime:
            await start(runtime, case, journal)
            started = "ab" if phase == "starting" and strategy != "simple_one_for_one" else "abcd"
            assert journal == [f"+{name}" for name in started]
            if phase != "stopping":
                victim = await bring_about(runtime, case)
                journal.clear()
            else:
                journal.clear()
                victim = await bring_about(runtime, case)
            let_exit(runtime, victim, exit_)
            await asyncio.sleep(100.0)
            assert " ".join(journal) == expected(*case)
            alive = dict.fromkeys(started, True) | {each[1]: each[0] == "+" for each in journal}
            assert sorted(runtime.tree()) == [
                "/root",
                *(f"/root/{name}" for name in sorted(alive) if alive[name]),
            ]

    run_virtual(program())


@pytest.mark.parametrize("restart", get_args(Restart))
@pytest.mark.parametrize("exit_", get_args(Exit))
@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_whoever_is_restarted_counts(strategy: Strategy, restart: Restart, exit_: Exit) -> None:
    """And nobody else does."""
    case: Case = (strategy, restart, exit_, "ready")
    counts = restart == "permanent" or (restart == "transient" and exit_ in ABNORMAL)

    async def program() -> None:
        async with ActorRuntime() as runtime:
            await start(runtime, case, [])
            let_exit(runtime, "/root/b", exit_)
            await asyncio.sleep(1.0)
            root = runtime.find("/root")
            assert root is not None
            # A failure of a permanent child, or in a pool, of one like it.
            victim = "/root/b" if counts else "/root/c"
            let_exit(runtime, victim, exit_)
            await asyncio.sleep(1.0)
            assert root.alive == (not counts)
            if counts:
                assert isinstance(root.reason, GaveUp)

    run_virtual(program())


# Groups.


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


def test_of_two_backoffs_the_longer_counts() -> None:
    journal: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            children = [ChildSpec(name, Worker, Plan(journal)) for name in "abc"]
            backoff = Backoff(initial=10.0, jitter=0.0)
            spec = supervisor("rest_for_one", *children, backoff=backoff, intensity=4)
            root = runtime.spawn(Supervisor, spec, name="root")
            await runtime.ready(root)
            for victim in "abba":
                end(runtime, f"/root/{victim}")
                await asyncio.sleep(1.0)
            # b would be back after ten seconds, a one later.
            journal.clear()
            await asyncio.sleep(8.5)
            assert journal == []
            await asyncio.sleep(1.0)
            assert journal == ["+a", "+b", "+c"]

    run_virtual(program())


def test_an_elder_that_fails_in_a_backoff_does_not_wait_twice() -> None:
    journal: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            children = [ChildSpec(name, Worker, Plan(journal)) for name in "abc"]
            backoff = Backoff(initial=10.0, jitter=0.0)
            spec = supervisor("rest_for_one", *children, backoff=backoff)
            root = runtime.spawn(Supervisor, spec, name="root")
            await runtime.ready(root)
            for _ in range(2):
                end(runtime, "/root/b")
                await asyncio.sleep(1.0)
            journal.clear()
            end(runtime, "/root/a")
            await asyncio.sleep(8.5)
            assert journal == ["-a"]
            await asyncio.sleep(1.0)
            assert journal == ["-a", "+a", "+b", "+c"]

    run_virtual(program())
