"""One UDX stream: reliable bytes both ways, and messages that may get lost (spec: udx 2-4).

A stream only keeps state; `mux.Mux` owns it, gives it its packets and collects what it sends.

    created --connect--> connected --(END acknowledged and peer's END received)--> closed
       |                     |------- destroy, DESTROY received, 7th timeout -----> closed
       `-------------------- destroy, DESTROY received ---------------------------> closed
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..errors import Broken, Closed, InvalidInput, StreamReset, StreamTimeout
from ..transmit import Address, Buffer, Transmit
from . import packet as wire
from .congestion import Cubic
from .mtu import MtuSearch
from .packet import HEADER_BYTES, SEQ_MASK, Packet, expand
from .receive import Receiver
from .recovery import Acknowledged, Flight, Run
from .send import SendBuffer

#: Asked about packets from a socket that is not the stream's: (stream, socket, source, now).
Firewall = Callable[["Stream", int, Address, float], bool]

#: Messages kept for the reader, and for the next `transmits`; older ones are dropped.
MAX_MESSAGES = 64
#: The longest message the reference takes: its datagram buffer less the header (spec: udx 1.5).
MAX_MESSAGE_BYTES = 2028
#: Retransmission timeouts in a row after which the peer is gone (spec: udx 4.6).
MAX_TIMEOUTS = 6
#: The peer's window before its first packet (spec: udx 2.1).
_INITIAL_SEND_WINDOW = 4 * 1024 * 1024
#: One kernel call takes 64 KiB, and 64 segments, of one run (spec: udx 8.1; UDP_SEGMENT).
_MAX_RUN_BYTES = 65000
_MAX_RUN_PACKETS = 64
#: A tail-loss probe waits two round trips and for the peer's delayed ACK, and never so short that
#: the peer's own pace would set it off. Seconds.
_ACK_DELAY = 0.002
_MIN_PROBE_TIMEOUT = 0.01


@dataclass(slots=True)
class Stats:
    """What happened so far, in packets unless said otherwise."""

    received: int = 0
    #: Named a live stream and made no sense.
    malformed: int = 0
    #: Named no stream that is known here.
    unknown: int = 0
    #: Refused by a firewall hook, or by there being none.
    blocked: int = 0
    #: Had arrived before.
    duplicates: int = 0
    #: Lay beyond the window, or after the end.
    overruns: int = 0
    #: Acknowledged what was never sent.
    wrong_acks: int = 0
    sent: int = 0
    retransmissions: int = 0
    acks: int = 0
    #: Retransmission timeouts.
    timeouts: int = 0


class Owner(Protocol):
    """What a stream needs of the mux that owns it."""

    stats: Stats

    def touch(self, stream: Stream) -> None:
        """The stream may have something to send or another deadline."""

    def changed(self, stream: Stream) -> None:
        """Something a reader or a writer wants to know has changed."""

    def say(self, transmit: Transmit) -> None:
        """Send the last packet of a stream that closes."""

    def retire(self, stream: Stream, farewell: Transmit | None) -> None:
        """The stream is closed; ``farewell`` answers a peer that missed its last ACK."""


@dataclass(slots=True)
class _Remote:
    """Where packets up to a number go when they are sent again (spec: udx 2.8)."""

    until: int
    id: int
    address: Address


class Stream:
    """See `Mux.create`. Times are seconds; every call with ``now`` takes effect on the wire at the
    next `Mux.transmits`."""

    __slots__ = (
        "_ack_owed",
        "_advertised",
        "_congestion",
        "_end_queued",
        "_end_sent",
        "_flight",
        "_heartbeat_owed",
        "_keep_alive",
        "_keep_alive_at",
        "_link_mtu",
        "_mtu",
        "_old_remotes",
        "_outbox",
        "_owner",
        "_probe_owed",
        "_probe_permitted",
        "_receiver",
        "_recover_until",
        "_rto_at",
        "_send_buffer",
        "_send_window",
        "_sent_offset",
        "_timed_out",
        "_timeouts",
        "_tlp_at",
        "_window_ack",
        "_window_limited",
        "_window_seq",
        "_zero_at",
        "address",
        "changed",
        "closed",
        "connected",
        "dirty",
        "ended",
        "error",
        "firewall",
        "has_received",
        "local_id",
        "messages",
        "remote_ended",
        "remote_id",
        "scheduled",
        "socket",
    )

    def __init__(
        self,
        owner: Owner,
        local_id: int,
        *,
        receive_window: int,
        link_mtu: int,
        first_seq: int = 0,
        first_ack: int = 0,
    ) -> None:
        #: The id that packets to this stream carry.
        self.local_id = local_id
        #: The peer's id, socket and address, once connected; before, None, -1 and ("", 0).
        self.remote_id: int | None = None
        self.socket = -1
        self.address: Address = ("", 0)
        self.connected = False
        #: Asked about each packet that arrives on a socket that is not the stream's, so also about
        #: each one before `connect`. It may call `connect` or `change_remote`. True processes the
        #: packet, False drops it; None drops them all (spec: udx 2.3).
        self.firewall: Firewall | None = None
        #: The peer's END and everything before it have arrived, and the ACK is on its way.
        self.remote_ended = False
        #: The peer has acknowledged everything, our END included.
        self.ended = False
        self.closed = False
        #: Why it closed: None for an end both ways or a local `destroy`.
        self.error: Broken | None = None
        #: Payloads of messages that arrived, oldest first.
        self.messages: deque[bytes] = deque(maxlen=MAX_MESSAGES)
        #: A packet for this stream was let in.
        self.has_received = False
        #: The mux's marks: in its lists of streams to serve and to report; next wake-up queued.
        self.dirty = False
        self.changed = False
        self.scheduled: float | None = None

        self._owner = owner
        self._receiver = Receiver(first_ack, receive_window)
        self._send_buffer = SendBuffer()
        self._flight = Flight(first_seq)
        self._congestion = Cubic()
        self._link_mtu = link_mtu
        self._mtu = MtuSearch(link_mtu)
        self._old_remotes: list[_Remote] = []
        self._outbox: deque[bytes] = deque(maxlen=MAX_MESSAGES)
        self._sent_offset = 0
        self._end_queued = False
        self._end_sent = False
        # The peer's window, and the numbers of the packet that told it (spec: udx 3.3).
        self._send_window = _INITIAL_SEND_WINDOW
        self._window_seq = first_ack
        self._window_ack = first_seq
        # The window the peer last heard of.
        self._advertised = receive_window
        self._ack_owed = False
        self._heartbeat_owed = False
        self._keep_alive: float | None = None
        # Congestion recovery lasts until this number is acknowledged; None while there is no loss.
        self._recover_until: int | None = None
        self._window_limited = False
        self._timeouts = 0
        self._timed_out = False
        self._probe_owed = False
        self._probe_permitted = False
        self._rto_at: float | None = None
        self._tlp_at: float | None = None
        self._zero_at: float | None = None
        self._keep_alive_at: float | None = None

    def __repr__(self) -> str:
        state = "closed" if self.closed else "connected" if self.connected else "created"
        return f"<Stream {self.local_id} {state} remote={self.remote_id}@{self.address}>"

    @property
    def readable(self) -> int:
        """In-order bytes waiting in `read`."""
        return self._receiver.readable

    @property
    def unsent(self) -> int:
        """Bytes written and not sent yet."""
        return self._send_buffer.end - self._sent_offset

    @property
    def unacked(self) -> int:
        """Bytes sent and not cumulatively acknowledged."""
        offset = self._flight.acknowledged_offset
        return 0 if offset is None else self._sent_offset - offset

    @property
    def keep_alive(self) -> float | None:
        """Seconds between HEARTBEATs while nothing is outstanding; None, the default, for none.
        They keep NAT mappings alive and never close a stream (spec: udx 2.7)."""
        return self._keep_alive

    @keep_alive.setter
    def keep_alive(self, interval: float | None) -> None:
        if interval is not None and interval <= 0:
            raise InvalidInput(f"keep_alive must be above 0 s or None, not {interval}")
        self._keep_alive = interval
        self._keep_alive_at = None
        self._owner.touch(self)

    def connect(self, socket: int, remote_id: int, address: Address, now: float) -> None:
        """Bind to a peer. Sends nothing by itself but an ACK that is owed (spec: udx 2.2). Raises
        InvalidInput if connected already, Closed if closed."""
        self._check_open()
        if self.connected:
            raise InvalidInput(f"{self!r} is connected; use change_remote")
        self._set_remote(socket, remote_id, address)
        self.connected = True
        self._after_receive(now)

    def change_remote(self, socket: int, remote_id: int, address: Address, now: float) -> None:
        """Send from now on from another socket to another address and id. What left before is
        repeated to where it went (spec: udx 2.8). Raises InvalidInput if not connected, Closed if
        closed."""
        self._check_open()
        if self.remote_id is None:
            raise InvalidInput(f"{self!r} is not connected; use connect")
        if self._flight.outstanding:
            self._old_remotes.append(_Remote(self._flight.next, self.remote_id, self.address))
        self._set_remote(socket, remote_id, address)
        self._mtu = MtuSearch(self._link_mtu)
        self._flight.probe = None
        self._owner.touch(self)

    def write(self, data: Buffer, now: float) -> None:
        """Queue bytes, kept by reference until they are acknowledged: do not change them. There
        is no limit here; look at `unsent` and `unacked`. Raises Closed after end or close."""
        self._check_writable()
        self._send_buffer.append(data)
        self._wake_window(now)
        self._owner.touch(self)

    def end(self, now: float) -> None:
        """Send END after all that is queued; receiving goes on. Twice is once. Raises Closed after
        close."""
        self._check_open()
        if self._end_queued:
            return
        self._end_queued = True
        self._wake_window(now)
        self._owner.touch(self)

    def destroy(self, now: float) -> None:
        """Close at once, and tell the peer if connected. What is not delivered is lost. Harmless
        when closed."""
        if self.closed:
            return
        self._close(None, wire.DESTROY if self.connected else None, lingering=False)

    def send_message(self, payload: bytes, now: float) -> None:
        """Send one message of at most `MAX_MESSAGE_BYTES`; it may get lost, and only the newest
        `MAX_MESSAGES` wait for a connection. Raises InvalidInput if longer, Closed if closed."""
        self._check_open()
        if len(payload) > MAX_MESSAGE_BYTES:
            raise InvalidInput(f"a message of {len(payload)} bytes exceeds {MAX_MESSAGE_BYTES}")
        self._outbox.append(payload)
        self._owner.touch(self)

    def read(self, limit: int | None = None) -> list[Buffer]:
        """Take up to ``limit`` in-order bytes (None: all). They count against the window until
        `credit`."""
        return self._receiver.take(limit)

    def credit(self, size: int, now: float) -> None:
        """``size`` of the bytes read are consumed: the window grows again, and the peer is told
        when it had become small. Raises InvalidInput for more than was read."""
        receiver = self._receiver
        receiver.credit(size)
        if self.closed or self._ack_owed or receiver.finished:
            return
        # The peer asks only every 2 s (spec: udx 3.3), and a tell for each byte would be silly.
        small = self._advertised < receiver.capacity // 2
        if small and receiver.window - self._advertised >= receiver.capacity // 4:
            self._owe_ack()

    # For the mux.

    def receive(self, packet: Packet, now: float) -> None:
        """Process a packet that was let in, in the order of spec: udx 4.1."""
        self.has_received = True
        kind = packet.type
        if kind & wire.HEARTBEAT:
            self._owe_ack()
            return
        receiver, flight = self._receiver, self._flight
        seq = expand(packet.seq, receiver.next)
        if kind & wire.DESTROY and seq >= receiver.next:
            reset = StreamReset("the peer destroyed the stream; connect again")
            self._close(reset, None, lingering=False)
            return
        if kind & (wire.DATA | wire.END):
            self._receive_data(seq, packet)
        if kind & wire.MESSAGE and len(packet.payload) <= MAX_MESSAGE_BYTES:
            self.messages.append(packet.payload)
            self._owner.changed(self)
        ack = expand(packet.ack, flight.una)
        if ack > flight.next:
            # Nor is the data acknowledged: this peer means another stream (spec: udx 8, 4).
            self._owner.stats.wrong_acks += 1
            return
        if kind & (wire.DATA | wire.END):
            self._owe_ack()
        if ack >= flight.una:
            self._update_window(seq, ack, packet.window)
        if flight.outstanding and (ack > flight.una or packet.sacks):
            blocks = [(expand(start, ack), expand(end, ack)) for start, end in packet.sacks]
            self._acknowledged(flight.acknowledge(ack, blocks, now), now)
        self._after_receive(now)

    def deadline(self) -> float | None:
        """When `on_deadline` must be called at the latest."""
        if not self.connected or self.closed:
            return None
        times = (
            self._rto_at,
            self._tlp_at,
            self._flight.reorder_at,
            self._zero_at,
            self._keep_alive_at,
        )
        return min((when for when in times if when is not None), default=None)

    def on_deadline(self, now: float) -> None:
        """Do what has become due."""
        if self._rto_at is not None and self._rto_at <= now:
            self._on_timeout(now)
            if self.closed:
                return
        if self._flight.reorder_at is not None and self._flight.reorder_at <= now:
            self._detect_losses(now)
        if self._tlp_at is not None and self._tlp_at <= now:
            self._tlp_at = None
            self._probe_owed = True
        if self._zero_at is not None and self._zero_at <= now:
            self._heartbeat_owed = True
            self._zero_at = now + 2 * self._flight.rto
        if self._keep_alive_at is not None and self._keep_alive_at <= now:
            self._heartbeat_owed = True
            self._keep_alive_at = None
        self._owner.touch(self)

    def transmits(self, now: float, out: list[Transmit]) -> None:
        """Append what is to be sent now."""
        if self.closed or not self.connected:
            return
        data_before = self._owner.stats.sent
        self._send_lost(now, out)
        self._send_new(now, out)
        if self._probe_owed:
            self._send_probe(now, out)
        while self._outbox:
            self._send_control(wire.MESSAGE, out, self._outbox.popleft())
        if self._heartbeat_owed:
            self._heartbeat_owed = False
            self._send_control(wire.HEARTBEAT, out)
        if self._ack_owed:
            self._ack_owed = False
            self._owner.stats.acks += 1
            self._send_control(wire.ACK, out)
        if self._owner.stats.sent != data_before:
            self._owner.changed(self)
        self._arm_idle(now)

    # Receiving.

    def _receive_data(self, seq: int, packet: Packet) -> None:
        receiver, stats = self._receiver, self._owner.stats
        duplicates, dropped = receiver.duplicates, receiver.dropped
        payload = packet.payload if packet.type & wire.DATA else b""
        if receiver.accept(seq, payload, bool(packet.type & wire.END)):
            self._owner.changed(self)
        stats.duplicates += receiver.duplicates - duplicates
        stats.overruns += receiver.dropped - dropped

    def _update_window(self, seq: int, ack: int, window: int) -> None:
        newer = self._window_seq < seq or (self._window_seq == seq and self._window_ack <= ack)
        if not newer:
            return
        if window != self._send_window:
            self._send_window = window
            self._owner.touch(self)
        self._window_seq = seq
        self._window_ack = ack

    def _acknowledged(self, result: Acknowledged, now: float) -> None:
        if not result.packets and not result.advanced:
            return
        flight = self._flight
        self._mtu.begin()
        if result.probe:
            self._mtu.acknowledged()
        if result.sampled:
            self._probe_permitted = True
        if result.advanced:
            self._timeouts = 0
            self._release()
            self._rto_at = now + flight.rto if flight.outstanding else None
            if self._recover_until is not None and flight.una >= self._recover_until:
                self._recover_until = None
                self._timed_out = False
            self._owner.changed(self)
        self._detect_losses(now)
        growing = self._recover_until is None or self._timed_out
        if growing and self._window_limited:
            self._congestion.on_ack(result.packets, flight.srtt or 0.0, now)
        self._arm_probe(now)
        if flight.una == flight.next and self._end_sent:
            self.ended = True
            # One more ACK, unless the stream closes (spec: udx 2.4).
            if not self._receiver.finished:
                self._owe_ack()
        self._owner.touch(self)

    def _release(self) -> None:
        flight = self._flight
        offset = flight.acknowledged_offset
        self._send_buffer.release(self._sent_offset if offset is None else offset)
        while self._old_remotes and self._old_remotes[0].until <= flight.una:
            del self._old_remotes[0]

    def _detect_losses(self, now: float) -> None:
        late = self._flight.detect_losses(now, recovering=self._recover_until is not None)
        if late and self._lose_probe(late) and self._recover_until is None:
            self._recover_until = self._flight.next
            self._congestion.on_loss()

    def _lose_probe(self, late: list[tuple[int, int]]) -> bool:
        """Tell the MTU search if its probe is lost; returns whether anything else is."""
        flight = self._flight
        packets = sum(end - start for start, end in late)
        if flight.probe is not None and any(start <= flight.probe < end for start, end in late):
            flight.probe = None
            self._mtu.lost()
            packets -= 1
        return packets > 0

    def _after_receive(self, now: float) -> None:
        """See which ends have been reached."""
        if self.connected and not self.remote_ended and self._receiver.finished:
            self.remote_ended = True
            self._owner.changed(self)
        if self.ended and self.remote_ended:
            self._close(None, wire.ACK if self._ack_owed else None, lingering=True)
        elif self.connected:
            self._owner.touch(self)

    # Sending.

    def _send_lost(self, now: float, out: list[Transmit]) -> None:
        flight = self._flight
        while flight.lost and flight.in_flight < int(self._congestion.window):
            self._resend(flight.lost.first, now, out)
        if flight.lost:
            self._window_limited = True

    def _send_new(self, now: float, out: list[Transmit]) -> None:
        flight = self._flight
        if flight.lost or not self._pending:
            return
        window = int(self._congestion.window)
        budget = min(window, self._window_packets) - flight.in_flight
        sent = False
        while budget > 0 and self._pending:
            budget -= self._send_run(budget, now, out)
            sent = True
        self._window_limited = flight.in_flight >= window
        if sent:
            self._arm_probe(now)

    def _send_probe(self, now: float, out: list[Transmit]) -> None:
        """The tail-loss probe: something new if there is, else the newest again (spec: udx 4.5)."""
        self._probe_owed = False
        flight = self._flight
        newest = flight.newest()
        if newest is None or self._recover_until is not None or not self._probe_permitted:
            return
        self._probe_permitted = False
        if self._pending and self._send_window:
            self._send_run(1, now, out)
        else:
            self._lose_probe([(newest, newest + 1)])
            self._resend(newest, now, out)
        self._rto_at = now + flight.rto

    @property
    def _pending(self) -> bool:
        """Something waits to be sent for the first time."""
        return self._sent_offset < self._send_buffer.end or (
            self._end_queued and not self._end_sent
        )

    @property
    def _window_packets(self) -> int:
        """Packets the peer's window permits: any but an empty one permits one (spec: udx 3.2)."""
        return max(1, self._send_window // self._mtu.payload) if self._send_window else 0

    def _send_run(self, budget: int, now: float, out: list[Transmit]) -> int:
        """Send up to ``budget`` new packets in one transmit; returns how many."""
        size = self._mtu.payload
        available = self.unsent
        padding = 0 if self._old_remotes else self._mtu.padding(min(size, available))
        if padding:
            self._mtu.sent()
            self._flight.probe = self._flight.next
            budget = 1
        most = min(budget, _MAX_RUN_BYTES // (size + HEADER_BYTES), _MAX_RUN_PACKETS)
        length = min(available, most * size)
        count = max(1, -(-length // size))
        fin = self._end_queued and length == available
        first = self._flight.next
        run = Run(first, first + count, self._sent_offset, length, size, now, fin)
        segment = size + HEADER_BYTES if count > 1 else 0
        buffers: list[Buffer] = []
        for seq in range(first, run.end):
            self._append_packet(buffers, run, seq, self.remote_id or 0, padding)
        out.append(Transmit(self.socket, self.address, tuple(buffers), segment))
        self._sent_offset += length
        self._end_sent = fin
        if not self._flight.outstanding:
            self._rto_at = now + self._flight.rto
        self._flight.sent(run)
        self._owner.stats.sent += count
        return count

    def _resend(self, seq: int, now: float, out: list[Transmit]) -> None:
        run = self._flight.resent(seq, now)
        remote_id, address = self.remote_id or 0, self.address
        for remote in self._old_remotes:
            if seq < remote.until:
                remote_id, address = remote.id, remote.address
                break
        buffers: list[Buffer] = []
        self._append_packet(buffers, run, seq, remote_id, 0)
        out.append(Transmit(self.socket, address, tuple(buffers)))
        self._owner.stats.sent += 1
        self._owner.stats.retransmissions += 1

    def _append_packet(
        self, buffers: list[Buffer], run: Run, seq: int, remote_id: int, padding: int
    ) -> None:
        offset, length = run.slice(seq)
        kind = wire.DATA if length else 0
        if run.fin and seq == run.end - 1:
            kind |= wire.END
        window = self._advertise()
        ack = self._receiver.next & SEQ_MASK
        buffers.append(
            wire.HEADER.pack(
                wire.MAGIC,
                wire.VERSION,
                kind,
                padding,
                remote_id,
                window,
                seq & SEQ_MASK,
                ack,
            )
        )
        if padding:
            buffers.append(bytes(padding))
        if length:
            buffers.extend(self._send_buffer.pieces(offset, length))

    def _send_control(self, kind: int, out: list[Transmit], payload: bytes = b"") -> None:
        out.append(self._control(kind, payload))

    def _control(self, kind: int, payload: bytes = b"") -> Transmit:
        """A packet that takes no number."""
        blocks: tuple[tuple[int, int], ...] = ()
        if kind == wire.ACK and (blocks := self._receiver.blocks()):
            kind = wire.SACK
            blocks = tuple((start & SEQ_MASK, end & SEQ_MASK) for start, end in blocks)
        datagram = wire.encode(
            Packet(
                kind,
                self.remote_id or 0,
                self._advertise(),
                self._flight.next & SEQ_MASK,
                self._receiver.next & SEQ_MASK,
                payload,
                blocks,
            )
        )
        return Transmit(self.socket, self.address, (datagram,))

    def _advertise(self) -> int:
        self._advertised = self._receiver.window
        return self._advertised

    def _owe_ack(self) -> None:
        self._ack_owed = True
        self._owner.touch(self)

    # Time.

    def _on_timeout(self, now: float) -> None:
        flight = self._flight
        self._owner.stats.timeouts += 1
        self._timeouts += 1
        if self._timeouts > MAX_TIMEOUTS:
            # The reference forgets a stream as soon as it is done and leaves the last END
            # unanswered if its ACK got lost (spec: udx 8, 10).
            offset = flight.acknowledged_offset
            only_end = self._end_sent and offset == self._send_buffer.end
            gone = StreamTimeout("the peer stopped answering; check the network and connect again")
            self._close(None if only_end and self.remote_ended else gone, None, lingering=False)
            return
        self._rto_at = now + 2 * flight.rto
        self._tlp_at = None
        self._probe_owed = False
        self._lose_probe(flight.expire(now))
        flight.reorder_at = None
        self._recover_until = flight.next
        self._timed_out = True
        self._congestion.on_timeout(flight.in_flight)

    def _arm_probe(self, now: float) -> None:
        flight = self._flight
        quiet = self._recover_until is None and not flight.sacked and self._probe_permitted
        if not flight.outstanding or not quiet or flight.srtt is None:
            self._tlp_at = None
            return
        self._tlp_at = now + max(2 * flight.srtt + _ACK_DELAY, _MIN_PROBE_TIMEOUT)

    def _wake_window(self, now: float) -> None:
        """Ask for the window at once when a writer begins to wait for it (spec: udx 3.3)."""
        stuck = self._send_window == 0 and not self._flight.outstanding and self._zero_at is None
        if stuck and self.connected:
            self._heartbeat_owed = True
            self._zero_at = now + self._flight.rto

    def _arm_idle(self, now: float) -> None:
        """Set the timers of a stream with nothing outstanding."""
        if self._flight.outstanding:
            self._zero_at = self._keep_alive_at = None
            return
        self._rto_at = self._tlp_at = self._flight.reorder_at = None
        if self._send_window or not self._pending:
            self._zero_at = None
        elif self._zero_at is None:
            self._zero_at = now + self._flight.rto
        if self._keep_alive is not None and self._keep_alive_at is None:
            self._keep_alive_at = now + self._keep_alive

    # Life.

    def _set_remote(self, socket: int, remote_id: int, address: Address) -> None:
        if not 0 < address[1] < 65536 or not 0 <= remote_id <= SEQ_MASK:
            raise InvalidInput(f"cannot connect to id {remote_id} at {address}")
        self.socket = socket
        self.remote_id = remote_id
        self.address = address

    def _check_open(self) -> None:
        if self.closed:
            raise Closed("the stream is closed; open another")

    def _check_writable(self) -> None:
        self._check_open()
        if self._end_queued:
            raise Closed("the stream was ended; nothing can be written after that")

    def _close(self, error: Broken | None, last: int | None, *, lingering: bool) -> None:
        """Close. ``last`` is the type of one last packet; ``lingering`` goes on answering a peer
        that missed the last ACK."""
        farewell = None
        if last is not None:
            self._owner.stats.acks += last == wire.ACK
            self._owner.say(self._control(last))
        if lingering:
            farewell = self._control(wire.ACK)
        self.closed = True
        self.error = error
        self._receiver.discard()
        self._sent_offset = self._send_buffer.end
        self._send_buffer.clear()
        self._flight.clear()
        self._outbox.clear()
        self._owner.changed(self)
        self._owner.retire(self, farewell)
