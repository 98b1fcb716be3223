"""What the parts of a HyperDHT node share."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from ..encoding import encode_uint
from ..noise import Handshake
from ..transmit import Address
from ..udx.mux import Mux
from ..udx.stream import Stream
from .limiter import Limiter
from .messages import Firewall, HolepunchInfo, NoisePayload, RelayThrough, UdxInfo
from .node import Node
from .punches import Punches
from .relay_client import Relays
from .router import Router
from .store import Forwards
from .timings import Timings

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

#: Messages about punching a second that one sender (a client's host, or the relay of many) may have
#: us open; a connect takes one to three.
PUNCH_MESSAGES_PER_CLIENT = 300.0
PUNCH_MESSAGES_PER_SENDER = 3000.0
#: Seconds' worth of them at once.
PUNCH_MESSAGES_PATIENCE = 2.0

#: Keys whose relays, and whose last direct address, are remembered (spec: hyperdht 5.2).
MAX_REMEMBERED = 512
#: Encoded payloads that are kept: one for clients and one for each server's relays, while the
#: public address stays the same.
MAX_OFFERS = 64


@dataclass(slots=True)
class Connection:
    """What a handshake leads to. Nothing has been written; bytes may have arrived already."""

    #: Connected.
    stream: Stream
    handshake: Handshake
    remote_address: Address
    #: None for one that a server has accepted.
    timings: Timings | None = None


@dataclass(slots=True)
class Route:
    """A socket of ours and the address at which a peer answered on it."""

    socket: int
    address: Address
    #: It leads through NATs, which forget it when it is not used for a while.
    punched: bool = False


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
    client_punches: Limiter = field(
        default_factory=lambda: Limiter(
            PUNCH_MESSAGES_PER_CLIENT, PUNCH_MESSAGES_PER_CLIENT * PUNCH_MESSAGES_PATIENCE
        )
    )
    sender_punches: Limiter = field(
        default_factory=lambda: Limiter(
            PUNCH_MESSAGES_PER_SENDER, PUNCH_MESSAGES_PER_SENDER * PUNCH_MESSAGES_PATIENCE
        )
    )
    punches: Punches = field(init=False)
    #: Blind ones, which carry streams.
    blind: Relays = field(init=False)
    #: Nodes of the DHT that forward to a public key, the least recently used first.
    relays: dict[bytes, tuple[Address, ...]] = field(default_factory=dict)
    routes: dict[bytes, Route] = field(default_factory=dict)
    #: Those that are under way.
    attempts: set[Attempt] = field(default_factory=set)
    #: What `offer` says in front of and behind the number of the stream, by what it depends on.
    _offers: dict[object, tuple[bytes, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.punches = Punches(self.node, self.rng)
        self.blind = Relays(self.node.timers, self.rng)

    @property
    def firewall(self) -> Firewall:
        """What to tell a peer about ourselves."""
        return Firewall.UNKNOWN if self.node.remote_address() is None else Firewall.OPEN

    def addresses(self) -> tuple[Address, ...]:
        """Where a peer may reach the server socket: public address, then local ones."""
        public = self.node.remote_address()
        local = tuple((host, self.node.server_port) for host in self.local_hosts)
        return tuple(dict.fromkeys(((public,) if public else ()) + local))

    def offer(
        self,
        stream_id: int,
        relay_addresses: tuple[Address, ...] | None = None,
        *,
        punch: HolepunchInfo | None = None,
        through: RelayThrough | None = None,
    ) -> bytes:
        """The encoded `NoisePayload` of one who has a UDX stream with this number for the peer, and
        can be reached by itself or through these relays; by punching, if so, and through this blind
        relay."""
        if punch is not None or through is not None:
            payload = self._payload(stream_id, relay_addresses)
            payload.holepunch, payload.relay_through = punch, through
            return payload.encode()
        node = self.node
        told = node.remote_address(), node.server_port, relay_addresses
        offer = self._offers.get(told)
        if offer is None:
            payload = self._payload(0, relay_addresses)
            if len(self._offers) >= MAX_OFFERS:
                self._offers.clear()
            offer = self._offers[told] = payload.around_stream_id()
        return offer[0] + encode_uint(stream_id) + offer[1]

    def _payload(self, stream_id: int, relay_addresses: tuple[Address, ...] | None) -> NoisePayload:
        return NoisePayload(
            # Without holepunch field: clients of a server come straight to it (spec: hyperdht 5.3).
            firewall=self.firewall,
            addresses4=self.addresses(),
            # The reusable flag obliges a server to answer handshakes on the connection's socket for
            # a while after the connection (spec: hyperdht 4.5). Ours is one of the two main
            # sockets, which stay open as long as the node lives, or one that lingers for that.
            udx=UdxInfo(stream_id, reusable_socket=True),
            secret_stream=True,
            relay_addresses=relay_addresses,
        )

    def settle(self, local_hosts: tuple[str, ...]) -> None:
        """The interfaces have these addresses from now on."""
        self.local_hosts = local_hosts
        self._offers.clear()

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
