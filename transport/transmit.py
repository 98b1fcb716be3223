"""What a protocol core hands to whoever owns the sockets."""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeAlias

#: IPv4 host in dotted text, and port 0..65535.
Address: TypeAlias = tuple[str, int]

#: One piece of an outgoing datagram.
Buffer: TypeAlias = bytes | bytearray | memoryview

#: Sockets are named by small numbers inside the cores; the shell knows which is which.
SERVER_SOCKET = 0
CLIENT_SOCKET = 1


class Transmit(NamedTuple):
    """One or many datagrams to one address.

    With ``segment`` 0 the buffers together are one datagram. Otherwise they are a run of datagrams
    of ``segment`` bytes each, the last of which may be shorter, and no buffer crosses from one
    datagram into the next: what UDP_SEGMENT takes in one call.

    Datagrams leave with "don't fragment" set, unless ``may_fragment``: then it is one datagram,
    with ``segment`` 0.

    With ``ttl`` it is one datagram that passes so many routers at most (0: the usual number), which
    says nothing about later ones.
    """

    socket: int
    address: Address
    buffers: tuple[Buffer, ...]
    segment: int = 0
    may_fragment: bool = False
    ttl: int = 0


class Core(Protocol):
    """The contract of every protocol core that speaks datagrams. Times are seconds on any clock
    that only moves forward; a core never reads one."""

    def receive(self, datagram: bytes, socket: int, source: Address, now: float) -> None:
        """Take one datagram. Never raises for what the network sent."""

    def transmits(self, now: float) -> list[Transmit]:
        """What is to be sent now; each transmit is returned once."""

    def deadline(self) -> float | None:
        """When `on_deadline` must be called at the latest, or None for never."""

    def on_deadline(self, now: float) -> None:
        """Do what has become due. Harmless when nothing has."""
