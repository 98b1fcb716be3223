"""What the parts of a HyperDHT node share."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from ..noise import Handshake
from ..transmit import Address
from ..udx.mux import Mux
from ..udx.stream import Stream
from .limiter import Limiter
from .messages import Firewall
from .node import Node
from .router import Router
from .store import Forwards

if TYPE_CHECKING:
    from .connect import Attempt

#: Handshakes a second that one sender (a client, or the relay of many) may have us compute, each
#: about a millisecond. A thousand connects a second through one relay are real.
HANDSHAKES_PER_SECOND = 2000.0
HANDSHAKES_BURST = 4000.0
#: Handshakes a second that may turn out to be garbage before a client's host, and whoever relays
#: for it, gets no more computed. A relay carries the garbage of several.
GARBAGE_PER_CLIENT = 50.0
GARBAGE_PER_SENDER = 200.0
#: Seconds' worth of garbage forgiven at once.
GARBAGE_PATIENCE = 2.0

#: Keys whose relays, and whose last direct address, are remembered (spec: hyperdht 5.2).
MAX_REMEMBERED = 512


@dataclass(frozen=True, slots=True)
class Connection:
    """What a handshake leads to. Nothing has been written; bytes may have arrived already."""

    #: Connected.
    stream: Stream
    handshake: Handshake
    remote_address: Address


@dataclass(frozen=True, slots=True)
class Route:
    """A socket of ours and the address at which a peer answered on it."""

    socket: int
    address: Address


@dataclass(slots=True)
class Context:
    """One node's parts; ``local_hosts`` are the addresses of its interfaces."""

    node: Node
    mux: Mux
    rng: Random
    router: Router
    forwards: Forwards
    local_hosts: tuple[str, ...] = ()
    computed: Limiter = field(
        default_factory=lambda: Limiter(HANDSHAKES_PER_SECOND, HANDSHAKES_BURST)
    )
    client_garbage: Limiter = field(
        default_factory=lambda: Limiter(GARBAGE_PER_CLIENT, GARBAGE_PER_CLIENT * GARBAGE_PATIENCE)
    )
    sender_garbage: Limiter = field(
        default_factory=lambda: Limiter(GARBAGE_PER_SENDER, GARBAGE_PER_SENDER * GARBAGE_PATIENCE)
    )
    #: By public key, the least recently used first.
    relays: dict[bytes, tuple[Address, ...]] = field(default_factory=dict)
    routes: dict[bytes, Route] = field(default_factory=dict)
    #: Those that are under way.
    attempts: set[Attempt] = field(default_factory=set)

    @property
    def firewall(self) -> Firewall:
        """What to tell a peer about ourselves."""
        return Firewall.UNKNOWN if self.node.remote_address() is None else Firewall.OPEN

    def addresses(self) -> tuple[Address, ...]:
        """Where a peer may reach the server socket: public address, then local ones."""
        public = self.node.remote_address()
        local = tuple((host, self.node.server_port) for host in self.local_hosts)
        return tuple(dict.fromkeys(((public,) if public else ()) + local))

    def remember_relays(self, public_key: bytes, relays: tuple[Address, ...]) -> None:
        self.relays.pop(public_key, None)
        if len(self.relays) >= MAX_REMEMBERED:
            del self.relays[next(iter(self.relays))]
        self.relays[public_key] = relays

    def remember_route(self, public_key: bytes, route: Route | None) -> None:
        """None forgets."""
        self.routes.pop(public_key, None)
        if route is None:
            return
        if len(self.routes) >= MAX_REMEMBERED:
            del self.routes[next(iter(self.routes))]
        self.routes[public_key] = route


def admit(_stream: Stream, _socket: int, _source: Address, _now: float) -> bool:
    """The hook of a connected stream: its peer knows several addresses of ours, and may send to
    any of our sockets."""
    return True
