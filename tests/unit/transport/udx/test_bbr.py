"""A path that delivers at a known rate with a known round trip, round by round."""

from __future__ import annotations

import pytest

from hyperseaport.transport.udx.bbr import (
    INITIAL_WINDOW,
    MAX_BURST,
    MAX_WINDOW,
    MIN_WINDOW,
    UNPACED_RTT,
    Bbr,
    State,
)
from hyperseaport.transport.udx.rate import Sample


class Path:
    """Acknowledges a window each round, no faster than ``rate`` packets a second."""

    def __init__(self, rate: float = 10_000.0, rtt: float = 0.05) -> None:
        self.bbr, self.rate, self.rtt = Bbr(), rate, rtt
        self.now, self.total = 0.0, 0

    def round(self, *, lost: int = 0, limited: bool = False, parts: int = 4) -> None:
        """One round trip: what the window held is delivered, all at the end of it."""
        bbr = self.bbr
        pipe = self.rate * self.rtt
        sent = min(bbr.window, (bbr.pace or self.rate) * self.rtt * 1.1)
        delivered = int(min(sent, pipe))
        # What the path did not take stands in a queue and makes the round trip longer.
        rtt = max(self.rtt, sent / self.rate)
        prior = self.total
        if lost:
            bbr.on_loss(lost)
        for _ in range(parts):
            self.now += self.rtt / parts
            packets = delivered // parts
            self.total += packets
            rate = delivered / self.rtt
            bbr.on_ack(Sample(packets, self.total, prior, rate, limited), rtt, int(sent), self.now)

    def rounds(self, count: int, *, lost: int = 0, limited: bool = False) -> None:
        for _ in range(count):
            self.round(lost=lost, limited=limited)


def test_the_start() -> None:
    bbr = Bbr()
    assert bbr.window == INITIAL_WINDOW == 10
    assert bbr.pace is None
    assert bbr.state is State.STARTUP


def test_the_start_ends_when_the_pipe_is_full() -> None:
    path = Path()
    path.rounds(5)
    assert path.bbr.window >= 8 * INITIAL_WINDOW
    path.rounds(20)
    assert path.bbr.state is State.PROBE_BW
    assert path.bbr.rate == pytest.approx(10_000, rel=0.05)
    assert path.bbr.floor == pytest.approx(0.05)
    assert 500 < path.bbr.window <= 2 * 500 + 3 * path.bbr.burst + 1


def test_what_is_limited_by_the_writer_does_not_end_the_start() -> None:
    path = Path()
    path.rounds(30, limited=True)
    assert path.bbr.state is State.STARTUP


def test_few_losses_change_nothing() -> None:
    path = Path()
    path.rounds(25)
    window = path.bbr.window
    path.rounds(20, lost=25)
    assert path.bbr.window >= 0.9 * window
    assert path.bbr.rate == pytest.approx(10_000, rel=0.05)


def test_heavy_loss_ends_the_start() -> None:
    path = Path()
    path.rounds(4)
    assert path.bbr.state is State.STARTUP
    path.rounds(2, lost=1000)
    assert path.bbr.state is not State.STARTUP


def test_heavy_loss_bounds_what_is_in_flight_until_probes_go_well() -> None:
    path = Path()
    path.rounds(25)
    window = path.bbr.window
    path.rounds(2, lost=1000)
    assert path.bbr.window == pytest.approx(0.85 * 500, rel=0.05)
    path.rounds(60)
    assert path.bbr.window >= 0.8 * window


def test_losses_with_a_queue_make_room_for_others() -> None:
    path = Path()
    path.rounds(25)
    path.rate = 5000.0
    path.rounds(3, lost=50)
    assert path.bbr.rate < 8500, "not what it was before somebody joined"
    assert path.bbr.window < 600


def test_the_rate_of_old_rounds_is_forgotten() -> None:
    path = Path()
    path.rounds(25)
    path.rate = 5000.0
    path.rounds(25)
    assert path.bbr.rate == pytest.approx(5000, rel=0.05)


def test_the_cycle_tries_more_and_drains_what_that_left() -> None:
    path = Path()
    path.rounds(25)
    paces = []
    for _ in range(24):
        path.round(parts=1)
        assert path.bbr.pace is not None
        paces.append(path.bbr.pace / path.bbr.rate)
    assert max(paces) == pytest.approx(1.25 * 0.99)
    assert min(paces) == pytest.approx(0.75 * 0.99)


def test_the_round_trip_is_measured_again_when_it_is_old() -> None:
    path = Path()
    path.rounds(25)
    path.rtt = 0.08
    states = set()
    for _ in range(200):
        path.round()
        states.add(path.bbr.state)
    assert State.PROBE_RTT in states
    assert path.bbr.state is State.PROBE_BW
    assert path.bbr.floor == pytest.approx(0.08)


def test_a_writer_who_pauses_need_not_be_drained() -> None:
    path = Path()
    path.rounds(25)
    path.rtt = 0.08
    for _ in range(200):
        path.round(limited=True)
        assert path.bbr.state is not State.PROBE_RTT
    assert path.bbr.floor == pytest.approx(0.08)


def test_a_short_path_is_not_paced() -> None:
    path = Path(rate=50_000.0, rtt=UNPACED_RTT / 4)
    path.rounds(30)
    assert path.bbr.pace is None
    assert path.bbr.burst == MAX_BURST
    assert path.bbr.window >= 3 * MAX_BURST


def test_bursts_are_small_where_the_path_is_slow() -> None:
    slow, fast = Path(rate=800.0), Path(rate=100_000.0)
    for path in (slow, fast):
        path.rounds(30)
    assert slow.bbr.burst == 2
    assert fast.bbr.burst == MAX_BURST


def test_a_timeout_keeps_what_is_known_of_the_path() -> None:
    path = Path()
    path.rounds(25)
    path.bbr.on_timeout(0)
    assert path.bbr.window == 1
    path.round()
    assert path.bbr.window == MIN_WINDOW
    path.rounds(12)
    assert path.bbr.window > 400


def test_the_window_has_a_maximum() -> None:
    path = Path(rate=1e6, rtt=1.0)
    path.rounds(40)
    assert path.bbr.window == MAX_WINDOW
