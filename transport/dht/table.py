"""The routing table (spec: hyperdht 2.10)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from heapq import nsmallest
from operator import attrgetter

from ..transmit import Address

#: Nodes in a row, nodes in an answer, and closest nodes of a query.
K = 20
ROWS = 256

_by_id = attrgetter("id")


class Contact:
    """A node of the table. Times are in ticks."""

    __slots__ = ("added", "address", "hints", "id", "pinged", "sampled", "seen")

    def __init__(self, id: bytes, address: Address, tick: int) -> None:  # noqa: A002
        self.id = id
        self.address = address
        self.added = tick
        #: Last heard.
        self.seen = tick
        #: Last heard or probed.
        self.pinged = tick
        #: When its view of our address was last taken; 0 for never.
        self.sampled = 0
        #: How often others called it down.
        self.hints = 0


class Table:
    """Contacts in rows by the number of leading bits their ids share with ours, and in one list by
    when they were last heard. Rows exist once somebody is in them."""

    __slots__ = ("_by_id", "_rows", "_value", "id")

    def __init__(self, id: bytes) -> None:  # noqa: A002
        self.id = id
        self._value = int.from_bytes(id)
        self._rows: dict[int, list[Contact]] = {}
        # Insertion order is the order of `seen`.
        self._by_id: dict[bytes, Contact] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Contact]:
        """From the one heard longest ago to the latest."""
        return iter(self._by_id.values())

    def __reversed__(self) -> Iterator[Contact]:
        return reversed(self._by_id.values())

    def __contains__(self, id: bytes) -> bool:  # noqa: A002
        return id in self._by_id

    def find(self, id: bytes) -> Contact | None:  # noqa: A002
        """The contact with this 32-byte id."""
        return self._by_id.get(id)

    def row(self, id: bytes) -> int:  # noqa: A002
        """Which row an id belongs to: 0..255."""
        distance = self._value ^ int.from_bytes(id)
        return min(ROWS - distance.bit_length(), ROWS - 1)

    def contacts(self, row: int) -> list[Contact]:
        """The contacts of a row in order of their ids; not to be changed."""
        return self._rows.get(row, [])

    def add(self, contact: Contact) -> bool:
        """Insert as the latest, or replace the one with the same id. False when its row is full."""
        number = self.row(contact.id)
        row = self._rows.setdefault(number, [])
        place = bisect_left(row, contact.id, key=_by_id)
        if contact.id in self._by_id:
            row[place] = contact
            del self._by_id[contact.id]
        elif len(row) >= K:
            return False
        else:
            row.insert(place, contact)
        self._by_id[contact.id] = contact
        return True

    def touch(self, contact: Contact) -> None:
        """Make a contact of the table the latest."""
        del self._by_id[contact.id]
        self._by_id[contact.id] = contact

    def remove(self, id: bytes) -> bool:  # noqa: A002
        """Whether it was there."""
        contact = self._by_id.pop(id, None)
        if contact is None:
            return False
        number = self.row(id)
        row = self._rows[number]
        row.remove(contact)
        if not row:
            del self._rows[number]
        return True

    def closest(self, target: bytes, n: int = K) -> list[Contact]:
        """Up to ``n`` contacts from the target's row, then the rows before, then those behind: near
        the target, but not sorted by distance (spec: hyperdht 2.10)."""
        start = self.row(target)
        numbers = sorted(self._rows)
        before = [number for number in reversed(numbers) if number <= start]
        behind = [number for number in numbers if number > start]
        found: list[Contact] = []
        for number in before + behind:
            found += self._rows[number][: n - len(found)]
            if len(found) >= n:
                break
        return found

    def nearest(self, target: bytes, n: int = K) -> list[Contact]:
        """The ``n`` contacts nearest to the target, nearest first. `closest` leaves out rows behind
        the target's when those before fill it up, although they are nearer: the order that others
        expect in answers, but a bad start for a search of our own."""
        value = int.from_bytes(target)
        return nsmallest(n, self, key=lambda contact: int.from_bytes(contact.id) ^ value)
