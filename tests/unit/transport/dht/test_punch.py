from __future__ import annotations

from random import Random
from typing import Any

import pytest
from support.dht_fakes import FakeNode, reply

from hyperseaport.transport.dht import punch as limits
from hyperseaport.transport.dht import punches as node_limits
from hyperseaport.transport.dht.messages import Firewall
from hyperseaport.transport.dht.nat import Verdict
from hyperseaport.transport.dht.punch import LOW_TTL, Puncher, Started
from hyperseaport.transport.dht.punches import PUNCH, Punches
from hyperseaport.transport.dht.wire import PING
from hyperseaport.transport.transmit import CLIENT_SOCKET, Address, Transmit

KEY = bytes(32)
PEER = ("6.0.0.1", 6000)
OTHER = ("6.0.0.2", 6000)
MINE = (("5.0.0.1", 100),)
CONSISTENT = Verdict(Firewall.CONSISTENT, MINE)
RANDOM = Verdict(Firewall.RANDOM, (("5.0.0.1", 0),))


class Fixture:
    def __init__(self) -> None:
        self.node = FakeNode()
        self.punches = Punches(self.node, Random(1))  # type: ignore[arg-type]
        self.paths: list[tuple[int, Address]] = []
        self.exhausted: list[float] = []

    def puncher(
        self, local: Verdict = CONSISTENT, *, initiator: bool = True, key: bytes = KEY
    ) -> Puncher:
        def found(socket: int, address: Address, _now: float) -> None:
            self.paths.append((socket, address))

        puncher = self.punches.create(
            key, on_path=found if initiator else None, on_exhausted=self.exhausted.append
        )
        assert puncher is not None
        puncher.local = local
        return puncher

    def sent(self) -> list[Transmit]:
        outbox, self.punches.outbox = self.punches.outbox, []
        assert all(transmit.buffers == (PUNCH,) for transmit in outbox)
        return outbox

    def receive(self, source: Address, socket: int = CLIENT_SOCKET) -> None:
        self.punches.receive(socket, source, self.node.now)


def test_opening_dies_on_the_way_and_knocking_does_not() -> None:
    """Checklist 53."""
    fixture = Fixture()
    puncher = fixture.puncher()
    puncher.open(PEER, 0.0)
    puncher.knock(PEER, 0.0)
    puncher.knock(("6.0.0.1", 0), 0.0)
    opening, knock = fixture.sent()
    assert (opening.socket, opening.address, opening.ttl) == (CLIENT_SOCKET, PEER, LOW_TTL)
    assert knock.ttl == 0
    assert fixture.punches.stats.dropped == 1


def test_the_initiator_takes_a_punch_from_where_it_is_expected() -> None:
    fixture = Fixture()
    puncher = fixture.puncher()
    puncher.expect(PEER)
    fixture.receive(OTHER)
    assert not fixture.paths
    fixture.receive(PEER)
    assert fixture.paths == [(CLIENT_SOCKET, PEER)]
    assert puncher.closed
    fixture.receive(PEER)
    assert len(fixture.paths) == 1
    assert fixture.punches.stats.stray == 2
    assert len(fixture.punches) == 0


def test_another_port_of_the_host_has_to_answer_first() -> None:
    """Whoever only writes the host into a datagram cannot answer for it."""
    fixture = Fixture()
    puncher = fixture.puncher()
    puncher.expect(PEER)
    for port in range(1, 10):
        fixture.receive((PEER[0], port))
        fixture.receive((PEER[0], port))
    checks = fixture.node.asked(PING)
    assert len(checks) == limits.MAX_CHECKS
    fixture.node.answer(checks[0], None)
    assert not fixture.paths
    fixture.node.answer(checks[1], reply(checks[1].to))
    assert fixture.paths == [(CLIENT_SOCKET, (PEER[0], 2))]
    assert all(check.cancelled for check in checks[2:])


def test_the_other_side_echoes() -> None:
    fixture = Fixture()
    for _ in range(2):
        fixture.puncher(initiator=False).expect(PEER)
    fixture.receive(OTHER)
    assert not fixture.sent()
    fixture.receive((PEER[0], 7))
    (echo,) = fixture.sent()
    assert (echo.socket, echo.address, echo.ttl) == (CLIENT_SOCKET, (PEER[0], 7), 0)
    assert not fixture.paths


def test_echoes_and_punches_are_bounded() -> None:
    fixture = Fixture()
    fixture.puncher(initiator=False).expect(PEER)
    for _ in range(int(node_limits.ECHOES_BURST) + 100):
        fixture.receive(PEER)
    assert len(fixture.sent()) == node_limits.ECHOES_BURST
    assert fixture.punches.stats.dropped == 100
    for _ in range(5000):
        fixture.punches.send(1, PEER, 0, 0.0)
    assert len(fixture.sent()) == node_limits.PUNCHES_BURST - node_limits.ECHOES_BURST
    assert fixture.punches.send(1, PEER, 0, 1.0)


def test_consistent_punching() -> None:
    """5.6: ten rounds, to what is verified; to the rest in the fourth and the eighth."""
    fixture = Fixture()
    puncher = fixture.puncher()
    puncher.learn(Firewall.CONSISTENT, (PEER, OTHER), PEER[0])
    assert puncher.start(0.0) is Started.YES
    assert puncher.start(0.0) is Started.YES
    fixture.node.wait(60)
    sent = [transmit.address for transmit in fixture.sent()]
    assert sent.count(PEER) == limits.ROUNDS
    assert sent.count(OTHER) == 2
    assert len(fixture.exhausted) == 1
    assert fixture.exhausted[0] < 10
    assert puncher.closed
    assert fixture.node.timers.deadline() is None


def test_the_side_that_was_asked_opens_first_and_punches_later() -> None:
    fixture = Fixture()
    puncher = fixture.puncher(initiator=False)
    puncher.learn(Firewall.OPEN, (PEER,), PEER[0])
    assert puncher.start(0.0) is Started.YES
    (opening,) = fixture.sent()
    assert opening.ttl == LOW_TTL
    fixture.node.wait(limits.RESPONDER_WAIT)
    (knock,) = fixture.sent()
    assert knock.ttl == 0


@pytest.mark.parametrize(
    ("local", "firewall", "addresses", "verified"),
    [
        (Verdict(), Firewall.CONSISTENT, (PEER,), PEER[0]),
        (CONSISTENT, Firewall.UNKNOWN, (PEER,), PEER[0]),
        (CONSISTENT, 99, (PEER,), PEER[0]),
        (RANDOM, Firewall.RANDOM, (PEER,), PEER[0]),
        (CONSISTENT, Firewall.CONSISTENT, (), None),
        (CONSISTENT, Firewall.RANDOM, (PEER,), None),
        (RANDOM, Firewall.CONSISTENT, (PEER,), OTHER[0]),
    ],
)
def test_what_cannot_be_punched(
    local: Verdict, firewall: int, addresses: tuple[Address, ...], verified: str | None
) -> None:
    """A search needs proof of where the other side is: else anybody could have us flood anybody."""
    fixture = Fixture()
    puncher = fixture.puncher(local)
    puncher.learn(firewall, addresses, verified)
    assert puncher.start(0.0) is Started.IMPOSSIBLE
    assert not fixture.sent()
    assert not fixture.punches.sockets.changed


def test_trying_ports() -> None:
    fixture = Fixture()
    puncher = fixture.puncher()
    puncher.learn(Firewall.RANDOM, ((PEER[0], 0),), PEER[0])
    assert puncher.start(0.0) is Started.YES
    fixture.node.wait(5)
    sent = fixture.sent()
    assert len(sent) == pytest.approx(5 / limits.TRY_EVERY, abs=2)
    assert {transmit.address[0] for transmit in sent} == {PEER[0]}
    ports = [transmit.address[1] for transmit in sent]
    assert len(set(ports)) == len(ports)
    assert all(limits.PORTS[0] <= port <= limits.PORTS[1] for port in ports)
    fixture.node.wait(60)
    assert len(sent) + len(fixture.sent()) == limits.TRIES
    assert len(fixture.exhausted) == 1
    assert fixture.punches.random_pause(fixture.exhausted[0]) == node_limits.RANDOM_PAUSE


def test_many_sockets() -> None:
    """Checklist 55: 256 sockets, the first of each with a low TTL, 20 ms between two datagrams."""
    fixture = Fixture()
    puncher = fixture.puncher(RANDOM)
    puncher.expect(("6.0.0.1", 7))
    puncher.learn(Firewall.CONSISTENT, (PEER,), PEER[0])
    assert puncher.start(0.0) is Started.YES
    fixture.node.wait(0.1)
    opened = fixture.punches.sockets.opened()
    assert len(opened) == limits.BIRTHDAY_SOCKETS
    first = fixture.sent()
    assert [transmit.socket for transmit in first] == opened
    assert {(t.address, t.ttl) for t in first} == {(PEER, LOW_TTL)}
    fixture.node.wait(10.5)
    cycle = fixture.sent()
    assert [transmit.socket for transmit in cycle[:256]] == opened
    assert {transmit.ttl for transmit in cycle[:256]} == {LOW_TTL}
    assert {transmit.ttl for transmit in cycle[256:]} == {0}
    # A punch on any of them ends it; that one stays open, and the others do not.
    fixture.receive(PEER, opened[100])
    assert fixture.paths == [(opened[100], PEER)]
    assert sorted(fixture.punches.sockets.closed()) == sorted(set(opened) - {opened[100]})
    assert fixture.punches.sockets.usable(opened[100])
    assert fixture.node.timers.deadline() is None


def test_one_search_at_a_time() -> None:
    """Checklist 49."""
    fixture = Fixture()
    first, second = fixture.puncher(), fixture.puncher(RANDOM)
    first.learn(Firewall.RANDOM, (PEER,), PEER[0])
    second.learn(Firewall.CONSISTENT, (PEER,), PEER[0])
    assert first.reserve(0.0)
    assert first.reserve(0.0)
    assert second.start(0.0) is Started.BUSY
    assert fixture.punches.random_pause(0.0) == node_limits.RANDOM_PAUSE
    # A search that was only planned needs no pause.
    first.close(0.0)
    assert second.start(0.0) is Started.YES
    second.close(1.0)
    third = fixture.puncher()
    third.learn(Firewall.RANDOM, (PEER,), PEER[0])
    assert third.start(20.9) is Started.BUSY
    assert third.start(21.0) is Started.YES


def test_punchers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_limits, "MAX_PUNCHERS", 4)
    monkeypatch.setattr(node_limits, "MAX_PUNCHERS_PER_KEY", 2)
    fixture = Fixture()
    made = [fixture.punches.create(bytes([n // 3]) * 32) for n in range(9)]
    assert [puncher is not None for puncher in made] == [True, True, False] * 2 + [False] * 3
    assert fixture.punches.stats.dropped == 5
    for puncher in made:
        if puncher is not None:
            puncher.close(0.0)
            puncher.close(0.0)
    assert fixture.punches.create(KEY) is not None


def test_what_a_peer_says_is_bounded() -> None:
    fixture = Fixture()
    puncher = fixture.puncher()
    for batch in range(50):
        addresses = tuple((f"6.0.{batch}.{n}", 1) for n in range(64))
        puncher.learn(Firewall.CONSISTENT, addresses, None)
        puncher.expect((f"7.0.0.{batch}", 1))
    assert len(puncher.expected) <= limits.MAX_TARGETS
    assert len(fixture.punches._by_host) <= 2 * limits.MAX_TARGETS
    puncher.start(0.0)
    fixture.node.wait(60)
    assert len(fixture.sent()) <= limits.ROUNDS * limits.MAX_TARGETS
    assert not fixture.punches._by_host


class Contact:
    def __init__(self, address: Address) -> None:
        self.address = address


def test_another_socket_is_tried_while_the_class_is_of_no_use() -> None:
    """7.3"""
    fixture = Fixture()
    fixture.node.table = [Contact((f"9.0.0.{n}", 1)) for n in range(4)]
    puncher = fixture.puncher(RANDOM)
    puncher.remote_firewall = Firewall.RANDOM
    done: list[float] = []
    puncher.stabilise(0.0, done.append)
    for attempt in range(limits.MAX_REOPENS):
        assert not done
        socket = puncher.socket
        assert fixture.punches.sockets.opened() == [socket]
        last = attempt == limits.MAX_REOPENS - 1
        for index, ping in enumerate(fixture.node.asked(PING)):
            assert ping.options["socket"] == socket
            seen = reply(ping.to, socket=socket)
            seen.to = ("5.0.0.1", 100 if last else 100 + index)
            fixture.node.answer(ping, seen)
            if done:
                break
    assert puncher.local == CONSISTENT
    assert not puncher.unstable
    assert len(fixture.punches.sockets) == 1
    puncher.stabilise(0.0, done.append)
    assert len(done) == 2
    puncher.analyse(0.0, done.append)
    assert len(done) == 3
    puncher.close(0.0)
    assert len(fixture.punches.sockets) == 0


def test_closing_cancels_everything() -> None:
    fixture = Fixture()
    fixture.node.table = [Contact((f"9.0.0.{n}", 1)) for n in range(4)]
    done: list[Any] = []
    one, other = fixture.puncher(), fixture.puncher(Verdict())
    one.analyse(0.0, done.append)
    other.stabilise(0.0, done.append)
    fixture.punches.close()
    assert not fixture.node.asked(PING)
    assert fixture.node.timers.deadline() is None
    assert len(fixture.punches) == len(fixture.punches.sockets) == 0
    assert not done
