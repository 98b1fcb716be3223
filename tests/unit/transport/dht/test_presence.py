"""Whether anybody answers, and where they see us; the node is one that sends nothing."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from support.dht_fakes import MINE, FakeNode, reply

from hyperseaport.transport.dht.presence import (
    DOUBTS,
    LAST_RESORT,
    PAUSE,
    PROBE_EVERY,
    PROBES,
    SILENT_AFTER,
    Presence,
)
from hyperseaport.transport.dht.wire import FIND_NODE
from hyperseaport.transport.transmit import SERVER_SOCKET, Address

NODES = [(f"5.0.0.{n}", 49737) for n in range(1, 30)]
ELSEWHERE = ("7.7.7.7", 40000)


class Node(FakeNode):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(bootstrap=(NODES[0],))
        self.public_host: str | None = MINE[0]
        self.came: list[float] = []
        self.sampled: list[float] = []

    def came_back(self, now: float) -> None:
        self.came.append(now)

    def sample_again(self, now: float) -> None:
        self.sampled.append(now)


class Fixture:
    def __init__(self) -> None:
        self.node = Node()
        fake: Any = self.node
        self.presence = Presence(fake, Random(1))

    def lose(self, count: int) -> None:
        for _ in range(count):
            self.presence.unanswered(self.node.now)

    def hear(self, source: Address, to: Address = MINE, **options: Any) -> None:
        answer = reply(source, **options)
        answer.to = to
        self.presence.heard(answer, self.node.now)


@pytest.fixture
def it() -> Fixture:
    return Fixture()


def test_a_few_without_an_answer_are_nothing(it: Fixture) -> None:
    for _ in range(5):
        it.lose(SILENT_AFTER - 1)
        it.hear(NODES[0])
    assert not it.presence.silent
    assert it.node.timers.deadline() is None
    assert it.node.came == []


def test_in_silence_somebody_is_asked_now_and_then(it: Fixture) -> None:
    it.node.table = [SimpleNamespace(address=NODES[1])]
    it.presence.gone(NODES[2])
    it.lose(SILENT_AFTER + 2)
    asked: set[Address] = set()
    for _ in range(20):
        before = len(it.node.requests)
        it.node.wait(PROBE_EVERY)
        probes = it.node.requests[before:]
        assert len(probes) == PROBES
        assert {probe.command for probe in probes} == {FIND_NODE}
        assert {probe.options["retries"] for probe in probes} == {0}
        asked |= {probe.to for probe in probes}
    assert asked == set(NODES[:3])
    it.hear(NODES[1])
    assert it.node.came == [it.node.now]
    assert not it.presence.silent
    it.node.wait(60)
    assert len(it.node.requests) == 20 * PROBES
    assert it.node.timers.deadline() is None


def test_nobody_to_ask(it: Fixture) -> None:
    it.node.config.bootstrap = ()
    it.lose(SILENT_AFTER)
    it.node.wait(60)
    assert it.node.requests == []
    assert it.presence.silent


def test_before_the_bootstrap_is_over_silence_is_its_business(it: Fixture) -> None:
    it.node.ready = False
    it.lose(10)
    assert not it.presence.silent


def test_the_last_resort_is_limited(it: Fixture) -> None:
    for address in [*NODES, NODES[5]]:
        it.presence.gone(address)
    assert list(it.presence.last_resort)[-1] == NODES[5]
    assert len(it.presence.last_resort) == LAST_RESORT


def test_one_who_sees_us_elsewhere_is_not_believed(it: Fixture) -> None:
    it.node.table = list(range(10))
    for _ in range(10):
        it.hear(NODES[0], ELSEWHERE)
        it.hear(NODES[0], ELSEWHERE)
        it.hear(NODES[1])
    assert it.node.sampled == []


def test_when_several_see_us_elsewhere_we_look(it: Fixture) -> None:
    it.node.table = list(range(10))
    for source in NODES[:DOUBTS]:
        it.hear(source, ELSEWHERE)
    assert it.node.sampled == [0.0]
    # On a host with two ways out that goes on and on.
    for _ in range(int(2 * PAUSE)):
        it.node.now += 1.0
        for source in NODES[:DOUBTS]:
            it.hear(source, ELSEWHERE)
    assert it.node.sampled == [0.0, PAUSE, 2 * PAUSE]


def test_the_only_node_is_believed(it: Fixture) -> None:
    it.hear(NODES[0], ELSEWHERE)
    assert it.node.sampled == [0.0]


def test_what_says_nothing_about_where_we_are(it: Fixture) -> None:
    it.hear(NODES[0], ELSEWHERE, socket=SERVER_SOCKET)  # not the current one
    it.node.public_host = None
    it.hear(NODES[0], ELSEWHERE)
    assert it.node.sampled == []


def test_a_move_is_believed_once_in_a_while(it: Fixture) -> None:
    assert [it.presence.moves(now) for now in (1.0, 2.0, PAUSE, 1.0 + PAUSE)] == [
        True,
        False,
        False,
        True,
    ]
