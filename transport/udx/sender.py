"""The sending half of a stream: when which bytes leave, and again when they got lost.

Data is limited by the peer's window and by the congestion window (`bbr.Bbr`), spread over time
(`pacing.Pacer`), acknowledged (`recovery.Flight`), probed and timed (spec: udx 3, 4.5, 4.6).
"""

from __future__ import annotations

from typing import Protocol

from ..transmit import Buffer
from . import packet as wire
from .bbr import Bbr
from .mtu import BASE_PAYLOAD, MAX_MTU, MtuSearch
from .pacing import Pacer
from .packet import HEADER_BYTES, MAX_SACK_BLOCKS, expand
from .rate import Delivery
from .recovery import Acknowledged, Flight, Run
from .send import SendBuffer

#: Retransmission timeouts in a row after which the peer is gone (spec: udx 4.6).
MAX_TIMEOUTS = 6
#: The peer's window before its first packet (spec: udx 2.1).
_INITIAL_WINDOW = 4 * 1024 * 1024
#: One kernel call takes 64 KiB, and 64 segments, of one run.
_MAX_RUN_BYTES = 65000
_MAX_RUN_PACKETS = 64
#: A tail-loss probe waits two round trips and for the peer's delayed ACK, and never so short that
#: the peer's own pace would set it off. Seconds.
_ACK_DELAY = 0.002
MIN_PROBE_TIMEOUT = 0.01
#: The least time between later probes, and their share of the time without an answer: about thirty
#: until the peer is given up, on paths that are not long. Seconds.
_REPEAT_AFTER = 0.2
_REPEATS = 12
#: Bytes that `Sender.small_payload` takes, in one packet on any path.
_SMALL = 1024
#: Packets that `Sender.repeat` sends: the first ones, by which the peer finds out what the others
#: are.
_REPEATED = 3


class Carrier(Protocol):
    """Knows where packets go and what else their headers tell."""

    def header(self, kind: int, seq: int, padding: int) -> bytes:
        """The header of a packet that takes a number."""

    def headers(self, first: int, count: int) -> list[bytes]:
        """The headers of a run of new packets with plain data."""

    def carry(self, buffers: list[Buffer], segment: int, may_fragment: bool = False) -> None:
        """Send what makes up one `Transmit`."""


class Sender:
    """Bytes on their way to the peer. Packet numbers have no wrap-around; times are seconds."""

    __slots__ = (
        "_buffer",
        "_delivery",
        "_heard_at",
        "_known_sacks",
        "_offset",
        "_pace_at",
        "_pacer",
        "_probe_owed",
        "_probe_permitted",
        "_recover_until",
        "_rto_at",
        "_timed_out",
        "_timeouts",
        "_tlp_at",
        "_window_ack",
        "_window_seq",
        "_zero_at",
        "congestion",
        "end_apart",
        "end_queued",
        "end_sent",
        "flight",
        "heartbeat_owed",
        "mtu",
        "retransmissions",
        "sent",
        "window",
    )

    def __init__(self, first_seq: int = 0, first_ack: int = 0, link_mtu: int = MAX_MTU) -> None:
        self.flight = Flight(first_seq)
        self.congestion = Bbr()
        self.mtu = MtuSearch(link_mtu)
        #: The peer's free receive buffer, bytes.
        self.window = _INITIAL_WINDOW
        #: END follows all that is written.
        self.end_queued = False
        #: It has left, at least once.
        self.end_sent = False
        #: END gets a packet of its own: the peer has ended, and the reference forgets the stream at
        #: our END, so that the ACK of what is in that packet comes once or never (spec: udx 2.4).
        self.end_apart = False
        #: A HEARTBEAT shall ask for the peer's window.
        self.heartbeat_owed = False
        #: Packets sent, retransmissions among them.
        self.sent = 0
        self.retransmissions = 0
        self._buffer = SendBuffer()
        self._delivery = Delivery()
        self._pacer = Pacer()
        # When the pacer lets the next burst go; None while it holds nothing back.
        self._pace_at: float | None = None
        # The blocks of the last ACK: most of the next one's are the same.
        self._known_sacks: frozenset[tuple[int, int]] = frozenset()
        self._offset = 0
        # Numbers of the packet that last told the peer's window (spec: udx 3.3).
        self._window_seq = first_ack
        self._window_ack = first_seq
        # Congestion recovery lasts until this number is acknowledged; None while there is no loss.
        self._recover_until: int | None = None
        # It began with a timeout: there is nothing to probe.
        self._timed_out = False
        self._timeouts = 0
        # When the peer last told something new, or had nothing to tell.
        self._heard_at = 0.0
        self._probe_owed = False
        self._probe_permitted = False
        self._rto_at: float | None = None
        self._tlp_at: float | None = None
        self._zero_at: float | None = None

    @property
    def unsent(self) -> int:
        """Bytes written and not sent yet."""
        return self._buffer.end - self._offset

    @property
    def unacked(self) -> int:
        """Bytes sent and not cumulatively acknowledged."""
        offset = self.flight.acknowledged_offset
        return 0 if offset is None else self._offset - offset

    @property
    def idle(self) -> bool:
        """Nothing is outstanding."""
        return self.flight.outstanding == 0

    @property
    def ended(self) -> bool:
        """Everything is acknowledged, END included."""
        return self.end_sent and self.flight.outstanding == 0

    @property
    def only_end_missing(self) -> bool:
        """Everything is acknowledged but an END that carries no data."""
        return self.end_sent and self.flight.acknowledged_offset == self._buffer.end

    @property
    def pending(self) -> bool:
        """Something waits to be sent for the first time."""
        return self._offset < self._buffer.end or (self.end_queued and not self.end_sent)

    def write(self, data: Buffer) -> None:
        """Queue bytes, by reference."""
        self._buffer.append(data)

    def wake_window(self, now: float) -> None:
        """Ask for a closed window at once when a writer begins to wait for it (spec: udx 3.3)."""
        if self.window == 0 and self.idle and self._zero_at is None:
            self.heartbeat_owed = True
            self._zero_at = now + self.flight.rto

    def new_path(self, link_mtu: int) -> None:
        """Packets take another way from now on."""
        self.mtu = MtuSearch(link_mtu)
        self.flight.probe = None
        # It may be too narrow for what is under way.
        self.flight.cut_before = self.flight.next

    def start_anew(self, link_mtu: int, now: float) -> None:
        """As `new_path`, when what is on the way is lost: the new way begins as slowly as any."""
        self.new_path(link_mtu)
        flight = self.flight
        self.congestion = Bbr()
        self._pacer = Pacer()
        self._timeouts = 0
        self._heard_at = now
        self._probe_owed = self._timed_out = False
        if flight.outstanding:
            flight.lose_all()
            self._recover_until = flight.next
            self._rto_at = now + flight.rto
            self._arm_probe(now)

    def update_window(self, seq: int, ack: int, window: int) -> None:
        """Take the peer's window from a packet, unless an older one is told (spec: udx 3.3)."""
        if self._window_seq < seq or (self._window_seq == seq and self._window_ack <= ack):
            self.window = window
            self._window_seq = seq
            self._window_ack = ack

    def acknowledge(
        self, ack: int, sacks: tuple[tuple[int, int], ...], now: float
    ) -> Acknowledged | None:
        """Apply an ACK (``sacks`` as on the wire). Returns None if it told nothing new."""
        flight = self.flight
        if flight.una == flight.next or not (ack > flight.una or sacks):
            return None
        blocks: list[tuple[int, int]] = []
        known = self._known_sacks
        if sacks or known:
            blocks = [
                (expand(one, ack), expand(end, ack))
                for one, end in sacks
                if (one, end) not in known
            ]
            self._known_sacks = frozenset(sacks)
        full = len(sacks) >= MAX_SACK_BLOCKS
        flight.horizon = expand(sacks[-1][1], ack) if full else None
        disturbed = flight.disturbed or bool(blocks)
        result = flight.acknowledge(ack, blocks, now)
        if not result.packets and not result.advanced:
            return None
        self._heard_at = now
        if not self.mtu.begun:
            self.mtu.begin()
        if result.probe:
            self.mtu.acknowledged()
        if result.packets:
            self._probe_permitted = True
        if result.advanced:
            self._advance(now)
        if disturbed:
            self._detect_losses(now)
        sample = self._delivery.arrived(result.packets, result.newest, flight.min_rtt, now)
        self.congestion.on_ack(sample, result.rtt, flight.in_flight, now)
        self._arm_probe(now)
        return result

    def transmit(self, carrier: Carrier, now: float) -> None:
        """Send what may be sent now: what got lost, then what is new, then an owed probe."""
        self._pace_at = None
        flight = self.flight
        if flight.lost.total or self.pending:
            self._send_paced(carrier, now)
        if self._probe_owed:
            self._send_probe(carrier, now)
        # Timers that have nothing to wait for stop.
        if flight.una != flight.next:
            self._zero_at = None
            return
        self._rto_at = self._tlp_at = flight.reorder_at = None
        if self.window or not self.pending:
            self._zero_at = None
        elif self._zero_at is None:
            self._zero_at = now + flight.rto

    def small_payload(self, now: float) -> memoryview | None:
        """The payload of packet `flight.next`, if all there is to send is a little that was written
        in one piece and may leave at once: `sent_small` is to be called then."""
        buffer, flight, congestion = self._buffer, self.flight, self.congestion
        size = buffer.end - self._offset
        outstanding = flight.next - flight.una
        if (
            not 0 < size <= _SMALL
            or outstanding >= int(congestion.window)
            or (outstanding + 1) * self.mtu.payload > self.window
            or self.end_queued
            or flight.disturbed
            or self._probe_owed
            or (self.mtu.wanted and self.mtu.padding(size))
            or not self._pacer.grant(1, congestion.pace, congestion.burst, now)
        ):
            return None
        return buffer.last_piece(self._offset)

    def sent_small(self, now: float) -> None:
        """What `small_payload` returned has left: as after `transmit`, for a quarter of its
        time."""
        buffer, flight, offset = self._buffer, self.flight, self._offset
        first = flight.next
        outstanding = first - flight.una
        self._pacer.spend(1)
        left = self._delivery.depart(now, idle=not outstanding)
        size = self.mtu.payload
        flight.sent(Run(first, first + 1, offset, buffer.end - offset, size, left))
        self._offset = buffer.end
        if not outstanding:
            self._rto_at = now + flight.rto
            self._heard_at = now
            self._zero_at = None
        if outstanding + 1 < int(self.congestion.window):
            self._delivery.limit(outstanding + 1)
        self._pace_at = None
        self._arm_probe(now)
        self.sent += 1

    def repeat(self, carrier: Carrier) -> int:
        """Send copies of the oldest outstanding packets; returns how many. They count as never
        sent: the round trip is still measured from the first departure."""
        flight = self.flight
        packets = range(flight.una, min(flight.next, flight.una + _REPEATED))
        for seq in packets:
            buffers: list[Buffer] = []
            self._append_packet(buffers, flight.find(seq), seq, carrier, 0)
            carrier.carry(buffers, 0)
        return len(packets)

    def deadline(self) -> float | None:
        """When `on_deadline` must be called at the latest."""
        soonest, when = self._tlp_at, self._rto_at
        if when is not None and (soonest is None or when < soonest):
            soonest = when
        when = self._pace_at
        if when is not None and (soonest is None or when < soonest):
            soonest = when
        when = self.flight.reorder_at
        if when is not None and (soonest is None or when < soonest):
            soonest = when
        when = self._zero_at
        if when is not None and (soonest is None or when < soonest):
            soonest = when
        return soonest

    def on_deadline(self, now: float) -> int:
        """Do what has become due. Returns how many retransmission timeouts there were in a row,
        0 if none was due: above `MAX_TIMEOUTS` the peer is gone."""
        timeouts = 0
        if self._rto_at is not None and self._rto_at <= now:
            timeouts = self._on_timeout(now)
        if self.flight.reorder_at is not None and self.flight.reorder_at <= now:
            self._detect_losses(now)
        if self._tlp_at is not None and self._tlp_at <= now:
            self._tlp_at = None
            self._probe_owed = True
        if self._zero_at is not None and self._zero_at <= now:
            self.heartbeat_owed = True
            self._zero_at = now + 2 * self.flight.rto
        return timeouts

    def discard(self) -> None:
        """Forget all bytes: nothing will be sent any more."""
        self._offset = self._buffer.end
        self._pace_at = None
        self._buffer.clear()
        self.flight.clear()

    def _send_paced(self, carrier: Carrier, now: float) -> None:
        """Send as much as the congestion window, the peer's window and the pacer permit."""
        flight, congestion, pacer = self.flight, self.congestion, self._pacer
        in_flight, payload = flight.in_flight, self.mtu.payload
        # Any window but an empty one permits one packet (spec: udx 3.2).
        permitted = (self.window // payload or 1) if self.window else 0
        unsent = -((self._offset - self._buffer.end) // payload)
        unsent += self.end_queued and not self.end_sent
        fresh = min(permitted - in_flight, unsent)
        lost = flight.lost.total
        wanted = min(int(congestion.window) - in_flight, lost + fresh if fresh > 0 else lost)
        if wanted > 0:
            granted = pacer.grant(wanted, congestion.pace, congestion.burst, now)
            done = self._resend(granted, carrier, now) if lost else 0
            done += self._send_new(min(granted - done, fresh), carrier, now)
            pacer.spend(done)
            wanted -= granted
        if wanted > 0 and congestion.pace is not None:
            self._pace_at = pacer.ready_at(wanted, congestion.pace, congestion.burst)
        elif flight.in_flight < int(congestion.window):
            self._delivery.limit(flight.in_flight)

    def _send_new(self, budget: int, carrier: Carrier, now: float) -> int:
        """Send up to ``budget`` new packets; returns how many."""
        sent = 0
        while sent < budget and (sent == 0 or self.pending):
            sent += self._send_run(budget - sent, carrier, now)
        if sent:
            self._arm_probe(now)
        return sent

    def _send_run(self, budget: int, carrier: Carrier, now: float) -> int:
        """Send up to ``budget`` new packets in one transmit; returns how many."""
        flight, mtu, offset = self.flight, self.mtu, self._offset
        size = mtu.payload
        length = available = self._buffer.end - offset
        first = flight.next
        padding = 0
        if mtu.wanted and (padding := mtu.padding(min(size, available))):
            mtu.sent()
            flight.probe = first
            budget = 1
        count = 1
        if length > size:
            most = min(budget, _MAX_RUN_BYTES // (size + HEADER_BYTES), _MAX_RUN_PACKETS)
            length = min(available, most * size)
            count = -(-length // size)
        fin = self.end_queued and length == available and not (self.end_apart and length)
        left = self._delivery.depart(now, idle=flight.in_flight == 0)
        run = Run(first, first + count, offset, length, size, left, fin)
        buffers: list[Buffer] = []
        plain = 0 if padding or count == 1 else count - fin
        if plain:
            buffers = [b""] * (2 * plain)
            buffers[::2] = carrier.headers(first, plain)
            buffers[1::2] = self._buffer.cut(offset, min(length, plain * size), size)
        for seq in range(first + plain, first + count):
            self._append_packet(buffers, run, seq, carrier, padding)
        carrier.carry(buffers, size + HEADER_BYTES if count > 1 else 0)
        self._offset = offset + length
        self.end_sent = fin
        if first == flight.una:
            self._rto_at = now + flight.rto
            self._heard_at = now
        flight.sent(run)
        self.sent += count
        return count

    def _resend(self, budget: int, carrier: Carrier, now: float) -> int:
        """Send up to ``budget`` lost packets again; returns how many."""
        sent = 0
        while sent < budget and self.flight.lost:
            sent += self._repeat(
                self.flight.first_lost(min(budget - sent, _MAX_RUN_PACKETS)), carrier, now
            )
        return sent

    def _repeat(self, packets: list[int], carrier: Carrier, now: float) -> int:
        """Send packets again, as many as make up one transmit; returns how many."""
        flight = self.flight
        left = self._delivery.depart(now, idle=flight.in_flight == 0)
        buffers: list[Buffer] = []
        most = count = 0
        cut = False
        for seq in packets:
            size = flight.find(seq).slice(seq)[1]
            cut = size > BASE_PAYLOAD and seq < flight.cut_before
            if count and (
                cut or size > most or (count + 1) * (most + HEADER_BYTES) > _MAX_RUN_BYTES
            ):
                break
            most = max(most, size)
            self._append_packet(buffers, flight.resent(seq, left), seq, carrier, 0)
            count += 1
            if cut or size < most:
                break
        carrier.carry(buffers, most + HEADER_BYTES if count > 1 else 0, cut)
        self.sent += count
        self.retransmissions += count
        return count

    def _append_packet(
        self, buffers: list[Buffer], run: Run, seq: int, carrier: Carrier, padding: int
    ) -> None:
        length = run.length
        offset, length = run.slice(seq) if length > run.size else (run.offset, length)
        kind = wire.DATA if length else 0
        if run.fin and seq == run.end - 1:
            kind |= wire.END
        buffers.append(carrier.header(kind, seq, padding))
        if padding:
            buffers.append(bytes(padding))
        if length:
            buffers += self._buffer.pieces(offset, length)

    def _send_probe(self, carrier: Carrier, now: float) -> None:
        """The tail-loss probe: something new if there is, else the newest again (spec: udx 4.5);
        beyond a gap the oldest, which the peer's reader waits for. It proves lost what left before
        it, a retransmission too. As long as it gets no answer, the oldest follows, less and less
        often: seven timeouts may all fall into one burst of losses."""
        flight = self.flight
        self._probe_owed = False
        first = self._probe_permitted and not self._timed_out
        probe = flight.una if flight.sacked or not first else flight.newest()
        if probe is None or self.idle:
            return
        if not first:
            self._lose_probe([(probe, probe + 1)])
            self._repeat([probe], carrier, now)
            self._arm_probe(now)
            return
        self._probe_permitted = False
        if self.pending and self.window and not flight.sacked:
            self._send_run(1, carrier, now)
        else:
            self._lose_probe([(probe, probe + 1)])
            self._repeat([probe], carrier, now)
        self._rto_at = now + self.flight.rto
        self._arm_probe(now)

    def _advance(self, now: float) -> None:
        """The oldest outstanding packet is another one."""
        flight = self.flight
        self._timeouts = 0
        offset = flight.acknowledged_offset
        if offset is None:
            self._buffer.release(self._offset)
            self._rto_at = None
        else:
            self._buffer.release(offset)
            self._rto_at = now + flight.rto
        if self._recover_until is not None and flight.una >= self._recover_until:
            self._recover_until = None
            self._timed_out = False

    def _detect_losses(self, now: float) -> None:
        late = self.flight.detect_losses(now, recovering=self._recover_until is not None)
        if late and (packets := self._lose_probe(late)):
            self.congestion.on_loss(packets)
            if self.flight.narrow:
                self._narrow()
            if self._recover_until is None:
                self._recover_until = self.flight.next

    def _lose_probe(self, late: list[tuple[int, int]]) -> int:
        """Tell the MTU search if its probe is lost; returns how many packets are besides."""
        probe = self.flight.probe
        packets = sum(end - start for start, end in late)
        if probe is not None and any(start <= probe < end for start, end in late):
            self.flight.probe = None
            self.mtu.lost()
            packets -= 1
        return packets

    def _on_timeout(self, now: float) -> int:
        flight = self.flight
        self._timeouts += 1
        self._rto_at = now + 2 * flight.rto
        self._probe_owed = False
        self._lose_probe(flight.expire(now))
        if flight.is_large(flight.una):
            self._narrow()
        flight.reorder_at = None
        self._recover_until = flight.next
        self._timed_out = True
        self.congestion.on_timeout(flight.in_flight)
        self._arm_probe(now)
        return self._timeouts

    def _narrow(self) -> None:
        """Nothing large comes through: look for the path's MTU again, and let what is under way be
        fragmented."""
        self.flight.narrow = False
        self.flight.cut_before = self.flight.next
        self.flight.probe = None
        self.mtu.begin_again()

    def _arm_probe(self, now: float) -> None:
        flight = self.flight
        if flight.una == flight.next or flight.srtt is None:
            self._tlp_at = None
            return
        wait = 2 * flight.srtt + _ACK_DELAY
        if self._probe_permitted and not self._timed_out:
            self._tlp_at = now + max(wait, MIN_PROBE_TIMEOUT)
        else:
            silence = now - self._heard_at
            self._tlp_at = now + max(wait, _REPEAT_AFTER, silence / _REPEATS)
