"""Who offers what: signed leases and plain registrations, with their owners, limits and ends.

Pure logic: times are arguments, `now` in seconds on a clock that only moves forward and `unix` in
seconds of Unix time. What has to survive a restart is put into a `Store`, and whoever calls commits
it. The rules are those of ``docs/registry-protocol.md``.
"""

from __future__ import annotations

import gc
import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from heapq import nlargest, nsmallest
from itertools import islice
from operator import itemgetter
from typing import Any, Generic

from ...transport.keys import blake2b
from . import matching
from .deadlines import Deadlines
from .entries import (
    Entry,
    Outcome,
    Place,
    Service,
    Session,
    from_record,
    place,
    to_row,
    whole_size,
)
from .lease import MAX_SKEW, Lease, Refused
from .roles import Meta
from .store import Record, Store

#: Instances of one session: a service program has one, one that stands for many a few hundred.
MAX_ENTRIES_PER_SESSION = 1000
#: Entries in all: about 2 KiB of memory each when descriptions are of the usual size.
MAX_ENTRIES = 200_000
#: Bytes of all descriptions and statements, which may be larger than usual.
MAX_BYTES = 1024 * 1024 * 1024
#: Different versions of one role: each is compared with the range at every query of the role.
MAX_VERSIONS = 256
#: Plain registrations of one service key, under all roles and by all connections: they are
#: searched. Connections that have the key may make as many again, whatever others have done.
MAX_PER_KEY = 1024
#: Entries in one answer, of 150 to 1,000 bytes each: more than a proxy can use.
MAX_RESULTS = 256
#: Ended leases whose last sequence is remembered. Beyond it, the one to be forgotten next goes.
MAX_BURIED = 200_000
#: Entries out of the store, at least, that Python's collector leaves alone from then on: there is
#: no garbage among them, and its look at 100,000 has everybody wait for a quarter of a second.
FREEZE = 10_000
#: Whether a version is in a range is remembered for this many pairs.
CACHE_SIZE = 65_536

#: Seconds for a client to come back after its session broke.
GRACE = 5.0
#: Seconds for the owners of what a restarted registry has read from its store.
RESTART_GRACE = 30.0
#: Seconds of Unix time for which the last sequence of an ended lease is remembered: no statement
#: that was acceptable then is acceptable after that.
BURIED_FOR = 2 * MAX_SKEW


class _Version(Generic[Session]):
    """The services of one version: their entries by service key, the latest last."""

    __slots__ = ("claims", "order")

    def __init__(self) -> None:
        self.claims: dict[bytes, list[Entry[Session]]] = {}
        # The keys in order, once there were too many for one answer.
        self.order: list[bytes] | None = None

    def add(self, entry: Entry[Session]) -> None:
        key = entry.service_key
        claims = self.claims.get(key)
        if claims is not None:
            claims.append(entry)
            return
        self.claims[key] = [entry]
        if self.order is not None:
            insort(self.order, key)

    def remove(self, entry: Entry[Session]) -> None:
        key = entry.service_key
        claims = self.claims[key]
        claims.remove(entry)
        if claims:
            return
        del self.claims[key]
        if self.order is not None:
            del self.order[bisect_left(self.order, key)]

    def move_last(self, entry: Entry[Session]) -> bool:
        """Make it the latest of its service; whether it was not."""
        claims = self.claims[entry.service_key]
        if claims[-1] is entry:
            return False
        claims.remove(entry)
        claims.append(entry)
        return True

    def find(self, service_key: bytes, holder: bytes) -> Entry[Session] | None:
        claims = self.claims.get(service_key, ())
        return next((entry for entry in claims if entry.holder == holder), None)

    def chosen(self, asker: bytes, limit: int) -> list[Entry[Session]]:
        """One entry a service, at most ``limit``, in an order of the asker's own."""
        if len(self.claims) == 1:
            keys = [*self.claims]
        elif len(self.claims) <= MAX_RESULTS:
            keys = sorted(self.claims, key=lambda key: blake2b(asker, key))[:limit]
        else:
            # All keys on a ring, and each asker begins somewhere.
            if self.order is None:
                self.order = sorted(self.claims)
            start = bisect_left(self.order, blake2b(asker))
            keys = self.order[start : start + limit]
            keys += self.order[: limit - len(keys)]
        return [self.shown(key) for key in keys]

    def shown(self, service_key: bytes) -> Entry[Session]:
        """The entry that speaks for a service: its own, or else the latest."""
        claims = self.claims[service_key]
        if len(claims) > 1:
            own = self.find(service_key, service_key)
            if own is not None:
                return own
        return claims[-1]


class Rows(Generic[Session]):
    """All entries, each found by role and version, by service key, by session and by its end.

    ``changed`` is called with role and version whenever what is told of them has changed.
    """

    def __init__(self, store: Store, changed: Callable[[str, str], None]) -> None:
        self._store = store
        self._changed = changed
        self._roles: dict[str, dict[str, _Version[Session]]] = {}
        self._of_key: dict[bytes, list[Entry[Session]]] = {}
        self._held: dict[Session, dict[Entry[Session], None]] = {}
        self._deadlines: Deadlines[Entry[Session]] = Deadlines()
        # Ended leases: last sequence, and until when (on the clock of `now`) it is remembered.
        self._buried: OrderedDict[bytes, tuple[int, float]] = OrderedDict()
        # Leases whose renewal is not in the store yet.
        self._unwritten: dict[Entry[Session], None] = {}
        self._entries = 0
        self._bytes = 0

    def __len__(self) -> int:
        return self._entries

    def __iter__(self) -> Iterator[Entry[Session]]:
        return (entry for entries in self._of_key.values() for entry in entries)

    @property
    def roles(self) -> int:
        return len(self._roles)

    @property
    def buried(self) -> int:
        return len(self._buried)

    @property
    def unwritten(self) -> int:
        """Renewals that `write_renewals` would put into the store."""
        return len(self._unwritten)

    def restore(self, now: float, unix: float) -> list[Record]:
        """Take over what the store has: each entry gets `RESTART_GRACE` seconds in which its owner
        can come back. Returns the rows that cannot be used, which are taken out of the store."""
        buried = nlargest(MAX_BURIED, self._store.buried(), key=itemgetter(2))
        for key, sequence, until in reversed(buried):
            self._buried[key] = sequence, now + min(until - unix, BURIED_FOR)
        unusable: list[Record] = []
        if gc.get_freeze_count():
            # A table that is no more may be among it.
            gc.unfreeze()
            gc.collect()
        with _without_collector():
            for record in self._store.records():
                entry: Entry[Session] | None = from_record(record, now)
                if entry is None or self._entries >= MAX_ENTRIES:
                    unusable.append(record)
                    continue
                entry.ends = now + RESTART_GRACE
                self._insert(entry)
            self._deadlines.set_first(self)
            if self._entries >= FREEZE:
                gc.freeze()
        for record in unusable:
            self._store.remove(record[:4])
        return unusable

    def register(
        self, session: Session, service: Service, holder: bytes, now: float
    ) -> Entry[Session]:
        """The entry that a connection with the key ``holder`` has made or made anew. Raises
        `Refused`: leased, limit."""
        leased = self._leased(service.key)
        if leased is not None and holder != service.key:
            raise Refused("the service has a signed lease: only its own key changes it", "leased")
        role, version = where = service.place
        if leased is not None and leased.place == where:
            return leased  # which says the same, and proves it
        entry = self._at(where, service.key, holder)
        size = whole_size(service.meta, service.size)
        self._check_room(session, where, size, entry)
        if entry is None:
            limit = 2 * MAX_PER_KEY if holder == service.key else MAX_PER_KEY
            if len(self._of_key.get(service.key, ())) >= limit:
                raise Refused(f"{limit} registrations of this key are there already", "limit")
            entry = Entry(service.key, holder, where, service.meta, holder, size, now, now)
            self._insert(entry)
            self._store.put(to_row(entry))
            self._changed(role, version)
        else:
            self._register_again(entry, service.meta, size, now)
        self._hold(session, entry)
        return entry

    def lease(
        self, session: Session, lease: Lease, remote_key: bytes, now: float, unix: float
    ) -> Outcome[Session]:
        """Make, renew, replace or withdraw the lease of a key by a verified statement, whose time
        has been checked. Raises `Refused`: replayed, limit."""
        last = self._last_sequence(lease.key, now)
        if lease.sequence <= last:
            raise Refused(f"stale sequence, the last was {last}", "replayed")
        if lease.withdrawal:
            gone = [*self._of_key.get(lease.key, ())]
            for entry in gone:
                self._forget(entry)
            self._bury(lease.key, lease.sequence, now, unix)
            return Outcome(None, bool(gone), gone)
        where, size = place(lease.meta), whole_size(lease.meta, lease.meta_size, lease)
        entry = self._leased(lease.key)
        self._check_room(session, where, size, entry)
        others = [one for one in self._of_key.get(lease.key, ()) if one is not entry]
        before = None if entry is None else entry.lease
        changed = before is None or before.meta != lease.meta or before.instance != lease.instance
        if entry is not None and entry.place != where:
            others.append(entry)
            entry = None
        for other in others:
            self._forget(other)
        if entry is None:
            entry = Entry(
                lease.key,
                lease.key,
                where,
                lease,
                remote_key,
                size,
                now,
                now,
                lease.sequence,
            )
            self._insert(entry)
        else:
            self._resize(entry, size)
            entry.say(lease)
            entry.remote_key, entry.renewed = remote_key, now
        self._hold(session, entry)
        self._schedule(entry, now + lease.ttl)
        if changed:
            self._unwritten.pop(entry, None)
            self._store.put(to_row(entry))
            self._changed(*where)
        else:
            self._unwritten[entry] = None
        return Outcome(entry, changed, [one for one in others if one.place != where])

    def unregister(
        self, service: Service, remote_key: bytes, now: float, unix: float
    ) -> list[Entry[Session]]:
        """The entries that went, possibly none: that is no error.

        A connection takes out what its key has registered, and everything of a service whose own
        key it has. Raises `Refused`: policy.
        """
        claims = [one for one in self._of_key.get(service.key, ()) if one.place == service.place]
        gone = [one for one in claims if remote_key in (one.holder, one.service_key)]
        if claims and not gone:
            raise Refused(
                "registered by another connection: only that one, and the service's own key, can "
                "unregister it",
                "policy",
            )
        for entry in gone:
            self._end(entry, now, unix)
        return gone

    def query(self, role: str, wanted: str | None, asker: bytes) -> list[Entry[Session]]:
        """The entries that match, one a service and version, at most `MAX_RESULTS`: highest version
        first, and among those of one version an order of the asker's own, always the same, which
        spreads the askers who take the first. ``wanted`` is a range, or None for any version."""
        versions = self._roles.get(role)
        if versions is None:
            return []
        found: list[Entry[Session]] = []
        accepted = [version for version in versions if accepts(wanted, version)]
        if len(accepted) > 1:
            accepted.sort(key=_releases_first if wanted is None else rank, reverse=True)
        for version in accepted:
            found += versions[version].chosen(asker, MAX_RESULTS - len(found))
            if len(found) >= MAX_RESULTS:
                break
        return found

    def role_names(self, after: str, limit: int) -> list[str]:
        """The first roles of which there are services, in the order of their code points, behind
        ``after``."""
        return nsmallest(limit, (role for role in self._roles if role > after))

    def session_ended(
        self, session: Session, in_order: bool, now: float, unix: float
    ) -> list[Entry[Session]]:
        """What a session has registered goes with it when it ended in order, else after `GRACE`;
        returns what went. An entry stays while another session has registered it too: a stranger
        who brings a lease that he has seen elsewhere takes nothing away when he goes."""
        gone: list[Entry[Session]] = []
        for entry in tuple(self._held.get(session, ())):
            self._let_go(session, entry)
            if entry.sessions:
                continue
            if in_order:
                self._end(entry, now, unix)
                gone.append(entry)
            else:
                self._schedule(entry, min(entry.ends, now + GRACE))
        return gone

    def deadline(self) -> float | None:
        """When `expire` must be called next."""
        return self._deadlines.first()

    def expire(self, now: float, unix: float) -> list[Entry[Session]]:
        """The entries whose time is over: they are gone."""
        gone = self._deadlines.pop(now)
        for entry in gone:
            self._end(entry, now, unix)
        self._exhume(now)
        return gone

    def write_renewals(self, limit: int = MAX_ENTRIES) -> None:
        """Put the leases into the store that have been renewed since, those first that have waited
        longest."""
        for entry in [*islice(self._unwritten, limit)]:
            del self._unwritten[entry]
            self._store.put(to_row(entry))

    def _register_again(self, entry: Entry[Session], meta: Meta, size: int, now: float) -> None:
        entry.renewed, entry.ends = now, math.inf
        role, version = entry.place
        latest = self._roles[role][version].move_last(entry)
        if entry.meta != meta:
            self._resize(entry, size)
            entry.say(meta)
            self._store.put(to_row(entry))
            self._changed(role, version)
        elif latest:
            self._changed(role, version)

    # Entries in the indices

    def _at(self, where: Place, service_key: bytes, holder: bytes) -> Entry[Session] | None:
        version = self._roles.get(where[0], {}).get(where[1])
        return None if version is None else version.find(service_key, holder)

    def _leased(self, key: bytes) -> Entry[Session] | None:
        return next((one for one in self._of_key.get(key, ()) if one.sequence is not None), None)

    def _insert(self, entry: Entry[Session]) -> None:
        role, version = entry.place
        versions = self._roles.get(role)
        if versions is None:
            versions = self._roles[role] = {}
        found = versions.get(version)
        if found is None:
            found = versions[version] = _Version()
        found.add(entry)
        of_key = self._of_key.get(entry.service_key)
        if of_key is None:
            self._of_key[entry.service_key] = [entry]
        else:
            of_key.append(entry)
        self._entries += 1
        self._bytes += entry.size

    def _remove(self, entry: Entry[Session]) -> None:
        """Out of all indices; the store still has it."""
        role, version = entry.place
        versions = self._roles[role]
        versions[version].remove(entry)
        if not versions[version].claims:
            del versions[version]
        if not versions:
            del self._roles[role]
        self._of_key[entry.service_key].remove(entry)
        if not self._of_key[entry.service_key]:
            del self._of_key[entry.service_key]
        for session in tuple(entry.sessions):
            self._let_go(session, entry)
        self._deadlines.cancel(entry)
        self._unwritten.pop(entry, None)
        self._entries -= 1
        self._bytes -= entry.size

    def _resize(self, entry: Entry[Session], size: int) -> None:
        self._bytes += size - entry.size
        entry.size = size

    def _forget(self, entry: Entry[Session]) -> None:
        self._remove(entry)
        self._store.remove((entry.service_key, entry.holder, *entry.place))
        self._changed(*entry.place)

    def _end(self, entry: Entry[Session], now: float, unix: float) -> None:
        self._forget(entry)
        if entry.sequence is not None:
            self._bury(entry.service_key, entry.sequence, now, unix)

    def _schedule(self, entry: Entry[Session], ends: float) -> None:
        entry.ends = ends
        self._deadlines.set(entry)

    def _hold(self, session: Session, entry: Entry[Session]) -> None:
        entry.sessions[session] = None
        self._held.setdefault(session, {})[entry] = None

    def _let_go(self, session: Session, entry: Entry[Session]) -> None:
        del entry.sessions[session]
        del self._held[session][entry]
        if not self._held[session]:
            del self._held[session]

    def _check_room(
        self, session: Session, where: Place, size: int, entry: Entry[Session] | None
    ) -> None:
        """Whether the session may have an entry of this size there, made of the one that there is,
        if any: it may be elsewhere now."""
        held = self._held.get(session, {})
        if len(held) >= MAX_ENTRIES_PER_SESSION and entry not in held:
            raise Refused(
                f"one connection registers at most {MAX_ENTRIES_PER_SESSION} services", "limit"
            )
        entries, taken = self._entries, self._bytes
        if entry is not None:
            entries, taken = entries - 1, taken - entry.size
        if entries >= MAX_ENTRIES or taken + size > MAX_BYTES:
            raise Refused("the registry is full", "limit")
        if entry is not None and entry.place == where:
            return
        versions = self._roles.get(where[0], {})
        if where[1] not in versions and len(versions) >= MAX_VERSIONS:
            raise Refused(f"one role has at most {MAX_VERSIONS} versions", "limit")

    # Ended leases

    def _last_sequence(self, key: bytes, now: float) -> int:
        """The highest that was accepted; below all that there are when nobody remembers."""
        self._exhume(now)
        buried, _ = self._buried.get(key, (-1, 0.0))
        leased = self._leased(key)
        if leased is None or leased.sequence is None:
            return buried
        return max(buried, leased.sequence)

    def _bury(self, key: bytes, sequence: int, now: float, unix: float) -> None:
        last, _ = self._buried.pop(key, (-1, 0.0))
        self._buried[key] = max(last, sequence), now + BURIED_FOR
        self._store.bury(key, sequence, unix + BURIED_FOR)
        if len(self._buried) > MAX_BURIED:
            self._store.forget(self._buried.popitem(last=False)[0])

    def _exhume(self, now: float) -> None:
        while self._buried:
            key, (_, until) = next(iter(self._buried.items()))
            if until > now:
                return
            del self._buried[key]


@lru_cache(CACHE_SIZE)
def accepts(wanted: str | None, version: str) -> bool:
    """Whether the range takes the version; None takes any, prereleases too (spec: registry 6.4)."""
    return wanted is None or matching.satisfies(version, wanted)


@lru_cache(CACHE_SIZE)
def rank(version: str) -> tuple[Any, ...]:
    """The order of versions without build metadata, lowest first: `matching.precedence` as a tuple,
    which is compared twenty times as fast."""
    major, minor, patch = map(int, version.partition("-")[0].split("."))
    parts = matching.prerelease(version)
    ranked = tuple((0, part, "") if isinstance(part, int) else (1, 0, part) for part in parts)
    return major, minor, patch, not parts, ranked


def _releases_first(version: str) -> tuple[Any, ...]:
    # Nobody asked for a prerelease.
    return "-" not in version, rank(version)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Around making many objects that all stay: looking for garbage among them takes a quarter of
    the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
