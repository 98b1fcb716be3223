"""The system base: delivery, bounds, the tree, death, and Thespian's own face of it."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
import structlog
import thespian.actors
from thespian.actors import (
    ActorAddress,
    ActorExitRequest,
    ChildActorExited,
    DeadEnvelope,
    InvalidActorAddress,
    WakeupMessage,
)

from hyperseaport.actors.actor import (
    KILLED,
    NORMAL,
    SHUTDOWN,
    Actor,
    ActorGone,
    CallTimeout,
    Crashed,
    ExitReason,
    MailboxOverflow,
    handles,
)
from hyperseaport.actors.scheduler import MESSAGES_PER_TURN
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.testing.clock import run_virtual
from hyperseaport.transport.errors import InvalidInput, LocalError


class Echo(Actor):
    @handles(object)
    def _on_message(self, message: object, sender: ActorAddress) -> None:
        self.send(sender, message)


class Recorder(Actor):
    """Keeps what it gets in the list it was started with."""

    def on_start(self, args: list[Any]) -> None:
        self.seen = args

    @handles(object)
    def _on_message(self, message: object, _sender: ActorAddress) -> None:
        self.seen.append(message)


class Mute(Actor):
    @handles(str)
    def _on_text(self, _message: str, _sender: ActorAddress) -> None:
        pass

    @handles(int)
    def _on_number(self, number: int, _sender: ActorAddress) -> None:
        self.stop() if number else 1 / 0


class Nest(Actor):
    """Starts as many levels of itself below it, two on each, as `args` says."""

    def on_start(self, args: tuple[int, list[str]]) -> None:
        self.levels, self.ended = args
        if self.levels:
            for name in ("elder", "younger"):
                self.spawn(Nest, (self.levels - 1, self.ended), name)

    def on_exit(self, reason: ExitReason) -> None:
        self.ended.append(f"{self.path} {reason}")


def test_calls_are_answered() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            echo = runtime.spawn(Echo, name="echo")
            assert await runtime.call(echo, "hello") == "hello"
            assert runtime.tree() == ["/echo"]
            assert runtime.actor_count == 1
        assert runtime.actor_count == 0

    run_virtual(program())


def test_messages_of_a_pair_arrive_in_order() -> None:
    seen: list[int] = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            recorder = runtime.spawn(Recorder, seen)
            for number in range(10 * MESSAGES_PER_TURN):
                runtime.tell(recorder, number)

    run_virtual(program())
    assert seen == list(range(10 * MESSAGES_PER_TURN))


def test_a_turn_of_the_loop_delivers_a_bounded_number_of_messages() -> None:
    seen: list[int] = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            recorder = runtime.spawn(Recorder, seen)
            await asyncio.sleep(0)
            for number in range(3 * MESSAGES_PER_TURN):
                runtime.tell(recorder, number)
            counts = []
            for _ in range(4):
                counts.append(len(seen))
                await asyncio.sleep(0)
            assert counts == [step * MESSAGES_PER_TURN for step in range(4)]

    run_virtual(program())


def test_two_who_chat_forever_do_not_starve_the_loop() -> None:
    class Chatter(Actor):
        @handles(object)
        def _on_message(self, message: object, _sender: ActorAddress) -> None:
            self.send(self.myAddress, message)

    async def program() -> None:
        async with ActorRuntime() as runtime:
            runtime.tell(runtime.spawn(Chatter, name="chatter"), "go on")
            for _ in range(10):
                await asyncio.sleep(0)
            runtime.kill("/chatter")

    run_virtual(program())


def test_an_overflowing_mailbox_kills_its_owner() -> None:
    class Small(Recorder):
        mailbox_limit = 10

    async def program() -> None:
        async with ActorRuntime() as runtime:
            small = runtime.spawn(Small, [])
            for number in range(10):
                runtime.tell(small, number)
            assert await runtime.call(runtime.spawn(Echo), 1) == 1
            assert small.alive
            for number in range(12):
                runtime.tell(small, number)
            reason = await runtime.stopped(small)
            assert isinstance(reason, Crashed)
            assert isinstance(reason.exception, MailboxOverflow)
            assert str(reason).startswith(
                "MailboxOverflow: more than 10 messages wait for actor /0"
            )

    run_virtual(program())


@pytest.mark.parametrize(
    ("message", "reason"),
    [(1, "normal"), (0, "ZeroDivisionError: division by zero")],
)
def test_a_call_fails_at_once_when_its_receiver_dies(message: int, reason: str) -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            mute = runtime.spawn(Mute, name="mute")
            for _ in range(2):  # While it lives, and when it is dead.
                with pytest.raises(ActorGone) as caught:
                    await runtime.call(mute, message)
                assert caught.value.reason.text == reason
                assert str(caught.value) == f"actor /mute is gone ({reason}): ask for its successor"
            assert runtime.loop.time() == 0.0

    run_virtual(program())


def test_a_call_times_out_and_its_late_reply_is_a_dead_letter() -> None:
    class Late(Actor):
        @handles(str)
        def _on_text(self, _message: str, sender: ActorAddress) -> None:
            self.after(3.0, sender)

        @handles(ActorAddress)
        def _on_due(self, whom: ActorAddress, _sender: ActorAddress) -> None:
            self.send(whom, "late")

    async def program() -> None:
        async with ActorRuntime() as runtime:
            late = runtime.spawn(Late)
            with pytest.raises(CallTimeout, match="did not reply within 2 s"):
                await runtime.call(late, "hello", timeout=2)
            assert runtime.loop.time() == pytest.approx(2)
            await asyncio.sleep(2)
            assert runtime.dead_letters == 1
            assert late.alive

    run_virtual(program())


def test_a_reply_just_before_death_counts() -> None:
    class LastWords(Actor):
        @handles(str)
        def _on_text(self, message: str, sender: ActorAddress) -> None:
            self.send(sender, message)
            self.stop()

    async def program() -> None:
        async with ActorRuntime() as runtime:
            assert await runtime.call(runtime.spawn(LastWords), "farewell") == "farewell"

    run_virtual(program())


def test_a_cancelled_call_leaves_nothing_behind() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            mute = runtime.spawn(Mute)
            task = asyncio.ensure_future(runtime.call(mute, "hello"))
            await asyncio.sleep(0)
            runtime.kill(mute)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run_virtual(program())


def test_paths_find_actors() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            root = runtime.spawn(Nest, (2, []), name="root")
            await asyncio.sleep(0)
            assert runtime.tree() == [
                "/root",
                "/root/elder",
                "/root/elder/elder",
                "/root/elder/younger",
                "/root/younger",
                "/root/younger/elder",
                "/root/younger/younger",
            ]
            found = runtime.find("/root/elder/younger")
            assert found is not None
            assert found.path == "/root/elder/younger"
            assert runtime.find("/elder/younger") is found  # The only top may be left out.
            assert runtime.find("/root") is root
            assert runtime.find("/root/nobody") is None
            assert runtime.find("/") is None
            runtime.spawn(Mute, name="other")
            assert runtime.find("/elder/younger") is None

    run_virtual(program())


def test_killing_takes_all_below_along_children_first() -> None:
    ended: list[str] = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            runtime.spawn(Nest, (2, ended), name="root")
            await asyncio.sleep(0)
            runtime.kill("/root/elder")
            assert ended == [
                "/root/elder/younger killed",
                "/root/elder/elder killed",
                "/root/elder killed",
            ]
            assert runtime.actor_count == 4
            ended.clear()
            runtime.kill("/root", "pulled the plug")
            assert ended[0] == "/root/younger/younger shutdown"
            assert ended[-1] == "/root pulled the plug"
            assert runtime.actor_count == 0
            with pytest.raises(LocalError, match="no actor lives at /root"):
                runtime.kill("/root")
            runtime.kill("/root", missing_ok=True)

    run_virtual(program())


def test_a_deep_tree_dies_without_recursion() -> None:
    class Chain(Actor):
        def on_start(self, args: int) -> None:
            if args:
                self.spawn(Chain, args - 1)

    async def program() -> None:
        async with ActorRuntime() as runtime:
            top = runtime.spawn(Chain, 3000, name="top")
            await asyncio.sleep(1)
            assert runtime.actor_count == 3001
            runtime.kill(top)
            assert runtime.actor_count == 0

    run_virtual(program())


def test_leaving_stops_the_youngest_top_first_and_children_before_parents() -> None:
    ended: list[str] = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            runtime.spawn(Nest, (1, ended), name="first")
            runtime.spawn(Nest, (0, ended), name="second")

    run_virtual(program())
    assert ended == [
        "/second shutdown",
        "/first/younger shutdown",
        "/first/elder shutdown",
        "/first shutdown",
    ]


def test_leaving_kills_what_does_not_stop() -> None:
    ended: list[ExitReason] = []

    class Stubborn(Actor):
        def on_stop(self, _reason: ExitReason) -> None:
            pass

        def on_exit(self, reason: ExitReason) -> None:
            ended.append(reason)

    async def program() -> float:
        async with ActorRuntime(shutdown=3.0) as runtime:
            runtime.spawn(Stubborn)
        assert runtime.loop.time() == pytest.approx(3.0)
        with pytest.raises(LocalError, match="is stopping"):
            runtime.spawn(Stubborn)
        return runtime.loop.time()

    run_virtual(program())
    assert ended == [KILLED]


def test_leaving_waits_for_tasks_that_clean_up() -> None:
    cleaned: list[str] = []

    class Slow(Actor):
        def on_start(self, _args: object) -> None:
            self.run(self._work())

        async def _work(self) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(1)
                cleaned.append("cleaned")

    async def program() -> None:
        async with ActorRuntime() as runtime:
            runtime.spawn(Slow)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert cleaned == ["cleaned"]

    run_virtual(program())


def test_an_error_in_the_body_still_stops_everything() -> None:
    ended: list[str] = []

    async def program() -> None:
        async with ActorRuntime() as runtime:
            runtime.spawn(Nest, (0, ended), name="only")
            await asyncio.sleep(0)
            raise KeyError

    with pytest.raises(KeyError):
        run_virtual(program())
    assert ended == ["/only shutdown"]


def test_ready_is_awaited() -> None:
    class Starting(Actor):
        def on_start(self, args: float) -> None:
            self.after(args, "ready" if args < 10 else "crash")

        @handles(str)
        def _on_text(self, message: str, _sender: ActorAddress) -> None:
            assert message == "ready"
            self.ready()
            self.ready()

    async def program() -> None:
        async with ActorRuntime() as runtime:
            starting = runtime.spawn(Starting, 5.0)
            await runtime.ready(starting)
            assert runtime.loop.time() == pytest.approx(5.0)
            await runtime.ready(starting)
            with pytest.raises(ActorGone, match="AssertionError"):
                await runtime.ready(runtime.spawn(Starting, 10.0))

    run_virtual(program())


def test_stop_asks_first() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            nest = runtime.spawn(Nest, (1, []))
            runtime.stop(nest)
            assert await runtime.stopped(nest) == SHUTDOWN
            assert await runtime.stopped(nest) == SHUTDOWN

    run_virtual(program())


@pytest.mark.parametrize("name", ["", "a/b"])
def test_names_that_would_break_paths_are_refused(name: str) -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            with pytest.raises(InvalidInput):
                runtime.spawn(Mute, name=name)

    run_virtual(program())


def test_living_siblings_have_different_names() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            runtime.spawn(Mute, name="1")
            with pytest.raises(LocalError, match="/1 is alive"):
                runtime.spawn(Mute, name="1")
            assert [runtime.spawn(Mute).path for _ in range(2)] == ["/0", "/2"]
            runtime.kill("/1")
            runtime.spawn(Mute, name="1")

    run_virtual(program())


def test_a_crash_is_logged_once_and_normal_exits_quietly() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            for number in (0, 1):
                mute = runtime.spawn(Mute, name="mute")
                runtime.tell(mute, number)
                await runtime.stopped(mute)

    with structlog.testing.capture_logs() as entries:
        run_virtual(program())
    crash, normal = entries
    assert isinstance(crash.pop("exc_info"), ZeroDivisionError)
    assert crash == {
        "event": "actor.crashed",
        "log_level": "error",
        "actor": "/mute",
        "error": "ZeroDivisionError: division by zero",
    }
    assert normal == {
        "event": "actor.exited",
        "log_level": "debug",
        "actor": "/mute",
        "reason": "normal",
    }


def test_a_dead_address_keeps_no_frames() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            mute = runtime.spawn(Mute)
            runtime.tell(mute, 0)
            reason = await runtime.stopped(mute)
            assert isinstance(reason, Crashed)
            assert reason.exception.__traceback__ is None

    run_virtual(program())


# Thespian's own actors and actor system.


class Plain(thespian.actors.Actor):
    """What anybody writes against Thespian."""

    def __init__(self) -> None:
        self.seen: list[object] = []
        self.child: ActorAddress | None = None

    def receiveMessage(self, msg: Any, sender: ActorAddress) -> None:  # noqa: N802
        self.seen.append(msg)
        if msg == "seen":
            self.send(sender, list(self.seen))
        elif msg == "child":
            self.child = self.createActor(Plain)
            self.send(sender, self.child)
        elif msg == "end child":
            assert self.child is not None
            self.send(self.child, ActorExitRequest())
        elif msg == "wake me":
            self.wakeupAfter(timedelta(seconds=3), "payload")
        elif msg == "dead letters":
            self.handleDeadLetters()
        elif msg == "crash":
            raise RuntimeError("as told")


def test_thespian_actors_run_on_it() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            plain = runtime.system.createActor(Plain)
            runtime.system.tell(plain, "wake me")
            child = await runtime.call(plain, "child")
            runtime.system.tell(plain, "end child")
            await runtime.stopped(child)
            await asyncio.sleep(3.1)
            *_, exited, wakeup, _ = await runtime.call(plain, "seen")
            assert isinstance(exited, ChildActorExited)
            assert exited.childAddress == child
            assert isinstance(wakeup, WakeupMessage)
            assert wakeup.delayPeriod == timedelta(seconds=3)
            assert wakeup.payload == "payload"
            runtime.system.tell(plain, ActorExitRequest())
            assert await runtime.stopped(plain) == SHUTDOWN

    run_virtual(program())


def test_a_thespian_actor_crashes_at_its_first_exception() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            plain = runtime.system.createActor(Plain)
            runtime.system.tell(plain, "crash")
            assert str(await runtime.stopped(plain)) == "RuntimeError: as told"

    run_virtual(program())


def test_global_names_are_given_once_and_freed_by_death() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            one = runtime.system.createActor(Plain, globalName="one")
            assert runtime.system.createActor(Plain, globalName="one") == one
            runtime.kill(one)
            assert runtime.system.createActor(Plain, globalName="one") != one

    run_virtual(program())


def test_dead_letters_go_to_who_asked_for_them() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            box, dead = runtime.spawn(Plain), runtime.spawn(Plain)
            runtime.tell(box, "dead letters")
            runtime.kill(dead)
            await asyncio.sleep(0)
            runtime.tell(dead, "hello?")
            *_, envelope, _ = await runtime.call(box, "seen")
            assert isinstance(envelope, DeadEnvelope)
            assert (envelope.deadMessage, envelope.deadAddress) == ("hello?", dead)

    run_virtual(program())


def test_what_would_block_the_loop_says_what_to_await() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            plain = runtime.spawn(Plain)
            with pytest.raises(LocalError, match=r"await runtime\.call"):
                runtime.system.ask(plain, "seen")
            with pytest.raises(LocalError, match=r"await runtime\.call"):
                runtime.system.listen()

    run_virtual(program())


def test_thespian_shuts_it_down() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            plain = runtime.spawn(Plain)
            runtime.system.shutdown()
            assert await runtime.stopped(plain) == SHUTDOWN

    run_virtual(program())


def test_addresses_of_other_systems_are_refused() -> None:
    async def program() -> None:
        async with ActorRuntime() as runtime:
            runtime.spawn(Plain)
            with pytest.raises(InvalidActorAddress):
                runtime.tell(ActorAddress("/0"), "hello")

    run_virtual(program())


def test_reasons_have_one_line() -> None:
    assert str(NORMAL) == "normal"
    assert str(Crashed(ValueError("one\ntwo"))) == "ValueError: one"
    assert str(Crashed(ValueError())) == "ValueError"
    assert [reason.normal for reason in (NORMAL, SHUTDOWN, KILLED)] == [True, True, False]
