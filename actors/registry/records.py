"""What registries answer, as service records (spec: registry 6.2).

Registries of 1.x, of 3.x and ours answer in different shapes, and some answer with what was not
asked for: a record comes out only if it is well formed and matches. What comes with a signed
statement is believed for that alone, and left out when the statement does not hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...transport.errors import InvalidInput
from ...transport.keys import parse_key
from ..messages import ServiceRecord
from . import matching, roles
from .lease import MAX_SKEW, Refused, Verifier
from .roles import Meta

#: Records taken from one answer: what our registry sends at most.
MAX_RECORDS = 256

#: Members of an item any of which makes it a lease.
_OF_LEASES = ("statement", "signature", "verified")


@dataclass(slots=True)
class Reader:
    """Reads one registry's answers about one role, one after the other.

    ``clock`` gives seconds of Unix time. ``refused`` counts what was left out because its statement
    did not hold, by kind: `forged`, `expired`, `malformed`, `oversized`.
    """

    wanted: Meta
    clock: Callable[[], float]
    verifier: Verifier = field(default_factory=Verifier)
    refused: Counter[str] = field(default_factory=Counter)
    # Of the last answer, by statement and signature, and by key: most of it comes again.
    _known: dict[tuple[Any, Any, Any], ServiceRecord] = field(default_factory=dict)
    _leases: dict[bytes, ServiceRecord] = field(default_factory=dict)

    def read(self, answer: Any) -> tuple[ServiceRecord, ...]:
        """The matching services in an answer to `query`, `waitFor` or `watch`, highest version
        first, those of one version in the answer's order."""
        items = answer if isinstance(answer, list) else [answer]
        found: dict[tuple[bytes, str], ServiceRecord] = {}
        before, self._known = self._known, {}
        leases, self._leases = self._leases, {}
        now = self.clock()
        for item in items[:MAX_RECORDS]:
            record = self._record(item, before, leases, now)
            if record is not None and matches(record, self.wanted):
                found.setdefault((record.public_key, record.version), record)
        return by_version(found.values())

    def _record(
        self,
        item: Any,
        before: Mapping[tuple[Any, Any, Any], ServiceRecord],
        leases: Mapping[bytes, ServiceRecord],
        now: float,
    ) -> ServiceRecord | None:
        if not isinstance(item, Mapping):
            return None
        if not any(item.get(member) for member in _OF_LEASES):
            return _unverified(item)
        statement, signature = item.get("statement"), item.get("signature")
        place = (statement, signature, item.get("servicePublicKey"))
        if not all(isinstance(part, str) for part in place):
            self.refused["malformed"] += 1
            return None
        record = before.get(place)
        try:
            if record is None:
                record = self._verified(item)
            _check_time(record, now)
        except Refused as refusal:
            self.refused[refusal.kind] += 1
            return None
        self._known[place] = record
        # Answers may come in another order than they were given in. Until it ends, the newest
        # statement of a service is the one that counts.
        newest = leases.get(record.public_key)
        if newest is not None and newest.sequence > record.sequence and newest.expires > now:
            record = newest
        self._leases[record.public_key] = record
        return record

    def _verified(self, item: Mapping[str, Any]) -> ServiceRecord:
        """Raises `Refused`."""
        lease = self.verifier.verify(item.get("statement"), item.get("signature"))
        if _key(item.get("servicePublicKey")) != lease.key:
            raise Refused("signed by another key than the service's", "forged")
        if lease.withdrawal:
            raise Refused("the lease was withdrawn", "expired")
        return ServiceRecord(
            lease.key,
            lease.meta["role"],
            lease.meta["version"],
            lease.meta,
            verified=True,
            remote_public_key=_key(item.get("remotePublicKey")),
            instance=lease.instance,
            sequence=lease.sequence,
            expires=lease.expires,
        )


def matches(record: ServiceRecord, wanted: Meta) -> bool:
    """Whether the record is of the wanted role and, if there is one, in the range."""
    if record.role != wanted.get("role"):
        return False
    version = wanted.get("version")
    return version is None or matching.satisfies(record.version, version)


def by_version(records: Iterable[ServiceRecord]) -> tuple[ServiceRecord, ...]:
    """Highest version first, those of one version in the order given."""
    return tuple(sorted(records, key=lambda one: matching.precedence(one.version), reverse=True))


def same(one: tuple[ServiceRecord, ...], other: tuple[ServiceRecord, ...]) -> bool:
    """Whether they say the same: of a lease that was renewed, only number and end differ."""
    return len(one) == len(other) and all(
        mine == yours and mine.meta == yours.meta and mine.instance == yours.instance
        for mine, yours in zip(one, other, strict=True)
    )


def _unverified(item: Mapping[str, Any]) -> ServiceRecord | None:
    info = item.get("info")
    if isinstance(info, Mapping):
        item = info  # shape A has B inside
    key = item.get("id", item.get("servicePublicKey"))
    remote = item.get("remotePublicKey")
    meta = item.get("meta", item)
    if not isinstance(key, str) or not isinstance(meta, Mapping):
        return None
    role, version = meta.get("role"), meta.get("version")
    if not isinstance(role, str) or not isinstance(version, str):
        return None
    if matching.valid(version) is None:
        return None
    if meta is item:  # shape C has no description of its own
        meta = roles.parse({"role": role, "version": version})
    try:
        return ServiceRecord(
            parse_key(key),
            role,
            version,
            meta,
            remote_public_key=parse_key(remote) if isinstance(remote, str) else None,
        )
    except InvalidInput:
        return None


def _check_time(record: ServiceRecord, now: float) -> None:
    """A registry may have the statement until it ends, and its clock may differ from ours. Raises
    `Refused`."""
    if record.expires + MAX_SKEW < now:
        raise Refused("the lease has ended", "expired")


def _key(text: Any) -> bytes | None:
    try:
        return parse_key(text) if isinstance(text, str) else None
    except InvalidInput:
        return None
