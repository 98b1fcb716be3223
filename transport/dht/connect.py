"""Connecting to a key (spec: hyperdht 5.1-5.3).

    route -> handshake: through known relays first, then through those that a query finds
          -> decide:    server answered itself       connect to it from the same socket
                        server says it is OPEN       connect to its public address
                        else                         PING its addresses, connect where one answers;
                                                     wait for its packets if we are OPEN

The stream exists before the answer does, as its bytes often come first; UDX keeps them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from .. import keys
from ..errors import ConnectError, DecodeError, HandshakeError, PeerNotFound, PeerUnreachable
from ..keys import KeyPair
from ..noise import Handshake, Initiator
from ..transmit import Address
from ..udx.stream import Stream
from .addresses import is_bogon, is_reserved, match
from .context import Connection, Context, Route, admit
from .messages import (
    FIND_PEER,
    PEER_HANDSHAKE,
    VERSION,
    Firewall,
    HandshakeMessage,
    Mode,
    NoisePayload,
    PeerRecord,
    UdxInfo,
)
from .query import Query
from .rpc import Pending
from .timers import Timer
from .wire import Reply

#: Handshakes in flight at first: through nodes remembered from an earlier connect, and through
#: nodes that the query has found alive.
KNOWN_HANDSHAKES = 1
FOUND_HANDSHAKES = 2
#: Seconds without an answer after which each kind may have one more in flight. A server or relay
#: that is gone then costs a fraction of a second, not the four of a request.
STAGGER = 0.3
#: Handshakes of one kind in flight at last.
MAX_HANDSHAKES = 6
#: Nodes that are asked to pass the handshake on, in one attempt.
MAX_RELAYS = 24
#: Seconds that an OPEN client waits for the server's first packet.
PASSIVE_WAIT = 10.0
#: Addresses of a server that are tried at once.
MAX_PROBES = 4
#: Seconds after which an attempt fails whatever it waits for. Each wait has its own limit; this one
#: is for what their sum may become in a network that is half dead.
CONNECT_TIMEOUT = 30.0
FIND_PEER_RETRIES = 3


class _Lane:
    """Nodes to ask one after another, a few at a time."""

    __slots__ = ("asked", "limit", "queue")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.queue: deque[Address] = deque()
        self.asked: set[Pending] = set()

    @property
    def empty(self) -> bool:
        return not self.queue and not self.asked

    def clear(self) -> None:
        self.queue.clear()
        for pending in self.asked:
            pending.cancel()
        self.asked.clear()


class Attempt:
    """One connect, from `HyperDHT.connect`. Exactly one of its callbacks is called, unless it is
    cancelled."""

    __slots__ = (
        "_announced",
        "_context",
        "_early",
        "_found",
        "_initiator",
        "_known",
        "_lanes",
        "_message",
        "_on_error",
        "_on_open",
        "_passive",
        "_peer",
        "_probes",
        "_public_key",
        "_query",
        "_routed",
        "_searched",
        "_stagger",
        "_stream",
        "_target",
        "_timeout",
        "_tried",
        "done",
    )

    def __init__(
        self,
        context: Context,
        public_key: bytes,
        key_pair: KeyPair,
        *,
        on_open: Callable[[Connection, float], None],
        on_error: Callable[[Exception, float], None],
    ) -> None:
        self._context = context
        self._public_key = public_key
        self._target = keys.target(public_key)
        self._on_open = on_open
        self._on_error = on_error
        self._initiator = Initiator(
            key_pair,
            public_key,
            prologue=keys.NS_PEER_HANDSHAKE,
            ephemeral_seed=context.rng.randbytes(keys.SEED_BYTES),
        )
        self._stream = context.mux.create()
        self._stream.firewall = self._on_packet
        # Where the server's first packet came from, if that was before its answer.
        self._early: Route | None = None
        self._message = b""
        self._known = _Lane(KNOWN_HANDSHAKES)
        self._found = _Lane(FOUND_HANDSHAKES)
        self._lanes = (self._known, self._found)
        # Every node that was in a lane.
        self._tried: set[Address] = set()
        # The socket of the address that is tried first, when an earlier connection left one.
        self._routed: Route | None = None
        self._stagger: Timer | None = None
        self._timeout: Timer | None = None
        self._query: Query | None = None
        self._searched = False
        # Whether any node knows the key.
        self._announced = False
        # The server, once it has answered: its handshake, stream and flag.
        self._peer: tuple[Handshake, UdxInfo] | None = None
        self._probes: set[Pending] = set()
        self._passive: Timer | None = None
        #: Opened, failed or cancelled.
        self.done = False

    def start(self, relay_addresses: tuple[Address, ...], now: float) -> None:
        """Begin. Raises `InvalidInput` for a key that no peer can have, after which the attempt is
        over and no callback comes."""
        context = self._context
        payload = NoisePayload(
            firewall=context.firewall,
            addresses4=context.addresses(),
            # The connection's socket is one of the two main ones: they stay open.
            udx=UdxInfo(self._stream.local_id, reusable_socket=True),
            secret_stream=True,
        )
        try:
            noise = self._initiator.message(payload.encode())
        except BaseException:
            self.cancel(now)
            raise
        self._message = HandshakeMessage(Mode.FROM_CLIENT, noise).encode()
        context.attempts.add(self)
        timers = context.node.timers
        self._timeout = timers.at(now + CONNECT_TIMEOUT, self._on_timeout)
        self._stagger = timers.at(now + STAGGER, self._widen)
        for node in self._candidates(relay_addresses, now):
            self._add(self._known, node)
        # What is known usually answers; the network is not asked before it seems not to.
        self._next(now)

    def cancel(self, now: float) -> None:
        """Give up, silently. Harmless when it is over."""
        if not self.done:
            self._finish()
            self._stream.destroy(now)

    # Finding the server

    def _candidates(self, relay_addresses: tuple[Address, ...], now: float) -> tuple[Address, ...]:
        context = self._context
        self._routed = context.routes.get(self._public_key)
        direct = (self._routed.address,) if self._routed is not None else ()
        forward = None
        if not context.node.ephemeral:
            forward = context.forwards.get(self._target, now)
        known = relay_addresses or context.relays.get(self._public_key, ())
        if forward is not None:
            # We are a relay of this server: its own address is better than any other relay's.
            known = (forward.address,)
        return direct + known

    def _search(self, now: float) -> None:
        if self._query is None:
            self._query = self._context.node.query(
                self._target,
                FIND_PEER,
                now,
                nodes=tuple(self._tried),
                retries=FIND_PEER_RETRIES,
                on_reply=self._on_record,
                on_done=self._on_searched,
            )

    def _on_record(self, reply: Reply, now: float) -> None:
        if not reply.value:
            return
        try:
            record = PeerRecord.decode(reply.value)
        except DecodeError:
            return
        if record.public_key != self._public_key:
            return
        self._announced = True
        self._add(self._found, reply.source)
        self._next(now)

    def _on_searched(self, _query: Query, now: float) -> None:
        self._searched = True
        self._next(now)

    def _widen(self, now: float) -> None:
        """Nobody has answered yet: be less patient."""
        for lane in self._lanes:
            lane.limit = min(lane.limit + 1, MAX_HANDSHAKES)
        self._stagger = None
        if self._known.limit < MAX_HANDSHAKES:
            self._stagger = self._context.node.timers.at(now + STAGGER, self._widen)
        self._search(now)
        self._next(now)

    # Handshakes

    def _next(self, now: float) -> None:
        if self.done or self._peer is not None:
            return
        for lane in self._lanes:
            while lane.queue and len(lane.asked) < lane.limit:
                self._ask(lane, lane.queue.popleft(), now)
        if not all(lane.empty for lane in self._lanes):
            return
        if self._query is None:
            self._search(now)
        elif self._searched:
            self._fail_search(now)

    def _add(self, lane: _Lane, node: Address) -> None:
        if node not in self._tried and len(self._tried) < MAX_RELAYS:
            self._tried.add(node)
            lane.queue.append(node)

    def _ask(self, lane: _Lane, node: Address, now: float) -> None:
        routed = self._routed if self._routed and self._routed.address == node else None

        def on_done(reply: Reply | None, now: float) -> None:
            lane.asked.discard(pending)
            if reply is None and routed is not None:
                self._context.remember_route(self._public_key, None)
            if reply is None or not self._on_answer(reply, now):
                self._next(now)

        pending = self._context.node.request(
            node,
            PEER_HANDSHAKE,
            now,
            target=self._target,
            value=self._message,
            socket=None if routed is None else routed.socket,
            # The window spares DHT nodes; a server asked straight is being connected to.
            force=routed is not None,
            on_done=on_done,
        )
        lane.asked.add(pending)

    def _on_answer(self, reply: Reply, now: float) -> bool:
        """Whether this is the server's answer."""
        if reply.error or not reply.value:
            return False
        try:
            message = HandshakeMessage.decode(reply.value)
            if message.mode != Mode.REPLY:
                return False
            plain, handshake = self._initiator.read(message.noise)
        except (DecodeError, HandshakeError):
            return False
        self._end_handshakes()
        self._on_server(plain, handshake, message.peer_address, reply, now)
        return True

    def _end_handshakes(self) -> None:
        for lane in self._lanes:
            lane.clear()
        if self._query is not None:
            self._query.cancel()
        if self._stagger is not None:
            self._stagger.cancel()

    # Decision

    def _on_server(
        self,
        plain: bytes,
        handshake: Handshake,
        server: Address | None,
        reply: Reply,
        now: float,
    ) -> None:
        """The server has answered; through a relay if that gives its address."""
        try:
            payload = NoisePayload.decode(plain)
        except DecodeError as error:
            self._fail(ConnectError(f"{self._name} sent a broken handshake: {error}"), now)
            return
        if payload.version != VERSION:
            text = f"{self._name} speaks version {payload.version}, not {VERSION}: update one side"
            self._fail(ConnectError(text), now)
            return
        if payload.error or payload.udx is None:
            text = f"{self._name} refused the handshake with error {payload.error}"
            self._fail(ConnectError(text), now)
            return
        self._peer = handshake, payload.udx
        if self._routed is not None and reply.source != self._routed.address:
            # It leads nowhere any more, or others would not have been faster.
            self._context.remember_route(self._public_key, None)
        relays = payload.relay_addresses or (reply.source,)
        self._context.remember_relays(self._public_key, relays)
        if self._early is not None:
            self._open(self._early.socket, self._early.address, now)
        elif server is None:
            self._open(reply.socket, reply.source, now)
        elif payload.firewall == Firewall.OPEN:
            address = _public(payload.addresses4) or server
            self._open(self._context.node.current_socket, address, now)
        else:
            self._approach(payload, server, reply.to, now)

    def _approach(
        self, payload: NoisePayload, server: Address, client: Address, now: float
    ) -> None:
        """The server may be behind a NAT. ``server`` and ``client`` are both as the relay sees
        them."""
        node = self._context.node
        if node.remote_address() is not None:
            # We told that we are OPEN, so the server connects to us.
            self._passive = node.timers.at(now + PASSIVE_WAIT, self._on_passive)
            if payload.holepunch is not None and payload.holepunch.relays:
                return
        addresses = [_public(payload.addresses4), server]
        if client[0] == server[0]:
            # Same host or same NAT: the way inside is short.
            nearby = [a for a in payload.addresses4 if not is_reserved(a[0])]
            addresses.append(match(self._context.local_hosts, nearby))
            addresses += nearby[:1]
        # The reference connects to the address without asking (spec: hyperdht 5.3). A PING first
        # costs a round trip and tells a way from a hope.
        for address in list(dict.fromkeys(a for a in addresses if a and a[1]))[:MAX_PROBES]:
            self._probe(address, now)
        if not self._probes and self._passive is None:
            self._fail_approach(now)

    def _probe(self, address: Address, now: float) -> None:
        def on_done(reply: Reply | None, now: float) -> None:
            self._probes.discard(pending)
            if reply is not None:
                # From the socket that the PING went through: a NAT or filter of ours lets the
                # stream through there too.
                self._open(reply.socket, address, now)
            elif not self._probes and self._passive is None:
                self._fail_approach(now)

        pending = self._context.node.ping(address, now, on_done=on_done)
        self._probes.add(pending)

    def _on_packet(self, _stream: Stream, socket: int, source: Address, now: float) -> bool:
        """The server's first packet, from wherever. It is kept even before the answer is here."""
        if self._peer is not None:
            self._open(socket, source, now)
        elif self._early is None:
            self._early = Route(socket, source)
        return True

    # The end

    def _open(self, socket: int, address: Address, now: float) -> None:
        if self.done or self._peer is None:
            return
        handshake, udx = self._peer
        self._finish()
        if self._stream.closed:
            error = PeerUnreachable(f"{self._name} closed the connection at once: try again")
            self._on_error(error, now)
            return
        if udx.reusable_socket:
            self._context.remember_route(self._public_key, Route(socket, address))
        self._stream.firewall = admit
        self._stream.connect(socket, udx.id, address, now)
        self._on_open(Connection(self._stream, handshake, address), now)

    def _on_timeout(self, now: float) -> None:
        self._fail_search(now)

    def _on_passive(self, now: float) -> None:
        self._passive = None
        if not self._probes:
            self._fail_approach(now)

    def _fail_search(self, now: float) -> None:
        if self._peer is not None:
            self._fail_approach(now)
        elif self._announced:
            text = f"{self._name} is announced but does not answer: is its program running?"
            self._fail(PeerUnreachable(text), now)
        else:
            text = f"nobody announces {self._name}: check the key, and that its program runs"
            self._fail(PeerNotFound(text), now)

    def _fail_approach(self, now: float) -> None:
        text = f"{self._name} answers, but no packet gets through: both sides are behind firewalls"
        self._fail(PeerUnreachable(text), now)

    def _fail(self, error: Exception, now: float) -> None:
        self._finish()
        self._stream.destroy(now)
        self._on_error(error, now)

    def _finish(self) -> None:
        self.done = True
        self._context.attempts.discard(self)
        self._end_handshakes()
        for pending in self._probes:
            pending.cancel()
        self._probes.clear()
        for timer in (self._timeout, self._passive):
            if timer is not None:
                timer.cancel()

    @property
    def _name(self) -> str:
        return self._public_key.hex()


def _public(addresses: tuple[Address, ...]) -> Address | None:
    """The first address that packets from anywhere reach."""
    return next((address for address in addresses if not is_bogon(address[0])), None)
