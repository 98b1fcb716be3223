"""Networks of dht-rpc nodes on the virtual clock."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from hyperseaport.testing.network import Host, Link, Network
from hyperseaport.transport.dht import wire
from hyperseaport.transport.dht.addresses import node_id
from hyperseaport.transport.dht.node import Node, NodeConfig
from hyperseaport.transport.dht.query import Query
from hyperseaport.transport.encoding import encode_address
from hyperseaport.transport.transmit import CLIENT_SOCKET, SERVER_SOCKET, Address

PORT = 49737
CLIENT_PORT = 50000
SEEDS = [f"10.0.0.{number}" for number in range(1, 5)]


@dataclass(slots=True)
class Member:
    node: Node
    host: Host
    address: Address


class World:
    """A private DHT of four seeds, and whoever joins it."""

    def __init__(self, seed: int, link: Link) -> None:
        self.network = Network(Random(seed), link)
        self.members: list[Member] = []
        self.seeds = [self.join(host, seed=True) for host in SEEDS]
        self.network.run(until=5.0)
        assert all(member.node.ready for member in self.seeds)

    def join(self, host: str, *, seed: bool = False, ephemeral: bool | None = None) -> Member:
        bootstrap = ((SEEDS[0], PORT),) if host != SEEDS[0] else ()
        config = NodeConfig(
            bootstrap=bootstrap,
            ephemeral=ephemeral,
            public_address=(host, PORT) if seed else None,
        )
        node = Node(config, Random(host))
        node.start(self.network.now, server_port=PORT, client_port=CLIENT_PORT)
        sockets = {SERVER_SOCKET: (host, PORT), CLIENT_SOCKET: (host, CLIENT_PORT)}
        member = Member(node, self.network.attach(node, sockets), (host, PORT))
        self.members.append(member)
        return member

    def leave(self, member: Member) -> None:
        self.members.remove(member)
        self.network.detach(member.host)

    def until_ready(self, seconds: float = 60.0) -> None:
        deadline = self.network.now + seconds
        everybody = self.members
        assert self.network.run(until=deadline, done=lambda: all(m.node.ready for m in everybody))

    def pass_time(self, seconds: float) -> None:
        self.network.run(until=self.network.now + seconds)

    def find(self, member: Member, target: bytes) -> Query:
        found: list[Query] = []
        now = self.network.now
        member.node.query(
            target, wire.FIND_NODE, now, internal=True, on_done=lambda q, now: found.append(q)
        )
        self.network.poke(member.host)
        assert self.network.run(until=now + 60.0, done=lambda: bool(found))
        return found[0]

    def truly_closest(self, target: bytes, asker: Member) -> list[Address]:
        others = [m.address for m in self.members if m is not asker and not m.node.ephemeral]
        others.sort(key=lambda a: int.from_bytes(node_id(a)) ^ int.from_bytes(target))
        return others[:20]


def test_a_network_forms_under_loss_and_queries_find_the_closest() -> None:
    link = Link(delay=0.005, jitter=0.002, loss=0.05)
    world = World(1, link)
    for number in range(30):
        world.join(f"10.1.0.{number + 1}", ephemeral=False)
    world.until_ready()
    assert not any(m.node.firewalled or m.node.ephemeral for m in world.members)
    for member in world.members:
        assert member.node.id == node_id(member.address)
        assert member.node.remote_address() == member.address
    world.pass_time(120.0)
    assert all(len(m.node.table) >= 25 for m in world.members)

    rng = Random(2)
    # A query may end without whoever lost a datagram, so under loss it only comes close.
    for _ in range(10):
        target, asker = rng.randbytes(32), rng.choice(world.members)
        found = [reply.source for reply in world.find(asker, target).closest]
        assert len(found) == 20
        assert len(set(found) & set(world.truly_closest(target, asker))) >= 14
    link.loss = 0.0
    for _ in range(20):
        target, asker = rng.randbytes(32), rng.choice(world.members)
        found = [reply.source for reply in world.find(asker, target).closest]
        assert found == world.truly_closest(target, asker)


def test_a_dead_node_is_hinted_at_and_leaves_all_tables() -> None:
    hints: list[bytes] = []

    def observe(datagram: bytes, source: Address, destination: Address) -> bool:
        if datagram[:1] == b"\x03":
            request = wire.decode_request(datagram, 0, source)
            if request.internal and request.command == wire.DOWN_HINT:
                hints.append(request.value or b"")
        return False

    world = World(2, Link(delay=0.005, drop=observe))
    for number in range(8):
        world.join(f"10.1.0.{number + 1}", ephemeral=False)
    world.until_ready()
    dead = world.members[7]
    id_of_dead = dead.node.id
    world.leave(dead)
    assert any(id_of_dead in m.node.table for m in world.members)
    asker = world.join("10.2.0.1")
    world.until_ready()
    assert set(hints) == {encode_address(dead.address)}
    world.find(asker, id_of_dead)
    world.pass_time(60.0)
    world.find(world.seeds[0], id_of_dead)
    world.pass_time(200.0)
    assert not any(id_of_dead in m.node.table for m in world.members)
    found = [reply.source for reply in world.find(asker, id_of_dead).closest]
    assert dead.address not in found
    assert len(found) == 11


def test_a_node_that_restarts_on_its_port_is_itself_again() -> None:
    world = World(3, Link(delay=0.005))
    others = [world.join(f"10.1.0.{number + 1}", ephemeral=False) for number in range(3)]
    world.until_ready()
    before = world.seeds[2]
    world.leave(before)
    world.pass_time(1.0)
    again = world.join(SEEDS[2], seed=True)
    world.until_ready()
    assert again.node.id == before.node.id
    world.pass_time(5.0)
    assert all(again.node.id in m.node.table for m in others)
    found = [reply.source for reply in world.find(others[0], again.node.id).closest]
    assert found[0] == again.address


def test_strangers_pings_are_answered_nine_seconds_after_a_restart() -> None:
    world = World(10, Link(delay=0.005))
    stranger = world.join("10.2.0.1", ephemeral=True)
    world.until_ready()
    world.leave(world.seeds[2])
    again = world.join(SEEDS[2], seed=True)
    answered: list[bool] = []
    for wait in (5.0, 5.0):
        world.pass_time(wait)
        stranger.node.ping(
            again.address,
            world.network.now,
            retries=0,
            on_done=lambda reply, now: answered.append(reply is not None),
        )
        world.network.poke(stranger.host)
    world.pass_time(1.5)
    assert answered == [False, True]


def test_who_can_be_reached_knows_it_when_ready_and_who_cannot_stays_firewalled() -> None:
    shut = "10.3.0.1"

    def filtered(datagram: bytes, source: Address, destination: Address) -> bool:
        return destination == (shut, PORT)

    world = World(4, Link(delay=0.02, drop=filtered))
    reachable = world.join("10.2.0.1").node
    firewalled = world.join(shut).node
    forced = world.join("10.2.0.2", ephemeral=False).node
    world.until_ready(10.0)
    assert (reachable.firewalled, reachable.ephemeral) == (False, True)
    assert reachable.current_socket == SERVER_SOCKET
    assert reachable.remote_address() == ("10.2.0.1", PORT)
    assert (firewalled.firewalled, firewalled.ephemeral) == (True, True)
    assert firewalled.current_socket == CLIENT_SOCKET
    assert firewalled.remote_address() is None
    assert firewalled.public_host == shut
    assert (forced.firewalled, forced.ephemeral) == (False, False)
    # An ephemeral node is in nobody's table, a persistent one is.
    tables = [m.node.table for m in world.seeds]
    assert not any(reachable.id in table or firewalled.id in table for table in tables)
    assert all(forced.id in table for table in tables)


def test_a_forced_node_behind_a_filter_does_not_become_persistent() -> None:
    shut = "10.3.0.1"
    world = World(5, Link(delay=0.02, drop=lambda data, source, to: to == (shut, PORT)))
    node = world.join(shut, ephemeral=False).node
    world.until_ready(20.0)
    assert (node.firewalled, node.ephemeral) == (True, True)


def test_the_quick_check_waits_for_an_answer_that_is_late() -> None:
    late: set[bytes] = set()
    world = World(6, Link(delay=0.001))

    def drop_first(datagram: bytes, source: Address, destination: Address) -> bool:
        # The quick answer alone goes to the server socket before the test of the firewall.
        if destination == ("10.2.0.1", PORT) and not late:
            late.add(datagram)
            world.network.at(
                world.network.now + 0.2,
                lambda: world.network._deliver(datagram, source, destination),
            )
            return True
        return False

    world.network.link.drop = drop_first
    node = world.join("10.2.0.1").node
    world.until_ready(5.0)
    assert not node.firewalled
    assert len(late) == 1


def test_a_stable_node_becomes_persistent_after_twenty_minutes() -> None:
    world = World(7, Link(delay=0.005))
    node = world.join("10.2.0.1").node
    world.until_ready()
    changes: list[float] = []
    node.on_network_change = changes.append
    joined = world.network.now
    states = []
    for seconds in (1195.0, 10.0):
        world.pass_time(seconds)
        states.append(node.ephemeral)
    assert states == [True, False]
    assert len(changes) == 1
    assert 1199.0 < changes[0] - joined < 1206.0
    assert all(node.id in m.node.table for m in world.seeds)


def test_an_idle_network_is_quiet() -> None:
    world = World(8, Link(delay=0.005))
    world.pass_time(60.0)
    before = world.network.delivered
    world.pass_time(600.0)
    # Three other nodes, each pinged every 40 s, and a refresh every 5 minutes, for each of four.
    assert world.network.delivered - before < 4 * (15 * 3 * 2 + 3 * 20)


def test_the_same_seed_gives_the_same_trace() -> None:
    def trace() -> list[tuple[bytes, Address, Address]]:
        seen: list[tuple[bytes, Address, Address]] = []

        def record(datagram: bytes, source: Address, destination: Address) -> bool:
            seen.append((datagram, source, destination))
            return False

        world = World(9, Link(delay=0.005, jitter=0.01, loss=0.1, drop=record))
        world.join("10.2.0.1")
        world.pass_time(30.0)
        return seen

    first = trace()
    assert len(first) > 20
    assert first == trace()
