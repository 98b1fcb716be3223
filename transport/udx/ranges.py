"""Sets of integers kept as half-open ranges: packet numbers come in runs."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class RangeSet:
    """A set of integers. Its size is the number of ranges, whatever they span; its owner bounds
    it by what it lets in."""

    __slots__ = ("_ends", "_starts", "total")

    def __init__(self) -> None:
        # Ascending, disjoint and not touching: starts[i] < ends[i] < starts[i + 1].
        self._starts: list[int] = []
        self._ends: list[int] = []
        #: How many integers are in the set.
        self.total = 0

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __len__(self) -> int:
        """The number of ranges."""
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The ranges, ascending."""
        return zip(self._starts, self._ends, strict=True)

    def __contains__(self, value: int) -> bool:
        index = bisect_right(self._starts, value) - 1
        return index >= 0 and value < self._ends[index]

    @property
    def first(self) -> int:
        """The smallest integer; the set must not be empty."""
        return self._starts[0]

    @property
    def first_end(self) -> int:
        """The integer behind the first range; the set must not be empty."""
        return self._ends[0]

    def add(self, start: int, end: int) -> list[tuple[int, int]]:
        """Add start..end - 1. Returns the ranges that were not in the set before."""
        starts, ends = self._starts, self._ends
        low = bisect_left(ends, start)
        high = bisect_right(starts, end, low)
        if low == high:
            if start >= end:
                return []
            starts.insert(low, start)
            ends.insert(low, end)
            self.total += end - start
            return [(start, end)]
        if starts[low] <= start and end <= ends[low]:
            return []
        fresh = self.gaps(start, end)
        starts[low:high] = [min(start, starts[low])]
        ends[low:high] = [max(end, ends[high - 1])]
        self.total += sum(stop - begin for begin, stop in fresh)
        return fresh

    def remove(self, start: int, end: int) -> None:
        """Take out start..end - 1, whether or not they are in the set."""
        starts, ends = self._starts, self._ends
        low = bisect_right(ends, start)
        high = bisect_left(starts, end, low)
        if low >= high or start >= end:
            return
        before = [starts[low]] if starts[low] < start else []
        after = [ends[high - 1]] if ends[high - 1] > end else []
        removed = sum(ends[low:high]) - sum(starts[low:high])
        kept = sum(start - value for value in before) + sum(value - end for value in after)
        self.total -= removed - kept
        starts[low:high] = before + [end for _ in after]
        ends[low:high] = [start for _ in before] + after

    def gaps(self, start: int, end: int) -> list[tuple[int, int]]:
        """The ranges of start..end - 1 that are not in the set, ascending."""
        starts, ends = self._starts, self._ends
        found: list[tuple[int, int]] = []
        index = bisect_right(ends, start)
        while start < end and index < len(starts) and starts[index] < end:
            if starts[index] > start:
                found.append((start, starts[index]))
            start = ends[index]
            index += 1
        if start < end:
            found.append((start, end))
        return found

    def clear(self) -> None:
        """Empty the set."""
        self._starts.clear()
        self._ends.clear()
        self.total = 0
