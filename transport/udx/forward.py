"""Streams of others that meet here: what arrives for one leg of a pair leaves on the other
(spec: hyperdht 5.8).

Nothing is read but the header's first 8 bytes, and nothing is changed but the stream id in them.
What arrives together leaves together: packets of one size for one leg become a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from ..errors import InvalidInput
from ..transmit import Address, Buffer, Transmit
from . import packet as wire
from .packet import HEADER_BYTES, SEQ_MASK

#: Seconds' worth of its rate that an `Allowance` gives at once, and the least that is: congestion
#: controls send in bursts of a few round trips' data.
BURST = 0.25
MIN_BURST = 256 * 1024
#: One kernel call takes 64 KiB, and 64 segments, of one run.
_MAX_RUN_BYTES = 65000
_MAX_RUN_PACKETS = 64

#: Where the id is in a packet.
_ID = 4
_MAGIC = bytes((wire.MAGIC, wire.VERSION))


class Allowance:
    """A bucket of ``rate`` bytes a second, for all legs that it is given to."""

    __slots__ = ("_burst", "_left", "_rate", "_then")

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._burst = max(rate * BURST, MIN_BURST)
        self._left = self._burst
        self._then = -inf

    def take(self, size: int, segment: int, now: float) -> int:
        """How many of ``size`` bytes may pass, in whole datagrams of ``segment`` bytes."""
        left = self._left + (now - self._then) * self._rate
        if left > self._burst:
            left = self._burst
        self._then = now
        passes = size if left >= size else int(left) // segment * segment
        self._left = left - passes
        return passes

    def is_full(self, now: float) -> bool:
        """Whether a new one would not allow more."""
        return self._left + (now - self._then) * self._rate >= self._burst


@dataclass(slots=True)
class ForwardStats:
    """What happened so far, in datagrams unless said otherwise."""

    forwarded: int = 0
    #: Of those, bytes.
    bytes: int = 0
    #: Beyond an `Allowance`.
    dropped: int = 0
    #: From hosts that the leg is not for.
    strangers: int = 0


@dataclass(slots=True)
class _Run:
    """Packets of ``segment`` bytes each, the last of which may be shorter; nothing follows that."""

    segment: int
    pieces: list[bytearray]
    count: int
    size: int
    ended: bool


class Leg:
    """Our end of the stream with one of the two peers."""

    __slots__ = (
        "_far",
        "_name",
        "_runs",
        "_stamps",
        "address",
        "allowance",
        "bytes",
        "dropped",
        "heard_at",
        "id",
        "socket",
    )

    _far: Leg

    def __init__(
        self, remote_id: int, socket: int, address: Address, allowance: Allowance, now: float
    ) -> None:
        """The peer, whose name for the stream is ``remote_id`` (u32), is expected at ``address``,
        which reaches us on ``socket``; what it sends counts against the ``allowance``."""
        if not 0 <= remote_id <= SEQ_MASK or not 0 < address[1] < 65536:
            raise InvalidInput(f"cannot forward to id {remote_id} at {address}")
        #: Our name for the stream, once it is linked.
        self.id = 0
        self.socket = socket
        #: Packets from another port of the same host move it there: the first may come from a
        #: socket of its own, and NATs forget.
        self.address = address
        self.allowance = allowance
        #: When the peer last sent anything, or when this was made.
        self.heard_at = now
        #: Bytes that came from the peer and were passed on, and datagrams that were not.
        self.bytes = 0
        self.dropped = 0
        # Each byte of the peer's id, for as many packets as fit into a run.
        self._name = remote_id.to_bytes(4, "little")
        self._stamps = tuple(bytes((octet,)) * _MAX_RUN_PACKETS for octet in self._name)
        # What leaves for the peer with the next flush: without data, and with data.
        self._runs: list[_Run | None] = [None, None]


class Forwarder:
    """The legs of one mux, which gives it their packets. Ids are drawn by ``new_id()``; what
    leaves is given to ``say``."""

    __slots__ = ("_new_id", "_say", "busy", "legs", "stats")

    def __init__(self, new_id: Callable[[], int], say: Callable[[Transmit], None]) -> None:
        self._new_id = new_id
        self._say = say
        #: By our own ids.
        self.legs: dict[int, Leg] = {}
        self.stats = ForwardStats()
        #: Those with something to flush.
        self.busy: list[Leg] = []

    def link(self, one: Leg, other: Leg) -> None:
        """Give both legs their ids, and pass on from now on what arrives for them."""
        one._far, other._far = other, one
        for leg in (one, other):
            leg.id = self._new_id()
            self.legs[leg.id] = leg

    def unlink(self, leg: Leg) -> None:
        """Forget a leg and the other one. Harmless twice."""
        self.legs.pop(leg.id, None)
        self.legs.pop(leg._far.id, None)

    def receive_run(
        self, data: memoryview, segment: int, socket: int, source: Address, now: float
    ) -> int:
        """Pass on the datagrams at the beginning of a run that are for legs. Returns their bytes:
        the rest is for others."""
        if segment < HEADER_BYTES:
            return 0
        # A rest that is shorter than a header is no packet.
        end = len(data)
        if end % segment < HEADER_BYTES:
            end -= end % segment
        start = 0
        while start < end and data[start : start + len(_MAGIC)] == _MAGIC:
            leg = self.legs.get(int.from_bytes(data[start + _ID : start + 8], "little"))
            if leg is None:
                break
            most = min(_MAX_RUN_BYTES // segment, _MAX_RUN_PACKETS) * segment
            stop = min(start + most, end)
            run = bytearray(data[start:stop])
            if not _alike(run, segment):
                stop = _first_other(data, segment, start, stop)
                run = bytearray(data[start:stop])
            self._forward(leg, run, segment, socket, source, now)
            start = stop
        return start

    def receive(self, leg: Leg, datagram: bytes, socket: int, source: Address, now: float) -> None:
        """Pass on one datagram for a leg."""
        self._forward(leg, bytearray(datagram), len(datagram), socket, source, now)

    def _forward(
        self,
        leg: Leg,
        run: bytearray,
        segment: int,
        socket: int,
        source: Address,
        now: float,
    ) -> None:
        size = len(run)
        count = 1 if size <= segment else -(-size // segment)
        if source != leg.address or socket != leg.socket:
            if source[0] != leg.address[0] or not source[1]:
                self.stats.strangers += count
                return
            leg.socket, leg.address = socket, source
        leg.heard_at = now
        passes = leg.allowance.take(size, segment, now)
        if passes < size:
            passing = passes // segment
            leg.dropped += count - passing
            self.stats.dropped += count - passing
            if not passing:
                return
            del run[passes:]
            size, count = passes, passing
        leg.bytes += size
        stats = self.stats
        stats.bytes += size
        stats.forwarded += count
        far = leg._far
        if count == 1:
            run[_ID:8] = far._name
        else:
            for position, stamp in enumerate(far._stamps, _ID):
                run[position::segment] = stamp[:count]
        self._queue(far, run, segment, size, count)

    def _queue(self, leg: Leg, packets: bytearray, segment: int, size: int, count: int) -> None:
        """Put packets behind those that wait for the same leg. ACKs do not wait for data, nor data
        for them: their sizes alternate where both peers send, and it is all one to UDX."""
        kind = packets[2] & wire.DATA
        run = leg._runs[kind]
        if run is not None:
            if (
                not run.ended
                and (segment == run.segment or (count == 1 and size < run.segment))
                and run.count + count <= _MAX_RUN_PACKETS
                and run.size + size <= _MAX_RUN_BYTES
            ):
                run.pieces.append(packets)
                run.count += count
                run.size += size
                run.ended = size % run.segment > 0
                return
            self._say(_transmit(leg, run))
        elif leg._runs[1 - kind] is None:
            self.busy.append(leg)
        leg._runs[kind] = _Run(segment, [packets], count, size, size % segment > 0)

    def flush(self) -> None:
        """Have everything leave that was passed on."""
        busy, self.busy = self.busy, []
        for leg in busy:
            for run in reversed(leg._runs):
                if run is not None:
                    self._say(_transmit(leg, run))
            leg._runs = [None, None]


def _transmit(leg: Leg, run: _Run) -> Transmit:
    segment = run.segment
    if run.count == 1:
        return Transmit(leg.socket, leg.address, tuple(run.pieces))
    buffers: list[Buffer] = []
    for piece in run.pieces:
        if len(piece) <= segment:
            buffers.append(piece)
        else:
            view = memoryview(piece)
            buffers += [view[at : at + segment] for at in range(0, len(piece), segment)]
    return Transmit(leg.socket, leg.address, tuple(buffers), segment)


def _alike(run: bytearray, segment: int) -> bool:
    """Whether all packets are for the stream that the first is for."""
    count = -(-len(run) // segment)
    return all(
        run[position::segment].count(run[position]) == count for position in (0, 1, 4, 5, 6, 7)
    )


def _first_other(data: memoryview, segment: int, start: int, stop: int) -> int:
    """Where the packets end that are for the stream that the first is for."""
    magic, name = data[start : start + len(_MAGIC)], data[start + _ID : start + 8]
    for other in range(start + segment, stop, segment):
        if data[other : other + len(_MAGIC)] != magic or data[other + _ID : other + 8] != name:
            return other
    return stop
