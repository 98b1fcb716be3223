"""Small messages and their answers: what leaves at once, and what may wait."""

from __future__ import annotations

from typing import Any

import pytest

from hyperseaport.testing.network import datagrams
from hyperseaport.transport.transmit import Transmit
from hyperseaport.transport.udx import packet as wire
from hyperseaport.transport.udx.exchange import ACK_DELAY, CALM, QUICK_ACKS
from hyperseaport.transport.udx.packet import Packet, decode
from hyperseaport.transport.udx.sender import MIN_PROBE_TIMEOUT

TRIP = 0.0003


def next_of(it: Any) -> list[Packet]:
    """What leaves at once."""
    transmits: list[Transmit] = []
    it.mux.transmit_next(it.stream, it.now, transmits.append)
    return [decode(each) for transmit in transmits for each in datagrams(transmit)]


def talked(hand: Any) -> Any:
    """A peer with whom as many messages were exchanged as are acknowledged one by one."""
    it = hand()
    it.stream.wants_room = False
    for number in range(QUICK_ACKS + 2):
        it.stream.write(b"question", it.now)
        it.sent()
        it.now += TRIP
        it.give(wire.DATA, seq=number, ack=number + 1, payload=b"answer")
        it.read()
    return it


def no_window(it: Any) -> None:
    it.stream._sender.update_window(99, 99, 1000)
    it.stream.write(b"message", it.now)


def waiting_writer(it: Any) -> None:
    it.stream.wants_room = True
    it.stream.write(b"message", it.now)


class TestAtOnce:
    def test_it_is_what_would_leave_anyway(self, hand: Any) -> None:
        ours, usual = talked(hand), talked(hand)
        for it in (ours, usual):
            it.stream.write(b"message", it.now)
        assert next_of(ours) == usual.sent() != []
        assert ours.sent() == usual.sent() == []
        assert ours.stream.unsent == usual.stream.unsent == 0
        assert ours.mux.stats == usual.mux.stats
        # It is repeated as any other, at the same times.
        assert ours.wait(5.0) == usual.wait(5.0) != []

    def test_it_acknowledges_what_has_come(self, hand: Any) -> None:
        it = talked(hand)
        it.mux.receive(
            wire.encode(Packet(wire.DATA, 7, 1 << 20, QUICK_ACKS + 2, QUICK_ACKS + 2, b"more")),
            0,
            it.stream.address,
            it.now,
        )
        it.sent()
        it.stream.write(b"message", it.now)
        (packet,) = next_of(it)
        assert packet.ack == QUICK_ACKS + 3
        assert not any(each.type == wire.ACK for _, each in it.wait(it.now + 2 * ACK_DELAY))

    def test_nothing_is_left_to_do_while_a_timer_looks_after_it(self, hand: Any) -> None:
        it = talked(hand)
        it.stream.write(b"message", it.now)
        assert next_of(it)
        assert not it.stream.dirty
        deadline = it.mux.deadline()
        assert deadline is not None
        assert deadline <= it.now + MIN_PROBE_TIMEOUT

    def test_without_a_timer_the_rest_is_to_be_done(self, hand: Any) -> None:
        it = hand()
        it.stream.wants_room = False
        it.stream.write(b"first", it.now)
        assert next_of(it)
        assert it.stream.dirty
        assert it.mux.deadline() is None
        assert it.sent() == []
        assert it.mux.deadline() is not None

    @pytest.mark.parametrize(
        "hinder",
        [
            pytest.param(lambda it: None, id="nothing is written"),
            pytest.param(lambda it: it.stream.write(bytes(1025), it.now), id="too much"),
            pytest.param(
                lambda it: [it.stream.write(b"piece", it.now) for _ in range(2)], id="in pieces"
            ),
            pytest.param(
                lambda it: [it.stream.write(b"last", it.now), it.stream.end(it.now)], id="the end"
            ),
            pytest.param(
                lambda it: [
                    it.mux.create(local_id=9).connect(0, 9, it.stream.address, it.now),
                    it.stream.write(b"one of two", it.now),
                    it.mux.create(local_id=10).connect(0, 10, it.stream.address, it.now),
                ],
                id="others have something",
            ),
            pytest.param(no_window, id="no window"),
            pytest.param(waiting_writer, id="a writer waits"),
        ],
    )
    def test_not_while(self, hand: Any, hinder: Any) -> None:
        it = talked(hand)
        hinder(it)
        before = it.stream.unsent
        assert next_of(it) == []
        assert it.stream.unsent == before

    def test_not_beyond_the_congestion_window(self, hand: Any) -> None:
        it = talked(hand)
        flight, left = it.stream._sender.flight, 0
        while left < 100:
            it.stream.write(b"message", it.now)
            if not next_of(it):
                break
            it.mux.transmits(it.now)
            left += 1
        assert left > 10
        assert flight.in_flight == int(it.stream._sender.congestion.window)


class TestCalm:
    def test_an_ack_with_an_answer_is_not_applied_at_once(self, hand: Any) -> None:
        it = talked(hand)
        following, applied = QUICK_ACKS + 2, it.stream.acknowledged
        for number in range(CALM - 1):
            it.stream.write(b"question", it.now)
            assert next_of(it)
            it.now += TRIP / 10
            it.give(wire.DATA, seq=following + number, ack=following + number + 1, payload=b"a")
            it.read()
            assert it.stream.acknowledged == applied
        for _ in range(2):
            it.stream.write(b"question", it.now)
            assert next_of(it)
        told = following + CALM + 1
        it.give(wire.DATA, seq=following + CALM - 1, ack=told, payload=b"a")
        assert it.stream.acknowledged == told

    def test_it_is_applied_before_any_timer_of_what_it_acknowledges(self, hand: Any) -> None:
        it = talked(hand)
        following = QUICK_ACKS + 2
        round_trip = it.stream.round_trip
        it.stream.write(b"question", it.now)
        assert next_of(it)
        it.now += TRIP
        it.give(wire.ACK, ack=following + 1)
        assert it.stream.unacked
        assert it.wait(it.now + 3.0) == []
        assert it.stream.unacked == 0
        assert it.mux.stats.retransmissions == 0
        # The time until it came counts, not the time until it was applied.
        assert it.stream.round_trip == pytest.approx(round_trip, rel=0.2)

    def test_an_answer_that_gets_no_answer_is_acknowledged(self, hand: Any) -> None:
        it = talked(hand)
        following = QUICK_ACKS + 2
        it.stream.write(b"question", it.now)
        assert next_of(it)
        it.now += TRIP
        asked = it.now
        assert it.give(wire.DATA, seq=following, ack=following + 1, payload=b"answer") == []
        ((when, packet),) = it.wait(asked + 0.1)
        assert (packet.type, packet.ack) == (wire.ACK, following + 1)
        assert when <= asked + ACK_DELAY + 1e-9

    def test_an_ack_that_lets_more_leave_is_applied_at_once(self, hand: Any) -> None:
        it = talked(hand)
        following = QUICK_ACKS + 2
        it.give(wire.ACK, seq=following, ack=following, window=0)
        it.stream.write(b"waits", it.now)
        assert it.sent() == []
        (packet,) = it.give(wire.ACK, seq=following, ack=following, window=1 << 20)
        assert packet.payload == b"waits"
