from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.dht_fakes import FakeNode, FakeQuery, reply

from hyperseaport.transport import keys
from hyperseaport.transport.dht import messages
from hyperseaport.transport.dht.addresses import node_id
from hyperseaport.transport.dht.messages import (
    Announce,
    MutablePut,
    MutableValue,
    PeerRecord,
    announce_signable,
    encode_lookup_reply,
)
from hyperseaport.transport.dht.records import MAX_VALUE_BYTES, Found, Records, Stored
from hyperseaport.transport.dht.wire import Reply
from hyperseaport.transport.encoding import encode_uint
from hyperseaport.transport.errors import InvalidInput
from hyperseaport.transport.keys import KeyPair

KEYS = KeyPair.from_seed(bytes([1]) * 32)
OTHER = KeyPair.from_seed(bytes([2]) * 32)
TOPIC = bytes([9]) * 32
A, B, C = (("5.0.0.1", 1), ("5.0.0.2", 2), ("5.0.0.3", 3))


class Fixture:
    def __init__(self) -> None:
        self.node = FakeNode()
        fake: Any = self.node
        self.records = Records(fake)
        self.results: list[Any] = []

    def collect(self, *result: Any) -> None:
        """An ``on_done``; the time is left out."""
        self.results.append(result[:-1])

    @property
    def query(self) -> FakeQuery:
        return self.node.queries[-1]

    def found(self, *replies: Reply) -> None:
        for each in replies:
            if not self.query.cancelled:
                self.query.options["on_reply"](each, 0.0)

    def finish(self) -> None:
        self.node.finish(self.query)

    def commit(self, *replies: Reply) -> list[Reply | None]:
        """Commit to these; returns what the query is told, filled as answers come."""
        told: list[Reply | None] = []
        for each in replies:
            self.query.options["commit"](each, lambda answer, _now: told.append(answer), 0.0)
        return told


def lookup_reply(*pairs: KeyPair, bump: int = 0) -> bytes:
    return encode_lookup_reply([PeerRecord(pair.public_key).encode() for pair in pairs], bump)


def test_lookup_joins_what_the_nodes_know() -> None:
    fixture = Fixture()
    fixture.records.lookup(TOPIC, 0.0, fixture.collect)
    assert (fixture.query.target, fixture.query.command) == (TOPIC, messages.LOOKUP)
    first = PeerRecord(KEYS.public_key, (A, B)).encode()
    second = PeerRecord(KEYS.public_key, (B, C)).encode()
    fixture.found(
        reply(A, encode_lookup_reply([first], 5)),
        reply(B, encode_lookup_reply([second, PeerRecord(OTHER.public_key).encode()], 3)),
        reply(C),
        reply(C, b"\xff\xff"),
    )
    fixture.finish()
    peers = (PeerRecord(KEYS.public_key, (A, B, C)), PeerRecord(OTHER.public_key))
    assert fixture.results == [(Found(peers, 5),)]


def test_announce_signs_for_each_node() -> None:
    fixture = Fixture()
    fixture.records.announce(
        TOPIC, KEYS, 0.0, fixture.collect, relay_addresses=(A, B, C, A), bump=7
    )
    assert fixture.query.command == messages.LOOKUP
    told = fixture.commit(reply(A), reply(B), reply(C, token=None))
    assert told == [None]
    first, second = fixture.node.asked(messages.ANNOUNCE)
    for request in (first, second):
        announce = Announce.decode(request.options["value"])
        peer = PeerRecord(KEYS.public_key, (A, B, C))
        signable = announce_signable(
            keys.NS_ANNOUNCE, TOPIC, node_id(request.to), request.options["token"], peer.encode()
        )
        assert (announce.peer, announce.bump, announce.refresh) == (peer, 7, None)
        assert keys.verify(announce.signature or b"", signable, KEYS.public_key)
    fixture.node.answer(first, reply(A))
    fixture.node.answer(second, None)
    assert len(told) == 3
    fixture.finish()
    assert fixture.results == [(Stored(1),)]


def test_unannounce_at_those_who_know_or_may_know() -> None:
    """8: who lists the key, or so many that it may be among the rest."""
    fixture = Fixture()
    fixture.records.unannounce(TOPIC, KEYS, 0.0, fixture.collect)
    full = [KeyPair.from_seed(bytes([n]) * 32) for n in range(40, 60)]
    fixture.found(
        reply(A, lookup_reply(KEYS, OTHER)),
        reply(B, lookup_reply(*full)),
        reply(C, lookup_reply(OTHER)),
        reply(C),
        reply(C, lookup_reply(KEYS), token=None),
    )
    requests = fixture.node.asked(messages.UNANNOUNCE)
    assert [request.to for request in requests] == [A, B]
    announce = Announce.decode(requests[0].options["value"])
    signable = announce_signable(
        keys.NS_UNANNOUNCE,
        TOPIC,
        node_id(A),
        requests[0].options["token"],
        PeerRecord(KEYS.public_key).encode(),
    )
    assert keys.verify(announce.signature or b"", signable, KEYS.public_key)
    fixture.finish()
    fixture.node.answer(requests[0], reply(A))
    assert not fixture.results
    fixture.node.answer(requests[1], None)
    assert len(fixture.results) == 1


def test_immutable_put() -> None:
    fixture = Fixture()
    fixture.records.immutable_put(b"value", 0.0, fixture.collect)
    target = keys.blake2b(b"value")
    assert (fixture.query.target, fixture.query.command) == (target, messages.IMMUTABLE_GET)
    fixture.commit(reply(A))
    (put,) = fixture.node.asked(messages.IMMUTABLE_PUT)
    assert (put.options["value"], put.options["target"]) == (b"value", target)
    fixture.node.answer(put, reply(A))
    fixture.finish()
    assert fixture.results == [(target, Stored(1))]


def test_immutable_get_believes_only_the_hash() -> None:
    fixture = Fixture()
    target = keys.blake2b(b"value")
    fixture.records.immutable_get(target, 0.0, fixture.collect)
    fixture.found(reply(A), reply(A, b"lie"))
    assert not fixture.results
    fixture.found(reply(B, b"value"), reply(C, b"value"))
    assert fixture.results == [(b"value",)]
    assert fixture.query.cancelled


def test_immutable_get_of_nothing() -> None:
    fixture = Fixture()
    fixture.records.immutable_get(TOPIC, 0.0, fixture.collect)
    fixture.found(reply(A))
    fixture.finish()
    assert fixture.results == [(None,)]


def test_mutable_put_counts_refusals() -> None:
    fixture = Fixture()
    fixture.records.mutable_put(KEYS, b"value", 0.0, fixture.collect, seq=4)
    assert fixture.query.command == messages.MUTABLE_GET
    assert fixture.query.options["value"] == encode_uint(0)
    fixture.commit(reply(A), reply(B), reply(C))
    puts = fixture.node.asked(messages.MUTABLE_PUT)
    mutable = MutableValue.signed(KEYS, 4, b"value")
    assert MutablePut.decode(puts[0].options["value"]) == MutablePut(KEYS.public_key, mutable)
    errors = (0, messages.SEQ_REUSED, messages.SEQ_TOO_LOW)
    for put, error in zip(puts, errors, strict=True):
        fixture.node.answer(put, reply(put.to, error=error))
    fixture.finish()
    assert fixture.results == [(Stored(1, refused=2),)]


def signed(seq: int, pair: KeyPair = KEYS) -> bytes:
    return MutableValue.signed(pair, seq, b"%d" % seq).encode()


def test_mutable_get_takes_the_newest_genuine_value() -> None:
    fixture = Fixture()
    fixture.records.mutable_get(KEYS.public_key, 0.0, fixture.collect, seq=2)
    assert fixture.query.options["value"] == encode_uint(2)
    fixture.found(
        reply(A),
        reply(A, signed(1)),
        reply(A, signed(3)),
        reply(B, signed(9, OTHER)),
        reply(B, b"\x01"),
        reply(C, signed(5)),
        reply(C, signed(4)),
    )
    fixture.finish()
    assert fixture.results == [(MutableValue.signed(KEYS, 5, b"5"),)]


def test_mutable_get_may_take_the_first() -> None:
    fixture = Fixture()
    fixture.records.mutable_get(KEYS.public_key, 0.0, fixture.collect, latest=False)
    fixture.found(reply(B, signed(9, OTHER)), reply(A, signed(1)), reply(B, signed(2)))
    assert fixture.results == [(MutableValue.signed(KEYS, 1, b"1"),)]
    assert fixture.query.cancelled


@pytest.mark.parametrize(
    "call",
    [
        lambda records: records.immutable_put(bytes(MAX_VALUE_BYTES + 1), 0.0, print),
        lambda records: records.mutable_put(KEYS, bytes(MAX_VALUE_BYTES + 1), 0.0, print),
        lambda records: records.lookup(b"topic", 0.0, print),
        lambda records: records.immutable_get(bytes(31), 0.0, print),
    ],
    ids=["immutable", "mutable", "topic", "hash"],
)
def test_what_can_never_work(call: Callable[[Records], object]) -> None:
    fixture = Fixture()
    with pytest.raises(InvalidInput):
        call(fixture.records)
    assert not fixture.node.queries
