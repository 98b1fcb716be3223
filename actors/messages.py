"""Every message that crosses an actor's border: frozen, and never bytes of a stream.

Keys are 32 bytes. A meta object is a JSON object (`actors.registry.roles`); whoever gets one does
not change it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct
from thespian.actors import ActorAddress

from ..transport.channel import Channel
from ..transport.dht.blind_relay import Pair, RelayMessage
from ..transport.dht.examine import Findings
from ..transport.dht.timings import Timings
from ..transport.keys import KeyPair
from ..transport.transmit import Address
from ..transport.udx.forward import Forwarder

# The endpoint. It answers whoever asked.


class Connect(Struct, frozen=True):
    """Open an encrypted connection to a key. Answer: `Connected` or `ConnectFailed`."""

    public_key: bytes
    #: Who to be; None for an identity that nobody knows yet.
    key_pair: KeyPair | None = None
    #: Keys of blind relays where it may begin.
    relay_through: tuple[bytes, ...] = ()


class Connected(Struct, frozen=True):
    """The channel has no protocol yet, so it holds its peer until it gets one. It belongs to the
    receiver, who aborts it when it comes too late."""

    channel: Channel
    #: Where the time went.
    timings: Timings | None = None


class ConnectFailed(Struct, frozen=True):
    error: Exception


class Listen(Struct, frozen=True):
    """Accept connections to a key pair for as long as ``deliver_to`` lives; each arrives there as
    `Accepted`. Answer: `Listening` or `ListenFailed`."""

    key_pair: KeyPair
    deliver_to: ActorAddress
    #: Keys that may connect; None for everybody.
    allow: frozenset[bytes] | None = None
    #: Keys of blind relays where connections may begin, and those that only clients name; None for
    #: all.
    relay_through: tuple[bytes, ...] = ()
    allow_relays: frozenset[bytes] | None = frozenset()


class Listening(Struct, frozen=True):
    public_key: bytes


class ListenFailed(Struct, frozen=True):
    error: Exception


class Accepted(Struct, frozen=True):
    """A channel without a protocol, which belongs to the receiver."""

    channel: Channel


class Unlisten(Struct, frozen=True):
    """Stop accepting connections to a key. Answer: `Unlistened`."""

    public_key: bytes


class Unlistened(Struct, frozen=True):
    pass


class Measure(Struct, frozen=True):
    """What has the endpoint counted? Answer: `Measured`."""


class Measured(Struct, frozen=True):
    """Values by dotted names, as `Endpoint.metrics` has them."""

    values: Mapping[str, int]


class Examine(Struct, frozen=True):
    """What does this host look like from outside? Answer, some seconds later: `Examined`."""


class Examined(Struct, frozen=True):
    findings: Findings


class AnnounceTopic(Struct, frozen=True):
    """Tell the DHT that the key pair can be found under a topic of 32 bytes, and keep it told.
    Answer: `Announced`."""

    topic: bytes
    key_pair: KeyPair


class Announced(Struct, frozen=True):
    pass


class BorrowForwarder(Struct, frozen=True):
    """Who passes packets on for others? Answer: `ForwarderBorrowed`."""


class ForwarderBorrowed(Struct, frozen=True):
    """It belongs to the endpoint and means nothing when that is dead. The borrower unlinks what it
    has linked."""

    forwarder: Forwarder


# Inside a relay: a session asks the books.


class RelayEnter(Struct, frozen=True):
    """The sender is the session of a peer, until it dies. Answer: `RelayRefused` or none."""

    #: The key that the peer has proven to have, and where it is.
    public_key: bytes
    host: str


class RelayRefused(Struct, frozen=True):
    """The peer's key may have no session, or no more; or the session has done nothing for long."""


class RelayAsk(Struct, frozen=True):
    """The peer, whose packets come from ``address`` to our ``socket``, wants this. Answers:
    `RelayTaken` and, to a pair as soon as its other half comes, `RelayAnswer`."""

    request: RelayMessage
    socket: int
    address: Address


class RelayTaken(Struct, frozen=True):
    pass


class RelayAnswer(Struct, frozen=True):
    pair: Pair


# Inside a registry: a session asks the table, with a ticket that the answer bears.


class TableRequest(Struct, frozen=True):
    """One call of a registry method (`register`, `unregister`, `query` or `waitFor`)."""

    ticket: int
    method: str
    #: As the client sent them: any JSON value, or `transport.rpc.ABSENT`.
    params: Any
    #: The key that the session's client has proven to have.
    remote_public_key: bytes


class TableAnswer(Struct, frozen=True):
    ticket: int
    #: A JSON value, or `transport.rpc.ABSENT`.
    result: Any


class TableRefusal(Struct, frozen=True):
    """The call fails with this text."""

    ticket: int
    text: str


class ServiceRegistered(Struct, frozen=True):
    """To the console, for each registration: `id`, `remotePublicKey`, `meta`."""

    info: Mapping[str, Any]


class ServiceGone(Struct, frozen=True):
    """To the console, for each entry that went: shaped as in `ServiceRegistered`."""

    info: Mapping[str, Any]


# The link: a client's session with a registry.


@dataclass(frozen=True, slots=True)
class ServiceRecord:
    """A registered service as a registry tells of it. Nothing in it has been proven unless
    ``verified`` says so."""

    public_key: bytes
    role: str
    version: str
    meta: Mapping[str, Any] = field(compare=False)
    verified: bool = False
    #: Who registered it; None when the registry does not tell.
    remote_public_key: bytes | None = field(default=None, compare=False)
    #: Of a signed lease: 32 hexadecimal digits that a running service has chosen, the number of the
    #: statement, and its end in seconds of Unix time.
    instance: str = field(default="", compare=False)
    sequence: int = field(default=0, compare=False)
    expires: float = field(default=0.0, compare=False)


class Register(Struct, frozen=True):
    """Keep a service registered for as long as the sender lives. Answer, at every registration
    (again after each reconnection): `Registered` or `RegistrationRefused`."""

    meta: Mapping[str, Any]
    service_key: bytes
    #: Signs the lease; without it, the registration is one that anybody could have made.
    key_pair: KeyPair | None = None
    #: 32 hexadecimal digits that tell this run of the service from others.
    instance: str = ""


class Unregister(Struct, frozen=True):
    """Take a registration back. No answer."""

    meta: Mapping[str, Any]
    service_key: bytes


class Registered(Struct, frozen=True):
    meta: Mapping[str, Any]
    service_key: bytes
    #: With which registry.
    registry_key: bytes = b""
    #: The registry holds a lease that the service's key has signed.
    verified: bool = False


class RegistrationRefused(Struct, frozen=True):
    """The registry does not take it, for the reason in ``text``; it is asked again later."""

    meta: Mapping[str, Any]
    service_key: bytes
    text: str
    registry_key: bytes = b""


class Find(Struct, frozen=True):
    """Look for services, waiting until there are some. Answer: `Found`."""

    #: `role` and `version`, which is a range; without `version` any will do.
    meta: Mapping[str, Any]
    #: Seconds after which the answer is an empty list.
    timeout: float = 15.0


@dataclass(frozen=True, slots=True)
class Found:
    meta: Mapping[str, Any]
    #: Highest version first; empty when the time was over.
    records: tuple[ServiceRecord, ...]


class Watch(Struct, frozen=True):
    """Tell the sender of the matching services now and at each change, as `Services`, for as long
    as it lives."""

    meta: Mapping[str, Any]


class Unwatch(Struct, frozen=True):
    meta: Mapping[str, Any]


class Services(Struct, frozen=True):
    """Highest version first; empty when nobody matches."""

    meta: Mapping[str, Any]
    records: tuple[ServiceRecord, ...]
    #: A registry can be asked right now.
    live: bool = True
    #: Seconds since a registry last vouched for this.
    age: float = 0.0


class ListRoles(Struct, frozen=True):
    """Which roles does the registry know? Answer: `RolesListed`."""


class RolesListed(Struct, frozen=True):
    #: None when the registry cannot tell, or does not answer.
    roles: tuple[str, ...] | None


class Refresh(Struct, frozen=True):
    """A service that a `Watch` told of does not work: ask the registry again, and keep asking for a
    while, since it may not know yet."""

    meta: Mapping[str, Any]


class LinkConnecting(Struct, frozen=True):
    """To the console: an attempt begins. The first has number 1, also after a loss."""

    registry_key: bytes
    attempt: int


class LinkUp(Struct, frozen=True):
    """To the console: the registry can be asked."""

    registry_key: bytes


class LinkDown(Struct, frozen=True):
    """To the console: no session, and when the next attempt comes."""

    registry_key: bytes
    reason: str
    #: Seconds until the next attempt.
    retry_in: float
    #: Seconds since the session was lost, or since the first attempt when there was none.
    down_for: float


# To the console.


class EndpointReady(Struct, frozen=True):
    """The node has joined its network, or has found that there is none yet."""

    address: Address
    #: Nodes in its routing table.
    nodes: int


class ServiceListening(Struct, frozen=True):
    """Clients can connect to the key."""

    public_key: bytes


class RegistryListening(Struct, frozen=True):
    """Clients can connect to the registry."""

    public_key: bytes
    #: Whoever knows the key may register services, and look for them.
    anybody_registers: bool = False
    anybody_queries: bool = False


class RelayListening(Struct, frozen=True):
    """Peers can connect to the relay."""

    public_key: bytes
    #: Whoever knows the key may use it.
    anybody: bool


class ProxyListening(Struct, frozen=True):
    """Local clients can connect to the address."""

    host: str
    port: int
    #: Nobody asked for this port: it was free.
    chosen: bool = False


class ProxyRouted(Struct, frozen=True):
    """New connections to the port go to this service."""

    port: int
    service: ServiceRecord


class ProxyUnrouted(Struct, frozen=True):
    """Nobody matches the role: new connections to the port wait, and are then closed."""

    port: int


# The resolver of a proxy. It answers whoever asked.


class Resolve(Struct, frozen=True):
    """Which services may a new connection use? Answer: `Resolved`, once there is one."""

    #: Keys of those that this connection has tried already.
    excluding: frozenset[bytes] = frozenset()


class Resolved(Struct, frozen=True):
    #: The one to try first comes first; empty when none appeared in time.
    services: tuple[ServiceRecord, ...]


class ServiceFailed(Struct, frozen=True):
    """No connection to this service came about, or it broke before its first byte. No answer."""

    public_key: bytes
    reason: str = ""


class ServiceWorked(Struct, frozen=True):
    """The service's first byte has arrived. No answer."""

    public_key: bytes
    #: Seconds from the attempt to connect until then.
    seconds: float
    #: Seconds that the client waited before the attempt: for an instance, and for others that
    #: failed.
    waited: float = 0.0
    #: Where the time went until the connection was open.
    timings: Timings | None = None


class ServiceTaken(Struct, frozen=True):
    """The sender, a pipe, runs over this service from now on until it dies. No answer."""

    public_key: bytes


class Follow(Struct, frozen=True):
    """Tell the sender which service comes first, now and at each change, as `Resolved`."""


class Explain(Struct, frozen=True):
    """Why is each known instance taken or passed over? Answer: `Explained`."""


class Explained(Struct, frozen=True):
    """JSON objects, the instance that comes first first."""

    rows: tuple[Mapping[str, Any], ...]


# The health check of a service, to its announcement.


class HealthChanged(Struct, frozen=True):
    healthy: bool
    #: One line.
    reason: str = ""


class ServiceUnhealthy(Struct, frozen=True):
    """To the console: the TCP target does not answer, so the service is not registered."""

    reason: str


# Looking in. Any actor that has something to show answers.


class Describe(Struct, frozen=True):
    """Answer: `Described`."""


class Described(Struct, frozen=True):
    """JSON values by name; never secrets."""

    fields: Mapping[str, Any]
