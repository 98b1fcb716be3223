"""Small datagrams that leave one after another as one run, for one call of the kernel."""

from __future__ import annotations

from collections.abc import Iterator

from ..transmit import Buffer, Transmit

#: Datagrams of at most this many bytes are put together, at most so many to a run: what the kernel
#: takes in one call.
SMALL = 512
MAX_RUN = 64


def together(transmits: list[Transmit]) -> Iterator[Transmit]:
    """The same datagrams in the same order, but those of one size for one address in a row (ACKs
    and keep-alives of many streams between two nodes) as one run."""
    start = 0
    while start < len(transmits):
        first = transmits[start]
        end = start + 1
        size = _alike(first)
        buffers: tuple[Buffer, ...] = first.buffers
        while end < len(transmits) and end - start < MAX_RUN and size:
            other = transmits[end]
            if other.address != first.address or other.socket != first.socket:
                break
            if _alike(other) != size:
                break
            buffers += other.buffers
            end += 1
        start = end
        if len(buffers) == len(first.buffers):
            yield first
        else:
            yield Transmit(first.socket, first.address, buffers, size)


def _alike(transmit: Transmit) -> int:
    """The bytes of a single small datagram; 0 for any other transmit."""
    if transmit.segment or transmit.may_fragment or transmit.ttl or len(transmit.buffers) > 4:
        return 0
    size = sum(map(len, transmit.buffers))
    return size if size <= SMALL else 0
