from __future__ import annotations

import pytest

from hyperseaport.transport.udx.congestion import INITIAL_WINDOW, MAX_WINDOW, MIN_WINDOW, Cubic


def test_slow_start_doubles_each_round() -> None:
    cubic = Cubic()
    for packets in (10, 20, 40):
        assert cubic.window == packets
        cubic.on_ack(packets, 0.1, 0.0)
    assert cubic.window == 80


def test_a_loss_takes_three_tenths() -> None:
    cubic = Cubic()
    cubic.on_ack(90, 0.1, 0.0)
    cubic.on_loss()
    assert cubic.window == pytest.approx(70)


def test_losses_stop_at_the_minimum() -> None:
    cubic = Cubic()
    for _ in range(20):
        cubic.on_loss()
    assert cubic.window == MIN_WINDOW


def test_growth_after_a_loss_levels_off_where_it_happened_and_goes_on() -> None:
    cubic = Cubic()
    cubic.on_ack(990, 0.1, 0.0)
    cubic.on_loss()
    sizes = []
    for step in range(200):
        cubic.on_ack(int(cubic.window), 0.1, step * 0.1)
        sizes.append(cubic.window)
    assert sizes == sorted(sizes)
    # K = cbrt(300 / 0.4), about 9.1 s: nine tenths of the way are done in half of it.
    assert sizes[45] > 950
    assert sizes[90] == pytest.approx(1000, abs=5)
    assert sizes[-1] > 1100


def test_growth_per_round_is_bounded() -> None:
    cubic = Cubic()
    cubic.on_loss()
    cubic.on_ack(1, 0.1, 0.0)
    before = cubic.window
    cubic.on_ack(int(before), 0.1, 1000.0)
    assert cubic.window <= 1.5 * before


def test_the_window_has_a_maximum() -> None:
    cubic = Cubic()
    cubic.on_ack(10**6, 0.1, 0.0)
    assert cubic.window == MAX_WINDOW
    cubic.on_ack(10**6, 0.1, 0.0)
    assert cubic.window == MAX_WINDOW


def test_a_timeout_starts_over() -> None:
    cubic = Cubic()
    cubic.on_ack(90, 0.1, 0.0)
    cubic.on_timeout(0)
    assert cubic.window == 1
    cubic.on_ack(30, 0.1, 1.0)
    assert cubic.window == 31, "slow start up to the threshold"
    cubic.on_ack(60, 0.1, 2.0)
    cubic.on_ack(10, 0.1, 3.0)
    assert 70 < cubic.window < 110


def test_the_first_window() -> None:
    assert Cubic().window == INITIAL_WINDOW == 10
