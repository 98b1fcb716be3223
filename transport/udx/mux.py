"""All UDX streams of one end point, over any number of sockets.

A stream costs nothing while nothing happens on it: those with something to do are in a list, and
those with a deadline in a heap whose outdated entries are put right when they come up.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random
from typing import cast

from ..errors import DecodeError, InvalidInput
from ..transmit import Address, Transmit
from . import packet as wire
from .exchange import ACK_DELAY, Exchange, Stats
from .forward import Forwarder
from .mtu import MAX_MTU
from .packet import HEADER, HEADER_BYTES, decode
from .receive import RECEIVE_WINDOW
from .sender import MIN_PROBE_TIMEOUT
from .stream import Stream
from .time_wait import TimeWait

#: How the header of a packet begins that carries data and nothing else.
_PLAIN = bytes((wire.MAGIC, wire.VERSION, wire.DATA, 0))
_ACK = bytes((wire.MAGIC, wire.VERSION, wire.ACK, 0))
#: Set in the difference of two numbers of the wire if the second is before the first.
_BACKWARDS = 0x80000000
_unpack = HEADER.unpack_from


class Mux:
    """Follows `transport.transmit.Core`, but for what `receive` returns.

    After `receive`, `on_deadline` and calls to streams, call `poll` and let the readers read and
    the writers write, then `transmits`: so one ACK answers all that was received in between, and
    tells the window that the readers left. `transmits` itself may leave something to `poll`, as
    what was unsent is in flight then.
    """

    __slots__ = (
        "_changed",
        "_deadlines",
        "_dirty",
        "_order",
        "_outbox",
        "_over",
        "_rng",
        "_stale",
        "_streams",
        "forwarder",
        "link_mtu",
        "receive_window",
        "stats",
    )

    def __init__(
        self, rng: Random, *, receive_window: int = RECEIVE_WINDOW, link_mtu: int = MAX_MTU
    ) -> None:
        #: Bytes each new stream holds for its reader.
        self.receive_window = receive_window
        #: Largest IP packet the link takes, bytes; the paths' own limits are searched below it.
        self.link_mtu = link_mtu
        self.stats = Stats()
        self._rng = rng
        self._streams: dict[int, Stream] = {}
        self._dirty: list[Exchange] = []
        self._changed: list[Exchange] = []
        self._outbox: list[Transmit] = []
        self._deadlines: list[tuple[float, int, Exchange]] = []
        self._order = 0
        # Entries of the heap that belong to closed streams.
        self._stale = 0
        self._over = TimeWait()
        #: Passes on what is for streams of others, which do not count as ours.
        self.forwarder = Forwarder(self._unused_id, self.say)

    def __len__(self) -> int:
        """Streams that are not closed."""
        return len(self._streams)

    def create(
        self, *, local_id: int | None = None, first_seq: int = 0, first_ack: int = 0
    ) -> Stream:
        """A new stream, known to arriving packets from now on. ``local_id`` is 0..2**32 - 1, drawn
        at random if None; the first numbers of both directions are 0 unless agreed otherwise.
        Raises InvalidInput for an id in use."""
        if local_id is None:
            local_id = self._unused_id()
        elif (
            local_id in self._streams
            or local_id in self.forwarder.legs
            or not 0 <= local_id <= wire.SEQ_MASK
        ):
            raise InvalidInput(f"stream id {local_id} is in use or not a 32-bit number")
        self._over.discard(local_id)
        stream = Stream(
            self,
            local_id,
            receive_window=self.receive_window,
            link_mtu=self.link_mtu,
            first_seq=first_seq,
            first_ack=first_ack,
        )
        self._streams[local_id] = stream
        return stream

    def receive(self, datagram: bytes, socket: int, source: Address, now: float) -> bool:
        """Take one datagram. False: it is another protocol's, no stream here has or recently had
        the id. Never raises for what the network sent."""
        if len(datagram) < HEADER_BYTES:
            return False
        magic, version, kind, offset, identifier, window, seq, ack = _unpack(datagram)
        if magic != wire.MAGIC or version != wire.VERSION:
            return False
        stream = self._streams.get(identifier)
        if stream is None:
            leg = self.forwarder.legs.get(identifier)
            if leg is None:
                if self._over.receive(identifier, kind):
                    return True
                self.stats.unknown += 1
                return False
            self.forwarder.receive(leg, datagram, socket, source, now)
            return True
        if source == stream.address:
            stream.settled = True
        elif stream.settled and stream.watcher is not None and stream.origin is None:
            self._receive_stray(stream, datagram, socket, source, now)
            return True
        origin = stream.origin
        familiar = socket == stream.socket and (origin is None or source == origin)
        if familiar and not offset:
            # The two that most packets are, and need no object to be passed around in.
            if kind == wire.DATA:
                taken = stream.receive_next(window, seq, ack, datagram[HEADER_BYTES:], now)
            else:
                taken = kind == wire.ACK and stream.receive_ack(window, seq, ack, now)
            if taken:
                self.stats.received += 1
                return True
        try:
            packet = decode(datagram)
        except DecodeError:
            self.stats.malformed += 1
            return True
        self.stats.received += 1
        if not familiar and not self._passes(stream, socket, source, now):
            self.stats.blocked += 1
        elif not stream.closed:
            stream.receive(packet, now)
        return True

    def receive_run(
        self, data: memoryview, segment: int, socket: int, source: Address, now: float
    ) -> list[bytes]:
        """Take a run of datagrams of ``segment`` bytes each, the last of which may be shorter.
        Returns those that are another protocol's. Nothing of ``data`` is kept."""
        if len(data) <= segment:
            datagram = bytes(data)
            return [] if self.receive(datagram, socket, source, now) else [datagram]
        if self.forwarder.legs:
            taken = self.forwarder.receive_run(data, segment, socket, source, now)
            if taken:
                rest = data[taken:]
                return self.receive_run(rest, segment, socket, source, now) if rest else []
        others: list[bytes] = []
        first = 0
        if segment == wire.HEADER_BYTES:
            return self._receive_acks(data, socket, source, now)
        if segment > wire.HEADER_BYTES and data[: len(_PLAIN)] == _PLAIN:
            run = wire.split(data, segment)
            count = len(run.payloads)
            while first < count:
                stream = self._streams.get(run.ids[first])
                if stream is None or stream.socket != socket or run.starts[first] != _PLAIN:
                    break
                if stream.origin is not None and stream.origin != source:
                    break
                if stream.address == source:
                    stream.settled = True
                elif stream.settled and stream.watcher is not None:
                    break
                end = run.consecutive(first)
                self.stats.received += end - first
                stream.receive_run(run, first, end, now)
                first = end
        for start in range(first * segment, len(data), segment):
            datagram = bytes(data[start : start + segment])
            if not self.receive(datagram, socket, source, now):
                others.append(datagram)
        return others

    def transmits(self, now: float) -> list[Transmit]:
        """What is to be sent now; each transmit is returned once."""
        if self.forwarder.busy:
            self.forwarder.flush()
        out, self._outbox = self._outbox, []
        while self._dirty:
            dirty, self._dirty = self._dirty, []
            for stream in dirty:
                stream.dirty = False
                out += stream.transmits(now)
                self._schedule(stream)
        out += self._over.transmits(now)
        return out

    def transmit_next(self, stream: Stream, now: float, send: Callable[[Transmit], None]) -> bool:
        """Send what was just written to a stream, if it is small, may leave at once, and there is
        nothing else to be sent. Returns whether that was all: otherwise call `transmits`."""
        if len(self._dirty) != 1 or not stream.dirty or not stream.transmit_next(now, send):
            return False
        if stream.scheduled is None or stream.scheduled > now + MIN_PROBE_TIMEOUT:
            return False
        # Its timers are looked at before any of them can be due.
        self._dirty.clear()
        stream.dirty = False
        return True

    def deadline(self) -> float | None:
        """When `on_deadline` must be called at the latest, or None for never."""
        first = self._deadlines[0][0] if self._deadlines else None
        over = self._over.deadline()
        return first if over is None or (first is not None and first <= over) else over

    def on_deadline(self, now: float) -> None:
        """Do what has become due. Harmless when nothing has."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] <= now:
            when, _, stream = heapq.heappop(deadlines)
            if stream.closed:
                self._stale -= 1
                continue
            if stream.scheduled != when:
                continue
            stream.scheduled = None
            due = stream.deadline()
            if due is None:
                continue
            if due <= now:
                stream.on_deadline(now)
            elif now - stream.spoke_at < ACK_DELAY < due - now:
                # The answer will owe an ACK, and then there is a timer for that already.
                self._wake_at(now + ACK_DELAY, stream)
            else:
                self._wake_at(due, stream)
        self._over.on_deadline(now)

    def poll(self) -> list[Stream]:
        """The streams whose readable bytes, remote end, messages, closedness or, if they want to
        tell, send buffer have changed since the last call, each once."""
        if not self._changed:
            return []
        changed, self._changed = self._changed, []
        for stream in changed:
            stream.changed = False
        return cast(list[Stream], changed)

    # For the streams.

    def touch(self, stream: Exchange) -> None:
        """The stream may have something to send or another deadline."""
        if not stream.dirty:
            stream.dirty = True
            self._dirty.append(stream)

    def changed(self, stream: Exchange) -> None:
        """Something a reader or a writer wants to know has changed."""
        if not stream.changed:
            stream.changed = True
            self._changed.append(stream)

    def say(self, transmit: Transmit) -> None:
        """Send the last packet of a stream that closes."""
        self._outbox.append(transmit)

    def retire(self, stream: Exchange, farewell: Transmit | None) -> None:
        """The stream is closed; ``farewell`` answers a peer that missed its last packet."""
        del self._streams[stream.local_id]
        if stream.scheduled is not None:
            self._stale += 1
            self._purge_deadlines()
        if stream.watcher is not None:
            stream.watcher.closed(cast(Stream, stream))
        if stream.connected:
            self._over.add(stream.local_id, farewell)

    def _receive_acks(
        self, data: memoryview, socket: int, source: Address, now: float
    ) -> list[bytes]:
        """Take a run of bare headers. A peer that acknowledges every packet sends them by the
        dozen, and the last of those in a row says all that the others do."""
        others: list[bytes] = []
        size = wire.HEADER_BYTES
        run = wire.split(data, size)
        starts, names, acks, seqs = run.starts, run.ids, run.acks, run.seqs
        count = len(names)
        first = 0
        if (
            starts.count(_ACK) == count == names.count(names[0])
            and names[0] in self._streams
            and _ascends(acks)
            and _ascends(seqs)
        ):
            first = count - 1
            self.stats.received += first
        for index in range(first, count):
            after = index + 1
            if (
                after < count
                and starts[index] == starts[after] == _ACK
                and names[index] == names[after]
                and names[index] in self._streams
                and not (acks[after] - acks[index]) & _BACKWARDS
                and not (seqs[after] - seqs[index]) & _BACKWARDS
            ):
                self.stats.received += 1
                continue
            datagram = bytes(data[index * size : after * size])
            if not self.receive(datagram, socket, source, now):
                others.append(datagram)
        if len(data) % size:
            # Too short for a packet of ours.
            others.append(bytes(data[-(len(data) % size) :]))
        return others

    def _receive_stray(
        self, stream: Stream, datagram: bytes, socket: int, source: Address, now: float
    ) -> None:
        """Ask the watcher about a packet that is not from the peer's address."""
        watcher = stream.watcher
        try:
            packet = decode(datagram)
        except DecodeError:
            self.stats.malformed += 1
            return
        if watcher is None or not watcher.stray(stream, packet, socket, source, now):
            self.stats.strays += 1
            return
        self.stats.received += 1
        stream.receive(packet, now)
        watcher.let_in(stream, socket, source)

    def _unused_id(self) -> int:
        while True:
            identifier = self._rng.getrandbits(32)
            if not (
                identifier in self._streams
                or identifier in self._over
                or identifier in self.forwarder.legs
            ):
                return identifier

    def _passes(self, stream: Stream, socket: int, source: Address, now: float) -> bool:
        """Ask the hook about a packet from a foreign socket, or from elsewhere (spec: udx 2.3)."""
        return (
            stream.firewall is not None
            and source[1] != 0
            and stream.firewall(stream, socket, source, now)
        )

    def _schedule(self, stream: Exchange) -> None:
        """Queue a wake-up, unless one comes early enough anyway."""
        when = stream.deadline()
        if when is None or (stream.scheduled is not None and stream.scheduled <= when):
            return
        self._wake_at(when, stream)

    def _wake_at(self, when: float, stream: Exchange) -> None:
        stream.scheduled = when
        self._order += 1
        heapq.heappush(self._deadlines, (when, self._order, stream))

    def _purge_deadlines(self) -> None:
        """Let go of closed streams when they are most of the heap."""
        if self._stale * 2 > len(self._deadlines):
            self._deadlines = [entry for entry in self._deadlines if not entry[2].closed]
            heapq.heapify(self._deadlines)
            self._stale = 0


def _ascends(numbers: tuple[int, ...]) -> bool:
    """Whether numbers of the wire, none of which has wrapped around, follow on each other."""
    return numbers[-1] - numbers[0] < _BACKWARDS and list(numbers) == sorted(numbers)
