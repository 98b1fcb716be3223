"""The relay itself: who may meet whom, and for how long (spec: hyperdht 5.8).

Two peers, each with a control session of its own, ask for the same token with different flags. Then
both get a leg of one pair, and the mux passes on what arrives (`udx.forward`). The relay can read
nothing of that, and counts it.

    waiting --the other half--> paired --both sessions over, unpaired, silent--> over
       `---- 15 s, unpaired, session over --> over
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from msgspec import Struct

from ..errors import DecodeError, ProtocolError
from ..protomux import ChannelClosed, ChannelMessage, Protomux, ProtomuxFailure
from ..transmit import Address
from ..udx.forward import Allowance, Forwarder, Leg
from .blind_relay import PAIR, PAIR_SECONDS, PROTOCOL, Pair, RelayMessage, Unpair, decode

#: Control sessions at once, of all keys: each is an actor, a channel and a few KiB of buffers.
MAX_SESSIONS = 10_000
#: Those of all keys of one host, where everybody may come with as many keys as they like: nobody
#: keeps the others out, and many can be behind one NAT.
SESSIONS_PER_HOST = MAX_SESSIONS // 8
#: Keys that are known: those without a session only until their `Allowance` is full again.
MAX_KEYS = 2 * MAX_SESSIONS
#: Requests that one session may make at once, and a second. A peer of the reference needs one or
#: two in all; a program of ours has one session for all its connections (`relay_client`).
MAX_REQUESTS = 2048
REQUESTS_PER_SECOND = 512.0
#: Pairs at once, of all sessions: about 2 KiB each.
MAX_PAIRS = 65_536
#: Seconds that a pair goes on when one of its sessions is over: the other peer may still be
#: repeating its end, which the first has to acknowledge.
LINGER = 13.0
#: Seconds without a packet, of either peer, after which a pair is over: living peers send something
#: every five.
SILENCE = 60.0
#: Seconds without a pair, or a request for one, after which a session is over if there are more
#: than so many. Else peers keep them for the next pair.
IDLE = 60.0
CROWDED = MAX_SESSIONS // 2
#: Seconds between two looks at what is silent or no longer needed, while there is anything.
LOOK = 15.0

#: What each of the relay's users may have unless told otherwise: `RelayLimits`.
SESSIONS_PER_KEY = 256
PAIRS_PER_SESSION = 4096
PAIRS_PER_KEY = 4096
RATE = 16 * 1024 * 1024


class RelayLimits(Struct, frozen=True):
    """What each of the relay's users may have."""

    #: Some peers open one for each connection that goes through the relay.
    sessions_per_key: int = SESSIONS_PER_KEY
    #: Others have all their pairs in one. Those that wait for their other half are included.
    pairs_per_session: int = PAIRS_PER_SESSION
    pairs_per_key: int = PAIRS_PER_KEY
    #: Bytes a second that are passed on for a key, as their sender; what exceeds that is dropped.
    rate: float = RATE


@dataclass(slots=True)
class RelayStats:
    """What happened so far."""

    #: Sessions that began, and that were not let in.
    accepted: int = 0
    refused: int = 0
    #: Pairs that came about, and requests that none came of: their half was there already or the
    #: session had too many, nobody asked for the other half, or they were taken back.
    paired: int = 0
    ignored: int = 0
    expired: int = 0
    cancelled: int = 0
    #: Pairs, and sessions, that nobody used any more.
    silent: int = 0
    idle: int = 0


class RelayControl:
    """The relay's end of the stream with one peer. Messages in, requests and messages out."""

    __slots__ = ("_asked_at", "_channel", "_left", "_mux", "error", "over")

    def __init__(self, public_key: bytes, now: float) -> None:
        """``public_key`` is the peer's: 32 bytes."""
        self._mux = Protomux()
        self._channel = self._mux.open(PROTOCOL, public_key)
        self._left = float(MAX_REQUESTS)
        self._asked_at = now
        #: Nothing more will come: close the stream.
        self.over = False
        #: What the peer did wrong, if that is why.
        self.error: ProtocolError | None = None

    def receive(self, message: bytes, now: float) -> list[RelayMessage]:
        """What the peer asks for. Never raises."""
        requests: list[RelayMessage] = []
        for event in self._mux.receive(message):
            if self.over:
                break
            match event:
                case ChannelMessage():
                    self._take(event, requests, now)
                case ChannelClosed():
                    self.over = True
                case ProtomuxFailure():
                    self._fail(event.error)
        return requests

    def answer(self, pair: Pair) -> None:
        """Tell the peer of its leg."""
        if not self.over:
            self._mux.send(self._channel, PAIR, pair.encode())

    def messages(self) -> list[bytes]:
        """What is to be sent now, each message once."""
        return self._mux.messages()

    def _take(self, event: ChannelMessage, requests: list[RelayMessage], now: float) -> None:
        refilled = self._left + (now - self._asked_at) * REQUESTS_PER_SECOND
        self._left = min(refilled, MAX_REQUESTS) - 1
        self._asked_at = now
        if self._left < 0:
            self._fail(ProtocolError(f"more than {REQUESTS_PER_SECOND:g} requests a second"))
            return
        try:
            request = decode(event.type, event.payload)
        except DecodeError as error:
            self._fail(error)
            return
        if request is not None:
            requests.append(request)

    def _fail(self, error: ProtocolError) -> None:
        self.over = True
        self.error = error


@dataclass(slots=True, eq=False)
class _User:
    """What all sessions of one key share."""

    allowance: Allowance
    sessions: int = 0
    #: Those that wait for their other half included.
    pairs: int = 0


class RelaySession:
    """One session in the relay's books."""

    __slots__ = ("_host", "_idle_since", "_links", "_over", "_user", "_waiting", "public_key")

    def __init__(self, public_key: bytes, host: str, user: _User) -> None:
        self.public_key = public_key
        self._host = host
        self._user = user
        self._waiting: set[_Half] = set()
        self._links: set[_Link] = set()
        # Since the look that found it idle, or None.
        self._idle_since: float | None = None
        self._over = False


@dataclass(slots=True, eq=False)
class _Half:
    """A request for a pair, and where its sender is."""

    session: RelaySession
    request: Pair
    socket: int
    address: Address
    expires: float


@dataclass(slots=True, eq=False)
class _Link:
    """A pair whose halves have found each other."""

    token: bytes
    sessions: tuple[RelaySession, RelaySession]
    legs: tuple[Leg, Leg]


class RelayServer:
    """The books of one relay. Without ``allow`` every key may use it. Times are seconds on the
    clock of the forwarder's mux."""

    __slots__ = (
        "_allow",
        "_forwarder",
        "_hosts",
        "_limits",
        "_lingering",
        "_links",
        "_looks_at",
        "_sessions",
        "_users",
        "_waiting",
        "stats",
    )

    def __init__(
        self,
        forwarder: Forwarder,
        limits: RelayLimits | None = None,
        allow: frozenset[bytes] | None = None,
    ) -> None:
        self._forwarder = forwarder
        self._limits = limits or RelayLimits()
        self._allow = allow
        self._users: dict[bytes, _User] = {}
        # Sessions by the host that they came from.
        self._hosts: Counter[str] = Counter()
        self._sessions: dict[RelaySession, None] = {}
        # Halves by token and flag, the oldest first.
        self._waiting: dict[tuple[bytes, bool], _Half] = {}
        self._links: set[_Link] = set()
        # Pairs with one session left, and when they are over; the oldest first.
        self._lingering: dict[_Link, float] = {}
        self._looks_at: float | None = None
        self.stats = RelayStats()

    @property
    def sessions(self) -> int:
        """Sessions that are open."""
        return len(self._sessions)

    @property
    def keys(self) -> int:
        """Keys that have sessions, or pairs that outlive them."""
        return sum(user.sessions > 0 for user in self._users.values())

    @property
    def pairs(self) -> int:
        """Pairs whose packets are passed on."""
        return len(self._links)

    @property
    def waiting(self) -> int:
        """Requests whose other half has not come."""
        return len(self._waiting)

    def open(self, public_key: bytes, host: str, now: float) -> RelaySession | None:
        """A session begins, from ``host``. None: the key, or the host, may have none or no more."""
        user = self._users.get(public_key)
        if (
            (self._allow is not None and public_key not in self._allow)
            or (self._allow is None and self._hosts[host] >= SESSIONS_PER_HOST)
            or len(self._sessions) >= MAX_SESSIONS
            or (user is None and len(self._users) >= MAX_KEYS)
            or (user is not None and user.sessions >= self._limits.sessions_per_key)
        ):
            self.stats.refused += 1
            return None
        if user is None:
            user = self._users[public_key] = _User(Allowance(self._limits.rate))
        user.sessions += 1
        session = RelaySession(public_key, host, user)
        self._sessions[session] = None
        self._hosts[host] += 1
        self.stats.accepted += 1
        self._look_later(now)
        return session

    def receive(
        self,
        session: RelaySession,
        request: RelayMessage,
        socket: int,
        address: Address,
        now: float,
    ) -> list[tuple[RelaySession, Pair]]:
        """Do what a session asks for, whose stream comes from ``address`` to our ``socket``.
        Returns what to answer, and to whom."""
        if session._over:
            return []
        if isinstance(request, Unpair):
            self._unpair(session, request.token)
            return []
        session._idle_since = None
        half = _Half(session, request, socket, address, now + PAIR_SECONDS)
        name = request.token, request.is_initiator
        if name in self._waiting or self._has_enough(session):
            self.stats.ignored += 1
            return []
        session._user.pairs += 1
        other = self._waiting.pop((request.token, not request.is_initiator), None)
        if other is None:
            self._waiting[name] = half
            session._waiting.add(half)
            return []
        other.session._waiting.discard(other)
        return self._link(other, half, now)

    def close(self, session: RelaySession, now: float) -> None:
        """The session is over. Harmless twice."""
        if session._over:
            return
        session._over = True
        del self._sessions[session]
        self._hosts[session._host] -= 1
        if not self._hosts[session._host]:
            del self._hosts[session._host]
        for half in list(session._waiting):
            self._drop(half)
            self.stats.cancelled += 1
        if not session._links:
            self._release(session)
        for link in list(session._links):
            if all(each._over for each in link.sessions):
                self._end(link)
            else:
                self._lingering[link] = now + LINGER

    def clear(self) -> None:
        """End all pairs."""
        for link in list(self._links):
            self._end(link)

    def deadline(self) -> float | None:
        """When `on_deadline` must be called at the latest, or None for never."""
        times = [half.expires for half in self._waiting.values()][:1]
        times += list(self._lingering.values())[:1]
        if self._looks_at is not None:
            times.append(self._looks_at)
        return min(times, default=None)

    def on_deadline(self, now: float) -> list[RelaySession]:
        """Do what has become due. Harmless when nothing has. Returns the sessions that are over by
        that: close their streams."""
        for half in list(self._waiting.values()):
            if half.expires > now:
                break
            self._drop(half)
            self.stats.expired += 1
        for link, ends_at in list(self._lingering.items()):
            if ends_at > now:
                break
            self._end(link)
        if self._looks_at is not None and self._looks_at <= now:
            return self._look(now)
        return []

    def _link(self, one: _Half, other: _Half, now: float) -> list[tuple[RelaySession, Pair]]:
        halves = one, other
        legs = [
            Leg(half.request.id, half.socket, half.address, half.session._user.allowance, now)
            for half in halves
        ]
        self._forwarder.link(*legs)
        link = _Link(one.request.token, (one.session, other.session), (legs[0], legs[1]))
        self._links.add(link)
        for half in halves:
            half.session._links.add(link)
        self.stats.paired += 1
        return [
            (half.session, Pair(half.request.is_initiator, half.request.token, leg.id))
            for half, leg in zip(halves, legs, strict=True)
        ]

    def _has_enough(self, session: RelaySession) -> bool:
        limits = self._limits
        return (
            len(session._waiting) + len(session._links) >= limits.pairs_per_session
            or session._user.pairs >= limits.pairs_per_key
            or len(self._waiting) + len(self._links) >= MAX_PAIRS
        )

    def _unpair(self, session: RelaySession, token: bytes) -> None:
        for half in [half for half in session._waiting if half.request.token == token]:
            self._drop(half)
            self.stats.cancelled += 1
        for link in [link for link in session._links if link.token == token]:
            self._end(link)

    def _drop(self, half: _Half) -> None:
        del self._waiting[half.request.token, half.request.is_initiator]
        half.session._waiting.discard(half)
        half.session._user.pairs -= 1

    def _end(self, link: _Link) -> None:
        self._forwarder.unlink(link.legs[0])
        self._links.discard(link)
        self._lingering.pop(link, None)
        for session in link.sessions:
            session._user.pairs -= 1
        for session in set(link.sessions):
            session._links.discard(link)
            if session._over and not session._links:
                self._release(session)

    def _release(self, session: RelaySession) -> None:
        """A session counts for its key as long as it has pairs, even when it is over."""
        session._user.sessions -= 1

    def _look(self, now: float) -> list[RelaySession]:
        for link in list(self._links):
            if max(leg.heard_at for leg in link.legs) + SILENCE <= now:
                self._end(link)
                self.stats.silent += 1
        idle = [session for session in self._sessions if _is_idle(session, now)]
        # The oldest first.
        del idle[max(len(self._sessions) - CROWDED, 0) :]
        for session in idle:
            self.close(session, now)
            self.stats.idle += 1
        # An allowance that is used up is kept, or a new session would get another one.
        for public_key, user in list(self._users.items()):
            if not user.sessions and user.allowance.is_full(now):
                del self._users[public_key]
        self._looks_at = None
        if self._users:
            self._look_later(now)
        return idle

    def _look_later(self, now: float) -> None:
        if self._looks_at is None:
            self._looks_at = now + LOOK


def _is_idle(session: RelaySession, now: float) -> bool:
    """Whether it was idle for so long that it is over."""
    if session._waiting or session._links:
        session._idle_since = None
    elif session._idle_since is None:
        session._idle_since = now
    return session._idle_since is not None and session._idle_since + IDLE <= now
