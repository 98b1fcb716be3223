"""What closed streams still say."""

from __future__ import annotations

import pytest

from hyperseaport.transport.transmit import Transmit
from hyperseaport.transport.udx import packet as wire
from hyperseaport.transport.udx.time_wait import (
    AGAIN,
    LATE,
    MAX_TIME_WAIT,
    TIME_WAIT,
    TimeWait,
)

PEER = ("192.0.2.1", 4000)


def farewell(kind: int, identifier: int = 7) -> Transmit:
    return Transmit(0, PEER, (wire.encode(wire.Packet(kind, identifier, 0, 1, 1)),))


def closed(*kinds: int, now: float = 0.0) -> TimeWait:
    """Streams 0, 1 and so on have closed with such a packet each."""
    time_wait = TimeWait()
    for identifier, kind in enumerate(kinds):
        time_wait.add(identifier, farewell(kind, identifier))
    assert list(time_wait.transmits(now)) == []
    return time_wait


def said(time_wait: TimeWait, until: float) -> list[tuple[float, Transmit]]:
    """What is said by itself until then, and when."""
    found: list[tuple[float, Transmit]] = []
    while (when := time_wait.deadline()) is not None and when <= until:
        time_wait.on_deadline(when)
        found += [(when, each) for each in time_wait.transmits(when)]
    return found


def test_a_destroy_is_said_again() -> None:
    time_wait = closed(wire.DESTROY, now=100.0)
    again = said(time_wait, 100.0 + 2 * TIME_WAIT)
    assert [each for _, each in again] == [farewell(wire.DESTROY, 0)] * len(AGAIN)
    for (when, _), delay in zip(again, AGAIN, strict=True):
        assert 100.0 + delay <= when <= 100.0 + delay + LATE
    assert len(time_wait) == 0
    assert time_wait.deadline() is None


def test_an_acknowledgement_is_only_repeated_for_who_asks() -> None:
    time_wait = closed(wire.ACK)
    assert said(time_wait, 2 * TIME_WAIT + 1) == []


@pytest.mark.parametrize("kind", [wire.ACK, wire.DESTROY])
def test_who_sends_something_is_answered(kind: int) -> None:
    time_wait = closed(kind)
    for asked in (wire.DATA, wire.END, wire.HEARTBEAT, wire.DATA | wire.END):
        assert time_wait.receive(0, asked)
        assert time_wait.receive(0, asked)
        assert list(time_wait.transmits(0.1)) == [farewell(kind, 0)]
    for silent in (wire.ACK, wire.SACK, wire.DESTROY, wire.MESSAGE):
        assert time_wait.receive(0, silent)
        assert list(time_wait.transmits(0.2)) == []
    assert not time_wait.receive(1, wire.DATA)


def test_one_without_a_farewell_is_known_and_says_nothing() -> None:
    time_wait = TimeWait()
    time_wait.add(3, None)
    assert list(time_wait.transmits(0.0)) == []
    assert 3 in time_wait
    assert time_wait.receive(3, wire.DATA)
    assert list(time_wait.transmits(0.0)) == []


def test_many_are_said_again_in_a_few_wake_ups() -> None:
    time_wait = TimeWait()
    for identifier in range(1000):
        time_wait.add(identifier, farewell(wire.DESTROY, identifier))
        assert list(time_wait.transmits(identifier / 1000)) == []
    again = said(time_wait, 5.0)
    assert len(again) == len(AGAIN) * 1000
    assert len({when for when, _ in again}) <= 2 * (1.0 / LATE + 1)


def test_an_id_in_use_again_is_left_alone() -> None:
    time_wait = closed(wire.DESTROY, wire.DESTROY)
    time_wait.discard(0)
    assert not time_wait.receive(0, wire.DATA)
    assert [each for _, each in said(time_wait, 1.0)] == [farewell(wire.DESTROY, 1)]


def test_the_oldest_are_forgotten_first() -> None:
    time_wait = TimeWait()
    for identifier in range(MAX_TIME_WAIT + 10):
        time_wait.add(identifier, farewell(wire.DESTROY, identifier))
    assert len(time_wait) == MAX_TIME_WAIT
    assert 9 not in time_wait
    assert 10 in time_wait
    list(time_wait.transmits(0.0))
    assert len(said(time_wait, 1.0)) == MAX_TIME_WAIT
    said(time_wait, 2 * TIME_WAIT)
    assert len(time_wait) == 0
