"""Two end points on the virtual clock, and a network that does what networks do."""

from __future__ import annotations

import hashlib
from random import Random

import pytest

from hyperseaport.testing.network import Host, Link, Network
from hyperseaport.transport.errors import StreamReset, StreamTimeout
from hyperseaport.transport.transmit import Address, Transmit
from hyperseaport.transport.udx.mux import Mux
from hyperseaport.transport.udx.stream import Stream

MIB = 1024 * 1024
ADDRESSES: tuple[Address, Address] = (("10.0.0.1", 1), ("10.0.0.2", 2))


class End:
    """A mux with one stream, whose reader hashes and whose writer keeps a little ahead."""

    def __init__(self, pair: Pair, number: int, seed: int) -> None:
        self.mux = Mux(Random(seed))
        self.stream: Stream = self.mux.create()
        self.host: Host = pair.network.attach(self, {0: ADDRESSES[number]})
        self.pair = pair
        self.received = hashlib.sha256()
        self.count = 0
        #: Bytes still to be written, and whether to end then.
        self.data = memoryview(b"")
        self.ending = False
        self.reading = True
        #: Most bytes the stream ever held for its reader, and for its peer.
        self.most_held = 0
        self.most_queued = 0
        self.trace: list[tuple[float, bytes]] = []

    def receive(self, datagram: bytes, socket: int, source: Address, now: float) -> None:
        assert self.mux.receive(datagram, socket, source, now)

    def transmits(self, now: float) -> list[Transmit]:
        self.serve(now)
        transmits = self.mux.transmits(now)
        self.trace += [(now, b"".join(each.buffers)[:20]) for each in transmits]
        return transmits

    def deadline(self) -> float | None:
        return self.mux.deadline()

    def on_deadline(self, now: float) -> None:
        self.mux.on_deadline(now)

    def serve(self, now: float) -> None:
        stream = self.stream
        for changed in self.mux.poll():
            assert changed is stream
        receiver = stream._receiver
        self.most_held = max(self.most_held, receiver.capacity - receiver.window)
        if self.reading:
            for chunk in stream.read():
                self.received.update(chunk)
                self.count += len(chunk)
                stream.credit(len(chunk), now)
        while not stream.closed and self.data and stream.unsent + stream.unacked < 256 * 1024:
            stream.write(self.data[:10_000], now)
            self.data = self.data[10_000:]
        self.most_queued = max(self.most_queued, stream.unsent + stream.unacked)
        if self.ending and not self.data and not stream.closed:
            stream.end(now)

    def say(self, data: bytes, *, end: bool) -> None:
        self.data = memoryview(data)
        self.ending = end
        self.poke()

    def poke(self) -> None:
        self.pair.network.poke(self.host)


class Pair:
    """Two ends, connected."""

    def __init__(self, link: Link, seed: int = 1) -> None:
        self.network = Network(Random(seed), link)
        self.a, self.b = End(self, 0, seed + 1), End(self, 1, seed + 2)
        self.a.stream.connect(0, self.b.stream.local_id, ADDRESSES[1], 0.0)
        self.b.stream.connect(0, self.a.stream.local_id, ADDRESSES[0], 0.0)

    def closed(self) -> bool:
        return self.a.stream.closed and self.b.stream.closed


def both_ways(link: Link, size: int, seed: int = 1) -> Pair:
    pair, rng = Pair(link, seed), Random(seed)
    data = rng.randbytes(size), rng.randbytes(size)
    pair.a.say(data[0], end=True)
    pair.b.say(data[1], end=True)
    assert pair.network.run(until=300.0, done=pair.closed)
    assert pair.a.stream.error is None
    assert pair.b.stream.error is None
    assert pair.b.received.digest() == hashlib.sha256(data[0]).digest()
    assert pair.a.received.digest() == hashlib.sha256(data[1]).digest()
    return pair


def test_a_good_network_needs_no_packet_twice() -> None:
    pair = both_ways(Link(delay=0.01), MIB)
    assert pair.a.mux.stats.retransmissions == 0
    assert pair.b.mux.stats.duplicates == 0
    assert pair.network.now < 1.0
    assert pair.a.stream._sender.mtu.mtu > 1200


def test_loss_reordering_and_duplication() -> None:
    for loss, limit in ((0.01, 5.0), (0.05, 20.0)):
        link = Link(delay=0.005, jitter=0.002, loss=loss, duplicate=0.02)
        pair = both_ways(link, MIB)
        assert pair.network.lost > 0
        assert pair.a.mux.stats.duplicates > 0
        assert pair.network.now < limit


def test_reordering_alone_costs_few_packets() -> None:
    pair = both_ways(Link(delay=0.01, jitter=0.005), MIB)
    assert pair.a.mux.stats.retransmissions < 0.05 * pair.a.mux.stats.sent


def test_a_larger_packet_than_the_path_takes_is_only_a_lost_probe() -> None:
    link = Link(delay=0.01, drop=lambda datagram, *_: len(datagram) + 28 > 1300)
    pair = both_ways(link, MIB)
    assert pair.a.stream._sender.mtu.mtu == 1296
    # Three attempts, and a tail-loss probe or two when one was the last packet in flight.
    assert 3 <= pair.a.mux.stats.retransmissions <= 5
    assert pair.a.mux.stats.timeouts == 0


def test_many_streams_share_the_muxes() -> None:
    network = Network(Random(1), Link(delay=0.005, loss=0.02))
    left, right = Mux(Random(1)), Mux(Random(2))
    hosts = [
        network.attach(left, {0: ADDRESSES[0]}),  # type: ignore[arg-type]
        network.attach(right, {0: ADDRESSES[1]}),  # type: ignore[arg-type]
    ]
    pairs = [(left.create(), right.create()) for _ in range(50)]
    for a, b in pairs:
        a.connect(0, b.local_id, ADDRESSES[1], 0.0)
        b.connect(0, a.local_id, ADDRESSES[0], 0.0)
        a.write(a.local_id.to_bytes(4, "big") * 3000, 0.0)
        a.end(0.0)
        b.end(0.0)
    for host in hosts:
        network.poke(host)
    assert network.run(until=60.0, done=lambda: len(left) + len(right) == 0)
    for a, b in pairs:
        assert b"".join(b.read()) == a.local_id.to_bytes(4, "big") * 3000
        assert a.error is b.error is None
    network.run(until=network.now + 30.0)
    assert left.deadline() is right.deadline() is None


def test_a_stalled_reader_stalls_the_writer() -> None:
    pair = Pair(Link(delay=0.005, loss=0.01))
    data = Random(1).randbytes(2 * MIB)
    pair.b.reading = False
    pair.a.say(data, end=True)
    pair.b.say(b"", end=True)
    pair.network.run(until=60.0)
    assert not pair.a.stream.closed, "a closed window is not a dead peer"
    assert pair.b.count == 0
    assert pair.b.most_held <= 256 * 1024 + 1452
    assert pair.a.most_queued <= 256 * 1024 + 10_000
    assert len(pair.a.data) > MIB
    at_rest = pair.network.delivered
    pair.network.run(until=120.0)
    assert pair.network.delivered - at_rest <= 70, "it is asked every 2 s"
    pair.b.reading = True
    pair.b.poke()
    resumed = pair.network.now
    assert pair.network.run(until=300.0, done=pair.closed)
    assert pair.network.now - resumed < 10.0
    assert pair.b.received.digest() == hashlib.sha256(data).digest()


def test_half_close() -> None:
    pair = Pair(Link(delay=0.005, loss=0.03), seed=3)
    pair.a.say(b"question", end=True)
    assert pair.network.run(until=30.0, done=lambda: pair.b.stream.remote_ended)
    assert pair.network.run(until=60.0, done=lambda: pair.a.stream.ended)
    assert not pair.a.stream.closed
    answer = Random(1).randbytes(300_000)
    pair.b.say(answer, end=True)
    assert pair.network.run(until=120.0, done=pair.closed)
    assert pair.a.received.digest() == hashlib.sha256(answer).digest()
    assert pair.a.stream.error is pair.b.stream.error is None


def test_a_lost_last_ack_is_given_again() -> None:
    pair = Pair(Link(delay=0.005))
    pair.a.say(b"", end=True)
    pair.network.run(until=1.0)
    # From now on a hears b, and b does not hear a until a is done.
    pair.network.link.drop = lambda _, source, __: source == ADDRESSES[0]
    pair.b.say(b"", end=True)
    pair.network.run(until=1.5)
    assert pair.a.stream.closed
    assert not pair.b.stream.closed
    pair.network.link.drop = None
    assert pair.network.run(until=4.0, done=pair.closed)
    assert pair.b.stream.ended


def test_a_black_hole_is_noticed_after_13_seconds() -> None:
    pair = Pair(Link(delay=0.005))
    pair.a.say(b"hello", end=False)
    pair.network.run(until=1.0)
    pair.network.link.loss = 1.0
    pair.a.say(bytes(100_000), end=False)
    assert pair.network.run(until=30.0, done=lambda: pair.a.stream.closed)
    assert isinstance(pair.a.stream.error, StreamTimeout)
    assert 13.0 <= pair.network.now - 1.0 < 13.5
    assert not pair.b.stream.closed, "nothing tells the other side"


def test_a_peer_that_comes_back_in_time() -> None:
    pair = Pair(Link(delay=0.005))
    pair.network.link.loss = 1.0
    pair.a.say(bytes(100_000), end=True)
    pair.b.say(b"", end=True)
    pair.network.run(until=10.0)
    pair.network.link.loss = 0.0
    assert pair.network.run(until=30.0, done=pair.closed)
    assert pair.b.count == 100_000


def test_destroy_resets_the_peer() -> None:
    pair = Pair(Link(delay=0.005))
    pair.a.say(bytes(MIB), end=True)
    pair.network.run(until=0.05)
    pair.a.stream.destroy(pair.network.now)
    pair.a.poke()
    pair.network.run(until=0.2)
    assert pair.a.stream.closed
    assert isinstance(pair.b.stream.error, StreamReset)
    pair.network.run(until=60.0)
    assert pair.a.mux.deadline() is pair.b.mux.deadline() is None


@pytest.mark.parametrize("seed", [1, 2])
def test_the_same_seed_gives_the_same_trace(seed: int) -> None:
    link = Link(delay=0.005, jitter=0.003, loss=0.05, duplicate=0.05)
    first, second = (both_ways(link, 100_000, seed) for _ in range(2))
    assert first.a.trace == second.a.trace
    assert first.b.trace == second.b.trace


def test_different_seeds_give_different_traces() -> None:
    link = Link(delay=0.005, jitter=0.003, loss=0.05)
    first, second = (both_ways(link, 100_000, seed) for seed in (1, 2))
    assert first.a.trace != second.a.trace
