"""The registry's table: answers the sessions (spec: registry 6.2, 6.7; docs/registry-protocol.md).

What it knows is in `rows`, who waits for it in `interest`. Here are the methods, with what they
take and answer, and the order of things: what a request has changed is durable before it is
answered. One commit is for all requests that wait in the mailbox, since the message that asks for
it comes behind them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from msgspec import Struct
from thespian.actors import ActorAddress

from ...transport.errors import InvalidInput
from ...transport.keys import parse_key
from ...transport.rpc import ABSENT
from ..actor import NORMAL, Actor, Down, ExitReason, Timer, handles
from ..console import tell
from ..messages import (
    Describe,
    Described,
    ServiceGone,
    ServiceRegistered,
    TableAnswer,
    TableRefusal,
    TableRequest,
)
from . import lease, matching
from .entries import Entry, Service
from .interest import Group, Waiters, Watches
from .lease import BAD_VERSION, Refused, Verifier, check_meta
from .rows import MAX_RESULTS, Rows
from .store import CommitFailed, Store

#: Bytes of one answer, by an estimate that is never too low: its line must stay below
#: `transport.rpc.MAX_LINE`.
MAX_ANSWER = 512 * 1024
#: Seconds for which renewals, and what could not be written, wait for the next commit.
LAZY = 5.0
#: Renewals in one commit, of about 50 us each, and seconds until the next ones are written.
MAX_RENEWALS = 500
RENEWALS_PAUSE = 0.1
#: Roles in one answer: with names of `lease.MAX_ROLE` characters it stays below `MAX_ANSWER`.
MAX_ROLES = 100
#: Entries in one description.
MAX_DESCRIBED = 1000

#: What the Node programs answer in these cases; clients may compare them (spec: registry 6.2).
NO_KEY = "info needs an id property"
WAIT_OVER = "timeout waiting for service"


class TableArgs(Struct, frozen=True):
    """Where to keep what must survive a restart: an SQLite file, or nowhere."""

    path: Path | None = None
    #: Unix seconds.
    clock: Callable[[], float] = time.time


class TableNotice(Struct, frozen=True):
    """To a session: what a watch of its client is told of has changed."""

    watch: int
    #: The whole list, items as in the answer to `watch`.
    services: list[dict[str, Any]]


class Counted(Struct, frozen=True):
    """From a session: one more of what the table counts under this name."""

    name: str


class _Commit(Struct, frozen=True):
    """All that waited in the mailbox is done."""


class _Alarm(Struct, frozen=True):
    """The first deadline may have come."""


class _List(Struct, frozen=True):
    """What the watches of one role and range are told."""

    items: list[dict[str, Any]]
    #: There are more than one answer holds, or may be.
    cut: bool
    #: Bytes.
    size: int


class TableActor(Actor):
    """Answers `TableRequest`; the sender is the session that entries, waiters and watches belong
    to, and gets `TableNotice`. Takes `Counted` and `Describe`. The console is told
    `ServiceRegistered` for every registration and `ServiceGone` for every entry that went.

    Args: `TableArgs`, or None. A store that cannot be used ends it before it serves.
    """

    def on_start(self, args: TableArgs | None) -> None:
        args = args or TableArgs()
        self._clock = args.clock
        self._store = Store(args.path, args.clock)
        self.own(self._store.close)
        self._watches: Watches[ActorAddress] = Watches()
        self._waiters: Waiters[ActorAddress] = Waiters()
        self._rows: Rows[ActorAddress] = Rows(self._store, self._watches.changed)
        self._verifier = Verifier()
        self._counters: Counter[str] = Counter()
        self._monitored: set[ActorAddress] = set()
        # What is sent once it is durable; True for what says that something was changed.
        self._outbox: list[tuple[ActorAddress, TableAnswer | TableRefusal, bool]] = []
        self._news: list[ServiceRegistered | ServiceGone] = []
        self._commit_sent = False
        # When renewals, or what could not be written before, have to be written.
        self._write_at: float | None = None
        self._alarm: Timer | None = None
        self._alarm_at = 0.0
        self._restore()
        self.ready()

    def on_exit(self, reason: ExitReason) -> None:
        if reason.normal:
            self._rows.write_renewals()
            self._commit()

    def _restore(self) -> None:
        unusable = self._rows.restore(self.now, self._clock())
        for key, _, role, _, _ in unusable:
            self.log.warning("row.unusable", service=key.hex(), role=role)
        if unusable:
            self._commit()
        self.log.info("table.restored", entries=len(self._rows))
        self._set_alarm()

    # Requests

    @handles(TableRequest)
    def _request(self, message: TableRequest, sender: ActorAddress) -> None:
        if sender not in self._monitored:
            self._monitored.add(sender)
            self.monitor(sender)
        try:
            self._answer(message, sender)
        except Refused as refusal:
            self._counters[f"refused.{refusal.kind}"] += 1
            self._reply(sender, TableRefusal(message.ticket, str(refusal)))
        self._set_alarm()

    def _answer(self, request: TableRequest, sender: ActorAddress) -> None:
        params, key = request.params, request.remote_public_key
        match request.method:
            case "register":
                self._register(request, sender)
            case "lease":
                self._lease(request, sender)
            case "unregister":
                gone = self._rows.unregister(_service(params), key, self.now, self._clock())
                self._gone(gone)
                self._reply(sender, TableAnswer(request.ticket, ABSENT), changes=bool(gone))
            case "query":
                found = self._rows.query(*_wanted(params), key)
                self._reply(sender, TableAnswer(request.ticket, answer(params, found)))
            case "roles":
                names = self._rows.role_names(_after(params), MAX_ROLES)
                listed = {"roles": names, "more": len(names) == MAX_ROLES}
                self._reply(sender, TableAnswer(request.ticket, listed))
            case "waitFor":
                self._wait(request, sender)
            case "watch":
                number = _number(params)
                role, wanted = _wanted(params)
                _check_range(wanted)
                self._watches.add(sender, number, role, wanted, key)
                watched = self._list(role, wanted)
                if watched.cut:
                    watched = self._list(role, wanted, _part(key))
                self._reply(sender, TableAnswer(request.ticket, {"services": watched.items}))
            case "unwatch":
                self._watches.remove(sender, _number(params))
                self._reply(sender, TableAnswer(request.ticket, {}))
            case _:
                raise Refused("Unknown method")

    def _register(self, request: TableRequest, sender: ActorAddress) -> None:
        service, key = _service(request.params), request.remote_public_key
        entry = self._rows.register(sender, service, key, self.now)
        self._counters["registered"] += 1
        result = {"meta": service.meta, "ok": True}
        self._reply(sender, TableAnswer(request.ticket, result), changes=True)
        self._registered(entry)

    def _lease(self, request: TableRequest, sender: ActorAddress) -> None:
        params = request.params
        if not isinstance(params, Mapping):
            raise Refused("needs params: an object with statement and signature")
        signed = self._verifier.verify(params.get("statement"), params.get("signature"))
        unix = self._clock()
        lease.check_time(signed, unix)
        outcome = self._rows.lease(sender, signed, request.remote_public_key, self.now, unix)
        self._gone(outcome.gone)
        if outcome.entry is None:
            self._counters["withdrawn"] += 1
        elif outcome.changed:
            self._counters["leased"] += 1
            self._registered(outcome.entry)
        else:
            self._counters["renewed"] += 1
            self._write_lazily()
        ttl = int(signed.ttl) if signed.ttl.is_integer() else signed.ttl
        changes = outcome.changed or signed.withdrawal
        self._reply(sender, TableAnswer(request.ticket, {"ttl": ttl}), changes)

    def _wait(self, request: TableRequest, sender: ActorAddress) -> None:
        role, wanted = _wanted(request.params)
        found = self._rows.query(role, wanted, request.remote_public_key)
        if found:
            self._reply(sender, TableAnswer(request.ticket, found[0].shape_a))
            return
        _check_range(wanted)
        self._waiters.add(sender, request.ticket, role, wanted, self.now)

    def _registered(self, entry: Entry[ActorAddress]) -> None:
        self._news.append(ServiceRegistered(entry.info))
        for waiter in self._waiters.take(*entry.place):
            self._reply(waiter.session, TableAnswer(waiter.ticket, entry.shape_a))

    def _gone(self, entries: Iterable[Entry[ActorAddress]]) -> None:
        self._news += [ServiceGone(entry.info) for entry in entries]

    # Sessions and deadlines

    @handles(Down)
    def _session_died(self, message: Down, _sender: ActorAddress) -> None:
        session, in_order = message.address, message.reason == NORMAL
        self._monitored.discard(session)
        self._waiters.drop(session)
        self._watches.drop(session)
        self._gone(self._rows.session_ended(session, in_order, self.now, self._clock()))
        self._commit_soon()

    @handles(_Alarm)
    def _on_alarm(self, _message: _Alarm, _sender: ActorAddress) -> None:
        self._alarm = None
        gone = self._rows.expire(self.now, self._clock())
        self._counters["expired"] += len(gone)
        self._gone(gone)
        for waiter in self._waiters.expire(self.now):
            self._reply(waiter.session, TableRefusal(waiter.ticket, WAIT_OVER))
        self._commit_soon()

    def _write_lazily(self) -> None:
        if self._write_at is None:
            self._write_at = self.now + LAZY

    def _set_alarm(self) -> None:
        """The one timer, for whatever comes first."""
        deadlines = (
            self._rows.deadline(),
            self._waiters.deadline(),
            self._watches.deadline(),
            self._write_at,
        )
        first = min((when for when in deadlines if when is not None), default=None)
        if first is None or (self._alarm is not None and self._alarm_at <= first):
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = first
        self._alarm = self.after(max(0.0, first - self.now), _Alarm())

    # Answers, once they are true

    def _reply(
        self, session: ActorAddress, message: TableAnswer | TableRefusal, changes: bool = False
    ) -> None:
        """Send it in its turn: no answer overtakes one that waits for the commit."""
        if not changes and not self._outbox:
            self.send(session, message)
            return
        self._outbox.append((session, message, changes))
        self._commit_soon()

    def _commit_soon(self) -> None:
        if not self._commit_sent:
            self._commit_sent = True
            self.send(self.myAddress, _Commit())

    @handles(_Commit)
    def _on_commit(self, _message: _Commit, _sender: ActorAddress) -> None:
        self._commit_sent = False
        if self._write_at is not None and self._write_at <= self.now:
            self._rows.write_renewals(MAX_RENEWALS)
            left = self._rows.unwritten
            self._write_at = self.now + RENEWALS_PAUSE if left else None
        failure = self._commit()
        outbox, self._outbox = self._outbox, []
        for session, message, changes in outbox:
            if changes and failure is not None:
                message = TableRefusal(message.ticket, failure)
            self.send(session, message)
        news, self._news = self._news, []
        for piece in news:
            tell(self, piece)
        self._notify()
        self._set_alarm()

    def _commit(self) -> str | None:
        """Write what has changed; why that failed. Then it stays to be written."""
        try:
            self._store.commit()
        except CommitFailed as error:
            self.log.error("store.failed", error=str(error))
            self._counters["store.failed"] += 1
            if self._write_at is None:
                self._write_at = self.now + LAZY
            return str(error)
        return None

    def _notify(self) -> None:
        for group in self._watches.due(self.now):
            size = self._tell_group(group)
            self._watches.told(group, self.now, size)

    def _tell_group(self, group: Group[ActorAddress]) -> int:
        """Send the group's watches their lists; returns the bytes of one."""
        shared = self._list(group.role, group.wanted)
        lists: dict[bytes, _List] = {}
        for (session, number), key in group.watches.items():
            mine = shared
            if shared.cut:
                part = _part(key)
                if part not in lists:
                    lists[part] = self._list(group.role, group.wanted, part)
                mine = lists[part]
            self.send(session, TableNotice(number, mine.items))
        return shared.size

    def _list(self, role: str, wanted: str | None, asker: bytes = b"") -> _List:
        found = self._rows.query(role, wanted, asker)
        items = _items(found)
        cut = len(items) < len(found) or len(found) >= MAX_RESULTS
        return _List(items, cut, sum(entry.size for entry in found[: len(items)]))

    # Looking in

    @handles(Counted)
    def _count(self, message: Counted, _sender: ActorAddress) -> None:
        self._counters[message.name] += 1

    @handles(Describe)
    def _describe(self, _message: Describe, sender: ActorAddress) -> None:
        rows, now = self._rows, self.now
        fields = {
            "roles": rows.roles,
            "instances": len(rows),
            "buried": rows.buried,
            "waiting": len(self._waiters),
            "watches": len(self._watches),
            "counters": dict(sorted(self._counters.items())),
            "services": [_described(entry, now) for entry in islice(rows, MAX_DESCRIBED)],
        }
        self.send(sender, Described(fields))


def answer(params: Any, entries: list[Entry[Any]]) -> list[dict[str, Any]]:
    """The answer to `query`: shape C, or with more in each item where the params ask for
    `details`, which no Node program knows of. What would make the line too long is left out."""
    details = isinstance(params, Mapping) and params.get("details") is True
    return _items(entries, details)


def _after(params: Any) -> str:
    """Behind which role a list of roles goes on."""
    after = params.get("after", "") if isinstance(params, Mapping) else ""
    if not isinstance(after, str):
        raise Refused("after must be a role, which is a text")
    return after


def _part(key: bytes) -> bytes:
    """What a watcher shares a list with others by, when there are too many services for one."""
    return bytes([key[0] & 0xF0])


def _items(entries: list[Entry[Any]], details: bool = True) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    size = 0
    for entry in entries:
        size += entry.size
        if size > MAX_ANSWER:
            break
        items.append(entry.details if details else entry.shape_c)
    return items


def _described(entry: Entry[Any], now: float) -> dict[str, Any]:
    signed = entry.lease
    remaining = entry.ends - now
    return {
        "role": entry.role,
        "version": entry.version,
        "key": entry.service_key.hex(),
        "verified": signed is not None,
        "instance": signed.instance if signed is not None else None,
        "connection": entry.remote_key.hex(),
        "connected": bool(entry.sessions),
        "age": round(now - entry.since, 3),
        "renewed": round(now - entry.renewed, 3),
        # None for as long as the session lasts.
        "remaining": round(remaining, 3) if remaining < float("inf") else None,
    }


def _service(params: Any) -> Service:
    """What `register` and `unregister` have in their params, checked."""
    if not isinstance(params, Mapping):
        raise Refused("needs params: an object with meta and servicePublicKey")
    meta: Any = params.get("meta")
    size = check_meta(meta)
    if matching.valid(meta.get("version")) is None:
        raise Refused(BAD_VERSION)
    service_key = params.get("servicePublicKey")
    if not service_key:
        raise Refused(NO_KEY)
    try:
        return Service(meta, parse_key(service_key if isinstance(service_key, str) else ""), size)
    except InvalidInput as error:
        raise Refused(f"servicePublicKey: {error}") from error


def _wanted(params: Any) -> tuple[str, str | None]:
    """Role and range that `query`, `waitFor` and `watch` have in their params; None for any
    version."""
    check_meta(params)
    wanted = params.get("version")
    if wanted is not None and not isinstance(wanted, str):
        raise Refused("the version must be a text")
    return params["role"], wanted


def _check_range(wanted: str | None) -> None:
    # What is no range matches nothing, ever: nobody shall wait for that.
    if wanted is not None and not matching.valid_range(wanted):
        raise Refused("not a version range")


def _number(params: Any) -> int:
    number = params.get("id") if isinstance(params, Mapping) else None
    if type(number) is not int or not 0 < number < 2**53:
        raise Refused("needs params with an id, which is a positive integer")
    return number
