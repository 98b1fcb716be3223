from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dht_fakes import FakeNode, FakeRequest, reply
from vectors import load

from hyperseaport.transport.dht import nat as limits
from hyperseaport.transport.dht.messages import Firewall
from hyperseaport.transport.dht.nat import UNKNOWN, Nat, Sampling, Survey, Verdict
from hyperseaport.transport.dht.wire import FIND_NODE, PING
from hyperseaport.transport.transmit import CLIENT_SOCKET, SERVER_SOCKET, Address

HERE = ("5.0.0.1", 100)
NODES = [(f"9.0.0.{n}", 49737) for n in range(1, 12)]
CONSISTENT = Verdict(Firewall.CONSISTENT, (HERE,))


class Contact:
    def __init__(self, address: Address) -> None:
        self.address = address


def known(*nodes: Address) -> FakeNode:
    node = FakeNode()
    node.table = [Contact(address) for address in nodes]
    return node


def answer(node: FakeNode, request: FakeRequest, to: Address | None) -> None:
    if to is None:
        node.answer(request, None)
        return
    seen = reply(request.to, socket=request.options["socket"])
    seen.to = to
    node.answer(request, seen)


@pytest.mark.parametrize("vector", load("hyperdht")["natClassification"], ids=lambda v: v["note"])
def test_recorded_samples(vector: dict[str, Any]) -> None:
    nat = Nat(is_open=not vector["dhtFirewalled"])
    for step in vector["steps"]:
        address, referrer = ((step[name]["host"], step[name]["port"]) for name in ("addr", "from"))
        nat.add(address, referrer)
        assert nat.sampled == step["sampled"]
        assert nat.verdict.firewall == step["firewall"]
        expected = [(each["host"], each["port"]) for each in step["addresses"] or []]
        assert list(nat.verdict.addresses) == expected


def test_when_it_is_finished() -> None:
    nat = Nat()
    for index in range(3):
        assert not nat.finished
        nat.add(HERE, NODES[index])
    assert bool(nat.finished)
    changing = Nat()
    for index in range(4):
        assert not changing.finished
        changing.add(("5.0.0.1", index + 1), NODES[index])
    assert bool(changing.finished)
    assert changing.verdict == Verdict(Firewall.RANDOM, (("5.0.0.1", 0),))
    assert not changing.verdict.consistent
    reachable = Nat(is_open=True)
    assert not reachable.finished
    reachable.add(HERE, NODES[0])
    assert bool(reachable.finished)
    assert reachable.verdict.consistent


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 40))))
def test_any_samples_are_taken(samples: list[tuple[int, int, int]]) -> None:
    nat = Nat()
    for host, port, referrer in samples:
        nat.add((f"5.0.0.{host}", port), ("9.0.0.1", referrer))
    assert nat.sampled <= limits.MAX_SAMPLES
    if nat.verdict.firewall == Firewall.CONSISTENT:
        assert all(address in nat._addresses for address in nat.verdict.addresses)
    if nat.sampled < 3:
        assert nat.verdict == UNKNOWN


def test_four_nodes_are_asked_from_the_socket() -> None:
    node, done = known(*NODES[:5]), list[float]()
    sampling = Sampling(node, 7, done.append)  # type: ignore[arg-type]
    sampling.start(0.0)
    pings = node.asked(PING)
    # The latest first (spec: hyperdht 7.1).
    assert [ping.to for ping in pings] == NODES[4:0:-1]
    assert all(p.options["socket"] == 7 and p.options["retries"] == 0 for p in pings)
    for ping in pings[:2]:
        answer(node, ping, HERE)
        assert not done
    answer(node, pings[2], HERE)
    assert done == [0.0]
    assert sampling.nat.verdict == CONSISTENT
    assert pings[3].cancelled
    assert node.timers.deadline() is None


def test_a_large_table_spares_those_heard_from_last() -> None:
    node = known(*NODES[:9])
    Sampling(node, 1, lambda _now: None).start(0.0)  # type: ignore[arg-type]
    assert [ping.to for ping in node.asked(PING)] == NODES[3::-1]


def test_silent_nodes_are_made_up_for() -> None:
    node, done = known(*NODES[:6]), list[float]()
    node.bootstrap = (("9.9.9.9", 1),)
    sampling = Sampling(node, 1, done.append)  # type: ignore[arg-type]
    sampling.start(0.0)
    for ping in node.asked(PING)[:2]:
        answer(node, ping, HERE)
    node.wait(limits.SECOND_PASS)
    # Two others, and the two silent ones by something else: they may have just started.
    assert [ping.to for ping in node.asked(PING)[2:]] == [NODES[1], NODES[0]]
    assert [ask.to for ask in node.asked(FIND_NODE)] == [NODES[3], NODES[2]]
    answer(node, node.asked(FIND_NODE)[0], HERE)
    assert sampling.nat.verdict == CONSISTENT
    assert len(done) == 1


def test_nobody_answers() -> None:
    node, done = known(*NODES[:2]), list[float]()
    sampling = Sampling(node, 1, done.append)  # type: ignore[arg-type]
    sampling.start(0.0)
    node.wait(limits.SECOND_PASS)
    for request in list(node.requests):
        assert not done
        request.on_done(None, node.now)
        node.requests.remove(request)
    assert len(done) == 1
    assert sampling.nat.verdict == UNKNOWN
    assert node.timers.deadline() is None


def test_a_cancelled_sampling_is_silent() -> None:
    node, done = known(*NODES[:4]), list[float]()
    sampling = Sampling(node, 1, done.append)  # type: ignore[arg-type]
    sampling.start(0.0)
    sampling.cancel()
    assert not node.asked(PING)
    assert node.timers.deadline() is None
    assert not done


class Surveyed:
    def __init__(self, *nodes: Address) -> None:
        self.node = known(*nodes)
        self.survey = Survey(self.node)  # type: ignore[arg-type]
        self.found: list[Verdict] = []

    def note(self, *samples: Address, socket: int = CLIENT_SOCKET, first: int = 0) -> None:
        for index, to in enumerate(samples):
            seen = reply(NODES[first + index], socket=socket)
            seen.to = to
            self.survey.note(seen, self.node.now)

    def find(self) -> list[Verdict]:
        self.survey.find(self.node.now, lambda verdict, _now: self.found.append(verdict))
        return self.found


def test_answers_that_come_in_anyway_are_enough() -> None:
    fixture = Surveyed(*NODES[:4])
    fixture.note(HERE, HERE)
    assert fixture.survey.known(0.0) == UNKNOWN
    fixture.note(HERE, first=2)
    assert fixture.find() == [CONSISTENT]
    assert not fixture.node.requests


def test_samples_get_old() -> None:
    fixture = Surveyed(*NODES[:4])
    fixture.note(HERE, HERE, HERE)
    fixture.node.wait(limits.FRESH)
    assert fixture.find() == []
    for ping in fixture.node.asked(PING)[:3]:
        answer(fixture.node, ping, HERE)
    assert fixture.found == [CONSISTENT]
    fixture.node.wait(limits.FRESH - 0.1)
    assert fixture.survey.known(fixture.node.now) == CONSISTENT
    fixture.node.wait(0.2)
    assert fixture.survey.known(fixture.node.now) == UNKNOWN


def test_samples_that_differ_are_looked_into() -> None:
    fixture = Surveyed(*NODES[:4])
    fixture.note(HERE, HERE, ("5.0.0.1", 101))
    assert fixture.find() == []
    assert fixture.find() == []
    assert len(fixture.node.asked(PING)) == 4
    for index, ping in enumerate(fixture.node.asked(PING)):
        answer(fixture.node, ping, ("5.0.0.1", 200 + index))
    random = Verdict(Firewall.RANDOM, (("5.0.0.1", 0),))
    assert fixture.found == [random, random]
    assert fixture.find()[-1] == random


def test_a_nat_that_has_forgotten_us_shows_in_the_next_answer() -> None:
    fixture = Surveyed(*NODES[:4])
    fixture.find()
    for ping in fixture.node.asked(PING)[:3]:
        answer(fixture.node, ping, HERE)
    assert fixture.survey.known(0.0) == CONSISTENT
    fixture.note(("5.0.0.1", 777))
    assert fixture.survey.known(0.0) == UNKNOWN


def test_the_other_socket_has_its_own_nat() -> None:
    fixture = Surveyed()
    fixture.note(HERE, HERE, HERE, socket=SERVER_SOCKET)
    assert fixture.survey.known(0.0) == UNKNOWN
    fixture.note(HERE, HERE, HERE)
    assert fixture.survey.known(0.0) == CONSISTENT
    fixture.node.current_socket = SERVER_SOCKET
    assert fixture.survey.known(0.0) == UNKNOWN


def test_what_is_remembered_is_bounded() -> None:
    fixture = Surveyed()
    for index in range(100):
        seen = reply(("9.0.0.1", index + 1))
        seen.to = HERE
        fixture.survey.note(seen, 0.0)
    assert len(fixture.survey._samples) == limits.MAX_SAMPLES


def test_elsewhere_all_is_asked_anew() -> None:
    fixture = Surveyed(*NODES[:4])
    fixture.note(HERE, HERE, HERE)
    fixture.survey.forget(0.0)
    assert fixture.find() == []
    (first, *_) = fixture.node.asked(PING)
    answer(fixture.node, first, ("4.0.0.1", 4))
    fixture.survey.forget(0.0)
    for ping in fixture.node.asked(PING)[:3]:
        answer(fixture.node, ping, HERE)
    assert fixture.found == [CONSISTENT]
    fixture.survey.forget(0.0)
    assert fixture.survey.known(0.0) == UNKNOWN


def test_closing_answers_nobody() -> None:
    fixture = Surveyed(*NODES[:4])
    fixture.find()
    fixture.survey.close()
    assert not fixture.node.asked(PING)
    fixture.node.wait(10)
    assert not fixture.found
