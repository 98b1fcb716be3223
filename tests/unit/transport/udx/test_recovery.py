from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperseaport.transport.udx.rate import Departure
from hyperseaport.transport.udx.recovery import Flight, Run


def flight(*counts: int, gap: float = 0.0) -> Flight:
    """Runs of so many packets of 100 bytes, ``gap`` seconds apart from 0 on."""
    it = Flight()
    for number, count in enumerate(counts):
        first = it.next
        it.sent(Run(first, first + count, first * 100, count * 100, 100, Departure(number * gap)))
    return it


def losses(it: Flight, now: float, *, recovering: bool = False) -> list[tuple[int, int]]:
    return it.detect_losses(now, recovering=recovering)


def test_payloads_are_found_by_number() -> None:
    it = Flight()
    it.sent(Run(0, 3, 0, 250, 100, Departure(0.0)))
    it.sent(Run(3, 4, 250, 0, 100, Departure(0.0), fin=True))
    assert [it.find(seq).slice(seq) for seq in range(4)] == [
        (0, 100),
        (100, 100),
        (200, 50),
        (250, 0),
    ]


def test_cumulative_acks_cut_runs_anywhere() -> None:
    it = flight(10, 10)
    assert it.acknowledge(4, (), 0.1).packets == 4
    assert (it.outstanding, it.in_flight, it.acknowledged_offset) == (16, 16, 400)
    assert it.acknowledge(15, (), 0.1).packets == 11
    assert it.acknowledge(15, (), 0.1).packets == 0
    assert it.acknowledge(20, (), 0.1).advanced
    assert it.acknowledged_offset is None


def test_sacked_packets_count_once() -> None:
    it = flight(10)
    assert it.acknowledge(0, ((2, 4), (6, 8)), 0.1).packets == 4
    assert it.acknowledge(0, ((2, 8),), 0.1).packets == 2
    assert it.in_flight == 4
    result = it.acknowledge(9, (), 0.1)
    assert (result.packets, result.advanced) == (3, True)
    assert it.sacked == 0


def test_the_round_trip_is_that_of_the_newest_packet() -> None:
    it = flight(2, 2, gap=0.5)
    it.acknowledge(4, (), 0.6)
    assert it.srtt == pytest.approx(0.1)
    assert it.rttvar == pytest.approx(0.05)
    assert it.rto == 1.0


def test_the_retransmission_timeout_has_limits() -> None:
    it = flight(1)
    it.acknowledge(1, (), 2.0)
    assert it.rto == pytest.approx(6.0)
    it = flight(1)
    it.acknowledge(1, (), 500.0)
    assert it.rto == 30.0


def test_without_gaps_nothing_is_lost() -> None:
    it = flight(10)
    it.acknowledge(5, (), 0.1)
    assert losses(it, 10.0) == []
    assert it.reorder_at is None


def test_three_packets_behind_a_gap_prove_a_loss() -> None:
    it = flight(10)
    it.acknowledge(1, ((2, 5),), 0.1)
    assert losses(it, 0.1) == [(1, 2)]
    assert list(it.lost) == [(1, 2)]
    assert losses(it, 0.1) == []


def test_what_left_later_than_what_arrived_is_not_late() -> None:
    it = flight(5, 5, gap=0.05)
    it.acknowledge(0, ((1, 5),), 0.1)
    assert losses(it, 0.1) == [(0, 1)]
    it.acknowledge(0, ((7, 9),), 0.15)
    assert losses(it, 0.15, recovering=True) == [(5, 7)]


def test_after_reordering_a_quarter_round_trip_is_waited() -> None:
    it = flight(10)
    it.acknowledge(0, ((3, 4),), 0.1)
    it.acknowledge(0, ((1, 3),), 0.1)
    assert losses(it, 0.1) == []
    assert it.reorder_at == pytest.approx(0.125)
    assert losses(it, 0.126) == [(0, 1)]
    assert it.reorder_at is None


def test_an_answer_too_soon_to_a_retransmission_teaches_patience() -> None:
    it = flight(10)
    it.acknowledge(0, ((1, 4),), 0.1)
    losses(it, 0.1)
    it.resent(0, Departure(0.1))
    it.acknowledge(4, (), 0.11)
    it.acknowledge(4, ((5, 9),), 0.11)
    assert losses(it, 0.11) == []
    # Two steps of a quarter of the 0.1 s.
    assert it.reorder_at == pytest.approx(0.0 + 0.11 + 2 * 0.1 / 4)


def test_a_retransmission_can_be_lost_again() -> None:
    it = flight(10)
    it.acknowledge(0, ((2, 6),), 0.1)
    assert losses(it, 0.1) == [(0, 2)]
    it.resent(0, Departure(0.10))
    it.resent(1, Departure(0.11))
    assert it.in_flight == 6
    it.acknowledge(0, ((1, 6),), 0.25)
    assert losses(it, 0.25, recovering=True) == [(6, 10), (0, 1)]


def test_a_timeout_loses_what_is_old_and_always_the_oldest() -> None:
    it = flight(2, 3, gap=1.0)
    assert it.expire(1.0) == [(0, 2)]
    it.resent(0, Departure(1.0))
    it.resent(1, Departure(1.0))
    assert sorted(it.expire(3.0)) == [(0, 1), (1, 2), (2, 5)]
    assert it.in_flight == 0


def test_the_newest_outstanding_packet() -> None:
    it = flight(5)
    assert it.newest() == 4
    it.acknowledge(0, ((3, 5),), 0.1)
    assert it.newest() == 2
    it.acknowledge(5, (), 0.1)
    assert it.newest() is None


def test_the_arrival_of_the_probe_is_told() -> None:
    it = flight(10)
    it.probe = 3
    assert not it.acknowledge(3, (), 0.1).probe
    assert it.acknowledge(6, (), 0.1).probe
    assert it.probe is None


def test_nothing_is_left_after_everything_is_acknowledged() -> None:
    it = flight(10, 10)
    it.acknowledge(0, ((2, 6), (8, 15)), 0.1)
    for start, end in losses(it, 0.1):
        for seq in range(start, end):
            it.resent(seq, Departure(0.1))
    it.acknowledge(20, (), 0.2)
    assert not it.lost
    assert not it._resent
    assert not it._touched
    assert not it._runs
    assert it.in_flight == it.outstanding == 0


def test_what_a_full_ack_had_no_room_to_tell_is_not_lost() -> None:
    it = flight(10, 10, gap=0.01)
    it.horizon = 8
    it.acknowledge(1, ((2, 8),), 0.1)
    assert losses(it, 0.1) == [(1, 2)]
    it.resent(1, Departure(0.1))
    it.acknowledge(2, (), 0.2)
    it.horizon = 8
    assert losses(it, 0.2, recovering=True) == []
    assert it.in_flight == 0, "it left the path before what arrived, one way or the other"
    it.horizon = None
    assert losses(it, 0.2, recovering=True) == [(8, 10), (10, 20)]


def large(size: int) -> Flight:
    """A packet that was sent twice, and small ones that arrived."""
    it = Flight()
    it.sent(Run(0, 1, 0, size, size, Departure(0.0)))
    it.sent(Run(1, 5, size, 400, 100, Departure(0.01)))
    it.acknowledge(0, ((1, 4),), 0.1)
    assert losses(it, 0.1) == [(0, 1)]
    it.resent(0, Departure(0.1))
    it.sent(Run(5, 6, size + 400, 100, 100, Departure(0.11)))
    it.acknowledge(0, ((5, 6),), 0.2)
    return it


def test_a_large_packet_lost_twice_while_small_ones_arrive_makes_a_path_narrow() -> None:
    it = large(1400)
    assert (0, 1) in losses(it, 0.3, recovering=True)
    assert it.narrow


def test_a_small_packet_lost_twice_does_not() -> None:
    it = large(1152)
    assert (0, 1) in losses(it, 0.3, recovering=True)
    assert not it.narrow


def test_nor_a_large_one_when_others_as_large_arrive() -> None:
    it = large(1400)
    it.sent(Run(6, 7, 2000, 1400, 1400, Departure(0.15)))
    it.acknowledge(0, ((6, 7),), 0.25)
    assert (0, 1) in losses(it, 0.3, recovering=True)
    assert not it.narrow


def test_what_may_be_fragmented_tells_nothing_of_the_path() -> None:
    it = large(1400)
    it.cut_before = 1
    assert (0, 1) in losses(it, 0.3, recovering=True)
    assert not it.narrow


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.sampled_from((900, 1160))), min_size=1, max_size=6),
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.integers(0, 60),
)
def test_an_ack_in_order_is_what_any_other_is(
    runs: list[tuple[int, int]], steps: list[int], probe: int
) -> None:
    short, general = Flight(), Flight()
    for it in (short, general):
        it.probe = probe
        for number, (count, size) in enumerate(runs):
            first = it.next
            left = Departure(number * 0.01)
            it.sent(Run(first, first + count, first * size, count * size, size, left))
    now = 0.1
    for step in steps:
        ack = min(short.una + step, short.next)
        now += 0.003
        # A block that makes no sense is skipped, but not before it is looked at.
        assert short.acknowledge(ack, (), now) == general.acknowledge(ack, ((1, 1),), now)
        short.detect_losses(now, recovering=False)
        general.detect_losses(now, recovering=False)
    for name in Flight.__slots__:
        mine, other = getattr(short, name), getattr(general, name)
        assert mine == other or list(mine) == list(other), name
