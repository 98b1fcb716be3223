"""The congestion window."""

from __future__ import annotations

from hyperseaport.transport.dht.window import MAX_WINDOW, SLOT, SLOTS, Window


def fill(window: Window, count: int, now: float) -> None:
    for _ in range(count):
        window.sent(now)


def test_a_slot_is_full_at_its_maximum() -> None:
    window = Window()
    fill(window, MAX_WINDOW - 1, 0.0)
    assert not window.full(0.0)
    window.sent(0.0)
    assert window.full(0.0)
    window.finished()
    assert not window.full(0.0)


def test_the_next_slot_has_room_until_the_total_is_reached() -> None:
    window = Window()
    fill(window, MAX_WINDOW, 0.0)
    assert not window.full(SLOT)
    fill(window, MAX_WINDOW, SLOT)
    assert window.full(2 * SLOT)
    assert window.full(3 * SLOT)
    assert not window.full(SLOTS * SLOT)


def test_idleness_empties_all_slots() -> None:
    window = Window()
    fill(window, MAX_WINDOW, 0.0)
    fill(window, MAX_WINDOW, SLOT)
    assert not window.full(100 * SLOT)
    fill(window, MAX_WINDOW, 100 * SLOT)
    assert window.full(100 * SLOT)


def test_a_slot_that_is_empty_gives_nothing_back() -> None:
    window = Window()
    fill(window, MAX_WINDOW, 0.0)
    fill(window, MAX_WINDOW - 1, SLOT)
    assert not window.full(2 * SLOT - 0.01)
    window.full(2 * SLOT)
    window.finished()
    window.sent(2 * SLOT)
    assert window.full(2 * SLOT)


def test_waking_up_at_the_next_turn_turns() -> None:
    window = Window()
    now = 0.1
    for _ in range(1000):
        fill(window, MAX_WINDOW, now)
        following = window.next_turn(now)
        assert now < following <= now + SLOT + 1e-6
        now = following
        assert window.next_turn(now) > now
