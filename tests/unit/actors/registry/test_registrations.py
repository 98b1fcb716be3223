from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import Any

import pytest
from support.endpoint import MemoryNetwork
from support.registries import FakeRegistry, NoAnswer, client_side, serving, signed, soon
from support.registry import REGISTRY, virtual

from hyperseaport.actors.messages import (
    Describe,
    Register,
    Registered,
    RegistrationRefused,
    Unregister,
)
from hyperseaport.actors.registry import registrations, roles
from hyperseaport.actors.registry.lease import Verifier
from hyperseaport.transport import rpc
from hyperseaport.transport.keys import KeyPair

SERVICE = KeyPair.from_seed(b"\x0a" * 32)
KEY = SERVICE.public_key
OTHER = KeyPair.from_seed(b"\x0b" * 32)
META = roles.parse("a@1.0.0")
REGISTER = Register(META, KEY, SERVICE, "ab" * 16)
REGISTERED = Registered(META, KEY, REGISTRY.public_key, verified=True)


def leases(registry: FakeRegistry) -> Any:
    """All that were sent, also those that were refused."""
    verifier = Verifier()
    return [
        verifier.verify(params["statement"], params["signature"])
        for params in registry.asked("lease")
    ]


async def states(side: Any) -> Any:
    described = (await side.ask(Describe())).fields
    return [each["state"] for each in described["registrations"]]


# Leases


@virtual
async def test_leases_what_is_signed() -> None:
    network = MemoryNetwork()
    async with (
        serving(network, FakeRegistry()) as registry,
        client_side(network, REGISTER) as side,
    ):
        await soon(lambda: side.got)
        (made,) = leases(registry)
        assert (made.key, made.meta, made.instance, made.ttl) == (KEY, META, "ab" * 16, 30.0)
        assert abs(made.issued / 1000 - side.clock()) < 1
        assert made.sequence == made.issued
        assert registry.asked("register") == []
        assert side.got == [REGISTERED]


@virtual
async def test_an_instance_is_chosen_where_none_is_given_and_stays() -> None:
    network = MemoryNetwork()
    async with (
        serving(network, FakeRegistry()) as registry,
        client_side(network, Register(META, KEY, SERVICE)) as side,
    ):
        await asyncio.sleep(60)
        side.say(Register(META, KEY, SERVICE))
        await asyncio.sleep(1)
        assert len({made.instance for made in leases(registry)}) == 1
        assert len(leases(registry)[0].instance) == 32


@pytest.mark.parametrize("granted", [None, 12.0, 600.0])
@virtual
async def test_renews_after_a_third_of_what_was_granted(granted: Any) -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()
    registry.granted = granted
    ttl = granted or 30.0
    async with serving(network, registry), client_side(network, REGISTER) as side:
        await asyncio.sleep(20 * ttl)
        made = leases(registry)
        gaps = [after - before for before, after in pairwise(registry.times("lease"))]
        assert all(0.6 * ttl / 3 <= gap <= ttl / 3 for gap in gaps)
        assert len({round(gap, 3) for gap in gaps}) > 20
        numbers = [each.sequence for each in made]
        assert numbers == sorted(set(numbers))
        assert all(each.issued <= each.sequence for each in made)
        # The owner hears of it once.
        assert side.got == [REGISTERED]


@pytest.mark.parametrize("granted", [0.1, 10**9, "long", True])
@virtual
async def test_odd_times_are_not_taken_at_their_word(granted: Any) -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()
    registry.script = lambda method, _p: {"ttl": granted} if method == "lease" else None
    async with serving(network, registry), client_side(network, REGISTER) as side:
        await asyncio.sleep(1250)
        assert side.got == [REGISTERED]
        assert 1 < len(registry.asked("lease")) < 2200


@virtual
async def test_many_are_leased_at_once_and_not_renewed_at_once() -> None:
    network = MemoryNetwork(delay=0.01)
    pairs = [KeyPair.from_seed(bytes([n]) * 32) for n in range(1, 101)]
    questions = [Register(META, pair.public_key, pair) for pair in pairs]
    async with (
        serving(network, FakeRegistry()) as registry,
        client_side(network, *questions) as side,
    ):
        await soon(lambda: len(side.got) == 100, within=1)
        for _ in range(3):
            registry.requests.clear()
            registry.break_sessions()
            await asyncio.sleep(2)
            times = registry.times("lease")
            assert len(times) == 100
            # No more at a time than the window.
            assert times.count(times[0]) == registrations.MAX_ASKED
            assert times[-1] - times[0] < 0.1
            await asyncio.sleep(12)
            renewals = registry.times("lease")[100:200]
            tenths = [round(time, 1) for time in renewals]
            assert max(map(tenths.count, tenths)) < 15
        assert len(side.got) == 400


@virtual
async def test_a_registry_that_forgets_is_told_at_the_next_renewal() -> None:
    network = MemoryNetwork()
    async with serving(network, FakeRegistry()) as registry, client_side(network, REGISTER):
        await asyncio.sleep(1)
        assert list(registry.leases) == [KEY]
        registry.forget()
        await asyncio.sleep(10.1)
        assert list(registry.leases) == [KEY]


@virtual
async def test_withdraws_what_nobody_wants_any_more() -> None:
    network = MemoryNetwork()
    two = Register(roles.parse("b@2.0.0"), OTHER.public_key, OTHER)
    async with (
        serving(network, FakeRegistry()) as registry,
        client_side(network, REGISTER, two) as side,
    ):
        await asyncio.sleep(1)
        side.say(Unregister(META, KEY))
        await asyncio.sleep(0.1)
        withdrawal = leases(registry)[-1]
        assert (withdrawal.key, withdrawal.ttl) == (KEY, 0.0)
        assert withdrawal.sequence > leases(registry)[0].sequence
        assert list(registry.leases) == [OTHER.public_key]
        await asyncio.sleep(300)
        assert list(registry.leases) == [OTHER.public_key]
        assert await states(side) == ["leased"]
        # It can come back.
        side.say(REGISTER)
        await asyncio.sleep(0.1)
        assert set(registry.leases) == {KEY, OTHER.public_key}
        assert side.got[-1] == REGISTERED


@virtual
async def test_what_an_owner_that_died_wanted_is_withdrawn() -> None:
    network = MemoryNetwork()
    async with (
        serving(network, FakeRegistry()) as registry,
        client_side(network) as side,
    ):
        side.say(REGISTER)
        await asyncio.sleep(1)
        side.runtime.kill("/client/asker")
        await asyncio.sleep(1)
        assert registry.leases == {}


@virtual
async def test_what_comes_and_goes_while_the_registry_is_slow_ends_as_wanted() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()
    registry.delay = 2.0
    async with serving(network, registry), client_side(network) as side:
        side.say(REGISTER)
        await asyncio.sleep(3)
        side.say(Unregister(META, KEY))
        side.say(REGISTER)
        side.say(Unregister(META, KEY))
        await asyncio.sleep(5)
        assert registry.leases == {}
        side.say(REGISTER)
        await asyncio.sleep(1)
        side.say(Unregister(META, KEY))
        side.say(REGISTER)
        await asyncio.sleep(6)
        assert list(registry.leases) == [KEY]
        assert side.got[-1] == REGISTERED


@virtual
async def test_withdraws_in_order_when_it_stops() -> None:
    network = MemoryNetwork()
    async with serving(network, FakeRegistry()):
        async with client_side(network, REGISTER):
            await asyncio.sleep(1)
        # Its network went in the same moment, so the registry does not hear of it here.
        written = bytes(network.connections[0][0].written).splitlines()
        lines = [json.loads(line) for line in written]
        assert [line["method"] for line in lines] == ["hello", "lease", "lease"]
        params = lines[-1]["params"]
        assert Verifier().verify(params["statement"], params["signature"]).withdrawal


@virtual
async def test_a_link_that_dies_withdraws_nothing() -> None:
    network = MemoryNetwork()
    async with serving(network, FakeRegistry()) as registry, client_side(network, REGISTER) as side:
        await asyncio.sleep(1)
        side.runtime.kill("/client/link")
        await asyncio.sleep(5)
        assert not any(made.withdrawal for made in leases(registry))
        assert list(registry.leases) == [KEY]


@virtual
async def test_a_change_of_the_description_is_leased_at_once() -> None:
    network = MemoryNetwork()
    changed = META | {"metadata": {"zone": "z"}}
    async with serving(network, FakeRegistry()) as registry, client_side(network, REGISTER) as side:
        await asyncio.sleep(1)
        side.say(Register(changed, KEY, SERVICE))
        await asyncio.sleep(0.1)
        assert registry.leases[KEY].meta == changed
        assert side.got[1] == Registered(changed, KEY, REGISTRY.public_key, verified=True)
        await asyncio.sleep(60)
        assert registry.leases[KEY].meta == changed


@virtual
async def test_a_change_is_told_of_once_the_registry_has_it() -> None:
    network = MemoryNetwork()
    changed = META | {"metadata": {"zone": "z"}}
    registry = FakeRegistry()
    registry.delay = 2.0
    async with serving(network, registry), client_side(network) as side:
        side.say(REGISTER)
        await asyncio.sleep(3)
        side.say(Register(changed, KEY, SERVICE))
        await asyncio.sleep(1.5)
        assert side.got == []
        await asyncio.sleep(2)
        assert side.got == [Registered(changed, KEY, REGISTRY.public_key, verified=True)]


# Sequences


@virtual
async def test_a_clock_that_jumps_back_does_not_lower_the_sequence() -> None:
    network = MemoryNetwork()
    async with serving(network, FakeRegistry()) as registry, client_side(network, REGISTER) as side:
        await asyncio.sleep(60)
        before = leases(registry)[-1]
        side.clock.ahead = -300
        await asyncio.sleep(60)
        after = leases(registry)[-1]
        assert after.issued < before.issued
        assert after.sequence > before.sequence
        assert side.got == [REGISTERED]


@virtual
async def test_a_restart_with_the_clock_set_back_goes_above_what_the_registry_has_seen() -> None:
    network = MemoryNetwork()
    async with serving(network, FakeRegistry()) as registry, client_side(network, REGISTER) as side:
        await asyncio.sleep(60)
        side.clock.ahead = -300
        side.runtime.kill("/client/link")
        await asyncio.sleep(5)
        assert side.got == [REGISTERED] * 2
        refused, accepted = leases(registry)[-2:]
        assert refused.sequence < registry.sequences[KEY] == accepted.sequence


@virtual
async def test_goes_above_a_sequence_once() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()

    def unkind(method: Any, params: Any) -> Any:
        if method != "lease":
            return None
        last = Verifier().verify(params["statement"], params["signature"]).sequence + 10
        return ValueError(f"stale sequence, the last was {last}")

    registry.script = unkind
    async with serving(network, registry), client_side(network, REGISTER) as side:
        await asyncio.sleep(29)
        first, second = leases(registry)
        assert second.sequence == first.sequence + 11
        (refusal,) = side.got
        assert isinstance(refusal, RegistrationRefused)
        assert refusal.text == f"stale sequence, the last was {second.sequence + 10}"
        assert refusal.registry_key == REGISTRY.public_key
        await asyncio.sleep(2)
        assert len(leases(registry)) == 4


@virtual
async def test_a_registry_cannot_push_the_sequence_to_its_end() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()
    registry.sequences[KEY] = 2**53 - 2
    async with serving(network, registry), client_side(network, REGISTER) as side:
        await asyncio.sleep(1)
        assert "stale sequence" in side.got[0].text
        assert len(leases(registry)) == 1
        side.say(Register(META, OTHER.public_key, OTHER))
        await asyncio.sleep(1)
        assert registry.leases[OTHER.public_key].sequence < 2**42


@virtual
async def test_a_withdrawal_goes_above_a_sequence_too() -> None:
    network = MemoryNetwork()
    async with serving(network, FakeRegistry()) as registry, client_side(network, REGISTER) as side:
        await asyncio.sleep(1)
        registry.sequences[KEY] += 100_000
        side.say(Unregister(META, KEY))
        await asyncio.sleep(1)
        assert registry.leases == {}


# Refusals


@virtual
async def test_a_refused_lease_says_why_and_is_tried_again() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()
    registry.script = lambda m, _p: ValueError("the registry is full") if m == "lease" else None
    async with serving(network, registry), client_side(network, REGISTER) as side:
        await asyncio.sleep(29)
        assert side.got == [
            RegistrationRefused(META, KEY, "the registry is full", REGISTRY.public_key)
        ]
        assert await states(side) == ["refused"]
        registry.script = lambda _m, _p: None
        await asyncio.sleep(2)
        assert side.got[1:] == [REGISTERED]
        # A renewal may be refused too.
        registry.script = lambda m, _p: ValueError("not you") if m == "lease" else None
        await asyncio.sleep(11)
        assert side.got[2:] == [RegistrationRefused(META, KEY, "not you", REGISTRY.public_key)]


@virtual
async def test_a_registry_with_another_time_says_so() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()
    registry.clock.ahead = 3600
    async with serving(network, registry), client_side(network, REGISTER) as side:
        await asyncio.sleep(1)
        assert "issued 3600 s ago" in side.got[0].text
        registry.clock.ahead = 0
        await asyncio.sleep(30)
        assert side.got[1:] == [REGISTERED]


@pytest.mark.parametrize(
    ("register", "why"),
    [
        (Register(META, KEY, OTHER), "the key pair is not the service's"),
        (Register(META, KEY, SERVICE, "no hexadecimal"), "instance"),
        (Register(META | {"more": "x" * 66_000}, KEY, SERVICE), "at most 65536 bytes"),
        (Register(META | {"more": {1, 2}}, KEY, SERVICE), "cannot be leased"),
        (Register(roles.parse("a@one"), KEY, SERVICE), "valid semver"),
    ],
)
@virtual
async def test_what_no_registry_would_take_is_refused_here(register: Any, why: Any) -> None:
    network = MemoryNetwork()
    async with serving(network, FakeRegistry()) as registry, client_side(network, register) as side:
        await asyncio.sleep(1)
        (refusal,) = side.got
        assert isinstance(refusal, RegistrationRefused)
        assert why in refusal.text
        assert leases(registry) == []
        side.say(Register(META, OTHER.public_key, OTHER))
        await asyncio.sleep(1)
        assert list(registry.leases) == [OTHER.public_key]
        side.say(Unregister(register.meta, KEY))
        await asyncio.sleep(100)
        assert len(side.got) == 2


@virtual
async def test_a_key_has_one_lease() -> None:
    network = MemoryNetwork()
    second = roles.parse("b@1.0.0")
    async with serving(network, FakeRegistry()) as registry, client_side(network, REGISTER) as side:
        await asyncio.sleep(1)
        side.say(Register(second, KEY, SERVICE))
        await asyncio.sleep(1)
        assert "registered as a@1.0.0" in side.got[-1].text
        assert registry.leases[KEY].meta == META
        # Once the first goes, the second follows at once.
        side.say(Unregister(META, KEY))
        await asyncio.sleep(0.1)
        assert side.got[-1] == Registered(second, KEY, REGISTRY.public_key, verified=True)
        assert registry.leases[KEY].meta == second


@virtual
async def test_limit(monkeypatch: Any) -> None:
    network = MemoryNetwork()
    monkeypatch.setattr(registrations, "MAX_REGISTRATIONS", 1)
    async with serving(network, FakeRegistry()), client_side(network, REGISTER) as side:
        side.say(Register(META, OTHER.public_key, OTHER))
        await asyncio.sleep(0.1)
        refused = side.of(RegistrationRefused)
        assert [each.text for each in refused] == ["one program registers at most 1 services"]
        side.say(Unregister(META, KEY))
        await asyncio.sleep(0.1)
        side.say(Register(META, OTHER.public_key, OTHER))
        await asyncio.sleep(0.1)
        assert side.got[-1] == Registered(META, OTHER.public_key, REGISTRY.public_key, True)


@virtual
async def test_two_registrations_of_one_key_that_come_and_go_end_as_one() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()
    registry.delay = 1.0
    second = Register(roles.parse("b@1.0.0"), KEY, SERVICE)
    async with serving(network, registry), client_side(network, REGISTER) as side:
        await asyncio.sleep(5)
        side.say(Unregister(META, KEY))
        side.say(second)
        side.say(REGISTER)
        await asyncio.sleep(40)
        told = [type(each).__name__ for each in side.got]
        assert told.count("RegistrationRefused") >= 1
        assert registry.leases[KEY].meta["role"] in ("a", "b")
        assert sorted(await states(side)) == ["leased", "refused"]
        side.say(Unregister(META, KEY))
        side.say(Unregister(second.meta, KEY))
        await asyncio.sleep(5)
        assert registry.leases == {}


# Without leases


@pytest.mark.parametrize("modern", [True, False])
@virtual
async def test_what_is_not_signed_is_registered_plainly(modern: Any) -> None:
    network = MemoryNetwork()
    register = Register(META, KEY, None if modern else SERVICE)
    async with (
        serving(network, FakeRegistry(modern=modern)) as registry,
        client_side(network, register) as side,
    ):
        await asyncio.sleep(100)
        assert registry.asked("register") == [{"meta": META, "servicePublicKey": KEY.hex()}]
        assert registry.asked("lease") == []
        assert side.got == [Registered(META, KEY, REGISTRY.public_key)]
        assert await states(side) == ["registered"]
        registry.break_sessions()
        await asyncio.sleep(1)
        assert side.got == [Registered(META, KEY, REGISTRY.public_key)] * 2
        side.say(Unregister(META, KEY))
        await asyncio.sleep(0.1)
        assert registry.asked("unregister") == [{"meta": META, "servicePublicKey": KEY.hex()}]


@virtual
async def test_two_entries_of_one_key_may_be_plain() -> None:
    network = MemoryNetwork()
    two = Register(roles.parse("b@1.0.0"), KEY, SERVICE)
    async with (
        serving(network, FakeRegistry(modern=False)) as registry,
        client_side(network, REGISTER, two) as side,
    ):
        await asyncio.sleep(1)
        assert len(registry.asked("register")) == len(side.of(Registered)) == 2
        asker = side.runtime.find("/client/asker")
        assert asker is not None
        side.runtime.stop(asker)
        await asyncio.sleep(0.001)
        assert len(registry.asked("unregister")) == 2


@virtual
async def test_a_registry_that_learns_to_lease_gets_leases() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry(modern=False)
    async with serving(network, registry), client_side(network, REGISTER) as side:
        await asyncio.sleep(10)
        registry.modern = True
        registry.break_sessions()
        await asyncio.sleep(1)
        assert side.got == [Registered(META, KEY, REGISTRY.public_key), REGISTERED]
        assert list(registry.leases) == [KEY]


@virtual
async def test_a_refused_entry_says_why_and_is_tried_again() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry(modern=False)
    registry.script = lambda method, _p: ValueError("full") if method == "register" else None
    async with serving(network, registry), client_side(network, REGISTER) as side:
        await asyncio.sleep(1)
        assert side.got == [RegistrationRefused(META, KEY, "full", REGISTRY.public_key)]
        registry.script = lambda _method, _params: None
        await asyncio.sleep(30)
        assert side.got[1:] == [Registered(META, KEY, REGISTRY.public_key)]


@virtual
async def test_descriptions_that_no_line_can_hold_are_refused_here(monkeypatch: Any) -> None:
    network = MemoryNetwork(delay=0.1)
    monkeypatch.setattr(rpc, "MAX_LINE", 4096)
    long = roles.parse({"role": "a", "version": "1.0.0", "more": "x" * 5000})
    keys = [n.to_bytes(32, "big") for n in range(500)]
    # They wait behind as many good ones as may be in flight, and then come one after the other.
    window = registrations.MAX_ASKED
    questions = [Register(META if n < window else long, key) for n, key in enumerate(keys)]
    async with (
        serving(network, FakeRegistry(modern=False)) as registry,
        client_side(network, *questions) as side,
    ):
        await soon(lambda: len(side.got) == 500)
        refused = side.of(RegistrationRefused)
        assert len(refused) == 500 - window
        assert all("at most 4096 bytes" in each.text for each in refused)
        assert len(registry.asked("register")) == window


@virtual
async def test_a_registry_that_does_not_answer_is_given_up() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry(modern=False)
    registry.script = lambda method, _params: NoAnswer if method == "register" else None
    async with serving(network, registry), client_side(network, REGISTER) as side:
        await asyncio.sleep(19.9)
        assert side.downs == []
        await asyncio.sleep(0.2)
        assert side.downs[-1].reason == "no answer to register in 20 s"
        registry.script = lambda _method, _params: None
        await asyncio.sleep(1)
        assert side.of(Registered)


@virtual
async def test_an_entry_of_somebody_else_is_not_ours() -> None:
    network = MemoryNetwork()
    registry = FakeRegistry()
    registry.leases[OTHER.public_key] = signed(OTHER, "a@1.0.0")
    async with serving(network, registry), client_side(network, REGISTER) as side:
        await asyncio.sleep(1)
        side.say(Unregister(META, OTHER.public_key))
        await asyncio.sleep(1)
        assert set(registry.leases) == {KEY, OTHER.public_key}
