from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from support.endpoint import MemoryNetwork
from support.registries import (
    FakeRegistry,
    client_side,
    item,
    our_registry,
    record,
    serving,
    signed,
    soon,
    verified,
)
from support.registry import Client, virtual
from vectors import load

from hyperseaport.actors.messages import (
    Describe,
    Find,
    Found,
    LinkDown,
    Refresh,
    Services,
    Unwatch,
    Watch,
)
from hyperseaport.actors.registry import roles, searches
from hyperseaport.transport.keys import KeyPair

KEY_A, KEY_B = b"\xaa" * 32, b"\xbb" * 32
ONE, TWO = KeyPair.from_seed(b"\x0a" * 32), KeyPair.from_seed(b"\x0b" * 32)
WANTED = roles.parse("a@1.x")


def listed(role: Any, key: Any = KEY_A) -> Any:
    meta = roles.parse(role)
    return {
        "servicePublicKey": key.hex(),
        "role": meta["role"],
        "version": meta["version"],
        "remotePublicKey": "cc" * 32,
        "meta": meta,
    }


# Watches


@virtual
async def test_a_watch_is_told_of_changes_and_asks_nothing() -> None:
    network = MemoryNetwork()
    async with (
        serving(network, FakeRegistry()) as registry,
        client_side(network, Watch(WANTED)) as side,
    ):
        await soon(lambda: side.got == [Services(WANTED, ())])
        one, two = signed(ONE, "a@1.0.0"), signed(TWO, "a@1.1.0")
        registry.leases[ONE.public_key] = one
        registry.changed()
        await asyncio.sleep(0.1)
        assert side.got[1:] == [Services(WANTED, (verified(one),))]
        registry.leases[TWO.public_key] = two
        registry.changed()
        await asyncio.sleep(0.1)
        assert side.got[2:] == [Services(WANTED, (verified(two), verified(one)))]
        del registry.leases[ONE.public_key]
        registry.changed()
        await asyncio.sleep(500)
        assert side.got[3:] == [Services(WANTED, (verified(two),))]
        (watch,) = registry.asked("watch")
        assert watch == {**WANTED, "id": watch["id"]}
        assert registry.asked("query", "waitFor") == []


@virtual
async def test_watchers_of_the_same_share_a_watch() -> None:
    network = MemoryNetwork()
    async with (
        serving(network, FakeRegistry()) as registry,
        client_side(network, Watch(WANTED), Watch(WANTED), Watch(roles.parse("b"))) as side,
    ):
        await asyncio.sleep(1)
        side.say(Watch(WANTED))
        await asyncio.sleep(1)
        assert side.got[2:] == [Services(WANTED, ())]
        assert len(registry.asked("watch")) == 2
        side.say(Unwatch(WANTED))
        side.say(Unwatch(WANTED))
        await asyncio.sleep(1)
        assert registry.asked("unwatch") == [{"id": registry.asked("watch")[0]["id"]}]
        side.say(Watch(WANTED))
        await asyncio.sleep(1)
        ids = [params["id"] for params in registry.asked("watch")]
        assert len(set(ids)) == 3


@virtual
async def test_what_an_unwatched_search_is_told_goes_nowhere() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()
    registry.script = lambda method, _params: {} if method == "unwatch" else None
    async with serving(network, registry), client_side(network, Watch(WANTED)) as side:
        await asyncio.sleep(1)
        side.say(Unwatch(WANTED))
        await asyncio.sleep(1)
        registry.notify([item(signed(ONE, "a@1.0.0"))])
        known: dict[str, Any] = {"services": []}
        nonsense: tuple[Any, ...] = (None, [], {}, {"id": 99, **known}, {"id": True, **known})
        for params in nonsense:
            registry.sessions[0].notify(params)
        await asyncio.sleep(1)
        assert side.got == [Services(WANTED, ())]
        assert side.downs == []


@virtual
async def test_duplicated_and_reordered_notifications() -> None:
    network = MemoryNetwork()
    async with (
        serving(network, FakeRegistry()) as registry,
        client_side(network, Watch(WANTED)) as side,
    ):
        await asyncio.sleep(1)
        older = signed(ONE, {"role": "a", "version": "1.0.0", "metadata": 1}, sequence=1)
        newer = signed(ONE, {"role": "a", "version": "1.0.0", "metadata": 2}, sequence=2)
        for made in (newer, newer, older, older, newer):
            registry.notify([item(made)])
        registry.notify({"no": "list"})
        await asyncio.sleep(1)
        (told,) = side.got[1:]
        assert told.records[0].meta["metadata"] == 2


@virtual
async def test_an_answer_that_comes_after_a_change_is_older_than_it() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()
    registry.delay = 1.0
    async with serving(network, registry), client_side(network, Watch(WANTED)) as side:
        await soon(lambda: registry.asked("watch"))
        registry.leases[ONE.public_key] = made = signed(ONE, "a@1.0.0")
        registry.changed()
        await asyncio.sleep(3)
        assert side.got == [Services(WANTED, (verified(made),))]


@virtual
async def test_what_a_registry_forges_is_neither_told_nor_hidden() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()
    good = signed(ONE, "a@1.0.0")
    forged = item(signed(TWO, "a@1.9.0")) | {"servicePublicKey": KEY_A.hex()}
    registry.extra = [forged, listed("a@1.2.0", KEY_B)]
    registry.leases[ONE.public_key] = good
    async with serving(network, registry), client_side(network, Watch(WANTED)) as side:
        await asyncio.sleep(1)
        assert side.got == [Services(WANTED, (record("a@1.2.0", KEY_B), verified(good)))]
        side.say(Find(WANTED))
        await asyncio.sleep(1)
        assert side.got[-1].records == side.got[0].records
        assert (await side.ask(Describe())).fields["counters"] == {"refused.forged": 1}


@pytest.mark.parametrize("answer", [ValueError("too many watches"), {}, [], {"services": {}}])
@virtual
async def test_a_watch_that_is_refused_is_a_poll(answer: Any) -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()
    registry.script = lambda method, _params: answer if method == "watch" else None
    async with serving(network, registry), client_side(network, Watch(WANTED)) as side:
        await asyncio.sleep(1)
        assert side.got == [Services(WANTED, ())]
        made = signed(ONE, "a@1.0.0")
        registry.leases[ONE.public_key] = made
        await asyncio.sleep(21)
        assert side.got[1:] == [Services(WANTED, (verified(made),))]
        assert len(registry.asked("watch")) == 1
        # The next session may do better.
        registry.script = lambda _method, _params: None
        registry.break_sessions()
        await asyncio.sleep(2)
        assert len(registry.asked("watch")) == 2


@virtual
async def test_a_failure_asks_once_more_and_not_all_the_time() -> None:
    network = MemoryNetwork()
    async with (
        serving(network, FakeRegistry()) as registry,
        client_side(network, Watch(WANTED)) as side,
    ):
        await asyncio.sleep(5)
        made = registry.leases[ONE.public_key] = signed(ONE, "a@1.0.0")
        side.say(Refresh(WANTED))
        await asyncio.sleep(0.1)
        assert side.got[1:] == [Services(WANTED, (verified(made),))]
        for _ in range(100):
            side.say(Refresh(WANTED))
            await asyncio.sleep(0.1)
        assert 9 <= len(registry.asked("query")) <= 13
        await asyncio.sleep(100)
        assert len(registry.asked("query")) <= 13
        assert len(side.got) == 2


@virtual
async def test_finds_by_a_watch() -> None:
    network = MemoryNetwork()
    async with serving(network, FakeRegistry()) as registry, client_side(network) as side:
        side.say(Find(WANTED, timeout=100.0))
        side.say(Find(WANTED, timeout=40.0))
        side.say(Find(roles.parse("b"), timeout=1.0))
        await asyncio.sleep(1.1)
        assert side.got == [Found(roles.parse("b"), ())]
        await asyncio.sleep(40)
        assert side.got[1:] == [Found(WANTED, ())]
        made = registry.leases[ONE.public_key] = signed(ONE, "a@1.0.0")
        registry.changed()
        await asyncio.sleep(0.1)
        assert side.got[2:] == [Found(WANTED, (verified(made),))]
        # Nobody looks any more.
        assert len(registry.asked("unwatch")) == 2
        assert (await side.ask(Describe())).fields["watches"] == []
        side.say(Watch(WANTED))
        await asyncio.sleep(0.1)
        asked = len(registry.requests)
        side.say(Find(WANTED))
        await asyncio.sleep(0.1)
        assert side.got[-1] == Found(WANTED, (verified(made),))
        assert len(registry.requests) == asked


# Sessions that begin and end


@pytest.mark.parametrize("modern", [True, False])
@virtual
async def test_what_is_known_stays_known_and_says_how_old_it_is(modern: Any) -> None:
    network = MemoryNetwork()
    registry = FakeRegistry(modern=modern)
    registry.extra = [listed("a@1.0.0")]
    known = (record("a@1.0.0", KEY_A),)
    async with client_side(network, Watch(WANTED)) as side:
        async with serving(network, registry):
            await asyncio.sleep(10)
            assert side.got == [Services(WANTED, known)]
        await asyncio.sleep(100)
        (lost,) = side.got[1:]
        assert (lost.records, lost.live) == (known, False)
        assert lost.age <= 10
        side.say(Watch(WANTED))
        await asyncio.sleep(0.1)
        assert side.got[2].age == pytest.approx(100 + lost.age, abs=0.5)
        async with serving(network, registry):
            await asyncio.sleep(5)
            assert side.got[3:] == [Services(WANTED, known)]


@pytest.mark.parametrize("modern", [True, False])
@virtual
async def test_a_registry_that_has_forgotten_gets_time_to_learn(modern: Any) -> None:
    network = MemoryNetwork()
    registry = FakeRegistry(modern=modern)
    registry.extra = [listed("a@1.0.0"), listed("a@1.1.0", KEY_B)]
    both = (record("a@1.1.0", KEY_B), record("a@1.0.0", KEY_A))
    async with serving(network, registry), client_side(network, Watch(WANTED)) as side:
        await asyncio.sleep(10)
        registry.extra = []
        registry.break_sessions()
        await asyncio.sleep(10)
        # One comes back, which does not mean that the other is gone.
        registry.extra = [listed("a@1.0.0")]
        registry.changed()
        await asyncio.sleep(6)
        assert [each.records for each in side.got] == [both] * 3
        assert [each.live for each in side.got] == [True, False, True]
        await asyncio.sleep(20)
        assert side.got[3:] == [Services(WANTED, (record("a@1.0.0", KEY_A),))]


@virtual
async def test_two_losses_in_a_row_give_the_time_anew() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()
    registry.extra = [listed("a@1.0.0")]
    async with serving(network, registry), client_side(network, Watch(WANTED)) as side:
        await asyncio.sleep(10)
        registry.extra = []
        registry.break_sessions()
        await asyncio.sleep(15)
        registry.break_sessions()
        await asyncio.sleep(15)
        assert side.got[-1].records
        await asyncio.sleep(10)
        assert side.got[-1] == Services(WANTED, ())


@virtual
async def test_nothing_is_told_of_what_nobody_has_answered() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()
    registry.delay = 3.0
    async with serving(network, registry), client_side(network, Watch(WANTED)) as side:
        await asyncio.sleep(4)
        registry.break_sessions()
        await asyncio.sleep(4)
        assert side.got == []
        await asyncio.sleep(4)
        assert side.got == [Services(WANTED, ())]


@virtual
async def test_find_waits_without_a_registry() -> None:
    network = MemoryNetwork(up=False)
    async with client_side(network) as side:
        side.say(Find(WANTED, timeout=5.0))
        await asyncio.sleep(5.1)
        assert side.got == [Found(WANTED, ())]


@virtual
async def test_a_watcher_that_dies_watches_no_more() -> None:
    network = MemoryNetwork()
    async with serving(network, FakeRegistry()) as registry, client_side(network) as side:
        side.say(Watch(WANTED))
        await asyncio.sleep(1)
        side.runtime.kill("/client/asker")
        await asyncio.sleep(1)
        assert len(registry.asked("unwatch")) == 1
        assert (await side.ask(Describe())).fields["watches"] == []


@virtual
async def test_limits(monkeypatch: Any) -> None:
    network = MemoryNetwork()
    monkeypatch.setattr(searches, "MAX_SEARCHES", 2)
    monkeypatch.setattr(searches, "MAX_FINDERS", 1)
    async with serving(network, FakeRegistry()), client_side(network, Watch(WANTED)) as side:
        await asyncio.sleep(0.1)
        side.say(Find(roles.parse("b")))
        side.say(Find(roles.parse("b")))
        side.say(Find(roles.parse("c")))
        side.say(Watch(roles.parse("d")))
        await asyncio.sleep(0.1)
        assert side.got[1:] == [
            Found(roles.parse("b"), ()),
            Found(roles.parse("c"), ()),
            Services(roles.parse("d"), (), live=False),
        ]
        assert side.downs == []


# Registries that tell nothing by themselves


@virtual
async def test_waits_where_it_cannot_watch() -> None:
    network = MemoryNetwork()
    wanted = roles.parse("a@^1.0.0")
    registry = FakeRegistry(modern=False)
    async with serving(network, registry), client_side(network, Watch(wanted)) as side:
        await soon(lambda: side.got == [Services(wanted, ())])
        await asyncio.sleep(100)
        assert len(side.got) == 1
        holder = await Client(network).connect()
        service = {"meta": roles.parse("a@1.4.0"), "servicePublicKey": KEY_A.hex()}
        await holder.ask("register", service)
        await asyncio.sleep(0.1)
        assert side.got[1:] == [Services(wanted, (record("a@1.4.0", KEY_A),))]
        # While all is well nothing is asked.
        asked = len(registry.asked("query", "waitFor"))
        await asyncio.sleep(1000)
        assert len(registry.asked("query", "waitFor")) == asked
        await holder.close()
        side.say(Refresh(wanted))
        await asyncio.sleep(0.1)
        assert side.got[2:] == [Services(wanted, ())]


@virtual
async def test_a_failure_keeps_the_queries_going_until_the_registry_has_noticed() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry(modern=False)
    async with serving(network, registry), client_side(network, Watch(WANTED)) as side:
        one, two = await Client(network).connect(), await Client(network).connect()
        for client, key in ((one, KEY_A), (two, KEY_B)):
            service = {"meta": roles.parse("a@1.0.0"), "servicePublicKey": key.hex()}
            await client.ask("register", service)
        side.say(Refresh(WANTED))
        await asyncio.sleep(35)
        before = len(side.got)
        assert {each.public_key for each in side.got[-1].records} == {KEY_A, KEY_B}
        for _ in range(100):
            side.say(Refresh(WANTED))
        await asyncio.sleep(10)
        assert len(side.got) == before
        await one.close()
        await asyncio.sleep(6)
        assert side.got[before:] == [Services(WANTED, (record("a@1.0.0", KEY_B),))]
        queries = len(registry.asked("query"))
        await asyncio.sleep(100)
        assert len(registry.asked("query")) == queries < 20


@virtual
async def test_nobody_asks_for_what_nobody_watches() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry(modern=False)
    async with serving(network, registry), client_side(network, Watch(WANTED)) as side:
        await asyncio.sleep(1)
        side.say(Unwatch(WANTED))
        await asyncio.sleep(31)
        asked = len(registry.asked("query", "waitFor"))
        await asyncio.sleep(300)
        assert len(registry.asked("query", "waitFor")) == asked


@virtual
async def test_a_1x_registry_in_all_its_shapes() -> None:
    lines = load("rpc")["registry_v1"]["transcripts"]
    late = next(each for each in lines if each["name"].endswith("registered later"))
    shape_b = json.loads(late["lines"][1]["text"])["result"]
    wanted = roles.parse("late@^1.0.0")
    waiting = iter([ValueError("timeout waiting for service"), shape_b])

    def answer(method: Any, _params: Any) -> Any:
        if method == "query":
            return False  # no result: nothing found
        return next(waiting) if method == "waitFor" else None

    network = MemoryNetwork()
    registry = FakeRegistry(modern=False)
    registry.script = answer
    async with serving(network, registry), client_side(network, Watch(wanted)) as side:
        await asyncio.sleep(10)
        assert side.got[0] == Services(wanted, ())
        assert side.got[1].records[0].public_key.hex() == "b" * 64
        assert side.got[1].records[0].remote_public_key.hex() == shape_b["remotePublicKey"]
        # Its store is asked for everything too: it finds few kinds of ranges.
        asked = [params["version"] for params in registry.asked("query", "waitFor")]
        assert asked[:3] == ["^1.0.0", "*", "^1.0.0"]


@virtual
async def test_a_1x_registry_that_forgets_a_waiter() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry(modern=False)
    waiting: list[Any] = []

    async with serving(network, registry), client_side(network, Watch(WANTED)) as side:
        for _ in range(100):
            await asyncio.sleep(1)
            for session in registry.sessions:
                waiting += session.waiters
                session.waiters.clear()
        assert side.downs == []
        methods = [method for _, method, _ in registry.requests if method != "ping"]
        assert methods[1:5] == ["query", "waitFor"] * 2
        assert len(waiting) > 3


@virtual
async def test_a_3x_registry_is_polled() -> None:
    network = MemoryNetwork()
    wanted = roles.parse("couchdb@^3.0.0")
    known: list[Any] = []

    def answer(method: Any, params: Any) -> Any:
        if method == "waitFor":
            return ValueError("Unknown method")
        if method == "query":
            return list(known) if params["version"] == "*" else []
        return None

    registry = FakeRegistry(modern=False)
    registry.script = answer
    async with serving(network, registry), client_side(network, Watch(wanted)) as side:
        await asyncio.sleep(60)
        assert len(registry.asked("waitFor")) == 1
        assert 10 <= len(registry.asked("query")) / 2 <= 14
        line = load("rpc")["command_line_programs"]["v3_proxy"][3]["text"]
        known += json.loads(line)["result"]
        known.append({"servicePublicKey": KEY_A.hex(), "role": "couchdb", "version": "4.0.0"})
        await asyncio.sleep(6)
        (found,) = side.got[-1].records
        assert found.version == "3.2.2"
        assert found.meta == roles.parse("couchdb@3.2.2")
        assert found.remote_public_key is None
        asked = len(registry.asked("query"))
        await asyncio.sleep(60)
        assert len(registry.asked("query")) == asked


@pytest.mark.parametrize("modern", [True, False])
@virtual
async def test_a_registry_that_refuses_everything_is_asked_calmly(modern: Any) -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()
    registry.script = lambda method, _params: (
        None if modern and method == "hello" else ValueError("only for friends")
    )
    async with serving(network, registry), client_side(network, Watch(WANTED)) as side:
        await asyncio.sleep(60)
        assert side.got == []
        assert len(registry.asked("watch", "query", "waitFor")) <= 14
        (search,) = (await side.ask(Describe())).fields["watches"]
        assert search["refusal"] == "only for friends"


# With the registry of this program


@virtual
async def test_hears_of_what_comes_and_goes() -> None:
    network = MemoryNetwork()
    async with our_registry(network), client_side(network, Watch(WANTED)) as side:
        await asyncio.sleep(1)
        holder = await Client(network).connect()
        service = {"meta": roles.parse("a@1.4.0"), "servicePublicKey": KEY_A.hex()}
        await holder.ask("register", service)
        await asyncio.sleep(1)
        assert side.got == [
            Services(WANTED, ()),
            Services(WANTED, (record("a@1.4.0", KEY_A),)),
        ]
        await holder.ask("unregister", service)
        await asyncio.sleep(1)
        assert side.got[2:] == [Services(WANTED, ())]
        assert not [each for each in side.news if isinstance(each, LinkDown)]
