"""Queries, against nodes that a test answers for by hand."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from hyperseaport.transport.dht import wire
from hyperseaport.transport.dht.addresses import node_id
from hyperseaport.transport.dht.node import Node, NodeConfig
from hyperseaport.transport.dht.query import CONCURRENCY, MAX_SEEN, SLOWED, Query
from hyperseaport.transport.dht.table import Contact, K
from hyperseaport.transport.dht.wire import Reply, Request
from hyperseaport.transport.encoding import encode_address
from hyperseaport.transport.transmit import SERVER_SOCKET, Address

HERE = ("10.255.0.1", 1)
TARGET = b"\x42" * 32


def distance(address: Address) -> int:
    return int.from_bytes(node_id(address)) ^ int.from_bytes(TARGET)


def far_to_near(count: int) -> list[Address]:
    """Addresses sorted by their distance to the target, the farthest first."""
    addresses = [(f"10.0.{n // 250}.{n % 250 + 1}", 49737) for n in range(count)]
    return sorted(addresses, key=distance, reverse=True)


class Stage:
    """A node whose every request the test sees and may answer."""

    def __init__(self, *contacts: Address, bootstrap: tuple[Address, ...] = ()) -> None:
        self.node = Node(NodeConfig(public_address=HERE), Random(1))
        self.node.start(0.0, server_port=HERE[1], client_port=2)
        self.node.on_deadline(0.0)
        self.node.config.bootstrap = bootstrap
        for address in contacts:
            self.node.table.add(Contact(node_id(address), address, 1))
        self.replies: list[Reply] = []
        self.done: list[Query] = []
        self.asked: list[Request] = []
        self.now = 0.0

    def query(self, nodes: Sequence[Address] = (), **options: object) -> Query:
        query = self.node.query(
            TARGET,
            wire.FIND_NODE,
            self.now,
            internal=True,
            nodes=nodes,
            on_reply=lambda reply, now: self.replies.append(reply),
            on_done=lambda query, now: self.done.append(query),
            **options,  # type: ignore[arg-type]
        )
        self.collect()
        return query

    def collect(self) -> list[Request]:
        """Take what the node has sent."""
        fresh = [
            wire.decode_request(b"".join(transmit.buffers), 0, HERE)
            for transmit in self.node.transmits(self.now)
        ]
        self.asked += fresh
        return fresh

    def answer(
        self, address: Address, closer: Sequence[Address] = (), error: int = 0, named: bool = True
    ) -> list[Request]:
        """Answer the request to ``address``; what the node asks then."""
        request = next(request for request in self.asked if request.to == address)
        self.asked.remove(request)
        datagram = wire.encode_response(
            request.tid,
            HERE,
            id=node_id(address) if named else None,
            closer_nodes=list(closer),
            error=error,
        )
        self.node.receive(datagram, SERVER_SOCKET, address, self.now)
        return self.collect()

    def run(self, until: float) -> list[Request]:
        fresh = []
        while (deadline := self.node.deadline()) is not None and deadline <= until:
            self.now = max(self.now, deadline)
            self.node.on_deadline(self.now)
            fresh += self.collect()
        self.now = until
        return fresh


def test_nobody_to_ask_ends_it_after_the_call() -> None:
    stage = Stage()
    query = stage.query()
    assert stage.done == []
    stage.run(0.0)
    assert stage.done == [query]
    assert query.closest == []


def test_it_follows_closer_nodes_and_sorts_what_answered() -> None:
    first, second, third = far_to_near(3)
    stage = Stage(first)
    query = stage.query()
    assert [r.to for r in stage.asked] == [first]
    assert [r.to for r in stage.answer(first, [second, HERE])] == [second]
    assert [r.to for r in stage.answer(second, [third, first])] == [third]
    assert stage.done == []
    stage.answer(third)
    assert stage.done == [query]
    assert [reply.source for reply in query.closest] == [third, second, first]
    assert [reply.source for reply in stage.replies] == [first, second, third]
    assert (query.successes, query.errors) == (3, 0)


def test_no_more_requests_at_once_than_the_concurrency() -> None:
    addresses = far_to_near(K)
    stage = Stage(*addresses)
    stage.query()
    assert len(stage.asked) == CONCURRENCY
    assert len(stage.answer(stage.asked[0].to)) == 1


def test_a_list_is_read_up_to_the_first_node_that_is_not_closer() -> None:
    addresses = far_to_near(K + 4)
    far, farther, near, *rest = addresses[1], addresses[0], addresses[-1], *addresses[2:-1]
    stage = Stage(*rest[:K])
    stage.query(concurrency=K)
    for address in rest[: K - 1]:
        stage.answer(address)
    # The last answer fills the list of the closest; only then is anything too far.
    assert [r.to for r in stage.answer(rest[K - 1], [near, far, farther])] == [near]
    stage.answer(near)
    assert len(stage.done) == 1
    assert len(stage.done[0].closest) == K


def test_bootstrap_nodes_are_asked_as_long_as_the_table_is_small() -> None:
    (boot, other, *contacts) = far_to_near(K + 2)
    stage = Stage(contacts[0], bootstrap=(boot,))
    stage.query()
    assert {r.to for r in stage.asked} == {boot, contacts[0]}
    stage = Stage(*contacts, bootstrap=(boot, other))
    stage.query(concurrency=100)
    assert {r.to for r in stage.asked} == set(contacts)


def test_given_nodes_come_first_and_few_at_a_time_when_they_suffice() -> None:
    contact, *given = far_to_near(K + 1)
    stage = Stage(contact)
    query = stage.query(given)
    assert {r.to for r in stage.asked} == set(given[:CONCURRENCY])
    for request in list(stage.asked)[: CONCURRENCY - SLOWED]:
        assert stage.answer(request.to) == []
    assert len(stage.asked) == SLOWED
    query.cancel()


def test_given_nodes_that_do_not_suffice_are_joined_by_the_table() -> None:
    contact, *given = far_to_near(K + 1)
    stage = Stage(contact)
    stage.query(given, retries=0)
    assert contact not in {r.to for r in stage.asked}
    assert contact in {r.to for r in stage.run(5.0)}


def test_an_error_counts_but_its_closer_nodes_are_used() -> None:
    first, second = far_to_near(2)
    stage = Stage(first)
    query = stage.query()
    assert [r.to for r in stage.answer(first, [second], error=1)] == [second]
    stage.answer(second, named=False)
    assert stage.done == [query]
    assert (query.successes, query.errors) == (1, 1)
    assert [reply.source for reply in stage.replies] == [second]
    # Without an id nobody is a result.
    assert query.closest == []


def test_referrers_learn_of_a_dead_node_once_and_later_ones_too() -> None:
    first, second, dead = far_to_near(3)
    stage = Stage(first, second)
    stage.query(retries=0)
    stage.answer(first, [dead])
    hints = [r for r in stage.run(1.0) if r.command == wire.DOWN_HINT]
    assert [(r.to, r.value) for r in hints] == [(first, encode_address(dead))]
    # `second` was silent as well and is given up; nobody had named it.
    assert len(stage.done) == 1


def test_a_node_that_names_a_node_known_as_dead_is_told_at_once() -> None:
    first, second, dead = far_to_near(3)
    stage = Stage(first)
    stage.query(retries=0)
    stage.answer(first, [second, dead])
    stage.now = 0.9
    stage.run(0.9)
    stage.node.on_deadline(0.9)
    extra = ("10.9.9.9", 9)
    stage.answer(second, [extra, dead])
    stage.run(1.0)
    hints = {r.to for r in stage.asked if r.command == wire.DOWN_HINT}
    assert hints == {first, second}
    stage.asked = [r for r in stage.asked if r.command != wire.DOWN_HINT]
    stage.now = 1.1
    fresh = stage.answer(extra, [dead])
    assert [(r.command, r.to) for r in fresh] == [(wire.DOWN_HINT, extra)]


def test_a_slow_node_makes_room_for_another() -> None:
    addresses = far_to_near(K)
    stage = Stage(*addresses)
    stage.query()
    fresh = {r.to for r in stage.run(1.0)}
    # Ten retransmissions, and one more node for each that is slow.
    assert fresh == set(addresses)


def test_it_ends_without_the_slow_ones_once_the_closest_are_complete() -> None:
    slow, *addresses = far_to_near(K + 1)
    stage = Stage(*addresses[1:])
    stage.query(nodes=[slow], concurrency=K + 1)
    stage.answer(addresses[1], [addresses[0]])
    for address in addresses:
        if address != addresses[1]:
            stage.answer(address)
    assert stage.done == []
    stage.run(1.0)
    assert len(stage.done) == 1


def test_commit_goes_to_the_closest_and_done_waits_for_it() -> None:
    first, second = far_to_near(2)
    stage = Stage(first, second)
    commits = []
    query = stage.query(commit=lambda reply, done, now: commits.append((reply, done)))
    stage.answer(first)
    stage.answer(second)
    assert [reply.source for reply, _ in commits] == [second, first]
    assert stage.done == []
    commits[0][1](None, 0.0)
    commits[0][1](commits[0][0], 0.0)
    assert stage.done == []
    commits[1][1](commits[1][0], 0.0)
    assert stage.done == [query]
    assert (query.committed, query.failed) == (1, False)


def test_nobody_to_commit_to_is_a_failure() -> None:
    stage = Stage()
    query = stage.query(commit=lambda reply, done, now: done(reply, now))
    stage.run(0.0)
    assert stage.done == [query]
    assert query.failed


def test_a_cancelled_query_is_silent() -> None:
    first, second = far_to_near(2)
    stage = Stage(first, second)
    query = stage.query()
    stage.answer(first)
    query.cancel()
    request = stage.asked[0]
    datagram = wire.encode_response(request.tid, HERE, id=node_id(second))
    stage.node.receive(datagram, SERVER_SOCKET, second, 0.0)
    stage.run(4.9)
    assert len(stage.replies) == 1
    assert stage.done == []
    assert stage.node.in_flight == 0


def test_cancelling_from_a_reply_asks_nobody_else() -> None:
    first, second = far_to_near(2)
    stage = Stage(first)
    query = stage.node.query(
        TARGET,
        2,
        0.0,
        on_reply=lambda reply, now: query.cancel(),
        on_done=lambda query, now: stage.done.append(query),
    )
    stage.collect()
    assert stage.answer(first, [second]) == []
    assert stage.done == []


def test_invented_nodes_cannot_feed_a_query_forever() -> None:
    rng = Random(5)
    liar = ("10.7.7.7", 7)
    stage = Stage(liar)
    query = stage.query(retries=0)
    answered = 0
    while stage.asked and answered < 2 * MAX_SEEN:
        answered += 1
        invented = [(f"11.{rng.randrange(256)}.{rng.randrange(256)}.1", 9) for _ in range(K)]
        stage.answer(stage.asked[0].to, invented, named=False)
    assert answered <= MAX_SEEN + 1
    assert stage.done == [query]
