"""What the registry knows of one service, and how that is told and kept."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Generic, TypeVar

from . import matching
from .lease import Lease, encode, json_size
from .roles import Meta
from .store import Row

#: Who registered: in the table of an actor the address of a session.
Session = TypeVar("Session", bound=Hashable)

#: What `json.loads` does without looking for white space around a text: a start does it for each
#: entry.
_scan = json.JSONDecoder().raw_decode

#: Role, and version without build metadata.
Place = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Service:
    """What a plain registration is about, checked."""

    meta: Meta
    key: bytes
    #: Bytes of the description as JSON.
    size: int

    @property
    def place(self) -> Place:
        return place(self.meta)


@dataclass(slots=True, eq=False)
class Entry(Generic[Session]):
    """One service as one holder has registered it."""

    service_key: bytes
    #: Whose it is: the key of the connection that registered it; of a lease, the service key.
    holder: bytes
    place: Place
    meta: Meta
    #: The key of the connection that it came over; of a lease read from the store, the holder's.
    remote_key: bytes
    #: Bytes that its item in an answer has at most.
    size: int
    #: None for a plain registration, which nobody has proven.
    lease: Lease | None
    #: When it was made, and when it was last renewed.
    since: float
    renewed: float
    #: Living sessions that have registered it, or brought the lease.
    sessions: dict[Session, None] = field(default_factory=dict)
    #: When it ends if nothing happens, and the deadline that is set for it, which may be earlier.
    ends: float = math.inf
    scheduled: float = math.inf

    @property
    def role(self) -> str:
        return self.place[0]

    @property
    def version(self) -> str:
        """As registered: may have a `v`, white space and build metadata around it."""
        return str(self.meta["version"])

    @property
    def info(self) -> dict[str, Any]:
        """What the registry prints of it, and the `info` of shape A (spec: registry 6.2)."""
        return {
            "id": self.service_key.hex(),
            "remotePublicKey": self.remote_key.hex(),
            "meta": self.meta,
        }

    @property
    def shape_a(self) -> dict[str, Any]:
        """The answer to `waitFor`."""
        return {"meta": self.meta, "info": self.info}

    @property
    def shape_c(self) -> dict[str, Any]:
        """One item of the answer to `query`."""
        return {
            "servicePublicKey": self.service_key.hex(),
            "role": self.role,
            "version": self.version,
            "prerelease": matching.prerelease(self.version) if "-" in self.place[1] else [],
        }

    @property
    def details(self) -> dict[str, Any]:
        """The same with all that is known, for those of our clients that ask for it."""
        item = self.shape_c
        item["remotePublicKey"] = self.remote_key.hex()
        item["meta"] = self.meta
        if self.lease is not None:
            item["verified"] = True
            item["statement"] = self.lease.text
            item["signature"] = self.lease.signature.hex()
        return item


@dataclass(slots=True)
class Outcome(Generic[Session]):
    """What an accepted lease has brought about."""

    #: None when it was withdrawn.
    entry: Entry[Session] | None
    #: The entry is new, or says something else than before.
    changed: bool
    #: What went: the lease, or what it replaces, unless ``entry`` stands in its place.
    gone: list[Entry[Session]]


def place(meta: Meta) -> Place:
    """Where a checked description belongs."""
    return meta["role"], matching.valid(meta["version"]) or ""


def whole_size(meta: Meta, size: int, lease: Lease | None = None) -> int:
    """Bytes that an item of this description, which has ``size`` bytes, takes at most."""
    # The description, its role once more, and keys, version and names.
    whole = size + _role_size(meta["role"]) + 1536
    return whole if lease is None else whole + lease.size


@lru_cache(65_536)
def _role_size(role: str) -> int:
    return json_size(role)


def to_row(entry: Entry[Any]) -> Row:
    """What the store keeps of it."""
    role, version = entry.place
    lease, meta = entry.lease, encode(entry.meta)
    if lease is None:
        return Row(entry.service_key, entry.holder, role, version, meta)
    return Row(
        entry.service_key,
        entry.holder,
        role,
        version,
        meta,
        lease.text,
        lease.signature,
        lease.sequence,
        lease.issued,
        lease.ttl,
    )


def from_row(row: Row, now: float) -> Entry[Any] | None:
    """The entry that the store has kept, which no session holds; None when it is none of ours."""
    lease = None
    size = len(row.meta.encode("utf-8", "backslashreplace"))
    try:
        if row.statement:
            statement, _ = _scan(row.statement)
            meta = statement["meta"]
            lease = Lease(
                row.service_key,
                meta,
                str(statement["instance"]),
                row.sequence,
                row.issued,
                row.ttl,
                row.statement,
                row.signature,
                size,
            )
        else:
            meta, _ = _scan(row.meta)
        where = place(meta)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if where != (row.role, row.version):
        return None
    whole = whole_size(meta, size, lease)
    return Entry(row.service_key, row.holder, where, meta, row.holder, whole, lease, now, now)
