"""Who waits for a service, and who watches a role. Pure logic; times are seconds on any clock that
only moves forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Generic

from .entries import Session
from .lease import Refused
from .rows import accepts

#: Requests of one session that wait for a service: a proxy program has one.
MAX_WAITERS_PER_SESSION = 64
#: Requests in all that wait for a service.
MAX_WAITERS = 10_000
#: Seconds that a request waits for a service (spec: registry 6.3).
WAIT = 15.0
#: Watches of one session: a program has one for each of its proxies.
MAX_WATCHES_PER_SESSION = 1024
#: Watches in all, of about 300 bytes each.
MAX_WATCHES = 200_000
#: Different ranges that are watched of one role: each is compared with every version that changes.
MAX_RANGES = 1024
#: Seconds between two notifications of one watch, for each full `PACE_BYTES` of the list and for
#: each full `PACE_WATCHES` that are told the same, so that a popular role cannot keep us busy.
INTERVAL = 0.05
PACE_BYTES = 64 * 1024
PACE_WATCHES = 500


@dataclass(frozen=True, slots=True, eq=False)
class Waiter(Generic[Session]):
    """A request that is answered when somebody registers what it wants."""

    session: Session
    ticket: int
    role: str
    #: A range; None for any version.
    wanted: str | None
    deadline: float


class Waiters(Generic[Session]):
    """The requests that wait."""

    def __init__(self) -> None:
        # All wait equally long, so the order of insertion is the order of the deadlines.
        self._waiters: dict[tuple[Session, int], Waiter[Session]] = {}
        self._of_role: dict[str, dict[Waiter[Session], None]] = {}
        self._of_session: dict[Session, dict[Waiter[Session], None]] = {}

    def __len__(self) -> int:
        return len(self._waiters)

    def add(self, session: Session, ticket: int, role: str, wanted: str | None, now: float) -> None:
        """Raises `Refused`: limit."""
        mine = self._of_session.get(session, {})
        if len(mine) >= MAX_WAITERS_PER_SESSION or len(self) >= MAX_WAITERS:
            raise Refused("too many requests wait for a service", "limit")
        waiter = Waiter(session, ticket, role, wanted, now + WAIT)
        self._waiters[session, ticket] = waiter
        self._of_role.setdefault(role, {})[waiter] = None
        self._of_session.setdefault(session, {})[waiter] = None

    def take(self, role: str, version: str) -> list[Waiter[Session]]:
        """Those that this registration answers; they wait no longer."""
        waiting = self._of_role.get(role, ())
        return self._taken([one for one in waiting if accepts(one.wanted, version)])

    def deadline(self) -> float | None:
        """When `expire` must be called next."""
        return next((waiter.deadline for waiter in self._waiters.values()), None)

    def expire(self, now: float) -> list[Waiter[Session]]:
        """Those whose time is over; they wait no longer."""
        over: list[Waiter[Session]] = []
        for waiter in self._waiters.values():
            if waiter.deadline > now:
                break
            over.append(waiter)
        return self._taken(over)

    def drop(self, session: Session) -> None:
        """Forget those of a session that is gone."""
        self._taken([*self._of_session.get(session, ())])

    def _taken(self, waiters: list[Waiter[Session]]) -> list[Waiter[Session]]:
        for waiter in waiters:
            del self._waiters[waiter.session, waiter.ticket]
            _discard(self._of_role, waiter.role, waiter)
            _discard(self._of_session, waiter.session, waiter)
        return waiters


@dataclass(slots=True, eq=False)
class Group(Generic[Session]):
    """All watches of one role and range: they are told the same."""

    role: str
    wanted: str | None
    #: The key of the connection, by session and the watch's number.
    watches: dict[tuple[Session, int], bytes] = field(default_factory=dict)
    #: It has to be told of a change.
    due: bool = False
    #: Not before then.
    next_at: float = 0.0


class Watches(Generic[Session]):
    """The watches, and which of them have to be told of a change when."""

    def __init__(self) -> None:
        self._groups: dict[str, dict[str | None, Group[Session]]] = {}
        self._of_session: dict[Session, dict[int, Group[Session]]] = {}
        self._due: list[tuple[float, int, Group[Session]]] = []
        self._serial = count()
        self._watches = 0

    def __len__(self) -> int:
        return self._watches

    def add(
        self, session: Session, number: int, role: str, wanted: str | None, remote_key: bytes
    ) -> None:
        """Raises `Refused`: limit, malformed."""
        mine = self._of_session.get(session, {})
        if number in mine:
            raise Refused(f"the watch {number} is there already")
        if len(mine) >= MAX_WATCHES_PER_SESSION:
            raise Refused(f"one connection has at most {MAX_WATCHES_PER_SESSION} watches", "limit")
        ranges = self._groups.get(role, {})
        if self._watches >= MAX_WATCHES or (wanted not in ranges and len(ranges) >= MAX_RANGES):
            raise Refused("too many watches", "limit")
        group = self._groups.setdefault(role, ranges).setdefault(wanted, Group(role, wanted))
        group.watches[session, number] = remote_key
        self._of_session.setdefault(session, {})[number] = group
        self._watches += 1

    def remove(self, session: Session, number: int) -> None:
        """Does nothing when there is no such watch."""
        group = self._of_session.get(session, {}).pop(number, None)
        if group is None:
            return
        if not self._of_session[session]:
            del self._of_session[session]
        self._watches -= 1
        del group.watches[session, number]
        if not group.watches:
            _discard(self._groups, group.role, group.wanted)

    def drop(self, session: Session) -> None:
        """Forget those of a session that is gone."""
        for number in tuple(self._of_session.get(session, ())):
            self.remove(session, number)

    def changed(self, role: str, version: str) -> None:
        """What is told of this version of the role is not what it was."""
        for group in self._groups.get(role, {}).values():
            if not group.due and accepts(group.wanted, version):
                group.due = True
                heappush(self._due, (group.next_at, next(self._serial), group))

    def deadline(self) -> float | None:
        """When `due` must be called next."""
        return self._due[0][0] if self._due else None

    def due(self, now: float) -> list[Group[Session]]:
        """The groups to be told now. Call `told` for each."""
        groups: list[Group[Session]] = []
        while self._due and self._due[0][0] <= now:
            _, _, group = heappop(self._due)
            group.due = False
            if group.watches:
                groups.append(group)
        return groups

    def told(self, group: Group[Session], now: float, size: int) -> None:
        """It was told a list of so many bytes."""
        pace = max(1.0, size / PACE_BYTES, len(group.watches) / PACE_WATCHES)
        group.next_at = now + INTERVAL * pace


def _discard(index: dict, outer: object, inner: object) -> None:  # type: ignore[type-arg]
    del index[outer][inner]
    if not index[outer]:
        del index[outer]
