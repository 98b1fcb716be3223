"""Packets in flight: which are acknowledged, which are lost, how long the path takes.

Nothing is kept for a single packet that goes its normal way. Packets that left together and carry
consecutive bytes are one `Run`; what SACK, loss and retransmission make of single ones is kept in
sets of ranges. Loss detection is RACK (RFC 8985; spec: udx 4.4). Packet numbers here have no
wrap-around.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from .mtu import BASE_PAYLOAD
from .ranges import RangeSet
from .rate import Departure

#: Seconds (spec: udx 4.4, 4.6).
INITIAL_RTO = 1.0
MIN_RTO = 1.0
MAX_RTO = 30.0
_MAX_RTT = 30.0
#: A clock that has not moved between packet and ACK must not make the round trip 0.
_MIN_RTT = 0.0001
#: The minimum of the round trip is forgotten after this: routes change.
_MIN_RTT_AGE = 300.0
#: SACKed packets that prove a loss as long as no reordering has been seen.
_DUPLICATE_THRESHOLD = 3
#: Growth of the reordering window for each needless retransmission stops here.
_MAX_REORDER_STEPS = 16


@dataclass(slots=True)
class Run:
    """Packets that left at one time: ``first`` to ``end`` - 1, with ``size`` bytes each from
    stream offset ``offset`` on, ``length`` bytes in all."""

    first: int
    end: int
    offset: int
    length: int
    size: int
    #: When it left, and what had been delivered then.
    left: Departure
    #: The last packet carries END.
    fin: bool = False

    def slice(self, seq: int) -> tuple[int, int]:
        """Stream offset and length of a packet's payload."""
        skipped = (seq - self.first) * self.size
        return self.offset + skipped, min(self.size, self.length - skipped)


@dataclass(slots=True)
class Acknowledged:
    """What an ACK told."""

    #: Packets acknowledged for the first time, by number or by SACK.
    packets: int = 0
    #: The oldest outstanding number moved.
    advanced: bool = False
    #: How the newest of them left, as far as is known.
    newest: Departure | None = None
    #: Round trip of the newest that was sent only once, seconds.
    rtt: float | None = None
    #: The MTU probe arrived.
    probe: bool = False


def _first(run: Run) -> int:
    return run.first


class Flight:
    """The packets from the oldest unacknowledged one to the newest sent."""

    __slots__ = (
        "_fack",
        "_large_sent",
        "_min_rtt_at",
        "_rack_end",
        "_rack_rtt",
        "_rack_sent",
        "_reorder_steps",
        "_reordering",
        "_resent",
        "_runs",
        "_sacked",
        "_settled",
        "_touched",
        "_untold",
        "cut_before",
        "horizon",
        "lost",
        "min_rtt",
        "narrow",
        "next",
        "probe",
        "reorder_at",
        "rto",
        "rttvar",
        "srtt",
        "una",
    )

    def __init__(self, first: int = 0) -> None:
        #: Oldest number not acknowledged, and the next to be used.
        self.una = first
        self.next = first
        #: Number of the packet that probes a larger MTU.
        self.probe: int | None = None
        #: Packets before this one may be fragmented when they are sent again: the path may have
        #: become too narrow for them, and a number cannot be divided (spec: udx 1.4).
        self.cut_before = first
        #: One that may not be was lost twice, and nothing as large has arrived since.
        self.narrow = False
        #: Lost and not sent again yet.
        self.lost = RangeSet()
        #: What the last ACK had no room to tell begins here; None if it told everything. What lies
        #: beyond is not lost for want of a SACK.
        self.horizon: int | None = None
        #: When packets that are late now will count as lost; None for no such packets.
        self.reorder_at: float | None = None
        #: Smoothed round trip in seconds, None before the first sample; retransmission timeout.
        self.srtt: float | None = None
        self.rttvar = 0.0
        self.rto = INITIAL_RTO
        self._runs: list[Run] = []
        self._sacked = RangeSet()
        # Retransmitted and outstanding: number -> how it left again, oldest first.
        self._resent: dict[int, Departure] = {}
        # SACKed, lost or retransmitted: what is not here still is as it first left.
        self._touched = RangeSet()
        # Packets beyond the horizon that have left the path: arrived or lost, nobody can tell yet.
        self._untold = 0
        # What lies before has been told lost or arrived: it is not looked at again.
        self._settled = first
        #: The shortest round trip of late; 0 before the first.
        self.min_rtt = 0.0
        self._min_rtt_at = 0.0
        # The most recently sent packet that arrived: when, the number behind it, how long it took.
        self._rack_sent = float("-inf")
        self._rack_end = first
        self._rack_rtt = 0.0
        # When the newest packet above the base size left that arrived.
        self._large_sent = float("-inf")
        # Number behind the highest acknowledged one.
        self._fack = first
        self._reordering = False
        self._reorder_steps = 1

    @property
    def outstanding(self) -> int:
        """Packets sent and not cumulatively acknowledged."""
        return self.next - self.una

    @property
    def in_flight(self) -> int:
        """Packets that are on the way as far as is known (spec: udx 3.2)."""
        return self.next - self.una - self._sacked.total - self.lost.total - self._untold

    @property
    def disturbed(self) -> bool:
        """Some packet is SACKed, lost or retransmitted: `detect_losses` may find something."""
        return self._touched.total != 0

    @property
    def sacked(self) -> int:
        """Packets that arrived beyond a gap."""
        return self._sacked.total

    @property
    def acknowledged_offset(self) -> int | None:
        """Stream offset before which everything has arrived; None if nothing is outstanding."""
        if not self._runs:
            return None
        run = self._runs[0]
        return run.offset + min((self.una - run.first) * run.size, run.length)

    def sent(self, run: Run) -> None:
        """A run left; it begins at `next`."""
        self._runs.append(run)
        self.next = run.end

    def find(self, seq: int) -> Run:
        """The run of an outstanding packet."""
        return self._runs[bisect_right(self._runs, seq, key=_first) - 1]

    def first_lost(self, limit: int) -> list[int]:
        """The lowest numbers, up to ``limit``, that are lost and not sent again yet."""
        packets = (seq for start, end in self.lost for seq in range(start, end))
        return list(islice(packets, limit))

    def resent(self, seq: int, left: Departure) -> Run:
        """A packet is sent again; returns its run."""
        self.lost.remove(seq, seq + 1)
        self._touched.add(seq, seq + 1)
        self._resent.pop(seq, None)
        self._resent[seq] = left
        return self.find(seq)

    def is_large(self, seq: int) -> bool:
        """Whether an outstanding packet is above the size that every path carries."""
        return self.find(seq).slice(seq)[1] > BASE_PAYLOAD

    def newest(self) -> int | None:
        """The highest outstanding number that is not SACKed."""
        gaps = self._sacked.gaps(self.una, self.next)
        return gaps[-1][1] - 1 if gaps else None

    def acknowledge(self, ack: int, blocks: Sequence[tuple[int, int]], now: float) -> Acknowledged:
        """Apply an ACK: everything before ``ack``, and the blocks. ``ack`` must not be beyond
        `next`; one before `una` tells nothing, and senseless blocks are skipped (spec: udx 4.3)."""
        if ack > self.una and not blocks and not self.disturbed:
            return self._acknowledge_in_order(ack, now)
        result = Acknowledged()
        fresh: list[tuple[int, int]] = []
        if ack > self.una:
            fresh = self._sacked.gaps(self.una, ack) if self._sacked else [(self.una, ack)]
        lowest = max(ack, self.una)
        for start, end in blocks:
            if lowest <= start < end <= self.next:
                fresh += self._sacked.add(start, end)
                self._touched.add(start, end)
        if fresh:
            self._learn(fresh, now, result)
        if ack > self.una:
            self._advance(ack)
            result.advanced = True
        return result

    def detect_losses(self, now: float, *, recovering: bool) -> list[tuple[int, int]]:
        """Find what the packets that arrived prove lost, and set `reorder_at` for what may be.
        Returns the ranges that are newly lost; ``recovering`` says whether a loss is being
        repaired."""
        self.reorder_at = None
        self._untold = 0
        if not self._sacked.total and not self._resent:
            return []
        patience = self._rack_rtt + self._reorder_window(recovering)
        horizon = self.next if self.horizon is None else self.horizon
        late: list[tuple[int, int]] = []
        self._settled = max(self._settled, self.una)
        runs = self._runs
        index = max(bisect_right(runs, self._settled, key=_first) - 1, 0)
        while index < len(runs):
            run = runs[index]
            index += 1
            sent = run.left.sent
            if sent > self._rack_sent or run.first >= horizon:
                break
            end = run.end if sent < self._rack_sent else min(run.end, self._rack_end)
            end = min(end, horizon)
            gaps = self._touched.gaps(max(run.first, self._settled), end)
            if gaps and sent + patience > now:
                self.reorder_at = sent + patience
                break
            late += gaps
            self._settled = max(self._settled, end)
        if self.horizon is not None:
            self._untold = self._count_untold(max(self.horizon, self._settled))
        for seq, (sent, *_) in self._resent.items():
            if (sent, seq) >= (self._rack_sent, self._rack_end):
                break
            if seq >= horizon:
                continue
            if sent + patience > now:
                when = sent + patience
                self.reorder_at = when if self.reorder_at is None else min(when, self.reorder_at)
                break
            late.append((seq, seq + 1))
            if sent > self._large_sent and seq >= self.cut_before and self.is_large(seq):
                self.narrow = True
        self._lose(late)
        return late

    def expire(self, now: float) -> list[tuple[int, int]]:
        """The retransmission timeout passed: the oldest packet is lost, and all that are old
        (spec: udx 4.6). Returns the ranges that are newly lost."""
        patience = self._rack_rtt + self._reorder_window(recovering=True)
        late: list[tuple[int, int]] = []
        for run in self._runs:
            begin = max(run.first, self.una)
            end = run.end if run.left.sent + patience < now else min(run.end, self.una + 1)
            late += self._touched.gaps(begin, end)
        late += [
            (seq, seq + 1)
            for seq, left in self._resent.items()
            if left.sent + patience < now or seq == self.una
        ]
        self._lose(late)
        self._untold = 0
        return late

    def lose_all(self) -> None:
        """Nothing that is outstanding will arrive on the way it took, and none of what was learned
        of that way but its round trip holds for the next."""
        self._lose(self._touched.gaps(self.una, self.next) + [(s, s + 1) for s in self._resent])
        self._untold = 0
        self.min_rtt = 0.0
        self.probe = self.reorder_at = None

    def clear(self) -> None:
        """Forget what is outstanding; `next` and `una` stay for the headers of last packets."""
        self._runs.clear()
        self._resent.clear()
        self._untold = 0
        for ranges in (self._sacked, self.lost, self._touched):
            ranges.clear()

    def _count_untold(self, horizon: int) -> int:
        """Packets beyond the horizon that left before one that arrived."""
        untold = 0
        runs = self._runs
        for run in islice(runs, max(bisect_right(runs, horizon, key=_first) - 1, 0), None):
            if run.left.sent >= self._rack_sent:
                break
            gaps = self._touched.gaps(max(run.first, horizon), run.end)
            untold += sum(end - start for start, end in gaps)
        return untold

    def _lose(self, ranges: list[tuple[int, int]]) -> None:
        for start, end in ranges:
            self.lost.add(start, end)
            self._touched.add(start, end)
            if end - start == 1:
                self._resent.pop(start, None)

    def _acknowledge_in_order(self, ack: int, now: float) -> Acknowledged:
        """The same for an ACK that moves `una`, while every outstanding packet is as it first
        left."""
        una, runs = self.una, self._runs
        probe = self.probe is not None and una <= self.probe < ack
        if probe:
            self.probe = None
        run, done = runs[0], 0
        while run.end < ack:
            done += 1
            run = runs[done]
        left = run.left
        sent = left.sent
        if run.length > BASE_PAYLOAD and run.slice(max(una, run.first))[1] > BASE_PAYLOAD:
            self._large_sent = max(self._large_sent, sent)
        self._fack = max(self._fack, ack)
        rtt = now - sent
        if not _MIN_RTT <= rtt <= _MAX_RTT:
            rtt = min(max(rtt, _MIN_RTT), _MAX_RTT)
        self._sample(rtt, now)
        if sent > self._rack_sent or (sent == self._rack_sent and ack > self._rack_end):
            self._rack_sent, self._rack_end = sent, ack
        self._rack_rtt = rtt
        self.reorder_at = None
        self._untold = 0
        self.una = ack
        if run.end == ack:
            done += 1
        if done:
            del runs[:done]
        return Acknowledged(ack - una, True, left, rtt, probe)

    def _learn(self, fresh: list[tuple[int, int]], now: float, result: Acknowledged) -> None:
        """Take the round trip and the RACK mark from newly acknowledged ranges."""
        latest: tuple[Departure, int] | None = None
        fack = self._fack
        for start, end in fresh:
            result.packets += end - start
            fack = max(fack, end)
            if self.lost:
                self.lost.remove(start, end)
            untouched = [(start, end)]
            if self._resent:
                untouched = self._settle_resent(start, end, now, result)
            for low, high in untouched:
                run = self.find(high - 1)
                left = run.left
                if run.slice(max(low, run.first))[1] > BASE_PAYLOAD:
                    self._large_sent = max(self._large_sent, left.sent)
                if latest is None or (left, high) > latest:
                    latest = (left, high)
                if low < self._fack:
                    self._reordering = True
                if self.probe is not None and low <= self.probe < high:
                    self.probe = None
                    result.probe = True
        self._fack = fack
        if latest is None:
            return
        left, end = latest
        rtt = min(max(now - left.sent, _MIN_RTT), _MAX_RTT)
        self._sample(rtt, now)
        result.rtt = rtt
        self._mark(left, end, rtt, result)

    def _settle_resent(
        self, start: int, end: int, now: float, result: Acknowledged
    ) -> list[tuple[int, int]]:
        """Settle the retransmitted packets of a range; returns the parts sent only once."""
        settled = [seq for seq in self._resent if start <= seq < end]
        if not settled:
            return [(start, end)]
        untouched = RangeSet()
        untouched.add(start, end)
        for seq in settled:
            untouched.remove(seq, seq + 1)
            left = self._resent.pop(seq)
            rtt = now - left.sent
            if rtt >= self.min_rtt:
                self._mark(left, seq + 1, rtt, result)
            else:
                # No answer comes that soon: it was the first transmission that arrived, late.
                self._reorder_steps = min(self._reorder_steps + 1, _MAX_REORDER_STEPS)
                self._reordering = True
        return list(untouched)

    def _mark(self, left: Departure, end: int, rtt: float, result: Acknowledged) -> None:
        if (left.sent, end) > (self._rack_sent, self._rack_end):
            self._rack_sent, self._rack_end = left.sent, end
        if result.newest is None or left.sent >= result.newest.sent:
            result.newest = left
        self._rack_rtt = rtt

    def _sample(self, rtt: float, now: float) -> None:
        if self.min_rtt == 0 or rtt <= self.min_rtt or now - self._min_rtt_at > _MIN_RTT_AGE:
            self.min_rtt = rtt
            self._min_rtt_at = now
        if self.srtt is None:
            self.srtt, self.rttvar = rtt, rtt / 2
        else:
            srtt = self.srtt
            self.rttvar = (3 * self.rttvar + abs(srtt - rtt)) / 4
            self.srtt = (7 * srtt + rtt) / 8
        rto = self.srtt + 4 * self.rttvar
        self.rto = MIN_RTO if rto < MIN_RTO else min(rto, MAX_RTO)

    def _reorder_window(self, recovering: bool) -> float:
        if not self._reordering and (recovering or self._sacked.total >= _DUPLICATE_THRESHOLD):
            return 0.0
        return min(self._reorder_steps * self.min_rtt / 4, self.srtt or 0.0)

    def _advance(self, ack: int) -> None:
        self.una = ack
        runs = self._runs
        done = 0
        while done < len(runs) and runs[done].end <= ack:
            done += 1
        del runs[:done]
        if self._touched:
            for ranges in (self._sacked, self.lost, self._touched):
                if ranges and ranges.first < ack:
                    ranges.remove(ranges.first, ack)
