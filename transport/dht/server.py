"""A server: accepts handshakes for one key pair (spec: hyperdht 4).

What becomes of a handshake (spec: hyperdht 4.2; "client" is its sender as we or the relay see it):

    client OPEN, or no relay between   -> connect to it at once
    we are OPEN, or on its machine     -> wait 10 s for its first packet, from wherever
    otherwise                          -> the same, and punch when it asks for that; meanwhile begin
                                          at a blind relay, if we have one or agree to the client's

The socket that punches is the one that is announced: a relay's word for where we are holds for
both, and no handshake costs a socket.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .. import keys
from ..errors import DecodeError, HandshakeError
from ..keys import KeyPair, blake2b
from ..noise import MESSAGE_1_OVERHEAD, Handshake, Responder
from ..transmit import Address
from ..udx.stream import Stream
from .announcer import Announcer
from .blind_relay import PAIR_SECONDS
from .context import Connection, Context, admit
from .messages import (
    VERSION,
    Firewall,
    HolepunchInfo,
    NoisePayload,
    PeerError,
    PeerRecord,
    Relay,
    RelayThrough,
)
from .punch import CYCLE_EVERY, ROUNDS, TRIES
from .relay_client import Pair
from .relayed import Relayed
from .router import Incoming, IncomingPunch, PunchAnswer
from .server_punch import ServerPunch
from .server_relay import Relaying
from .timers import Timer

#: Seconds that a client has to send its first packet.
HANDSHAKE_WAIT = 10.0
#: The same from when punching has started, and when that means a search through a random NAT: as
#: long as either side may go on.
PUNCH_WAIT = ROUNDS + 2.0
SEARCH_WAIT = TRIES * CYCLE_EVERY + 5.0
#: Seconds for which a stream that runs through a relay is punched for, from its client's last word:
#: that waits up to 20 s for its turn (spec: hyperdht 5.5).
UPGRADE_WAIT = 60.0
#: Seconds that a finished handshake is remembered, so that late copies get the same answer.
HANDSHAKE_MEMORY = 10.0
#: Handshakes whose client has not sent anything yet: each has a stream.
MAX_WAITING = 8192
#: The same of one client's key.
MAX_WAITING_PER_KEY = 1024
#: Handshakes remembered in all, the waiting ones included; more than anybody can have computed
#: within `HANDSHAKE_MEMORY`.
MAX_SESSIONS = 65_536
#: Relay addresses that clients are told.
MAX_RELAY_ADDRESSES = 3
#: Relays whose word for a client's address counts: those of the last announcements, too, as clients
#: may have heard of them (spec: hyperdht 4.1).
MAX_OWN_RELAYS = 9


@dataclass(slots=True)
class Stats:
    """What happened to handshakes."""

    accepted: int = 0
    #: Copies that got the first one's answer, or as little as it.
    copies: int = 0
    #: Bytes that are no handshake of this protocol.
    malformed: int = 0
    #: Refused by the firewall hook, and told so.
    rejected: int = 0
    #: Beyond a limit of ours.
    limited: int = 0
    #: Answered, but the client never sent anything.
    abandoned: int = 0
    #: Messages about punching: taken, and those that no client of ours made.
    punch_messages: int = 0
    punch_strays: int = 0


@dataclass(slots=True, eq=False)
class _Session:
    """One handshake, by whatever ways its copies arrive."""

    #: None while there is none, and for good if there will be none.
    answer: bytes | None = None
    stream: Stream | None = None
    timer: Timer | None = None
    #: The client's key, while it is counted among those of whom we wait for something.
    key: bytes | None = None
    #: Where messages about punching go, and the number they carry.
    punch: ServerPunch | None = None
    number: int = 0
    #: What we want of a blind relay, or what the stream runs through.
    pair: Pair | None = None


class Server:
    """See `HyperDHT.listen`."""

    __slots__ = (
        "_announcer",
        "_closed",
        "_context",
        "_finished",
        "_firewall",
        "_forgetting",
        "_free",
        "_key_pair",
        "_numbered",
        "_on_close",
        "_on_connection",
        "_on_listening",
        "_own_relays",
        "_relaying",
        "_sessions",
        "_waiting",
        "_waiting_by_key",
        "stats",
    )

    def __init__(
        self,
        context: Context,
        key_pair: KeyPair,
        *,
        firewall: Callable[[bytes, Address], bool] | None,
        relay_through: tuple[bytes, ...] = (),
        allow_relays: frozenset[bytes] | None = frozenset(),
        on_connection: Callable[[Connection, float], None],
        on_listening: Callable[[float], None] | None,
        on_close: Callable[[Server], None],
    ) -> None:
        self._context = context
        self._key_pair = key_pair
        self._firewall = firewall
        self._relaying = Relaying(context, relay_through, allow_relays)
        self._on_connection = on_connection
        self._on_listening = on_listening
        self._on_close = on_close
        self._announcer = Announcer(context.node, key_pair, self._announced)
        # By the hash of message 1: copies of one handshake come through several relays.
        self._sessions: dict[bytes, _Session] = {}
        self._waiting = 0
        self._waiting_by_key: dict[bytes, int] = {}
        # Those that may be punched for, by their number, and numbers below the highest that are
        # free.
        self._numbered: dict[int, _Session] = {}
        self._free: list[int] = []
        # The latest last.
        self._own_relays: dict[Address, None] = {}
        # Those that are over, by the time at which they are forgotten.
        self._finished: deque[tuple[float, bytes]] = deque()
        self._forgetting: Timer | None = None
        self._closed = False
        self.stats = Stats()

    @property
    def public_key(self) -> bytes:
        """The 32 bytes that clients connect to."""
        return self._key_pair.public_key

    @property
    def target(self) -> bytes:
        """Where the key lives in the DHT: 32 bytes."""
        return keys.target(self.public_key)

    @property
    def relays(self) -> tuple[Relay, ...]:
        """The nodes that forward to this server now."""
        return self._announcer.relays

    def record(self) -> bytes:
        """What the node itself answers to whoever looks for this server."""
        return PeerRecord(self.public_key, self._relay_addresses()).encode()

    def refresh(self, now: float) -> None:
        """Announce now."""
        self._announcer.refresh(now)

    def close(self, now: float, on_closed: Callable[[float], None]) -> None:
        """Accept nothing more and unannounce; ``on_closed`` is called when that is done. Open
        connections stay."""
        if self._closed:
            on_closed(now)
            return
        self._closed = True
        self._on_close(self)
        self._context.router.unserve(self.target)
        self._context.forwards.unserve(self.target)
        if self._forgetting is not None:
            self._forgetting.cancel()
        self._relaying.let_go()
        for session in self._sessions.values():
            if session.punch is not None:
                session.punch.close(now)
            if session.pair is not None and not session.pair.paired:
                self._unpair(session, now)
            if session.timer is not None and session.stream is not None:
                session.timer.cancel()
                session.stream.destroy(now)
        self._sessions.clear()
        self._numbered.clear()
        self._announcer.close(now, on_closed)

    def _announced(self, now: float) -> None:
        self._relaying.hold(now)
        on_listening, self._on_listening = self._on_listening, None
        if on_listening is not None:
            on_listening(now)

    # Handshakes

    def on_handshake(self, incoming: Incoming, answer: Callable[[bytes], None], now: float) -> None:
        """Take Noise message 1; answer it with message 2, or not at all."""
        if self._closed:
            return
        name = blake2b(incoming.noise)
        session = self._sessions.get(name)
        if session is not None:
            self.stats.copies += 1
            if session.answer is not None:
                answer(session.answer)
            return
        if len(incoming.noise) < MESSAGE_1_OVERHEAD:
            self.stats.malformed += 1
            return
        if not self._admits(incoming, now):
            self.stats.limited += 1
            return
        # Entered before anything is done with it, so that copies find it.
        session = self._sessions[name] = _Session()
        goes_on = False
        try:
            goes_on = self._respond(session, name, incoming, answer, now)
        finally:
            if not goes_on:
                self._finish(name, now)

    def _admits(self, incoming: Incoming, now: float) -> bool:
        context, sender, client = self._context, incoming.sender[0], incoming.client_address[0]
        if self._waiting >= MAX_WAITING or len(self._sessions) >= MAX_SESSIONS:
            return False
        if not context.client_garbage.allows(client, now):
            return False
        return context.sender_garbage.allows(sender, now) and context.computed.take(sender, now)

    def _respond(
        self,
        session: _Session,
        name: bytes,
        incoming: Incoming,
        answer: Callable[[bytes], None],
        now: float,
    ) -> bool:
        """Whether the session goes on, or has a connection."""
        context = self._context
        responder = Responder(
            self._key_pair,
            prologue=keys.NS_PEER_HANDSHAKE,
            ephemeral_seed=context.rng.randbytes(keys.SEED_BYTES),
        )
        try:
            payload = NoisePayload.decode(responder.read(incoming.noise))
        except (HandshakeError, DecodeError):
            self.stats.malformed += 1
            context.client_garbage.take(incoming.client_address[0], now)
            context.sender_garbage.take(incoming.sender[0], now)
            return False
        error = PeerError.NONE
        if self._firewall is not None and self._firewall(
            responder.remote_public_key, incoming.client_address
        ):
            # The reference is silent here, and its client waits for 4 to 8 s (spec: hyperdht 9.1,
            # pitfall 14). All that a stranger learns is that it may not come in.
            self.stats.rejected += 1
            error = PeerError.ABORTED
        elif payload.version != VERSION:
            error = PeerError.VERSION_MISMATCH
        elif payload.udx is None:
            error = PeerError.ABORTED
        key = responder.remote_public_key
        if self._waiting_by_key.get(key, 0) >= MAX_WAITING_PER_KEY:
            self.stats.limited += 1
            return False
        stream = context.mux.create() if error == PeerError.NONE else None
        goes_straight = incoming.direct or payload.firewall == Firewall.OPEN
        punchable = stream is not None and not goes_straight and self._punchable(incoming)
        if punchable:
            self._number(session)
        through, ours = None, False
        if stream is not None and not goes_straight:
            through, ours = self._relaying.choose(payload.relay_through, now)
        session.answer, handshake = responder.message(
            self._payload(error, stream, session if punchable else None, through if ours else None)
        )
        answer(session.answer)
        if stream is None or payload.udx is None:
            return False
        session.stream = stream
        remote_id = payload.udx.id

        def adopt(socket: int, address: Address, now: float) -> None:
            stream.firewall = admit
            stream.connect(socket, remote_id, address, now)
            context.punches.sockets.hold(socket, stream, now)
            self._finish(name, now, keep=socket)
            self.stats.accepted += 1
            self._on_connection(Connection(stream, handshake, address), now)

        if goes_straight:
            socket = incoming.socket if incoming.direct else context.node.current_socket
            adopt(socket, incoming.client_address, now)
            return True
        if punchable:
            # The client is about to ask what our NAT does; until then it is known.
            context.punches.survey.prepare(now)
            session.punch = ServerPunch(
                context,
                key,
                handshake.holepunch_secret,
                self._known_relays,
                partial(self._punching, session, name),
            )
        self._wait(session, name, key, stream, adopt, now)
        if through is not None:
            on_paired = partial(self._paired, session, name, stream, remote_id, handshake)
            self._pair(session, name, stream, through, ours, on_paired, now)
        return True

    def _wait(
        self,
        session: _Session,
        name: bytes,
        key: bytes,
        stream: Stream,
        adopt: Callable[[int, Address, float], None],
        now: float,
    ) -> None:
        """Connect with the client's first packet, from wherever it comes."""

        def first_packet(_stream: Stream, socket: int, source: Address, now: float) -> bool:
            if session.pair is not None and session.pair.carries(socket, source):
                # It was faster than the relay's word that we are paired.
                return True
            adopt(socket, source, now)
            return True

        self._waiting += 1
        self._waiting_by_key[key] = self._waiting_by_key.get(key, 0) + 1
        session.key = key
        stream.firewall = first_packet
        self._give_up_at(now + HANDSHAKE_WAIT, session, name)

    def _give_up_at(self, when: float, session: _Session, name: bytes) -> None:
        def give_up(now: float) -> None:
            if session.stream is not None:
                self.stats.abandoned += 1
                session.stream.destroy(now)
            self._finish(name, now)

        if session.timer is not None:
            session.timer.cancel()
        session.timer = self._context.node.timers.at(when, give_up)

    def _payload(
        self,
        error: PeerError,
        stream: Stream | None,
        numbered: _Session | None,
        through: RelayThrough | None,
    ) -> bytes:
        if stream is None:
            return NoisePayload(error=error).encode()
        info = None
        if numbered is not None:
            info = HolepunchInfo(numbered.number, self._announcer.relays)
        addresses = self._relay_addresses() or None
        return self._context.offer(stream.local_id, addresses, punch=info, through=through)

    def _relay_addresses(self) -> tuple[Address, ...]:
        own = self._context.node.remote_address()
        relays = tuple(relay.relay_address for relay in self._announcer.relays)
        return (((own,) if own else ()) + relays)[:MAX_RELAY_ADDRESSES]

    # Through a blind relay

    def _pair(
        self,
        session: _Session,
        name: bytes,
        stream: Stream,
        through: RelayThrough,
        ours: bool,
        on_paired: Callable[[int, Address, int, float], None],
        now: float,
    ) -> None:
        def lost(_reason: str, now: float) -> None:
            self._unpair(session, now)

        session.pair = self._relaying.pair(
            through, ours, stream, now, on_paired=on_paired, on_lost=lost
        )
        if session.pair is None:
            self.stats.limited += 1
            return
        if session.punch is not None:
            session.punch.patient = True
        self._give_up_at(now + max(HANDSHAKE_WAIT, PAIR_SECONDS), session, name)

    def _paired(
        self,
        session: _Session,
        name: bytes,
        stream: Stream,
        remote_id: int,
        handshake: Handshake,
        socket: int,
        address: Address,
        relay_id: int,
        now: float,
    ) -> None:
        """The relay has joined our stream with the client's: it is as good as any other. Punching
        goes on."""
        pair = session.pair
        if pair is None or session.stream is None or stream.closed:
            self._unpair(session, now)
            return

        def direct(socket: int, now: float) -> None:
            self._finish(name, now, keep=socket)

        def over(now: float) -> None:
            self._unpair(session, now)
            self._finish(name, now)

        session.stream = None
        self._stop_waiting(session)
        relayed = Relayed(self._context, stream, remote_id, pair, on_direct=direct, on_over=over)
        relayed.open(socket, address, relay_id, now)
        self._give_up_at(now + UPGRADE_WAIT, session, name)
        self.stats.accepted += 1
        self._on_connection(Connection(stream, handshake, address), now)

    def _unpair(self, session: _Session, now: float) -> None:
        if session.pair is not None:
            self._relaying.release(session.pair, now)
            session.pair = None

    # Punching

    def on_holepunch(self, incoming: IncomingPunch, answer: PunchAnswer, now: float) -> None:
        """Take a message about punching for one of the sessions."""
        context, client, sender = self._context, incoming.client_address[0], incoming.sender[0]
        session = self._numbered.get(incoming.message.id)
        if session is None or session.punch is None:
            self.stats.punch_strays += 1
            return
        if not context.client_punches.take(client, now) or not context.sender_punches.take(
            sender, now
        ):
            self.stats.limited += 1
            return
        taken = session.punch.receive(incoming, answer, now)
        self.stats.punch_messages += taken
        self.stats.punch_strays += not taken

    def _punchable(self, incoming: Incoming) -> bool:
        """Whether the client has to punch to get here."""
        context, seen = self._context, incoming.server_address[0]
        if context.node.remote_address() is not None or not self._announcer.relays:
            return False
        # A client on our own machine gets here without, if no NAT is in front of it: the relay sees
        # an address that is really ours.
        return seen != incoming.client_address[0] or seen not in context.local_hosts

    def _known_relays(self) -> frozenset[Address]:
        """Our relays, and those of the last announcements."""
        own = self._own_relays
        for relay in self._announcer.relays:
            own.pop(relay.relay_address, None)
            own[relay.relay_address] = None
        while len(own) > MAX_OWN_RELAYS:
            del own[next(iter(own))]
        return frozenset(own)

    def _punching(self, session: _Session, name: bytes, searching: bool, now: float) -> None:
        """Punching goes on: the client's first packet may take that long."""
        wait = SEARCH_WAIT if searching else PUNCH_WAIT
        if session.pair is not None:
            wait = max(wait, UPGRADE_WAIT)
        self._give_up_at(now + wait, session, name)

    def _number(self, session: _Session) -> None:
        # The lowest that is free (spec: hyperdht 4.2, step 2).
        session.number = heapq.heappop(self._free) if self._free else len(self._numbered)
        self._numbered[session.number] = session

    # Memory

    def _finish(self, name: bytes, now: float, keep: int | None = None) -> None:
        """A session is over: remember its answer a little longer. ``keep`` is the socket that its
        connection has."""
        session = self._sessions.get(name)
        if session is None:
            return
        session.stream = None
        if session.pair is not None and not session.pair.paired:
            self._unpair(session, now)
        if session.punch is not None:
            session.punch.close(now, keep)
            session.punch = None
        if self._numbered.get(session.number) is session:
            del self._numbered[session.number]
            heapq.heappush(self._free, session.number)
        self._stop_waiting(session)
        if session.timer is not None:
            session.timer.cancel()
            session.timer = None
        self._finished.append((now + HANDSHAKE_MEMORY, name))
        if self._forgetting is None:
            self._forgetting = self._context.node.timers.at(now + HANDSHAKE_MEMORY, self._forget)

    def _stop_waiting(self, session: _Session) -> None:
        """Its client has come, or will not."""
        key, session.key = session.key, None
        if key is None:
            return
        self._waiting -= 1
        left = self._waiting_by_key[key] - 1
        if left:
            self._waiting_by_key[key] = left
        else:
            del self._waiting_by_key[key]

    def _forget(self, now: float) -> None:
        finished = self._finished
        while finished and finished[0][0] <= now:
            self._sessions.pop(finished.popleft()[1], None)
        self._forgetting = (
            self._context.node.timers.at(finished[0][0], self._forget) if finished else None
        )
