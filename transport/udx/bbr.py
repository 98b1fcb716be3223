"""Congestion control: BBR version 1 with a bounded answer to heavy loss, counted in packets.

The path is described by the rate at which it delivers and by its round trip without queues; what is
sent follows from these two, and a lost packet by itself changes nothing (spec: udx 5). Beyond what
the reference does: a round that loses more than `_HEAVY_LOSS` ends the start; later it, or one of
less loss with a queue, bounds what is in flight until the next probes go well, and makes forget the
rates of earlier rounds, so that a short queue is not kept overflowing and newcomers get theirs; and
a path of less than `UNPACED_RTT` is neither paced nor drained, as timers are coarser than it is
long.
"""

from __future__ import annotations

from collections import deque
from enum import Enum, auto

from .rate import Sample

INITIAL_WINDOW = 10.0
MIN_WINDOW = 4.0
#: Beyond this nothing is gained: the largest receive windows are 4 MiB.
MAX_WINDOW = 4096.0
#: Seconds. Below it the event loop's timers, 1 ms each, would be the bottleneck.
UNPACED_RTT = 0.002
#: One kernel call takes so many packets.
MAX_BURST = 64

#: 2 / ln 2: doubles what is delivered each round.
_HIGH_GAIN = 2.88539
_WINDOW_GAIN = 2.0
_CYCLE = (1.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
_FIRST_PHASE = 4
#: The rate is the greatest of so many rounds.
_RATE_ROUNDS = 10
#: The pipe is full when the rate has not grown by a quarter in three rounds.
_GROWTH = 1.25
_FLAT_ROUNDS = 3
#: Seconds after which the round trip is measured without a queue, and how long that takes.
_FLOOR_AGE = 10.0
_PROBE_RTT_TIME = 0.2
#: Of the path's capacity, while the round trip is measured.
_PROBE_RTT_GAIN = 0.5
_PACING_MARGIN = 0.99
#: Share of a round's packets whose loss is a queue that overflows, not a bad line; and how many it
#: takes to tell.
_HEAVY_LOSS = 0.2
_MIN_LOSSES = 8
#: The same where round trips show a queue: somebody else has joined, as a rule. The rate is what
#: it was in that round, or this share of what it was at least; and what is in flight leaves room.
_CROWDED_LOSS = 0.05
_CROWDED_RATE = 0.85
_CROWDED_GAIN = 0.85
#: The first bound of a start: its rate lags behind what it has in flight.
_FIRST_GAIN = 1.5
#: A burst is worth between these (seconds of sending), an eighth of the round trip in between.
_BURST_TIME = (0.001, 0.002)
_MIN_BURST = 2
#: Bursts that the window has room for beyond the path's capacity: one is being sent, one is being
#: read, and the ACK of one is under way.
_BURSTS = 3


class State(Enum):
    """What is being found out."""

    STARTUP = auto()
    DRAIN = auto()
    PROBE_BW = auto()
    PROBE_RTT = auto()


class Bbr:
    """How many packets may be in flight, and how fast they may leave. Times are seconds."""

    __slots__ = (
        "_bounded",
        "_ceiling",
        "_flat_rounds",
        "_floor_at",
        "_full",
        "_full_rate",
        "_lost_in_phase",
        "_lost_in_round",
        "_phase",
        "_phase_at",
        "_probe_rtt_round",
        "_probe_rtt_until",
        "_probe_rtt_window",
        "_rates",
        "_round",
        "_round_begin",
        "_round_end",
        "_round_rate",
        "_round_rtt",
        "_saved_window",
        "burst",
        "floor",
        "pace",
        "state",
        "window",
    )

    def __init__(self) -> None:
        self.state = State.STARTUP
        #: Packets that may be in flight.
        self.window = INITIAL_WINDOW
        #: Packets a second that may leave; None for no limit.
        self.pace: float | None = None
        #: Packets that should leave together.
        self.burst = MAX_BURST
        #: The round trip without queues; None before the first sample.
        self.floor: float | None = None
        self._floor_at = 0.0
        # Round and rate, rates falling: the first is the greatest of the last rounds.
        self._rates: deque[tuple[int, float]] = deque()
        self._round = 0
        # Deliveries at which the round began, and at which what leaves now is delivered.
        self._round_begin = 0
        self._round_end = 0
        self._lost_in_round = 0
        # Its greatest rate, and its shortest round trip.
        self._round_rate = 0.0
        self._round_rtt = float("inf")
        # Heavy loss has bounded what is in flight, at least once.
        self._bounded = False
        self._full = False
        self._full_rate = 0.0
        self._flat_rounds = 0
        self._phase = _FIRST_PHASE
        self._phase_at = 0.0
        self._lost_in_phase = False
        # What may be in flight after heavy loss.
        self._ceiling = MAX_WINDOW
        self._saved_window = 0.0
        self._probe_rtt_window = MIN_WINDOW
        self._probe_rtt_until: float | None = None
        self._probe_rtt_round = 0

    @property
    def rate(self) -> float:
        """Packets a second that the path delivers; 0 before the first sample."""
        return self._rates[0][1] if self._rates else 0.0

    def capacity(self, gain: float) -> float:
        """Packets that fill the path without a queue, times ``gain``."""
        if self.floor is None or not self._rates:
            return INITIAL_WINDOW * gain
        return max(1.0, self.rate * self.floor * gain)

    def on_ack(self, sample: Sample, rtt: float | None, in_flight: int, now: float) -> None:
        """Packets were acknowledged; ``rtt`` is that of the newest, if it was sent once, and
        ``in_flight`` is what is still on its way."""
        new_round = sample.prior is not None and sample.prior >= self._round_end
        if new_round:
            self._round_end = sample.total
            self._round += 1
        rate = sample.rate
        if rate is not None:
            self._learn_rate(rate, sample.limited)
            if rate > self._round_rate:
                self._round_rate = rate
        if rtt is not None and rtt < self._round_rtt:
            self._round_rtt = rtt
        if new_round:
            self._end_round(sample, in_flight)
        if rtt is not None:
            self._learn_floor(rtt, sample, now)
        if self.state is not State.STARTUP or self._full:
            self._change_state(in_flight, sample, now)
        if self.floor is not None and self.floor < UNPACED_RTT:
            self.pace = None
            self.burst = MAX_BURST
        else:
            self._set_pace()
        self._set_window(sample)

    def on_loss(self, packets: int) -> None:
        """So many packets were lost."""
        self._lost_in_round += packets
        self._lost_in_phase = True

    def on_timeout(self, in_flight: int) -> None:
        """Nothing came back for a whole retransmission timeout."""
        self.window = in_flight + 1.0
        self._full_rate = 0.0
        self._flat_rounds = 0

    # The model

    def _learn_rate(self, rate: float, limited: bool) -> None:
        rates = self._rates
        if limited and rates and rate < rates[0][1]:
            return
        while rates and rates[-1][1] <= rate:
            rates.pop()
        rates.append((self._round, rate))
        while rates[0][0] <= self._round - _RATE_ROUNDS:
            rates.popleft()

    def _end_round(self, sample: Sample, in_flight: int) -> None:
        lost, self._lost_in_round = self._lost_in_round, 0
        delivered = sample.total - self._round_begin
        self._round_begin = sample.total
        share = lost / (lost + delivered) if lost >= _MIN_LOSSES else 0.0
        heavy = share > _HEAVY_LOSS
        if self._full and (heavy or (share > _CROWDED_LOSS and self._queued)):
            self._give_way()
        self._round_rate, self._round_rtt = 0.0, float("inf")
        if self._full or (sample.limited and not heavy):
            return
        if self.rate >= self._full_rate * _GROWTH and not heavy:
            self._full_rate = self.rate
            self._flat_rounds = 0
            return
        self._flat_rounds += 1
        self._full = heavy or self._flat_rounds >= _FLAT_ROUNDS

    @property
    def _queued(self) -> bool:
        """Whether no packet of the round came through without waiting."""
        return self.floor is not None and self._round_rtt > self.floor * 1.05 + 0.001

    def _give_way(self) -> None:
        """More is sent than the path takes. The rate of better rounds does not come back by
        insisting, and as long as it is remembered, those who join cannot get their share."""
        if self._round_rate:
            rate = max(self._round_rate, _CROWDED_RATE * self.rate)
            self._rates.clear()
            self._rates.append((self._round, rate))
        gain = _CROWDED_GAIN if self._bounded else _FIRST_GAIN
        self._bounded = True
        self._ceiling = max(self.capacity(gain), MIN_WINDOW)

    def _learn_floor(self, rtt: float, sample: Sample, now: float) -> None:
        floor = self.floor
        if floor is None or rtt <= floor:
            self.floor, self._floor_at = rtt, now
            return
        if now <= self._floor_at + _FLOOR_AGE or self.state is State.PROBE_RTT:
            return
        self._floor_at = now
        # Where the path is not filled, there is no queue of ours to drain.
        if not sample.limited and floor >= UNPACED_RTT:
            self.state = State.PROBE_RTT
            self._saved_window = max(self._saved_window, self.window)
            self._probe_rtt_window = max(self.capacity(_PROBE_RTT_GAIN), MIN_WINDOW)
            self._probe_rtt_until = None
        self.floor = rtt

    # The states

    def _change_state(self, in_flight: int, sample: Sample, now: float) -> None:
        if self.state is State.STARTUP and self._full:
            self.state = State.DRAIN
        if self.state is State.DRAIN and in_flight <= self.capacity(1.0):
            self._probe_rate(now)
        elif self.state is State.PROBE_BW:
            self._advance_phase(in_flight, now)
        elif self.state is State.PROBE_RTT:
            self._end_probe_rtt(in_flight, sample, now)

    def _probe_rate(self, now: float) -> None:
        self.state = State.PROBE_BW
        self._phase = _FIRST_PHASE
        self._phase_at = now
        self._lost_in_phase = False

    def _advance_phase(self, in_flight: int, now: float) -> None:
        gain = _CYCLE[self._phase]
        over = now - self._phase_at > (self.floor or 0.0)
        if gain > 1.0:
            # The path is filled up to what is tried, or cannot be.
            most = min(self.capacity(gain), 0.9 * self._ceiling)
            over = over and (self._lost_in_phase or in_flight >= most)
        elif gain < 1.0:
            over = over or in_flight <= self.capacity(1.0)
        if not over:
            return
        self._phase = (self._phase + 1) % len(_CYCLE)
        self._phase_at = now
        self._lost_in_phase = False
        if self._phase == 0:
            self._ceiling = min(self._ceiling * _CYCLE[0], MAX_WINDOW)

    def _end_probe_rtt(self, in_flight: int, sample: Sample, now: float) -> None:
        if self._probe_rtt_until is None:
            if in_flight <= self._probe_rtt_window:
                self._probe_rtt_until = now + _PROBE_RTT_TIME
                self._probe_rtt_round = self._round
                self._round_end = sample.total
            return
        if now < self._probe_rtt_until or self._round == self._probe_rtt_round:
            return
        self._floor_at = now
        self.window = max(self.window, self._saved_window)
        self._saved_window = 0.0
        if self._full:
            self._probe_rate(now)
        else:
            self.state = State.STARTUP

    # What follows

    def _set_pace(self) -> None:
        if self.floor is None:
            return
        gain = 1.0
        if self.state is State.STARTUP:
            gain = _HIGH_GAIN
        elif self.state is State.DRAIN:
            gain = 1 / _HIGH_GAIN
        elif self.state is State.PROBE_BW:
            gain = _CYCLE[self._phase]
        rate = self.rate
        if not self._full:
            # The first samples are of single packets that somebody happened to write.
            rate = max(rate, INITIAL_WINDOW / self.floor)
        rate *= gain * _PACING_MARGIN
        if self._full or self.pace is None or rate > self.pace:
            self.pace = rate
        shortest, longest = _BURST_TIME
        time = min(max(self.floor / 8, shortest), longest)
        self.burst = int(min(max(self.pace * time, _MIN_BURST), MAX_BURST))

    def _set_window(self, sample: Sample) -> None:
        gain = _WINDOW_GAIN if self._full and self.state is not State.DRAIN else _HIGH_GAIN
        target = self.capacity(gain) + _BURSTS * self.burst
        window = self.window
        if self._full:
            window = min(window + sample.packets, target)
        elif window < target or sample.total < INITIAL_WINDOW:
            window += sample.packets
        elif self.state is State.STARTUP:
            # As large as it should be; a bound cannot have come below it, as those of loss are
            # for what is full.
            return
        window = min(max(window, MIN_WINDOW), self._ceiling, MAX_WINDOW)
        if self.state is State.PROBE_RTT:
            window = min(window, self._probe_rtt_window)
        self.window = window
