"""What a proxy knows of the instances of its service: who works, who has failed, who is due for
another trial. It holds no clock and no timer: every call says what time it is.

    trusted --failure--> set aside --time is over--> due --one connection begins--> on trial
       ^                     ^                                                         |
       |                     `---------------------------failure-----------------------|
       `-------------------------------------------------success-----------------------'
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from .balance import Balancer, newest_first
from .messages import ServiceRecord, ServiceWorked

#: Seconds that an instance is set aside at most, after its first failure and after many; each
#: failure in a row doubles it, and chance takes up to a half off, so that proxies do not come back
#: all at once.
BACKOFF_FIRST = 1.0
BACKOFF_LAST = 60.0
#: Seconds that one trial may take before another connection may try: a service that waits for its
#: client to speak says nothing for long.
TRIAL = 10.0
#: Seconds after which an attempt to connect gets a rival, before any has succeeded, and within
#: which limits it follows the typical time (spec: RFC 8305 section 5 has 0.25 s, from 0.1 to 2 s).
HEDGE_FIRST = 0.25
HEDGE_MIN = 0.1
HEDGE_MAX = 2.0
#: An attempt that takes so many times the typical time is late.
HEDGE_FACTOR = 4.0
#: A trusted instance is set aside when rivals have overtaken it so often in a row: a host that is
#: gone says nothing, and an attempt that has lost its race is not waited for.
MAX_OVERTAKEN = 3


@dataclass(slots=True, eq=False)
class Instance:
    """One service key. While it has failures it is not trusted."""

    record: ServiceRecord
    failures: int = 0
    #: Of the last failure, one line.
    reason: str = ""
    #: When it is due for a trial.
    due_at: float = 0.0
    #: Whose connection is the trial, and until when nobody else's is.
    tried_by: object = None
    trial_ends: float = 0.0
    #: Attempts in a row that a rival overtook.
    overtaken: int = 0
    #: When it answered last, and that connection.
    worked_at: float | None = None
    last: ServiceWorked | None = None

    def is_due(self, now: float) -> bool:
        if self.tried_by is not None and now < self.trial_ends:
            return False
        return self.failures > 0 and now >= self.due_at


class Instances:
    """Those that may be used, and which of them to try first."""

    def __init__(self, balancer: Balancer, rng: Random, verified_only: bool = False) -> None:
        self._balancer = balancer
        self._rng = rng
        self._verified_only = verified_only
        self._known: dict[bytes, Instance] = {}
        # Newest version first, without those that are refused.
        self._usable: tuple[Instance, ...] = ()

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, public_key: bytes) -> Instance:
        return self._known[public_key]

    @property
    def usable(self) -> int:
        """How many are not refused."""
        return len(self._usable)

    def is_trusted(self, public_key: bytes) -> bool:
        found = self._known.get(public_key)
        return found is not None and not found.failures and not self._is_refused(found)

    def update(self, records: Sequence[ServiceRecord]) -> list[bytes]:
        """These and no others exist. One that is new, or runs anew under its key, is trusted. The
        answer: keys of those that are trusted again."""
        before, again = self._known, []
        self._known = {}
        for record in newest_first(records):
            found = before.get(record.public_key)
            if found is None:
                found = Instance(record)
            elif found.failures and _runs_anew(found.record, record):
                found = Instance(record, worked_at=found.worked_at, last=found.last)
                again.append(record.public_key)
            found.record = record
            self._known[record.public_key] = found
        self._usable = tuple(each for each in self._known.values() if not self._is_refused(each))
        return again

    def choose(
        self, excluding: Collection[bytes], connections: Mapping[bytes, int], now: float
    ) -> list[ServiceRecord]:
        """Best first: the trusted, as the balancer has them, then those that were set aside, the
        one that is due first before others. One that is due takes its place among the trusted if
        that is the first one: whoever connects to it first must say so by `begin`."""
        trusted: list[ServiceRecord] = []
        aside: list[Instance] = []
        due: set[bytes] = set()
        for each in self._usable:
            key = each.record.public_key
            if key in excluding:
                continue
            if not each.failures:
                trusted.append(each.record)
                continue
            aside.append(each)
            if each.is_due(now):
                due.add(key)
                trusted.append(each.record)
        ordered = self._balancer.order(trusted, connections)
        if not aside:
            return ordered
        ordered = ordered[:1] + [each for each in ordered[1:] if each.public_key not in due]
        placed = {each.public_key for each in ordered[:1]}
        aside.sort(key=lambda each: each.due_at)
        return ordered + [each.record for each in aside if each.record.public_key not in placed]

    def begin(self, public_key: bytes, who: object, now: float) -> None:
        """``who`` connects to this one first. If it is due, that is its trial."""
        self._balancer.took(public_key)
        found = self._known.get(public_key)
        if found is not None and found.is_due(now):
            found.tried_by, found.trial_ends = who, now + TRIAL

    def release(self, public_key: bytes, who: object) -> bool:
        """``who`` ended without a result. Returns whether that was a trial, so that somebody else
        may try."""
        found = self._known.get(public_key)
        if found is None or found.tried_by is None or found.tried_by is not who:
            return False
        found.tried_by = None
        return True

    def failed(self, public_key: bytes, reason: str, now: float) -> bool:
        """Returns whether that was news: failures of connections that began before an instance was
        set aside are one."""
        found = self._known.get(public_key)
        if found is None:
            return False
        found.reason = reason
        if found.failures and found.tried_by is None and now < found.due_at:
            return False
        longest = min(BACKOFF_LAST, BACKOFF_FIRST * 2.0 ** min(found.failures, 16))
        found.failures += 1
        found.due_at = now + self._rng.uniform(longest / 2, longest)
        found.tried_by, found.overtaken = None, 0
        return True

    def overtaken(self, public_key: bytes, who: object, now: float) -> bool:
        """A rival connected first for ``who``. Returns whether this one is set aside for that."""
        found = self._known.get(public_key)
        if found is None:
            return False
        if found.failures:
            on_trial = found.tried_by is who
            return on_trial and self.failed(public_key, "a rival was faster on its trial", now)
        found.overtaken += 1
        if found.overtaken < MAX_OVERTAKEN:
            return False
        return self.failed(public_key, f"rivals were faster {found.overtaken} times", now)

    def connected(self, public_key: bytes) -> None:
        """It did so in time, whatever comes of it."""
        found = self._known.get(public_key)
        if found is not None:
            found.overtaken = 0

    def worked(self, public_key: bytes, now: float, news: ServiceWorked | None = None) -> bool:
        """Returns whether it was not trusted before."""
        found = self._known.get(public_key)
        if found is None:
            return False
        found.worked_at, found.last = now, news
        if not found.failures:
            return False
        found.failures, found.reason, found.tried_by = 0, "", None
        return True

    def due(self, now: float) -> Iterator[ServiceRecord]:
        """Those that one connection may try again."""
        return (each.record for each in self._usable if each.is_due(now))

    def next_due(self, now: float) -> float | None:
        """When one more is due, at the earliest."""
        times = (
            each.due_at if each.tried_by is None else each.trial_ends
            for each in self._usable
            if each.failures
        )
        return min((each for each in times if each > now), default=None)

    def leader(
        self, before: ServiceRecord | None, connections: Mapping[bytes, int]
    ) -> ServiceRecord | None:
        """Which one to name to people: the one before, for as long as connections go to it. None
        when nobody is left."""
        pool = [each.record for each in self._usable if not each.failures]
        if self._balancer.policy in ("highest", "hash"):
            pool = self._balancer.favoured(pool, connections)
        pool = pool or [each.record for each in self._usable]
        return before if before in pool else next(iter(pool), None)

    def explain(self, connections: Mapping[bytes, int], now: float) -> list[dict[str, Any]]:
        """A JSON object for each: ``key`` (64 hexadecimal digits), ``role``, ``version``,
        ``verified``, ``state`` (`taken`, `candidate`, `set aside` or `refused`), ``reason`` (one
        line), ``failures`` (in a row), ``retry_in`` (seconds or None), ``connections``,
        ``worked_ago`` (seconds or None), ``last`` (None, or of the connection that has worked last
        ``path``, one of `transport.dht.timings.How`, and in milliseconds ``total_ms``, ``wait_ms``,
        ``lookup_ms``, ``handshake_ms``, ``path_ms`` and ``first_byte_ms``). Taken are those that
        the next connection may go to."""
        trusted = [each.record for each in self._usable if not each.failures]
        taken = self._balancer.favoured(trusted, connections)
        rows = [self._row(each, taken, connections, now) for each in self._known.values()]
        rows.sort(key=lambda row: _STATES.index(row["state"]))
        return rows

    def _row(
        self,
        instance: Instance,
        taken: list[ServiceRecord],
        connections: Mapping[bytes, int],
        now: float,
    ) -> dict[str, Any]:
        record = instance.record
        state, reason = "candidate", _PASSED_OVER[self._balancer.policy]
        if self._is_refused(instance):
            state, reason = "refused", "nobody has proven that it holds its key"
        elif instance.failures:
            state, reason = "set aside", instance.reason or "it failed"
            if instance.tried_by is not None:
                reason = f"on trial after: {reason}"
        elif record in taken:
            state, reason = "taken", _TAKEN[self._balancer.policy]
            if len(taken) > 1:
                reason += f", one of {len(taken)}"
        retry_in = max(0.0, instance.due_at - now) if instance.failures else None
        worked_at = instance.worked_at
        return {
            "key": record.public_key.hex(),
            "role": record.role,
            "version": record.version,
            "verified": record.verified,
            "state": state,
            "reason": reason,
            "failures": instance.failures,
            "retry_in": None if retry_in is None else round(retry_in, 3),
            "connections": connections.get(record.public_key, 0),
            "worked_ago": None if worked_at is None else round(now - worked_at, 3),
            "last": None if instance.last is None else _where_time_went(instance.last),
        }

    def _is_refused(self, instance: Instance) -> bool:
        return self._verified_only and not instance.record.verified


_STATES = ("taken", "candidate", "set aside", "refused")
_TAKEN = {
    "highest": "newest version",
    "random": "any will do",
    "round-robin": "its turn was longest ago",
    "least-connections": "fewest connections",
    "hash": "first for this proxy's key",
}
_PASSED_OVER = {
    "highest": "there is a newer version",
    "random": "any will do",
    "round-robin": "its turn was later",
    "least-connections": "more connections than others",
    "hash": "not the first for this proxy's key",
}


class ConnectTimes:
    """How long connecting takes, and how long to wait for it before a rival is sent after it."""

    def __init__(self) -> None:
        #: Seconds; None before the first.
        self.typical: float | None = None

    def add(self, seconds: float) -> None:
        # Smoothed as TCP smooths its round-trip time (RFC 6298).
        if self.typical is None:
            self.typical = seconds
        else:
            self.typical += (seconds - self.typical) / 8

    @property
    def hedge(self) -> float:
        """Seconds."""
        if self.typical is None:
            return HEDGE_FIRST
        return min(HEDGE_MAX, max(HEDGE_MIN, HEDGE_FACTOR * self.typical))


def _where_time_went(news: ServiceWorked) -> dict[str, Any] | None:
    timings = news.timings
    if timings is None:
        return None
    parts = {
        "total": news.waited + news.seconds,
        "wait": news.waited,
        "lookup": timings.lookup,
        "handshake": timings.handshake,
        "path": timings.path,
        "first_byte": max(0.0, news.seconds - timings.total),
    }
    milliseconds = {f"{name}_ms": round(seconds * 1000, 1) for name, seconds in parts.items()}
    return {"path": timings.how, **milliseconds}


def _runs_anew(before: ServiceRecord, now: ServiceRecord) -> bool:
    return now.instance not in ("", before.instance)
