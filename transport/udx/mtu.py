"""The search for the path's MTU (spec: udx 3.4).

Sizes are IP packets, IPv4: a payload has 48 bytes less. 1200 is taken to work; above it, one data
packet at a time is padded to the size tried. When nothing larger than that arrives any more, the
search begins anew, with the size that worked: it was a pause and no narrower path, as a rule.
"""

from __future__ import annotations

from .packet import HEADER_BYTES, MAX_PADDING

#: IPv4 header, UDP header, UDX header.
OVERHEAD = 20 + 8 + HEADER_BYTES
BASE_MTU = 1200
MAX_MTU = 1500
#: Stream bytes of a packet that every path is taken to carry whole.
BASE_PAYLOAD = BASE_MTU - OVERHEAD
_STEP = 32
#: Lost probes of one size after which the search is over.
_ATTEMPTS = 3


class MtuSearch:
    """Which size is safe, and which is to be tried next."""

    __slots__ = ("_again", "_failures", "_limit", "_size", "begun", "mtu", "payload", "wanted")

    def __init__(self, link_mtu: int = MAX_MTU) -> None:
        #: Largest size known to arrive.
        self.mtu = BASE_MTU
        #: Most stream bytes for one packet.
        self.payload = BASE_PAYLOAD
        #: The search is under way, or over.
        self.begun = False
        #: A probe shall be sent.
        self.wanted = False
        self._limit = min(link_mtu, MAX_MTU)
        self._failures = 0
        # The size tried is the one that had worked.
        self._again = False
        self._size = 0

    def begin(self) -> None:
        """The first packet was acknowledged: the path is there."""
        if not self.begun:
            self.begun = True
            self._try(min(self.mtu + _STEP, self._limit))

    def padding(self, payload: int) -> int:
        """Zeros that make the next packet, of ``payload`` bytes, a probe; 0 for no probe now."""
        if not self.wanted:
            return 0
        padding = self._size - OVERHEAD - payload
        return padding if padding <= MAX_PADDING else 0

    def sent(self) -> None:
        """The probe left."""
        self.wanted = False

    def acknowledged(self) -> None:
        """The probe arrived."""
        self._settle(self._size)
        self._failures = 0
        self._again = False
        self._try(min(self.mtu + _STEP, self._limit))

    def lost(self) -> None:
        """The probe did not arrive, as far as can be told."""
        self._failures += 1
        if self._failures < _ATTEMPTS:
            self.wanted = True
        elif self._again:
            self._again = False
            self._failures = 0
            self._try(min(self.mtu + _STEP, self._limit))

    def begin_again(self) -> None:
        """The path may have become narrower: only the base is safe."""
        if self.mtu == BASE_MTU:
            return
        size = min(self.mtu, BASE_MTU + MAX_PADDING)
        self._settle(BASE_MTU)
        self._failures = 0
        self._again = True
        self._try(size)

    def _settle(self, mtu: int) -> None:
        self.mtu = mtu
        self.payload = mtu - OVERHEAD

    def _try(self, size: int) -> None:
        self._size = size
        self.wanted = size > self.mtu
