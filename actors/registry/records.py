"""What registries answer, as service records (spec: registry 6.2).

Registries of 1.x, of 3.x and ours answer in different shapes, and some answer with what was not
asked for: a record comes out only if it is well formed and matches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...transport.errors import InvalidInput
from ...transport.keys import parse_key
from ..messages import ServiceRecord
from . import matching, roles
from .roles import Meta

#: Records taken from one answer: what our registry sends at most.
MAX_RECORDS = 256


def records(answer: Any, wanted: Meta) -> tuple[ServiceRecord, ...]:
    """The matching services in an answer to `query` or `waitFor`, highest version first, those of
    one version in the answer's order."""
    items = answer if isinstance(answer, list) else [answer]
    found: dict[tuple[bytes, str], ServiceRecord] = {}
    for item in items[:MAX_RECORDS]:
        record = _record(item)
        if record is not None and matches(record, wanted):
            found.setdefault((record.public_key, record.version), record)
    return tuple(
        sorted(found.values(), key=lambda one: matching.precedence(one.version), reverse=True)
    )


def matches(record: ServiceRecord, wanted: Meta) -> bool:
    """Whether the record is of the wanted role and, if there is one, in the range."""
    if record.role != wanted.get("role"):
        return False
    version = wanted.get("version")
    return version is None or matching.satisfies(record.version, version)


def _record(item: Any) -> ServiceRecord | None:
    if not isinstance(item, Mapping):
        return None
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
