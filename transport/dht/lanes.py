"""Finding nodes that pass a handshake on to a server, until one brings its answer
(spec: hyperdht 5.2).

Those that are known from an earlier connect come first, then those that a query finds. Nobody is
waited for alone: whoever takes long gets company.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

from ..errors import DecodeError, HandshakeError
from ..noise import Handshake, Initiator
from ..transmit import Address
from .context import Context, Route
from .messages import FIND_PEER, PEER_HANDSHAKE, HandshakeMessage, Mode, PeerRecord
from .query import Query
from .rpc import Pending
from .table import K
from .timers import Timer
from .wire import Reply

#: Handshakes in flight at first: through nodes remembered from an earlier connect, and through
#: nodes that the query has found alive.
KNOWN_HANDSHAKES = 1
FOUND_HANDSHAKES = 2
#: Seconds after which a handshake is repeated, and how often: three of the four seconds of the
#: reference, in smaller steps as somebody waits for a stream (spec: hyperdht 5.7).
HANDSHAKE_TIMEOUT = 0.5
HANDSHAKE_RETRIES = 5
#: Seconds without an answer after which each kind may have one more in flight. A server or relay
#: that is gone then costs a fraction of a second, not the four of a request.
STAGGER = 0.3
#: Handshakes of one kind in flight at last.
MAX_HANDSHAKES = 6
#: Nodes that are asked to pass the handshake on, in one attempt.
MAX_RELAYS = 24
#: Seconds that the nodes which announce a server get for passing on its answer, and the last of
#: them at least; more than one of them dead, or the server, is known then.
PATIENCE = 3.0
LAST_PATIENCE = 1.5
#: Nodes of a small table that are asked to pass the handshake on before they have said that they
#: know the server: those it announces itself to.
GUESSES = 3
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


class Lanes:
    """The handshakes of one connect.

    One of ``on_answer(plain, handshake, server, reply, now)`` and ``on_silence(now)`` is called
    once, unless it is cancelled: with what the server says (plaintext) and where the relay sees it
    (None if it answered itself), or when all ways are exhausted or ``deadline`` has passed.
    """

    __slots__ = (
        "_asked_at",
        "_context",
        "_deadline",
        "_found",
        "_guessed",
        "_initiator",
        "_known",
        "_lanes",
        "_last_asked_at",
        "_message",
        "_on_answer",
        "_on_silence",
        "_public_key",
        "_query",
        "_searched",
        "_target",
        "_timer",
        "_tried",
        "announced",
        "done",
        "routed",
    )

    def __init__(
        self,
        context: Context,
        public_key: bytes,
        target: bytes,
        initiator: Initiator,
        *,
        on_answer: Callable[[bytes, Handshake, Address | None, Reply, float], None],
        on_silence: Callable[[float], None],
    ) -> None:
        self._context = context
        self._public_key = public_key
        self._target = target
        self._initiator = initiator
        self._on_answer = on_answer
        self._on_silence = on_silence
        self._message = b""
        self._known = _Lane(KNOWN_HANDSHAKES)
        self._found = _Lane(FOUND_HANDSHAKES)
        self._guessed = _Lane(GUESSES)
        self._lanes = (self._known, self._found, self._guessed)
        # Every node that was in a lane.
        self._tried: set[Address] = set()
        # When the first node was asked that may announce the server, and the last one so far.
        self._asked_at: float | None = None
        self._last_asked_at = 0.0
        # When it fails whatever it waits for, and what happens next by time alone: less patience
        # first, that failure at last.
        self._deadline = 0.0
        self._timer: Timer | None = None
        self._query: Query | None = None
        self._searched = False
        #: The socket of the address that is tried first, when an earlier connection left one.
        self.routed: Route | None = None
        #: Whether any node knows the key.
        self.announced = False
        #: Answered, silent or cancelled.
        self.done = False

    def start(
        self, noise: bytes, relay_addresses: tuple[Address, ...], deadline: float, now: float
    ) -> None:
        """Begin to deliver Noise message 1."""
        self._message = HandshakeMessage(Mode.FROM_CLIENT, noise).encode()
        self._deadline = deadline
        self._timer = self._context.node.timers.at(now + STAGGER, self._widen)
        for node in self._candidates(relay_addresses, now):
            self._add(self._known, node)
        if not self._tried:
            self._search(now)
            self._guess()
        # What is known usually answers; the network is not asked before it seems not to.
        self._next(now)

    def cancel(self) -> None:
        """Stop, silently. Harmless when it is over."""
        self.done = True
        # What has no cycles costs no collection.
        self._on_answer, self._on_silence = _nobody, _nobody
        for lane in self._lanes:
            lane.clear()
        if self._query is not None:
            self._query.cancel()
        if self._timer is not None:
            self._timer.cancel()

    # Finding the server

    def _candidates(self, relay_addresses: tuple[Address, ...], now: float) -> tuple[Address, ...]:
        context = self._context
        self.routed = context.routes.get(self._public_key)
        if self.routed is not None and not context.punches.sockets.usable(self.routed.socket):
            context.remember_route(self._public_key, None)
            self.routed = None
        if self.routed is not None and self.routed.punched:
            # The NATs may have forgotten it: a relay is asked at the same time.
            self._known.limit = KNOWN_HANDSHAKES + 1
        direct = (self.routed.address,) if self.routed is not None else ()
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
        self.announced = True
        self._add(self._found, reply.source)
        self._next(now)

    def _on_searched(self, _query: Query, now: float) -> None:
        self._searched = True
        self._next(now)

    def _widen(self, now: float) -> None:
        """Nobody has answered yet: be less patient."""
        for lane in self._lanes:
            lane.limit = min(lane.limit + 1, MAX_HANDSHAKES)
        if self._known.limit < MAX_HANDSHAKES:
            self._timer = self._context.node.timers.at(now + STAGGER, self._widen)
        else:
            self._on_impatience(now)
            if self.done:
                return
        self._search(now)
        self._next(now)

    def _on_impatience(self, now: float) -> None:
        timers = self._context.node.timers
        if self._asked_at is not None:
            silent = max(self._asked_at + PATIENCE, self._last_asked_at + LAST_PATIENCE)
            if silent > now:
                self._timer = timers.at(min(silent, self._deadline), self._on_impatience)
                return
            # A search that still goes on waits for dead nodes, as a rule, perhaps for the server.
            found = self._searched or self.announced
            if found and not any(lane.queue for lane in self._lanes):
                self._fall_silent(now)
                return
        self._timer = timers.at(self._deadline, self._fall_silent)

    def _fall_silent(self, now: float) -> None:
        on_silence = self._on_silence
        self.cancel()
        on_silence(now)

    # Handshakes

    def _next(self, now: float) -> None:
        if self.done:
            return
        for lane in self._lanes:
            while lane.queue and len(lane.asked) < lane.limit:
                self._ask(lane, lane.queue.popleft(), now)
        if not all(lane.empty for lane in self._lanes):
            return
        if self._query is None:
            self._search(now)
        elif self._searched:
            self._fall_silent(now)

    def _add(self, lane: _Lane, node: Address) -> None:
        if node not in self._tried and len(self._tried) < MAX_RELAYS:
            self._tried.add(node)
            lane.queue.append(node)

    def _ask(self, lane: _Lane, node: Address, now: float) -> None:
        routed = self.routed if self.routed and self.routed.address == node else None
        if routed is None:
            self._last_asked_at = now
            if self._asked_at is None:
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
        if reply is None or not self._on_reply(reply, now):
            self._next(now)

    def _on_reply(self, reply: Reply, now: float) -> bool:
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
        on_answer = self._on_answer
        self.cancel()
        if self.routed is not None and reply.source != self.routed.address:
            # It leads nowhere any more, or others would not have been faster.
            self._context.remember_route(self._public_key, None)
        on_answer(plain, handshake, message.peer_address, reply, now)
        return True


def _nobody(*_: object) -> None:
    """Who is told when nobody shall be."""
