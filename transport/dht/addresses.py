"""Node ids, and what kind of address an address is (spec: hyperdht 2.2, 5.3, 7.4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from ..encoding import encode_address
from ..keys import blake2b
from ..transmit import Address

#: Addresses whose bytes and ids are remembered: the same few come up in reply after reply.
_CACHE = 8192


@lru_cache(maxsize=_CACHE)
def packed(address: Address) -> bytes:
    """The 6 bytes of an address."""
    return encode_address(address)


@lru_cache(maxsize=_CACHE)
def node_id(address: Address) -> bytes:
    """The 32-byte id that a node at this public address has."""
    return blake2b(encode_address(address))


#: Addresses (port 0: any port) that the network refuses as nodes (spec: hyperdht 2.11).
REFUSED: frozenset[Address] = frozenset(
    {
        ("134.209.28.98", 49738),
        ("167.99.142.185", 49738),
        ("35.233.47.252", 9400),
        ("150.136.142.116", 0),
    }
)


def is_refused(address: Address) -> bool:
    """Whether the network keeps this address out of its tables."""
    return address in REFUSED or (address[0], 0) in REFUSED


def is_private(host: str) -> bool:
    """Whether the dotted host is only reachable nearby: 10/8, 100.64/10, 127/8, 169.254/16,
    172.16/12, 192.168/16."""
    first, second = _first_octets(host)
    return (
        first in (10, 127)
        or (first == 100 and 64 <= second <= 127)
        or (first == 169 and second == 254)
        or (first == 172 and 16 <= second <= 31)
        or (first == 192 and second == 168)
    )


def is_reserved(host: str) -> bool:
    """Whether the dotted host is nobody's address: 0/8, 192.0.0/24, 192.0.2/24, 198.18/15,
    198.51.100/24, 203.0.113/24, 224/4 and up."""
    first, second = _first_octets(host)
    if first == 0 or first >= 224 or (first == 198 and second in (18, 19)):
        return True
    return host.startswith(("192.0.0.", "192.0.2.", "198.51.100.", "203.0.113."))


def is_bogon(host: str) -> bool:
    """Whether no packet from the public internet reaches the dotted host."""
    return is_private(host) or is_reserved(host)


def match(mine: Iterable[str], theirs: Sequence[Address]) -> Address | None:
    """The remote address that looks most like being on a network of ours.

    The first pair equal in three octets wins, else the first equal in two, else in one
    (spec: hyperdht 5.3, "match"). None when no pair shares even the first octet.
    """
    best: Address | None = None
    longest = 0
    for host in mine:
        octets = host.split(".")
        for address in theirs:
            equal = _equal_octets(octets, address[0].split("."))
            if equal >= 3:
                return address
            if equal > longest:
                best, longest = address, equal
    return best


def _first_octets(host: str) -> tuple[int, int]:
    first, second, _ = host.split(".", 2)
    return int(first), int(second)


def _equal_octets(mine: list[str], theirs: list[str]) -> int:
    equal = 0
    for a, b in zip(mine, theirs, strict=False):
        if a != b:
            break
        equal += 1
    return equal
