"""The actor base class: dispatch, what an actor owns, its children, and whom it watches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import structlog
from thespian.actors import ActorAddress, ChildActorExited

from hyperseaport.actors.actor import (
    KILLED,
    NORMAL,
    SHUTDOWN,
    Actor,
    ActorGone,
    Down,
    Exited,
    ExitReason,
    InvalidInput,
    LocalError,
    Owned,
    Ready,
    handles,
)
from hyperseaport.actors.cell import Cell
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.testing.clock import run_virtual

Journal = list[Any]


@dataclass(frozen=True, slots=True)
class Do:
    """Have the `Doer` do something in a handler; its result is the reply."""

    action: Callable[[Doer], object]


class Doer(Actor):
    """Does what it is told, and keeps a journal of what happens to it."""

    def on_start(self, args: Journal | None) -> None:
        self.journal: Journal = [] if args is None else args

    def on_exit(self, reason: ExitReason) -> None:
        self.journal.append(f"exit {reason}")

    @handles(Do)
    def _on_do(self, message: Do, sender: ActorAddress) -> None:
        result = message.action(self)
        self.send(sender, result)

    @handles(str, Exited, ChildActorExited, Down, Ready)
    def _on_event(self, message: object, _sender: ActorAddress) -> None:
        self.journal.append(message)


def crash(_actor: Doer) -> None:
    raise RuntimeError("as told")


# Dispatch.


class Animal:
    pass


class Cat(Animal):
    pass


class Kitten(Cat):
    pass


class Base(Actor):
    def on_start(self, args: Journal) -> None:
        self.journal = args

    @handles(Animal)
    def on_animal(self, _message: Animal, _sender: ActorAddress) -> None:
        self.journal.append("base animal")

    @handles(int)
    def on_number(self, _message: int, _sender: ActorAddress) -> None:
        self.journal.append("base number")


class Derived(Base):
    def on_number(self, _message: int, _sender: ActorAddress) -> None:
        self.journal.append("derived number")

    @handles(Cat)
    def on_cat(self, _message: Cat, _sender: ActorAddress) -> None:
        self.journal.append("derived cat")


@pytest.mark.parametrize(
    ("actor_class", "message", "handled"),
    [
        (Base, Animal(), "base animal"),
        (Base, Kitten(), "base animal"),
        (Base, 1, "base number"),
        (Base, True, "base number"),
        (Derived, Animal(), "base animal"),
        (Derived, Cat(), "derived cat"),
        (Derived, Kitten(), "derived cat"),
        (Derived, 1, "derived number"),
    ],
)
def test_a_message_goes_to_the_nearest_handler(
    actor_class: type[Actor], message: object, handled: str
) -> None:
    journal: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            runtime.tell(runtime.spawn(actor_class, journal), message)

    run_virtual(program())
    assert journal == [handled]


def test_a_message_without_handler_is_counted_and_survived() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            actor = runtime.spawn(Base, [], name="base")
            runtime.tell(actor, b"what is this?")
            runtime.tell(actor, Ready(actor))  # From the system: for those who care.
            await asyncio.sleep(1)
            assert runtime.unhandled == 1
            assert actor.alive

    with structlog.testing.capture_logs() as entries:
        run_virtual(program())
    assert entries[0] == {
        "event": "message.unhandled",
        "log_level": "warning",
        "actor": "/base",
        "type": "bytes",
    }


def test_handlers_are_not_async() -> None:
    async def handler(_self: object, _message: int, _sender: ActorAddress) -> None: ...

    with pytest.raises(InvalidInput, match="start an owned task"):
        handles(int)(handler)  # type: ignore[type-var]


# Death, and what an actor owns.


def die_by_crash(runtime: ActorRuntime, actor: ActorAddress) -> None:
    runtime.tell(actor, Do(crash))


def die_by_task(runtime: ActorRuntime, actor: ActorAddress) -> None:
    async def fail() -> None:
        raise RuntimeError("as told")

    runtime.tell(actor, Do(lambda doer: doer.run(fail())))


def die_by_result(runtime: ActorRuntime, actor: ActorAddress) -> None:
    async def succeed() -> int:
        return 1

    def refuse(_result: int) -> object:
        raise RuntimeError("as told")

    runtime.tell(actor, Do(lambda doer: doer.run(succeed(), refuse)))


def die_by_stop(runtime: ActorRuntime, actor: ActorAddress) -> None:
    runtime.tell(actor, Do(lambda doer: doer.stop()))


def die_by_request(runtime: ActorRuntime, actor: ActorAddress) -> None:
    runtime.stop(actor)


def die_by_kill(runtime: ActorRuntime, actor: ActorAddress) -> None:
    runtime.kill(actor)


DEATHS = [
    (die_by_crash, "RuntimeError: as told"),
    (die_by_task, "RuntimeError: as told"),
    (die_by_result, "RuntimeError: as told"),
    (die_by_stop, "normal"),
    (die_by_request, "shutdown"),
    (die_by_kill, "killed"),
]


@pytest.mark.parametrize(("die", "reason"), DEATHS)
def test_nothing_an_actor_owned_outlives_it(
    die: Callable[[ActorRuntime, ActorAddress], None], reason: str
) -> None:
    journal: Journal = []

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            journal.append("task cancelled")
            raise

    def acquire(doer: Doer) -> None:
        doer.own(lambda: journal.append("first closed"))
        doer.run(wait())
        doer.after(5.0, "too late")
        doer.own(lambda: journal.append("second closed"))

    async def program() -> None:
        async with ActorRuntime() as runtime:
            actor = runtime.spawn(Doer, journal)
            await runtime.call(actor, Do(acquire))
            die(runtime, actor)
            assert str(await runtime.stopped(actor)) == reason
            await asyncio.sleep(10)

    run_virtual(program())
    assert journal == [f"exit {reason}", "second closed", "first closed", "task cancelled"]


def test_failing_last_acts_keep_nothing_open() -> None:
    closed: list[str] = []

    class Clumsy(Actor):
        def on_start(self, _args: object) -> None:
            self.own(lambda: closed.append("closed"))
            self.own(lambda: 1 / 0)

        def on_exit(self, _reason: ExitReason) -> None:
            raise RuntimeError("in on_exit")

    async def program() -> None:
        async with ActorRuntime() as runtime:
            runtime.spawn(Clumsy)

    with structlog.testing.capture_logs() as entries:
        run_virtual(program())
    assert closed == ["closed"]
    assert [entry["event"] for entry in entries] == [
        "actor.exited",
        "actor.on_exit.failed",
        "actor.close.failed",
    ]


def test_on_exit_also_follows_a_failed_start() -> None:
    exits: list[str] = []

    class Unlucky(Actor):
        def on_start(self, _args: object) -> None:
            raise RuntimeError("no luck")

        def on_exit(self, reason: ExitReason) -> None:
            exits.append(reason.text)

    async def program() -> None:
        async with ActorRuntime() as runtime:
            await runtime.stopped(runtime.spawn(Unlucky))

    run_virtual(program())
    assert exits == ["RuntimeError: no luck"]


def test_owned_things_close_once_or_not_at_all() -> None:
    closed: list[str] = []
    kept: list[Owned] = []

    def acquire(doer: Doer) -> None:
        kept.append(doer.own(lambda: closed.append("closed early")))
        kept.append(doer.own(lambda: closed.append("released")))

    async def program() -> None:
        async with ActorRuntime() as runtime:
            await runtime.call(runtime.spawn(Doer), Do(acquire))
            kept[0].close()
            kept[0].close()
            kept[1].release()
            assert closed == ["closed early"]

    run_virtual(program())
    assert closed == ["closed early"]


def test_the_dead_acquire_nothing() -> None:
    doers: list[Doer] = []
    closed: list[str] = []

    async def never() -> None: ...

    async def program() -> None:
        async with ActorRuntime() as runtime:
            actor = runtime.spawn(Doer)
            await runtime.call(actor, Do(doers.append))
            runtime.kill(actor)
            (doer,) = doers
            with pytest.raises(LocalError, match="has exited"):
                doer.own(lambda: closed.append("closed"))
            with pytest.raises(LocalError, match="has exited"):
                doer.run(never())
            with pytest.raises(LocalError, match="has exited"):
                doer.after(1.0, "hello")
            with pytest.raises(LocalError, match="has exited"):
                doer.spawn(Doer)

    run_virtual(program())
    assert closed == ["closed"]


def test_stop_comes_after_the_handler_and_before_other_messages() -> None:
    journal: Journal = []

    def stop(doer: Doer) -> None:
        doer.stop(NORMAL)
        doer.stop(KILLED)
        journal.append("still here")

    async def program() -> None:
        async with ActorRuntime() as runtime:
            actor = runtime.spawn(Doer, journal)
            runtime.tell(actor, Do(stop))
            runtime.tell(actor, "next message")

    run_virtual(program())
    assert journal == ["still here", "exit normal"]


# Tasks and timers.


def test_the_result_of_a_task_is_a_message() -> None:
    journal: Journal = []

    async def compute() -> int:
        await asyncio.sleep(2)
        return 6

    async def program() -> None:
        async with ActorRuntime() as runtime:
            actor = runtime.spawn(Doer, journal)
            runtime.tell(actor, Do(lambda doer: doer.run(compute(), lambda n: f"result {n}")))
            runtime.tell(actor, Do(lambda doer: doer.run(compute())))
            await asyncio.sleep(3)
            assert journal == ["result 6"]

    run_virtual(program())


def test_a_task_that_its_actor_cancels_ends_quietly() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            actor = runtime.spawn(Doer)
            waiting = asyncio.Event().wait
            task = await runtime.call(actor, Do(lambda doer: doer.run(waiting())))
            task.cancel()
            await asyncio.sleep(1)
            assert actor.alive

    run_virtual(program())


def test_a_task_that_fails_while_it_is_cancelled_is_logged() -> None:
    async def fail() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise RuntimeError("while cleaning up")

    async def program() -> None:
        async with ActorRuntime() as runtime:
            actor = runtime.spawn(Doer)
            await runtime.call(actor, Do(lambda doer: doer.run(fail())))
            await asyncio.sleep(1)
            runtime.kill(actor)

    with structlog.testing.capture_logs() as entries:
        run_virtual(program())
    assert entries[-1]["event"] == "task.failed_after_exit"
    assert entries[-1]["error"] == "RuntimeError: while cleaning up"


def test_timers_fire_once_unless_cancelled() -> None:
    journal: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            actor = runtime.spawn(Doer, journal)
            await runtime.call(actor, Do(lambda doer: doer.after(2.0, "fired")))
            cancelled = await runtime.call(actor, Do(lambda doer: doer.after(2.0, "cancelled")))
            cancelled.cancel()
            await asyncio.sleep(1.9)
            assert journal == []
            await asyncio.sleep(5)
            assert journal == ["fired"]

    run_virtual(program())


# Children.


@pytest.mark.parametrize(("die", "reason"), DEATHS)
def test_a_childs_death_arrives_with_its_reason(
    die: Callable[[ActorRuntime, ActorAddress], None], reason: str
) -> None:
    journal: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            parent = runtime.spawn(Doer, journal)
            child = await runtime.call(parent, Do(lambda doer: doer.spawn(Doer)))
            die(runtime, child)
            await runtime.stopped(child)
            await asyncio.sleep(1)
            exited, thespians = journal
            assert exited == Exited(child, exited.reason)
            assert exited.reason.text == reason
            assert isinstance(thespians, ChildActorExited)
            assert thespians.childAddress == child

    run_virtual(program())


def test_what_a_child_sent_arrives_before_its_death() -> None:
    journal: Journal = []

    class Child(Actor):
        def on_start(self, args: ActorAddress) -> None:
            self.send(args, "last words")
            self.stop()

    async def program() -> None:
        async with ActorRuntime() as runtime:
            parent = runtime.spawn(Doer, journal)
            await runtime.call(parent, Do(lambda doer: doer.spawn(Child, doer.myAddress)))
            await asyncio.sleep(1)
            assert journal[0] == "last words"
            assert isinstance(journal[1], Exited)

    run_virtual(program())


class Stubborn(Actor):
    def on_stop(self, _reason: ExitReason) -> None:
        pass


class Draining(Actor):
    def on_stop(self, reason: ExitReason) -> None:
        self.after(2.0, reason)

    @handles(ExitReason)
    def _on_drained(self, reason: ExitReason, _sender: ActorAddress) -> None:
        self.stop(reason)


@pytest.mark.parametrize(
    ("child_class", "timeout", "reason", "after"),
    [
        (Doer, 3.0, SHUTDOWN, 0.0),
        (Draining, 3.0, SHUTDOWN, 2.0),
        (Draining, 1.0, KILLED, 1.0),
        (Stubborn, 3.0, KILLED, 3.0),
        (Doer, 0, KILLED, 0.0),
    ],
)
def test_a_child_is_asked_to_stop_and_killed_when_it_takes_too_long(
    child_class: type[Actor], timeout: float, reason: ExitReason, after: float
) -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            parent = runtime.spawn(Doer)
            child = await runtime.call(parent, Do(lambda doer: doer.spawn(child_class)))
            runtime.tell(parent, Do(lambda doer: doer.stop_child(child, timeout)))
            assert await runtime.stopped(child) == reason
            assert runtime.loop.time() == pytest.approx(after)
            # A child that is dead already is no error.
            await runtime.call(parent, Do(lambda doer: doer.stop_child(child, timeout)))
            await runtime.call(parent, Do(lambda doer: doer.kill_child(child)))

    run_virtual(program())


def test_an_actor_that_is_asked_to_stop_waits_for_its_children() -> None:
    journal: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            parent = runtime.spawn(Doer, journal)
            for child_class in (Draining, Stubborn):
                await runtime.call(parent, Do(lambda doer, c=child_class: doer.spawn(c)))  # type: ignore[misc]
            runtime.stop(parent, timeout=60)
            await asyncio.sleep(1)
            assert parent.alive
            assert await runtime.stopped(parent) == SHUTDOWN
            assert runtime.loop.time() == pytest.approx(5.0)

    run_virtual(program())


def test_only_the_parent_ends_a_child() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            stranger, actor = runtime.spawn(Doer), runtime.spawn(Doer)
            runtime.tell(actor, Do(lambda doer: doer.kill_child(stranger)))
            reason = await runtime.stopped(actor)
            assert reason.text == "LocalError: /0 is no child of /1: ask its parent"
            assert stranger.alive

    run_virtual(program())


def test_a_child_inherits_the_context_unless_it_gets_its_own() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            elder = runtime.spawn(Doer)
            actor = runtime.spawn(Doer, context={"elder": elder})
            for own, expected in ((None, {"elder": elder}), ({"me": actor}, {"me": actor})):
                spawned = Do(lambda doer, own=own: doer.spawn(Doer, context=own))  # type: ignore[misc]
                child = await runtime.call(actor, spawned)
                assert await runtime.call(child, Do(lambda doer: doer.context)) == expected

    run_virtual(program())


def test_ready_reaches_the_parent_once() -> None:
    journal: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            parent = runtime.spawn(Doer, journal)
            child = await runtime.call(parent, Do(lambda doer: doer.spawn(Doer)))
            for _ in range(2):
                await runtime.call(child, Do(lambda doer: doer.ready()))
            await asyncio.sleep(1)
            assert journal == [Ready(child)]

    run_virtual(program())


# Others.


def test_a_monitor_tells_of_death_once() -> None:
    journal: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            watcher, watched = runtime.spawn(Doer, journal), runtime.spawn(Doer)
            for _ in range(2):
                await runtime.call(watcher, Do(lambda doer: doer.monitor(watched)))
            runtime.kill(watched)
            await asyncio.sleep(1)
            assert journal == [Down(watched, KILLED)]
            # Of one that is dead, at once.
            await runtime.call(watcher, Do(lambda doer: doer.monitor(watched)))
            await asyncio.sleep(1)
            assert journal == [Down(watched, KILLED)] * 2

    run_virtual(program())


def test_a_monitor_can_be_taken_back() -> None:
    journal: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            watcher, watched = runtime.spawn(Doer, journal), runtime.spawn(Doer)
            await runtime.call(watcher, Do(lambda doer: doer.monitor(watched)))
            await runtime.call(watcher, Do(lambda doer: doer.demonitor(watched)))
            runtime.kill(watched)
            await asyncio.sleep(1)
            await runtime.call(watcher, Do(lambda doer: doer.demonitor(watched)))
            assert journal == []

    run_virtual(program())


def test_a_watcher_keeps_nothing_of_those_that_died() -> None:
    journal: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            watcher = runtime.spawn(Doer, journal)
            assert isinstance(watcher.target, Cell)
            for _ in range(3):
                watched = runtime.spawn(Doer)
                await runtime.call(watcher, Do(partial(Doer.monitor, address=watched)))
                assert watcher.target.watching
                runtime.kill(watched)
                assert not watcher.target.watching

    run_virtual(program())
    assert len(journal) == 4  # Three times Down, and its own exit.


def test_a_dead_watcher_is_told_nothing() -> None:
    journal: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            watcher, watched = runtime.spawn(Doer, journal), runtime.spawn(Doer)
            await runtime.call(watcher, Do(lambda doer: doer.monitor(watched)))
            runtime.kill(watcher)
            assert isinstance(watched.target, Cell)
            assert not watched.target.watchers  # Nothing leads to the dead.
            runtime.kill(watched)

    run_virtual(program())
    assert journal == ["exit killed"]


def test_an_owned_task_calls_other_actors() -> None:
    journal: Journal = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            server, client = runtime.spawn(Doer), runtime.spawn(Doer, journal)

            def ask(client: Doer) -> None:
                client.run(client.call(server, Do(lambda doer: doer.path)), lambda path: path)

            await runtime.call(client, Do(ask))
            await asyncio.sleep(1)
            assert journal == ["/0"]
            runtime.kill(server)
            runtime.tell(client, Do(ask))
            reason = await runtime.stopped(client)
            assert reason.text.startswith(ActorGone.__name__)

    run_virtual(program())


def test_the_logger_names_the_actor() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            actor = runtime.spawn(Doer, name="doer")
            await runtime.call(actor, Do(lambda doer: doer.log.info("something.happened", size=1)))

    with structlog.testing.capture_logs() as entries:
        run_virtual(program())
    assert entries[0] == {
        "event": "something.happened",
        "log_level": "info",
        "actor": "/doer",
        "size": 1,
    }


def test_now_is_the_loops_time() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            actor = runtime.spawn(Doer)
            await asyncio.sleep(7)
            assert await runtime.call(actor, Do(lambda doer: doer.now)) == pytest.approx(7)

    run_virtual(program())
