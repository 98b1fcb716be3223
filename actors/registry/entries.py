"""What the registry knows of one service, and how that is told and kept."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar, cast

from msgspec import Struct

from . import matching
from .lease import MAX_ROLE, Lease, encode, json_size, statement_size
from .roles import Meta
from .store import HEAD, Record, Row, unpacked

#: Who registered: in the table of an actor the address of a session.
Session = TypeVar("Session", bound=Hashable)

#: What `json.loads` does without looking for white space around a text.
_scan = json.JSONDecoder().raw_decode

#: Role, and version without build metadata.
Place = tuple[str, str]


class Service(Struct, frozen=True):
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
    #: What `say` takes; or what the store has of it, until somebody asks.
    _content: Meta | Lease | bytes
    #: The key of the connection that it came over; of a lease read from the store, the holder's.
    remote_key: bytes
    #: Bytes that its item in an answer has at most.
    size: int
    #: When it was made, and when it was last renewed.
    since: float
    renewed: float
    #: Of the lease; None for a plain registration, which nobody has proven.
    sequence: int | None = None
    #: Living sessions that have registered it, or brought the lease; None while there never were.
    _sessions: dict[Session, None] | None = None
    #: When it ends if nothing happens, and the deadline that is set for it, which may be earlier.
    ends: float = math.inf
    scheduled: float = math.inf

    @property
    def meta(self) -> Meta:
        said = self._said
        return said.meta if isinstance(said, Lease) else said

    @property
    def lease(self) -> Lease | None:
        said = self._said
        return said if isinstance(said, Lease) else None

    @property
    def _said(self) -> Meta | Lease:
        if isinstance(self._content, bytes):
            self._content = _read((self.service_key, self.holder, *self.place, self._content))
        return self._content

    def say(self, content: Meta | Lease) -> None:
        """The description from now on; a lease proves it."""
        self._content = content
        self.sequence = content.sequence if isinstance(content, Lease) else None

    @property
    def sessions(self) -> dict[Session, None]:
        if self._sessions is None:
            self._sessions = {}
        return self._sessions

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
        lease = self.lease
        if lease is not None:
            item["verified"] = True
            item["statement"] = lease.text
            item["signature"] = lease.signature.hex()
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
    whole = size + _around(meta["role"])
    return whole if lease is None else whole + lease.size


@lru_cache(65_536)
def _around(role: str) -> int:
    """Bytes of the role once more, of keys, version and names."""
    return json_size(role) + 1536


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


def from_record(record: Record, now: float) -> Entry[Any] | None:
    """The entry that the store has kept, which no session holds; None when it is none of ours. What
    it says is read when somebody asks."""
    key, holder, role, version, content = record
    if not 0 < len(role) <= MAX_ROLE or matching.valid(version) != version:
        return None
    try:
        sequence, _, _, meta_size, signature_size = HEAD.unpack_from(content)
    except struct.error:
        return None
    # A lone surrogate, of three bytes here, takes six in an answer.
    size = meta_size + 3 * content.count(b"\xed") + _around(role)
    if signature_size:
        size += statement_size(content[HEAD.size + meta_size + signature_size :])
    else:
        sequence = None
    return Entry(key, holder, (role, version), content, holder, size, now, now, sequence)


def _read(record: Record) -> Meta | Lease:
    """What a row says. One that cannot be read, as a program of another make may have written it,
    says no more than where it is: its owner says the rest anew, or it goes."""
    row = unpacked(record)
    try:
        if row.statement:
            statement, _ = _scan(row.statement)
            meta = statement["meta"]
            instance = str(statement["instance"])
        else:
            meta, _ = _scan(row.meta)
        readable = place(meta) == (row.role, row.version)
    except (ValueError, TypeError, KeyError, RecursionError):
        readable = False
    if not readable:
        return {"role": row.role, "version": row.version}
    if not row.statement:
        return cast(Meta, meta)
    return Lease(
        row.service_key,
        meta,
        instance,
        row.sequence,
        row.issued,
        row.ttl,
        row.statement,
        row.signature,
        len(row.meta.encode("utf-8", "backslashreplace")),
    )
