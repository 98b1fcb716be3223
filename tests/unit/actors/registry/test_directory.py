from __future__ import annotations

import asyncio
from typing import Any

import pytest
import structlog
from support.endpoint import MemoryNetwork
from support.registries import (
    FakeRegistry,
    NoAnswer,
    client_side,
    item,
    our_registry,
    record,
    serving,
    signed,
    soon,
    verified,
)
from support.registry import REGISTRY, virtual

from hyperseaport.actors.messages import (
    Describe,
    Find,
    Found,
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
from hyperseaport.actors.registry import directory, roles
from hyperseaport.actors.registry.directory import link_id, merged
from hyperseaport.transport.keys import KeyPair

SECOND = KeyPair.from_seed(b"\x17" * 32)
KEYS = REGISTRY.public_key, SECOND.public_key
ONE, TWO = KeyPair.from_seed(b"\x0a" * 32), KeyPair.from_seed(b"\x0b" * 32)
META = roles.parse("a@1.0.0")
WANTED = roles.parse("a@1.x")
REGISTER = Register(META, ONE.public_key, ONE)


def two() -> Any:
    return FakeRegistry(), FakeRegistry(SECOND)


def keys(services: Any) -> Any:
    return {each.public_key for each in services.records}


def lease_record(key: bytes, role: str, sequence: int, instance: str = "") -> ServiceRecord:
    plain = record(role, key)
    meta, version = plain.meta, plain.version
    return ServiceRecord(
        key, plain.role, version, meta, verified=True, sequence=sequence, instance=instance
    )


# What is merged


def test_the_newest_statement_of_a_service_counts() -> None:
    key = ONE.public_key
    old, new = lease_record(key, "a@1.9.0", 1), lease_record(key, "a@1.0.0", 2)
    for parts in ([(old,), (new,)], [(new,), (old,)]):
        assert [each.sequence for each in merged(parts)] == [2]


def test_what_a_service_has_signed_counts_and_not_what_is_said_of_it() -> None:
    key = ONE.public_key
    signed_, said = lease_record(key, "a@1.0.0", 1), record("a@1.9.0", key)
    for parts in ([(signed_,), (said,)], [(said,), (signed_,)]):
        assert merged(parts) == (signed_,)
    # Without a lease a key may be there in many versions.
    assert merged([(said,), (record("a@1.0.0", key), said)]) == (said, record("a@1.0.0", key))


def test_services_are_in_the_order_of_their_versions_and_then_of_the_registries() -> None:
    a, b, c = (bytes([n]) * 32 for n in (1, 2, 3))
    first = lease_record(b, "a@1.0.0", 1), lease_record(a, "a@1.0.0", 1)
    second = lease_record(c, "a@1.1.0", 1), lease_record(a, "a@1.0.0", 9)
    assert [each.public_key for each in merged([first, second])] == [c, b, a]


def test_what_was_withdrawn_is_left_out() -> None:
    key = ONE.public_key
    gone, other = lease_record(key, "a@1.0.0", 9, "x"), lease_record(key, "a@1.1.0", 8, "y")
    assert merged([(gone,), (other,)], {(key, "x"): None}) == (other,)
    assert merged([(gone,), (other,)], {(key, "z"): None}) == (gone,)


# One registry


@virtual
async def test_with_one_registry_it_is_as_its_link() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()
    async with (
        serving(network, registry),
        client_side(network, Watch(WANTED), REGISTER, registries=KEYS[:1]) as side,
    ):
        await asyncio.sleep(1)
        assert side.of(Registered) == [Registered(META, ONE.public_key, KEYS[0], True)]
        assert side.of(Services)[-1] == Services(
            WANTED, (verified(registry.leases[ONE.public_key]),)
        )
        side.say(Find(WANTED))
        await asyncio.sleep(0.01)
        assert side.got[-1] == Found(WANTED, side.of(Services)[-1].records)
        side.say(Unregister(META, ONE.public_key))
        side.say(Unwatch(WANTED))
        await asyncio.sleep(1)
        assert registry.leases == {}
        assert len(registry.asked("unwatch")) == 1
        asked = len(registry.requests)
        await asyncio.sleep(3)
        assert len(registry.requests) == asked


@virtual
async def test_with_the_registry_of_this_program() -> None:
    network = MemoryNetwork()
    async with (
        our_registry(network),
        client_side(network, Watch(WANTED), REGISTER, registries=KEYS[:1]) as side,
    ):
        await soon(lambda: side.of(Registered))
        await asyncio.sleep(100)
        (found,) = side.of(Services)[-1].records
        assert (found.public_key, found.verified) == (ONE.public_key, True)
        side.say(Unregister(META, ONE.public_key))
        await asyncio.sleep(1)
        assert side.of(Services)[-1].records == ()


# Several registries


@virtual
async def test_registers_with_each_and_says_so_of_each() -> None:
    network = MemoryNetwork()
    a, b = two()
    async with (
        serving(network, a),
        client_side(network, REGISTER, registries=KEYS) as side,
    ):
        await asyncio.sleep(10)
        assert side.got == [Registered(META, ONE.public_key, KEYS[0], True)]
        async with serving(network, b):
            await asyncio.sleep(5)
            assert side.got[1:] == [Registered(META, ONE.public_key, KEYS[1], True)]
            instances = {made.instance for each in (a, b) for made in each.leases.values()}
            assert len(instances) == 1
            b.script = lambda method, _p: ValueError("full") if method == "lease" else None
            await asyncio.sleep(11)
            assert side.got[2:] == [RegistrationRefused(META, ONE.public_key, "full", KEYS[1])]
            side.say(Unregister(META, ONE.public_key))
            await asyncio.sleep(1)
            assert a.leases == {}


@virtual
async def test_finds_what_any_of_them_has() -> None:
    network = MemoryNetwork()
    a, b = two()
    a.leases[ONE.public_key] = one = signed(ONE, "a@1.0.0")
    b.leases[TWO.public_key] = other = signed(TWO, "a@1.1.0")
    async with (
        serving(network, a),
        serving(network, b),
        client_side(network, Watch(WANTED), registries=KEYS) as side,
    ):
        await asyncio.sleep(1)
        assert side.got[-1] == Services(WANTED, (verified(other), verified(one)))
        assert len(side.got) == 2
        for registry in (a, b):
            registry.leases.clear()
            registry.changed()
            await asyncio.sleep(1)
        assert [len(each.records) for each in side.got] == [1, 2, 1, 0]


@virtual
async def test_a_service_stays_while_any_of_them_lists_it() -> None:
    network = MemoryNetwork()
    a, b = two()
    for registry in (a, b):
        registry.leases[ONE.public_key] = signed(ONE, "a@1.0.0")
    async with (
        serving(network, a),
        serving(network, b),
        client_side(network, Watch(WANTED), registries=KEYS) as side,
    ):
        await asyncio.sleep(1)
        a.leases.clear()
        a.changed()
        await asyncio.sleep(1)
        assert [keys(each) for each in side.got] == [{ONE.public_key}]
        b.leases.clear()
        b.changed()
        await asyncio.sleep(1)
        assert side.got[1:] == [Services(WANTED, ())]


@virtual
async def test_one_away_keeps_its_last_word() -> None:
    network = MemoryNetwork()
    a, b = two()
    a.leases[ONE.public_key] = one = signed(ONE, "a@1.0.0")
    b.leases[TWO.public_key] = other = signed(TWO, "a@1.0.0")
    async with (
        serving(network, a),
        client_side(network, Watch(WANTED), registries=KEYS) as side,
    ):
        async with serving(network, b):
            await asyncio.sleep(1)
        await asyncio.sleep(3600)
        # Nobody is told of what nobody sees.
        assert side.got[-1] == Services(WANTED, (verified(one), verified(other)))
        assert len(side.got) == 2
        described = (await side.ask(Describe())).fields
        assert [each["connected"] for each in described["registries"]] == [True, False]
        assert described["watches"] == [{"role": "a@1.x", "services": 2, "live": True, "age": 0.0}]
        b.leases.clear()
        async with serving(network, b):
            await asyncio.sleep(40)
            assert side.got[2:] == [Services(WANTED, (verified(one),))]


@virtual
async def test_all_away_and_back_again() -> None:
    network = MemoryNetwork()
    a, b = two()
    a.leases[ONE.public_key] = one = signed(ONE, "a@1.0.0")
    with structlog.testing.capture_logs() as logs:
        async with client_side(network, Watch(WANTED), registries=KEYS) as side:
            async with serving(network, a):
                async with serving(network, b):
                    await asyncio.sleep(10)
                await asyncio.sleep(100)
            await asyncio.sleep(605)
            assert [each.live for each in side.got] == [True, False]
            assert side.got[1].records == (verified(one),)
            assert side.got[1].age < 10
            described = (await side.ask(Describe())).fields
            assert described["away"] == pytest.approx(605, abs=1)
            assert not described["live"]
            (watch,) = described["watches"]
            assert watch["age"] == pytest.approx(605, abs=10)
            side.say(Watch(WANTED))
            await asyncio.sleep(0.1)
            assert side.got[2].age == pytest.approx(watch["age"], abs=1)
            async with serving(network, b):
                await asyncio.sleep(10)
                # The one that is back knows of nothing, and does not speak for the other.
                assert side.got[3:] == [Services(WANTED, (verified(one),))]
                assert (await side.ask(Describe())).fields["away"] is None
    told = [each for each in logs if each["event"].startswith("registries.")]
    # And once more at the end of the test.
    events = ["registries.away"] * 11 + ["registries.back", "registries.away"]
    assert [each["event"] for each in told] == events
    assert [each["log_level"] for each in told] == ["warning", *["info"] * 11, "warning"]
    assert told[5]["age"] == 300
    assert all(each["known"] == 1 for each in told if "known" in each)


@virtual
async def test_what_was_unregistered_here_is_gone_though_one_that_is_away_had_it() -> None:
    network = MemoryNetwork()
    a, b = two()
    async with (
        serving(network, a),
        client_side(network, Watch(WANTED), REGISTER, registries=KEYS) as side,
    ):
        async with serving(network, b):
            await asyncio.sleep(5)
        await asyncio.sleep(5)
        assert keys(side.of(Services)[-1]) == {ONE.public_key}
        side.say(Unregister(META, ONE.public_key))
        await asyncio.sleep(1)
        assert side.of(Services)[-1] == Services(WANTED, ())
        # It comes back as it was.
        side.say(REGISTER)
        await asyncio.sleep(1)
        assert keys(side.of(Services)[-1]) == {ONE.public_key}


@virtual
async def test_what_one_forges_hides_nothing_of_the_other() -> None:
    network = MemoryNetwork()
    a, b = two()
    honest = signed(ONE, "a@1.0.0", sequence=5)
    a.leases[ONE.public_key] = honest
    b.extra = [
        item(signed(TWO, "a@1.9.0", sequence=9)) | {"servicePublicKey": ONE.public_key.hex()},
        item(honest) | {"statement": honest.text.replace("1.0.0", "1.9.9")},
        {"servicePublicKey": ONE.public_key.hex(), "role": "a", "version": "1.9.0"},
    ]
    async with (
        serving(network, a),
        serving(network, b),
        client_side(network, Watch(WANTED), registries=KEYS) as side,
    ):
        await asyncio.sleep(1)
        (found,) = side.got[-1].records
        assert (found.version, found.verified) == ("1.0.0", True)
        side.say(Find(WANTED))
        await asyncio.sleep(1)
        assert side.got[-1] == Found(WANTED, (found,))
        path = f"/client/links/{link_id(KEYS[1])}"
        described = (await side.ask(Describe(), path)).fields
        assert described["counters"]["refused.forged"] >= 2


# Finding


@virtual
async def test_a_find_waits_a_moment_for_the_others() -> None:
    network = MemoryNetwork()
    a, b = two()
    a.leases[ONE.public_key] = one = signed(ONE, "a@1.0.0")
    b.leases[TWO.public_key] = other = signed(TWO, "a@1.1.0")
    async with (
        serving(network, a),
        serving(network, b),
        client_side(network, registries=KEYS) as side,
    ):
        side.say(Watch(roles.parse("warm up")))
        await asyncio.sleep(1)
        b.delay = 0.1
        assert (await side.ask(Find(WANTED))).records == (verified(other), verified(one))
        b.delay = 3.0
        asked_at = asyncio.get_running_loop().time()
        assert (await side.ask(Find(WANTED))).records == (verified(one),)
        assert asyncio.get_running_loop().time() - asked_at == pytest.approx(0.2, abs=0.01)


@virtual
async def test_a_find_needs_one_registry_alone() -> None:
    network = MemoryNetwork()
    _, b = two()
    b.leases[TWO.public_key] = made = signed(TWO, "a@1.1.0")
    async with serving(network, b), client_side(network, registries=KEYS) as side:
        assert (await side.ask(Find(WANTED, 5.0))).records == (verified(made),)


@virtual
async def test_finds_end_in_their_time() -> None:
    network = MemoryNetwork()
    a, b = two()
    async with (
        serving(network, a),
        serving(network, b),
        client_side(network, registries=KEYS) as side,
    ):
        for timeout in (5.0, 2.0, 50.0):
            side.say(Find(WANTED, timeout))
        await asyncio.sleep(1.9)
        assert side.got == []
        await asyncio.sleep(0.2)
        assert side.got == [Found(WANTED, ())]
        await asyncio.sleep(3)
        assert side.got == [Found(WANTED, ())] * 2
        b.leases[TWO.public_key] = made = signed(TWO, "a@1.1.0")
        b.changed()
        await asyncio.sleep(0.3)
        assert side.got[2:] == [Found(WANTED, (verified(made),))]
        await asyncio.sleep(60)
        assert len(side.got) == 3


# Deaths


@pytest.mark.parametrize("victim", [0, 1])
@virtual
async def test_a_link_that_dies_is_told_everything_again(victim: Any) -> None:
    network = MemoryNetwork()
    a, b = two()
    async with (
        serving(network, a),
        serving(network, b),
        client_side(network, Watch(WANTED), REGISTER, registries=KEYS) as side,
    ):
        await asyncio.sleep(5)
        path = f"/client/links/{link_id(KEYS[victim])}"
        registry = (a, b)[victim]
        for _ in range(3):
            registry.requests.clear()
            side.runtime.kill(path)
            await asyncio.sleep(2)
            assert [method for _, method, _ in registry.requests[:3]] == ["hello", "lease", "watch"]
            assert side.got[-1] == Registered(META, ONE.public_key, KEYS[victim], True)
        # The other one vouched for it all the time.
        assert all(each.live for each in side.of(Services))
        assert keys(side.of(Services)[-1]) == {ONE.public_key}
        described = (await side.ask(Describe())).fields
        assert [each["connected"] for each in described["registries"]] == [True, True]


@virtual
async def test_the_only_link_dies_while_somebody_finds() -> None:
    network = MemoryNetwork()
    a, _ = two()
    async with (
        serving(network, a),
        client_side(network, Watch(WANTED), registries=KEYS[:1]) as side,
    ):
        await asyncio.sleep(1)
        side.say(Find(WANTED, 30.0))
        await asyncio.sleep(0.1)
        side.runtime.kill(f"/client/links/{link_id(KEYS[0])}")
        await asyncio.sleep(1)
        assert [each.live for each in side.of(Services)] == [True, False, True]
        a.leases[ONE.public_key] = made = signed(ONE, "a@1.0.0")
        a.changed()
        await asyncio.sleep(0.1)
        assert side.of(Found) == [Found(WANTED, (verified(made),))]


@virtual
async def test_all_links_die_again_and_again() -> None:
    network = MemoryNetwork()
    a, b = two()
    async with (
        serving(network, a),
        serving(network, b),
        client_side(network, Watch(WANTED), REGISTER, registries=KEYS) as side,
    ):
        for moment in (0.0, 0.001, 0.01, 0.1, 0.5, 1.0):
            await asyncio.sleep(moment)
            for key in KEYS:
                if side.runtime.find(f"/client/links/{link_id(key)}"):
                    side.runtime.kill(f"/client/links/{link_id(key)}")
        await asyncio.sleep(5)
        assert keys(side.of(Services)[-1]) == {ONE.public_key}
        assert side.of(Services)[-1].live
        assert set(a.leases) == set(b.leases) == {ONE.public_key}


@pytest.mark.parametrize("actor", ["link", "links", "asker", "endpoint"])
@virtual
async def test_it_heals_when_others_are_killed(actor: Any) -> None:
    network = MemoryNetwork()
    a, b = two()
    async with (
        serving(network, a),
        serving(network, b),
        client_side(network, Watch(WANTED), REGISTER, registries=KEYS) as side,
    ):
        await asyncio.sleep(2)
        side.runtime.kill(f"/client/{actor}")
        await asyncio.sleep(6)
        assert side.of(Services)[-1].live
        assert keys(side.of(Services)[-1]) == {ONE.public_key}
        assert set(a.leases) == set(b.leases) == {ONE.public_key}


@virtual
async def test_what_the_dead_wanted_is_wanted_no_more() -> None:
    network = MemoryNetwork()
    a, _ = two()
    async with serving(network, a), client_side(network, registries=KEYS[:1]) as side:
        side.say(REGISTER)
        side.say(Watch(WANTED))
        await asyncio.sleep(1)
        side.runtime.kill("/client/asker")
        await asyncio.sleep(1)
        assert a.leases == {}
        assert len(a.asked("unwatch")) == 1
        described = (await side.ask(Describe())).fields
        assert (described["registrations"], described["watches"]) == ([], [])


# The rest


@virtual
async def test_a_refresh_goes_to_all() -> None:
    network = MemoryNetwork()
    a, b = two()
    async with (
        serving(network, a),
        serving(network, b),
        client_side(network, Watch(WANTED), registries=KEYS) as side,
    ):
        await asyncio.sleep(5)
        side.say(Refresh(WANTED))
        await asyncio.sleep(0.1)
        assert len(a.asked("query")) == len(b.asked("query")) == 1


@virtual
async def test_a_slow_registry_holds_up_nobody() -> None:
    network = MemoryNetwork()
    a, b = two()
    a.script = lambda method, _params: NoAnswer if method != "ping" else None
    b.leases[ONE.public_key] = made = signed(ONE, "a@1.0.0")
    async with (
        serving(network, a),
        serving(network, b),
        client_side(network, Watch(WANTED), registries=KEYS) as side,
    ):
        await asyncio.sleep(0.5)
        assert side.got == [Services(WANTED, (verified(made),))]
        await asyncio.sleep(100)
        assert len(side.got) == 1


@virtual
async def test_describes_itself() -> None:
    network = MemoryNetwork()
    a, b = two()
    async with (
        serving(network, a),
        client_side(network, REGISTER, Watch(WANTED), registries=KEYS) as side,
    ):
        await asyncio.sleep(0)
        assert (await side.ask(Describe())).fields["watches"][0]["services"] is None
        async with serving(network, b):
            await asyncio.sleep(5)
            described = (await side.ask(Describe())).fields
        assert described == {
            "registries": [{"registry": key.hex(), "connected": True} for key in KEYS],
            "live": True,
            "away": None,
            "registrations": [{"role": "a@1.0.0", "service": ONE.public_key.hex()}],
            "watches": [{"role": "a@1.x", "services": 1, "live": True, "age": 0.0}],
        }


@virtual
async def test_limits(monkeypatch: Any) -> None:
    network = MemoryNetwork()
    for name, limit in (("MAX_REGISTRATIONS", 1), ("MAX_SEARCHES", 2), ("MAX_FINDERS", 2)):
        monkeypatch.setattr(directory, name, limit)
    b, c = roles.parse("b"), roles.parse("c")
    async with client_side(network, REGISTER, Watch(WANTED), registries=KEYS) as side:
        side.say(Register(META, TWO.public_key, TWO))
        side.say(Find(b))
        side.say(Find(c))
        side.say(Watch(c))
        side.say(Find(WANTED))
        side.say(Find(b))
        await asyncio.sleep(0.1)
        refused = "one program registers at most 1 services"
        assert side.got == [
            RegistrationRefused(META, TWO.public_key, refused),
            Found(c, ()),
            Services(c, (), live=False),
            Found(b, ()),
        ]
        await asyncio.sleep(16)
        assert side.got[4:] == [Found(b, ()), Found(WANTED, ())]
        side.say(Find(b, 1.0))
        await asyncio.sleep(0.5)
        assert len(side.got) == 6
