from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from support.endpoint import MemoryEndpoint, MemoryNetwork
from support.registry import REGISTRY, Client, Recorder, running_registry, virtual
from vectors import load

from hyperseaport.actors.actor import Actor, handles
from hyperseaport.actors.messages import (
    Accepted,
    Find,
    Found,
    LinkConnecting,
    LinkDown,
    LinkUp,
    Listen,
    Refresh,
    Register,
    Registered,
    RegistrationRefused,
    ServiceRecord,
    Services,
    Unregister,
    Unwatch,
    Watch,
)
from hyperseaport.actors.registry import link as link_module
from hyperseaport.actors.registry import roles
from hyperseaport.actors.registry.link import Link, LinkArgs
from hyperseaport.actors.registry.records import records
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.supervisor import Backoff, ChildSpec, Supervisor, SupervisorSpec

KEY_A, KEY_B = b"\xaa" * 32, b"\xbb" * 32


def record(role: Any, key: Any = KEY_A) -> Any:
    meta = roles.parse(role)
    return ServiceRecord(key, meta["role"], meta["version"], meta)


class Asker(Actor):
    """Sends what it is told to send to the link, again to each link that follows, and records what
    comes back."""

    def on_start(self, args: Any) -> None:
        self._messages, questions = args
        for question in questions:
            self.send(self.context["link"], question)

    @handles(object)
    def _record(self, message: Any, _sender: Any) -> None:
        if isinstance(message, tuple):
            self.send(self.context["link"], message[0])
        else:
            self._messages.append(message)


class FakeRegistry(Actor):
    """Listens as a registry; its args say what to do with each line: a function from method and
    params to a result, or to an exception, or to None for no answer at all."""

    def on_start(self, args: Any) -> None:
        self._answer, self.requests = args
        self._ends: list[Any] = []
        self.own(lambda: [end.abort() for end in self._ends])
        self.run(self._listen())

    async def _listen(self) -> None:
        await self.call(self.context["endpoint"], Listen(REGISTRY, self.myAddress))
        self.ready()

    @handles(Accepted)
    def _accepted(self, message: Any, _sender: Any) -> None:
        registry, channel = self, message.channel

        class Lines(asyncio.Protocol):
            def data_received(self, data: Any) -> None:
                for line in data.splitlines():
                    request = json.loads(line)
                    registry.requests.append((registry.now, request["method"], request["params"]))
                    answer = registry._answer(request["method"], request["params"])
                    if answer is None:
                        continue
                    reply = {"result": answer, "error": None, "id": request["id"]}
                    if isinstance(answer, Exception):
                        reply |= {"result": None, "error": str(answer)}
                    channel.write(json.dumps(reply).encode() + b"\n")

        self._ends.append(channel)
        channel.set_protocol(Lines())


@asynccontextmanager
async def client_side(network: Any, *questions: Any, registry: Any = None) -> AsyncIterator[Any]:
    """A link with its asker, and a fake registry if there is an answering function for it."""
    news: list[Any] = []
    got: list[Any] = []
    requests: list[Any] = []
    children = [
        ChildSpec("console", Recorder, news),
        ChildSpec("endpoint", MemoryEndpoint, network, wait_ready=10.0),
    ]
    if registry is not None:
        children.append(ChildSpec("fake", FakeRegistry, (registry, requests), wait_ready=10.0))
    children += [
        ChildSpec("link", Link, LinkArgs(REGISTRY.public_key, rng=Random(1))),
        ChildSpec("asker", Asker, (got, questions)),
    ]
    spec = SupervisorSpec(
        "rest_for_one", tuple(children), intensity=1000, backoff=Backoff(0.01, 0.1)
    )
    async with ActorRuntime() as runtime:
        await runtime.ready(runtime.spawn(Supervisor, spec, name="client"))

        def say(message: Any) -> None:
            asker = runtime.find("/client/asker")
            assert asker is not None
            runtime.tell(asker, (message,))

        yield SimpleNamespace(runtime=runtime, news=news, got=got, requests=requests, say=say)


async def soon(condition: Any, within: Any = 60.0) -> None:
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110 - the conditions have no event in common
            await asyncio.sleep(0.05)


async def registered(network: Any, role: Any = "a") -> Any:
    client = await Client(network).connect()
    items = await client.ask("query", roles.parse(role))
    await client.close()
    return [item["version"] for item in items]


# Registering


@pytest.mark.parametrize(
    "question",
    [Register(roles.parse("a@1.0.0"), KEY_A), Watch(roles.parse("a")), Find(roles.parse("a"))],
)
@virtual
async def test_connects_when_somebody_first_wants_something(question: Any) -> None:
    network = MemoryNetwork(up=False)
    async with client_side(network) as side:
        side.say(Refresh(roles.parse("a")))
        side.say(Unwatch(roles.parse("a")))
        side.say(Unregister(roles.parse("a@1.0.0"), KEY_A))
        await asyncio.sleep(100)
        assert side.news == []
        assert network.attempts == 0
        side.say(question)
        await asyncio.sleep(0.1)
        assert side.news[0] == LinkConnecting(REGISTRY.public_key, 1)
        # The time before nobody wanted anything does not count.
        assert side.news[1].down_for == pytest.approx(0, abs=0.1)
        side.say(question)
        await asyncio.sleep(0.1)
        assert network.attempts == 1


@virtual
async def test_registers_and_signs_off() -> None:
    network = MemoryNetwork()
    meta = roles.parse("a@1.0.0")
    async with running_registry(network):
        async with client_side(network, Register(meta, KEY_A)) as side:
            await soon(lambda: side.got == [Registered(meta, KEY_A)])
            assert side.news == [
                LinkConnecting(REGISTRY.public_key, 1),
                LinkUp(REGISTRY.public_key),
            ]
            assert await registered(network) == ["1.0.0"]
            ours = network.connections[0][0]
        await asyncio.sleep(0.01)
        last = json.loads(bytes(ours.written).splitlines()[-1])
        assert last["method"] == "unregister"
        assert last["params"]["meta"] == meta
        assert await registered(network) == []


@virtual
async def test_registers_again_after_a_loss() -> None:
    network = MemoryNetwork()
    meta = roles.parse("a@1.0.0")
    async with (
        running_registry(network),
        client_side(network, Register(meta, KEY_A)) as side,
    ):
        await soon(lambda: len(side.got) == 1)
        network.connections[0][0].fail(TimeoutError("nothing heard"))
        await asyncio.sleep(0.01)
        down = side.news[-1]
        assert isinstance(down, LinkDown)
        assert down.reason == "nothing heard"
        assert 0.5 <= down.retry_in <= 1
        await soon(lambda: len(side.got) == 2, within=1.1)
        assert side.got == [Registered(meta, KEY_A)] * 2
        assert await registered(network) == ["1.0.0"]


@virtual
async def test_outlives_a_registry_that_is_away_for_a_day() -> None:
    network = MemoryNetwork()
    meta = roles.parse("a@1.0.0")
    async with client_side(network, Register(meta, KEY_A)) as side:
        await asyncio.sleep(86_400)
        downs = [message for message in side.news if isinstance(message, LinkDown)]
        assert 86_400 / 15 <= network.attempts <= 86_400 / 7.5
        assert all(0.5 <= down.retry_in <= 15 for down in downs)
        assert downs[0].retry_in < 1
        assert max(down.retry_in for down in downs) > 14
        assert downs[-1].down_for > 86_000
        assert "nobody announces" in downs[-1].reason
        async with running_registry(network):
            await soon(lambda: side.got == [Registered(meta, KEY_A)], within=16)
            assert side.news[-1] == LinkUp(REGISTRY.public_key)


@virtual
async def test_a_restarted_registry_is_told_again() -> None:
    network = MemoryNetwork()
    meta = roles.parse("a@1.0.0")
    async with client_side(network, Register(meta, KEY_A), Watch(roles.parse("a@1.x"))) as side:
        async with running_registry(network):
            await soon(lambda: len(side.got) == 2)
        await asyncio.sleep(30)
        async with running_registry(network):
            await soon(lambda: Registered(meta, KEY_A) in side.got[2:], within=16)
            assert await registered(network) == ["1.0.0"]


@virtual
async def test_a_refused_registration_says_why_and_is_tried_again() -> None:
    network = MemoryNetwork()
    answers = iter([ValueError("the registry is full"), {"ok": True}])
    meta = roles.parse("a@1.0.0")
    async with client_side(
        network, Register(meta, KEY_A), registry=lambda _m, _p: next(answers)
    ) as side:
        await soon(lambda: len(side.got) == 1)
        assert side.got == [RegistrationRefused(meta, KEY_A, "the registry is full")]
        await asyncio.sleep(31)
        assert side.got[1:] == [Registered(meta, KEY_A)]


@virtual
async def test_a_description_that_no_line_can_hold_is_refused_here() -> None:
    network = MemoryNetwork()
    meta = roles.parse({"role": "a", "version": "1.0.0", "more": "x" * 1_100_000})
    async with running_registry(network), client_side(network, Register(meta, KEY_A)) as side:
        await soon(lambda: len(side.got) == 1)
        assert "at most" in side.got[0].text
        assert await registered(network) == []


@virtual
async def test_what_nobody_wants_registered_any_more_is_unregistered() -> None:
    network = MemoryNetwork()
    one, two = roles.parse("a@1.0.0"), roles.parse("a@2.0.0")
    async with (
        running_registry(network),
        client_side(network, Register(one, KEY_A), Register(two, KEY_A)) as side,
    ):
        await soon(lambda: len(side.got) == 2)
        side.say(Unregister(one, KEY_A))
        await asyncio.sleep(0.1)
        assert await registered(network) == ["2.0.0"]
        side.runtime.stop(side.runtime.find("/client/asker"))
        await asyncio.sleep(0.001)
        # Its successor registers both.
        await soon(lambda: len(side.got) == 4)
        assert await registered(network) == ["2.0.0", "1.0.0"]


@virtual
async def test_a_registry_that_does_not_answer_is_given_up() -> None:
    network = MemoryNetwork()
    meta = roles.parse("a@1.0.0")
    async with client_side(network, Register(meta, KEY_A), registry=lambda _m, _p: None) as side:
        await asyncio.sleep(19.9)
        assert not [message for message in side.news if isinstance(message, LinkDown)]
        await asyncio.sleep(0.2)
        down = side.news[-1]
        assert down.reason == "no answer to register in 20 s"
        assert network.connections[0][0].is_closing()
        await asyncio.sleep(60)
        assert len(network.connections) > 2


@virtual
async def test_a_connection_that_comes_too_late_is_destroyed() -> None:
    network = MemoryNetwork(connect_delay=35.0)
    watch = Watch(roles.parse("a@1.x"))
    async with running_registry(network), client_side(network, watch) as side:
        await asyncio.sleep(80)
        assert side.news.count(LinkUp(REGISTRY.public_key)) == 1
        alive = [ours for ours, _ in network.connections if not ours.is_closing()]
        assert len(network.connections) >= 2
        assert len(alive) == 1


# Looking for services


@virtual
async def test_finds_what_is_there_with_all_that_is_known() -> None:
    network = MemoryNetwork()
    async with running_registry(network), client_side(network) as side:
        holder = await Client(network).connect()
        for version, key in (("1.0.0", KEY_A), ("1.2.0", KEY_B)):
            meta = roles.parse({"role": "a", "version": version, "tags": ["x"]})
            await holder.ask("register", {"meta": meta, "servicePublicKey": key.hex()})
        side.say(Find(roles.parse("a@1.x")))
        await soon(lambda: side.got)
        found = side.got[0]
        assert found == Found(
            roles.parse("a@1.x"), (record("a@1.2.0", KEY_B), record("a@1.0.0", KEY_A))
        )
        assert found.records[0].meta["tags"] == ["x"]
        assert found.records[0].remote_public_key == holder.key_pair.public_key
        assert not found.records[0].verified


@virtual
async def test_find_waits_and_gives_up() -> None:
    network = MemoryNetwork()
    async with running_registry(network), client_side(network) as side:
        side.say(Find(roles.parse("a@1.x"), timeout=100.0))
        side.say(Find(roles.parse("a@1.x"), timeout=40.0))
        side.say(Find(roles.parse("b"), timeout=1.0))
        await asyncio.sleep(1.1)
        assert side.got == [Found(roles.parse("b"), ())]
        await asyncio.sleep(40)
        assert side.got[1:] == [Found(roles.parse("a@1.x"), ())]
        holder = await Client(network).connect()
        service = {"meta": roles.parse("a@1.0.0"), "servicePublicKey": KEY_A.hex()}
        await holder.ask("register", service)
        await asyncio.sleep(0.1)
        assert side.got[2:] == [Found(roles.parse("a@1.x"), (record("a@1.0.0"),))]


@virtual
async def test_find_waits_without_a_registry() -> None:
    network = MemoryNetwork(up=False)
    async with client_side(network) as side:
        side.say(Find(roles.parse("a"), timeout=5.0))
        await asyncio.sleep(5.1)
        assert side.got == [Found(roles.parse("a"), ())]


@virtual
async def test_a_watcher_hears_of_late_services_and_of_their_end() -> None:
    network = MemoryNetwork()
    wanted = roles.parse("a@^1.0.0")
    async with running_registry(network), client_side(network, Watch(wanted)) as side:
        await soon(lambda: side.got == [Services(wanted, ())])
        await asyncio.sleep(100)
        assert len(side.got) == 1
        holder = await Client(network).connect()
        service = {"meta": roles.parse("a@1.4.0"), "servicePublicKey": KEY_A.hex()}
        await holder.ask("register", service)
        await asyncio.sleep(0.1)
        assert side.got[1:] == [Services(wanted, (record("a@1.4.0"),))]
        # While all is well nothing is asked.
        written = len(network.connections[0][0].written)
        await asyncio.sleep(1000)
        assert len(network.connections[0][0].written) == written
        await holder.close()
        side.say(Refresh(wanted))
        await asyncio.sleep(0.1)
        assert side.got[2:] == [Services(wanted, ())]


@virtual
async def test_a_failure_keeps_the_queries_going_until_the_registry_has_noticed() -> None:
    network = MemoryNetwork()
    wanted = roles.parse("a@1.x")
    async with running_registry(network), client_side(network, Watch(wanted)) as side:
        one, two = await Client(network).connect(), await Client(network).connect()
        for client, key in ((one, KEY_A), (two, KEY_B)):
            service = {"meta": roles.parse("a@1.0.0"), "servicePublicKey": key.hex()}
            await client.ask("register", service)
        side.say(Refresh(wanted))
        await asyncio.sleep(35)
        before = len(side.got)
        assert {each.public_key for each in side.got[-1].records} == {KEY_A, KEY_B}
        for _ in range(100):
            side.say(Refresh(wanted))
        await asyncio.sleep(10)
        assert len(side.got) == before
        await one.close()
        await asyncio.sleep(6)
        assert side.got[before:] == [Services(wanted, (record("a@1.0.0", KEY_B),))]
        queries = bytes(network.connections[0][0].written).count(b'"query"')
        await asyncio.sleep(100)
        assert bytes(network.connections[0][0].written).count(b'"query"') == queries < 20


@virtual
async def test_nobody_asks_for_what_nobody_watches() -> None:
    network = MemoryNetwork()
    wanted = roles.parse("a@1.x")
    async with running_registry(network), client_side(network, Watch(wanted)) as side:
        await asyncio.sleep(1)
        side.say(Unwatch(wanted))
        await asyncio.sleep(31)
        written = len(network.connections[0][0].written)
        await asyncio.sleep(300)
        assert len(network.connections[0][0].written) == written


@virtual
async def test_what_was_known_outlives_the_restart_of_the_registry() -> None:
    network = MemoryNetwork()
    wanted = roles.parse("a@1.x")
    service = {"meta": roles.parse("a@1.0.0"), "servicePublicKey": KEY_A.hex()}
    async with client_side(network, Watch(wanted)) as side:
        async with running_registry(network):
            await (await Client(network).connect()).ask("register", service)
            await soon(lambda: side.got and side.got[-1].records)
        before = len(side.got)
        async with running_registry(network):
            await asyncio.sleep(10)
            assert side.news[-1] == LinkUp(REGISTRY.public_key)
            await (await Client(network).connect()).ask("register", service)
            await asyncio.sleep(60)
        assert len(side.got) == before
        async with running_registry(network):
            await asyncio.sleep(60)
            assert side.got[before:] == [Services(wanted, ())]


# Registries of the Node programs


@virtual
async def test_a_1x_registry_in_all_its_shapes() -> None:
    lines = load("rpc")["registry_v1"]["transcripts"]
    late = next(each for each in lines if each["name"].endswith("registered later"))
    shape_b = json.loads(late["lines"][1]["text"])["result"]
    wanted = roles.parse("late@^1.0.0")
    waiting = iter([ValueError("timeout waiting for service"), shape_b])

    def registry(method: Any, params: Any) -> Any:
        if method == "query":
            return False  # no result: nothing found
        return next(waiting)

    network = MemoryNetwork()
    async with client_side(network, Watch(wanted), registry=registry) as side:
        await asyncio.sleep(10)
        assert side.got[0] == Services(wanted, ())
        assert side.got[1].records[0].public_key.hex() == "b" * 64
        assert side.got[1].records[0].remote_public_key.hex() == shape_b["remotePublicKey"]
        # Its store is asked for everything too: it finds few kinds of ranges.
        assert [params["version"] for _, _, params in side.requests[:3]] == [
            "^1.0.0",
            "*",
            "^1.0.0",
        ]


@virtual
async def test_a_1x_registry_that_forgets_a_waiter() -> None:
    network = MemoryNetwork()
    wanted = roles.parse("a@1.x")

    def registry(method: Any, params: Any) -> Any:
        return False if method == "query" else None

    async with client_side(network, Watch(wanted), registry=registry) as side:
        await asyncio.sleep(100)
        assert not [message for message in side.news if isinstance(message, LinkDown)]
        assert [method for _, method, _ in side.requests][:4] == ["query", "waitFor"] * 2


@virtual
async def test_a_3x_registry_is_polled() -> None:
    network = MemoryNetwork()
    wanted = roles.parse("couchdb@^3.0.0")
    known: list[Any] = []

    def registry(method: Any, params: Any) -> Any:
        if method == "waitFor":
            return ValueError("Unknown method")
        return list(known) if params["version"] == "*" else []

    async with client_side(network, Watch(wanted), registry=registry) as side:
        await asyncio.sleep(60)
        waits = [method for _, method, _ in side.requests].count("waitFor")
        assert waits == 1
        assert 10 <= (len(side.requests) - 1) / 2 <= 14
        line = load("rpc")["command_line_programs"]["v3_proxy"][3]["text"]
        known += json.loads(line)["result"]
        known.append({"servicePublicKey": KEY_A.hex(), "role": "couchdb", "version": "4.0.0"})
        await asyncio.sleep(6)
        (found,) = side.got[-1].records
        assert found.version == "3.2.2"
        assert found.meta == roles.parse("couchdb@3.2.2")
        assert found.remote_public_key is None
        asked = len(side.requests)
        await asyncio.sleep(60)
        assert len(side.requests) == asked


@virtual
async def test_a_registry_that_refuses_everything_is_asked_calmly() -> None:
    network = MemoryNetwork()
    async with client_side(
        network, Watch(roles.parse("a@1.x")), registry=lambda _m, _p: ValueError("no")
    ) as side:
        await asyncio.sleep(60)
        assert side.got == []
        assert len(side.requests) <= 14


@virtual
async def test_a_registry_that_breaks_the_protocol_is_left() -> None:
    network = MemoryNetwork()
    watch = Watch(roles.parse("a@1.x"))
    async with client_side(network, watch, registry=lambda _m, _p: None) as side:
        await asyncio.sleep(0.1)
        network.connections[0][1].write(b"no json\n")
        await asyncio.sleep(0.1)
        assert side.news[-1].reason == "line is not JSON"
        await soon(lambda: len(network.connections) == 2)
        network.connections[1][1].write_eof()
        await asyncio.sleep(0.1)
        assert side.news[-1].reason == "the registry ended the connection"


@pytest.mark.parametrize(
    "answer",
    [
        None,
        7,
        "text",
        [None, 1, [], {}],
        {"info": 3},
        {"id": 5},
        {"id": KEY_A.hex(), "meta": {"role": "a", "version": "9.0.0"}},
        {"id": KEY_A.hex(), "meta": {"role": "b", "version": "1.0.0"}},
        {"id": "short", "meta": {"role": "a", "version": "1.0.0"}},
        {"id": KEY_A.hex(), "meta": {"role": "a", "version": "one"}},
        {"id": KEY_A.hex(), "meta": {"role": 1, "version": "1.0.0"}},
        {"id": KEY_A.hex(), "meta": []},
        {"id": KEY_A.hex(), "remotePublicKey": "x", "meta": {"role": "a", "version": "1.0.0"}},
    ],
)
def test_answers_that_are_none(answer: Any) -> None:
    assert records(answer, roles.parse("a@1.x")) == ()


def test_records_are_sorted_and_single() -> None:
    shapes = [
        {"servicePublicKey": KEY_A.hex(), "role": "a", "version": "1.0.0", "prerelease": []},
        {"servicePublicKey": KEY_B.hex(), "role": "a", "version": "1.10.0"},
        {"servicePublicKey": KEY_A.hex(), "role": "a", "version": "1.0.0"},
        {"role": "a", "version": "1.0.0"},
    ]
    found = records(shapes, roles.parse("a"))
    assert found == (record("a@1.10.0", KEY_B), record("a@1.0.0", KEY_A))


# Deaths


@pytest.mark.parametrize("actor", ["endpoint", "link", "asker"])
@pytest.mark.parametrize("moment", [0.0, 0.005, 0.015, 0.03, 1.0])
@virtual
async def test_it_heals_when_an_actor_is_killed(actor: Any, moment: Any) -> None:
    network = MemoryNetwork(delay=0.01, connect_delay=0.01)
    meta, wanted = roles.parse("a@1.0.0"), roles.parse("a@1.x")
    async with (
        running_registry(network),
        client_side(network, Register(meta, KEY_A), Watch(wanted)) as side,
    ):
        await asyncio.sleep(moment)
        side.runtime.kill(f"/client/{actor}")
        await asyncio.sleep(6)
        assert side.got[-1] in (Registered(meta, KEY_A), Services(wanted, (record("a@1.0.0"),)))
        assert await registered(network) == ["1.0.0"]
        assert len([ours for ours, _ in network.connections if not ours.is_closing()]) == 1


@pytest.mark.parametrize("actor", ["table", "sessions", "sessions/1", "server", "endpoint"])
@virtual
async def test_it_heals_when_an_actor_of_the_registry_is_killed(actor: Any) -> None:
    network = MemoryNetwork()
    meta, wanted = roles.parse("a@1.0.0"), roles.parse("a@1.x")
    async with (
        running_registry(network) as registry,
        client_side(network, Register(meta, KEY_A), Watch(wanted)) as side,
    ):
        await soon(lambda: len(side.got) >= 2)
        registry.kill(f"/registry/{actor}")
        await asyncio.sleep(20)
        assert await registered(network) == ["1.0.0"]
        assert await side.runtime.call(side.runtime.find("/client/link"), Find(wanted), 5.0) == (
            Found(wanted, (record("a@1.0.0"),))
        )


@virtual
async def test_limits(monkeypatch: Any) -> None:
    network = MemoryNetwork()
    monkeypatch.setattr(link_module, "MAX_REGISTRATIONS", 1)
    monkeypatch.setattr(link_module, "MAX_FINDERS", 1)
    async with running_registry(network), client_side(network) as side:
        side.say(Register(roles.parse("a@1.0.0"), KEY_A))
        side.say(Register(roles.parse("a@2.0.0"), KEY_A))
        side.say(Find(roles.parse("b")))
        side.say(Find(roles.parse("b")))
        await asyncio.sleep(0.1)
        refused = [each for each in side.got if isinstance(each, RegistrationRefused)]
        assert [each.meta["version"] for each in refused] == ["2.0.0"]
        assert side.got.count(Found(roles.parse("b"), ())) == 1
