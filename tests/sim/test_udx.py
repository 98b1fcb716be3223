"""Two end points on the virtual clock, and a network that does what networks do."""

from __future__ import annotations

import hashlib
from random import Random

import pytest

from hyperseaport.testing.network import Host, Link, Network
from hyperseaport.transport.errors import StreamReset, StreamTimeout
from hyperseaport.transport.transmit import Address, Transmit
from hyperseaport.transport.udx.mux import Mux
from hyperseaport.transport.udx.receive import RECEIVE_WINDOW
from hyperseaport.transport.udx.stream import Stream
from hyperseaport.transport.udx.window import MAX_RECEIVE_WINDOW

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
        #: Bytes written ahead of what is acknowledged.
        self.limit = 256 * 1024
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
        self.most_held = max(self.most_held, receiver.held)
        if self.reading:
            for chunk in stream.read():
                self.received.update(chunk)
                self.count += len(chunk)
                stream.credit(len(chunk), now)
        while not stream.closed and self.data and stream.unsent + stream.unacked < self.limit:
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


def goodput(link: Link, size: int) -> tuple[float, Pair]:
    """Bytes a second of one transfer of ``size`` bytes, hashed; and its ends."""
    pair, data = Pair(link), Random(1).randbytes(size)
    pair.a.limit = 2 * MIB
    # The secret stream's header, whose ACK tells the receiver how long the path is.
    pair.b.say(bytes(56), end=False)
    pair.a.say(data, end=True)
    assert pair.network.run(until=120.0, done=lambda: pair.b.stream.remote_ended)
    assert pair.b.received.digest() == hashlib.sha256(data).digest()
    assert pair.a.most_queued <= pair.a.limit + 10_000
    return size / pair.network.now, pair


def test_random_loss_does_not_make_a_path_slow() -> None:
    """A window that is cut by each loss would be at about 0.4 MB/s at 2 %."""
    for loss, least in ((0.0, 5e6), (0.02, 3.5e6), (0.05, 2e6)):
        rate, _ = goodput(Link(delay=0.01, loss=loss, bandwidth=20e6, queue=400_000), 4 * MIB)
        assert rate > least, (loss, rate)


@pytest.mark.parametrize("queue", [12_000, 50_000, 1_000_000])
def test_a_slow_link_is_filled_and_its_queue_is_not_kept_full(queue: int) -> None:
    rate, pair = goodput(Link(delay=0.01, bandwidth=1.25e6, queue=queue), 3 * MIB)
    assert rate > 0.8 * 1.25e6
    stats = pair.a.mux.stats
    assert stats.retransmissions < 0.15 * stats.sent
    assert stats.timeouts == 0
    sender = pair.a.stream._sender
    assert sender.congestion.window * 1500 < 100_000, "not what a large queue would take"


def test_two_streams_share_a_slow_link() -> None:
    link = Link(delay=0.01, bandwidth=1.25e6, queue=50_000)
    network = Network(Random(1), link)
    left, right = Mux(Random(1)), Mux(Random(2))
    hosts = [network.attach(left, {0: ADDRESSES[0]}), network.attach(right, {0: ADDRESSES[1]})]  # type: ignore[arg-type]
    pairs = [(left.create(), right.create()) for _ in range(2)]
    for a, b in pairs:
        a.connect(0, b.local_id, ADDRESSES[1], 0.0)
        b.connect(0, a.local_id, ADDRESSES[0], 0.0)
        a.write(bytes(20 * MIB), 0.0)
    got = [0, 0]
    while network.now < 12.0:
        network.run(until=network.now + 0.01)
        for index, (_, b) in enumerate(pairs):
            for chunk in b.read():
                got[index] += len(chunk)
                b.credit(len(chunk), network.now)
        network.poke(hosts[1])
    assert sum(got) > 0.75 * 12.0 * 1.25e6
    assert min(got) > sum(got) / 3


@pytest.mark.parametrize(
    "link",
    [
        Link(delay=0.01, loss=0.1),
        Link(delay=0.01, jitter=0.03),
        Link(delay=0.01, duplicate=0.3, loss=0.02),
    ],
    ids=["loss", "reordering", "duplication"],
)
def test_bad_networks_deliver_everything_and_cost_bounded_memory(link: Link) -> None:
    pair = both_ways(link, MIB)
    for end in (pair.a, pair.b):
        assert end.most_held <= MAX_RECEIVE_WINDOW
        assert end.most_queued <= end.limit + 10_000
        assert end.mux.stats.timeouts <= 3


def test_a_black_hole_of_five_seconds() -> None:
    pair, data = Pair(Link(delay=0.01)), Random(1).randbytes(4 * MIB)
    pair.a.say(data, end=True)
    pair.b.say(b"", end=True)
    pair.network.run(until=0.1)
    pair.network.link.loss = 1.0
    pair.network.run(until=5.1)
    pair.network.link.loss = 0.0
    assert pair.network.run(until=20.0, done=pair.closed)
    assert pair.network.now < 10.0
    assert pair.b.received.digest() == hashlib.sha256(data).digest()


def test_the_window_grows_with_the_path_and_shrinks_for_a_slow_reader() -> None:
    _, pair = goodput(Link(delay=0.0005), 4 * MIB)
    assert pair.b.stream._receiver.offer.capacity == RECEIVE_WINDOW, "a short path needs no more"
    _, pair = goodput(Link(delay=0.02), 8 * MIB)
    receiver = pair.b.stream._receiver
    assert receiver.offer.capacity > 2 * RECEIVE_WINDOW
    pair = Pair(Link(delay=0.02, bandwidth=20e6))
    pair.a.limit = 2 * MIB
    pair.b.say(bytes(56), end=False)
    pair.a.say(bytes(16 * MIB), end=True)
    pair.network.run(until=0.5)
    receiver = pair.b.stream._receiver
    assert receiver.offer.capacity > 2 * RECEIVE_WINDOW
    edge = receiver.offer.edge
    pair.b.reading = False
    pair.network.run(until=5.0)
    assert receiver.offer.capacity == RECEIVE_WINDOW
    assert RECEIVE_WINDOW < receiver.held <= MAX_RECEIVE_WINDOW
    assert receiver.offer.edge >= edge
    pair.b.reading = True
    pair.b.poke()
    assert pair.network.run(until=30.0, done=lambda: pair.b.stream.remote_ended)
    assert pair.b.count == 16 * MIB


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
