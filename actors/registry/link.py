"""A client's session with a registry, kept up for ever.

    connecting --Connected--> up --lost--> waiting --backoff over--> connecting
         `------failed, too slow-------------^

What is to be registered and who looks for what is kept here and said again to every new session, so
a registry may restart, forget everything, or be away for a day.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

from thespian.actors import ActorAddress

from ...transport.errors import InvalidInput, LocalError
from ...transport.keys import KeyPair
from ...transport.rpc import ABSENT, RpcFailure, RpcRequest, RpcResponse
from ..actor import Actor, Down, ExitReason, Timer, handles
from ..messages import (
    Connect,
    Connected,
    ConnectFailed,
    Find,
    Found,
    LinkConnecting,
    LinkDown,
    LinkUp,
    Refresh,
    Register,
    Registered,
    RegistrationRefused,
    ServiceRecord,
    Services,
    Unregister,
    Unwatch,
    Watch,
)
from .records import records
from .roles import Meta
from .wire import RpcProtocol, StreamEnded, StreamLost

#: Seconds until the next attempt: uniformly in the upper half of a bound that doubles from attempt
#: to attempt, starting and ending here.
BACKOFF_FIRST = 1.0
BACKOFF_LAST = 15.0
#: Seconds in which the endpoint must have found a connection or given up.
CONNECT_TIMEOUT = 30.0
#: Seconds in which a registry must answer; else the session is taken for dead. Longer than the 15
#: to 16 s that `waitFor` takes by design (spec: registry 6.3).
REQUEST_TIMEOUT = 20.0
#: Seconds between queries while nobody matches or a service failed, plus or minus a tenth.
POLL = 5.0
#: Seconds for which a failure keeps the queries going: a registry notices a dead service in 15 s.
REFRESH_WINDOW = 30.0
#: Seconds between queries that failures ask for.
REFRESH_PAUSE = 1.0
#: Seconds after a reconnection in which a restarted registry may not know all its services again:
#: their own backoff takes up to 15. What was known before stays known, and is asked for again.
SETTLE = 20.0
#: Seconds until a registration that was refused is tried again.
REFUSED_RETRY = 30.0
#: Services kept registered, roles looked for, and `Find`s that wait. A program has a handful; with
#: one request each they stay below what one connection may have in flight.
MAX_REGISTRATIONS = 256
MAX_SEARCHES = 256
MAX_FINDERS = 4096


@dataclass(frozen=True, slots=True)
class LinkArgs:
    """Which registry, and who to be towards it; None for an identity that nobody knows yet."""

    registry_key: bytes
    key_pair: KeyPair | None = None
    #: For the jitter.
    rng: Random = field(default_factory=Random)


@dataclass(slots=True, eq=False)
class _Registration:
    meta: Meta
    service_key: bytes
    #: Who wants it.
    owners: dict[ActorAddress, None] = field(default_factory=dict)
    retry: Timer | None = None

    @property
    def params(self) -> dict[str, Any]:
        return {"meta": self.meta, "servicePublicKey": self.service_key.hex()}


@dataclass(slots=True, eq=False)
class _Search:
    meta: Meta
    watchers: dict[ActorAddress, None] = field(default_factory=dict)
    finders: dict[int, tuple[ActorAddress, Timer]] = field(default_factory=dict)
    #: None until a registry has answered for the first time; kept while there is no session.
    records: tuple[ServiceRecord, ...] | None = None
    #: A request of this search is in flight.
    asking: bool = False
    asked_at: float = 0.0
    #: The next query.
    timer: Timer | None = None
    #: Until when a failure keeps the queries going.
    poll_until: float = 0.0

    @property
    def used(self) -> bool:
        return bool(self.watchers or self.finders)


#: Called with the response, or with None if none came and that is no reason to give up the session.
_Then = Callable[[RpcResponse | None], None]


@dataclass(slots=True, eq=False)
class _Request:
    method: str
    then: _Then
    timer: Timer
    must_answer: bool


@dataclass(frozen=True, slots=True)
class _FromWire:
    wire: RpcProtocol
    event: object


@dataclass(frozen=True, slots=True)
class _ConnectNow:
    pass


@dataclass(frozen=True, slots=True)
class _ConnectTimeout:
    pass


@dataclass(frozen=True, slots=True)
class _RequestTimeout:
    wire: RpcProtocol
    id: int


@dataclass(frozen=True, slots=True)
class _RegisterAgain:
    registration: _Registration


@dataclass(frozen=True, slots=True)
class _Ask:
    search: _Search


@dataclass(frozen=True, slots=True)
class _FindOver:
    search: _Search
    finder: int


class Link(Actor):
    """Args: `LinkArgs`. Context: ``endpoint``; ``console``, if there is one, is told
    `LinkConnecting`, `LinkUp` and `LinkDown`. Ready at once: it serves without a registry too, and
    connects when somebody first wants something of it.

    Takes `Register`, `Unregister`, `Find`, `Watch`, `Unwatch` and `Refresh`.
    """

    def on_start(self, args: LinkArgs) -> None:
        self._args = args
        self._wire: RpcProtocol | None = None
        self._connecting = False
        # Somebody wants something of the registry, or did.
        self._begun = False
        self._attempt = 0
        self._failures = 0
        self._down_since = self.now
        self._alarm: Timer | None = None
        # A registry of 3.x has no waitFor; found out anew in each session.
        self._has_wait_for = True
        self._requests: dict[int, _Request] = {}
        self._registrations: dict[tuple[str, str, bytes], _Registration] = {}
        self._searches: dict[tuple[str, str | None], _Search] = {}
        self._finders = 0
        self._serial = 0
        # Until when a new session's registry may not know all services again yet.
        self._settled_at = self.now
        self.ready()

    def on_exit(self, reason: ExitReason) -> None:
        """Asked to stop, it signs off before it ends the session; else the session is destroyed."""
        wire = self._wire
        if wire is None:
            return
        if not reason.normal:
            wire.abort()
            return
        for registration in self._registrations.values():
            wire.write(wire.peer.notify("unregister", registration.params))
        wire.close()

    # The session

    def _begin(self) -> None:
        """Connect, when this is the first that anybody wants of the registry."""
        if not self._begun:
            self._begun = True
            self._down_since = self.now
            self._connect()

    def _connect(self) -> None:
        self._attempt += 1
        self._connecting = True
        self._alarm = self.after(CONNECT_TIMEOUT, _ConnectTimeout())
        self._tell_console(LinkConnecting(self._args.registry_key, self._attempt))
        connect = Connect(self._args.registry_key, self._args.key_pair)
        self.send(self.context["endpoint"], connect)

    @handles(_ConnectNow)
    def _connect_now(self, _message: _ConnectNow, _sender: ActorAddress) -> None:
        self._connect()

    @handles(Connected)
    def _connected(self, message: Connected, _sender: ActorAddress) -> None:
        if not self._connecting:
            message.channel.abort()  # too late: another attempt has begun, or won
            return
        self._connecting = False
        self._cancel_alarm()
        self._attempt = 0
        self._has_wait_for = True
        wire = RpcProtocol(message.channel, self._from_wire)
        self._wire = wire
        wire.start()
        self._tell_console(LinkUp(self._args.registry_key))
        for registration in self._registrations.values():
            self._register(registration)
        for search in self._searches.values():
            if search.records:
                self._settled_at = search.poll_until = self.now + SETTLE
            self._ask(search)

    @handles(ConnectFailed)
    def _connect_failed(self, message: ConnectFailed, _sender: ActorAddress) -> None:
        if self._connecting:
            self._retry(str(message.error))

    @handles(_ConnectTimeout)
    def _connect_timeout(self, _message: _ConnectTimeout, _sender: ActorAddress) -> None:
        if self._connecting:
            self._retry(f"no connection in {CONNECT_TIMEOUT:g} s")

    def _from_wire(self, event: object) -> None:
        if self._wire is not None:
            self.send(self.myAddress, _FromWire(self._wire, event))

    @handles(_FromWire)
    def _on_event(self, message: _FromWire, _sender: ActorAddress) -> None:
        if message.wire is not self._wire:
            return
        match message.event:
            case RpcResponse() as response:
                self._failures = 0
                request = self._requests.pop(response.id)
                request.timer.cancel()
                request.then(response)
            case RpcRequest() as request:
                self._wire.write(self._wire.peer.fail(request, "Unknown method"))
                self._wire.settled()
            case RpcFailure(error):
                self._lose(str(error))
            case StreamEnded():
                self._lose("the registry ended the connection")
            case StreamLost(error):
                self._lose(str(error) if error else "the connection was closed")

    def _lose(self, reason: str) -> None:
        if self._wire is None:
            return
        self._wire.abort()
        self._wire = None
        for request in self._requests.values():
            request.timer.cancel()
        self._requests.clear()
        for registration in self._registrations.values():
            _cancel(registration.retry)
        for search in tuple(self._searches.values()):
            search.asking = False
            _cancel(search.timer)
            self._drop_if_unused(search)
        self._down_since = self.now
        self._retry(reason)

    def _retry(self, reason: str) -> None:
        self._connecting = False
        self._cancel_alarm()
        bound = min(BACKOFF_LAST, BACKOFF_FIRST * 2.0 ** min(self._failures, 10))
        self._failures += 1
        delay = self._args.rng.uniform(bound / 2, bound)
        self._alarm = self.after(delay, _ConnectNow())
        self.log.info("link.down", reason=reason, retry_in=delay)
        down_for = self.now - self._down_since
        self._tell_console(LinkDown(self._args.registry_key, reason, delay, down_for))

    def _cancel_alarm(self) -> None:
        _cancel(self._alarm)
        self._alarm = None

    def _request(self, method: str, params: Any, then: _Then, must_answer: bool = True) -> None:
        """Ask; a session whose registry does not answer what it must is given up."""
        wire = self._wire
        if wire is None:
            return
        try:
            number, line = wire.peer.request(method, params)
        except InvalidInput as error:
            then(RpcResponse(0, ABSENT, str(error)))
            return
        timer = self.after(REQUEST_TIMEOUT, _RequestTimeout(wire, number))
        self._requests[number] = _Request(method, then, timer, must_answer)
        wire.write(line)

    @handles(_RequestTimeout)
    def _request_timeout(self, message: _RequestTimeout, _sender: ActorAddress) -> None:
        if message.wire is not self._wire or message.id not in self._requests:
            return
        request = self._requests.pop(message.id)
        if request.must_answer:
            self._lose(f"no answer to {request.method} in {REQUEST_TIMEOUT:g} s")
            return
        message.wire.peer.forget(message.id)
        request.then(None)

    # Registrations

    @handles(Register)
    def _on_register(self, message: Register, sender: ActorAddress) -> None:
        self._begin()
        place = _place(message)
        registration = self._registrations.get(place)
        if registration is None:
            if len(self._registrations) >= MAX_REGISTRATIONS:
                text = f"one program registers at most {MAX_REGISTRATIONS} services"
                refused = RegistrationRefused(message.meta, message.service_key, text)
                self.send(sender, refused)
                return
            registration = _Registration(message.meta, message.service_key)
            self._registrations[place] = registration
        registration.meta = message.meta
        registration.owners[sender] = None
        self.monitor(sender)
        self._register(registration)

    @handles(Unregister)
    def _on_unregister(self, message: Unregister, sender: ActorAddress) -> None:
        registration = self._registrations.get(_place(message))
        if registration is not None and sender in registration.owners:
            self._disown(registration, sender)

    def _register(self, registration: _Registration) -> None:
        _cancel(registration.retry)
        self._request("register", registration.params, partial(self._registered, registration))

    def _registered(self, registration: _Registration, response: RpcResponse | None) -> None:
        meta, service_key = registration.meta, registration.service_key
        answer: Registered | RegistrationRefused = Registered(meta, service_key)
        if response is not None and response.error is not None:
            answer = RegistrationRefused(meta, service_key, response.error)
            if registration.owners:
                registration.retry = self.after(REFUSED_RETRY, _RegisterAgain(registration))
        for owner in registration.owners:
            self.send(owner, answer)

    @handles(_RegisterAgain)
    def _register_again(self, message: _RegisterAgain, _sender: ActorAddress) -> None:
        if message.registration.owners:
            self._register(message.registration)

    def _disown(self, registration: _Registration, owner: ActorAddress) -> None:
        registration.owners.pop(owner, None)
        if registration.owners:
            return
        _cancel(registration.retry)
        del self._registrations[_place(registration)]
        # The registry may not know the method: the entry then goes with the connection only.
        self._request("unregister", registration.params, lambda _response: None)

    # Searches

    @handles(Watch)
    def _on_watch(self, message: Watch, sender: ActorAddress) -> None:
        self._begin()
        search = self._search(message.meta)
        if search is None:
            raise LocalError(f"one program watches at most {MAX_SEARCHES} roles")
        search.watchers[sender] = None
        self.monitor(sender)
        if search.records is not None:
            self.send(sender, Services(search.meta, search.records))
        else:
            self._ask(search)

    @handles(Unwatch)
    def _on_unwatch(self, message: Unwatch, sender: ActorAddress) -> None:
        search = self._searches.get(_wanted(message.meta))
        if search is not None:
            search.watchers.pop(sender, None)
            self._drop_if_unused(search)

    @handles(Find)
    def _on_find(self, message: Find, sender: ActorAddress) -> None:
        self._begin()
        search = self._search(message.meta)
        if search is None or self._finders >= MAX_FINDERS:
            self.send(sender, Found(message.meta, ()))
            return
        self._finders += 1
        self._serial += 1
        number = self._serial
        timer = self.after(message.timeout, _FindOver(search, number))
        search.finders[number] = sender, timer
        self._ask(search)

    @handles(_FindOver)
    def _find_over(self, message: _FindOver, _sender: ActorAddress) -> None:
        self._answer_finder(message.search, message.finder, ())
        self._drop_if_unused(message.search)

    @handles(Refresh)
    def _on_refresh(self, message: Refresh, _sender: ActorAddress) -> None:
        search = self._searches.get(_wanted(message.meta))
        if search is None:
            return
        search.poll_until = self.now + REFRESH_WINDOW
        if self.now - search.asked_at >= REFRESH_PAUSE:
            self._ask(search)
        elif not search.asking:
            self._ask_in(search, REFRESH_PAUSE)

    @handles(_Ask)
    def _on_ask(self, message: _Ask, _sender: ActorAddress) -> None:
        self._ask(message.search)

    def _search(self, meta: Meta) -> _Search | None:
        place = _wanted(meta)
        search = self._searches.get(place)
        if search is None and len(self._searches) < MAX_SEARCHES:
            search = self._searches[place] = _Search(meta)
        return search

    def _ask(self, search: _Search) -> None:
        """Query, unless that is under way or there is no session; each new session does."""
        if search.asking or self._wire is None:
            return
        _cancel(search.timer)
        search.asking = True
        search.asked_at = self.now
        self._query(search, search.meta, partial(self._queried, search))

    def _query(self, search: _Search, meta: Meta, then: _Then) -> None:
        self._request("query", {**meta, "details": True}, then)

    def _queried(self, search: _Search, response: RpcResponse | None) -> None:
        found = self._records(search, response)
        version = search.meta.get("version")
        if found is None or found or version is None or _every_registry_knows(version):
            self._conclude(search, found)
            return
        # Registries of the Node programs find few kinds of ranges. What they have is asked for,
        # and the range applied here (spec: registry 6.4, 6.6).
        everything = {**search.meta, "version": "*"}
        self._query(
            search,
            everything,
            lambda again: self._conclude(search, self._records(search, again)),
        )

    def _conclude(self, search: _Search, found: tuple[ServiceRecord, ...] | None) -> None:
        search.asking = False
        if found is not None:
            self._publish(search, found)
        if not search.used:
            self._drop_if_unused(search)
        elif found is None:
            self._ask_in(search, POLL)
        elif not found and self._has_wait_for:
            search.asking = True
            waited = partial(self._waited, search)
            # A registry of 1.x forgets some requests of this kind (spec: registry 6.3).
            self._request("waitFor", search.meta, waited, must_answer=False)
        elif not found or self.now < search.poll_until:
            self._ask_in(search, POLL)

    def _waited(self, search: _Search, response: RpcResponse | None) -> None:
        search.asking = False
        found = self._records(search, response)
        if found:
            self._publish(search, found)
            self._drop_if_unused(search)
            return
        if response is not None and response.error == "Unknown method":
            self._has_wait_for = False
        if not search.used:
            self._drop_if_unused(search)
        elif self.now - search.asked_at >= POLL:
            self._ask(search)
        else:
            self._ask_in(search, POLL)

    def _ask_in(self, search: _Search, seconds: float) -> None:
        _cancel(search.timer)
        jittered = seconds * self._args.rng.uniform(0.9, 1.1)
        search.timer = self.after(jittered, _Ask(search))

    def _records(
        self, search: _Search, response: RpcResponse | None
    ) -> tuple[ServiceRecord, ...] | None:
        """None for no answer to go by."""
        if response is None or response.error is not None:
            return None
        return records(response.result, search.meta)

    def _publish(self, search: _Search, found: tuple[ServiceRecord, ...]) -> None:
        if found:
            for finder in tuple(search.finders):
                self._answer_finder(search, finder, found)
        if found == search.records:
            return
        if search.records and not found and self.now < self._settled_at:
            return
        search.records = found
        # The registry has noticed what failed.
        search.poll_until = self._settled_at
        for watcher in search.watchers:
            self.send(watcher, Services(search.meta, found))

    def _answer_finder(
        self, search: _Search, finder: int, found: tuple[ServiceRecord, ...]
    ) -> None:
        waiting = search.finders.pop(finder, None)
        if waiting is None:
            return
        sender, timer = waiting
        timer.cancel()
        self._finders -= 1
        self.send(sender, Found(search.meta, found))

    def _drop_if_unused(self, search: _Search) -> None:
        # A request in flight keeps it: else the same search might be asked twice at a time.
        if search.used or search.asking:
            return
        _cancel(search.timer)
        self._searches.pop(_wanted(search.meta), None)

    # Others

    @handles(Down)
    def _client_died(self, message: Down, _sender: ActorAddress) -> None:
        client = message.address
        for registration in tuple(self._registrations.values()):
            if client in registration.owners:
                self._disown(registration, client)
        for search in tuple(self._searches.values()):
            if client in search.watchers:
                del search.watchers[client]
                self._drop_if_unused(search)

    def _tell_console(self, event: LinkConnecting | LinkUp | LinkDown) -> None:
        if "console" in self.context:
            self.send(self.context["console"], event)


def _cancel(timer: Timer | None) -> None:
    if timer is not None:
        timer.cancel()


def _place(what: Register | Unregister | _Registration) -> tuple[str, str, bytes]:
    meta: Mapping[str, Any] = what.meta
    return str(meta.get("role")), str(meta.get("version")), what.service_key


def _wanted(meta: Meta) -> tuple[str, str | None]:
    version = meta.get("version")
    return str(meta.get("role")), None if version is None else str(version)


def _every_registry_knows(version: str) -> bool:
    """Whether the range is of a form that registries of all generations find: 3.2.2, 3.2, 3.x."""
    parts = version.split(".")
    return version == "*" or (
        2 <= len(parts) <= 3
        and parts[0].isdecimal()
        and all(part.isdecimal() or part == "x" for part in parts)
    )
