"""Outages on the virtual clock: what they cost, and how soon everything is as before.

A server, a client and a network of four nodes; whoever is named is cut off, moved or restarted.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest

from hyperseaport.testing.network import Host, Link, Network
from hyperseaport.transport.dht.hyperdht import Connection, HyperDHT, HyperDHTConfig
from hyperseaport.transport.dht.node import NodeConfig
from hyperseaport.transport.keys import KeyPair
from hyperseaport.transport.transmit import CLIENT_SOCKET, SERVER_SOCKET, Address, Transmit

KEYS = KeyPair.from_seed(bytes([1]) * 32)
HOUR = 3600.0
#: Seconds within which everything must be as before.
BACK = 5.0


class Counted(HyperDHT):
    """Counts how often it was woken, and what it sent."""

    wakes = 0
    sent = 0

    def on_deadline(self, now: float) -> None:
        self.wakes += 1
        super().on_deadline(now)

    def transmits(self, now: float) -> list[Transmit]:
        transmits = super().transmits(now)
        self.sent += len(transmits)
        return transmits


@dataclass
class World:
    """Everybody has a host of its own, 10.0.0.1 and up."""

    seed: int = 1
    firewalled: bool = True
    reluctant: bool = True

    def __post_init__(self) -> None:
        self.network = Network(Random(self.seed), Link(delay=0.02))
        self.hosts: dict[HyperDHT, Host] = {}
        self.count = 0
        self.nodes: list[Counted] = []
        for _ in range(4):
            self.nodes.append(self.node())
        self.server = self.member()
        self.client = self.member()
        self.accepted: list[Connection] = []
        self.server.listen(
            KEYS, self.network.now, on_connection=lambda connection, _: self.accept(connection)
        )
        self.network.poke(self.hosts[self.server])
        self.wait(2)
        assert self.connects(2.0)

    def accept(self, connection: Connection) -> None:
        self.accepted.append(connection)

    def node(self, number: int | None = None) -> Counted:
        if number is None:
            self.count += 1
            number = self.count
        address = f"10.0.0.{number}", 49737
        bootstrap = (("10.0.0.1", 49737),) if number > 1 else ()
        reluctance = 9.0 if self.reluctant else 0.0
        config = NodeConfig(bootstrap, public_address=address, ignore_idless_pings=reluctance)
        return self.start(config, address)

    def member(self) -> Counted:
        self.count += 1
        config = NodeConfig((("10.0.0.1", 49737),), ephemeral=True, firewalled=self.firewalled)
        return self.start(config, (f"10.0.0.{self.count}", 49737))

    def start(self, config: NodeConfig, address: Address) -> Counted:
        self.seed += 1
        dht = Counted(HyperDHTConfig(config, local_hosts=(address[0],)), Random(self.seed))
        dht.start(self.network.now, server_port=address[1], client_port=50000)
        self.attach(dht, address[0])
        self.network.run(until=self.network.now + 10, done=lambda: dht.node.ready)
        return dht

    def attach(self, dht: HyperDHT, host: str) -> None:
        sockets = {SERVER_SOCKET: (host, 49737), CLIENT_SOCKET: (host, 50000)}
        self.hosts[dht] = self.network.attach(dht, sockets)

    def move(self, dht: HyperDHT, host: str) -> None:
        """To another address, with the same sockets."""
        self.network.detach(self.hosts[dht])
        self.attach(dht, host)

    def cut_off(self, *lonely: HyperDHT) -> None:
        left = {self.hosts[dht] for dht in lonely}
        self.network.partition(left, set(self.hosts.values()) - left)

    def wait(self, seconds: float) -> None:
        self.network.run(until=self.network.now + seconds)

    def connects(self, seconds: float) -> bool:
        """Whether a newcomer, who remembers nothing, can connect in this time; it tries again as
        long as that takes."""
        deadline = self.network.now + seconds
        results: list[Connection] = []
        pending: list[object] = []
        newcomer = KeyPair.from_seed(self.seed.to_bytes(32, "big"))
        self.client._context.routes.clear()
        self.client._context.relays.clear()
        while self.network.now < deadline and not results:
            pending[:] = [None]
            self.client.connect(
                KEYS.public_key,
                self.network.now,
                key_pair=newcomer,
                on_open=lambda connection, _now: results.append(connection),
                on_error=lambda _error, _now: pending.clear(),
            )
            self.network.poke(self.hosts[self.client])
            self.network.run(until=deadline, done=lambda: bool(results) or not pending)
            if not results:
                self.wait(0.1)
        for connection in results:
            connection.stream.destroy(self.network.now)
            self.network.poke(self.hosts[self.client])
        return bool(results)

    def announced(self) -> bool:
        """Whether a node that could be asked forwards to where the server is."""
        [server] = self.server._servers.values()
        here = set(self.hosts[self.server].sockets.values())
        return any(relay.peer_address in here for relay in server.relays)


def silent(dht: HyperDHT) -> bool:
    return dht.node.silent


def firewalled(dht: HyperDHT) -> bool:
    return dht.node.firewalled


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", [0.0, 0.37, 0.71])
def test_an_hour_offline_is_cheap_and_over_at_once(seed: int, fraction: float) -> None:
    world = World(seed=100 * seed)
    server = world.server
    world.cut_off(server)
    wakes, sent = server.wakes, server.sent
    world.wait(HOUR + 10 * fraction)
    # Each costs far less than a millisecond.
    assert server.wakes - wakes < 2 * HOUR
    assert server.sent - sent < 2 * HOUR
    assert silent(server)
    world.network.heal()
    # The network has forgotten it by now.
    assert world.connects(BACK)
    assert not silent(server)
    assert server.node.online
    world.wait(BACK)
    assert len(server.node.table) == 4


def test_a_client_that_was_offline_connects_at_once() -> None:
    world = World()
    world.cut_off(world.client)
    world.wait(HOUR)
    world.network.heal()
    assert world.connects(BACK)


@pytest.mark.parametrize("reluctant", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_network_that_restarts_empty_is_told_again(seed: int, reluctant: bool) -> None:
    """On the same addresses: nobody else would notice."""
    world = World(seed=10 * seed, reluctant=reluctant)
    world.wait(HOUR / 10)
    for node in world.nodes:
        world.network.detach(world.hosts.pop(node))
    world.nodes = [world.node(number) for number in range(1, 5)]
    world.wait(8.5)
    assert world.connects(0.5)


@pytest.mark.parametrize("fraction", [0.0, 0.4, 0.8])
def test_a_network_that_was_away_for_an_hour(fraction: float) -> None:
    world = World()
    for node in world.nodes:
        world.network.detach(world.hosts.pop(node))
    wakes, sent = world.server.wakes, world.server.sent
    world.wait(HOUR + 10 * fraction)
    assert world.server.wakes - wakes < 2 * HOUR
    assert world.server.sent - sent < 2 * HOUR
    world.nodes = [world.node(number) for number in range(1, 5)]
    assert world.connects(BACK)


def test_without_its_bootstrap_nodes_it_finds_back_to_the_others() -> None:
    """An outage empties the table; those who were in it are asked all the same."""
    world = World()
    world.cut_off(world.server)
    world.network.detach(world.hosts.pop(world.nodes[0]))
    world.wait(HOUR)
    assert len(world.server.node.table) == 0
    world.network.heal()
    # Two searches, of which each waits 6 s for the one that is gone.
    world.wait(BACK + 12.0)
    assert world.announced()
    assert len(world.server.node.table) == 3


@pytest.mark.parametrize("firewalled", [True, False])
def test_a_server_with_another_address_is_found_there(firewalled: bool) -> None:
    world = World(firewalled=firewalled)
    world.wait(100)
    world.move(world.server, "10.0.0.99")
    assert not world.announced()
    world.wait(BACK)
    assert world.announced()
    assert world.server.node.public_host == "10.0.0.99"
    assert world.connects(1.0)


@pytest.mark.parametrize("seed", range(3))
def test_a_client_notices_that_it_was_moved(seed: int) -> None:
    """It asks nobody anything but whether the nodes of its table live."""
    world = World(seed=seed)
    changes: list[float] = []
    world.client.on_network_change.append(changes.append)
    world.wait(100)
    world.move(world.client, "10.0.0.99")
    world.wait(85)
    assert changes
    assert world.client.node.public_host == "10.0.0.99"


def test_an_open_server_that_moved_behind_a_firewall_sees_that() -> None:
    """Whether others reach its server socket is found out anew, though its own requests open ways
    for a while."""
    world = World()
    server = world.server
    assert not firewalled(server)
    opened: dict[tuple[Address, Address], float] = {}

    def firewall(_datagram: bytes, source: Address, destination: Address) -> bool:
        now = world.network.now
        if source[0] == "10.0.0.99":
            opened[source, destination] = now
        return destination[0] == "10.0.0.99" and opened.get((destination, source), -HOUR) < now - 60

    world.network.link.drop = firewall
    world.move(server, "10.0.0.99")
    world.wait(2 * BACK)
    assert firewalled(server)
    assert world.announced()
    world.wait(HOUR / 2)
    assert firewalled(server)
    # And without a firewall once more.
    world.network.link.drop = None
    world.move(server, "10.0.0.98")
    world.wait(2 * BACK)
    assert not firewalled(server)
    assert world.announced()


def test_nothing_of_it_happens_while_all_is_well() -> None:
    world = World()
    world.wait(60)
    changes: list[float] = []
    for dht in (world.server, world.client, *world.nodes):
        dht.on_network_change.append(changes.append)
    world.wait(HOUR)
    assert changes == []
    assert world.connects(1.0)
