"""What a link looks for: watches where the registry tells of changes, else queries and waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

from thespian.actors import ActorAddress

from ...transport.rpc import RpcResponse
from ..actor import Actor
from ..messages import Find, Found, ServiceRecord, Services
from . import roles
from .client_session import Alarm, ClientSession, Then
from .lease import Verifier
from .records import Reader, by_version, same
from .roles import Meta

#: Seconds between queries while nobody matches or a service failed, plus or minus a tenth.
POLL = 5.0
#: Seconds for which a failure keeps the queries going: a registry of the Node programs notices a
#: dead service in 15 s.
REFRESH_WINDOW = 30.0
#: Seconds between queries that failures ask for.
REFRESH_PAUSE = 1.0
#: Seconds after a reconnection in which a restarted registry may not know all its services again:
#: their own backoff takes some time. What was known before stays known.
SETTLE = 20.0
#: Roles looked for and `Find`s that wait. A program has a handful; with one request each they stay
#: below what one connection may have in flight.
MAX_SEARCHES = 256
MAX_FINDERS = 4096

Records = tuple[ServiceRecord, ...]


@dataclass(slots=True, eq=False)
class Search:
    meta: Meta
    reader: Reader
    watchers: dict[ActorAddress, None] = field(default_factory=dict)
    finders: dict[int, tuple[ActorAddress, Alarm]] = field(default_factory=dict)
    #: What the watchers know; None until a registry has answered for the first time. Kept while
    #: there is no session.
    records: Records | None = None
    #: This session's registry has answered, and the watchers know.
    live: bool = False
    #: What this session's registry said last.
    answer: Records = ()
    #: What was known before this session, until its registry has had the time to learn it again.
    held: Records = ()
    #: A request of this search is in flight.
    asking: bool = False
    asked_at: float = 0.0
    #: The next query.
    alarm: Alarm | None = None
    #: Until when a failure keeps the queries going.
    poll_until: float = 0.0
    #: The number under which the registry tells of changes; None while it does not.
    watch: int | None = None
    #: It has told of one.
    notified: bool = False
    #: This session's registry refuses to tell of changes.
    unwatchable: bool = False
    #: Why it did not answer the last question.
    refusal: str = ""

    @property
    def used(self) -> bool:
        return bool(self.watchers or self.finders)


class Searches:
    """Belongs to a link, which tells it who looks for what and when a session begins and ends."""

    def __init__(
        self, actor: Actor, session: ClientSession, rng: Random, clock: Callable[[], float]
    ) -> None:
        self._actor = actor
        self._session = session
        self._rng = rng
        self._clock = clock
        self._searches: dict[tuple[str, str | None], Search] = {}
        self._watches: dict[int, Search] = {}
        self._finders = 0
        self._serial = 0
        # A registry of 3.x has no waitFor; found out anew in each session.
        self._has_wait_for = True
        # Until when this session's registry may not know all services again yet.
        self._settled_at = 0.0
        self._settling: Alarm | None = None
        self._verifier = Verifier()
        #: Records left out because their statement did not hold, by kind (`Reader`).
        self.refused: Counter[str] = Counter()

    # What others want

    def watch(self, meta: Meta, watcher: ActorAddress) -> None:
        search = self._search(meta)
        if search is None:
            reason = f"one program watches at most {MAX_SEARCHES} roles"
            self._actor.log.warning("watch.refused", role=roles.text(meta), reason=reason)
            self._actor.send(watcher, Services(meta, (), live=False))
            return
        search.watchers[watcher] = None
        self._actor.monitor(watcher)
        if search.records is not None:
            self._actor.send(watcher, self._services(search, search.records))
        else:
            self._ask(search)

    def unwatch(self, meta: Meta, watcher: ActorAddress) -> None:
        search = self._searches.get(wanted(meta))
        if search is not None:
            search.watchers.pop(watcher, None)
            self._drop_if_unused(search)

    def watcher_died(self, watcher: ActorAddress) -> None:
        for search in tuple(self._searches.values()):
            if search.watchers.pop(watcher, self) is None:
                self._drop_if_unused(search)

    def find(self, message: Find, sender: ActorAddress) -> None:
        search = self._search(message.meta)
        if search is None or self._finders >= MAX_FINDERS:
            reason = f"at most {MAX_SEARCHES} roles and {MAX_FINDERS} questions"
            self._actor.log.warning("find.refused", role=roles.text(message.meta), reason=reason)
            self._actor.send(sender, Found(message.meta, ()))
            return
        self._finders += 1
        self._serial += 1
        number = self._serial
        alarm = self._session.later(message.timeout, partial(self._find_over, search, number))
        search.finders[number] = sender, alarm
        if search.watch is None or not search.live:
            self._ask(search)
        elif search.answer:
            self._answer_finders(search)

    def refresh(self, meta: Meta) -> None:
        search = self._searches.get(wanted(meta))
        if search is None:
            return
        search.poll_until = self._actor.now + REFRESH_WINDOW
        if self._actor.now - search.asked_at >= REFRESH_PAUSE:
            self._ask(search)
        elif not search.asking:
            self._ask_in(search, REFRESH_PAUSE)

    # What happens to the session

    def opened(self) -> None:
        self._has_wait_for = True
        for search in self._searches.values():
            search.answer = ()
            if search.records:
                search.held = search.records
                self._settled_at = search.poll_until = self._actor.now + SETTLE
            self._ask(search)
        if self._settled_at > self._actor.now:
            self._settling = self._session.later(SETTLE, self._settled)

    def lost(self) -> None:
        self._watches.clear()
        if self._settling is not None:
            self._settling.cancel()
        for search in tuple(self._searches.values()):
            search.asking = search.notified = search.unwatchable = False
            search.watch = None
            _cancel(search)
            if search.live and search.records is not None:
                search.live = False
                self._tell(search, search.records)
            self._drop_if_unused(search)

    def notified(self, params: Any) -> None:
        """The registry tells of a change. Of a search that is no more, it is let pass."""
        number = params.get("id") if isinstance(params, Mapping) else None
        search = self._watches.get(number) if type(number) is int else None
        if search is None:
            return
        found = self._listed(search, params)
        if found is not None:
            search.notified = True
            self._publish(search, found)
            self._drop_if_unused(search)

    # Looking in

    @property
    def watched(self) -> bool:
        return any(search.watchers for search in self._searches.values())

    def describe(self) -> list[dict[str, Any]]:
        return [
            {
                "role": roles.text(search.meta),
                "services": len(search.records or ()),
                "live": search.live,
                "told": search.watch is not None,
                "refusal": search.refusal or None,
            }
            for search in self._searches.values()
        ]

    # Asking

    def _search(self, meta: Meta) -> Search | None:
        place = wanted(meta)
        search = self._searches.get(place)
        if search is None and len(self._searches) < MAX_SEARCHES:
            search = self._searches[place] = Search(meta, self._reader(meta))
        return search

    def _reader(self, meta: Meta) -> Reader:
        return Reader(meta, self._clock, self._verifier, self.refused)

    def _ask(self, search: Search) -> None:
        """Ask, unless that is under way or there is no session; each new session does."""
        if search.asking or not self._session.up:
            return
        _cancel(search)
        search.asking = True
        search.asked_at = self._actor.now
        if self._session.can("watch") and not search.unwatchable and search.watch is None:
            self._serial += 1
            search.watch = self._serial
            self._watches[search.watch] = search
            params = {**search.meta, "id": search.watch}
            self._session.request("watch", params, partial(self._watched, search))
        else:
            self._query(search, search.meta, partial(self._queried, search))

    def _watched(self, search: Search, response: RpcResponse | None) -> None:
        error = None if response is None else response.error
        found = None
        if response is not None and error is None:
            found = self._listed(search, response.result)
        if found is None:
            search.refusal = error or "no list of services"
            role = roles.text(search.meta)
            self._actor.log.warning("watch.refused", role=role, reason=search.refusal)
            self._forget_watch(search)
            search.unwatchable = True
            search.asking = False
            self._ask(search)
            return
        # A change that has been told of already is newer.
        search.refusal = ""
        self._conclude(search, search.answer if search.notified else found)

    def _query(self, search: Search, meta: Meta, then: Then) -> None:
        self._session.request("query", {**meta, "details": True}, then)

    def _queried(self, search: Search, response: RpcResponse | None) -> None:
        found = self._found(search, response)
        version = search.meta.get("version")
        if found is None or found or version is None or _every_registry_knows(version):
            self._conclude(search, found)
            return
        # Registries of the Node programs find few kinds of ranges. What they have is asked for,
        # and the range applied here (spec: registry 6.4, 6.6).
        self._query(
            search,
            {**search.meta, "version": "*"},
            lambda again: self._conclude(search, self._found(search, again)),
        )

    def _conclude(self, search: Search, found: Records | None) -> None:
        search.asking = False
        if found is not None:
            self._publish(search, found)
        if not search.used:
            self._drop_if_unused(search)
        elif search.watch is not None:
            return  # it will tell
        elif found is None:
            self._ask_in(search, POLL)
        elif not found and self._has_wait_for:
            search.asking = True
            # A registry of 1.x forgets some requests of this kind (spec: registry 6.3).
            waited = partial(self._waited, search)
            self._session.request("waitFor", search.meta, waited, must_answer=False)
        elif not found or self._actor.now < search.poll_until:
            self._ask_in(search, POLL)

    def _waited(self, search: Search, response: RpcResponse | None) -> None:
        search.asking = False
        found = self._found(search, response)
        if found:
            self._publish(search, found)
            self._drop_if_unused(search)
            return
        if response is not None and response.error == "Unknown method":
            self._has_wait_for = False
        if not search.used:
            self._drop_if_unused(search)
        elif self._actor.now - search.asked_at >= POLL:
            self._ask(search)
        else:
            self._ask_in(search, POLL)

    def _ask_in(self, search: Search, seconds: float) -> None:
        _cancel(search)
        jittered = seconds * self._rng.uniform(0.9, 1.1)
        search.alarm = self._session.later(jittered, partial(self._ask, search))

    # Answers

    def _found(self, search: Search, response: RpcResponse | None) -> Records | None:
        """None for no answer to go by."""
        if response is None:
            return None
        search.refusal = response.error or ""
        return None if response.error else self._read(search, response.result)

    def _listed(self, search: Search, result: Any) -> Records | None:
        services = result.get("services") if isinstance(result, Mapping) else None
        return self._read(search, services) if isinstance(services, list) else None

    def _read(self, search: Search, answer: Any) -> Records:
        before = self.refused.total()
        found = search.reader.read(answer)
        if self.refused.total() > before:
            role = roles.text(search.meta)
            self._actor.log.warning("records.refused", role=role, counts=dict(self.refused))
        return found

    def _publish(self, search: Search, found: Records) -> None:
        search.answer = found
        if found:
            self._answer_finders(search)
        shown = found
        if search.held:
            known = {(record.public_key, record.version) for record in found}
            held = (each for each in search.held if (each.public_key, each.version) not in known)
            shown = by_version((*found, *held))
        news = not search.live or search.records is None or not same(shown, search.records)
        search.live = True
        search.records = shown
        if news:
            self._tell(search, shown)

    def _settled(self) -> None:
        """What the registry has not learned again by now is gone."""
        for search in tuple(self._searches.values()):
            if search.held:
                search.held = ()
                if search.live:
                    self._publish(search, search.answer)

    def _tell(self, search: Search, shown: Records) -> None:
        # The registry has noticed what failed.
        search.poll_until = self._settled_at
        services = self._services(search, shown)
        for watcher in search.watchers:
            self._actor.send(watcher, services)

    def _services(self, search: Search, shown: Records) -> Services:
        age = 0.0 if search.live else self._actor.now - self._session.heard_at
        return Services(search.meta, shown, search.live, age)

    def _answer_finders(self, search: Search) -> None:
        for number in tuple(search.finders):
            self._answer_finder(search, number, search.answer)

    def _answer_finder(self, search: Search, number: int, found: Records) -> None:
        waiting = search.finders.pop(number, None)
        if waiting is None:
            return
        sender, alarm = waiting
        alarm.cancel()
        self._finders -= 1
        self._actor.send(sender, Found(search.meta, found))

    def _find_over(self, search: Search, number: int) -> None:
        self._answer_finder(search, number, ())
        self._drop_if_unused(search)

    # The end of a search

    def _drop_if_unused(self, search: Search) -> None:
        # A request in flight keeps it: else the same search might be asked twice at a time.
        if search.used or search.asking:
            return
        _cancel(search)
        self._forget_watch(search)
        self._searches.pop(wanted(search.meta), None)

    def _forget_watch(self, search: Search) -> None:
        if search.watch is None:
            return
        del self._watches[search.watch]
        self._session.notify("unwatch", {"id": search.watch})
        search.watch = None


def wanted(meta: Meta) -> tuple[str, str | None]:
    """What makes two searches the same one."""
    version = meta.get("version")
    return str(meta.get("role")), None if version is None else str(version)


def _cancel(search: Search) -> None:
    if search.alarm is not None:
        search.alarm.cancel()
        search.alarm = None


def _every_registry_knows(version: str) -> bool:
    """Whether the range is of a form that registries of all generations find: 3.2.2, 3.2, 3.x."""
    parts = version.split(".")
    return version == "*" or (
        2 <= len(parts) <= 3
        and parts[0].isdecimal()
        and all(part.isdecimal() or part == "x" for part in parts)
    )
