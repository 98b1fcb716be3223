"""Which instance a connection goes to, and what happens while there is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
import structlog
from support.registry import Recorder, virtual

from hyperseaport.actors import resolver as resolver_module
from hyperseaport.actors.actor import Actor, Crashed, handles
from hyperseaport.actors.instances import BACKOFF_FIRST, HEDGE_FIRST, MAX_OVERTAKEN
from hyperseaport.actors.messages import (
    Describe,
    Explain,
    Follow,
    Refresh,
    Resolve,
    Resolved,
    ServiceFailed,
    ServiceRecord,
    Services,
    ServiceTaken,
    ServiceWorked,
    Watch,
)
from hyperseaport.actors.registry import roles
from hyperseaport.actors.resolver import (
    MAX_OFFERED,
    PATIENCE,
    RECONSIDER,
    Offer,
    Resolver,
    ResolverArgs,
)
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.transport.errors import InvalidInput

META = roles.to_find("a@1.x")


def record(name: str, version: str = "1.0.0", **more: Any) -> ServiceRecord:
    meta = roles.parse(f"a@{version}")
    return ServiceRecord(name.encode() * 32, meta["role"], version, meta, **more)


A, B, C, D = (record(name, f"1.{9 - place}.0") for place, name in enumerate("abcd"))


class Asker(Actor):
    """Sends the resolver what it is told to, and appends the answers to its args."""

    def on_start(self, args: list[Any]) -> None:
        self._answers = args

    @handles(Resolve, Follow, ServiceTaken, ServiceFailed, ServiceWorked)
    def _say(self, message: object, _sender: object) -> None:
        self.send(self.context["resolver"], message)

    @handles(Resolved)
    def _resolved(self, message: Resolved, _sender: object) -> None:
        self._answers.append(message.services)


class Stage:
    """A resolver between a link that only records, and any number of askers."""

    def __init__(self, runtime: ActorRuntime, args: ResolverArgs) -> None:
        self.runtime = runtime
        #: What the link was sent.
        self.asked: list[Any] = []
        self.link = runtime.spawn(Recorder, self.asked, "link")
        self.resolver = runtime.spawn(Resolver, args, "resolver", {"link": self.link})

    def tell(self, message: object) -> None:
        self.runtime.tell(self.resolver, message)

    def services(self, *records: ServiceRecord, live: bool = True, age: float = 0.0) -> None:
        self.tell(Services(META, records, live, age))

    async def offer(self, *excluding: ServiceRecord) -> Offer:
        question = Resolve(frozenset(each.public_key for each in excluding))
        answer: Offer = await self.runtime.call(self.resolver, question)
        return answer

    async def order(self, *excluding: ServiceRecord) -> list[ServiceRecord]:
        return list((await self.offer(*excluding)).services)

    async def explained(self) -> dict[str, Any]:
        rows = (await self.runtime.call(self.resolver, Explain())).rows
        return {bytes.fromhex(row["key"]).decode()[0]: row for row in rows}

    async def described(self) -> dict[str, Any]:
        return dict((await self.runtime.call(self.resolver, Describe())).fields)

    def asker(self, name: str, *messages: object) -> list[tuple[ServiceRecord, ...]]:
        answers: list[tuple[ServiceRecord, ...]] = []
        self.runtime.spawn(Asker, answers, name, {"resolver": self.resolver})
        self.say(name, *messages)
        return answers

    def say(self, name: str, *messages: object) -> None:
        address = self.runtime.find(f"/{name}")
        assert address is not None
        for message in messages:
            self.runtime.tell(address, message)


@asynccontextmanager
async def staged(**args: Any) -> AsyncIterator[Stage]:
    async with ActorRuntime() as runtime:
        stage = Stage(runtime, ResolverArgs(META, rng=Random(1), **args))
        await runtime.ready(stage.resolver)
        await turn()
        yield stage
        assert runtime.unhandled == 0


async def turn() -> None:
    """Until all messages are delivered; no timer of interest is shorter."""
    await asyncio.sleep(0.001)


def now() -> float:
    return asyncio.get_running_loop().time()


def excluding(*records: ServiceRecord) -> Resolve:
    return Resolve(frozenset(each.public_key for each in records))


# Choosing


@virtual
async def test_it_watches_and_answers_newest_first() -> None:
    async with staged() as stage:
        assert stage.asked == [Watch(META)]
        stage.services(B, A)
        assert await stage.order() == [A, B]
        assert await stage.order(A) == [B]
        stage.services(B)
        assert await stage.order() == [B]
        assert stage.asked == [Watch(META)]


@virtual
async def test_a_policy_that_is_not_one_ends_it() -> None:
    async with ActorRuntime() as runtime:
        resolver = Stage(runtime, ResolverArgs(META, balance="best")).resolver
        reason = await runtime.stopped(resolver)
        assert isinstance(reason, Crashed)
        assert isinstance(reason.exception, InvalidInput)


@virtual
async def test_an_answer_is_bounded() -> None:
    async with staged() as stage:
        many = [record(chr(65 + number), "1.0.0") for number in range(MAX_OFFERED + 5)]
        stage.services(*many)
        assert len(await stage.order()) == MAX_OFFERED


@virtual
async def test_connections_take_turns() -> None:
    async with staged(balance="round-robin") as stage:
        stage.services(A, B, C)
        firsts = [(await stage.order())[0] for _ in range(6)]
        assert sorted(firsts[:3], key=str) == sorted((A, B, C), key=str)
        assert firsts[3:] == firsts[:3]


@virtual
async def test_the_least_connected_comes_first_and_connections_end_with_their_pipes() -> None:
    async with staged(balance="least-connections") as stage:
        stage.services(A, B)
        answers = [stage.asker(f"asker-{number}", Resolve()) for number in range(4)]
        await turn()
        # Those that only connect count too, or a burst would all go to one.
        assert {row["connections"] for row in (await stage.explained()).values()} == {2}
        on_a = [number for number, (answer,) in enumerate(answers) if answer[0] == A]
        for number in on_a:
            stage.say(f"asker-{number}", ServiceTaken(A.public_key))
        stage.runtime.kill(f"/asker-{on_a[0]}")
        await turn()
        rows = await stage.explained()
        assert (rows["a"]["connections"], rows["b"]["connections"]) == (1, 2)
        assert (await stage.order())[0] == A
        # One that moved counts where it is.
        stage.say(f"asker-{on_a[1]}", ServiceTaken(B.public_key))
        await turn()
        rows = await stage.explained()
        assert (rows["a"]["connections"], rows["b"]["connections"]) == (0, 3)
        assert (await stage.described())["connections"] == 3


@virtual
async def test_a_proxy_stays_with_the_instance_that_its_key_says() -> None:
    async with staged(balance="hash", own_key=b"\x07" * 32) as stage:
        stage.services(A, B, C)
        chosen = await stage.order()
        assert await stage.order() == chosen
        stage.services(*(each for each in (C, B, A) if each != chosen[1]))
        assert await stage.order() == [chosen[0], chosen[2]]


@virtual
async def test_the_unverified_are_refused_when_told_so() -> None:
    signed = record("s", "1.0.0", verified=True)
    async with staged(verified_only=True) as stage:
        stage.services(A, signed)
        assert await stage.order() == [signed]
        stage.services(A)
        began = now()
        assert await stage.order() == []
        assert now() - began == pytest.approx(PATIENCE)
        assert (await stage.explained())["a"]["state"] == "refused"


# Failing and coming back


@virtual
async def test_a_failure_sets_aside_and_asks_the_registry() -> None:
    with structlog.testing.capture_logs() as logs:
        async with staged() as stage:
            stage.services(A, B)
            stage.tell(ServiceFailed(A.public_key, "nobody announces it"))
            assert await stage.order() == [B, A]
            assert stage.asked[1:] == [Refresh(META)]
            row = (await stage.explained())["a"]
            assert (row["state"], row["reason"]) == ("set aside", "nobody announces it")
            assert 0.49 < row["retry_in"] <= BACKOFF_FIRST
    (entry,) = [entry for entry in logs if entry["event"] == "instance set aside"]
    assert (entry["key"], entry["failures"]) == (A.public_key.hex(), 1)


@virtual
async def test_one_connection_at_a_time_tries_again() -> None:
    async with staged() as stage:
        stage.services(A, B)
        stage.tell(ServiceFailed(A.public_key))
        await asyncio.sleep(BACKOFF_FIRST)
        first = stage.asker("first", Resolve())
        second = stage.asker("second", Resolve())
        await turn()
        assert (first, second) == ([(A, B)], [(B, A)])
        # Who dies without a result has not decided anything.
        stage.runtime.kill("/first")
        third = stage.asker("third", Resolve())
        await turn()
        assert third == [(A, B)]
        stage.say("third", ServiceWorked(A.public_key, 0.1))
        await turn()
        assert await stage.order() == [A, B]
        assert (await stage.explained())["a"]["worked_ago"] == pytest.approx(0.001, abs=0.01)


@virtual
async def test_a_trial_that_fails_takes_longer_next_time() -> None:
    async with staged() as stage:
        stage.services(A, B)
        stage.tell(ServiceFailed(A.public_key))
        await asyncio.sleep(BACKOFF_FIRST)
        first = stage.asker("first", Resolve(), ServiceFailed(A.public_key))
        await turn()
        assert first == [(A, B)]
        row = (await stage.explained())["a"]
        assert row["failures"] == 2
        assert 0.98 < row["retry_in"] <= 2.0
        assert await stage.order() == [B, A]


@virtual
async def test_one_that_rivals_overtake_again_and_again_is_set_aside() -> None:
    async with staged() as stage:
        stage.services(A, B)
        for number in range(MAX_OVERTAKEN):
            assert await stage.order() == [A, B]
            stage.asker(f"early-{number}", Resolve(), ServiceTaken(B.public_key))
            name = f"late-{number}"
            stage.asker(name, Resolve())
            await asyncio.sleep(HEDGE_FIRST)
            stage.say(name, ServiceTaken(B.public_key))
            await turn()
        row = (await stage.explained())["a"]
        assert (row["state"], row["connections"]) == ("set aside", 0)
        assert row["reason"] == "rivals were faster 3 times"


@virtual
async def test_the_time_to_hedge_follows_how_long_connecting_takes() -> None:
    async with staged() as stage:
        stage.services(A, B)
        assert (await stage.offer()).hedge == HEDGE_FIRST
        for number in range(3):
            stage.asker(f"asker-{number}", Resolve())
            await asyncio.sleep(0.04)
            # Only the first counts, and only of the one that was to be tried first.
            stage.say(f"asker-{number}", *[ServiceTaken(A.public_key)] * 2)
            await turn()
            stage.say(f"asker-{number}", ServiceTaken(B.public_key))
        assert (await stage.offer()).hedge == pytest.approx(0.16)
        described = await stage.described()
        assert described["connect_seconds"] == pytest.approx(0.04)
        assert described["hedge_seconds"] == pytest.approx(0.16)


# Waiting


@virtual
async def test_those_who_wait_are_answered_when_an_instance_appears() -> None:
    async with staged() as stage:
        answers = [stage.asker(f"asker-{number}", Resolve()) for number in range(3)]
        await asyncio.sleep(PATIENCE - 1)
        assert answers == [[], [], []]
        assert stage.asked == [Watch(META)] + [Refresh(META)] * 3
        stage.services()
        await turn()
        assert answers == [[], [], []]
        assert (await stage.described())["waiting"] == 3
        stage.services(A)
        await turn()
        assert answers == [[(A,)]] * 3
        await asyncio.sleep(PATIENCE)
        assert answers == [[(A,)]] * 3


@virtual
async def test_patience_ends() -> None:
    async with staged(patience=3.0) as stage:
        began = now()
        assert await stage.order() == []
        assert now() - began == pytest.approx(3.0)
        # An instance that comes after that is for the next one.
        stage.services(A)
        assert await stage.order() == [A]


@virtual
async def test_told_not_to_wait_it_says_so_at_once() -> None:
    async with staged(wait=False) as stage:
        began = now()
        assert await stage.order() == []
        stage.services(A)
        assert await stage.order(A) == []
        assert now() == began


@virtual
async def test_the_waiting_list_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver_module, "MAX_WAITING", 2)
    async with staged() as stage:
        waiting = [stage.asker(f"waiting-{number}", Resolve()) for number in range(2)]
        await turn()
        refused = stage.asker("refused", Resolve())
        await turn()
        assert refused == [()]
        assert waiting == [[], []]


@virtual
async def test_askers_that_died_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver_module, "MAX_WAITING", 2)
    async with staged() as stage:
        stage.asker("dies", Resolve())
        caller = asyncio.create_task(stage.order())
        await turn()
        stage.runtime.kill("/dies")
        caller.cancel()
        await turn()
        later = [stage.asker(f"later-{number}", Resolve()) for number in range(3)]
        await turn()
        assert later == [[], [], [()]]
        stage.services(A)
        await turn()
        assert later == [[(A,)], [(A,)], [()]]
        # Nobody was told who is not there to hear it.
        assert stage.runtime.dead_letters == 0


@virtual
async def test_who_has_tried_all_hears_of_a_new_one() -> None:
    async with staged() as stage:
        stage.services(A)
        asker = stage.asker("asker", ServiceFailed(A.public_key), excluding(A))
        await turn()
        assert asker == []
        stage.services(A, B)
        await turn()
        assert asker == [(B,)]


@virtual
async def test_who_has_tried_all_tries_again_when_it_is_time_one_by_one() -> None:
    async with staged() as stage:
        stage.services(A)
        dead = stage.asker("dead", excluding(A))
        stage.tell(ServiceFailed(A.public_key))
        await turn()
        stage.runtime.kill("/dead")
        first, second, third = (
            stage.asker(name, excluding(A)) for name in ("first", "second", "third")
        )
        await asyncio.sleep(BACKOFF_FIRST)
        assert (dead, first, second, third) == ([], [(A,)], [], [])
        stage.say("first", ServiceFailed(A.public_key), excluding(A))
        await asyncio.sleep(BACKOFF_FIRST * 2)
        assert (first, second, third) == ([(A,)], [(A,)], [])
        # What works for one is there for all.
        stage.say("second", ServiceWorked(A.public_key, 0.1))
        await turn()
        assert (first, second, third) == ([(A,), (A,)], [(A,)], [(A,)])
        assert stage.runtime.dead_letters == 0


@virtual
async def test_who_has_tried_all_hears_of_one_that_runs_anew() -> None:
    async with staged() as stage:
        stage.services(record("a", instance="01"))
        asker = stage.asker("asker", ServiceFailed(A.public_key), excluding(A))
        await turn()
        stage.services(record("a", instance="02"))
        await turn()
        assert [each.public_key for (each,) in asker] == [A.public_key]


@virtual
async def test_what_others_trust_is_offered_again_after_a_while() -> None:
    async with staged() as stage:
        stage.services(A)
        asker = stage.asker("asker", excluding(A))
        await asyncio.sleep(RECONSIDER - 0.01)
        assert asker == []
        await asyncio.sleep(0.02)
        assert asker == [(A,)]


@virtual
async def test_who_has_connected_waits_no_more() -> None:
    async with staged() as stage:
        stage.services(A)
        asker = stage.asker("asker", Resolve(), excluding(A), ServiceTaken(A.public_key))
        await asyncio.sleep(RECONSIDER + PATIENCE)
        stage.services(A, B)
        await turn()
        assert asker == [(A,)]
        assert (await stage.described())["waiting"] == 0


# Registries that are away


@virtual
async def test_without_any_registry_the_last_answer_holds() -> None:
    with structlog.testing.capture_logs() as logs:
        async with staged() as stage:
            stage.services(live=False)
            waits = stage.asker("waits", Resolve())
            await turn()
            assert waits == []
            stage.services(A, B)
            await asyncio.sleep(7.0)
            stage.services(live=False)
            assert await stage.order() == [A, B]
            described = await stage.described()
            assert (described["registry"], described["instances"]) == (False, 2)
            assert described["age"] == pytest.approx(7.0, abs=0.1)
            # A link that still knows says how old that is.
            stage.services(A, live=False, age=30.0)
            assert await stage.order() == [A]
            assert (await stage.described())["age"] == pytest.approx(30.0, abs=0.1)
            stage.services()
            await turn()
            assert (await stage.described())["instances"] == 0
    away, back = [entry for entry in logs if "registry" in entry["event"]]
    assert (away["event"], away["log_level"]) == ("no registry: using its last answer", "warning")
    assert (away["age"], away["known"]) == (pytest.approx(7.0, abs=0.1), 2)
    assert (back["event"], back["known"]) == ("registry back", 0)


@virtual
async def test_a_first_answer_may_be_an_old_one() -> None:
    with structlog.testing.capture_logs() as logs:
        async with staged() as stage:
            stage.services(A, live=False, age=12.0)
            assert await stage.order() == [A]
            assert (await stage.described())["age"] == pytest.approx(12.0, abs=0.1)
    (away,) = [entry for entry in logs if "registry" in entry["event"]]
    assert (away["age"], away["known"]) == (12.0, 1)


# Who looks on


@virtual
async def test_followers_are_told_of_the_first_only() -> None:
    async with staged() as stage:
        told = stage.asker("follower", Follow())
        await turn()
        assert told == []  # nothing is known yet, neither that there is one nor that not
        stage.services()
        await turn()
        assert told == [()]
        stage.services(A, B)
        stage.services(A, B, C)
        for _ in range(5):
            await stage.order()
        await turn()
        assert told[1:] == [(A,)]
        stage.tell(ServiceFailed(C.public_key))
        await turn()
        assert told[2:] == []
        stage.tell(ServiceFailed(A.public_key))
        await turn()
        assert told[2:] == [(B,)]
        stage.tell(ServiceWorked(A.public_key, 0.1))
        await turn()
        assert told[3:] == [(A,)]
        stage.services()
        await turn()
        assert told[4:] == [()]


@virtual
async def test_a_late_follower_is_told_at_once() -> None:
    async with staged() as stage:
        stage.services(A)
        assert await stage.order() == [A]
        told = stage.asker("follower", Follow())
        await turn()
        assert told == [(A,)]


@virtual
async def test_dead_followers_are_forgotten() -> None:
    async with staged() as stage:
        stage.services(A)
        told = stage.asker("follower", Follow())
        await turn()
        stage.runtime.kill("/follower")
        stage.services(B)
        stage.services(C)
        await turn()
        assert told == [(A,)]
        assert stage.runtime.dead_letters == 0


@virtual
async def test_it_describes_itself() -> None:
    async with staged(balance="random", verified_only=True, wait=False) as stage:
        assert (await stage.described())["age"] is None
        stage.services(A, record("s", verified=True))
        assert await stage.described() == {
            "role": "a",
            "range": "1.x",
            "balance": "random",
            "verified_only": True,
            "wait": False,
            "registry": True,
            "age": 0.0,
            "instances": 2,
            "usable": 1,
            "connections": 0,
            "waiting": 0,
            "connect_seconds": None,
            "hedge_seconds": HEDGE_FIRST,
        }
