"""The congestion window of outgoing requests (spec: hyperdht 2.9)."""

from __future__ import annotations

#: Seconds each slot is the current one.
SLOT = 0.75
SLOTS = 4
#: Transmissions in one slot; twice as many in all slots together.
MAX_WINDOW = 80


class Window:
    """Four slots of counts that take turns. Turns are made up for when the window is next looked
    at, so it needs no timer of its own."""

    __slots__ = ("_current", "_slots", "_total", "_turned")

    def __init__(self, now: float = 0.0) -> None:
        self._slots = [0] * SLOTS
        self._current = 0
        self._total = 0
        self._turned = now

    def full(self, now: float) -> bool:
        """Whether the next request has to wait."""
        self._turn(now)
        return self._slots[self._current] >= MAX_WINDOW or self._total >= 2 * MAX_WINDOW

    def sent(self, now: float) -> None:
        """Count a transmission."""
        self._turn(now)
        self._slots[self._current] += 1
        self._total += 1

    def finished(self) -> None:
        """A request was answered, cancelled or given up."""
        if self._slots[self._current] > 0:
            self._slots[self._current] -= 1
            self._total -= 1

    def next_turn(self, now: float) -> float:
        """When room appears at the earliest by time alone."""
        self._turn(now)
        return self._turned + SLOT

    def _turn(self, now: float) -> None:
        # A wake-up at exactly next_turn() must turn, whatever the rounding: hence the tolerance.
        due = int((now - self._turned) / SLOT + 1e-6)
        if due <= 0:
            return
        self._turned += due * SLOT
        for _ in range(min(due, SLOTS)):
            self._current = (self._current + 1) % SLOTS
            self._total -= self._slots[self._current]
            self._slots[self._current] = 0
