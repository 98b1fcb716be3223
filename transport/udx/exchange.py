"""The packets of one stream: what arrives, how it is answered, what leaves (spec: udx 2-4).

`stream.Stream` is the same thing as whoever reads and writes sees it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Protocol, cast

from ..errors import Broken, StreamReset, StreamTimeout
from ..transmit import Address, Buffer, Transmit
from . import packet as wire
from .packet import SEQ_MASK, Packet, PacketRun, expand
from .receive import Receiver
from .sender import MAX_TIMEOUTS, MIN_PROBE_TIMEOUT, Sender

if TYPE_CHECKING:
    from .stream import Firewall, Stream

#: Messages kept for the reader, and for the next `transmits`; older ones are dropped.
MAX_MESSAGES = 64
#: The longest message the reference takes: its datagram buffer less the header (spec: udx 1.5).
MAX_MESSAGE_BYTES = 2028

#: Packets of plain data that one ACK answers in a bulk transfer, and how long one may wait for
#: more, or for data of ours to carry it: the peer's tail-loss probe allows 2 ms (spec: udx 4.2).
ACK_EVERY = 64
ACK_DELAY = 0.001
#: Packets in flight up to which an ACK that came with data, to a stream with nothing to send, is
#: not applied at once. Of messages and their answers one ACK in so many is: it takes a quarter of
#: the time that an answer takes.
CALM = 8
#: Packets at the start of a stream that are acknowledged at once: the peer's window opens by ACKs.
QUICK_ACKS = 64
#: Seconds of silence, where more is known to come, after which the peer is asked for an ACK; twice
#: as long each time, so often at most. What is asked opens a NAT again that has forgotten us.
STALL = 0.5
MAX_STALLS = 6


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
    #: Came from elsewhere than the stream's peer, and were not let in.
    strays: int = 0
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

    def touch(self, stream: Exchange) -> None:
        """The stream may have something to send or another deadline."""

    def changed(self, stream: Exchange) -> None:
        """Something a reader or a writer wants to know has changed."""

    def say(self, transmit: Transmit) -> None:
        """Send the last packet of a stream that closes."""

    def retire(self, stream: Exchange, farewell: Transmit | None) -> None:
        """The stream is closed; ``farewell`` answers a peer that missed its last packet."""


class Watcher(Protocol):
    """Who decides what packets from elsewhere mean, once a peer has proven its address."""

    def stray(
        self, stream: Stream, packet: Packet, socket: int, source: Address, now: float
    ) -> bool:
        """A packet came from another address than the peer's. True lets it in."""

    def let_in(self, stream: Stream, socket: int, source: Address) -> None:
        """What `stray` has let in was taken."""

    def told(self, stream: Stream, payload: bytes, now: float) -> bool:
        """A message came from the peer's address. True if it was for the watcher."""

    def closed(self, stream: Stream) -> None:
        """The stream is over."""


class Exchange:
    """The part of a stream that the mux gives packets to and collects them from. Times are
    seconds; every call with ``now`` takes effect on the wire at the next `transmits`."""

    __slots__ = (
        "_ack_at",
        "_ack_owed",
        "_ack_soon",
        "_advertised",
        "_heartbeat_owed",
        "_keep_alive",
        "_keep_alive_at",
        "_kept_ack",
        "_link_mtu",
        "_outbox",
        "_owner",
        "_quick_acks",
        "_receiver",
        "_repeat_owed",
        "_sender",
        "_stalled_at",
        "_stalls",
        "_transmits",
        "_unacknowledged",
        "address",
        "authentic",
        "changed",
        "closed",
        "connected",
        "dirty",
        "ended",
        "error",
        "expects",
        "firewall",
        "heard_at",
        "local_id",
        "messages",
        "on_close",
        "origin",
        "relayed",
        "remote_ended",
        "remote_id",
        "scheduled",
        "settled",
        "socket",
        "spoke_at",
        "wants_room",
        "watcher",
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
        #: With an address, the firewall is asked also about packets that come to the stream's own
        #: socket from anywhere else.
        self.origin: Address | None = None
        #: Packets pass a blind relay, which can read none (spec: hyperdht 5.8). For who wants to
        #: know; nothing here depends on it.
        self.relayed = False
        #: Called once it is closed, with nothing.
        self.on_close: Callable[[], None] | None = None
        #: Asked about packets from elsewhere once the peer's address is settled, which is when a
        #: packet has come from there. None lets them in, as the reference does (spec: udx 1.6).
        self.watcher: Watcher | None = None
        self.settled = False
        #: The reader has a part of something: the peer has more to send.
        self.expects = False
        #: Messages that the reader has found to be the peer's own.
        self.authentic = 0
        #: The peer's END and everything before it have arrived, and the ACK is on its way.
        self.remote_ended = False
        #: The peer has acknowledged everything, our END included.
        self.ended = False
        self.closed = False
        #: Why it closed: None for an end both ways or a local `destroy`.
        self.error: Broken | None = None
        #: Payloads of messages that arrived, oldest first.
        self.messages: deque[bytes] = deque(maxlen=MAX_MESSAGES)
        #: When a packet for this stream was last let in; -inf for never.
        self.heard_at = -inf
        #: When `transmit_next` last had something; -inf for never.
        self.spoke_at = -inf
        #: Tell (see `Mux.poll`) when written bytes have left or arrived, and not only what is new
        #: for a reader.
        self.wants_room = True
        #: The mux's marks: in its lists of streams to serve and to report; next wake-up queued.
        self.dirty = False
        self.changed = False
        self.scheduled: float | None = None

        self._owner = owner
        self._receiver = Receiver(first_ack, receive_window)
        self._sender = Sender(first_seq, first_ack, link_mtu)
        self._link_mtu = link_mtu
        self._outbox: list[bytes] = []
        # What `transmits` has collected so far.
        self._transmits: list[Transmit] = []
        # The window the peer last heard of.
        self._advertised = receive_window
        # An ACK by itself must go out; one must, unless data carries it; one must at this time.
        self._ack_owed = False
        self._ack_soon = False
        self._ack_at: float | None = None
        # Packets of plain data since the last ACK, and how many more are acknowledged at once.
        self._unacknowledged = 0
        self._quick_acks = QUICK_ACKS
        # Number and blocks of the newest ACK that is not applied yet, and when it came.
        self._kept_ack: tuple[int, tuple[tuple[int, int], ...], float] | None = None
        self._heartbeat_owed = False
        self._repeat_owed = False
        self._keep_alive: float | None = None
        self._keep_alive_at: float | None = None
        # How often the peer was asked for more since it was last heard, at that time.
        self._stalls = 0
        self._stalled_at = -inf

    @property
    def has_received(self) -> bool:
        """A packet for this stream was let in."""
        return self.heard_at > -inf

    # For the mux.

    def receive_next(self, window: int, seq: int, ack: int, payload: bytes, now: float) -> bool:
        """Process a packet of plain data that arrived on the stream's own socket, if it is the
        very one that comes next, as most small messages are. False: nothing was done, and it is
        a packet for `receive`."""
        receiver, sender = self._receiver, self._sender
        if sender.end_sent or seq != receiver.next & SEQ_MASK:
            return False
        flight = sender.flight
        una = flight.una
        told = una if ack == una & SEQ_MASK else expand(ack, una)
        if not una <= told <= flight.next or not receiver.accept_next(payload):
            return False
        self.heard_at = now
        sender.update_window(receiver.next - 1, told, window)
        if told > una and (self._kept_ack is None or self._kept_ack[0] <= told):
            # The reader first: what this tells is applied when everything has been delivered.
            self._kept_ack = told, (), now
        self._owe_ack_for(1, now, calm=self._is_calm())
        if not self.changed:
            self._owner.changed(self)
        return True

    def receive_ack(
        self, window: int, seq: int, ack: int, now: float, sacks: tuple[tuple[int, int], ...] = ()
    ) -> bool:
        """Keep a pure ACK for the next `transmits`: the reference sends one for each packet, and
        the last one of a batch tells all that the others did. False: nothing was done, and it is
        a packet for `receive`."""
        sender = self._sender
        if sender.end_sent or not self.connected:
            return False
        self.heard_at = now
        flight = sender.flight
        ack = expand(ack, flight.una)
        if ack > flight.next:
            self._owner.stats.wrong_acks += 1
        elif ack >= flight.una:
            sender.update_window(expand(seq, self._receiver.next), ack, window)
            if self._kept_ack is None or self._kept_ack[0] <= ack:
                self._kept_ack = ack, sacks, now
            covered = self.scheduled is not None and self.scheduled - now <= MIN_PROBE_TIMEOUT
            if not (covered and not sacks and self._is_calm()) and not self.dirty:
                self._owner.touch(self)
        return True

    def receive(self, packet: Packet, now: float) -> None:
        """Process a packet that was let in, in the order of spec: udx 4.1."""
        kind = packet.type
        if not kind & ~wire.SACK and self.receive_ack(
            packet.window, packet.seq, packet.ack, now, packet.sacks
        ):
            return
        self.heard_at = now
        if kind & wire.HEARTBEAT:
            self._owe_ack()
            return
        receiver, flight = self._receiver, self._sender.flight
        seq = expand(packet.seq, receiver.next)
        if kind & wire.DESTROY and seq >= receiver.next:
            reset = StreamReset("the peer destroyed the stream; connect again")
            self._close(reset, None, lingering=False)
            return
        plain = kind == wire.DATA and seq == receiver.next and not receiver.gaps
        if kind & (wire.DATA | wire.END):
            self._receive_data(seq, packet)
        if kind & wire.MESSAGE and len(packet.payload) <= MAX_MESSAGE_BYTES:
            self._receive_message(packet.payload, now)
        ack = expand(packet.ack, flight.una)
        if ack > flight.next:
            # Nor is the data acknowledged: this peer means another stream (spec: udx 8, 4).
            self._owner.stats.wrong_acks += 1
            return
        if plain and receiver.next > seq:
            self._owe_ack_for(1, now)
        elif kind & (wire.DATA | wire.END):
            self._owe_ack()
        if ack >= flight.una:
            self._sender.update_window(seq, ack, packet.window)
        if self._sender.acknowledge(ack, packet.sacks, now) is not None:
            self._acknowledged()
        self._after_receive()

    def receive_run(self, run: PacketRun, first: int, end: int, now: float) -> None:
        """Process packets ``first`` to ``end`` - 1 of a run: consecutive packets of plain data that
        arrived on the stream's own socket."""
        receiver, flight = self._receiver, self._sender.flight
        seq = expand(run.seqs[first], receiver.next)
        expected = not receiver.gaps
        if not receiver.accept_run(seq, run.payloads[first:end]):
            for index in range(first, end):
                if self.closed:
                    return
                packet = Packet(
                    wire.DATA,
                    self.local_id,
                    run.windows[index],
                    run.seqs[index],
                    run.acks[index],
                    run.payloads[index],
                )
                self.receive(packet, now)
            return
        self.heard_at = now
        self._owner.changed(self)
        # Of what the headers tell besides, the last one knows most.
        last = end - 1
        ack = expand(run.acks[last], flight.una)
        if ack > flight.next:
            self._owner.stats.wrong_acks += end - first
            return
        if expected and not receiver.gaps:
            self._owe_ack_for(end - first, now)
        else:
            self._owe_ack()
        if ack >= flight.una:
            self._sender.update_window(seq + last - first, ack, run.windows[last])
        if ack > flight.una and self._sender.acknowledge(ack, (), now) is not None:
            self._acknowledged()
        self._after_receive()

    def deadline(self) -> float | None:
        """When `on_deadline` must be called at the latest."""
        if not self.connected or self.closed:
            return None
        when = self._sender.deadline()
        if self._ack_at is not None and (when is None or self._ack_at < when):
            when = self._ack_at
        if self._keep_alive_at is not None and (when is None or self._keep_alive_at < when):
            when = self._keep_alive_at
        if self.expects:
            stalled = self._stall_at()
            if when is None or stalled < when:
                when = stalled
        return when

    def on_deadline(self, now: float) -> None:
        """Do what has become due."""
        if self._kept_ack is not None:
            self._apply_kept_ack()
        timeouts = self._sender.on_deadline(now)
        self._owner.stats.timeouts += timeouts > 0
        if timeouts > MAX_TIMEOUTS:
            self._give_up()
            return
        if self._keep_alive_at is not None and self._keep_alive_at <= now:
            self._heartbeat_owed = True
            self._keep_alive_at = None
        if self._ack_at is not None and self._ack_at <= now:
            self._ack_soon = True
        if self.expects and self._stall_at() <= now:
            self._heartbeat_owed = True
            self._stalls += 1
        self._owner.touch(self)

    def transmits(self, now: float) -> list[Transmit]:
        """What is to be sent now."""
        if self.closed or not self.connected:
            return []
        sender, receiver = self._sender, self._receiver
        if self._kept_ack is not None:
            self._apply_kept_ack()
        if receiver.stirred:
            receiver.follow(sender.flight.min_rtt or None, now)
        self._send_data(now)
        if self._repeat_owed:
            self._repeat_owed = False
            copies = sender.repeat(self)
            self._owner.stats.sent += copies
            self._owner.stats.retransmissions += copies
        if self._outbox:
            self._transmits += [self._control(wire.MESSAGE, each) for each in self._outbox]
            self._outbox.clear()
        if self._heartbeat_owed or sender.heartbeat_owed:
            self._heartbeat_owed = sender.heartbeat_owed = False
            self._transmits.append(self._control(wire.HEARTBEAT))
        if self._ack_owed or self._ack_soon:
            self._ack_owed = False
            self._ack_told()
            self._owner.stats.acks += 1
            self._transmits.append(self._control(wire.ACK))
        if self._keep_alive is not None:
            if not sender.idle:
                self._keep_alive_at = None
            elif self._keep_alive_at is None:
                self._keep_alive_at = now + self._keep_alive
        transmits = self._transmits
        if transmits:
            self._transmits = []
        return transmits

    def transmit_next(self, now: float, send: Callable[[Transmit], None]) -> bool:
        """Send what was just written, if it is one small packet that nothing keeps from leaving at
        once: as `transmits`, which is still to be called some time. It has left before its time and
        number are noted, so the peer need not wait for that. False: nothing was done."""
        sender, receiver = self._sender, self._receiver
        if not self.connected or self.closed or self.wants_room or receiver.gaps:
            return False
        payload = sender.small_payload(now)
        if payload is None:
            return False
        header = self.header(wire.DATA, sender.flight.next, 0)
        send(Transmit(self.socket, self.address, (header, payload)))
        sender.sent_small(now)
        self.spoke_at = now
        self._owner.stats.sent += 1
        self._ack_told()
        return True

    # For the sender.

    def header(self, kind: int, seq: int, padding: int) -> bytes:
        """The header of a packet that takes a number."""
        return wire.HEADER.pack(
            wire.MAGIC,
            wire.VERSION,
            kind,
            padding,
            self.remote_id or 0,
            self._advertise(),
            seq & SEQ_MASK,
            self._receiver.next & SEQ_MASK,
        )

    def headers(self, first: int, count: int) -> list[bytes]:
        """The headers of a run of new packets with plain data."""
        ack = self._receiver.next & SEQ_MASK
        remote, window = self.remote_id or 0, self._advertise()
        return [*wire.plain_headers(remote, window, first & SEQ_MASK, ack, count)]

    def carry(self, buffers: list[Buffer], segment: int, may_fragment: bool = False) -> None:
        """Send what makes up one transmit."""
        transmit = Transmit(self.socket, self.address, tuple(buffers), segment, may_fragment)
        self._transmits.append(transmit)

    # Receiving.

    def _stall_at(self) -> float:
        """When a peer that has more to send is asked for it."""
        if self._stalled_at != self.heard_at:
            self._stalled_at, self._stalls = self.heard_at, 0
        return inf if self._stalls >= MAX_STALLS else self.heard_at + STALL * 2**self._stalls

    def _receive_message(self, payload: bytes, now: float) -> None:
        watcher = self.watcher
        if watcher is None or not watcher.told(cast("Stream", self), payload, now):
            self.messages.append(payload)
            self._owner.changed(self)

    def _receive_data(self, seq: int, packet: Packet) -> None:
        receiver, stats = self._receiver, self._owner.stats
        duplicates, dropped = receiver.duplicates, receiver.dropped
        payload = packet.payload if packet.type & wire.DATA else b""
        if receiver.accept(seq, payload, bool(packet.type & wire.END)):
            self._owner.changed(self)
        stats.duplicates += receiver.duplicates - duplicates
        stats.overruns += receiver.dropped - dropped

    def _apply_kept_ack(self) -> None:
        kept, self._kept_ack = self._kept_ack, None
        if kept is not None and self._sender.acknowledge(*kept) is not None:
            self._acknowledged()

    def _acknowledged(self) -> None:
        """The peer has told something new about what was sent."""
        sender = self._sender
        if sender.end_sent and sender.ended:
            self.ended = True
            # One more ACK, unless the stream closes (spec: udx 2.4).
            if not self._receiver.finished:
                self._owe_ack()
        if self.wants_room:
            self._owner.changed(self)

    def _after_receive(self) -> None:
        """See which ends have been reached."""
        if self.connected and not self.remote_ended and self._receiver.finished:
            self.remote_ended = True
            self._owner.changed(self)
        if self.ended and self.remote_ended:
            self._close(None, wire.ACK if self._ack_owed else None, lingering=True)
        elif self.connected:
            self._owner.touch(self)

    # Sending.

    def _send_data(self, now: float) -> None:
        sender = self._sender
        sent, retransmissions = sender.sent, sender.retransmissions
        sender.end_apart = self.remote_ended
        sender.transmit(self, now)
        if sender.sent == sent:
            return
        stats = self._owner.stats
        stats.sent += sender.sent - sent
        stats.retransmissions += sender.retransmissions - retransmissions
        if self.wants_room:
            self._owner.changed(self)
        if not self._receiver.gaps:
            # Every packet of data tells what an ACK would tell.
            self._ack_told()

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
                self._sender.flight.next & SEQ_MASK,
                self._receiver.next & SEQ_MASK,
                payload,
                blocks,
            )
        )
        return Transmit(self.socket, self.address, (datagram,))

    def _advertise(self) -> int:
        window = self._advertised = self._receiver.window
        return window

    def _owe_ack(self) -> None:
        self._ack_owed = True
        self._owner.touch(self)

    def _is_calm(self) -> bool:
        """Few packets are in flight and none waits to be sent: what the newest ACK tells may wait
        until something is sent, or for a timer."""
        sender, flight = self._sender, self._sender.flight
        return (
            flight.next - flight.una <= CALM
            and not sender.pending
            and not self.wants_room
            and not flight.disturbed
        )

    def _owe_ack_for(self, count: int, now: float, *, calm: bool = False) -> None:
        """``count`` packets arrived just as expected. In a bulk transfer one ACK does for many
        (spec: udx 4.2); at the start, and at the end of a burst, the peer waits for each. On a
        ``calm`` stream the rest may wait until something is sent, or for the timer."""
        if not self.connected:
            self._owe_ack()
            return
        self._unacknowledged += count
        if self._quick_acks > 0 or self._unacknowledged >= ACK_EVERY:
            self._quick_acks -= count
            self._ack_soon = True
        else:
            if self._ack_at is None:
                self._ack_at = now + ACK_DELAY
            if calm and self.scheduled is not None and self.scheduled <= self._ack_at:
                return
        if not self.dirty:
            self._owner.touch(self)

    def _ack_told(self) -> None:
        self._ack_soon = False
        self._ack_at = None
        self._unacknowledged = 0

    # Life.

    def _give_up(self) -> None:
        # The reference forgets a stream as soon as it is done and leaves the last END unanswered
        # if its own last ACK got lost (spec: udx 8, 10).
        done = self.remote_ended and self._sender.only_end_missing
        gone = StreamTimeout("the peer stopped answering; check the network and connect again")
        self._close(None if done else gone, None, lingering=False)

    def _close(self, error: Broken | None, last: int | None, *, lingering: bool) -> None:
        """Close. ``last`` is the type of one last packet; ``lingering`` goes on answering a peer
        that missed the last ACK. A peer that missed a DESTROY is always answered: it would wait for
        us until its keep-alives time out."""
        farewell = None
        if last is not None:
            self._owner.stats.acks += last == wire.ACK
            packet = self._control(last)
            self._owner.say(packet)
            if last == wire.DESTROY:
                farewell = packet
        if lingering:
            farewell = self._control(wire.ACK)
        self.closed = True
        self.error = error
        self._receiver.discard()
        self._sender.discard()
        self._outbox.clear()
        self._owner.changed(self)
        self._owner.retire(self, farewell)
        if self.on_close is not None:
            self.on_close()
