"""Keeping the routing table alive: who is learned, checked, refreshed and dropped
(spec: hyperdht 2.11)."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from ..transmit import Address
from .addresses import is_refused
from .table import Contact, K, Table
from .wire import Reply

if TYPE_CHECKING:
    from .node import Node

#: Seconds.
TICK = 5.0
#: A gap between two ticks (seconds) after which the machine must have slept.
SLEEP_GAP = 15.0
#: Ticks: a contact probed more recently is left alone, one known for longer has earned its place.
RECENT = 12
OLD = 360
#: Ticks between two rounds of checks, two looks at a small table, two refreshes without a query.
ROUND = 8
SMALL_TABLE_ROUND = 64
REFRESH = 60
#: What a sleep is counted as, in ticks: an hour.
SLEEP = 720
#: Probes at once on behalf of newcomers, and checks at once beyond which hints are not followed.
MAX_PROBES = 3
MAX_CHECKS = 10
#: DOWN_HINTs sent in one tick.
HINTS_PER_TICK = 50


class Bookkeeping:
    """The node's table, and the ticks that keep it true."""

    __slots__ = ("_checks", "_hints_left", "_idless", "_node", "_probes", "_refresh_in", "table",
                 "tick", "tick_at")  # fmt: skip

    def __init__(self, node: Node, id: bytes, rng: Random) -> None:  # noqa: A002
        self._node = node
        self.table = Table(id)
        # At random, so that the nodes of a network do not check each other in step.
        self.tick = rng.randint(51, 100)
        #: When the last tick was; None before the first.
        self.tick_at: float | None = None
        self._refresh_in = rng.randint(31, REFRESH)
        self._hints_left = HINTS_PER_TICK
        self._checks = 0
        self._probes = 0
        self._idless: set[Address] = set()

    # Learning

    def learn(
        self,
        id: bytes | None,  # noqa: A002
        source: Address,
        to: Address,
        socket: int,
        response: bool,
        now: float,
    ) -> None:
        """Take note of whoever sent a request or an awaited response. ``id`` is validated."""
        # Our other socket has another mapping, of which samples would only confuse.
        current = socket == self._node.current_socket
        if id is None:
            if response and current:
                self._sample_idless(source, to, now)
            return
        if is_refused(source) or id == self.table.id:
            return
        contact = self.table.find(id)
        if contact is None:
            contact = Contact(id, source, self.tick)
            if not self._insert(contact, now):
                return
        else:
            contact.seen = contact.pinged = self.tick
            self.table.touch(contact)
        if current and (contact.sampled == 0 or self.tick - contact.sampled >= OLD):
            contact.sampled = self.tick
            self._node.sample(to, now)

    def rebuild(self, id: bytes) -> None:  # noqa: A002
        """Build the table anew around another id."""
        table = Table(id)
        for contact in self.table:
            if contact.id != id:
                table.add(contact)
        self.table = table

    def queried(self) -> None:
        """A query does what a refresh would."""
        self._refresh_in = REFRESH

    def hinted(self, id: bytes, now: float) -> None:  # noqa: A002
        """Somebody says that a node is down: see for ourselves, within limits."""
        contact = self.table.find(id)
        if contact is None or self._checks >= MAX_CHECKS:
            return
        if contact.pinged < self.tick or contact.hints == 0:
            contact.hints += 1
            self.check(contact, now)

    def spend_hint(self) -> bool:
        """Whether one more DOWN_HINT may be sent in this tick."""
        if self._hints_left == 0:
            return False
        self._hints_left -= 1
        return True

    def check(self, contact: Contact, now: float) -> None:
        """PING a contact, and drop it unless it answers with its id."""
        self._checks += 1

        def on_done(reply: Reply | None, now: float) -> None:
            self._checks -= 1
            if reply is None or reply.id != contact.id:
                self.table.remove(contact.id)

        contact.pinged = self.tick
        self._node.ping(contact.address, now, node_id=contact.id, on_done=on_done)

    def _sample_idless(self, source: Address, to: Address, now: float) -> None:
        if len(self._idless) < max(1, len(self._node.bootstrap)) and source not in self._idless:
            self._idless.add(source)
            self._node.sample(to, now)

    def _insert(self, contact: Contact, now: float) -> bool:
        if self.table.add(contact):
            return True
        self._challenge(contact, now)
        return False

    def _challenge(self, newcomer: Contact, now: float) -> None:
        """The row is full: the one probed longest ago has to prove itself."""
        if not self._node.ready or self._probes >= MAX_PROBES:
            return
        row = self.table.contacts(self.table.row(newcomer.id))
        candidates = [contact for contact in row if contact.pinged != self.tick]
        if not candidates:
            return
        stalest = min(candidates, key=lambda contact: (contact.pinged, contact.added))
        if self.tick - stalest.pinged < RECENT and self.tick - stalest.added > OLD:
            return
        self._probes += 1

        def on_done(reply: Reply | None, now: float) -> None:
            self._probes -= 1
            if reply is None or reply.id != stalest.id:
                self.table.remove(stalest.id)
                self.table.add(newcomer)

        stalest.pinged = self.tick
        self._node.ping(stalest.address, now, node_id=stalest.id, on_done=on_done)

    # Ticks

    def on_tick(self, now: float) -> None:
        """What is done every `TICK` seconds by a node that is ready."""
        slept = self.tick_at is not None and now - self.tick_at > SLEEP_GAP
        self.tick_at = now
        if slept:
            self._node.woke_up(now)
        else:
            self.tick += 1
        if self.tick % ROUND == 0:
            self._check_oldest(now)
        self._refresh_in -= 1
        small = self.tick % SMALL_TABLE_ROUND == 0 and len(self.table) < K
        if small or self._refresh_in <= 0:
            self._node.refresh(now)
        self._hints_left = HINTS_PER_TICK

    def slept(self, now: float) -> None:
        """Nobody was heard for long, and that says nothing about them."""
        self.tick_at = now
        self.tick += SLEEP
        # The next round of checks is two ticks away, when the network is likely to be back.
        self.tick += -(self.tick + 2) % ROUND
        self._refresh_in = 1

    def sample_again(self) -> None:
        """Let everybody say anew where they see us."""
        self._idless.clear()
        for contact in self.table:
            contact.sampled = 0

    def _check_oldest(self, now: float) -> None:
        oldest = next(iter(self.table), None)
        if oldest is None:
            self._node.refresh(now)
            return
        count = 3 if self._node.in_flight > 2 else 5
        if self.tick - oldest.pinged < RECENT:
            count = 2
        due: list[Contact] = []
        for contact in self.table:
            if len(due) == count or contact.pinged == self.tick:
                break
            due.append(contact)
        for contact in due:
            self.check(contact, now)
