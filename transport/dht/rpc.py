"""The request engine: transaction ids, retransmission, matching, congestion (spec: hyperdht 2.7,
2.8, 2.9)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

from ..transmit import Address, Transmit
from .timers import Timer, Timers
from .window import Window
from .wire import Reply

#: Seconds after which a transmission is repeated or given up.
TIMEOUT = 1.0
#: Transmissions after the first.
RETRIES = 3
QUERY_RETRIES = 5

#: Requests in flight or waiting for the window; the next one fails at once. Far below the 65,536
#: transaction ids, so that a free one is always near.
MAX_PENDING = 4096
#: Datagrams between two calls of `transmits`; what comes after is lost, as on a wire.
MAX_OUTBOX = 8192


@dataclass(slots=True)
class Stats:
    """Datagrams and requests, counted since the start."""

    received: int = 0
    #: Neither request nor response, or sent from port 0.
    ignored: int = 0
    malformed: int = 0
    #: Responses to nothing in flight, or from another address than asked.
    unmatched: int = 0
    requests: int = 0
    responses: int = 0
    #: Requests given up after the last transmission.
    timeouts: int = 0
    #: What a limit of ours kept from being sent or done.
    dropped: int = 0


class Pending:
    """A request on its way. `cancel` makes sure that its callback is never called."""

    __slots__ = (
        "_engine",
        "_timer",
        "attempts",
        "began",
        "datagram",
        "done",
        "force",
        "node_id",
        "on_done",
        "on_slow",
        "retries",
        "sent_at",
        "socket",
        "tid",
        "timeout",
        "to",
    )

    def __init__(
        self,
        engine: Engine,
        tid: int,
        to: Address,
        socket: int,
        datagram: bytes,
        on_done: Callable[[Reply | None, float], None],
        *,
        retries: int = RETRIES,
        timeout: float = TIMEOUT,
        node_id: bytes | None = None,
        force: bool = False,
    ) -> None:
        self._engine = engine
        self._timer: Timer | None = None
        self.tid = tid
        self.to = to
        self.socket = socket
        self.datagram = datagram
        self.on_done = on_done
        self.retries = retries
        self.timeout = timeout
        self.node_id = node_id
        self.force = force
        #: Called once, after the first timeout, if more transmissions follow.
        self.on_slow: Callable[[float], None] | None = None
        self.attempts = 0
        self.began = 0.0
        self.sent_at = 0.0
        self.done = False

    def cancel(self) -> None:
        """Forget it; harmless when it is done."""
        self._engine.forget(self)

    def arm(self, timer: Timer | None) -> None:
        """Replace its timer."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = timer


class Engine:
    """All requests of a node. One timer for each that is in flight, one for all that wait."""

    __slots__ = ("_by_tid", "_draining", "_tid", "_timers", "_waiting", "_window", "on_timeout",
                 "outbox", "stats")  # fmt: skip

    def __init__(
        self, timers: Timers, rng: Random, on_timeout: Callable[[Pending, float], None]
    ) -> None:
        self._timers = timers
        self._tid = rng.getrandbits(16)
        self._by_tid: dict[int, Pending] = {}
        self._waiting: deque[Pending] = deque()
        self._draining: Timer | None = None
        self._window = Window()
        #: Called with a request that was given up, before its own callback.
        self.on_timeout = on_timeout
        self.outbox: list[Transmit] = []
        self.stats = Stats()

    def __len__(self) -> int:
        """Requests in flight or waiting."""
        return len(self._by_tid)

    def next_tid(self) -> int:
        """A transaction id that nothing in flight has."""
        while self._tid in self._by_tid:
            self._tid = (self._tid + 1) & 0xFFFF
        tid = self._tid
        self._tid = (self._tid + 1) & 0xFFFF
        return tid

    def start(self, pending: Pending, now: float) -> None:
        """Send a request, or let it wait for the window. Beyond `MAX_PENDING` it fails at once,
        though not before this returns."""
        if len(self._by_tid) >= MAX_PENDING:
            self.stats.dropped += 1
            pending.arm(self._timers.at(now, partial(self._finish, pending, None)))
            return
        self._by_tid[pending.tid] = pending
        pending.began = now
        self.stats.requests += 1
        self._transmit(pending, now)

    def match(self, reply: Reply, now: float) -> Pending | None:
        """The request that a response answers: same transaction id, asked at that address. It is
        out of flight then, its callback still to be called."""
        pending = self._by_tid.get(reply.tid)
        if pending is None or pending.to != reply.source or pending.attempts == 0:
            self.stats.unmatched += 1
            return None
        reply.rtt = now - pending.sent_at
        reply.waited = now - pending.began
        self.stats.responses += 1
        self.forget(pending)
        return pending

    def forget(self, pending: Pending) -> None:
        """Take a request out of flight without calling anything."""
        if pending.done:
            return
        pending.done = True
        pending.arm(None)
        if self._by_tid.get(pending.tid) is pending:
            del self._by_tid[pending.tid]
            if pending.attempts:
                self._window.finished()

    def send(self, datagram: bytes, socket: int, to: Address) -> None:
        """Put one datagram out; replies and forwarded messages are never limited by the window."""
        if len(self.outbox) >= MAX_OUTBOX:
            self.stats.dropped += 1
            return
        self.outbox.append(Transmit(socket, to, (datagram,)))

    def _transmit(self, pending: Pending, now: float) -> None:
        if not pending.force and self._window.full(now):
            if len(self._waiting) >= 2 * MAX_PENDING:
                self._waiting = deque(other for other in self._waiting if not other.done)
            self._waiting.append(pending)
            self._drain_later(now)
            return
        pending.attempts += 1
        pending.sent_at = now
        self._window.sent(now)
        pending.arm(self._timers.at(now + pending.timeout, partial(self._expired, pending)))
        self.send(pending.datagram, pending.socket, pending.to)

    def _expired(self, pending: Pending, now: float) -> None:
        if pending.attempts <= pending.retries:
            on_slow, pending.on_slow = pending.on_slow, None
            self._transmit(pending, now)
            if on_slow is not None:
                on_slow(now)
            return
        self.stats.timeouts += 1
        self.on_timeout(pending, now)
        self._finish(pending, None, now)

    def _finish(self, pending: Pending, reply: Reply | None, now: float) -> None:
        self.forget(pending)
        pending.on_done(reply, now)

    def _drain_later(self, now: float) -> None:
        if self._draining is None:
            self._draining = self._timers.at(self._window.next_turn(now), self._drain)

    def _drain(self, now: float) -> None:
        self._draining = None
        while self._waiting and not self._window.full(now):
            pending = self._waiting.popleft()
            if not pending.done:
                self._transmit(pending, now)
        if self._waiting:
            self._drain_later(now)
