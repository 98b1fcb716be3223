"""A registry's rows over a store in memory, with what tests ask of both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hyperseaport.actors.registry import lease, roles
from hyperseaport.actors.registry.entries import Service
from hyperseaport.actors.registry.lease import check_meta
from hyperseaport.actors.registry.rows import Rows
from hyperseaport.actors.registry.store import Place, Record, Row, packed
from hyperseaport.transport.keys import KeyPair

#: Unix seconds at which the clock of the rows shows 0.
EPOCH = 1_790_000_000.0
INSTANCE = "00" * 16


class MemoryStore:
    """Keeps what is put into it, at once."""

    def __init__(self) -> None:
        self.kept: dict[Place, Row] = {}
        self.graves: dict[bytes, tuple[int, float]] = {}
        self.writes = 0

    def records(self) -> Iterator[Record]:
        return map(packed, [*self.kept.values()])

    def buried(self) -> Iterator[tuple[bytes, int, float]]:
        return iter([(key, *grave) for key, grave in self.graves.items()])

    def put(self, row: Row) -> None:
        self.writes += 1
        self.kept[row.place] = row

    def remove(self, place: Place) -> None:
        self.writes += 1
        self.kept.pop(place, None)

    def bury(self, key: bytes, sequence: int, until: float) -> None:
        last, _ = self.graves.get(key, (0, 0.0))
        self.graves[key] = max(last, sequence), until

    def forget(self, key: bytes) -> None:
        self.graves.pop(key, None)


class Table:
    """`Rows` whose clock is moved by hand, and what changed since it was last looked at."""

    def __init__(self, store: MemoryStore | None = None) -> None:
        self.store = store or MemoryStore()
        self.changes: list[tuple[str, str]] = []
        self.rows: Rows[Any] = Rows(self.store, lambda *place: self.changes.append(place))  # type: ignore[arg-type]
        self.now = 0.0

    @property
    def unix(self) -> float:
        return EPOCH + self.now

    def restore(self) -> list[Record]:
        return self.rows.restore(self.now, self.unix)

    def register(self, session: Any, role: Any, key: bytes, remote: bytes) -> Any:
        return self.rows.register(session, service(role, key), remote, self.now)

    def unregister(self, role: Any, key: bytes, remote: bytes) -> Any:
        return self.rows.unregister(service(role, key), remote, self.now, self.unix)

    def lease(
        self,
        session: Any,
        role: Any,
        keys: KeyPair,
        sequence: int,
        *,
        remote: bytes = b"\x09" * 32,
        ttl: float = 30.0,
        instance: str = INSTANCE,
    ) -> Any:
        made = lease.sign(
            keys,
            roles.parse(role),
            instance=instance,
            sequence=sequence,
            issued=int(self.unix * 1000),
            ttl=ttl,
        )
        return self.rows.lease(session, made, remote, self.now, self.unix)

    def query(self, role: Any, asker: bytes = b"\x08" * 32) -> list[Any]:
        wanted = roles.parse(role)
        return self.rows.query(wanted["role"], wanted.get("version"), asker)

    def end(self, session: Any, in_order: bool = True) -> list[Any]:
        return self.rows.session_ended(session, in_order, self.now, self.unix)

    def at(self, now: float) -> list[Any]:
        """Let the time pass; what ended at its deadlines."""
        gone: list[Any] = []
        while (deadline := self.rows.deadline()) is not None and deadline <= now:
            assert deadline >= self.now
            self.now = deadline
            gone += self.rows.expire(self.now, self.unix)
        self.now = now
        return gone


def service(role: Any, key: bytes) -> Service:
    meta = roles.parse(role)
    return Service(meta, key, check_meta(meta))
