from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from support.endpoint import MemoryNetwork
from support.registries import (
    BEGIN,
    FakeRegistry,
    NoAnswer,
    client_side,
    our_registry,
    record,
    serving,
    soon,
)
from support.registry import REGISTRY, Client, virtual

from hyperseaport.actors.messages import (
    Describe,
    Find,
    Found,
    LinkConnecting,
    LinkUp,
    Refresh,
    Register,
    Registered,
    Services,
    Unregister,
    Unwatch,
    Watch,
)
from hyperseaport.actors.registry import roles
from hyperseaport.actors.registry.link import Attend
from hyperseaport.transport.keys import KeyPair

SERVICE = KeyPair.from_seed(b"\x0a" * 32)
KEY = SERVICE.public_key
META = roles.parse("a@1.0.0")
WANTED = roles.parse("a@1.x")


async def registered(network: Any, role: Any = "a") -> Any:
    client = await Client(network).connect()
    items = await client.ask("query", roles.parse(role))
    await client.close()
    return [item["version"] for item in items]


def living(network: Any) -> int:
    return sum(not ours.is_closing() for ours, _ in network.connections)


# Connecting


@pytest.mark.parametrize("question", [Register(META, KEY, SERVICE), Watch(WANTED), Find(WANTED)])
@virtual
async def test_connects_when_somebody_first_wants_something(question: Any) -> None:
    network = MemoryNetwork(up=False)
    async with client_side(network) as side:
        side.say(Refresh(WANTED))
        side.say(Unwatch(WANTED))
        side.say(Unregister(META, KEY))
        side.say(Attend())
        await asyncio.sleep(100)
        described = (await side.ask(Describe())).fields
        assert (described["connected"], described["since"], described["age"]) == (False, None, None)
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
async def test_greets_the_registry_first() -> None:
    network = MemoryNetwork(delay=0.5)
    async with serving(network, FakeRegistry()) as registry, client_side(network) as side:
        side.say(Watch(WANTED))
        await asyncio.sleep(0.9)
        # Nothing is asked, and nobody told, before it is known what the registry can do.
        assert [method for _, method, _ in registry.requests] == ["hello"]
        assert registry.requests[0][2] == {"version": 1}
        assert LinkUp(REGISTRY.public_key) not in side.news
        await asyncio.sleep(0.7)
        assert side.news[-1] == LinkUp(REGISTRY.public_key)
        assert [method for _, method, _ in registry.requests] == ["hello", "watch"]


@pytest.mark.parametrize(
    "greeting",
    [
        ValueError("Unknown method"),
        {},
        [],
        False,
        {"features": "lease"},
        {"features": {"lease": 1}},
        {"features": [1, ["watch"], None]},
        {"features": [], "time": "noon"},
    ],
)
@virtual
async def test_a_registry_that_greets_oddly_can_do_nothing_special(greeting: Any) -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()
    registry.script = lambda method, _params: greeting if method == "hello" else None
    questions = Register(META, KEY, SERVICE), Watch(WANTED)
    async with serving(network, registry), client_side(network, *questions) as side:
        await asyncio.sleep(1)
        assert {method for _, method, _ in registry.requests} == {"hello", "register", "query"}
        assert side.got[0] == Registered(META, KEY, REGISTRY.public_key)


@virtual
async def test_a_connection_that_comes_too_late_is_destroyed() -> None:
    network = MemoryNetwork(connect_delay=35.0)
    async with serving(network, FakeRegistry()), client_side(network, Watch(WANTED)) as side:
        await asyncio.sleep(80)
        assert side.news.count(LinkUp(REGISTRY.public_key)) == 1
        assert len(network.connections) >= 2
        assert living(network) == 1


# Being away


@virtual
async def test_outlives_a_registry_that_is_away_for_hours() -> None:
    network = MemoryNetwork()
    async with client_side(network, Register(META, KEY, SERVICE)) as side:
        await asyncio.sleep(7_200)
        # Half the bound to the whole bound from one attempt to the next.
        assert 7_200 / 3 <= network.attempts <= 7_200 / 1.5
        assert 0.25 <= side.downs[0].retry_in <= 0.5
        assert 2.5 < max(down.retry_in for down in side.downs) <= 3
        assert side.downs[-1].down_for > 7_000
        assert "nobody announces" in side.downs[-1].reason
        # People are told less often.
        assert 7_200 / 15 <= len(side.downs) <= 7_200 / 10
        async with serving(network, FakeRegistry()):
            await soon(lambda: side.got, within=3.1)
            assert side.got == [Registered(META, KEY, REGISTRY.public_key, verified=True)]
            assert side.news[-1] == LinkUp(REGISTRY.public_key)


@virtual
async def test_attempts_come_at_random_times() -> None:
    network = MemoryNetwork(up=False)
    async with client_side(network, Watch(WANTED)) as side:
        await asyncio.sleep(300)
        delays = {round(down.retry_in, 3) for down in side.downs[1:]}
        assert len(delays) > 10
        assert all(1.5 <= delay <= 3 for delay in delays)


@virtual
async def test_a_session_that_was_stable_is_soon_begun_again() -> None:
    network = MemoryNetwork()
    async with (
        serving(network, FakeRegistry()) as registry,
        client_side(network, Watch(WANTED)) as side,
    ):
        for _ in range(10):
            await soon(lambda: registry.sessions, within=0.6)
            await asyncio.sleep(10)
            registry.break_sessions()
            await asyncio.sleep(0.01)
            assert side.downs[-1].retry_in <= 0.5
            assert side.downs[-1].reason == "the peer destroyed the connection"


@virtual
async def test_a_session_that_keeps_breaking_is_begun_ever_more_rarely() -> None:
    network = MemoryNetwork()
    async with (
        serving(network, FakeRegistry()) as registry,
        client_side(network, Watch(WANTED)) as side,
    ):
        end = asyncio.get_running_loop().time() + 300
        while asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.2)
            registry.break_sessions()
        assert 300 / 3.3 <= network.attempts <= 300 / 1.5
        assert side.downs[-1].retry_in >= 1.5


@virtual
async def test_a_registry_that_accepts_and_says_nothing_is_no_registry() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()
    registry.script = lambda _method, _params: NoAnswer
    async with serving(network, registry), client_side(network, Watch(WANTED)) as side:
        await asyncio.sleep(14.9)
        assert side.downs == []
        await asyncio.sleep(0.2)
        assert side.downs[-1].reason == "nothing heard for 15 s"
        assert network.connections[0][0].is_closing()
        assert LinkUp(REGISTRY.public_key) not in side.news
        await asyncio.sleep(60)
        assert len(network.connections) > 2
        assert living(network) <= 1


@virtual
async def test_a_registry_that_breaks_the_protocol_is_left() -> None:
    network = MemoryNetwork()
    async with serving(network, FakeRegistry()), client_side(network, Watch(WANTED)) as side:
        await asyncio.sleep(0.1)
        network.connections[0][1].write(b"no json\n")
        await asyncio.sleep(0.1)
        assert side.downs[-1].reason == "line is not JSON"
        await soon(lambda: len(network.connections) == 2)
        await asyncio.sleep(0.1)
        network.connections[1][1].write_eof()
        await soon(lambda: len(network.connections) == 3)
        side.news.clear()
        await asyncio.sleep(0.1)
        described = (await side.ask(Describe())).fields
        assert described["connected"]
        assert described["error"] is None


# Heartbeats


@pytest.mark.parametrize("modern", [True, False])
@virtual
async def test_a_silent_registry_is_asked_for_a_word(modern: Any) -> None:
    network = MemoryNetwork(delay=0.02)
    registry = FakeRegistry(modern=modern)
    if not modern:
        # Else its waiting requests are answered every 15 s.
        registry.extra.append({"servicePublicKey": "aa" * 32, "role": "a", "version": "1.0.0"})
        registry.extra[0]["meta"] = META
    async with serving(network, registry), client_side(network, Watch(WANTED)) as side:
        await asyncio.sleep(1000)
        pings = registry.times("ping")
        assert 190 <= len(pings) <= 200
        gaps = [later - earlier for earlier, later in pairwise(pings)]
        assert all(5 <= gap < 5.1 for gap in gaps)
        assert side.downs == []
        described = (await side.ask(Describe())).fields
        assert described["round_trip"] == pytest.approx(0.04)
        assert described["age"] <= 5.1


@virtual
async def test_a_registry_that_is_heard_is_not_asked() -> None:
    network = MemoryNetwork()
    async with serving(network, FakeRegistry()) as registry, client_side(network) as side:
        side.say(Watch(WANTED))
        for _ in range(100):
            await asyncio.sleep(4)
            registry.notify([])
        assert registry.times("ping") == []


@virtual
async def test_silence_ends_the_session_after_three_pings() -> None:
    network = MemoryNetwork()
    async with serving(network, FakeRegistry()) as registry, client_side(network) as side:
        side.say(Watch(WANTED))
        await asyncio.sleep(0.5)
        heard = registry.requests[-1][0]
        network.connections[0][0].blackhole()
        loop = asyncio.get_running_loop()
        await asyncio.sleep(heard + 14.9 - loop.time())
        assert side.downs == []
        await asyncio.sleep(0.2)
        assert side.downs[-1].reason == "nothing heard for 15 s"
        written = bytes(network.connections[0][0].written)
        assert written.count(b'"ping"') == 2
        await soon(lambda: len(network.connections) == 2, within=1)
        # What was known is as old as the last word of the registry.
        lost = side.of(Services)[1]
        assert not lost.live
        assert lost.age == pytest.approx(15, abs=0.1)
        await asyncio.sleep(0.1)
        assert side.of(Services)[2] == Services(WANTED, ())


@virtual
async def test_a_long_answer_is_a_sign_of_life_before_it_is_complete() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()
    registry.script = lambda method, _params: NoAnswer if method == "ping" else None
    async with serving(network, registry), client_side(network, Watch(WANTED)) as side:
        await asyncio.sleep(1)
        for _ in range(100):
            network.connections[0][1].write(b" ")
            await asyncio.sleep(1)
        assert side.downs == []


@virtual
async def test_a_slow_registry_is_waited_for_and_one_that_is_stuck_is_left() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()
    registry.delay = 4.0
    async with serving(network, registry), client_side(network) as side:
        side.say(Register(META, KEY, SERVICE))
        await asyncio.sleep(300)
        assert side.got == [Registered(META, KEY, REGISTRY.public_key, verified=True)]
        assert side.downs == []
        assert (await side.ask(Describe())).fields["round_trip"] in (None, pytest.approx(4))
        # It still answers pings, and nothing else.
        registry.script = lambda method, _params: NoAnswer if method == "lease" else None
        await asyncio.sleep(40)
        assert side.downs[-1].reason == "no answer to lease in 20 s"


# Looking in


@virtual
async def test_describes_itself() -> None:
    network = MemoryNetwork(up=False)
    async with serving(MemoryNetwork(), FakeRegistry()), client_side(network) as side:
        side.say(Register(META, KEY, SERVICE))
        side.say(Watch(WANTED))
        await asyncio.sleep(10)
        described = (await side.ask(Describe())).fields
        assert described["registry"] == REGISTRY.public_key.hex()
        assert not described["connected"]
        assert described["since"] == BEGIN
        assert described["age"] == pytest.approx(10, abs=0.2)
        assert described["attempt"] > 3
        assert "nobody announces" in described["error"]
        assert [each["state"] for each in described["registrations"]] == ["waiting"]
        network.up = True
        registry = FakeRegistry()
        registry.extra.append({"role": "a", "version": "1.0.0", "verified": True})
        async with serving(network, registry):
            await asyncio.sleep(7)
            described = (await side.ask(Describe())).fields
    assert described["connected"]
    assert BEGIN + 10 < described["since"] < BEGIN + 17
    assert described["features"] == ["lease", "watch"]
    assert described["attempt"] == 0
    assert described["error"] is None
    (registration,) = described["registrations"]
    assert 20 < registration.pop("lease") <= 30
    assert registration == {
        "role": "a@1.0.0",
        "service": KEY.hex(),
        "state": "leased",
        "refusal": None,
    }
    assert described["watches"] == [
        {"role": "a@1.x", "services": 1, "live": True, "told": True, "refusal": None}
    ]
    assert described["counters"]["refused.malformed"] > 0


@virtual
async def test_attendants_hear_of_sessions_alone() -> None:
    network = MemoryNetwork()
    async with client_side(network, Attend(), Watch(WANTED)) as side:
        await asyncio.sleep(10)
        assert side.got == []
        registry = FakeRegistry()
        async with serving(network, registry):
            await asyncio.sleep(10)
            assert side.got == [LinkUp(REGISTRY.public_key), Services(WANTED, ())]
            side.say(Attend())
            await asyncio.sleep(0.1)
            assert side.got.pop() == LinkUp(REGISTRY.public_key)
        await asyncio.sleep(10)
        assert [type(each).__name__ for each in side.got[2:]] == ["Services", "LinkDown"]


# Deaths


@pytest.mark.parametrize("actor", ["endpoint", "link", "asker"])
@pytest.mark.parametrize("moment", [0.0, 0.005, 0.015, 0.03, 0.05, 1.0])
@virtual
async def test_it_heals_when_an_actor_is_killed(actor: Any, moment: Any) -> None:
    network = MemoryNetwork(delay=0.01, connect_delay=0.01)
    questions = Register(META, KEY, SERVICE), Watch(WANTED)
    async with (
        serving(network, FakeRegistry()) as registry,
        client_side(network, *questions) as side,
    ):
        await asyncio.sleep(moment)
        side.runtime.kill(f"/client/{actor}")
        await asyncio.sleep(6)
        assert side.of(Registered)[-1] == Registered(META, KEY, REGISTRY.public_key, verified=True)
        last = side.of(Services)[-1]
        assert [each.public_key for each in last.records] == [KEY]
        assert last.live
        assert list(registry.leases) == [KEY]
        assert living(network) == 1


@pytest.mark.parametrize("actor", ["table", "sessions", "sessions/1", "server", "endpoint"])
@virtual
async def test_it_heals_when_an_actor_of_the_registry_is_killed(actor: Any) -> None:
    network = MemoryNetwork()
    questions = Register(META, KEY, SERVICE), Watch(WANTED)
    async with (
        our_registry(network) as registry,
        client_side(network, *questions) as side,
    ):
        await soon(lambda: len(side.got) >= 2)
        registry.kill(f"/registry/{actor}")
        await asyncio.sleep(20)
        assert await registered(network) == ["1.0.0"]
        found = await side.ask(Find(WANTED))
        assert [each.public_key for each in found.records] == [KEY]


# With the registry of this program


@virtual
async def test_registers_and_signs_off() -> None:
    network = MemoryNetwork()
    async with our_registry(network):
        async with client_side(network, Register(META, KEY, SERVICE)) as side:
            await soon(lambda: side.got)
            assert side.got[0].meta == META
            assert side.news == [
                LinkConnecting(REGISTRY.public_key, 1),
                LinkUp(REGISTRY.public_key),
            ]
            assert await registered(network) == ["1.0.0"]
        await asyncio.sleep(0.01)
        assert await registered(network) == []


@virtual
async def test_a_restarted_registry_is_told_again() -> None:
    network = MemoryNetwork()
    async with client_side(network, Register(META, KEY, SERVICE), Watch(WANTED)) as side:
        async with our_registry(network):
            await soon(lambda: len(side.got) == 2)
        await asyncio.sleep(30)
        assert not side.got[-1].live
        before = len(side.got)
        async with our_registry(network):
            await soon(lambda: side.got[before:], within=4.1)
            await asyncio.sleep(0.1)
            assert side.of(Registered)[1].meta == META
            assert await registered(network) == ["1.0.0"]
            assert [each.public_key for each in side.of(Services)[-1].records] == [KEY]


@virtual
async def test_finds_what_is_there_with_all_that_is_known() -> None:
    network = MemoryNetwork()
    async with our_registry(network), client_side(network) as side:
        holder = await Client(network).connect()
        for version, key in (("1.0.0", b"\xaa" * 32), ("1.2.0", b"\xbb" * 32)):
            meta = roles.parse({"role": "a", "version": version, "tags": ["x"]})
            await holder.ask("register", {"meta": meta, "servicePublicKey": key.hex()})
        side.say(Find(WANTED))
        await soon(lambda: side.got)
        found = side.got[0]
        assert found == Found(
            WANTED, (record("a@1.2.0", b"\xbb" * 32), record("a@1.0.0", b"\xaa" * 32))
        )
        assert found.records[0].meta["tags"] == ["x"]
        assert found.records[0].remote_public_key == holder.key_pair.public_key
        assert not found.records[0].verified


@virtual
async def test_what_is_leased_arrives_proven_at_those_who_watch() -> None:
    network = MemoryNetwork()
    meta = roles.parse("a@1.1.0") | {"metadata": {"zone": "z"}}
    other = KeyPair.from_seed(b"\x0b" * 32)
    async with (
        our_registry(network),
        client_side(network, Watch(WANTED)) as watcher,
        client_side(network, Register(META, KEY, SERVICE, "ab" * 16)) as one,
        client_side(network, Register(meta, other.public_key, other)) as two,
    ):
        await soon(lambda: one.got and two.got)
        # Renewals change nothing in the list.
        await asyncio.sleep(300)
        first, second = watcher.got[-1].records
        assert (first.public_key, second.public_key) == (other.public_key, KEY)
        assert first.verified
        assert first.meta["metadata"] == {"zone": "z"}
        assert second.instance == "ab" * 16
        assert second.expires > BEGIN
        assert len(watcher.got) <= 3
        two.say(Unregister(meta, other.public_key))
        await asyncio.sleep(1)
        assert [each.public_key for each in watcher.got[-1].records] == [KEY]
