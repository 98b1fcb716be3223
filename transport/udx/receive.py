"""What one stream has received: bytes in order, packets out of order, the window that is left."""

from __future__ import annotations

from itertools import islice

from ..errors import InvalidInput
from ..transmit import Buffer
from .packet import MAX_SACK_BLOCKS
from .ranges import RangeSet
from .window import Window

#: Bytes a stream holds for its reader at first, and at most on a short path: with the 32 KiB that a
#: pipe lets its TCP connection hold, 256 KiB a direction. The reference offers 4 MiB, which costs
#: that much for every slow reader.
RECEIVE_WINDOW = 224 * 1024

#: Payloads below this many bytes are joined, so that a peer who sends single bytes costs about as
#: much memory as it fills of the window.
_SMALL = 512
#: Packets kept out of order, for each KiB of window. A fair peer has window / 1132 in flight.
_PACKETS_PER_KIB = 2
_MIN_PACKETS = 64


class Receiver:
    """Puts packets in order. Packet numbers here have no wrap-around.

    In-order bytes count against the window from their arrival until `credit`, packets out of order
    until they come into order. A packet beyond the window is dropped, as if the network had: a
    fair peer sends none, but for the one that any window above 0 permits (spec: udx 3.2). What
    fills the lowest gap is taken as long as the in-order bytes alone leave room, or the stream
    would come to a stop; so a hostile peer can make a receiver hold two windows, and never more.
    """

    __slots__ = (
        "_arrived",
        "_chunks",
        "_packets",
        "_ranges",
        "_stored",
        "_uncredited",
        "dropped",
        "duplicates",
        "end",
        "next",
        "offer",
        "readable",
        "stirred",
    )

    def __init__(self, first: int = 0, capacity: int = RECEIVE_WINDOW) -> None:
        #: Next number expected: everything before it has arrived.
        self.next = first
        #: Number of the peer's END packet, once known.
        self.end: int | None = None
        #: How much the peer may send.
        self.offer = Window(capacity)
        #: In-order bytes waiting in `take`.
        self.readable = 0
        #: Packets that had arrived before, and packets beyond the window.
        self.duplicates = 0
        self.dropped = 0
        #: There is something for the window to `follow`.
        self.stirred = False
        self._chunks: list[Buffer] = []
        self._uncredited = 0
        self._packets: dict[int, bytes] = {}
        self._ranges = RangeSet()
        self._stored = 0
        # Bytes that have come into order so far.
        self._arrived = 0

    @property
    def window(self) -> int:
        """Bytes the peer may send now."""
        return max(0, self.offer.edge - self._arrived - self._stored)

    @property
    def held(self) -> int:
        """Bytes that count against the window."""
        return self._uncredited + self._stored

    @property
    def gaps(self) -> bool:
        """Something has arrived out of order."""
        return bool(self._packets)

    @property
    def finished(self) -> bool:
        """The peer's END and everything before it have arrived."""
        return self.end is not None and self.next > self.end

    def accept_next(self, payload: bytes) -> bool:
        """Take the DATA packet that is expected next, as `accept` would, if nothing else waits
        for the reader or for its turn; otherwise return False."""
        size = len(payload)
        if self._packets or self._chunks or self.end is not None or not size:
            return False
        offer = self.offer
        if self._uncredited >= offer.edge - offer.credited:
            return False
        self.next += 1
        self._chunks.append(payload)
        self.readable += size
        self._uncredited += size
        self._arrived += size
        self.stirred = True
        return True

    def accept(self, seq: int, payload: bytes, end: bool) -> bool:
        """Take a DATA or END packet (END without DATA: an empty payload). Returns whether
        anything came into order."""
        if seq < self.next or seq in self._packets:
            self.duplicates += 1
            return False
        # A correct sender has nothing after END (spec: udx 2.4).
        if self.end is not None and seq > self.end:
            self.dropped += 1
            return False
        if seq != self.next:
            self._store(seq, payload, end)
            return False
        if payload and self._uncredited >= self.offer.room:
            self.dropped += 1
            return False
        if end and self.end is None:
            self.end = seq
        self._append(payload)
        self.next += 1
        if self._packets:
            self._advance()
        return True

    def accept_run(self, seq: int, payloads: tuple[bytes, ...]) -> bool:
        """Take consecutive DATA packets if all of them are new and there is room, else none."""
        behind = seq + len(payloads)
        if seq < self.next or self.end is not None:
            return False
        size = sum(map(len, payloads))
        if self.held + size > self.offer.room:
            return False
        if seq != self.next:
            return self._store_run(seq, behind, payloads, size)
        if self._packets and behind > self._ranges.first:
            return False
        self._append(b"".join(payloads))
        self.next = behind
        if self._packets:
            self._advance()
        return True

    def take(self, limit: int | None = None) -> list[Buffer]:
        """Up to ``limit`` of the in-order bytes (all of them for None)."""
        if limit is None or limit >= self.readable:
            taken, self._chunks = self._chunks, []
            self.readable = 0
            return taken
        taken = []
        limit = max(limit, 0)
        self.readable -= limit
        for chunk in self._chunks:
            if limit <= 0:
                break
            taken.append(chunk)
            limit -= len(chunk)
        rest = self._chunks[len(taken) :]
        if limit < 0:
            cut = memoryview(taken.pop())
            taken.append(cut[:limit])
            rest.insert(0, cut[limit:])
        self._chunks = rest
        return taken

    def credit(self, size: int) -> None:
        """Give back to the window ``size`` bytes that `take` returned. Raises InvalidInput for
        more than it did."""
        if not 0 <= size <= self._uncredited - self.readable:
            raise InvalidInput(f"credit {size} of {self._uncredited - self.readable} bytes read")
        self._uncredited -= size
        self.stirred = True
        self.offer.credit(size)

    def follow(self, rtt: float | None, now: float) -> None:
        """Adapt the window, after the reader had its turn; ``rtt`` (seconds) is the path's round
        trip, if it is known."""
        # Over and again while more is held than should be, which time alone decides about.
        self.stirred = self._uncredited > self.offer.base
        self.offer.follow(self._uncredited, self._arrived + self._stored, rtt, now)

    def blocks(self) -> tuple[tuple[int, int], ...]:
        """The lowest SACK blocks, ascending, as many as a packet takes (spec: udx 4.2)."""
        return tuple(islice(self._ranges, MAX_SACK_BLOCKS)) if self._packets else ()

    def discard(self) -> None:
        """Forget what is out of order: nothing will come to fill the gaps."""
        self._packets.clear()
        self._ranges.clear()
        self._stored = 0

    def _store(self, seq: int, payload: bytes, end: bool) -> None:
        if self.held + len(payload) > self.offer.room or seq - self.next > self._reach:
            self.dropped += 1
            return
        if end and self.end is None:
            self.end = seq
        self._packets[seq] = payload
        self._ranges.add(seq, seq + 1)
        self._stored += len(payload)
        self.stirred = True

    @property
    def _reach(self) -> int:
        """How far ahead a packet may be that is kept."""
        return max(_MIN_PACKETS, self.offer.room // 1024 * _PACKETS_PER_KIB)

    def _store_run(self, seq: int, behind: int, payloads: tuple[bytes, ...], size: int) -> bool:
        numbers = range(seq, behind)
        if behind - self.next > self._reach or not self._packets.keys().isdisjoint(numbers):
            return False
        self._packets.update(zip(numbers, payloads, strict=True))
        self._ranges.add(seq, behind)
        self._stored += size
        self.stirred = True
        return True

    def _advance(self) -> None:
        """Put into order what follows now that a gap is filled."""
        while not self.finished and self._ranges and self._ranges.first <= self.next:
            behind = self._ranges.first_end
            if self.end is not None:
                behind = min(behind, self.end + 1)
            payload = b"".join(map(self._packets.pop, range(self.next, behind)))
            self._ranges.remove(self._ranges.first, behind)
            self._stored -= len(payload)
            self._append(payload)
            self.next = behind
        if self.finished:
            self.discard()

    def _append(self, payload: bytes) -> None:
        if not payload:
            return
        size = len(payload)
        self.readable += size
        self._uncredited += size
        self._arrived += size
        self.stirred = True
        chunks = self._chunks
        if size < _SMALL and chunks and len(chunks[-1]) < _SMALL:
            last = chunks[-1]
            if isinstance(last, bytearray):
                last += payload
            else:
                chunks[-1] = bytearray(last) + payload
            return
        chunks.append(payload)
