"""What a network does to one direction, decided by a seed and nothing else."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperseaport.testing.faults import HEADERS, Bursts, Faults, Link, parse_link
from hyperseaport.transport.errors import InvalidInput

COUNT = 5000
DATA = bytes(range(200))


def through(link: Link, *, seed: int = 1, count: int = COUNT, spacing: float = 0.001) -> Faults:
    faults = Faults(link, Random(seed))
    for number in range(count):
        faults.carry(DATA, number * spacing)
    return faults


def test_without_faults_all_arrive_after_the_delay() -> None:
    faults = Faults(Link(delay=0.25), Random(1))
    assert [faults.carry(DATA, now) for now in (0.0, 1.0)] == [[(0.25, DATA)], [(1.25, DATA)]]
    assert faults.stats.sent == 2
    assert faults.stats.sent_bytes == 2 * len(DATA)
    assert faults.stats.dropped == 0


@pytest.mark.parametrize(
    ("link", "count"),
    [
        (Link(loss=0.1), "lost"),
        (Link(duplicate=0.1), "duplicated"),
        (Link(reorder=0.1), "reordered"),
        (Link(corrupt=0.1), "corrupted"),
        (Link(drop=lambda data, source, to: True), "chosen"),
    ],
)
def test_shares(link: Link, count: str) -> None:
    stats = through(link).stats
    expected = COUNT if count == "chosen" else COUNT / 10
    assert getattr(stats, count) == pytest.approx(expected, rel=0.15)
    assert stats.dropped == (getattr(stats, count) if count in {"lost", "chosen"} else 0)


def test_the_seed_decides_alone() -> None:
    link = Link(jitter=0.1, loss=0.1, duplicate=0.1, reorder=0.1, corrupt=0.1)

    def trace(seed: int) -> list[list[tuple[float, bytes]]]:
        faults = Faults(link, Random(seed))
        return [faults.carry(DATA, float(now)) for now in range(200)]

    assert trace(1) == trace(1)
    assert trace(1) != trace(2)


def test_bursts_lose_what_is_next_to_each_other() -> None:
    faults = Faults(Link(bursts=Bursts(begin=0.01, end=0.2)), Random(1))
    fates = [bool(faults.carry(DATA, 0.0)) for _ in range(20_000)]
    lost = fates.count(False)
    runs = sum(not fate and before for before, fate in pairwise(fates))
    # The chain is bad for begin / (begin + end) of the time, and then for 1 / end datagrams.
    assert lost / len(fates) == pytest.approx(0.01 / 0.21, rel=0.2)
    assert lost / runs == pytest.approx(5, rel=0.2)


def test_bursts_may_lose_a_share_only() -> None:
    always = through(Link(bursts=Bursts(begin=1.0, end=0.0, loss=0.3)))
    assert always.stats.lost == pytest.approx(0.3 * COUNT, rel=0.1)


def test_reordered_datagrams_are_overtaken() -> None:
    faults = Faults(Link(delay=0.01, reorder=0.3, reorder_delay=0.005), Random(1))
    times = [faults.carry(DATA, number * 0.001)[0][0] for number in range(1000)]
    overtaken = sum(time > later for time, later in pairwise(times))
    # Held back, and the next one is not.
    assert overtaken == pytest.approx(1000 * 0.3 * 0.7, rel=0.2)


def test_a_flipped_bit_is_one_and_where_it_may_be() -> None:
    faults = Faults(Link(corrupt=1.0, corrupt_at=(3, 7)), Random(1))
    hit = set()
    for _ in range(100):
        ((_, arrived),) = faults.carry(DATA, 0.0)
        differing = [i for i, (a, b) in enumerate(zip(arrived, DATA, strict=True)) if a != b]
        assert len(differing) == 1
        assert (arrived[differing[0]] ^ DATA[differing[0]]).bit_count() == 1
        hit.update(differing)
    assert hit == {3, 7}


def test_what_has_no_such_byte_or_none_is_not_damaged() -> None:
    assert Faults(Link(delay=0, corrupt=1.0), Random(1)).carry(b"", 0.0) == [(0, b"")]
    far = Faults(Link(delay=0, corrupt=1.0, corrupt_at=(9,)), Random(1))
    assert far.carry(b"short", 0.0) == [(0, b"short")]


def test_a_black_hole_has_a_beginning_and_an_end() -> None:
    faults = Faults(Link(blackholes=((1.0, 2.0), (3.0, 3.5))), Random(1))
    assert [bool(faults.carry(DATA, now)) for now in (0.9, 1.0, 1.9, 2.0, 3.2, 3.5)] == [
        True,
        False,
        False,
        True,
        False,
        True,
    ]
    assert faults.stats.blackholed == 3


def test_a_larger_packet_than_the_mtu_is_dropped() -> None:
    faults = Faults(Link(mtu=100 + HEADERS), Random(1))
    assert faults.carry(bytes(100), 0.0)
    assert not faults.carry(bytes(101), 0.0)
    assert faults.stats.too_large == 1


def test_bandwidth_spaces_what_is_sent_at_once() -> None:
    size = 1000 - HEADERS
    faults = Faults(Link(delay=0.5, bandwidth=10_000), Random(1))
    times = [faults.carry(bytes(size), 1.0)[0][0] for _ in range(3)]
    assert times == pytest.approx([1.6, 1.7, 1.8])
    assert faults.carry(bytes(size), 10.0)[0][0] == pytest.approx(10.6), "an idle line is free"


def test_a_full_queue_drops_at_its_tail_until_it_has_room() -> None:
    size = 1000 - HEADERS
    faults = Faults(Link(delay=0, bandwidth=10_000, queue=3000), Random(1))
    assert [bool(faults.carry(bytes(size), 0.0)) for _ in range(5)] == [True] * 3 + [False] * 2
    assert faults.stats.overflowed == 2
    assert faults.carry(bytes(size), 0.11), "one has left"
    assert not faults.carry(bytes(size), 0.11)


def test_a_queue_shorter_than_a_packet_still_passes_one_at_a_time() -> None:
    faults = Faults(Link(bandwidth=10_000, queue=1), Random(1))
    assert [bool(faults.carry(DATA, now)) for now in (0.0, 0.0, 5.0)] == [True, False, True]


def test_a_link_may_change_under_way() -> None:
    link = Link()
    faults = Faults(link, Random(1))
    assert faults.carry(DATA, 0.0)
    link.loss = 1.0
    assert not faults.carry(DATA, 0.0)


SHARE = st.floats(0, 1)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    seed=st.integers(),
    link=st.builds(
        Link,
        delay=st.floats(0, 1),
        jitter=st.floats(0, 1),
        loss=SHARE,
        duplicate=SHARE,
        reorder=SHARE,
        corrupt=SHARE,
        bandwidth=st.none() | st.floats(1, 1e9),
        queue=st.none() | st.integers(0, 10_000),
        mtu=st.none() | st.integers(0, 1500),
        bursts=st.none() | st.builds(Bursts, SHARE, SHARE, SHARE),
    ),
    sizes=st.lists(st.integers(0, 1500), max_size=30),
)
def test_every_datagram_is_accounted_for(seed: int, link: Link, sizes: list[int]) -> None:
    faults = Faults(link, Random(seed))
    arrived = 0
    for number, size in enumerate(sizes):
        for when, piece in faults.carry(bytes(size), float(number)):
            arrived += 1
            assert when >= number + link.delay
            assert len(piece) == size
    assert arrived == len(sizes) - faults.stats.dropped + faults.stats.duplicated
    assert faults.stats.sent == len(sizes)


def test_links_are_read_from_text() -> None:
    assert parse_link("") == Link(delay=0.0)
    text = "delay=0.02,loss=0.01,bursts=0.1:0.5:0.9,blackholes=1-2:5-6.5,queue=1000,mtu=1300"
    assert parse_link(text) == Link(
        delay=0.02,
        loss=0.01,
        bursts=Bursts(0.1, 0.5, 0.9),
        blackholes=((1.0, 2.0), (5.0, 6.5)),
        queue=1000,
        mtu=1300,
    )
    assert parse_link("loss=0.5", Link(delay=2.0, loss=0.1)) == Link(delay=2.0, loss=0.5)


@pytest.mark.parametrize(
    "text",
    [
        "lost=1",
        "loss",
        "loss=2",
        "delay=-1",
        "delay=nan",
        "mtu=x",
        "bandwidth=0",
        "queue=inf",
        "bursts=1:1:1:1",
        "blackholes=1",
        "blackholes=1-2-3",
    ],
)
def test_what_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_link(text)


def test_what_may_be_fragmented_passes_a_small_mtu() -> None:
    faults = Faults(Link(delay=0.25, mtu=576), Random(1))
    assert not faults.carry(bytes(1400), 0.0)
    assert faults.carry(bytes(1400), 0.0, may_fragment=True) == [(0.25, bytes(1400))]
    assert faults.carry(bytes(100), 0.0, may_fragment=True)
    assert (faults.stats.too_large, faults.stats.fragmented) == (1, 1)


def test_fragments_are_lost_together_and_each_has_a_header() -> None:
    faults = Faults(Link(delay=0.0, mtu=576, loss=0.1), Random(1))
    arrived = sum(bool(faults.carry(bytes(1400), 0.0, may_fragment=True)) for _ in range(5000))
    # 1408 bytes behind the IP header, 552 at most in each fragment: three of them.
    assert arrived / 5000 == pytest.approx(0.9**3, abs=0.02)
    slow = Faults(Link(delay=0.0, mtu=576, bandwidth=1000.0), Random(1))
    assert slow.carry(bytes(1400), 0.0, may_fragment=True)[0][0] == pytest.approx(1.468)
