from __future__ import annotations

import pytest

from hyperseaport.transport.udx.rate import Delivery


def test_a_rate_is_what_arrived_over_the_time_it_took() -> None:
    delivery = Delivery()
    first = delivery.depart(1.0, idle=True)
    sample = delivery.arrived(10, first, 0.1, 1.1)
    assert sample.rate == pytest.approx(100)
    assert (sample.packets, sample.total, sample.prior) == (10, 10, 0)
    second = delivery.depart(1.1, idle=False)
    sample = delivery.arrived(40, second, 0.1, 1.3)
    assert sample.rate == pytest.approx(200)
    assert sample.prior == 10


def test_acknowledgements_that_bunch_up_do_not_make_a_path_faster() -> None:
    delivery = Delivery()
    runs = [delivery.depart(0.0, idle=True)]
    runs += [delivery.depart(0.1 * number, idle=False) for number in range(1, 10)]
    delivery.arrived(10, runs[0], 0.1, 1.0)
    # Packets that left in 0.9 s are acknowledged in no time.
    sample = delivery.arrived(90, runs[9], 0.1, 1.0)
    assert sample.rate == pytest.approx(100 / 1.0)


def test_a_time_below_the_round_trip_tells_nothing() -> None:
    delivery = Delivery()
    left = delivery.depart(0.0, idle=True)
    assert delivery.arrived(5, left, 0.1, 0.05).rate is None
    assert delivery.arrived(5, None, 0.1, 0.2).prior is None
    assert delivery.total == 10


def test_a_pause_is_not_counted() -> None:
    delivery = Delivery()
    delivery.arrived(5, delivery.depart(0.0, idle=True), 0.1, 0.1)
    left = delivery.depart(60.0, idle=True)
    assert delivery.arrived(5, left, 0.1, 60.1).rate == pytest.approx(50)


def test_what_the_writer_held_back_is_only_a_lower_bound() -> None:
    delivery = Delivery()
    delivery.arrived(5, delivery.depart(0.0, idle=True), 0.1, 0.1)
    delivery.limit(in_flight=3)
    limited = delivery.depart(0.1, idle=False)
    assert limited.limited
    assert delivery.arrived(3, limited, 0.1, 0.2).limited
    delivery.arrived(1, limited, 0.1, 0.2)
    assert not delivery.depart(0.2, idle=False).limited
