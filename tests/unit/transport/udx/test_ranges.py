from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hyperseaport.transport.udx.ranges import RangeSet

EDGES = st.integers(0, 40)
STEPS = st.lists(st.tuples(st.booleans(), EDGES, EDGES), max_size=30)


def test_touching_ranges_become_one() -> None:
    ranges = RangeSet()
    assert ranges.add(3, 5) == [(3, 5)]
    assert ranges.add(7, 9) == [(7, 9)]
    assert ranges.add(5, 7) == [(5, 7)]
    assert list(ranges) == [(3, 9)]
    assert ranges.total == 6
    assert ranges.first == 3


def test_adding_returns_only_what_is_new() -> None:
    ranges = RangeSet()
    ranges.add(2, 4)
    ranges.add(6, 8)
    assert ranges.add(0, 10) == [(0, 2), (4, 6), (8, 10)]
    assert ranges.add(1, 9) == []


def test_removing_from_the_middle_leaves_two() -> None:
    ranges = RangeSet()
    ranges.add(0, 10)
    ranges.remove(4, 6)
    assert list(ranges) == [(0, 4), (6, 10)]
    assert 4 not in ranges
    assert 6 in ranges


def test_clear() -> None:
    ranges = RangeSet()
    ranges.add(0, 10)
    ranges.clear()
    assert not ranges
    assert len(ranges) == ranges.total == 0


@settings(deadline=None, derandomize=True, max_examples=300)
@given(STEPS, EDGES, EDGES)
def test_behaves_as_a_set_of_integers(
    steps: list[tuple[bool, int, int]], low: int, high: int
) -> None:
    ranges, model = RangeSet(), set[int]()
    for adding, start, end in steps:
        if adding and start < end:
            fresh = {value for a, b in ranges.add(start, end) for value in range(a, b)}
            assert fresh == set(range(start, end)) - model
            model |= fresh
        elif not adding:
            ranges.remove(start, end)
            model -= set(range(start, end))
        pairs = list(ranges)
        assert {value for a, b in pairs for value in range(a, b)} == model
        assert all(a < b for a, b in pairs)
        assert all(pairs[i][1] < pairs[i + 1][0] for i in range(len(pairs) - 1))
        assert ranges.total == len(model)
        assert len(ranges) == len(pairs)
        assert all((value in ranges) == (value in model) for value in range(41))
    gaps = [value for a, b in ranges.gaps(low, high) for value in range(a, b)]
    assert gaps == [value for value in range(low, high) if value not in model]
