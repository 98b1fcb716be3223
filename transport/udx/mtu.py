"""The search for the path's MTU (spec: udx 3.4).

Sizes are IP packets, IPv4: a payload has 48 bytes less. 1200 is taken to work; above it, one data
packet at a time is padded to the size tried.
"""

from __future__ import annotations

from .packet import HEADER_BYTES, MAX_PADDING

#: IPv4 header, UDP header, UDX header.
OVERHEAD = 20 + 8 + HEADER_BYTES
BASE_MTU = 1200
MAX_MTU = 1500
_STEP = 32
#: Lost probes of one size after which the search is over.
_ATTEMPTS = 3


class MtuSearch:
    """Which size is safe, and which is to be tried next."""

    __slots__ = ("_failures", "_limit", "_size", "_wanted", "mtu")

    def __init__(self, link_mtu: int = MAX_MTU) -> None:
        #: Largest size known to arrive.
        self.mtu = BASE_MTU
        self._limit = min(link_mtu, MAX_MTU)
        self._failures = 0
        self._size = 0
        self._wanted = False

    @property
    def payload(self) -> int:
        """Most stream bytes for one packet."""
        return self.mtu - OVERHEAD

    def begin(self) -> None:
        """The first packet was acknowledged: the path is there."""
        if self._size == 0:
            self._try_next()

    def padding(self, payload: int) -> int:
        """Zeros that make the next packet, of ``payload`` bytes, a probe; 0 for no probe now."""
        if not self._wanted:
            return 0
        padding = self._size - OVERHEAD - payload
        return padding if padding <= MAX_PADDING else 0

    def sent(self) -> None:
        """The probe left."""
        self._wanted = False

    def acknowledged(self) -> None:
        """The probe arrived."""
        self.mtu = self._size
        self._failures = 0
        self._try_next()

    def lost(self) -> None:
        """The probe did not arrive, as far as can be told."""
        self._failures += 1
        self._wanted = self._failures < _ATTEMPTS

    def _try_next(self) -> None:
        self._size = min(self.mtu + _STEP, self._limit)
        self._wanted = self._size > self.mtu
