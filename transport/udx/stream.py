"""One UDX stream: reliable bytes both ways, and messages that may get lost (spec: udx 2-4).

A stream only keeps state; `mux.Mux` owns it, gives it its packets and collects what it sends.

    created --connect--> connected --(END acknowledged and peer's END received)--> closed
       |                     |------- destroy, DESTROY received, 7th timeout -----> closed
       `-------------------- destroy, DESTROY received ---------------------------> closed
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import Broken, Closed, InvalidInput
from ..transmit import Address, Buffer, Transmit
from . import packet as wire
from .exchange import MAX_MESSAGE_BYTES, MAX_MESSAGES, Exchange
from .packet import SEQ_MASK, Packet

#: Asked about packets from a socket that is not the stream's: (stream, socket, source, now).
Firewall = Callable[["Stream", int, Address, float], bool]


class Stream(Exchange):
    """See `Mux.create`. Times are seconds; every call with ``now`` takes effect on the wire at the
    next `Mux.transmits`."""

    __slots__ = ()

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
        return self._sender.unsent

    @property
    def unacked(self) -> int:
        """Bytes sent and not cumulatively acknowledged."""
        return self._sender.unacked

    def expects_near(self, packet: Packet, reach: int) -> bool:
        """Whether a packet's numbers are at most so far from those that are to come."""
        flight, due = self._sender.flight, self._receiver.next
        near = abs(wire.expand(packet.seq, due) - due) <= reach
        return near and -reach <= wire.expand(packet.ack, flight.una) - flight.una <= (
            flight.outstanding
        )

    @property
    def round_trip(self) -> float | None:
        """Seconds to the peer and back, smoothed; None as long as that is not known."""
        return self._sender.flight.srtt

    @property
    def acknowledged(self) -> int:
        """Packets with data that the peer has acknowledged, without a gap."""
        return self._sender.flight.una

    @property
    def departed(self) -> int:
        """Packets with data that have left, each counted once."""
        return self._sender.flight.next

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
        self._after_receive()

    def change_remote(self, socket: int, remote_id: int, address: Address, now: float) -> None:
        """Send from now on from another socket to another address and id, also what left before
        and is sent again: where it went nobody may forward it any more (spec: udx 2.8, which does
        not, and hyperdht 9.1, 21). Raises InvalidInput if not connected, Closed if closed."""
        self._check_open()
        if self.remote_id is None:
            raise InvalidInput(f"{self!r} is not connected; use connect")
        self._set_remote(socket, remote_id, address)
        self._sender.new_path(self._link_mtu)
        self._owner.touch(self)

    def migrate(self, socket: int, address: Address, now: float) -> None:
        """The peer is there now, and gets nothing more where it was: what has not arrived goes to
        the new address, slowly at first. Raises InvalidInput if not connected, Closed if closed."""
        self._check_open()
        if self.remote_id is None:
            raise InvalidInput(f"{self!r} is not connected; use connect")
        self._set_remote(socket, self.remote_id, address)
        self.settled = True
        self._sender.start_anew(self._link_mtu, now)
        self._owe_ack()

    def send_aside(self, payload: bytes, socket: int, address: Address) -> None:
        """Send a message to another address than the peer's. It may get lost."""
        message = self._control(wire.MESSAGE, payload)
        self._owner.say(Transmit(socket, address, message.buffers))

    def acknowledge_aside(self, socket: int, address: Address) -> None:
        """Tell another address than the peer's what has arrived."""
        self._owner.say(Transmit(socket, address, self._control(wire.ACK).buffers))

    def write(self, data: Buffer, now: float) -> None:
        """Queue bytes, kept by reference until they are acknowledged: do not change them. There
        is no limit here; look at `unsent` and `unacked`. Raises Closed after end or close."""
        sender = self._sender
        if self.closed or sender.end_queued:
            raise Closed("the stream has ended or is closed; open another")
        sender.write(data)
        if self.connected and not sender.window:
            sender.wake_window(now)
        if not self.dirty:
            self._owner.touch(self)

    def end(self, now: float) -> None:
        """Send END after all that is queued; receiving goes on. Twice is once. Raises Closed after
        close."""
        self._check_open()
        if self._sender.end_queued:
            return
        self._sender.end_queued = True
        if self.connected:
            self._sender.wake_window(now)
        self._owner.touch(self)

    def destroy(self, now: float) -> None:
        """Close at once, and tell the peer if connected. What is not delivered is lost. Harmless
        when closed."""
        if self.closed:
            return
        self._close(None, wire.DESTROY if self.connected else None, lingering=False)

    def fail(self, error: Broken, now: float) -> None:
        """As `destroy`, but with an error, as if the peer had done it. Harmless when closed."""
        if not self.closed:
            self._close(error, wire.DESTROY if self.connected else None, lingering=False)

    def forget(self) -> None:
        """Close at once, and tell nobody. Harmless when closed."""
        if not self.closed:
            self._close(None, None, lingering=False)

    def send_message(self, payload: bytes, now: float) -> None:
        """Send one message of at most `MAX_MESSAGE_BYTES`; it may get lost, and only the newest
        `MAX_MESSAGES` wait for a connection. Raises InvalidInput if longer, Closed if closed."""
        self._check_open()
        if len(payload) > MAX_MESSAGE_BYTES:
            raise InvalidInput(f"a message of {len(payload)} bytes exceeds {MAX_MESSAGE_BYTES}")
        self._outbox.append(payload)
        del self._outbox[:-MAX_MESSAGES]
        self._owner.touch(self)

    def heartbeat(self, now: float) -> None:
        """Ask the peer for an ACK, once (spec: udx 2.7); possible after `end` as well. The packet
        may get lost: ask again. Without effect unless connected and open."""
        if self.connected and not self.closed:
            self._heartbeat_owed = True
            self._owner.touch(self)

    def repeat(self, now: float) -> None:
        """Send the oldest packets again that the peer has not acknowledged, or ask for an ACK if
        there are none: what was sent before may have been for nobody."""
        if self.connected and not self.closed:
            self._repeat_owed = True
            self._heartbeat_owed = self._sender.idle and not self._sender.pending
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
        # The peer asks only every 2 s (spec: udx 3.3), and a tell for each byte would be silly.
        capacity = receiver.offer.capacity
        if self._advertised >= capacity // 2 or self.closed or self._ack_owed or receiver.finished:
            return
        if receiver.window - self._advertised >= capacity // 4:
            self._owe_ack()

    def _set_remote(self, socket: int, remote_id: int, address: Address) -> None:
        if not 0 < address[1] < 65536 or not 0 <= remote_id <= SEQ_MASK:
            raise InvalidInput(f"cannot connect to id {remote_id} at {address}")
        self.socket = socket
        self.settled = False
        self.remote_id = remote_id
        self.address = address

    def _check_open(self) -> None:
        if self.closed:
            raise Closed("the stream is closed; open another")
