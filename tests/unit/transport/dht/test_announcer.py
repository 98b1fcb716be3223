from __future__ import annotations

from dataclasses import replace
from typing import Any

from support.dht_fakes import MINE, FakeNode, FakeRequest, reply

from hyperseaport.transport import keys
from hyperseaport.transport.dht import announcer, messages
from hyperseaport.transport.dht.addresses import node_id
from hyperseaport.transport.dht.announcer import Announcer
from hyperseaport.transport.dht.messages import Announce, PeerRecord, Relay, announce_signable
from hyperseaport.transport.dht.wire import PING
from hyperseaport.transport.keys import KeyPair
from hyperseaport.transport.transmit import Address

KEYS = KeyPair.from_seed(bytes([1]) * 32)
TARGET = keys.target(KEYS.public_key)
NODES = [(f"5.0.0.{n}", 49737) for n in range(1, 6)]
RECORD = PeerRecord(KEYS.public_key).encode()


class Fixture:
    def __init__(self) -> None:
        self.node = FakeNode()
        self.announced: list[float] = []
        fake: Any = self.node
        self.announcer = Announcer(fake, KEYS, self.announced.append)

    def cycle(self, nodes: list[Address] = NODES) -> list[FakeRequest]:
        """Answer the query; returns the announcements."""
        query = self.node.queries[-1]
        assert (query.target, query.command) == (TARGET, messages.FIND_PEER)
        self.node.finish(query, *(reply(node) for node in nodes))
        return self.node.asked(messages.ANNOUNCE)

    def announce(self, nodes: list[Address] = NODES) -> None:
        for request in self.cycle(nodes):
            self.node.answer(request, reply(request.to))

    def started(self) -> Fixture:
        self.announcer.refresh(0.0)
        self.announce()
        return self

    @property
    def relays(self) -> list[Address]:
        return [relay.relay_address for relay in self.announcer.relays]


def signed_for(request: FakeRequest, namespace: bytes) -> bool:
    announce = Announce.decode(request.options["value"])
    assert announce.peer == PeerRecord(KEYS.public_key)
    signable = announce_signable(
        namespace, TARGET, node_id(request.to), request.options["token"], RECORD
    )
    return keys.verify(announce.signature or b"", signable, KEYS.public_key)


def test_it_announces_at_the_three_closest() -> None:
    """Checklist 40."""
    fixture = Fixture()
    fixture.announcer.refresh(0.0)
    requests = fixture.cycle()
    assert [request.to for request in requests] == NODES[:3]
    assert all(signed_for(request, keys.NS_ANNOUNCE) for request in requests)
    for request in reversed(requests):
        fixture.node.answer(request, reply(request.to))
    assert fixture.announcer.relays == tuple(Relay(node, MINE) for node in reversed(NODES[:3]))
    assert fixture.announced == [0.0]


def test_it_waits_for_the_node() -> None:
    fixture = Fixture()
    fixture.node.ready = False
    fixture.announcer.refresh(0.0)
    assert not fixture.node.queries


def test_nodes_without_a_token_are_left_out() -> None:
    fixture = Fixture()
    fixture.announcer.refresh(0.0)
    fixture.node.finish(
        fixture.node.queries[0], reply(NODES[0], token=None), *(reply(n) for n in NODES[1:])
    )
    assert [request.to for request in fixture.node.asked(messages.ANNOUNCE)] == NODES[1:4]


def test_a_relay_that_refuses_is_none() -> None:
    fixture = Fixture()
    fixture.announcer.refresh(0.0)
    first, second, third = fixture.cycle()
    fixture.node.answer(first, reply(first.to, error=2))
    fixture.node.answer(second, None)
    assert not fixture.announced
    fixture.node.answer(third, reply(third.to))
    assert fixture.relays == [NODES[2]]
    assert fixture.announced == [0.0]


def test_relays_are_pinged_every_three_seconds() -> None:
    """Checklist 40."""
    fixture = Fixture().started()
    node = fixture.node
    node.wait(2.9)
    assert not node.requests
    for round_number in range(1, 3):
        node.wait(0.1 if round_number == 1 else 3.0)
        kind = messages.FIND_PEER if round_number % announcer.CHECK_EVERY == 0 else PING
        asked = node.asked(kind)
        assert [each.to for each in asked] == NODES[:3]
        for each in asked:
            node.answer(each, reply(each.to, RECORD))
    assert len(node.queries) == 1


def test_a_relay_that_does_not_answer_starts_a_new_cycle() -> None:
    fixture = Fixture().started()
    node = fixture.node
    node.wait(3.0)
    first, second, third = node.asked(PING)
    node.answer(first, None)
    node.answer(second, reply(second.to))
    assert len(node.queries) == 1
    node.answer(third, reply(third.to))
    assert len(node.queries) == 2
    assert node.queries[1].options["nodes"] == tuple(NODES)
    fixture.announce(NODES[1:])
    assert fixture.relays == NODES[1:4]
    assert len(fixture.announced) == 2
    # The lost relay is told as well, in case that it lives.
    (farewell,) = node.asked(messages.FIND_PEER)
    assert farewell.to == NODES[0]


def test_a_relay_that_forgot_starts_a_new_cycle() -> None:
    for forgotten in (None, PeerRecord(bytes(32)).encode(), b"\x01"):
        fixture = Fixture().started()
        node = fixture.node
        for _ in range(announcer.CHECK_EVERY - 1):
            node.wait(3.0)
            for ping in node.asked(PING):
                node.answer(ping, reply(ping.to))
        node.wait(3.0)
        first, second, third = node.asked(messages.FIND_PEER)
        assert first.options["target"] == TARGET
        node.answer(first, reply(first.to, RECORD))
        node.answer(second, reply(second.to, forgotten))
        node.answer(third, reply(third.to, RECORD))
        assert len(node.queries) == 2


def test_a_relay_that_sees_us_elsewhere_starts_a_new_cycle() -> None:
    """It forwards to where we were."""
    fixture = Fixture().started()
    node = fixture.node
    moved = ("7.0.0.2", 40000)

    def round_of_answers() -> None:
        node.wait(3.0)
        for request in list(node.requests):
            node.answer(request, replace(reply(request.to, RECORD), to=moved))

    round_of_answers()
    assert len(node.queries) == 2
    # A NAT that shows another address each time does not keep us busy: its relays still see the
    # one that was noted when they were found.
    fixture.announce()
    for _ in range(3):
        round_of_answers()
    assert len(node.queries) == 2
    for _ in range(3):
        round_of_answers()
    assert len(node.queries) == 3


def test_answers_to_a_cycle_that_was_given_up_do_nothing() -> None:
    """The node may begin a new one while it looks at the very answer."""
    fixture = Fixture().started()
    node = fixture.node
    node.wait(3.0)
    first, *_ = node.asked(PING)
    fixture.announcer.refresh(3.0)
    first.on_done(reply(first.to), 3.0)
    node.wait(30.0)
    assert len(node.queries) == 2
    announce, *_ = fixture.cycle()
    fixture.announcer.refresh(33.0)
    announce.on_done(reply(announce.to), 33.0)
    assert fixture.announced == [0.0]


def test_a_cycle_that_found_nobody_forgets_nobody() -> None:
    fixture = Fixture().started()
    fixture.announcer.refresh(1.0)
    fixture.announce([])
    fixture.node.wait(1.0)
    assert fixture.node.queries[-1].options["nodes"] == tuple(NODES)


def test_without_a_network_it_waits_for_the_node() -> None:
    fixture = Fixture()
    node = fixture.node
    fixture.announcer.refresh(0.0)
    fixture.announce([])
    node.silent = True
    node.wait(3600.0)
    assert len(node.queries) == 1
    fixture.announcer.refresh(node.now)
    assert len(node.queries) == 2
    fixture.announce()
    assert len(fixture.announced) == 1


def test_a_full_cycle_comes_after_a_hundred_rounds() -> None:
    fixture = Fixture().started()
    node = fixture.node
    rounds = 0
    while len(node.queries) == 1:
        node.wait(3.0)
        for request in list(node.requests):
            node.answer(request, reply(request.to, RECORD))
        rounds += 1
    assert rounds == announcer.ROUNDS + 1


def test_without_any_relay_it_tries_again_soon() -> None:
    fixture = Fixture()
    fixture.announcer.refresh(0.0)
    waits = []
    for _ in range(7):
        fixture.announce([])
        before = fixture.node.now
        cycles = len(fixture.node.queries)
        while len(fixture.node.queries) == cycles:
            fixture.node.wait(0.5)
        waits.append(fixture.node.now - before)
    assert waits == [1, 2, 3, 3, 3, 3, 3]
    assert not fixture.announced
    fixture.announce()
    assert len(fixture.announced) == 1


def test_a_persistent_node_answers_for_its_own_servers() -> None:
    fixture = Fixture()
    fixture.node.ephemeral = False
    fixture.announcer.refresh(0.0)
    fixture.announce([])
    assert fixture.announced == [0.0]


def test_refresh_replaces_a_cycle_under_way() -> None:
    fixture = Fixture()
    fixture.announcer.refresh(0.0)
    requests = fixture.cycle()
    fixture.announcer.refresh(1.0)
    assert all(request.cancelled for request in requests)
    fixture.announcer.refresh(2.0)
    assert fixture.node.queries[1].cancelled
    fixture.announce()
    assert fixture.relays == NODES[:3]


def test_close_unannounces_at_all_relays() -> None:
    """Checklist 50."""
    fixture = Fixture().started()
    node = fixture.node
    closed: list[float] = []
    fixture.announcer.close(1.0, closed.append)
    first, second, third = node.asked(messages.FIND_PEER)
    assert [first.to, second.to, third.to] == NODES[:3]
    node.answer(first, reply(first.to, RECORD))
    node.answer(second, reply(second.to, None))
    node.answer(third, None)
    (farewell,) = node.asked(messages.UNANNOUNCE)
    assert farewell.to == NODES[0]
    assert signed_for(farewell, keys.NS_UNANNOUNCE)
    assert not closed
    node.answer(farewell, reply(farewell.to))
    assert len(closed) == 1
    assert node.timers.deadline() is None
    fixture.announcer.refresh(2.0)
    assert len(node.queries) == 1


def test_close_without_relays_is_done_at_once() -> None:
    fixture = Fixture()
    fixture.announcer.refresh(0.0)
    closed: list[float] = []
    fixture.announcer.close(0.5, closed.append)
    assert closed == [0.5]
    assert fixture.node.queries[0].cancelled
