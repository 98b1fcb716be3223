"""What networks do to datagrams, one direction of one path at a time.

A `Link` says what happens, a `Faults` does it: it holds the seeded randomness, the state (a burst
that goes on, a queue that is filled) and the counts. It knows no clock and no socket, so the
simulated network, the relay between real sockets and the lossy socket all share it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from ..transport.errors import InvalidInput
from ..transport.transmit import Address

#: Bytes of the IPv4 and UDP headers, which queues and MTUs count and datagrams do not show.
HEADERS = 28
_IP_HEADER = 20

#: Where nothing is said about the addresses.
NOWHERE: Address = ("", 0)


@dataclass(frozen=True, slots=True)
class Bursts:
    """Losses that come together: a two-state chain (Gilbert and Elliott), one step a datagram."""

    #: Chances that a datagram finds the path good and leaves it bad, and the reverse.
    begin: float = 0.01
    end: float = 0.25
    #: Share of the datagrams that a bad path loses.
    loss: float = 1.0


@dataclass(slots=True)
class Link:
    """What happens to a datagram on its way. Times in seconds, shares from 0 to 1. It may be
    changed while it is in use; what is under way already stays as it is."""

    delay: float = 0.001
    #: Added to the delay, uniformly from 0 to this: above the spacing of packets it reorders them.
    jitter: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    #: Called with each datagram; True drops it. For losses that a test chooses.
    drop: Callable[[bytes, Address, Address], bool] | None = None
    bursts: Bursts | None = None
    #: Share that is held back by ``reorder_delay``, so that later datagrams overtake it.
    reorder: float = 0.0
    reorder_delay: float = 0.005
    #: Share that arrives with one bit flipped, in the bytes at the positions ``corrupt_at`` (None:
    #: anywhere). Real networks have a checksum; what is flipped here has passed it.
    corrupt: float = 0.0
    corrupt_at: Sequence[int] | None = None
    #: From when to when nothing comes through.
    blackholes: Sequence[tuple[float, float]] = ()
    #: Bytes a second, headers included; None for no limit. What has to wait is a queue.
    bandwidth: float | None = None
    #: Bytes that wait at most, headers included; more are dropped at its tail. None for no limit.
    queue: int | None = None
    #: The largest IP packet, bytes; larger ones are fragmented if they may be, else dropped, and
    #: nobody is told.
    mtu: int | None = None


@dataclass(slots=True)
class Stats:
    """What became of the datagrams that were sent, each counted once, but for ``duplicated``,
    ``corrupted``, ``reordered`` and ``fragmented``, which may arrive all the same."""

    sent: int = 0
    #: Their bytes without headers.
    sent_bytes: int = 0
    lost: int = 0
    #: Chosen by ``drop``.
    chosen: int = 0
    blackholed: int = 0
    too_large: int = 0
    #: Found the queue full.
    overflowed: int = 0
    duplicated: int = 0
    corrupted: int = 0
    reordered: int = 0
    fragmented: int = 0

    @property
    def dropped(self) -> int:
        """Datagrams that never arrive."""
        return self.lost + self.chosen + self.blackholed + self.too_large + self.overflowed


class Faults:
    """One direction of a path. Whoever sends through the same object shares its queue."""

    __slots__ = ("_bad", "_free_at", "link", "rng", "stats")

    def __init__(self, link: Link, rng: Random) -> None:
        self.link = link
        self.rng = rng
        self.stats = Stats()
        self._bad = False
        # When the last bit of what waits will have left.
        self._free_at = 0.0

    def carry(
        self,
        datagram: bytes,
        now: float,
        source: Address = NOWHERE,
        destination: Address = NOWHERE,
        *,
        may_fragment: bool = False,
    ) -> list[tuple[float, bytes]]:
        """When it arrives, and as what: nothing if it is lost, two if it is duplicated. ``now``
        never goes back. The order of equal times is that of the calls."""
        link, rng = self.link, self.rng
        self.stats.sent += 1
        self.stats.sent_bytes += len(datagram)
        pieces = self._pieces(datagram, may_fragment)
        if self._drops(datagram, now, source, destination, pieces):
            return []
        leaves = now
        if link.bandwidth is not None:
            waiting = max(self._free_at - now, 0.0) * link.bandwidth
            size = len(datagram) + HEADERS + (pieces - 1) * _IP_HEADER
            # What has been halfway through the wire still waits by half; an empty queue takes one.
            if link.queue is not None and waiting and waiting + size > link.queue:
                self.stats.overflowed += 1
                return []
            leaves = self._free_at = max(self._free_at, now) + size / link.bandwidth
        copies = 1
        if link.duplicate and rng.random() < link.duplicate:
            copies = 2
            self.stats.duplicated += 1
        return [self._copy(datagram, leaves) for _ in range(copies)]

    def _pieces(self, datagram: bytes, may_fragment: bool) -> int:
        """IP packets that the datagram makes; 0 if it has to be one and is too large."""
        mtu = self.link.mtu
        if mtu is None or len(datagram) + HEADERS <= mtu:
            return 1
        if not may_fragment:
            return 0
        self.stats.fragmented += 1
        # Offsets of fragments are counted in units of 8 bytes.
        each = max((mtu - _IP_HEADER) // 8 * 8, 8)
        return -(-(len(datagram) + HEADERS - _IP_HEADER) // each)

    def _drops(
        self, datagram: bytes, now: float, source: Address, destination: Address, pieces: int
    ) -> bool:
        link, stats = self.link, self.stats
        if link.drop is not None and link.drop(datagram, source, destination):
            stats.chosen += 1
            return True
        if link.blackholes and any(start <= now < end for start, end in link.blackholes):
            stats.blackholed += 1
            return True
        if not pieces:
            stats.too_large += 1
            return True
        # A datagram arrives if all its fragments do.
        lost = [self._loses(link) for _ in range(pieces)]
        stats.lost += any(lost)
        return any(lost)

    def _loses(self, link: Link) -> bool:
        if link.loss and self.rng.random() < link.loss:
            return True
        return link.bursts is not None and self._in_burst(link.bursts)

    def _in_burst(self, bursts: Bursts) -> bool:
        self._bad = self.rng.random() < (1 - bursts.end if self._bad else bursts.begin)
        return self._bad and self.rng.random() < bursts.loss

    def _copy(self, datagram: bytes, leaves: float) -> tuple[float, bytes]:
        link, rng = self.link, self.rng
        when = leaves + link.delay + (rng.uniform(0, link.jitter) if link.jitter else 0.0)
        if link.reorder and rng.random() < link.reorder:
            self.stats.reordered += 1
            when += link.reorder_delay
        if link.corrupt and datagram and rng.random() < link.corrupt:
            self.stats.corrupted += 1
            datagram = self._corrupted(datagram)
        return when, datagram

    def _corrupted(self, datagram: bytes) -> bytes:
        positions = self.link.corrupt_at
        if positions is None:
            positions = range(len(datagram))
        position = self.rng.choice(positions)
        if position >= len(datagram):
            return datagram
        flipped = bytearray(datagram)
        flipped[position] ^= 1 << self.rng.randrange(8)
        return bytes(flipped)


def parse_link(text: str, link: Link | None = None) -> Link:
    """A link from ``delay=0.02,loss=0.01,...``; what is not named is as in ``link``, or without
    fault. Bursts are ``bursts=BEGIN:END:LOSS``, blackholes ``blackholes=FROM-TO:FROM-TO``.
    Raises `InvalidInput`."""
    values: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            values[name] = _PARSERS[name](value)
        except KeyError:
            raise InvalidInput(f"{name!r} is no fault: use one of {', '.join(_PARSERS)}") from None
        except (TypeError, ValueError):
            raise InvalidInput(f"{part!r} is no value of {name}") from None
    return dataclasses.replace(link or Link(delay=0.0), **values)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value


def _amount(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError(text)
    return value


def _positive(text: str) -> float:
    value = _amount(text)
    if not value:
        raise ValueError(text)
    return value


def _count(text: str) -> int:
    return int(_amount(text))


def _bursts(text: str) -> Bursts:
    return Bursts(*map(_share, text.split(":")))


def _intervals(text: str) -> tuple[tuple[float, float], ...]:
    pairs = [tuple(map(_amount, each.split("-"))) for each in text.split(":")]
    return tuple((start, end) for start, end in pairs)


_PARSERS: dict[str, Callable[[str], Any]] = {
    "delay": _amount,
    "jitter": _amount,
    "loss": _share,
    "bursts": _bursts,
    "duplicate": _share,
    "reorder": _share,
    "reorder_delay": _amount,
    "corrupt": _share,
    "blackholes": _intervals,
    "bandwidth": _positive,
    "queue": _count,
    "mtu": _count,
}
