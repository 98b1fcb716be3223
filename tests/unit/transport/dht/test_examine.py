"""What a node finds out about its host, with simulated NATs of all kinds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.nats import NODES as ALL
from support.nats import ONE_WAY, Peer, World

from hyperseaport.testing.nat import Nat
from hyperseaport.testing.network import Link
from hyperseaport.transport.dht import examine as limits
from hyperseaport.transport.dht.examine import Examination, Findings
from hyperseaport.transport.dht.messages import Firewall
from hyperseaport.transport.dht.node import NodeConfig
from hyperseaport.transport.transmit import Address

#: Seconds within which it must be over, whatever the network does.
LIMIT = limits.APART + limits.ROUND + 2 * limits.HAIRPIN_TIMEOUT + 0.1


class Look:
    """One examination of a peer."""

    def __init__(self, world: World, peer: Peer) -> None:
        self.findings: Findings | None = None
        self._world = world
        self._began = world.network.now
        self.took = 0.0
        local = tuple(dict.fromkeys(host for host, _ in peer.host.sockets.values()))
        Examination(peer.dht.node, local, self._done).start(world.network.now)
        world.poke(peer)

    def _done(self, findings: Findings, now: float) -> None:
        assert self.findings is None, "it is told twice"
        self.findings, self.took = findings, now - self._began

    def wait(self) -> Findings:
        assert self._world.run(lambda: self.findings is not None, LIMIT)
        # Nothing comes after it.
        self._world.wait(LIMIT)
        assert self.findings is not None
        return self.findings


def look(world: World, peer: Peer) -> Findings:
    return Look(world, peer).wait()


def places(findings: Findings) -> list[set[Address]]:
    return [set(seen) for _, seen in findings.seen]


@pytest.fixture
def world() -> World:
    return World(5)


@pytest.mark.parametrize(
    ("kind", "firewall"),
    [
        ("open", Firewall.OPEN),
        ("consistent", Firewall.CONSISTENT),
        ("double", Firewall.CONSISTENT),
        ("random", Firewall.RANDOM),
    ],
)
def test_each_kind_of_nat(world: World, kind: str, firewall: Firewall) -> None:
    peer = world.peer(kind)
    seen = Look(world, peer)
    findings = seen.wait()
    assert findings.reachable
    assert findings.firewall == firewall
    assert findings.translated == (kind != "open")
    assert findings.stable is True
    assert findings.asked == ALL
    assert findings.round_trips == pytest.approx([2 * ONE_WAY] * ALL)
    assert [port for port, _ in findings.seen] == [49737, 49738]
    assert [len(each) for each in places(findings)] == [ALL if kind == "random" else 1] * 2
    assert findings.public_hosts == (f"6.0.{world.hosts}.1",)
    assert seen.took < limits.APART + 1


@pytest.mark.parametrize("hairpin", [False, True])
def test_what_comes_back_in_at_the_own_router(world: World, hairpin: bool) -> None:
    nat = world.nat("consistent")
    assert nat is not None
    nat.hairpin = hairpin
    assert look(world, world.peer(nat=nat)).hairpin is hairpin


@pytest.mark.parametrize("kind", ["open", "random"])
def test_there_is_nothing_to_come_back_to(world: World, kind: str) -> None:
    assert look(world, world.peer(kind)).hairpin is None


@pytest.mark.parametrize("preserving", [False, True])
def test_whether_ports_are_kept(world: World, preserving: bool) -> None:
    nat = world.nat("consistent")
    assert nat is not None
    nat.preserving = preserving
    findings = look(world, world.peer(nat=nat))
    assert findings.port_kept is preserving
    assert findings.firewall == Firewall.CONSISTENT


def test_a_nat_that_lets_strangers_in_is_open(world: World) -> None:
    nat = world.nat("consistent")
    assert nat is not None
    peer = world.peer(nat=nat)
    assert peer.dht.node.firewalled
    # As a forwarded port is: there before anything is sent, and for everybody.
    nat.filtering, nat.preserving = False, True
    nat.reboot()
    nat.outbound(("192.168.0.10", 49737), ("5.0.0.99", 1), world.network.now)
    findings = look(world, peer)
    assert findings.firewall == Firewall.OPEN
    assert findings.translated


def test_a_firewall_without_a_nat(world: World) -> None:
    """The host has the public address itself, and only answers get in."""
    nat = world.nat("consistent")
    assert nat is not None
    nat.preserving = True
    peer = world.peer(nat=nat)
    findings: list[Findings] = []
    Examination(peer.dht.node, (nat.host,), lambda found, _now: findings.append(found)).start(
        world.network.now
    )
    world.poke(peer)
    assert world.run(lambda: bool(findings), LIMIT)
    assert findings[0].firewall == Firewall.CONSISTENT
    assert not findings[0].translated
    assert findings[0].hairpin is None


def reboot(nat: Nat) -> None:
    nat.reboot()


def renumber(nat: Nat) -> None:
    nat.random = not nat.random


@pytest.mark.parametrize("event", [reboot, renumber])
@pytest.mark.parametrize("kind", ["consistent", "random"])
def test_a_nat_that_changes_meanwhile(
    world: World, kind: str, event: Callable[[Nat], None]
) -> None:
    peer = world.peer(kind)
    seen = Look(world, peer)
    world.wait(limits.APART / 2)
    assert peer.nat is not None
    event(peer.nat)
    assert seen.wait().stable is False


def test_a_network_too_small_to_tell() -> None:
    world = World(1)
    for node in world.nodes[2:]:
        world.remove(node)
    world.run(lambda: False, 1)
    config = NodeConfig(bootstrap=world.bootstrap, ephemeral=True)
    peer = world.start(config, "192.168.0.10", world.nat("consistent"))
    findings = look(world, peer)
    assert findings.reachable
    assert len(findings.round_trips) == 2
    assert findings.firewall == Firewall.UNKNOWN


def test_nobody_answers() -> None:
    world = World(1)
    for node in world.nodes:
        world.remove(node)
    config = NodeConfig(bootstrap=world.bootstrap, ephemeral=True)
    seen = Look(world, world.start(config, "192.168.0.10", world.nat("consistent")))
    findings = seen.wait()
    assert seen.took == 0
    assert findings == Findings(("192.168.0.10",), 1, ())
    assert not findings.reachable
    assert not findings.translated


def test_nobody_answers_any_more(world: World) -> None:
    """The network goes away after the bootstrap."""
    peer = world.peer("consistent")
    for node in world.nodes:
        world.remove(node)
    findings = look(world, peer)
    assert not findings.reachable
    assert findings.asked == ALL
    assert findings.firewall == Firewall.UNKNOWN
    assert findings.port_kept is None
    assert findings.stable is None
    assert findings.hairpin is None


@pytest.mark.parametrize("kind", ["open", "consistent", "random"])
def test_some_that_do_not_answer_change_nothing(world: World, kind: str) -> None:
    peer = world.peer(kind)
    expected = look(world, peer).firewall
    for node in world.nodes[4:9]:
        world.remove(node)
    findings = look(world, peer)
    assert findings.firewall == expected
    assert len(findings.round_trips) == ALL - 5
    # Dead nodes are not taken for an outage of our own.
    assert not peer.dht.node.silent


@pytest.mark.parametrize("kind", ["open", "consistent", "random"])
def test_through_a_lossy_network(kind: str) -> None:
    world = World(9, Link(delay=ONE_WAY, loss=0.1))
    peer = world.peer(kind)
    expected = {"open": Firewall.OPEN, "consistent": Firewall.CONSISTENT, "random": Firewall.RANDOM}
    findings = look(world, peer)
    assert findings.firewall == expected[kind]
    assert len(findings.round_trips) >= ALL - 2


def test_nodes_that_leave_pings_unanswered_are_asked_otherwise(world: World) -> None:
    """As they do after a restart (spec: hyperdht 4.1)."""
    for node in world.nodes:
        node.dht.node.config.ignore_idless_pings = 1e9
    findings = look(world, world.peer("consistent"))
    assert len(findings.round_trips) == ALL
    assert findings.firewall == Firewall.CONSISTENT
