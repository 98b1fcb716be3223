"""What passes between two legs, one by one and in runs."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperseaport.testing.network import datagrams
from hyperseaport.transport.errors import InvalidInput
from hyperseaport.transport.transmit import Address
from hyperseaport.transport.udx import packet as wire
from hyperseaport.transport.udx.forward import BURST, MIN_BURST, Allowance, Leg
from hyperseaport.transport.udx.mux import Mux
from hyperseaport.transport.udx.packet import HEADER_BYTES, Packet, decode, encode

ALICE: Address = ("10.0.0.1", 1111)
BOB: Address = ("10.0.0.2", 2222)
#: What each calls its own stream.
ALICES, BOBS = 0xA1A2A3A4, 0xB1B2B3B4
PLENTY = 1e9


class Pair:
    """Two legs of a mux: Alice on socket 0, Bob on socket 1."""

    def __init__(self, *, rate: float = PLENTY) -> None:
        self.mux = Mux(Random(1))
        self.alice = Leg(ALICES, 0, ALICE, Allowance(rate), 0.0)
        self.bob = Leg(BOBS, 1, BOB, Allowance(rate), 0.0)
        self.mux.forwarder.link(self.alice, self.bob)

    @property
    def stats(self) -> tuple[int, int, int, int]:
        stats = self.mux.forwarder.stats
        return stats.forwarded, stats.bytes, stats.dropped, stats.strangers

    def give(self, *traffic: bytes, source: Address = ALICE, socket: int = 0) -> list[bytes]:
        """Datagrams of one size as a run; those that are another protocol's."""
        run = memoryview(b"".join(traffic))
        return self.mux.receive_run(run, len(traffic[0]), socket, source, 0.0)

    def sent(self) -> list[tuple[int, Address, bytes]]:
        """What leaves: socket, address and datagram."""
        return [
            (transmit.socket, transmit.address, datagram)
            for transmit in self.mux.transmits(0.0)
            for datagram in datagrams(transmit)
        ]


def packet(identifier: int, seq: int, size: int = 100) -> bytes:
    payload = seq.to_bytes(4, "little") * (size // 4)
    return encode(Packet(wire.DATA, identifier, 5, seq, 6, payload[:size]))


def renamed(datagram: bytes, identifier: int) -> bytes:
    return datagram[:4] + identifier.to_bytes(4, "little") + datagram[8:]


def test_only_the_id_changes() -> None:
    pair = Pair()
    there = packet(pair.alice.id, 1)
    assert pair.mux.receive(there, 0, ALICE, 0.0)
    assert pair.sent() == [(1, BOB, renamed(there, BOBS))]
    back = encode(Packet(wire.ACK, pair.bob.id, 7, 8, 9, sacks=((10, 12),)))
    assert pair.mux.receive(back, 1, BOB, 0.0)
    assert pair.sent() == [(0, ALICE, renamed(back, ALICES))]
    assert pair.sent() == []
    assert pair.stats == (2, len(there) + len(back), 0, 0)
    assert (pair.alice.bytes, pair.bob.bytes) == (len(there), len(back))


@pytest.mark.parametrize("rest", [0, 1, HEADER_BYTES, 99])
def test_a_run_leaves_as_a_run(rest: int) -> None:
    pair = Pair()
    traffic = [packet(pair.alice.id, seq) for seq in range(10)]
    if rest:
        traffic.append(packet(pair.alice.id, 10)[:rest])
    others = pair.give(*traffic)
    transmits = pair.mux.transmits(0.0)
    assert [transmit.segment for transmit in transmits] == [120]
    assert [len(buffer) for buffer in transmits[0].buffers][:10] == [120] * 10
    passed = [each for each in traffic if len(each) >= HEADER_BYTES]
    assert datagrams(transmits[0]) == [renamed(each, BOBS) for each in passed]
    assert others == [each for each in traffic if len(each) < HEADER_BYTES]


def test_runs_are_what_one_call_takes() -> None:
    pair = Pair()
    sizes = []
    for size, count in ((0, 200), (1432, 130)):
        pair.give(*(packet(pair.alice.id, seq, size) for seq in range(count)))
        transmits = pair.mux.transmits(0.0)
        sizes.append([len(transmit.buffers) for transmit in transmits])
        seqs = [decode(each).seq for transmit in transmits for each in datagrams(transmit)]
        assert seqs == list(range(count))
    assert sizes == [[64, 64, 64, 8], [44, 44, 42]]


def test_a_run_of_several_streams() -> None:
    pair = Pair()
    mux = pair.mux
    carol, dave = (Leg(identifier, 0, ALICE, Allowance(PLENTY), 0.0) for identifier in (0xC1, 0xD1))
    mux.forwarder.link(carol, dave)
    own = mux.create()
    own.connect(0, 9, ALICE, 0.0)
    names = [pair.alice.id] * 3 + [carol.id] * 2 + [pair.alice.id, own.local_id, dave.id, 99]
    traffic = [packet(name, seq) for seq, name in enumerate(names)]
    traffic[6] = packet(own.local_id, 0)
    assert pair.give(*traffic) == [traffic[8]]
    there = {pair.alice.id: BOBS, carol.id: 0xD1, dave.id: 0xC1}
    left = [datagram for _, _, datagram in pair.sent() if decode(datagram).id != 9]
    for name, other in there.items():
        passed = [renamed(each, other) for each in traffic if decode(each).id == name]
        assert [each for each in left if decode(each).id == other] == passed
    assert own.readable == 100


def ack(identifier: int, seq: int) -> bytes:
    return encode(Packet(wire.ACK, identifier, 5, seq, 6))


def test_what_arrived_singly_leaves_as_a_run_and_acks_as_another() -> None:
    pair = Pair()
    sizes = [100, 100, 100, 40, 100, 100, 120, 100]
    data = [packet(pair.alice.id, seq, size) for seq, size in enumerate(sizes)]
    acks = [ack(pair.alice.id, seq) for seq in range(len(sizes))]
    for first, second in zip(data, acks, strict=True):
        pair.mux.receive(first, 0, ALICE, 0.0)
        pair.mux.receive(second, 0, ALICE, 0.0)
    runs = [datagrams(transmit) for transmit in pair.mux.transmits(0.0)]
    assert [len(run) for run in runs] == [4, 2, 2, 8]
    assert [each for run in runs[:-1] for each in run] == [renamed(each, BOBS) for each in data]
    assert runs[-1] == [renamed(each, BOBS) for each in acks]


def test_what_was_passed_on_leaves_even_when_the_pair_is_over() -> None:
    pair = Pair()
    pair.give(packet(pair.alice.id, 1))
    pair.mux.forwarder.unlink(pair.alice)
    assert len(pair.sent()) == 1


@given(st.integers(0, 2**32), st.integers(1, 130), st.integers(20, 60))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_a_run_is_passed_on_as_its_datagrams_would_be(seed: int, count: int, size: int) -> None:
    rng = Random(seed)
    runs, singles = Pair(), Pair()
    names = [runs.alice.id, runs.bob.id, 77]
    traffic: list[bytes] = []
    while len(traffic) < count:
        datagram = encode(Packet(wire.DATA, rng.choice(names), 5, len(traffic), 6))
        datagram += rng.randbytes(size - HEADER_BYTES)
        datagram = datagram if rng.random() < 0.9 else rng.randbytes(size)
        traffic += [datagram] * rng.randrange(1, 90)
    del traffic[count:]
    last = traffic.pop()[: rng.randrange(1, size + 1)]
    data = memoryview(b"".join([*traffic, last]))
    others = runs.mux.receive_run(data, size, 0, ALICE, 0.0)
    expected = [each for each in [*traffic, last] if not singles.mux.receive(each, 0, ALICE, 0.0)]
    assert others == expected
    assert runs.sent() == singles.sent()
    assert runs.stats == singles.stats


def test_strangers_are_not_passed_on() -> None:
    pair = Pair()
    for source in (("10.0.0.9", 1111), ("10.0.0.2", 2222), ("10.0.0.1", 0)):
        pair.give(*[packet(pair.alice.id, 1)] * 3, source=source)
    assert pair.sent() == []
    assert pair.stats == (0, 0, 0, 9)
    assert (pair.alice.address, pair.alice.heard_at) == (ALICE, 0.0)


def test_follows_its_peer_to_another_port_and_socket() -> None:
    pair = Pair()
    moved = ("10.0.0.1", 4444)
    pair.give(packet(pair.alice.id, 1), source=moved, socket=5)
    pair.give(packet(pair.bob.id, 1), source=BOB, socket=1)
    assert [(socket, address) for socket, address, _ in pair.sent()] == [(1, BOB), (5, moved)]


def test_heard_at() -> None:
    pair = Pair()
    pair.mux.receive(packet(pair.alice.id, 1), 0, ALICE, 7.0)
    assert (pair.alice.heard_at, pair.bob.heard_at) == (7.0, 0.0)


def test_unlinked_legs_are_unknown() -> None:
    pair = Pair()
    pair.mux.forwarder.unlink(pair.bob)
    pair.mux.forwarder.unlink(pair.bob)
    for leg in (pair.alice, pair.bob):
        assert not pair.mux.receive(packet(leg.id, 1), 0, ALICE, 0.0)
    assert pair.sent() == []
    assert pair.mux.stats.unknown == 2


def test_ids_are_nobody_elses() -> None:
    pair = Pair()
    with pytest.raises(InvalidInput):
        pair.mux.create(local_id=pair.alice.id)
    taken = {pair.alice.id, pair.bob.id}

    class Stuttering(Random):
        def getrandbits(self, bits: int, /) -> int:
            return taken.pop() if taken else super().getrandbits(bits)

    pair.mux._rng = Stuttering(1)
    assert pair.mux.create().local_id not in {pair.alice.id, pair.bob.id}
    assert not taken


@pytest.mark.parametrize(("identifier", "port"), [(-1, 5), (2**32, 5), (1, 0), (1, 65536)])
def test_impossible_peers(identifier: int, port: int) -> None:
    with pytest.raises(InvalidInput):
        Leg(identifier, 0, ("10.0.0.1", port), Allowance(PLENTY), 0.0)


def test_what_exceeds_the_allowance_is_dropped() -> None:
    rate = 8.0 * MIN_BURST
    pair = Pair(rate=rate)
    burst = int(rate * BURST)
    traffic = [packet(pair.alice.id, seq, 1004) for seq in range(burst // 1024 + 10)]
    for start in range(0, len(traffic), 50):
        pair.give(*traffic[start : start + 50])
    left = pair.sent()
    assert len(left) == burst // 1024
    assert pair.stats == (len(left), burst, 10, 0)
    assert pair.alice.dropped == 10
    pair.give(packet(pair.bob.id, 1), source=BOB, socket=1)
    assert len(pair.sent()) == 1


def test_an_allowance_grows_with_time() -> None:
    allowance = Allowance(4.0 * MIN_BURST)
    assert allowance.is_full(0.0)
    assert allowance.take(3 * MIN_BURST, 1, 0.0) == MIN_BURST
    assert allowance.take(1, 1, 0.0) == 0
    assert allowance.take(MIN_BURST, 100, 0.125) == MIN_BURST // 2 // 100 * 100
    assert not allowance.is_full(0.3)
    assert allowance.is_full(0.5)
    assert allowance.take(10 * MIN_BURST, 1, 1000.0) == MIN_BURST


def test_an_allowance_of_a_slow_rate_gives_a_burst_all_the_same() -> None:
    allowance = Allowance(1000.0)
    assert allowance.take(2 * MIN_BURST, 1, 0.0) == MIN_BURST
    assert allowance.take(2000, 1, 1.0) == 1000
