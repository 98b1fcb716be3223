"""Which service a connection goes to, and what happens while there is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from support.registry import Recorder, virtual

from hyperseaport.actors import resolver as resolver_module
from hyperseaport.actors.actor import Actor, handles
from hyperseaport.actors.messages import (
    Follow,
    Refresh,
    Resolve,
    Resolved,
    ServiceFailed,
    ServiceRecord,
    Services,
    Watch,
)
from hyperseaport.actors.registry import roles
from hyperseaport.actors.resolver import MAX_TRIES, PATIENCE, PENALTY, Resolver
from hyperseaport.actors.system import ActorRuntime

META = roles.to_find("a@1.x")


def record(name: str) -> ServiceRecord:
    meta = roles.parse("a@1.0.0")
    return ServiceRecord(name.encode() * 32, meta["role"], meta["version"], meta)


A, B, C, D = map(record, "abcd")


class Asker(Actor):
    """Sends the resolver what it is told to, and appends the answers to its args."""

    def on_start(self, args: list[Any]) -> None:
        self._answers = args

    @handles(Resolve, Follow)
    def _say(self, message: object, _sender: object) -> None:
        self.send(self.context["resolver"], message)

    @handles(Resolved)
    def _resolved(self, message: Resolved, _sender: object) -> None:
        self._answers.append(message)


class Stage:
    """A resolver between a link that only records, and any number of askers."""

    def __init__(self, runtime: ActorRuntime) -> None:
        self.runtime = runtime
        #: What the link was sent.
        self.asked: list[Any] = []
        self.link = runtime.spawn(Recorder, self.asked, "link")
        self.resolver = runtime.spawn(Resolver, META, "resolver", {"link": self.link})

    def tell(self, message: object) -> None:
        self.runtime.tell(self.resolver, message)

    def services(self, *records: ServiceRecord) -> None:
        self.tell(Services(META, records))

    async def order(self) -> list[ServiceRecord]:
        return list((await self.runtime.call(self.resolver, Resolve())).services)

    def asker(self, name: str, message: object) -> list[Resolved]:
        answers: list[Resolved] = []
        address = self.runtime.spawn(Asker, answers, name, {"resolver": self.resolver})
        self.runtime.tell(address, message)
        return answers


@asynccontextmanager
async def staged() -> AsyncIterator[Stage]:
    async with ActorRuntime() as runtime:
        stage = Stage(runtime)
        await runtime.ready(stage.resolver)
        await turn()
        yield stage


async def turn() -> None:
    """Until all messages are delivered; no timer of interest is shorter."""
    await asyncio.sleep(0.001)


@virtual
async def test_it_watches_and_answers_in_the_registrys_order() -> None:
    async with staged() as stage:
        assert stage.asked == [Watch(META)]
        stage.services(B, A)
        assert await stage.order() == [B, A]
        stage.services(A)
        assert await stage.order() == [A]
        assert stage.asked == [Watch(META)]


@virtual
async def test_at_most_so_many_are_tried() -> None:
    async with staged() as stage:
        stage.services(A, B, C, D)
        assert await stage.order() == [A, B, C][:MAX_TRIES]
        for failed in (A, B):
            stage.tell(ServiceFailed(failed.public_key))
        # Those that failed come last, also of those that are left out.
        assert await stage.order() == [C, D, A]


@virtual
async def test_a_failure_counts_for_a_while_and_is_reported() -> None:
    async with staged() as stage:
        stage.services(A, B)
        stage.tell(ServiceFailed(A.public_key))
        assert await stage.order() == [B, A]
        assert stage.asked[1:] == [Refresh(META)]
        await asyncio.sleep(PENALTY - 0.01)
        assert await stage.order() == [B, A]
        await asyncio.sleep(0.02)
        assert await stage.order() == [A, B]


@virtual
async def test_a_service_that_left_and_came_back_is_trusted() -> None:
    async with staged() as stage:
        stage.services(A, B)
        stage.tell(ServiceFailed(A.public_key))
        stage.services(B)
        stage.services(A, B)
        assert await stage.order() == [A, B]


@virtual
async def test_those_who_wait_are_answered_when_a_service_appears() -> None:
    async with staged() as stage:
        answers = [stage.asker(f"asker-{number}", Resolve()) for number in range(3)]
        await asyncio.sleep(PATIENCE - 1)
        assert answers == [[], [], []]
        assert stage.asked == [Watch(META)] + [Refresh(META)] * 3
        stage.services()
        await turn()
        assert answers == [[], [], []]
        stage.services(A)
        await turn()
        assert answers == [[Resolved((A,))]] * 3
        await asyncio.sleep(PATIENCE)
        assert answers == [[Resolved((A,))]] * 3


@virtual
async def test_patience_ends() -> None:
    async with staged() as stage:
        began = asyncio.get_running_loop().time()
        assert await stage.order() == []
        assert asyncio.get_running_loop().time() - began == pytest.approx(PATIENCE)
        # A service that comes after that is for the next one.
        stage.services(A)
        assert await stage.order() == [A]


@virtual
async def test_the_waiting_list_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver_module, "MAX_WAITING", 2)
    async with staged() as stage:
        waiting = [stage.asker(f"waiting-{number}", Resolve()) for number in range(2)]
        await turn()
        refused = stage.asker("refused", Resolve())
        await turn()
        assert refused == [Resolved(())]
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
        assert later == [[], [], [Resolved(())]]
        stage.services(A)
        await turn()
        assert later == [[Resolved((A,))], [Resolved((A,))], [Resolved(())]]
        # Nobody was told who is not there to hear it.
        assert stage.runtime.dead_letters == 0


@virtual
async def test_followers_are_told_of_the_first_only() -> None:
    async with staged() as stage:
        told = stage.asker("follower", Follow())
        await turn()
        assert told == []  # nothing is known yet, neither that there is a service nor that not
        stage.services()
        await turn()
        assert told == [Resolved(())]
        stage.services(A, B)
        stage.services(A, B, C)
        await turn()
        assert told[1:] == [Resolved((A, B))]
        stage.tell(ServiceFailed(C.public_key))
        await turn()
        assert told[2:] == []
        stage.tell(ServiceFailed(A.public_key))
        await turn()
        assert told[2:] == [Resolved((B, A, C))]
        stage.services()
        await turn()
        assert told[3:] == [Resolved(())]


@virtual
async def test_followers_hear_that_a_penalty_is_over_when_it_matters() -> None:
    async with staged() as stage:
        stage.services(A, B)
        told = stage.asker("follower", Follow())
        await turn()
        stage.tell(ServiceFailed(A.public_key))
        await asyncio.sleep(PENALTY + 1)
        assert [each.services[0] for each in told] == [A, B]
        assert await stage.order() == [A, B]
        await turn()
        assert [each.services[0] for each in told] == [A, B, A]


@virtual
async def test_a_late_follower_is_told_at_once() -> None:
    async with staged() as stage:
        stage.services(A)
        assert await stage.order() == [A]
        told = stage.asker("follower", Follow())
        await turn()
        assert told == [Resolved((A,))]


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
        assert told == [Resolved((A,))]
        assert stage.runtime.dead_letters == 0
        assert stage.runtime.unhandled == 0
