from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperseaport.transport.udx.pacing import Pacer


def test_without_a_rate_everything_leaves() -> None:
    assert Pacer().grant(5000, None, 64, 0.0) == 5000


def test_what_leaves_is_a_burst_or_nothing() -> None:
    pacer = Pacer()
    assert pacer.grant(1000, 1000.0, 20, 100.0) == 40
    pacer.spend(40)
    assert pacer.grant(1000, 1000.0, 20, 100.010) == 0
    when = pacer.ready_at(1000, 1000.0, 20)
    assert when == pytest.approx(100.020)
    assert pacer.grant(1000, 1000.0, 20, when) == 20


def test_the_rest_does_not_wait_for_a_whole_burst() -> None:
    pacer = Pacer()
    pacer.spend(pacer.grant(1000, 1000.0, 20, 100.0))
    assert pacer.grant(3, 1000.0, 20, 100.002) == 0
    assert pacer.ready_at(3, 1000.0, 20) == pytest.approx(100.003)
    assert pacer.grant(3, 1000.0, 20, 100.003) == 3


def test_a_late_timer_is_made_up_for_up_to_a_limit() -> None:
    pacer = Pacer()
    pacer.spend(pacer.grant(1000, 10_000.0, 20, 100.0))
    assert pacer.grant(1000, 10_000.0, 20, 100.004) == 40
    assert pacer.grant(1000, 10_000.0, 20, 200.0) == 50


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.floats(10, 100_000),
    st.integers(2, 64),
    st.lists(st.floats(0, 0.01), min_size=1, max_size=50),
)
def test_never_more_than_the_rate_and_always_at_the_time_told(
    rate: float, burst: int, pauses: list[float]
) -> None:
    pacer, now, sent = Pacer(), 50.0, 0
    allowance = max(2 * burst, rate * 0.005, 10)
    for pause in pauses:
        now += pause
        granted = pacer.grant(1000, rate, burst, now)
        pacer.spend(granted)
        sent += granted
        assert sent <= allowance + (now - 50.0) * rate + 1
        when = pacer.ready_at(1000, rate, burst)
        assert when >= now
        now = max(now, when)
        granted = pacer.grant(1000, rate, burst, now)
        assert granted >= burst - 1
        pacer.spend(granted)
        sent += granted
