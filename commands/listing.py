"""What `list` shows of a registry's services."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from .output import document, heading, say, seconds, short, table

if TYPE_CHECKING:
    from ..actors.messages import ServiceRecord

HEADERS = ("ROLE", "VERSION", "KEY", "VERIFIED", "INSTANCE", "EXPIRES IN")


async def show(
    updates: AsyncIterator[tuple[ServiceRecord, ...]], *, as_json: bool = False, watch: bool = False
) -> None:
    """Show the first of these lists of services, or with ``watch``, each until there are no more.

    As JSON it is one line a list, so that an empty one and one that lacks a service can be seen:
    ``{"services": [...]}``, each with ``role``, ``version``, ``key`` (64 hexadecimal digits),
    ``verified``, ``instance``, ``sequence``, ``expires`` (seconds of Unix time, or null) and
    ``meta``.
    """
    async for records in updates:
        if as_json:
            document({"services": [_as_json(record) for record in records]})
        else:
            _as_table(records, watch)
        if not watch:
            return


def _as_table(records: tuple[ServiceRecord, ...], watch: bool) -> None:
    if watch:
        heading(f"{time.strftime('%H:%M:%S')}  {len(records)} service{'s'[: len(records) != 1]}")
    if records:
        table(HEADERS, [_row(record) for record in records])
    elif not watch:
        say("no services")
    if watch:
        say()


def _row(record: ServiceRecord) -> tuple[str, ...]:
    left = max(record.expires - time.time(), 0.0) if record.expires else None
    return (
        record.role,
        record.version,
        short(record.public_key.hex()),
        "yes" if record.verified else "no",
        short(record.instance) or "-",
        seconds(left),
    )


def _as_json(record: ServiceRecord) -> dict[str, Any]:
    return {
        "role": record.role,
        "version": record.version,
        "key": record.public_key.hex(),
        "verified": record.verified,
        "instance": record.instance,
        "sequence": record.sequence,
        "expires": record.expires or None,
        "meta": dict(record.meta),
    }
