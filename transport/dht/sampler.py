"""The node's public address, by the majority of what other nodes say (spec: hyperdht 2.12)."""

from __future__ import annotations

from ..transmit import Address

#: Samples that have a say.
RING = 16
#: Samples among which an equal earlier one is looked for.
_RECENT = 4


class _Count:
    __slots__ = ("count", "host", "port")

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.count = 1


class Sampler:
    """A ring of the last samples, each of which refers to a count of its address and one of its
    host."""

    __slots__ = ("_addresses", "_best_address", "_best_host", "_hosts", "_next", "host", "port")

    def __init__(self) -> None:
        self._addresses: list[_Count] = []
        self._hosts: list[_Count] = []
        self._next = 0
        self._best_address: _Count | None = None
        self._best_host: _Count | None = None
        #: The public host; None as long as the samples do not agree.
        self.host: str | None = None
        #: The public port; 0 when unknown, or when it differs from one destination to the next.
        self.port = 0

    @property
    def size(self) -> int:
        """Samples in the ring."""
        return len(self._addresses)

    @property
    def threshold(self) -> int:
        """Equal samples that are needed to believe them."""
        size = self.size
        return size - (0 if size < 4 else 1 if size < 8 else 2 if size < 12 else 3)

    def add(self, address: Address) -> None:
        """Take one sample: our address as somebody saw it."""
        host, port = address
        a = self._touch(self._addresses, host, port)
        b = self._touch(self._hosts, host, 0)
        if self.size < RING:
            self._addresses.append(a)
            self._hosts.append(b)
        else:
            self._addresses[self._next].count -= 1
            self._hosts[self._next].count -= 1
            self._addresses[self._next] = a
            self._hosts[self._next] = b
        self._next = (self._next + 1) % RING
        if self._best_address is None or self._best_address.count < a.count:
            self._best_address = a
        if self._best_host is None or self._best_host.count < b.count:
            self._best_host = b
        self._decide(self._best_address, self._best_host)

    def _touch(self, ring: list[_Count], host: str, port: int) -> _Count:
        for back in range(1, min(_RECENT, len(ring)) + 1):
            count = ring[self._next - back]
            if count.host == host and count.port == port:
                count.count += 1
                return count
        return _Count(host, port)

    def _decide(self, address: _Count, host: _Count) -> None:
        if address.count >= self.threshold:
            self.host, self.port = address.host, address.port
        elif host.count >= self.threshold:
            self.host, self.port = host.host, 0
        else:
            self.host, self.port = None, 0
