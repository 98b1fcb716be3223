"""Connections whose peer's address changes in the middle, and those who pretend that it did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import cast

import pytest
from support.nats import ONE_WAY, Peer, World
from support.transfers import Half, Party

from hyperseaport.testing.network import Link
from hyperseaport.transport.dht.hyperdht import Connection, HyperDHT
from hyperseaport.transport.errors import StreamTimeout
from hyperseaport.transport.keys import KeyPair
from hyperseaport.transport.secret_stream import SecretStream
from hyperseaport.transport.transmit import Address, Transmit
from hyperseaport.transport.udx import packet as wire
from hyperseaport.transport.udx.packet import Packet

KEY = KeyPair.from_seed(bytes(32))
BYTES = 1 << 19
SMALL = 100
#: Bytes a second: a transfer takes a while.
RATE = 500_000
#: Seconds that a reboot takes, and until bytes arrive again after that.
BOOTS = 0.3
SOON = 1.5
#: Where nobody is whom either end knows.
ELSEWHERE: Address = ("9.9.9.9", 9999)
ATTACKS = (
    wire.DATA,
    wire.DATA | wire.END,
    wire.END,
    wire.ACK,
    wire.MESSAGE,
    wire.HEARTBEAT,
    wire.DESTROY,
)


class Node(Party):
    """A node with halves, for a network with NATs."""

    def __init__(self, core: HyperDHT) -> None:
        super().__init__(core)
        self.sockets_to_open: Callable[[], list[int]] = core.sockets_to_open
        self.sockets_to_close: Callable[[], list[int]] = core.sockets_to_close

    def opened(self, connection: Connection, now: float) -> None:
        secret = SecretStream(connection.handshake, Random(len(self.halves)))
        half = Half(connection.stream, b"", b"", secret, ends=False)
        half.start(now)
        self.halves.append(half)


@dataclass
class Pair:
    """A client, a server and their connection; each end sends and expects."""

    world: World
    client: Peer
    server: Peer
    near: Half
    far: Half

    @property
    def homes(self) -> tuple[Address, Address]:
        """Where each end believes the other to be."""
        return self.near.stream.address, self.far.stream.address

    @property
    def halves(self) -> tuple[Half, Half]:
        return self.near, self.far

    def finish(self, seconds: float = 60.0) -> None:
        """Until both ends have all."""
        done = self.world.run(lambda: all(half.complete for half in self.halves), seconds)
        assert done, [(half.received, half.stream, half.error) for half in self.halves]

    def progress(self, half: Half, seconds: float) -> float:
        """Seconds until something arrives that had not."""
        begin, before = self.world.network.now, half.received
        assert self.world.run(lambda: half.received > before, seconds)
        return self.world.network.now - begin


def kinds_of(natted: str, kind: str) -> tuple[str, str]:
    """The kinds of client and server."""
    return (kind, "open") if natted == "client" else ("open", kind)


def connected(
    seed: int, client: str, server: str, there: int, back: int, *, keep_open: bool = False
) -> Pair:
    """The client sends so many bytes, and the server; and each ends its direction, unless it is to
    keep it open."""
    world = World(seed, Link(delay=ONE_WAY, bandwidth=RATE))
    near, far = world.peer(client), world.peer(server)
    parties = Node(near.dht), Node(far.dht)
    for peer, party in zip((near, far), parties, strict=True):
        peer.host.core = party
    listening: list[float] = []
    far.dht.listen(
        KEY,
        world.network.now,
        on_connection=parties[1].opened,
        on_listening=listening.append,
    )
    world.poke(far)
    assert world.run(lambda: bool(listening), 20)
    pair = connect(world, near, far)
    more(pair, pair.near, pair.far, there)
    more(pair, pair.far, pair.near, back)
    for half in pair.halves:
        half.ends = not keep_open
    return pair


def connect(world: World, client: Peer, server: Peer) -> Pair:
    """One more connection."""
    near, far = client.host.core, server.host.core
    assert isinstance(near, Node)
    assert isinstance(far, Node)
    count = len(near.halves) + 1

    def failed(error: Exception, _now: float) -> None:
        raise error

    client.dht.connect(KEY.public_key, world.network.now, on_open=near.opened, on_error=failed)
    world.poke(client)
    assert world.run(lambda: len(near.halves) == len(far.halves) == count, 60)
    one, other = near.halves[-1], far.halves[-1]
    assert one.secret is not None
    assert other.secret is not None
    secrets = one.secret, other.secret
    assert world.run(lambda: all(secret.opened for secret in secrets), 5)
    return Pair(world, client, server, one, other)


def reboot(peer: Peer) -> None:
    """The router in front of a peer forgets every mapping."""
    assert peer.nat is not None
    peer.nat.reboot()


def cut(pair: Pair, seconds: float) -> None:
    """No packet of a stream passes anywhere."""
    link = pair.world.network.link
    link.drop = lambda datagram, _source, _destination: datagram[0] == wire.MAGIC
    pair.world.wait(seconds)
    link.drop = None


def more(pair: Pair, sender: Half, receiver: Half, size: int) -> None:
    """The sender has something more to send."""
    data = pair.world.rng.randbytes(size)
    sender.sends += data
    receiver.expects += data
    pair.world.poke(pair.client)
    pair.world.poke(pair.server)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["consistent", "random"])
@pytest.mark.parametrize(("there", "back"), [(BYTES, SMALL), (SMALL, BYTES), (BYTES, BYTES)])
@pytest.mark.parametrize("natted", ["client", "server"])
def test_a_transfer_outlives_a_reboot_of_the_router(
    seed: int, kind: str, there: int, back: int, natted: str
) -> None:
    pair = connected(seed, *kinds_of(natted, kind), there, back)
    receiver = pair.far if there > back else pair.near
    assert pair.world.run(lambda: receiver.received > BYTES // 3, 30)
    homes = pair.homes
    reboot(pair.client if natted == "client" else pair.server)
    cut(pair, BOOTS)
    assert pair.progress(receiver, 10) < SOON
    pair.finish()
    assert pair.homes != homes


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("there", "back"), [(BYTES, SMALL), (SMALL, BYTES)])
def test_a_transfer_goes_on_in_another_network(seed: int, there: int, back: int) -> None:
    pair = connected(seed, "consistent", "open", there, back)
    receiver = pair.far if there > back else pair.near
    assert pair.world.run(lambda: receiver.received > BYTES // 3, 30)
    world, client = pair.world, pair.client
    old, sockets = pair.far.stream.address, client.host.sockets
    world.network.detach(client.host)
    world.wait(BOOTS)
    nat = world.nat("consistent")
    assert nat is not None
    client.nat, client.host = nat, world.network.attach_behind(nat, client.host.core, sockets)
    client.dht.moved(client.dht.local_hosts, world.network.now, elsewhere=True)
    world.poke(client)
    assert pair.progress(receiver, 10) < SOON
    pair.finish()
    assert pair.far.stream.address[0] == nat.host != old[0]


@pytest.mark.parametrize("natted", ["client", "server"])
def test_a_connection_outlives_the_timeout_of_its_mapping(natted: str) -> None:
    pair = connected(1, *kinds_of(natted, "random"), SMALL, SMALL, keep_open=True)
    pair.finish()
    hidden = pair.client if natted == "client" else pair.server
    assert hidden.nat is not None
    hidden.nat.timeout = 30.0
    pair.world.wait(40.0)
    homes = pair.homes
    behind, before = pair.halves if natted == "client" else pair.halves[::-1]
    more(pair, behind, before, SMALL)
    more(pair, before, behind, BYTES)
    pair.finish(10)
    assert pair.homes != homes


def test_all_connections_of_a_peer_move_when_one_does() -> None:
    pair = connected(1, "consistent", "open", SMALL, SMALL, keep_open=True)
    pair.finish()
    other = connect(pair.world, pair.client, pair.server)
    assert pair.far.stream.address == other.far.stream.address
    home = pair.far.stream.address
    reboot(pair.client)
    more(pair, pair.near, pair.far, SMALL)
    pair.finish(5)
    assert pair.far.stream.address == other.far.stream.address != home
    assert pair.server.dht.moves.moved == 1
    more(other, other.far, other.near, SMALL)
    other.finish(1)


def test_a_reboot_of_both_routers_ends_the_connection() -> None:
    """Nothing that either sends gets in at the other."""
    pair = connected(1, "consistent", "consistent", BYTES, SMALL)
    assert pair.world.run(lambda: pair.far.received > BYTES // 3, 30)
    reboot(pair.client)
    reboot(pair.server)
    assert pair.world.run(lambda: pair.near.stream.closed, 20)
    assert isinstance(pair.near.stream.error, StreamTimeout)
    assert not pair.far.stream.remote_ended


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rebooted", ["client", "server"])
@pytest.mark.parametrize(("there", "back"), [(BYTES, SMALL), (SMALL, BYTES)])
def test_a_new_connection_opens_the_way_for_the_old_ones(
    seed: int, rebooted: str, there: int, back: int
) -> None:
    """Where the other router lets nobody in that it does not know."""
    pair = connected(seed, "consistent", "consistent", there, back, keep_open=True)
    receiver = pair.far if there > back else pair.near
    assert pair.world.run(lambda: receiver.received > BYTES // 3, 30)
    reboot(pair.client if rebooted == "client" else pair.server)
    # A service that was cut off announces itself again in this time.
    pair.world.wait(6.0)
    assert receiver.received < BYTES
    connect(pair.world, pair.client, pair.server)
    assert pair.progress(receiver, 10) < 3.0
    pair.finish()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rebooted", ["client", "server"])
@pytest.mark.parametrize(("there", "back"), [(BYTES, SMALL), (SMALL, BYTES), (SMALL, SMALL)])
def test_nats_are_opened_again_for_a_peer_that_fell_silent(
    seed: int, rebooted: str, there: int, back: int
) -> None:
    pair = connected(seed, "consistent", "consistent", there, back, keep_open=True)
    receiver = pair.far if there > back else pair.near
    if there == back:
        pair.finish()
    assert pair.world.run(lambda: receiver.received > (there + back) // 3, 30)
    halves = [len(cast(Node, peer.host.core).halves) for peer in (pair.client, pair.server)]
    reboot(pair.client if rebooted == "client" else pair.server)
    # A service that was cut off announces itself again in this time.
    pair.world.wait(6.0)
    assert receiver.received < BYTES
    for _ in range(3):
        pair.client.dht.silent(KEY.public_key, pair.world.network.now)
    assert len(pair.client.dht._context.attempts) == 1
    pair.world.poke(pair.client)
    if there == back:
        pair.world.wait(2.0)
        more(pair, pair.near, pair.far, SMALL)
        more(pair, pair.far, pair.near, SMALL)
    assert pair.progress(receiver, 10) < 3.0
    pair.finish()
    # Nothing else has come of it, at either end.
    pair.world.wait(20.0)
    assert halves == [len(cast(Node, peer.host.core).halves) for peer in (pair.client, pair.server)]
    assert len(pair.client.dht.mux) == len(pair.server.dht.mux) == 1


class Attacker:
    """Has learned everything of a stream but its keys, and sends from elsewhere."""

    def __init__(self, pair: Pair, victim: Peer, half: Half) -> None:
        self.pair = pair
        self.victim = victim
        self.half = half
        self.received: list[bytes] = []
        self.outbox: list[Transmit] = []
        self.host = pair.world.network.attach(self, {0: ELSEWHERE})
        #: Hands what it gets to the victim's peer, as if the victim had sent it there itself.
        self.passes_on_to: Peer | None = None
        self.sent = 0

    def receive(self, datagram: bytes, socket: int, source: Address, now: float) -> None:
        self.received.append(datagram)
        if self.passes_on_to is not None:
            peer = self.passes_on_to
            peer.host.core.receive(datagram, self.half.stream.socket, self.seen_as, now)
            self.pair.world.poke(peer)

    @property
    def seen_as(self) -> Address:
        """The victim, as its peer knows it."""
        return (self.pair.near if self.half is self.pair.far else self.pair.far).stream.address

    def transmits(self, now: float) -> list[Transmit]:
        outbox, self.outbox = self.outbox, []
        return outbox

    def deadline(self) -> float | None:
        return None

    def on_deadline(self, now: float) -> None:
        """There is none."""

    def strike(self, kinds: Sequence[int] = ATTACKS) -> None:
        """Send one packet of each kind with the very numbers that the victim expects."""
        stream = self.half.stream
        address = self.victim.host.sockets[stream.socket]
        for kind in kinds:
            packet = Packet(
                kind,
                stream.local_id,
                0,
                stream._receiver.next & wire.SEQ_MASK,
                stream._sender.flight.next & wire.SEQ_MASK,
                b"not what was sent" if kind & (wire.DATA | wire.MESSAGE) else b"",
            )
            self.outbox.append(Transmit(0, address, (wire.encode(packet),)))
            self.sent += 1
        self.pair.world.network.poke(self.host)

    def keep_striking(self, every: float, until: float) -> None:
        network = self.pair.world.network
        if network.now < until and not self.half.stream.closed:
            self.strike()
            network.at(network.now + every, partial(self.keep_striking, every, until))


@pytest.mark.parametrize("victim", ["client", "server"])
def test_packets_from_elsewhere_neither_move_nor_stall_a_transfer(victim: str) -> None:
    times = []
    for attacked in (False, True):
        pair = connected(2, "open", "open", BYTES, BYTES)
        half = pair.near if victim == "client" else pair.far
        attacker = Attacker(pair, pair.client if victim == "client" else pair.server, half)
        homes, begin = pair.homes, pair.world.network.now
        if attacked:
            attacker.keep_striking(0.01, begin + 60)
        pair.finish()
        times.append(pair.world.network.now - begin)
        assert pair.homes == homes
        # It is not even asked: the peer is heard all the time.
        assert not attacker.received
    assert attacker.sent > 100
    assert times[1] < 1.1 * times[0]


@pytest.mark.parametrize("passes_on", [False, True])
def test_packets_from_elsewhere_do_not_move_an_idle_connection(passes_on: bool) -> None:
    """Not even if whoever sends them gets the true peer to answer the challenge."""
    pair = connected(3, "open", "open", SMALL, SMALL, keep_open=True)
    pair.finish()
    attacker = Attacker(pair, pair.server, pair.far)
    if passes_on:
        attacker.passes_on_to = pair.client
    homes = pair.homes
    attacker.keep_striking(0.05, pair.world.network.now + 10)
    pair.world.wait(15)
    assert pair.homes == homes
    # Less is sent there than comes from there.
    assert 0 < len(attacker.received) <= attacker.sent / 10
    more(pair, pair.near, pair.far, BYTES)
    more(pair, pair.far, pair.near, BYTES)
    pair.finish()


def test_a_peer_is_followed_while_others_pretend_to_be_it() -> None:
    pair = connected(4, "consistent", "open", BYTES, BYTES)
    attacker = Attacker(pair, pair.server, pair.far)
    attacker.keep_striking(0.01, pair.world.network.now + 60)
    assert pair.world.run(lambda: pair.far.received > BYTES // 3, 30)
    home = pair.far.stream.address
    reboot(pair.client)
    pair.finish()
    assert pair.far.stream.address not in (home, ELSEWHERE)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("there", "back"), [(BYTES, SMALL), (SMALL, BYTES)])
def test_a_peer_that_answers_no_challenge_is_followed_by_what_it_writes(
    seed: int, there: int, back: int
) -> None:
    """As the Node programs are. One that only receives writes its keep-alive after 5 s."""
    pair = connected(seed, "consistent", "open", there, back, keep_open=True)
    pair.near.stream.watcher = None
    receiver = pair.far if there > back else pair.near
    assert pair.world.run(lambda: receiver.received > BYTES // 3, 30)
    home = pair.far.stream.address
    reboot(pair.client)
    pair.world.wait(5.0)
    if back > there:
        more(pair, pair.near, pair.far, SMALL)
    pair.finish()
    assert pair.far.stream.address != home


def test_who_answers_no_challenge_and_cannot_write_is_not_followed() -> None:
    """The peer is away for a while, and somebody else sends what it might have sent."""
    pair = connected(5, "open", "open", SMALL, SMALL, keep_open=True)
    pair.finish()
    homes = pair.homes
    attacker = Attacker(pair, pair.server, pair.far)
    link, peer = pair.world.network.link, pair.far.stream.address[0]
    link.drop = lambda _datagram, source, destination: peer in (source[0], destination[0])
    for _ in range(100):
        attacker.strike([wire.ACK, wire.HEARTBEAT])
        pair.world.wait(0.1)
    assert attacker.received
    assert pair.homes == homes
    link.drop = None
    more(pair, pair.near, pair.far, BYTES)
    pair.finish()
