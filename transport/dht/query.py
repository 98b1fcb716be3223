"""An iterative search for the nodes closest to a target (spec: hyperdht 2.15)."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from ..transmit import Address
from .addresses import is_refused, node_id
from .rpc import QUERY_RETRIES, Pending
from .table import K
from .wire import Reply

if TYPE_CHECKING:
    from .node import Node

#: Requests in flight at once: usually; in the background; while given nodes are tried alone.
CONCURRENCY = 10
BACKGROUND = 2
SLOWED = 3
#: A background query takes the usual concurrency while the node has fewer requests in flight.
_IDLE = 3
#: Addresses a query gets to know: an honest network needs a few hundred. What comes after is not
#: looked at, so that invented nodes cannot feed a query forever.
MAX_SEEN = 4096

Continuation: TypeAlias = Callable[[Reply | None, float], None]
Commit: TypeAlias = Callable[[Reply, Continuation, float], None]


class Query:
    """Asks nodes ever closer to ``target`` until the closest have answered, then commits to them.

    Made by `Node.query`; `cancel` makes sure that no callback is called any more.
    """

    __slots__ = (
        "_answered",
        "_closest",
        "_command",
        "_commit",
        "_committing",
        "_concurrency",
        "_down",
        "_finished",
        "_from_table",
        "_in_flight",
        "_internal",
        "_node",
        "_on_done",
        "_on_reply",
        "_pending",
        "_referrers",
        "_requests",
        "_retries",
        "_slow",
        "_slowed",
        "_target",
        "_value",
        "background",
        "cancelled",
        "committed",
        "errors",
        "successes",
        "target",
    )

    def __init__(
        self,
        node: Node,
        target: bytes,
        command: int,
        *,
        internal: bool = False,
        value: bytes | None = None,
        retries: int = QUERY_RETRIES,
        concurrency: int = CONCURRENCY,
        background: bool = False,
        on_reply: Callable[[Reply, float], None] | None = None,
        on_done: Callable[[Query, float], None] | None = None,
        commit: Commit | None = None,
    ) -> None:
        self._node = node
        #: 32 bytes.
        self.target = target
        self._target = int.from_bytes(target)
        self._command = command
        self._internal = internal
        self._value = value
        self._retries = retries
        self._concurrency = BACKGROUND if background else concurrency
        #: Keeps out of the way of other requests.
        self.background = background
        self._on_reply = on_reply
        self._on_done = on_done
        self._commit = commit
        # A stack: what came last is the closest so far.
        self._pending: list[tuple[Address, bytes | None]] = []
        # Everybody heard of, with those who named them.
        self._referrers: dict[Address, list[Address]] = {}
        self._answered: set[Address] = set()
        self._down: set[Address] = set()
        self._closest: list[tuple[int, Reply]] = []
        self._requests: set[Pending] = set()
        self._in_flight = 0
        self._slow = 0
        self._slowed = False
        self._from_table = False
        self._finished = False
        self._committing = 0
        self.cancelled = False
        #: Answers without an error, answers with one and timeouts, commits that succeeded.
        self.successes = 0
        self.errors = 0
        self.committed = 0

    @property
    def closest(self) -> list[Reply]:
        """Up to 20 answers, the closest to the target first; all have an id."""
        return [reply for _, reply in self._closest]

    @property
    def failed(self) -> bool:
        """Whether there was something to commit and nobody took it."""
        return self._commit is not None and self.committed == 0

    def start(self, nodes: Sequence[Address], now: float) -> None:
        """Begin with these nodes, the table and the bootstrap nodes, in this order of need."""
        for address in reversed(nodes):
            self._learn(address, node_id(address))
        if len(self._pending) < K:
            self._add_from_table()
        self._pump(now)
        self._slowed = not self._from_table
        if self._idle:
            # Nobody to ask. The callback must not come before the caller has the query.
            self._node.timers.at(now, self._advance)

    def cancel(self) -> None:
        """Stop asking."""
        self.cancelled = True
        self._pending.clear()
        for request in self._requests:
            request.cancel()
        self._requests.clear()

    # Who is to be asked

    def _add_from_table(self) -> None:
        self._from_table = True
        contacts = self._node.table.nearest(self.target, K - len(self._pending))
        for contact in reversed(contacts):
            self._learn(contact.address, contact.id)
        if len(self._pending) < K:
            for address in self._node.bootstrap:
                # Asked however far away: it may know a network of which we know nothing.
                self._learn(address, None)

    def _learn(self, address: Address, id: bytes | None) -> None:  # noqa: A002
        if address in self._referrers or (id or node_id(address)) == self._node.id:
            return
        self._referrers[address] = []
        self._pending.append((address, id))

    def _offer(self, address: Address, id: bytes, referrer: Address, now: float) -> bool:  # noqa: A002
        """Take up a node that ``referrer`` named. Returns whether it is closer than ours."""
        closer = self._is_closer(id)
        if address in self._answered:
            return closer
        if address in self._down:
            self._node.hint_down(referrer, address, now)
            return closer
        referrers = self._referrers.get(address)
        if referrers is not None:
            referrers.append(referrer)
        elif closer and len(self._referrers) < MAX_SEEN:
            self._referrers[address] = [referrer]
            self._pending.append((address, id))
        return closer

    def _is_closer(self, id: bytes) -> bool:  # noqa: A002
        closest = self._closest
        return len(closest) < K or int.from_bytes(id) ^ self._target < closest[-1][0]

    # Asking

    def _pump(self, now: float) -> None:
        limit = SLOWED if self._slowed else self._concurrency
        while self._pending and self._in_flight < limit + self._slow:
            address, id = self._pending.pop()  # noqa: A001
            if id is None or self._is_closer(id):
                self._ask(address, id, now)

    def _ask(self, address: Address, id: bytes | None, now: float) -> None:  # noqa: A002
        slow = False

        def on_slow(now: float) -> None:
            nonlocal slow
            slow = True
            self._slow += 1
            self._advance(now)

        def on_done(reply: Reply | None, now: float) -> None:
            self._requests.discard(pending)
            self._in_flight -= 1
            if slow:
                self._slow -= 1
            if reply is None:
                self._timed_out(address, now)
            else:
                self._replied(reply, now)
            self._advance(now)

        pending = self._node.request(
            address,
            self._command,
            now,
            internal=self._internal,
            target=self.target,
            value=self._value,
            retries=self._retries,
            node_id=id,
            on_done=on_done,
        )
        pending.on_slow = on_slow
        self._requests.add(pending)
        self._in_flight += 1

    def _timed_out(self, address: Address, now: float) -> None:
        self.errors += 1
        self._down.add(address)
        for referrer in self._referrers[address]:
            self._node.hint_down(referrer, address, now)
        self._referrers[address] = []

    def _replied(self, reply: Reply, now: float) -> None:
        self._answered.add(reply.source)
        self._referrers[reply.source] = []
        if reply.error:
            self.errors += 1
        else:
            self.successes += 1
            if reply.id is not None:
                self._insert(reply, reply.id)
        own_id = self._node.id
        for address in reply.closer_nodes[:K]:
            id = node_id(address)  # noqa: A001
            if id == own_id or address[1] == 0 or is_refused(address):
                continue
            if not self._offer(address, id, reply.source, now):
                break
        if self.background:
            self._concurrency = CONCURRENCY if self._node.in_flight < _IDLE else BACKGROUND
        if not reply.error and not self._finished and self._on_reply is not None:
            self._on_reply(reply, now)

    def _insert(self, reply: Reply, id: bytes) -> None:  # noqa: A002
        distance = int.from_bytes(id) ^ self._target
        if any(entry[0] == distance for entry in self._closest):
            return
        insort(self._closest, (distance, reply), key=lambda entry: entry[0])
        del self._closest[K:]

    # The end

    @property
    def _idle(self) -> bool:
        if self._pending:
            return False
        all_slow = self._in_flight == self._slow and len(self._closest) >= K
        return self._in_flight == 0 or all_slow

    def _advance(self, now: float) -> None:
        if self.cancelled or self._finished:
            return
        if self.successes + self.errors >= self._concurrency:
            self._slowed = False
        self._pump(now)
        if self._idle and not self._from_table and self.successes * 4 < K:
            self._add_from_table()
            self._pump(now)
        if self._idle:
            self._finish(now)

    def _finish(self, now: float) -> None:
        # What is still in flight is slow and stays so: its end only serves the tables.
        self._finished = True
        if self._commit is None or not self._closest:
            self._report(now)
            return
        replies = self.closest
        self._committing = len(replies)
        for reply in replies:
            if self.cancelled:
                return
            self._commit(reply, self._continuation(), now)

    def _continuation(self) -> Continuation:
        called = False

        def committed(reply: Reply | None, now: float) -> None:
            nonlocal called
            if called or self.cancelled:
                return
            called = True
            self._committing -= 1
            if reply is not None and not reply.error:
                self.committed += 1
            if self._committing == 0:
                self._report(now)

        return committed

    def _report(self, now: float) -> None:
        if self._on_done is not None:
            self._on_done(self, now)
