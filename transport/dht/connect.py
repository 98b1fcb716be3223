"""Connecting to a key (spec: hyperdht 5.1-5.3).

    route -> handshake: through known relays first, then through those that a query finds
          -> decide:    server answered itself       connect to it from the same socket
                        server says it is OPEN       connect to its public address
                        we are OPEN                  wait for its packets
                        it can be punched            punch, and PING its local addresses if it is
                                                     behind our own NAT
                        else                         PING its addresses, connect where one answers

The stream exists before the answer does, as its bytes often come first; UDX keeps them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

from .. import keys
from ..errors import ConnectError, DecodeError, HandshakeError, PeerNotFound, PeerUnreachable
from ..keys import KeyPair
from ..noise import Handshake, Initiator
from ..transmit import Address
from ..udx.stream import Stream
from .addresses import is_bogon, is_reserved, match
from .client_punch import ClientPunch
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
from .table import K
from .timers import Timer
from .wire import Reply

#: Handshakes in flight at first: through nodes remembered from an earlier connect, and through
#: nodes that the query has found alive.
KNOWN_HANDSHAKES = 1
FOUND_HANDSHAKES = 2
#: Seconds after which a handshake is repeated, and how often: the four seconds of the reference,
#: in smaller steps as somebody waits for a stream (spec: hyperdht 5.7).
HANDSHAKE_TIMEOUT = 0.5
HANDSHAKE_RETRIES = 7
#: Seconds without an answer after which each kind may have one more in flight. A server or relay
#: that is gone then costs a fraction of a second, not the four of a request.
STAGGER = 0.3
#: Handshakes of one kind in flight at last.
MAX_HANDSHAKES = 6
#: Nodes that are asked to pass the handshake on, in one attempt.
MAX_RELAYS = 24
#: Seconds that the nodes which announce a server get for passing on its answer; more than one of
#: them dead, or the server, is known then.
PATIENCE = 4.0
#: Nodes of a small table that are asked to pass the handshake on before they have said that they
#: know the server: those it announces itself to.
GUESSES = 3
#: Seconds after a server's answer in which the path of another connect to it is of use: it waits
#: 10 s for our first packet (spec: hyperdht 4.2).
SHARED_WAIT = 8.0
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
        self.asked: dict[Address, Pending] = {}

    @property
    def empty(self) -> bool:
        return not self.queue and not self.asked

    def clear(self) -> None:
        self.queue.clear()
        for pending in self.asked.values():
            pending.cancel()
        self.asked.clear()


class Attempt:
    """One connect, from `HyperDHT.connect`. Exactly one of its callbacks is called, unless it is
    cancelled."""

    __slots__ = (
        "_announced",
        "_answered_at",
        "_asked_at",
        "_context",
        "_deadline",
        "_early",
        "_found",
        "_guessed",
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
        "_punch",
        "_query",
        "_reason",
        "_routed",
        "_searched",
        "_stream",
        "_target",
        "_timer",
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
        self._guessed = _Lane(GUESSES)
        self._lanes = (self._known, self._found, self._guessed)
        # Every node that was in a lane.
        self._tried: set[Address] = set()
        # The socket of the address that is tried first, when an earlier connection left one.
        self._routed: Route | None = None
        # When the first node that announces the server was asked.
        self._asked_at: float | None = None
        # When it fails whatever it waits for, and what happens next by time alone: less patience
        # first, that failure at last.
        self._deadline = 0.0
        self._timer: Timer | None = None
        self._query: Query | None = None
        self._searched = False
        # Whether any node knows the key.
        self._announced = False
        self._answered_at = 0.0
        # The server, once it has answered: its handshake, stream and flag.
        self._peer: tuple[Handshake, UdxInfo] | None = None
        self._probes: set[Pending] = set()
        self._passive: Timer | None = None
        self._punch: ClientPunch | None = None
        # Why there is no way to a server that has answered.
        self._reason = "answers, but no packet gets through: both sides are behind firewalls"
        #: Opened, failed or cancelled.
        self.done = False

    def start(self, relay_addresses: tuple[Address, ...], now: float) -> None:
        """Begin. Raises `InvalidInput` for a key that no peer can have, after which the attempt is
        over and no callback comes."""
        context = self._context
        try:
            noise = self._initiator.message(context.offer(self._stream.local_id))
        except BaseException:
            self.cancel(now)
            raise
        self._message = HandshakeMessage(Mode.FROM_CLIENT, noise).encode()
        context.attempts.add(self)
        self._deadline = now + CONNECT_TIMEOUT
        self._timer = context.node.timers.at(now + STAGGER, self._widen)
        for node in self._candidates(relay_addresses, now):
            self._add(self._known, node)
        if not self._tried:
            self._search(now)
            self._guess()
        # What is known usually answers; the network is not asked before it seems not to.
        self._next(now)

    def cancel(self, now: float) -> None:
        """Give up, silently. Harmless when it is over."""
        if not self.done:
            self._finish(now)
            self._stream.destroy(now)

    # Finding the server

    def _candidates(self, relay_addresses: tuple[Address, ...], now: float) -> tuple[Address, ...]:
        context = self._context
        self._routed = context.routes.get(self._public_key)
        if self._routed is not None and not context.punches.sockets.usable(self._routed.socket):
            context.remember_route(self._public_key, None)
            self._routed = None
        if self._routed is not None and self._routed.punched:
            # The NATs may have forgotten it: a relay is asked at the same time.
            self._known.limit = KNOWN_HANDSHAKES + 1
        direct = (self._routed.address,) if self._routed is not None else ()
        forward = None
        if not context.node.ephemeral:
            forward = context.forwards.get(self._target, now)
        known = relay_addresses or context.relays.get(self._public_key, ())
        if forward is not None:
            # We are a relay of this server: its own address is better than any other relay's.
            known = (forward.address,)
        return direct + known

    def _guess(self) -> None:
        """In a network of few nodes all know each other, so it is known who knows the server."""
        table = self._context.node.table
        if 0 < len(table) < K:
            for contact in table.nearest(self._target, GUESSES):
                self._add(self._guessed, contact.address)

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
        self._context.punches.survey.note(reply, now)
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
        timers = self._context.node.timers
        if self._peer is not None:
            self._timer = timers.at(self._deadline, self._on_timeout)
            return
        for lane in self._lanes:
            lane.limit = min(lane.limit + 1, MAX_HANDSHAKES)
        if self._known.limit < MAX_HANDSHAKES:
            self._timer = timers.at(now + STAGGER, self._widen)
        else:
            self._on_impatience(now)
            if self.done:
                return
        self._search(now)
        self._next(now)

    def _on_impatience(self, now: float) -> None:
        timers = self._context.node.timers
        if self._peer is None and self._asked_at is not None:
            silent = self._asked_at + PATIENCE
            if silent > now:
                self._timer = timers.at(min(silent, self._deadline), self._on_impatience)
                return
            if self._searched and not any(lane.queue for lane in self._lanes):
                self._fail_search(now)
                return
        self._timer = timers.at(self._deadline, self._on_timeout)

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
        if lane is not self._known and self._asked_at is None:
            self._asked_at = now
        if routed is None and self._context.node.remote_address() is None:
            # We may have to punch: by then it is known what our NAT does.
            self._context.punches.survey.prepare(now)
        lane.asked[node] = self._context.node.request(
            node,
            PEER_HANDSHAKE,
            now,
            target=self._target,
            value=self._message,
            socket=None if routed is None else routed.socket,
            timeout=HANDSHAKE_TIMEOUT,
            retries=HANDSHAKE_RETRIES,
            # The window spares DHT nodes; a server asked straight is being connected to.
            force=routed is not None,
            # Nothing that leads back to the request: what has no cycles costs no collection.
            on_done=partial(self._on_asked, lane, node, routed is not None),
        )

    def _on_asked(
        self, lane: _Lane, node: Address, direct: bool, reply: Reply | None, now: float
    ) -> None:
        lane.asked.pop(node, None)
        if reply is not None:
            self._context.punches.survey.note(reply, now)
        if reply is None and direct:
            self._context.remember_route(self._public_key, None)
        if reply is None or not self._on_answer(reply, now):
            self._next(now)

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
        self._answered_at = now
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
            self._approach(payload, handshake, server, reply, now)

    def _approach(
        self,
        payload: NoisePayload,
        handshake: Handshake,
        server: Address,
        reply: Reply,
        now: float,
    ) -> None:
        """The server may be behind a NAT. ``server`` is what the relay sees of it."""
        node, client = self._context.node, reply.to
        punchable = payload.holepunch is not None and bool(payload.holepunch.relays)
        if node.remote_address() is not None:
            # We told that we are OPEN, so the server connects to us.
            self._passive = node.timers.at(now + PASSIVE_WAIT, self._on_passive)
            if punchable:
                return
        # A PING that arrives at a closed NAT may spoil the mapping that punching is about to make.
        addresses = [] if punchable else [_public(payload.addresses4), server]
        if client[0] == server[0]:
            # Same host or same NAT: the way inside is short.
            own = self._context.addresses()
            nearby = [a for a in payload.addresses4 if not is_reserved(a[0]) and a not in own]
            addresses.append(match(self._context.local_hosts, nearby))
            addresses += nearby[:1]
        # The reference connects to the address without asking (spec: hyperdht 5.3). A PING first
        # costs a round trip and tells a way from a hope.
        for address in list(dict.fromkeys(a for a in addresses if a and a[1]))[:MAX_PROBES]:
            self._probe(address, now)
        if punchable and payload.holepunch is not None:
            self._punch = ClientPunch(
                self._context,
                self._target,
                handshake.holepunch_secret,
                payload.holepunch,
                relay=reply.source,
                server=server,
                on_path=self._on_path,
                on_fail=self._on_no_path,
                on_busy=self._on_busy,
            )
            self._punch.start(self._public_key, now)
            return
        if not self._probes and self._passive is None:
            self._fail_approach(now)

    def _probe(self, address: Address, now: float) -> None:
        def on_done(reply: Reply | None, now: float) -> None:
            self._probes.discard(pending)
            if reply is not None:
                # From the socket that the PING went through: a NAT or filter of ours lets the
                # stream through there too.
                self._open(reply.socket, address, now)
            elif not self._probes and self._passive is None and self._punch is None:
                self._fail_approach(now)

        pending = self._context.node.ping(address, now, on_done=on_done)
        self._probes.add(pending)

    def _on_path(self, socket: int, address: Address, now: float) -> None:
        self._open(socket, address, now, punched=True)
        # What leads to the server leads there for all who have its answer.
        for other in [a for a in self._context.attempts if a._public_key == self._public_key]:
            punch = other._punch
            fresh = now - other._answered_at < SHARED_WAIT
            if punch is not None and fresh and punch.server[0] == address[0]:
                other._open(socket, address, now, punched=True)

    def _on_busy(self, reason: str, now: float) -> bool:
        """Another search through a random NAT goes on: wait for it if it is for the same server."""
        self._reason = reason
        searching = any(
            other is not self and other._public_key == self._public_key and other._searching
            for other in self._context.attempts
        )
        if searching:
            timers, until = self._context.node.timers, self._answered_at + SHARED_WAIT
            self._passive = timers.at(until, self._on_shared_wait)
        return searching

    @property
    def _searching(self) -> bool:
        return self._punch is not None and self._punch.searching

    def _on_shared_wait(self, now: float) -> None:
        self._passive = None
        self._on_no_path(self._reason, now)

    def _on_no_path(self, reason: str, now: float) -> None:
        if self._punch is not None:
            self._punch.cancel(now)
            self._punch = None
        self._reason = reason
        if not self._probes:
            self._fail_approach(now)

    def _on_packet(self, _stream: Stream, socket: int, source: Address, now: float) -> bool:
        """The server's first packet, from wherever. It is kept even before the answer is here."""
        if self._peer is not None:
            self._open(socket, source, now)
        elif self._early is None:
            self._early = Route(socket, source)
        return True

    # The end

    def _open(self, socket: int, address: Address, now: float, *, punched: bool = False) -> None:
        sockets = self._context.punches.sockets
        if self.done or self._peer is None:
            sockets.close(socket)
            return
        handshake, udx = self._peer
        self._finish(now)
        if self._stream.closed:
            sockets.close(socket)
            error = PeerUnreachable(f"{self._name} closed the connection at once: try again")
            self._on_error(error, now)
            return
        if udx.reusable_socket:
            known = self._routed
            punched = punched or (known is not None and known.punched and known.address == address)
            self._context.remember_route(self._public_key, Route(socket, address, punched))
        sockets.hold(socket, self._stream, now)
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
        self._fail(PeerUnreachable(f"{self._name} {self._reason}"), now)

    def _fail(self, error: Exception, now: float) -> None:
        self._finish(now)
        self._stream.destroy(now)
        self._on_error(error, now)

    def _finish(self, now: float) -> None:
        self.done = True
        self._context.attempts.discard(self)
        self._end_handshakes()
        for pending in self._probes:
            pending.cancel()
        self._probes.clear()
        if self._punch is not None:
            self._punch.cancel(now)
            self._punch = None
        for timer in (self._timer, self._passive):
            if timer is not None:
                timer.cancel()

    @property
    def _name(self) -> str:
        return self._public_key.hex()


def _public(addresses: tuple[Address, ...]) -> Address | None:
    """The first address that packets from anywhere reach."""
    return next((address for address in addresses if not is_bogon(address[0])), None)
