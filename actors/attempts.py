"""How a local client gets to a service that answers.

One that has not connected in good time gets a rival, and whoever connects first gets the client;
one that breaks before its first byte is left for another, which gets what the client has sent from
the beginning (`early`). After the first byte the client stays, and what breaks the channel resets
it.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

from msgspec import Struct, structs
from thespian.actors import ActorAddress

from ..transport.channel import Channel
from ..transport.dht.timings import Timings
from ..transport.keys import KeyPair
from .actor import Actor, ActorGone, Address, Down, Owned, Timer, handles
from .early import Early
from .instances import HEDGE_FIRST
from .messages import (
    Connect,
    Connected,
    ConnectFailed,
    Resolve,
    Resolved,
    ServiceFailed,
    ServiceRecord,
    ServiceTaken,
    ServiceWorked,
)
from .resolver import Offer
from .splice import reset

#: Seconds that a local client may be without a service, all in all.
CONNECT_TIMEOUT = 10.0
#: Attempts to connect that one client has under way at a time: the first and its rivals.
MAX_RIVALS = 3
#: Attempts for one client, all in all: an end for one that is moved from refusal to refusal.
MAX_ATTEMPTS = 32
#: Seconds to a channel above which it is logged where they went.
SLOW = 1.0
#: Seconds until a resolver that has died is looked for again.
LOOK_AGAIN = 0.05


class ProxyPipe(Struct, frozen=True):
    """A TCP connection that a local client opened, for a service that ``resolver`` knows."""

    socket: socket.socket
    resolver: ActorAddress
    endpoint: ActorAddress
    key_pair: KeyPair
    #: Seconds that the client may be without a service, all in all.
    connect_timeout: float = CONNECT_TIMEOUT
    #: Blind relays where the connection may begin.
    relay_through: tuple[bytes, ...] = ()


class SideClosed(Struct, frozen=True):
    """To the pipe itself: one of its two connections is over."""

    error: Exception | None


class _ClientGone(Struct, frozen=True):
    error: Exception | None


class _ServiceBroke(Struct, frozen=True):
    error: Exception | None


class _AttemptOver(Struct, frozen=True):
    """What became of a rival."""

    public_key: bytes
    answer: Connected | ConnectFailed


class _Late(Struct, frozen=True):
    """The newest attempt has not connected in good time."""


class _LookAgain(Struct, frozen=True):
    pass


class _TimeOver(Struct, frozen=True):
    pass


class Attempts:
    """Which instances one client tries: those offered, in their order, and none twice at a time."""

    def __init__(self) -> None:
        self._offered: deque[bytes] = deque()
        #: Under way, and when each began.
        self.under_way: dict[bytes, float] = {}
        self.failed: set[bytes] = set()
        #: How many there ever were.
        self.made = 0
        #: Why the last one failed; empty while none has.
        self.last_failure = ""

    @property
    def tried(self) -> frozenset[bytes]:
        return frozenset((*self.failed, *self.under_way))

    @property
    def exhausted(self) -> bool:
        return self.made >= MAX_ATTEMPTS

    def offer(self, services: Iterable[ServiceRecord]) -> None:
        """These instead of those that were offered before."""
        self._offered = deque(each.public_key for each in services)

    def begin(self, now: float) -> bytes | None:
        """The next one's key; None when there is none, or enough are under way."""
        if self.exhausted or len(self.under_way) >= MAX_RIVALS:
            return None
        while self._offered:
            key = self._offered.popleft()
            if key not in self.under_way:
                self.under_way[key] = now
                self.made += 1
                return key
        return None


class Seeker(Actor):
    """The part of a proxy's pipe that looks for a service; messages only as long as all goes well,
    so that it is gone in as few turns as can be."""

    _channel: Channel | None
    _draining: bool
    #: Of the two connections, once they are joined.
    _open_sides: int
    #: None in a service's pipe.
    _early: Early | None

    def reach(self, args: ProxyPipe) -> None:
        self._proxied = args
        self._resolver = args.resolver
        self._attempts = Attempts()
        #: The instance that the client is joined with; None while one is looked for.
        self._key: bytes | None = None
        self._attempted_at = 0.0
        self._timings: Timings | None = None
        self._began_at = self.now
        self._answered = False
        self._left = args.connect_timeout
        self._hedge = HEDGE_FIRST
        # The resolver that owes an answer.
        self._asked: ActorAddress | None = None
        # The attempt whose answer comes as a message; those of rivals are calls, which say by
        # themselves whose answer they bring.
        self._first: bytes | None = None
        self._late_timer: Timer | None = None
        self._early = Early(self)
        plain = self.own(partial(reset, args.socket))
        self.own(self._early.abort)
        self.run(self._watch(self._early, args.socket, plain))
        self._search()

    async def _watch(self, early: Early, client: socket.socket, plain: Owned) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(lambda: early.tcp, client)
        except OSError as error:
            self.client_gone(error)
        else:
            plain.release()

    def _search(self) -> None:
        self._searching_since = self.now
        self._deadline = self.after(self._left, _TimeOver())
        self.monitor(self._proxied.endpoint)
        self._ask()

    def _ask(self) -> None:
        resolver = self._living_resolver()
        if resolver is None:
            self.after(LOOK_AGAIN, _LookAgain())
            return
        self._asked = resolver
        self.monitor(resolver)
        self.send(resolver, Resolve(self._attempts.tried))

    def _living_resolver(self) -> ActorAddress | None:
        """It, or its successor."""
        address = cast(Address, self._resolver)
        if not address.alive:
            found = self.whereis(address.path)
            if found is None:
                return None
            self._resolver = found
        return self._resolver

    @handles(Down)
    def _somebody_died(self, message: Down, _sender: ActorAddress) -> None:
        if message.address == self._proxied.endpoint:
            raise ActorGone(message.address, message.reason)
        if message.address == self._asked:
            self._asked = None
            self.after(LOOK_AGAIN, _LookAgain())

    @handles(_LookAgain)
    def _look_again(self, _message: _LookAgain, _sender: ActorAddress) -> None:
        self._advance()

    @handles(_Late)
    def _late(self, _message: _Late, _sender: ActorAddress) -> None:
        self._late_timer = None
        self._advance()

    def _advance(self) -> None:
        """Try another one, or ask for others."""
        if self._key is not None:
            return
        attempts = self._attempts
        key = attempts.begin(self.now)
        if key is not None:
            self._connect(key)
        elif self._asked is not None or len(attempts.under_way) >= MAX_RIVALS:
            return
        elif not attempts.exhausted:
            self._ask()
        elif not attempts.under_way:
            self._give_up("tried too often")

    @handles(Resolved)
    def _resolved(self, message: Resolved, sender: ActorAddress) -> None:
        self.demonitor(sender)
        self._asked = None
        if self._key is not None:
            if message.services:
                # It came too late, and the resolver takes the first for used.
                self._tell(ServiceTaken(self._key))
            return
        if isinstance(message, Offer):
            self._hedge = message.hedge
        self._attempts.offer(message.services)
        key = self._attempts.begin(self.now)
        if key is not None:
            self._connect(key)
        elif not self._attempts.under_way:
            self._give_up("tried too often" if message.services else "there is none")
        elif message.services:
            self._expect_soon()

    def _connect(self, key: bytes) -> None:
        question = Connect(key, self._proxied.key_pair, self._proxied.relay_through)
        self._expect_soon()
        if self._first is None:
            self._first = key
            self.send(self._proxied.endpoint, question)
        else:
            call = self.call(self._proxied.endpoint, question)
            self.run(call, partial(_AttemptOver, key))

    def _expect_soon(self) -> None:
        if self._late_timer is not None:
            self._late_timer.cancel()
        self._late_timer = self.after(self._hedge, _Late())

    @handles(Connected, ConnectFailed)
    def _first_over(self, message: Connected | ConnectFailed, _sender: ActorAddress) -> None:
        key, self._first = cast(bytes, self._first), None
        self._over(key, message)

    @handles(_AttemptOver)
    def _rival_over(self, message: _AttemptOver, _sender: ActorAddress) -> None:
        self._over(message.public_key, message.answer)

    def _over(self, key: bytes, answer: Connected | ConnectFailed) -> None:
        began = self._attempts.under_way.pop(key)
        if isinstance(answer, ConnectFailed):
            reason = str(answer.error)
            self.log.info("service unreachable", key=key.hex(), reason=reason)
            self._failed(key, reason)
            self._advance()
        elif self._key is not None:
            # A rival has won.
            answer.channel.abort()
        else:
            self._attempted_at = began
            self._timings = answer.timings
            self._join(key, answer.channel)

    def _failed(self, key: bytes, reason: str) -> None:
        self._attempts.failed.add(key)
        self._attempts.last_failure = reason
        self._tell(ServiceFailed(key, reason))

    def _tell(self, news: ServiceFailed | ServiceTaken | ServiceWorked) -> None:
        resolver = self._living_resolver()
        if resolver is not None:
            self.send(resolver, news)

    @handles(_TimeOver)
    def _time_over(self, _message: _TimeOver, _sender: ActorAddress) -> None:
        if self._key is None:
            self._give_up(f"none in {self._proxied.connect_timeout:g} s")

    def _give_up(self, reason: str) -> None:
        attempts = self._attempts
        # What the user can do something about is why the instances failed.
        why = {"last_failure": attempts.last_failure} if attempts.last_failure else {}
        self.log.warning("no service reached", tried=attempts.made, reason=reason, **why)
        self.stop()

    # Joined

    def _join(self, key: bytes, channel: Channel) -> None:
        self._left -= self.now - self._searching_since
        self._deadline.cancel()
        if self._late_timer is not None:
            self._late_timer.cancel()
            self._late_timer = None
        self.demonitor(self._proxied.endpoint)
        self._key, self._channel = key, channel
        self._open_sides = 2
        cast(Early, self._early).join(channel)
        self._tell(ServiceTaken(key))
        if self.now - self._began_at > SLOW:
            self._log_slow(key)

    def _log_slow(self, key: bytes) -> None:
        timings = self._timings
        spent: dict[str, Any] = {} if timings is None else structs.asdict(timings)
        spent = {"waited": self._attempted_at - self._began_at, **spent}
        self.log.info(
            "slow connection",
            key=key.hex(),
            seconds=round(self.now - self._began_at, 3),
            **{name: round(each, 3) if name != "how" else each for name, each in spent.items()},
        )

    def service_answered(self) -> None:
        self._answered = True
        waited = self._attempted_at - self._began_at
        seconds = self.now - self._attempted_at
        self._tell(ServiceWorked(cast(bytes, self._key), seconds, waited, self._timings))

    def service_broke(self, error: Exception | None) -> None:
        self.send(self.myAddress, _ServiceBroke(error))

    @handles(_ServiceBroke)
    def _on_service_broke(self, message: _ServiceBroke, _sender: ActorAddress) -> None:
        key, self._key, self._channel = cast(bytes, self._key), None, None
        reason = str(message.error or "it ended without a word")
        kept = cast(Early, self._early).kept
        self.log.info(
            "connection moved", key=key.hex(), reason=reason, answered=False, sent_again=kept
        )
        self._failed(key, reason)
        self._attempts.offer(())
        if not self._draining:
            self._search()

    def client_gone(self, error: Exception | None) -> None:
        self.send(self.myAddress, _ClientGone(error))

    @handles(_ClientGone)
    def _on_client_gone(self, message: _ClientGone, _sender: ActorAddress) -> None:
        self.log.debug("client gone", reason=str(message.error or "closed"), answered=False)
        self.stop()

    def side_closed(self, error: Exception | None) -> None:
        self.send(self.myAddress, SideClosed(error))
