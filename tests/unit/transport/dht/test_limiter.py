from __future__ import annotations

from hyperseaport.transport.dht import limiter
from hyperseaport.transport.dht.limiter import Limiter


def test_a_burst_and_then_the_rate() -> None:
    bucket = Limiter(10, 3)
    assert [bucket.take("a", 0) for _ in range(4)] == [True, True, True, False]
    assert not bucket.take("a", 0.05)
    assert bucket.allows("a", 0.1)
    assert bucket.take("a", 0.1)
    assert not bucket.allows("a", 0.1)
    assert bucket.take("b", 0.1)
    assert [bucket.take("a", 9) for _ in range(4)] == [True, True, True, False]


def test_a_refusal_costs_nothing() -> None:
    bucket = Limiter(1, 1)
    assert bucket.take("a", 0)
    assert not any(bucket.take("a", 0.1 * step) for step in range(1, 10))
    assert bucket.take("a", 1.0)


def test_hosts_are_bounded_and_the_longest_silent_is_forgotten() -> None:
    bucket = Limiter(0.001, 1)
    for index in range(limiter.MAX_HOSTS):
        assert bucket.take(str(index), 0)
    assert not bucket.take("0", 0)
    assert bucket.take("new", 0)
    assert bucket.take("0", 0)
    assert not bucket.take("2", 0)
