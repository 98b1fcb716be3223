"""A client's link to a registry, kept up for ever.

    connecting --Connected--> greeting --its answer--> up --lost--> waiting --over--> connecting
         |                        `----------lost------------------^
         `------failed, too slow------------------------------------^

What is to be registered and who looks for what is kept here and said again to every new session, so
a registry may restart, forget everything, or be away for a day.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from random import Random

from msgspec import Struct, field
from thespian.actors import ActorAddress

from ...transport.keys import KeyPair
from ...transport.rpc import RpcFailure, RpcRequest, RpcResponse
from .. import console
from ..actor import Actor, Down, ExitReason, handles
from ..messages import (
    Connect,
    Connected,
    ConnectFailed,
    Describe,
    Described,
    Find,
    LinkConnecting,
    LinkDown,
    LinkUp,
    ListRoles,
    Refresh,
    Register,
    RolesListed,
    Unregister,
    Unwatch,
    Watch,
)
from .client_session import Alarm, ClientSession, Due, FromWire
from .lease import MAX_SKEW
from .registrations import Registrations
from .searches import Searches
from .wire import StreamEnded, StreamLost

#: Seconds until the next attempt: uniformly in the upper half of a bound that doubles from attempt
#: to attempt, starting and ending here. An attempt without a network costs a few datagrams and 3 ms
#: of work, so it need not become rare: after an hour offline, the way back is as short as after a
#: minute. That is 5 s, of which the endpoint may take the first to see that an attempt has failed.
BACKOFF_FIRST = 0.5
BACKOFF_LAST = 3.0
#: Seconds after which a session has proven itself: when it is lost, attempts begin anew. One that
#: keeps breaking at once is tried as rarely as one that does not come about.
STABLE = 5.0
#: Seconds in which the endpoint must have found a connection or given up.
CONNECT_TIMEOUT = 30.0
#: Seconds between two pieces of news that there is no registry.
NEWS_PAUSE = 10.0
#: Roles that are listed at most.
MAX_ROLES = 100_000


class LinkArgs(Struct, frozen=True):
    """Which registry, and who to be towards it; None for an identity that nobody knows yet."""

    registry_key: bytes
    key_pair: KeyPair | None = None
    #: For the jitter.
    rng: Random = field(default_factory=Random)
    #: Seconds of Unix time. It may jump.
    clock: Callable[[], float] = time.time


class Attend(Struct, frozen=True):
    """Tell the sender of each session that begins and ends, as `LinkUp` and `LinkDown`, for as long
    as it lives; at once, if there is one."""


class Link(Actor):
    """Args: `LinkArgs`. Context: ``endpoint``. The console is told `LinkConnecting`, `LinkUp` and
    `LinkDown`. Ready at once: it serves without a registry too, and connects when somebody first
    wants something of it.

    Takes `Register`, `Unregister`, `Find`, `Watch`, `Unwatch`, `Refresh`, `ListRoles`, `Attend` and
    `Describe`.
    """

    def on_start(self, args: LinkArgs) -> None:
        self._args = args
        self._session = ClientSession(self, self._lose)
        key, rng, clock = args.registry_key, args.rng, args.clock
        self._registrations = Registrations(self, self._session, key, rng, clock)
        self._searches = Searches(self, self._session, rng, clock)
        self._attendants: dict[ActorAddress, None] = {}
        # They wait for a session.
        self._role_askers: dict[ActorAddress, None] = {}
        self._connecting = False
        # Somebody wants something of the registry, or did.
        self._begun = False
        self._attempt = 0
        self._failures = 0
        # When the session began or ended, or the first attempt began; and the same in Unix time.
        self._since = self.now
        self._since_clock = args.clock()
        self._told_at = float("-inf")
        self._last_error = ""
        self._alarm: Alarm | None = None
        self.ready()

    def on_exit(self, reason: ExitReason) -> None:
        """Asked to stop, it signs off before it ends the session; else the session is destroyed."""
        if reason.normal:
            self._registrations.sign_off()
        self._session.close(in_order=reason.normal)

    # What others want

    @handles(Register)
    def _register(self, message: Register, sender: ActorAddress) -> None:
        self._begin()
        self._registrations.register(message, sender)

    @handles(Unregister)
    def _unregister(self, message: Unregister, sender: ActorAddress) -> None:
        self._registrations.unregister(message, sender)

    @handles(Watch)
    def _watch(self, message: Watch, sender: ActorAddress) -> None:
        self._begin()
        self._searches.watch(message.meta, sender)

    @handles(Unwatch)
    def _unwatch(self, message: Unwatch, sender: ActorAddress) -> None:
        self._searches.unwatch(message.meta, sender)

    @handles(Find)
    def _find(self, message: Find, sender: ActorAddress) -> None:
        self._begin()
        self._searches.find(message, sender)

    @handles(Refresh)
    def _refresh(self, message: Refresh, _sender: ActorAddress) -> None:
        self._searches.refresh(message.meta)

    @handles(ListRoles)
    def _list_roles(self, _message: ListRoles, sender: ActorAddress) -> None:
        self._begin()
        if not self._session.up:
            self._role_askers[sender] = None
        elif not self._session.can("roles"):
            self.send(sender, RolesListed(None))
        else:
            self._ask_roles(sender, [])

    def _ask_roles(self, asker: ActorAddress, known: list[str]) -> None:
        """Go on behind the last role that is known."""

        def answered(response: RpcResponse | None) -> None:
            names, more = _roles(response)
            if names is None:
                self.send(asker, RolesListed(None))
                return
            known.extend(names)
            # A registry that always says that there is more would fill the memory.
            if more and names and len(known) < MAX_ROLES:
                self._ask_roles(asker, known)
            else:
                self.send(asker, RolesListed(tuple(known)))

        params = {"after": known[-1]} if known else {}
        self._session.request("roles", params, answered, must_answer=False)

    @handles(Attend)
    def _attend(self, _message: Attend, sender: ActorAddress) -> None:
        self._attendants[sender] = None
        self.monitor(sender)
        if self._session.up:
            self.send(sender, LinkUp(self._args.registry_key))

    @handles(Down)
    def _client_died(self, message: Down, _sender: ActorAddress) -> None:
        self._attendants.pop(message.address, None)
        self._registrations.owner_died(message.address)
        self._searches.watcher_died(message.address)

    # The session

    def _begin(self) -> None:
        """Connect, when this is the first that anybody wants of the registry."""
        if not self._begun:
            self._begun = True
            self._mark()
            self._connect()

    def _connect(self) -> None:
        self._attempt += 1
        self._connecting = True
        self._alarm = self._session.later(CONNECT_TIMEOUT, self._connect_timed_out)
        console.tell(self, LinkConnecting(self._args.registry_key, self._attempt))
        connect = Connect(self._args.registry_key, self._args.key_pair)
        self.send(self.context["endpoint"], connect)

    @handles(Connected)
    def _connected(self, message: Connected, _sender: ActorAddress) -> None:
        if not self._connecting:
            message.channel.abort()  # too late: another attempt has begun, or won
            return
        self._connecting = False
        self._cancel_alarm()
        self._session.open(message.channel, self._greeted)

    @handles(ConnectFailed)
    def _connect_failed(self, message: ConnectFailed, _sender: ActorAddress) -> None:
        if self._connecting:
            self._retry(str(message.error))

    def _connect_timed_out(self) -> None:
        self._retry(f"no connection in {CONNECT_TIMEOUT:g} s")

    def _greeted(self) -> None:
        self._attempt = 0
        self._last_error = ""
        self._told_at = float("-inf")
        self._mark()
        self._compare_clocks()
        up = LinkUp(self._args.registry_key)
        console.tell(self, up)
        self._tell_attendants(up)
        self._registrations.opened()
        self._searches.opened()
        askers, self._role_askers = self._role_askers, {}
        for asker in askers:
            self._list_roles(ListRoles(), asker)

    @handles(FromWire)
    def _from_wire(self, message: FromWire, _sender: ActorAddress) -> None:
        if not self._session.is_of(message.wire):
            return
        match message.event:
            case RpcResponse() as response:
                self._session.answered(response)
            case RpcRequest(method="services") as request:
                message.wire.settled()
                self._searches.notified(request.params)
            case RpcRequest() as request:
                message.wire.write(message.wire.peer.fail(request, "Unknown method"))
                message.wire.settled()
            case RpcFailure(error):
                self._lose(str(error))
            case StreamEnded():
                self._lose("the registry ended the connection")
            case StreamLost(error):
                self._lose(str(error) if error else "the connection was closed")

    @handles(Due)
    def _due(self, message: Due, _sender: ActorAddress) -> None:
        message.alarm.ring()

    def _lose(self, reason: str) -> None:
        was_up = self._session.up
        self._session.close()
        if not was_up:
            self._retry(reason)
            return
        if self.now - self._since >= STABLE:
            self._failures = 0
        self._mark()
        self._registrations.lost()
        self._searches.lost()
        self._tell_attendants(self._retry(reason))

    def _retry(self, reason: str) -> LinkDown:
        self._connecting = False
        self._cancel_alarm()
        bound = min(BACKOFF_LAST, BACKOFF_FIRST * 2.0 ** min(self._failures, 10))
        self._failures += 1
        delay = self._args.rng.uniform(bound / 2, bound)
        self._alarm = self._session.later(delay, self._connect)
        self._last_error = reason
        down = LinkDown(self._args.registry_key, reason, delay, self.now - self._since)
        if self.now - self._told_at >= NEWS_PAUSE:
            self._told_at = self.now
            self.log.info("link.down", reason=reason, retry_in=delay)
            console.tell(self, down)
        return down

    def _cancel_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _mark(self) -> None:
        self._since = self.now
        self._since_clock = self._args.clock()

    def _compare_clocks(self) -> None:
        registry_clock = self._session.clock
        if registry_clock is None:
            return
        ahead = registry_clock - self._args.clock()
        if abs(ahead) > MAX_SKEW:
            # It will refuse our leases, and we those of others.
            self.log.warning("clock.differs", registry_is_ahead=round(ahead), fix="set the clock")

    def _tell_attendants(self, news: LinkUp | LinkDown) -> None:
        for attendant in self._attendants:
            self.send(attendant, news)

    # Looking in

    @handles(Describe)
    def _describe(self, _message: Describe, sender: ActorAddress) -> None:
        session = self._session
        wanted = self._begun
        fields = {
            "registry": self._args.registry_key.hex(),
            "connected": session.up,
            # Unix seconds: when the session began, or since when there is none.
            "since": self._since_clock if wanted else None,
            "features": sorted(session.features or ()),
            # Seconds.
            "round_trip": session.round_trip,
            "age": round(self.now - session.heard_at, 1) if wanted else None,
            "attempt": self._attempt,
            "error": self._last_error or None,
            "registrations": self._registrations.describe(),
            "watches": self._searches.describe(),
            "counters": {f"refused.{k}": v for k, v in sorted(self._searches.refused.items())},
        }
        self.send(sender, Described(fields))


def _roles(response: RpcResponse | None) -> tuple[list[str] | None, bool]:
    """The roles in an answer, and whether there are more; None for no answer to go by."""
    if response is None or response.error is not None or not isinstance(response.result, Mapping):
        return None, False
    names = response.result.get("roles")
    if not isinstance(names, list):
        return None, False
    return [name for name in names if isinstance(name, str)], response.result.get("more") is True
