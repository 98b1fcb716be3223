"""Peers behind NATs on the virtual clock: 40 ms from anywhere to anywhere and back."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from support.nats import KINDS, PAIRS, Outcome, Peer, World

from hyperseaport.testing.nat import Nat
from hyperseaport.testing.network import Link
from hyperseaport.transport.dht import client_punch, punches
from hyperseaport.transport.dht.messages import (
    PEER_HANDSHAKE,
    Firewall,
    HandshakeMessage,
    Mode,
    NoisePayload,
    UdxInfo,
)
from hyperseaport.transport.dht.nat import Verdict
from hyperseaport.transport.dht.wire import encode_request
from hyperseaport.transport.errors import PeerNotFound, PeerUnreachable
from hyperseaport.transport.keys import NS_PEER_HANDSHAKE, KeyPair, target
from hyperseaport.transport.noise import Initiator
from hyperseaport.transport.transmit import Address

KEYS = KeyPair.from_seed(bytes([1]) * 32)
KEY = KEYS.public_key
SEEDS = 50

#: Milliseconds that opening takes, as (first, with remembered relays); None for no path at all.
EXPECTED: dict[tuple[str, str], tuple[float, float] | None] = {
    ("open", "any"): (80, 40),
    ("any", "open"): (80, 80),
    ("any", "any"): (140, 140),
    ("any", "lan"): (120, 120),
    ("open", "lan"): (80, 40),
    ("random", "random"): None,
}


def expected(pair: tuple[str, str]) -> tuple[float, float] | None:
    server, client = pair
    for key in (pair, (server, "any"), ("any", client)):
        if key in EXPECTED:
            return EXPECTED[key]
    return EXPECTED["any", "any"]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pairs(pair: tuple[str, str]) -> None:
    """What the server and what the client sits behind: who reaches whom, and how fast."""
    world = World(PAIRS.index(pair))
    outcomes = [Outcome(world, pair, seed) for seed in range(SEEDS)]
    opened = [outcome for outcome in outcomes if outcome.error is None]
    times = expected(pair)
    if times is None:
        assert not opened
        assert all(isinstance(outcome.error, PeerUnreachable) for outcome in outcomes)
        assert all("both sides are behind NATs" in str(outcome.error) for outcome in outcomes)
        assert max(outcome.first for outcome in outcomes) < 0.5
        return
    if "random" in pair and not {"open", "lan"} & set(pair):
        assert len(opened) >= 0.95 * SEEDS
        assert statistics.median(outcome.first for outcome in opened) < 3.0
        return
    assert len(opened) == SEEDS
    first, remembered = times
    assert max(outcome.first for outcome in opened) * 1000 == pytest.approx(first, abs=1)
    assert max(outcome.routed for outcome in opened) * 1000 == pytest.approx(40, abs=1)
    if "random" not in pair:
        assert max(o.remembered for o in opened) * 1000 == pytest.approx(remembered, abs=1)


def both(world: World, server: str = "consistent", client: str = "consistent") -> tuple[Peer, Peer]:
    """A server that listens, and a client."""
    one, other = world.peer(server), world.peer(client)
    world.listen(one, KEYS)
    return one, other


@contextmanager
def dropping(world: World, count: int) -> Iterator[list[float]]:
    """Lose the first punches that cross the network."""
    lost: list[float] = []

    def drop(datagram: bytes, _source: Address, _destination: Address) -> bool:
        if len(datagram) > 1 or len(lost) >= count:
            return False
        lost.append(world.network.now)
        return True

    world.network.link.drop = drop
    yield lost
    world.network.link.drop = None


def test_a_lost_punch_costs_less_than_a_second() -> None:
    """The server's first punch is lost; its NAT is open all the same."""
    world = World(1)
    server, client = both(world)
    with dropping(world, 1) as lost:
        connect = world.connect(client, KEY)
        connect.greet(server)
    assert len(lost) == 1
    assert connect.took == pytest.approx(0.2, abs=0.01)


def test_without_fast_open_punching_starts_soon() -> None:
    """Checklist 54: all that is sent before both sides punch is lost."""
    world = World(1)
    server, client = both(world)
    with dropping(world, 2) as lost:
        connect = world.connect(client, KEY)
        connect.greet(server)
    assert len(lost) == 2
    assert connect.took < 0.5


@pytest.mark.parametrize("loss", [0.02, 0.1, 0.25])
def test_loss(loss: float) -> None:
    world = World(1, Link(delay=0.02, loss=0.0, jitter=0.005))
    times = []
    for seed in range(20):
        world.reseed(seed)
        world.network.link.loss = 0.0
        keys = KeyPair.from_seed(bytes([seed + 1]) * 32)
        server, client = world.peer(), world.peer()
        world.listen(server, keys)
        world.network.link.loss = loss
        connect = world.connect(client, keys.public_key)
        connect.greet(server)
        times.append(connect.took)
        world.remove(server)
        world.remove(client)
    assert statistics.median(times) < 0.2 + 3 * loss
    assert max(times) < 5


def test_duplicates_make_one_connection() -> None:
    world = World(1, Link(delay=0.02, duplicate=1.0, jitter=0.01))
    server, client = both(world)
    world.connect(client, KEY).greet(server)
    world.wait(15)
    assert len(server.connections) == 1
    assert server.server is not None
    assert server.server.stats.accepted == 1
    assert len(client.dht.mux) == len(server.dht.mux) == 1


@pytest.mark.parametrize("preserving", [False, True])
def test_nats_that_unexpected_packets_spoil(preserving: bool) -> None:
    """What only opens our own NAT must not get to the other one (spec: hyperdht 5.6)."""
    world = World(1)
    for seed in range(20):
        world.reseed(seed)
        keys = KeyPair.from_seed(bytes([seed + 1]) * 32)
        server, client = world.peer(), world.peer()
        for peer in (server, client):
            assert peer.nat is not None
            peer.nat.spoilable = True
            peer.nat.preserving = preserving
        world.listen(server, keys)
        connect = world.connect(client, keys.public_key)
        connect.greet(server)
        assert connect.took < 0.2


def test_behind_one_provider_nat_without_hairpin_there_is_no_path() -> None:
    """Both have the same inner address, too: nobody connects to itself."""
    world = World(1)
    outer = world.nat("consistent")
    assert outer is not None
    nats = [world.network.nat(f"100.64.9.{n}", outer=outer) for n in (1, 2)]
    server, client = (world.peer(nat=nat) for nat in nats)
    world.listen(server, KEYS)
    failed = world.connect(client, KEY).wait()
    assert isinstance(failed.error, PeerUnreachable)
    assert failed.took < 12
    assert not server.connections
    outer.hairpin = True
    connect = world.connect(client, KEY)
    connect.greet(server)
    assert connect.took < 1


@pytest.mark.parametrize("side", ["server", "client"])
def test_a_nat_that_reboots(side: str) -> None:
    world = World(1)
    server, client = both(world)
    world.connect(client, KEY).greet(server)
    nat = (server if side == "server" else client).nat
    assert nat is not None
    nat.reboot()
    # The server's next PINGs show that it has moved, and it announces itself again.
    world.wait(5 if side == "server" else 0.1)
    connect = world.connect(client, KEY)
    connect.greet(server)
    assert connect.took < 1.5


def test_mappings_that_time_out() -> None:
    """An old path costs no time: the relays are asked along with it."""
    world = World(1)
    server, client = both(world)
    for peer in (server, client):
        assert peer.nat is not None
        peer.nat.timeout = 20.0
    first = world.connect(client, KEY)
    first.greet(server)
    assert first.connection is not None
    first.connection.stream.destroy(world.network.now)
    world.poke(client)
    world.wait(60)
    connect = world.connect(client, KEY)
    connect.greet(server)
    assert connect.took < 0.25


def test_another_socket_may_have_a_better_nat() -> None:
    """7.3: the main sockets are random on both sides, new ones are not."""

    class Mobile(Nat):
        def outbound(self, source: Address, destination: Address, now: float) -> Address:
            self.random = source[1] in (49737, 49738)
            return super().outbound(source, destination, now)

    world = World(1)
    nats = [Mobile(f"7.0.0.{n}", world.rng) for n in (1, 2)]
    for nat in nats:
        world.network._nat_hosts[None, nat.host] = nat
    server, client = (world.peer(nat=nat) for nat in nats)
    world.listen(server, KEYS)
    connect = world.connect(client, KEY)
    connect.greet(server)
    assert connect.took < 15
    assert server.connections[0].stream.socket > 1 or connect.peer is client


def test_one_search_at_a_time() -> None:
    """Checklist 49. Whoever cannot wait is told until when; the connects of one client to one
    server share what is found."""
    world = World(3)
    server, client, other = world.peer("random"), world.peer(), world.peer()
    world.listen(server, KEYS)
    connects = [world.connect(client, KEY) for _ in range(5)]
    world.wait(0.5)
    late = world.connect(other, KEY).wait()
    assert isinstance(late.error, PeerUnreachable)
    assert "try again in 20 s" in str(late.error)
    for connect in connects:
        connect.greet(server)
    paths = {connect.connection.stream.address for connect in connects if connect.connection}
    assert len(paths) == 1
    # A path is remembered; without one a pause has to pass.
    world.connect(client, KEY).greet(server)
    client.dht._context.routes.clear()
    paused = world.connect(client, KEY).wait()
    assert isinstance(paused.error, PeerUnreachable)
    assert "try again in" in str(paused.error)
    world.wait(punches.RANDOM_PAUSE)
    world.connect(other, KEY).greet(server)


def test_sockets_of_a_search_are_given_back() -> None:
    world = World(2)
    server, client = both(world, "consistent", "random")
    connect = world.connect(client, KEY)
    connect.greet(server)
    assert len(client.dht.punches.sockets) == 1
    assert len(client.host.sockets) == 3
    world.connect(client, KEY).greet(server)
    for connection in server.connections:
        connection.stream.destroy(world.network.now)
    world.poke(server)
    world.wait(2.5)
    # A third connect within the time that peers rely on (spec: hyperdht 4.5).
    third = world.connect(client, KEY)
    third.greet(server)
    assert third.took == pytest.approx(0.04, abs=0.001)
    server.connections[-1].stream.destroy(world.network.now)
    world.poke(server)
    world.wait(20)
    assert len(client.dht.punches.sockets) == 0
    assert len(client.host.sockets) == 2
    assert len(client.dht.punches) == len(server.dht.punches) == 0


@pytest.mark.parametrize("after", [0.05, 0.085, 0.125, 0.145, 0.165])
def test_a_server_that_vanishes(after: float) -> None:
    """In any round: the client knows within 4 s of the last answer, or finds out by its stream."""
    world = World(1)
    server, client = both(world)
    connect = world.connect(client, KEY)
    world.wait(after)
    world.remove(server)
    connect.wait()
    if connect.error is not None:
        assert isinstance(connect.error, PeerUnreachable)
        assert connect.took < 4.5
        assert len(client.dht.mux) == 0
    assert len(client.dht.punches) == 0


@pytest.mark.parametrize("kind", ["consistent", "random"])
@pytest.mark.parametrize("after", [0.05, 0.085, 0.125, 0.3])
def test_a_client_that_vanishes(after: float, kind: str) -> None:
    """The server forgets it."""
    world = World(1)
    server, client = both(world, "consistent", kind)
    world.connect(client, KEY)
    world.wait(after)
    world.remove(client)
    world.wait(60)
    assert len(server.dht.punches) == len(server.dht.mux) == 0
    assert len(server.dht.punches.sockets) == 0
    assert server.server is not None
    assert not server.server._numbered
    assert not server.server._waiting_by_key


def test_a_relay_that_vanishes() -> None:
    """Another one takes over."""
    world = World(1)
    server, client = both(world)
    connect = world.connect(client, KEY)
    world.wait(0.0805)
    approach = next(iter(client.dht._context.attempts)).approach
    assert approach is not None
    punching = approach.punch
    assert punching is not None
    relay = next(n for n in world.nodes if n.host.sockets[0] == punching._relay)
    world.remove(relay)
    connect.greet(server)
    assert connect.took < client_punch.REQUEST_TIMEOUT * 6 + 0.3


def test_a_dead_server_is_known_within_four_seconds() -> None:
    world = World(1)
    server, client = both(world)
    world.remove(server)
    failed = world.connect(client, KEY).wait()
    assert isinstance(failed.error, PeerUnreachable)
    assert "is its program running" in str(failed.error)
    assert failed.took < 4.5
    unknown = world.connect(client, KeyPair.from_seed(bytes([9]) * 32).public_key).wait()
    assert isinstance(unknown.error, PeerNotFound)
    assert unknown.took < 0.5


def test_forged_punches_lead_nowhere() -> None:
    """Bytes in the server's name: from a port that is not its, and from hosts that have no part."""
    world = World(1)
    server, client = both(world)
    assert client.nat is not None
    client.nat.filtering = False
    connect = world.connect(client, KEY)
    world.wait(0.0825)
    assert len(client.dht.punches) == 1
    assert server.nat is not None
    for source in ((server.nat.host, 7), ("9.9.9.9", 9), (server.nat.host, 0)):
        client.dht.receive(b"\x00", 1, source, world.network.now)
    world.poke(client)
    connect.greet(server)
    assert connect.took == pytest.approx(0.14, abs=0.001)
    assert connect.connection is not None
    assert connect.connection.stream.address[1] != 7
    assert client.dht.punches.stats.stray >= 2


def test_replayed_and_forged_messages_change_nothing() -> None:
    world = World(1)
    server, client = both(world)
    seen: list[tuple[bytes, Address]] = []
    relays = {node.host.sockets[0] for node in world.nodes}
    inner = server.host.sockets[1]

    def watch(datagram: bytes, source: Address, destination: Address) -> bool:
        # Command 1 behind a header with id: PEER_HOLEPUNCH on its way to the server.
        if source in relays and datagram[:2] == b"\x03\x19" and datagram[42] == 1:
            seen.append((datagram, source))
        return False

    world.network.link.drop = watch
    connect = world.connect(client, KEY)
    world.wait(0.13)
    assert seen
    datagram, relay = seen[0]
    assert server.server is not None
    before = server.server.stats.punch_strays
    forged = bytearray(datagram)
    forged[-20] ^= 1
    for _ in range(3):
        server.dht.receive(datagram, 1, relay, world.network.now)
        server.dht.receive(bytes(forged), 1, relay, world.network.now)
    world.poke(server)
    connect.greet(server)
    assert server.server.stats.punch_strays == before + 3
    # The session is over: its messages are nobody's.
    server.dht.receive(datagram, 1, relay, world.network.now)
    assert server.server.stats.punch_strays == before + 4
    world.wait(15)
    assert len(server.connections) == 1
    assert inner in server.host.sockets.values()


def test_a_flood_of_handshakes_costs_no_sockets() -> None:
    """Each from another key, and none goes on: what it leaves is forgotten, and a genuine client
    gets through meanwhile."""
    world = World(1)
    server, client = both(world)
    relay = world.nodes[0].host.sockets[0]
    inner = server.host.sockets[1]
    assert server.nat is not None
    for index in range(400):
        one = Initiator(
            KeyPair.from_seed(index.to_bytes(32, "big")),
            KEY,
            prologue=NS_PEER_HANDSHAKE,
            ephemeral_seed=index.to_bytes(32, "little"),
        )
        noise = one.message(NoisePayload(udx=UdxInfo(index)).encode())
        message = HandshakeMessage(Mode.FROM_RELAY, noise, (f"8.0.{index >> 8}.{index & 255}", 9))
        datagram = encode_request(
            index, inner, PEER_HANDSHAKE, target=target(KEY), value=message.encode()
        )
        server.dht.receive(datagram, 1, relay, world.network.now)
    world.poke(server)
    assert server.server is not None
    assert len(server.server._numbered) == 400
    assert len(server.dht.punches) == 0
    connect = world.connect(client, KEY)
    connect.greet(server)
    assert connect.took < 0.2
    assert len(server.host.sockets) == 2
    world.wait(25)
    assert len(server.server._sessions) == 0
    assert not server.server._numbered
    assert len(server.dht.mux) == 1


def test_a_closing_node_stops_punching() -> None:
    world = World(1)
    server, client = both(world, "random", "consistent")
    connect = world.connect(client, KEY)
    world.wait(0.4)
    for peer in (server, client):
        assert len(peer.dht.punches) == 1
        peer.dht.close(world.network.now, lambda _now: None)
        world.poke(peer)
    world.wait(30)
    assert connect.connection is None
    assert len(client.dht.mux) == len(server.dht.mux) == 0
    assert len(server.dht.punches.sockets) == 0
    assert len(server.host.sockets) == 2


def test_the_same_seed_gives_the_same_trace() -> None:
    def trace() -> list[bytes]:
        world = World(4, Link(delay=0.02, loss=0.05))
        seen: list[bytes] = []

        def watch(datagram: bytes, _source: Address, _destination: Address) -> bool:
            seen.append(datagram)
            return False

        world.network.link.drop = watch
        server, client = both(world, "random")
        world.connect(client, KEY).greet(server)
        return seen

    assert trace() == trace()


def test_every_kind_is_what_it_says() -> None:
    """The simulated NATs, as sockets behind them see themselves."""
    world = World(1)
    for kind in KINDS:
        peer = world.peer(kind)
        verdicts: list[Verdict] = []
        take = verdicts.append

        def found(verdict: Verdict, _now: float, take: Callable[[Verdict], None] = take) -> None:
            take(verdict)

        peer.dht.punches.survey.find(world.network.now, found)
        world.poke(peer)
        world.wait(1)
        wanted = Firewall.RANDOM if kind == "random" else Firewall.CONSISTENT
        assert [verdict.firewall for verdict in verdicts] == [wanted]
