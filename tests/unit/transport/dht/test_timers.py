"""Timers of a core."""

from __future__ import annotations

from hyperseaport.transport.dht.timers import Timers


def test_timers_fire_once_in_order_with_the_time_of_the_call() -> None:
    timers = Timers()
    fired: list[tuple[str, float]] = []
    timers.at(2.0, lambda now: fired.append(("b", now)))
    timers.at(1.0, lambda now: fired.append(("a", now)))
    timers.at(2.0, lambda now: fired.append(("c", now)))
    assert timers.deadline() == 1.0
    timers.run(0.5)
    assert fired == []
    timers.run(2.5)
    assert fired == [("a", 2.5), ("b", 2.5), ("c", 2.5)]
    assert timers.deadline() is None


def test_a_cancelled_timer_never_fires_and_has_no_deadline() -> None:
    timers = Timers()
    fired: list[float] = []
    first = timers.at(1.0, fired.append)
    second = timers.at(1.0, fired.append)
    timers.at(0.5, lambda now: second.cancel())
    first.cancel()
    first.cancel()
    timers.run(3.0)
    assert fired == []
    assert timers.deadline() is None


def test_what_is_created_meanwhile_waits_for_the_next_call() -> None:
    timers = Timers()
    count = 0

    def again(now: float) -> None:
        nonlocal count
        count += 1
        timers.at(now, again)

    timers.at(0.0, again)
    timers.run(1.0)
    assert count == 1
    assert timers.deadline() == 1.0
    timers.run(1.0)
    assert count == 2


def test_many_cancelled_timers_are_swept() -> None:
    timers = Timers()
    fired: list[float] = []
    timers.at(9.0, fired.append)
    for _ in range(10_000):
        timers.at(5.0, fired.append).cancel()
    assert len(timers._heap) < 100
    timers.run(9.0)
    assert fired == [9.0]
