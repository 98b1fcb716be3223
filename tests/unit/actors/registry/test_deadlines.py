from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hyperseaport.actors.registry.deadlines import SLACK, Deadlines


@dataclass(slots=True, eq=False)
class Thing:
    ends: float = math.inf
    scheduled: float = math.inf


def test_to_put_off_costs_nothing() -> None:
    deadlines: Deadlines[Thing] = Deadlines()
    thing = Thing()
    for now in range(1000):
        thing.ends = now + 30.0
        deadlines.set(thing)
    assert len(deadlines._heap) == 1
    assert deadlines.first() == 30.0
    assert deadlines.pop(30.0) == []
    assert deadlines.first() == 1029.0
    assert deadlines.pop(1029.0) == [thing]
    assert deadlines.first() is None


def test_cancelled_deadlines_do_not_pile_up() -> None:
    deadlines: Deadlines[Thing] = Deadlines()
    living = Thing(ends=5.0)
    deadlines.set(living)
    for _ in range(10_000):
        thing = Thing(ends=3600.0)
        deadlines.set(thing)
        deadlines.cancel(thing)
    assert len(deadlines._heap) <= SLACK + 4
    assert deadlines.pop(10_000.0) == [living]


STEP = st.one_of(
    st.tuples(st.just("set"), st.integers(0, 4), st.integers(0, 50) | st.just(math.inf)),
    st.tuples(st.just("cancel"), st.integers(0, 4)),
    st.tuples(st.just("pop"), st.integers(0, 10)),
)


@given(st.lists(STEP, max_size=60))
@settings(deadline=None, derandomize=True)
def test_agrees_with_a_model(steps: Any) -> None:
    deadlines: Deadlines[Thing] = Deadlines()
    things = [Thing() for _ in range(5)]
    model: dict[int, float] = {}
    now = 0.0
    for step, *rest in steps:
        if step == "set":
            number, seconds = rest
            things[number].ends = model[number] = now + seconds
            deadlines.set(things[number])
        elif step == "cancel":
            deadlines.cancel(things[rest[0]])
            model.pop(rest[0], None)
        else:
            now += rest[0]
            due = {things.index(thing) for thing in deadlines.pop(now)}
            assert due == {number for number, ends in model.items() if ends <= now}
            model = {number: ends for number, ends in model.items() if number not in due}
        first = deadlines.first()
        if model:
            assert first is None or first <= min(model.values())
            assert first is not None or min(model.values()) == math.inf


def test_many_at_first() -> None:
    deadlines: Deadlines[Thing] = Deadlines()
    things = [Thing(ends=ends) for ends in (3.0, 1.0, 2.0)]
    deadlines.set_first(things)
    assert deadlines.first() == 1.0
    things[1].ends = 5.0
    deadlines.cancel(things[2])
    assert deadlines.pop(4.0) == [things[0]]
    assert deadlines.pop(5.0) == [things[1]]
    assert deadlines.first() is None
