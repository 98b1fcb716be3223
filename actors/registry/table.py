"""The registry's table: who offers what, and who waits for it (spec: registry 6.2, 6.7).

`Table` is the logic, without clock and actors; `TableActor` answers the sessions with it. An entry
belongs to the session that registered it and goes with it, so the table never tells of a service
whose registration connection is known to be gone.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from thespian.actors import ActorAddress

from ...transport.errors import InvalidInput, RemoteError
from ...transport.keys import blake2b, parse_key
from ...transport.rpc import ABSENT
from ..actor import Actor, Down, handles
from ..messages import (
    ServiceGone,
    ServiceRegistered,
    TableAnswer,
    TableRefusal,
    TableRequest,
)
from . import matching
from .roles import Meta

#: Bytes of a description as JSON: what programs send has about 100, and each is kept in memory.
MAX_META = 16 * 1024
#: Characters of a role name. It is part of every answer about it.
MAX_ROLE = 1024
#: Entries of one session: a service program registers one.
MAX_ENTRIES_PER_SESSION = 256
#: Entries in all: about 1 KiB of memory each, 16 KiB at worst.
MAX_ENTRIES = 20_000
#: Different versions of one role: each is compared with the range at every query of the role.
MAX_VERSIONS = 256
#: Entries in one answer, of about 150 bytes each: more than a proxy can use.
MAX_RESULTS = 256
#: Bytes of one answer, by a generous estimate: its line must stay below `transport.rpc.MAX_LINE`.
MAX_ANSWER = 512 * 1024
#: Requests of one session that wait for a service: a proxy program has one.
MAX_WAITERS_PER_SESSION = 64
#: Requests in all that wait for a service.
MAX_WAITERS = 10_000
#: Seconds that a request waits for a service (spec: registry 6.3).
WAIT = 15.0

#: What the Node programs answer in these cases; clients may compare them (spec: registry 6.2).
BAD_VERSION = "needs to be valid semver"
NO_KEY = "info needs an id property"
WAIT_OVER = "timeout waiting for service"

#: Who registered and who waits: in the table of an actor the address of a session.
Holder = TypeVar("Holder", bound=Hashable)


class Refused(RemoteError):
    """A request that the registry does not fulfil; its text is the answer."""


@dataclass(frozen=True, slots=True)
class Entry(Generic[Holder]):
    """One service, as one session registered it."""

    holder: Holder
    meta: Meta
    #: 64 lower-case hexadecimal digits, as in all answers.
    service_key: str
    remote_key: str
    #: Bytes of the description as JSON.
    size: int

    @property
    def role(self) -> str:
        return str(self.meta["role"])

    @property
    def version(self) -> str:
        """As registered: may have a `v`, white space and build metadata around it."""
        return str(self.meta["version"])

    @property
    def info(self) -> dict[str, Any]:
        """What the registry prints of it, and the `info` of shape A."""
        return {"id": self.service_key, "remotePublicKey": self.remote_key, "meta": self.meta}

    @property
    def shape_a(self) -> dict[str, Any]:
        """The answer to `waitFor`."""
        return {"meta": self.meta, "info": self.info}

    @property
    def shape_c(self) -> dict[str, Any]:
        """One item of the answer to `query`."""
        return {
            "servicePublicKey": self.service_key,
            "role": self.role,
            "version": self.version,
            "prerelease": matching.prerelease(self.version),
        }

    @property
    def details(self) -> dict[str, Any]:
        """The same with what else is known, for clients that ask for `details`: ours."""
        return self.shape_c | {"remotePublicKey": self.remote_key, "meta": self.meta}


@dataclass(frozen=True, slots=True)
class Waiter(Generic[Holder]):
    """A request that is answered when somebody registers what it wants."""

    holder: Holder
    ticket: int
    role: str
    wanted: str | None
    remote_key: bytes
    deadline: float


class Table(Generic[Holder]):
    """Entries and waiters. Times are seconds on any clock that only moves forward."""

    def __init__(self) -> None:
        # Role, version without build metadata, key: one entry, whoever registers it again.
        self._roles: dict[str, dict[str, dict[str, Entry[Holder]]]] = {}
        self._held: dict[Holder, dict[tuple[str, str, str], None]] = {}
        self._entries = 0
        # All wait equally long, so the order of insertion is the order of the deadlines.
        self._waiters: dict[tuple[Holder, int], Waiter[Holder]] = {}
        self._waiting_for: dict[str, dict[tuple[Holder, int], None]] = {}
        self._waiting: dict[Holder, dict[int, None]] = {}

    def __len__(self) -> int:
        return self._entries

    def __iter__(self) -> Iterator[Entry[Holder]]:
        return (
            entry
            for versions in self._roles.values()
            for keys in versions.values()
            for entry in keys.values()
        )

    @property
    def waiters(self) -> int:
        return len(self._waiters)

    def register(
        self, holder: Holder, params: Any, remote_key: bytes
    ) -> tuple[Entry[Holder], list[Waiter[Holder]]]:
        """The entry and the waiters that it answers, which wait no longer.

        The same service registered again, by this session or another, replaces what there was.
        Raises `Refused`.
        """
        meta, service_key = _service(params)
        place = _place(meta, service_key)
        if place not in self._held.get(holder, ()):
            self._check_room(holder, *place)
        self._remove(place)
        entry = Entry(holder, meta, service_key, remote_key.hex(), _size(meta))
        role, version, _ = place
        self._roles.setdefault(role, {}).setdefault(version, {})[service_key] = entry
        self._held.setdefault(holder, {})[place] = None
        self._entries += 1
        answered = [
            waiter
            for waiter in map(self._waiters.__getitem__, self._waiting_for.get(role, ()))
            if _accepts(waiter.wanted, version)
        ]
        for waiter in answered:
            self._forget(waiter)
        return entry, answered

    def unregister(self, holder: Holder, params: Any, remote_key: bytes) -> Entry[Holder] | None:
        """The entry that went, or None: that is no error.

        Only the session that registered it and the owner of the service's key take an entry out.
        Raises `Refused`.
        """
        place = _place(*_service(params))
        entry = self._at(place)
        if entry is None:
            return None
        if entry.holder != holder and entry.service_key != remote_key.hex():
            raise Refused("registered by another connection: only that one can unregister it")
        return self._remove(place)

    def query(self, params: Any, asker: bytes) -> list[Entry[Holder]]:
        """The entries that match, at most `MAX_RESULTS`: highest version first, and among entries
        of one version an order of the asker's own, always the same, which spreads the askers who
        take the first. Raises `Refused`."""
        role, wanted = _wanted(params)
        versions = self._roles.get(role)
        if versions is None:
            return []
        found: list[Entry[Holder]] = []
        accepted = (version for version in versions if _accepts(wanted, version))
        for version in sorted(accepted, key=_preference(wanted), reverse=True):
            keys = versions[version]
            order = sorted(keys, key=lambda key: blake2b(asker, key.encode()))
            found += map(keys.__getitem__, order[: MAX_RESULTS - len(found)])
            if len(found) == MAX_RESULTS:
                break
        return found

    def wait(
        self, holder: Holder, ticket: int, params: Any, remote_key: bytes, now: float
    ) -> Entry[Holder] | None:
        """The entry to answer with at once; None when the request waits. Raises `Refused`."""
        found = self.query(params, remote_key)
        if found:
            return found[0]
        role, wanted = _wanted(params)
        if wanted is not None and not matching.valid_range(wanted):
            raise Refused("not a version range")
        waiting = self._waiting.setdefault(holder, {})
        if len(waiting) >= MAX_WAITERS_PER_SESSION or len(self._waiters) >= MAX_WAITERS:
            raise Refused("too many requests wait for a service")
        waiter = Waiter(holder, ticket, role, wanted, remote_key, now + WAIT)
        self._waiters[holder, ticket] = waiter
        self._waiting_for.setdefault(role, {})[holder, ticket] = None
        waiting[ticket] = None
        return None

    def deadline(self) -> float | None:
        """When `expire` must be called next."""
        return next((waiter.deadline for waiter in self._waiters.values()), None)

    def expire(self, now: float) -> list[Waiter[Holder]]:
        """The waiters whose time is over; they wait no longer."""
        expired: list[Waiter[Holder]] = []
        for waiter in self._waiters.values():
            if waiter.deadline > now:
                break
            expired.append(waiter)
        for waiter in expired:
            self._forget(waiter)
        return expired

    def drop(self, holder: Holder) -> list[Entry[Holder]]:
        """Forget everything of a session that is gone; returns its entries."""
        for ticket in tuple(self._waiting.get(holder, ())):
            self._forget(self._waiters[holder, ticket])
        self._waiting.pop(holder, None)
        places = tuple(self._held.get(holder, ()))
        gone = [entry for entry in map(self._remove, places) if entry is not None]
        self._held.pop(holder, None)
        return gone

    def _check_room(self, holder: Holder, role: str, version: str, service_key: str) -> None:
        if len(self._held.get(holder, ())) >= MAX_ENTRIES_PER_SESSION:
            raise Refused(f"one connection registers at most {MAX_ENTRIES_PER_SESSION} services")
        versions = self._roles.get(role, {})
        if version not in versions and len(versions) >= MAX_VERSIONS:
            raise Refused(f"one role has at most {MAX_VERSIONS} versions")
        if self._entries >= MAX_ENTRIES and service_key not in versions.get(version, ()):
            raise Refused("the registry is full")

    def _at(self, place: tuple[str, str, str]) -> Entry[Holder] | None:
        role, version, service_key = place
        return self._roles.get(role, {}).get(version, {}).get(service_key)

    def _remove(self, place: tuple[str, str, str]) -> Entry[Holder] | None:
        entry = self._at(place)
        if entry is None:
            return None
        role, version, service_key = place
        versions = self._roles[role]
        del versions[version][service_key]
        if not versions[version]:
            del versions[version]
        if not versions:
            del self._roles[role]
        del self._held[entry.holder][place]
        if not self._held[entry.holder]:
            del self._held[entry.holder]
        self._entries -= 1
        return entry

    def _forget(self, waiter: Waiter[Holder]) -> None:
        place = waiter.holder, waiter.ticket
        del self._waiters[place]
        del self._waiting_for[waiter.role][place]
        if not self._waiting_for[waiter.role]:
            del self._waiting_for[waiter.role]
        del self._waiting[waiter.holder][waiter.ticket]
        if not self._waiting[waiter.holder]:
            del self._waiting[waiter.holder]


@dataclass(frozen=True, slots=True)
class _Alarm:
    """The first waiter's time may be over."""


class TableActor(Actor):
    """Answers `TableRequest`; the sender is the session that entries and waiters belong to.

    Args: none. Context: ``console``, if there is one, gets a `ServiceRegistered` for every
    registration and a `ServiceGone` for every entry that went.
    """

    def on_start(self, _args: None) -> None:
        self._observer = self.context.get("console")
        self._table: Table[ActorAddress] = Table()
        self._monitored: set[ActorAddress] = set()
        self._alarm_set = False
        self.ready()

    @handles(TableRequest)
    def _request(self, message: TableRequest, sender: ActorAddress) -> None:
        if sender not in self._monitored:
            self._monitored.add(sender)
            self.monitor(sender)
        try:
            self._answer(message, sender)
        except Refused as refusal:
            self.send(sender, TableRefusal(message.ticket, str(refusal)))

    def _answer(self, request: TableRequest, sender: ActorAddress) -> None:
        table, key, params = self._table, request.remote_public_key, request.params
        result: Any = ABSENT
        match request.method:
            case "register":
                entry, answered = table.register(sender, params, key)
                result = {"meta": entry.meta, "ok": True}
                self._tell(ServiceRegistered(entry.info))
                for waiter in answered:
                    self.send(waiter.holder, TableAnswer(waiter.ticket, entry.shape_a))
            case "unregister":
                gone = table.unregister(sender, params, key)
                if gone is not None:
                    self._tell(ServiceGone(gone.info))
            case "query":
                result = answer(params, table.query(params, key))
            case "waitFor":
                found = table.wait(sender, request.ticket, params, key, self.now)
                if found is None:
                    self._set_alarm()
                    return
                result = found.shape_a
            case _:
                raise Refused("Unknown method")
        self.send(sender, TableAnswer(request.ticket, result))

    @handles(Down)
    def _session_died(self, message: Down, _sender: ActorAddress) -> None:
        self._monitored.discard(message.address)
        for entry in self._table.drop(message.address):
            self._tell(ServiceGone(entry.info))

    def _set_alarm(self) -> None:
        deadline = self._table.deadline()
        if deadline is not None and not self._alarm_set:
            self._alarm_set = True
            self.after(max(0.0, deadline - self.now), _Alarm())

    @handles(_Alarm)
    def _on_alarm(self, _message: _Alarm, _sender: ActorAddress) -> None:
        self._alarm_set = False
        for waiter in self._table.expire(self.now):
            self.send(waiter.holder, TableRefusal(waiter.ticket, WAIT_OVER))
        self._set_alarm()

    def _tell(self, event: ServiceRegistered | ServiceGone) -> None:
        if self._observer is not None:
            self.send(self._observer, event)


def answer(params: Any, entries: list[Entry[Holder]]) -> list[dict[str, Any]]:
    """The answer to `query`: shape C, or with more in each item where the params ask for
    `details`, which no Node program knows of. What would make the line too long is left out."""
    details = isinstance(params, Mapping) and params.get("details") is True
    items: list[dict[str, Any]] = []
    size = 0
    for entry in entries:
        # The description, its role and version once more, and the keys; escapes included.
        size += 2 * entry.size + 1024
        if size > MAX_ANSWER:
            break
        items.append(entry.details if details else entry.shape_c)
    return items


def _service(params: Any) -> tuple[Meta, str]:
    """The checked description and key that `register` and `unregister` have in their params."""
    if not isinstance(params, Mapping):
        raise Refused("needs params: an object with meta and servicePublicKey")
    meta = _checked(params.get("meta"))
    if matching.valid(meta.get("version")) is None:
        raise Refused(BAD_VERSION)
    service_key = params.get("servicePublicKey")
    if not service_key:
        raise Refused(NO_KEY)
    try:
        return meta, parse_key(service_key if isinstance(service_key, str) else "").hex()
    except InvalidInput as error:
        raise Refused(f"servicePublicKey: {error}") from error


def _wanted(params: Any) -> tuple[str, str | None]:
    """Role and range that `query` and `waitFor` have in their params; None for any version."""
    meta = _checked(params)
    wanted = meta.get("version")
    if wanted is not None and not isinstance(wanted, str):
        raise Refused("the version must be a text")
    return meta["role"], wanted


def _checked(meta: Any) -> Meta:
    if not isinstance(meta, Mapping):
        raise Refused("needs a meta object with a role")
    role = meta.get("role")
    if not isinstance(role, str) or not role:
        raise Refused("needs a role, which is a text")
    if len(role) > MAX_ROLE:
        raise Refused(f"a role has at most {MAX_ROLE} characters")
    if _size(meta) > MAX_META:
        raise Refused(f"a meta object has at most {MAX_META} bytes")
    return meta


def _size(meta: Meta) -> int:
    return len(json.dumps(meta))


def _place(meta: Meta, service_key: str) -> tuple[str, str, str]:
    return meta["role"], matching.valid(meta["version"]) or "", service_key


def _accepts(wanted: str | None, version: str) -> bool:
    # A description without a version asks for any, prereleases too (spec: registry 6.4).
    return wanted is None or matching.satisfies(version, wanted)


def _preference(wanted: str | None) -> Any:
    if wanted is not None:
        return matching.precedence
    # Nobody asked for a prerelease: releases come first.
    return lambda version: ("-" not in version, matching.precedence(version))
