from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import load

from hyperseaport.transport import keys
from hyperseaport.transport.dht import messages, store
from hyperseaport.transport.dht.messages import (
    Announce,
    LookupReply,
    MutablePut,
    MutableValue,
    PeerRecord,
    announce_signable,
)
from hyperseaport.transport.dht.store import Cache, Forward, Forwards, RecordSet, Store
from hyperseaport.transport.dht.wire import Request
from hyperseaport.transport.encoding import encode_uint
from hyperseaport.transport.keys import KeyPair
from hyperseaport.transport.transmit import Address

VECTORS = load("hyperdht")
KEYS = KeyPair.from_seed(bytes([1]) * 32)
OTHER = KeyPair.from_seed(bytes([2]) * 32)
TOPIC = bytes([9]) * 32
TOKEN = bytes([7]) * 32
SOURCE = ("5.0.0.9", 4000)
EPOCH = 1_700_000_000.0


class FakeNode:
    """Takes down what a store answers."""

    id = bytes([5]) * 32

    def __init__(self) -> None:
        self.replies: list[dict[str, Any]] = []

    def reply(self, request: Request, now: float, **options: Any) -> None:
        self.replies.append(options)


class Fixture:
    def __init__(self) -> None:
        self.node = FakeNode()
        self.forwards = Forwards()
        self.store = Store(self.node, self.forwards, Random(1), EPOCH)

    def ask(
        self,
        command: int,
        target: bytes | None,
        value: bytes | None = None,
        *,
        token: bytes | None = TOKEN,
        source: Address = SOURCE,
        now: float = 0.0,
    ) -> dict[str, Any] | None:
        """The answer; None if there is none."""
        self.node.replies.clear()
        request = Request(1, command, False, target, token, value, None, ("5.0.0.1", 1), source, 0)
        assert self.store.on_request(request, now)
        assert len(self.node.replies) <= 1
        return self.node.replies[0] if self.node.replies else None

    def announce(self, target: bytes, *, now: float = 0.0, **options: Any) -> Any:
        source = options.pop("source", SOURCE)
        value = announcement(target, **options)
        return self.ask(messages.ANNOUNCE, target, value, now=now, source=source)

    def unannounce(self, target: bytes, key_pair: KeyPair = KEYS) -> Any:
        value = announcement(target, key_pair=key_pair, namespace=keys.NS_UNANNOUNCE)
        return self.ask(messages.UNANNOUNCE, target, value)

    def find_peer(self, now: float = 0.0) -> bytes | None:
        reply = self.ask(messages.FIND_PEER, keys.target(KEYS.public_key), token=None, now=now)
        assert reply is not None
        value: bytes | None = reply["value"]
        return value

    def lookup(self, now: float = 0.0, topic: bytes = TOPIC) -> LookupReply | None:
        reply = self.ask(messages.LOOKUP, topic, token=None, now=now)
        assert reply is not None
        return None if reply["value"] is None else LookupReply.decode(reply["value"])


def announcement(
    target: bytes,
    *,
    key_pair: KeyPair = KEYS,
    relays: tuple[Address, ...] = (),
    refresh: bytes | None = None,
    bump: int = 0,
    node_id: bytes = FakeNode.id,
    token: bytes = TOKEN,
    signed_target: bytes | None = None,
    namespace: bytes = keys.NS_ANNOUNCE,
) -> bytes:
    peer = PeerRecord(key_pair.public_key, relays)
    signable = announce_signable(
        namespace, signed_target or target, node_id, token, peer.encode(), refresh or b""
    )
    return Announce(peer, refresh, key_pair.sign(signable), bump).encode()


OWN = keys.target(KEYS.public_key)


# Caches


def test_a_cache_keeps_an_entry_for_two_periods_at_most() -> None:
    cache: Cache[str, int] = Cache(100, 30.0, renew=False)
    cache.put("a", 1, 0.0)
    assert cache.get("a", 39.9) == 1
    assert cache.get("a", 40.0) is None
    assert len(cache) == 0


def test_reading_renews_an_old_entry() -> None:
    cache: Cache[str, int] = Cache(100, 30.0)
    cache.put("a", 1, 0.0)
    assert cache.get("a", 25.0) == 1
    assert cache.get("a", 45.0) == 1
    assert cache.get("a", 100.0) is None


def test_a_full_generation_becomes_old() -> None:
    cache: Cache[int, int] = Cache(3, 1000.0, renew=False)
    for key in range(7):
        cache.put(key, key, 0.0)
    assert [cache.get(key, 0.0) for key in range(7)] == [None, None, None, 3, 4, 5, 6]
    assert len(cache) == 4


def test_pop_takes_from_both_generations() -> None:
    cache: Cache[str, int] = Cache(100, 30.0, renew=False)
    cache.put("a", 1, 0.0)
    assert cache.pop("a", 25.0) == 1
    assert cache.pop("a", 25.0) is None


def test_a_fresh_record_is_not_overwritten_an_old_one_is() -> None:
    records = RecordSet(100, 30.0)
    records.add(TOPIC, b"k", b"one", 0.0)
    records.add(TOPIC, b"k", b"two", 1.0)
    assert records.sample(TOPIC, 5, Random(1), 1.0) == [b"one"]
    records.add(TOPIC, b"k", b"two", 25.0)
    assert records.sample(TOPIC, 5, Random(1), 25.0) == [b"two"]
    assert records.sample(TOPIC, 5, Random(1), 39.0) == [b"two"]
    assert records.sample(TOPIC, 5, Random(1), 60.0) == []


def test_records_are_bounded_in_all() -> None:
    records = RecordSet(3, 1000.0)
    for index in range(7):
        records.add(bytes([index]), b"k", bytes([index]), 0.0)
    kept = [bool(records.sample(bytes([i]), 1, Random(1), 0.0)) for i in range(7)]
    assert kept == [False, False, False, True, True, True, True]


def test_removed_records_free_their_place() -> None:
    records = RecordSet(3, 1000.0)
    for _ in range(10):
        records.add(TOPIC, b"k", b"v", 0.0)
        records.remove(TOPIC, b"k", 0.0)
    records.add(b"other", b"k", b"v", 0.0)
    records.remove(b"other", b"absent", 0.0)
    assert records.sample(b"other", 1, Random(1), 0.0) == [b"v"]


# Rules


def test_announce_to_the_own_key_makes_a_forward() -> None:
    fixture = Fixture()
    assert fixture.find_peer() is None
    assert fixture.announce(OWN) == {"token": False, "closer_nodes": False}
    assert fixture.find_peer() == PeerRecord(KEYS.public_key).encode()
    forward = fixture.forwards.get(OWN, 0.0)
    assert forward is not None
    assert forward.address == SOURCE
    found = fixture.lookup(topic=OWN)
    assert found == LookupReply((PeerRecord(KEYS.public_key),))
    assert fixture.unannounce(OWN) == {"token": False, "closer_nodes": False}
    assert fixture.find_peer() is None


def test_announce_to_a_topic_makes_a_record() -> None:
    fixture = Fixture()
    assert fixture.lookup() is None
    fixture.announce(TOPIC, relays=(("1.1.1.1", 1),))
    fixture.announce(TOPIC, key_pair=OTHER)
    found = fixture.lookup()
    assert found is not None
    assert set(found.peers) == {
        PeerRecord(KEYS.public_key, (("1.1.1.1", 1),)),
        PeerRecord(OTHER.public_key),
    }
    assert fixture.forwards.get(TOPIC, 0.0) is None
    fixture.unannounce(TOPIC)
    assert fixture.lookup() == LookupReply((PeerRecord(OTHER.public_key),))


@pytest.mark.parametrize(
    "wrong",
    [
        {"node_id": bytes(32)},
        {"token": bytes(32)},
        {"signed_target": bytes(32)},
        {"namespace": keys.NS_UNANNOUNCE},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_signature_over_something_else_is_dropped(wrong: dict[str, Any]) -> None:
    fixture = Fixture()
    assert fixture.announce(OWN, **wrong) is None
    assert fixture.find_peer() is None
    assert fixture.store.dropped == 1


def test_announce_needs_a_target_a_token_and_a_signature() -> None:
    fixture = Fixture()
    value = announcement(OWN)
    assert fixture.ask(messages.ANNOUNCE, None, value) is None
    assert fixture.ask(messages.ANNOUNCE, OWN, value, token=None) is None
    assert fixture.ask(messages.ANNOUNCE, OWN, None) is None
    unsigned = Announce(PeerRecord(KEYS.public_key)).encode()
    assert fixture.ask(messages.ANNOUNCE, OWN, unsigned) is None
    assert fixture.ask(messages.UNANNOUNCE, OWN, unsigned) is None
    assert fixture.store.dropped == 5


def test_relay_addresses_are_cut_to_three() -> None:
    fixture = Fixture()
    relays = tuple((f"1.1.1.{n}", n) for n in range(1, 6))
    fixture.announce(TOPIC, relays=relays)
    assert fixture.lookup() == LookupReply((PeerRecord(KEYS.public_key, relays[:3]),))


def test_lookup_returns_twenty_records_at_most() -> None:
    fixture = Fixture()
    pairs = [KeyPair.from_seed(bytes([9, n]) * 16) for n in range(25)]
    for pair in pairs:
        fixture.announce(TOPIC, key_pair=pair)
    seen = set()
    for _ in range(20):
        found = fixture.lookup()
        assert found is not None
        assert len(set(found.peers)) == 20
        seen |= {peer.public_key for peer in found.peers}
    assert seen == {pair.public_key for pair in pairs}


def test_bumps_only_grow_and_not_into_the_future() -> None:
    fixture = Fixture()
    now = int(EPOCH * 1000)

    def bump(value: int) -> int:
        fixture.announce(TOPIC, bump=value)
        found = fixture.lookup()
        assert found is not None
        return found.bump

    assert bump(now - 5) == now - 5
    assert bump(now - 9) == now - 5
    assert bump(now + 60_001) == now - 5
    assert bump(now + 60_000) == now + 60_000


def test_a_refresh_chain_renews_and_rotates() -> None:
    """Checklist 26."""
    chain = {name: bytes.fromhex(VECTORS["refreshChain"][name]) for name in ("h0", "h1", "h2")}
    fixture = Fixture()
    fixture.announce(OWN, refresh=chain["h0"])
    fixture.announce(TOPIC, refresh=bytes(32))
    later = 15 * 60.0
    elsewhere = ("5.0.0.77", 7)

    def refresh(link: bytes, now: float) -> Any:
        value = Announce(refresh=link).encode()
        return fixture.ask(messages.ANNOUNCE, OWN, value, source=elsewhere, now=now)

    assert refresh(chain["h2"], later) is None
    assert refresh(chain["h1"], later) == {"token": False, "closer_nodes": False}
    assert refresh(chain["h1"], later) is None
    assert fixture.find_peer(now=later * 1.9) is not None
    forward = fixture.forwards.get(OWN, later * 1.9)
    assert forward is not None
    assert forward.address == elsewhere
    assert refresh(chain["h2"], later * 1.9) is not None


def test_looking_up_keeps_no_dead_server_alive() -> None:
    fixture = Fixture()
    fixture.announce(OWN)
    minutes = [minute for minute in range(60) if fixture.find_peer(now=minute * 60.0)]
    assert minutes[-1] < 27


def test_an_own_server_is_not_overwritten() -> None:
    fixture = Fixture()
    fixture.forwards.serve(OWN, lambda: b"own record")
    fixture.announce(OWN)
    assert fixture.find_peer(now=10_000.0) == b"own record"
    assert fixture.forwards.get(OWN, 0.0) is None
    fixture.forwards.unserve(OWN)
    assert fixture.find_peer() is None


def test_immutable_values() -> None:
    vector = VECTORS["immutable"]
    value, target = bytes.fromhex(vector["value"]), bytes.fromhex(vector["target"])
    fixture = Fixture()
    assert fixture.ask(messages.IMMUTABLE_PUT, bytes(32), value) is None
    assert fixture.ask(messages.IMMUTABLE_PUT, target, value, token=None) is None
    assert fixture.ask(messages.IMMUTABLE_GET, target) == {"value": None}
    assert fixture.ask(messages.IMMUTABLE_PUT, target, value) == {}
    assert fixture.ask(messages.IMMUTABLE_GET, target, token=None) == {"value": value}
    huge = bytes(store.MAX_VALUE_BYTES + 1)
    assert fixture.ask(messages.IMMUTABLE_PUT, keys.blake2b(huge), huge) is None


def test_mutable_values() -> None:
    target = bytes.fromhex(VECTORS["mutableTarget"]["target"])
    assert target == OWN
    fixture = Fixture()

    def put(seq: int, value: bytes, **options: Any) -> Any:
        signed = MutableValue.signed(options.pop("key_pair", KEYS), seq, value)
        encoded = MutablePut(options.pop("public_key", KEYS.public_key), signed).encode()
        return fixture.ask(messages.MUTABLE_PUT, target, encoded, **options)

    def value_of(seq: int) -> bytes | None:
        reply = fixture.ask(messages.MUTABLE_GET, target, encode_uint(seq))
        assert reply is not None
        return None if reply["value"] is None else MutableValue.decode(reply["value"]).value

    assert fixture.ask(messages.MUTABLE_GET, target) is None
    assert put(5, b"five", token=None) is None
    assert put(5, b"five", key_pair=OTHER) is None
    assert put(5, b"five", key_pair=OTHER, public_key=OTHER.public_key) is None
    assert value_of(0) is None
    assert put(5, b"five") == {"error": 0, "token": True}
    assert put(5, b"five") == {"error": 0, "token": True}
    assert put(5, b"other") == {"error": messages.SEQ_REUSED, "token": False}
    assert put(4, b"four") == {"error": messages.SEQ_TOO_LOW, "token": False}
    assert value_of(5) == b"five"
    assert value_of(6) is None
    assert put(6, b"six") == {"error": 0, "token": True}
    assert value_of(0) == b"six"


def test_other_commands_are_not_a_stores() -> None:
    fixture = Fixture()
    for command in (messages.PEER_HANDSHAKE, messages.PLUGIN, 99):
        request = Request(1, command, False, OWN, None, None, None, SOURCE, SOURCE, 0)
        assert not fixture.store.on_request(request, 0.0)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.integers(2, 9), st.none() | st.binary(max_size=200), st.booleans())
def test_arbitrary_values_are_survived(command: int, value: bytes | None, targeted: bool) -> None:
    fixture = Fixture()
    fixture.ask(command, TOPIC if targeted else None, value)
    assert fixture.forwards.get(TOPIC, 0.0) is None


def test_forwards_hold_what_they_are_given() -> None:
    forwards = Forwards()
    forwards.put(OWN, Forward(b"r", SOURCE), 0.0)
    assert forwards.get(OWN, 1.0) == Forward(b"r", SOURCE)
    forwards.remove(OWN, 1.0)
    assert forwards.record(OWN, 1.0) is None
