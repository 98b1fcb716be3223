"""Streams through a relay of ours, on a network that loses and reorders, among those who wish the
relay ill."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from random import Random

import pytest

from hyperseaport.testing.network import Host, Link, Network
from hyperseaport.transport.dht.blind_relay import Pair
from hyperseaport.transport.dht.relay_server import (
    LOOK,
    SILENCE,
    RelayLimits,
    RelayServer,
    RelaySession,
)
from hyperseaport.transport.errors import StreamTimeout
from hyperseaport.transport.transmit import Address, Transmit
from hyperseaport.transport.udx import packet as wire
from hyperseaport.transport.udx.forward import BURST
from hyperseaport.transport.udx.mux import Mux
from hyperseaport.transport.udx.packet import Packet, encode

MIB = 1024 * 1024
RELAY: Address = ("10.0.0.9", 9)
TOKEN = bytes(range(32))


class Relay:
    """A mux and the books of the relay. Requests are made by calling it."""

    def __init__(self, network: Network, limits: RelayLimits) -> None:
        self.mux = Mux(Random(9))
        self.server = RelayServer(self.mux.forwarder, limits)
        self.host = network.attach(self, {0: RELAY})

    def receive(self, datagram: bytes, socket: int, source: Address, now: float) -> None:
        self.mux.receive(datagram, socket, source, now)

    def transmits(self, now: float) -> list[Transmit]:
        return self.mux.transmits(now)

    def deadline(self) -> float | None:
        times = (self.mux.deadline(), self.server.deadline())
        return min((time for time in times if time is not None), default=None)

    def on_deadline(self, now: float) -> None:
        self.mux.on_deadline(now)
        self.server.on_deadline(now)


class Peer:
    """One end of a stream, which writes all it has and reads all that comes. Its control session is
    taken for granted."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.address: Address = (f"10.0.0.{number}", 1000 + number)
        self.mux = Mux(Random(number))
        self.stream = self.mux.create()
        self.host: Host = world.network.attach(self, {0: self.address})
        self.session: RelaySession | None = None
        self.data = memoryview(b"")
        self.ending = False
        self.received = hashlib.sha256()
        self.count = 0

    def receive(self, datagram: bytes, socket: int, source: Address, now: float) -> None:
        self.mux.receive(datagram, socket, source, now)

    def transmits(self, now: float) -> list[Transmit]:
        stream = self.stream
        self.mux.poll()
        for chunk in stream.read():
            self.received.update(chunk)
            self.count += len(chunk)
            stream.credit(len(chunk), now)
        while not stream.closed and self.data and stream.unsent < 65_536:
            stream.write(self.data[:10_000], now)
            self.data = self.data[10_000:]
        if self.ending and not self.data and not stream.closed:
            stream.end(now)
        return self.mux.transmits(now)

    def deadline(self) -> float | None:
        return self.mux.deadline()

    def on_deadline(self, now: float) -> None:
        self.mux.on_deadline(now)

    def say(self, data: bytes, *, end: bool = True) -> None:
        self.data = memoryview(data)
        self.ending = end
        self.world.network.poke(self.host)

    def ask(self, flag: bool, token: bytes = TOKEN) -> list[tuple[RelaySession, Pair]]:
        server, now = self.world.relay.server, self.world.network.now
        if self.session is None:
            self.session = server.open(bytes((self.address[1] % 256,)) * 32, self.address[0], now)
        assert self.session is not None
        request = Pair(flag, token, self.stream.local_id)
        return server.receive(self.session, request, 0, self.address, now)

    def close(self) -> None:
        assert self.session is not None
        self.world.relay.server.close(self.session, self.world.network.now)
        self.world.network.poke(self.world.relay.host)

    def vanish(self) -> None:
        self.world.network.detach(self.host)


class World:
    def __init__(
        self, link: Link | None = None, limits: RelayLimits | None = None, seed: int = 1
    ) -> None:
        self.network = Network(Random(seed), link or Link(delay=0.01))
        self.relay = Relay(self.network, limits or RelayLimits(rate=1e9))
        self.numbers = iter(range(1, 9))

    def pair(self, token: bytes = TOKEN) -> tuple[Peer, Peer]:
        """Two peers whose streams run through the relay, and how each says so."""
        peers = Peer(self, next(self.numbers)), Peer(self, next(self.numbers))
        assert peers[0].ask(True, token) == []
        answers = peers[1].ask(False, token)
        for peer, (session, answer) in zip(peers, answers, strict=True):
            assert session is peer.session
            peer.stream.connect(0, answer.id, RELAY, self.network.now)
        return peers

    def run(self, seconds: float, peers: Sequence[Peer] = ()) -> bool:
        def done() -> bool:
            return bool(peers) and all(peer.stream.closed for peer in peers)

        return self.network.run(until=self.network.now + seconds, done=done)

    @property
    def legs(self) -> list[int]:
        return list(self.relay.mux.forwarder.legs)


def talk(world: World, peers: tuple[Peer, Peer], size: int = MIB) -> None:
    """Both send, and both get all of it."""
    data = [Random(number).randbytes(size) for number in (1, 2)]
    for peer, each in zip(peers, data, strict=True):
        peer.say(each)
    assert world.run(300, peers)
    for peer, each in zip(reversed(peers), data, strict=True):
        assert peer.stream.error is None
        assert peer.received.digest() == hashlib.sha256(each).digest()


@pytest.mark.parametrize("loss", [0.0, 0.02, 0.1])
def test_a_mebibyte_each_way(loss: float) -> None:
    world = World(Link(delay=0.01, jitter=0.002, loss=loss, duplicate=loss / 2))
    peers = world.pair()
    talk(world, peers)
    for peer in peers:
        peer.close()
    assert world.legs == []
    assert world.relay.server.pairs == 0


def test_what_is_said_first_is_not_lost() -> None:
    world = World(Link(delay=0.05))
    early, late = world.pair()
    early.say(b"before anybody has heard of me", end=False)
    assert world.network.run(until=0.11, done=lambda: late.count > 0)
    assert early.mux.stats.retransmissions == 0


def test_a_peer_that_gets_another_port_is_followed() -> None:
    world = World(Link(delay=0.01))
    peers = world.pair()
    data = Random(1).randbytes(4 * MIB)
    for peer in peers:
        peer.say(data)
    world.run(0.2)
    assert 0 < peers[1].count < len(data)
    moving = peers[0]
    world.network.detach(moving.host)
    moving.host = world.network.attach(moving, {0: (moving.address[0], 7777)})
    assert world.run(300, peers)
    for peer in peers:
        assert peer.received.digest() == hashlib.sha256(data).digest()


def test_strangers_change_nothing() -> None:
    world = World(Link(delay=0.01))
    peers = world.pair()
    eve = Peer(world, 8)
    rng = Random(8)

    def attack() -> None:
        for leg in world.legs:
            kind = rng.choice((wire.DATA, wire.END, wire.DESTROY, wire.ACK, wire.HEARTBEAT))
            packet = encode(Packet(kind, leg, 0, rng.getrandbits(32), 0, rng.randbytes(20)))
            world.relay.receive(packet, 0, eve.address, world.network.now)
            # As from the peer of the other leg, and from what would be anybody.
            world.relay.receive(rng.randbytes(40), 0, peers[0].address, world.network.now)
            world.relay.receive(packet, 0, (eve.address[0], 0), world.network.now)
        world.network.at(world.network.now + 0.001, attack)

    attack()
    talk(world, peers)
    assert world.relay.mux.forwarder.stats.strangers > 100
    assert eve.count == 0


def test_forged_requests_change_nothing() -> None:
    world = World(Link(delay=0.01))
    alice, bob, eve = (Peer(world, number) for number in (1, 2, 3))
    assert alice.ask(True) == []
    assert eve.ask(True) == []
    assert eve.ask(False, bytes(32)) == []
    answers = bob.ask(False)
    assert [session for session, _ in answers] == [alice.session, bob.session]
    # The pair is made: the same token names another one.
    assert eve.ask(False) == []
    for peer, (_, answer) in zip((alice, bob), answers, strict=True):
        peer.stream.connect(0, answer.id, RELAY, world.network.now)
    eve.close()
    talk(world, (alice, bob))


def test_a_flood_of_one_key_is_not_the_others_trouble() -> None:
    rate = 2.0 * MIB
    world = World(Link(delay=0.01), RelayLimits(rate=rate))
    flooded = world.pair()
    calm = world.pair(bytes(32))
    leg = world.relay.mux.forwarder.legs[flooded[0].stream.remote_id or 0]
    packet = encode(Packet(wire.DATA, leg.id, 0, 0, 0, bytes(1400)))

    def flood() -> None:
        for _ in range(20):
            world.relay.receive(packet, 0, flooded[0].address, world.network.now)
        world.network.poke(world.relay.host)
        world.network.at(world.network.now + 0.001, flood)

    flood()
    calm[0].say(Random(1).randbytes(MIB))
    calm[1].say(b"")
    assert world.run(2.0, calm)
    assert calm[1].count == MIB
    seconds = world.network.now
    assert leg.bytes <= rate * (seconds + BURST)
    assert leg.dropped * len(packet) > 5 * leg.bytes


def test_a_rate_below_what_the_peers_could_do_slows_them_down_only() -> None:
    rate = 2.0 * MIB
    world = World(Link(delay=0.01), RelayLimits(rate=rate))
    peers = world.pair()
    talk(world, peers, 4 * MIB)
    assert world.relay.mux.forwarder.stats.dropped > 0
    assert 4 * MIB / rate * 0.7 < world.network.now < 4 * MIB / rate * 3


def test_a_peer_that_vanishes() -> None:
    world = World(Link(delay=0.01))
    alice, bob = world.pair()
    for peer in (alice, bob):
        peer.say(bytes(1000), end=False)
    world.run(1.0)
    assert alice.count == bob.count == 1000
    bob.vanish()
    alice.say(bytes(1000), end=False)
    assert world.run(120, [alice])
    assert isinstance(alice.stream.error, StreamTimeout)
    world.run(SILENCE + 2 * LOOK)
    assert world.legs == []
    for peer in (alice, bob):
        peer.close()
    world.run(LOOK)
    assert world.relay.deadline() is None


def test_an_end_is_acknowledged_after_the_first_session_is_over() -> None:
    """The ACKs of an END get lost, and who sent them has left the relay by then."""
    lost = 0

    def drop(datagram: bytes, source: Address, _destination: Address) -> bool:
        nonlocal lost
        if source[0] != "10.0.0.1" or lost == 3 or len(datagram) > 20:
            return False
        lost += alice.stream.closed
        return alice.stream.closed

    world = World(Link(delay=0.01, drop=drop))
    alice, bob = world.pair()
    alice.say(b"")
    world.run(1)
    bob.say(b"")
    assert world.run(1, [alice])
    alice.close()
    assert world.run(10, [bob])
    assert bob.stream.error is None
    assert lost == 3
