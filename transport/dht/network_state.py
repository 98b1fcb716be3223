"""What a node finds out about itself: joining, the firewall test, health
(spec: hyperdht 2.13, 2.14, 2.17, 2.18)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from ..transmit import SERVER_SOCKET, Address
from .addresses import node_id
from .sampler import Sampler
from .timers import Timer
from .wire import FIND_NODE, PING_NAT, Reply

if TYPE_CHECKING:
    from .node import Node
    from .query import Query

#: Ticks until an adaptive node tries to become persistent: after the start, and after each try.
STABLE_FIRST = 240
STABLE_AGAIN = 720
#: Nodes asked in a firewall test, and how many must get through when so many are asked.
TESTERS = 5
QUORUM = 3

#: Seconds after which NATs and firewalls have forgotten what left through them.
RETEST = 180.0

#: Snapshots in the window of health, and events that make an interval count.
HEALTH_WINDOW = 4
HEALTH_EVENTS = 4


class NetworkState:
    """Joins the network and decides whether the node is reachable."""

    __slots__ = (
        "_again",
        "_examined",
        "_joining",
        "_node",
        "_quick_armed",
        "_quick_done",
        "_quick_passed",
        "_quick_sent",
        "_quick_timer",
        "_quick_waits",
        "_retest_timer",
        "_stable_in",
        "_testing",
    )  # fmt: skip

    def __init__(self, node: Node) -> None:
        self._node = node
        #: The public host at the last attempt to become persistent.
        self._examined: str | None = None
        self._stable_in = STABLE_FIRST
        self._testing = False
        # The search for ourselves is under way; and it has to be done once more.
        self._joining = False
        self._again = False
        # While it is set, what gets through to the server socket may be answers.
        self._retest_timer: Timer | None = None
        self._quick_armed = False
        self._quick_sent = False
        self._quick_done = False
        self._quick_passed = False
        self._quick_waits: float | None = None
        self._quick_timer: Timer | None = None

    def bootstrap(self, now: float) -> None:
        """Look for ourselves, and on the way for whether others reach our server socket."""
        node = self._node
        forced = node.config.ephemeral is False
        self._joining = True
        self._quick_sent = self._quick_done = self._quick_passed = False
        self._quick_armed = (
            node.firewalled
            and node.config.quick_check
            and not forced
            and self._retest_timer is None
        )
        self._find_self(self._found_self, now)

    def rejoin(self, now: float) -> None:
        """Do it all again, after the network has changed."""
        if self._joining:
            self._again = True
        else:
            self.bootstrap(now)

    def retest(self, now: float) -> None:
        """The server socket was reachable where we were, and may not be here: test that, but not
        before the ways have closed that its requests of late have opened here."""
        if self._retest_timer is not None:
            self._retest_timer.cancel()
            self._retest_timer = None
        if self._node.config.quick_check:
            self._retest_timer = self._node.timers.at(now + RETEST, self._retest)

    def _retest(self, now: float) -> None:
        self._retest_timer = None
        self.update(True, lambda _changed, _now: None, now)

    def on_tick(self, now: float) -> None:
        """Count down to the attempt to become persistent."""
        node = self._node
        if not node.adaptive or not node.ephemeral:
            return
        self._stable_in -= 1
        if self._stable_in > 0:
            return
        if node.public_host is not None and node.public_host == self._examined:
            self._stable_in = STABLE_AGAIN
            return
        self.update(False, lambda changed, now: None, now)

    def on_wake_up(self) -> None:
        """After a sleep the machine may be anywhere."""
        self._stable_in = STABLE_AGAIN
        self._examined = None

    def update(self, firewall_only: bool, done: Callable[[bool, float], None], now: float) -> None:
        """Test whether the node is reachable, and become persistent unless ``firewall_only``.
        ``done(changed, now)`` may be called before this returns."""
        node = self._node
        if not node.ephemeral or (firewall_only and not node.firewalled) or self._testing:
            done(False, now)
            return
        host, port = node.public_host, node.public_port
        if not firewall_only:
            self._examined = host
            self._stable_in = STABLE_AGAIN
        if host is None or port == 0:
            done(False, now)
            return
        if not node.firewalled:
            self._become(firewall_only, (host, port), None, now)
            done(True, now)
            return

        def tested(fresh: Sampler | None, now: float) -> None:
            self._testing = False
            same = node.public_host == host and node.firewalled and node.ephemeral
            if fresh is None or fresh.host != host or not same:
                done(False, now)
                return
            self._become(firewall_only, (host, node.server_port), fresh, now)
            done(True, now)

        self._testing = True
        FirewallTest(node, tested).start(host, now)

    def _become(
        self, firewall_only: bool, public: Address, fresh: Sampler | None, now: float
    ) -> None:
        node = self._node
        node.firewalled = False
        if not firewall_only:
            node.ephemeral = False
        if fresh is not None:
            node.sampler = fresh
        node.rename(node_id(public), now)

    def _find_self(self, done: Callable[[Query, float], None], now: float) -> None:
        self._node.background_query(
            self._node.id, FIND_NODE, now, on_reply=self._first_reply, on_done=done
        )

    def _first_reply(self, reply: Reply, now: float) -> None:
        if not self._quick_armed or self._quick_sent:
            return
        self._quick_sent = True
        port = self._node.server_port
        self._node.request(
            reply.source,
            PING_NAT,
            now,
            internal=True,
            value=port.to_bytes(2, "little"),
            on_done=self._quick_answered,
        )

    def _quick_answered(self, reply: Reply | None, now: float) -> None:
        self._quick_done = True
        self._quick_passed = reply is not None
        if self._quick_timer is not None:
            self._quick_timer.cancel()
            self._quick_timer = None
            self._decide(now)

    def _found_self(self, query: Query, now: float) -> None:
        wait = self._node.config.quick_check_wait
        if self._quick_sent and not self._quick_done and wait > 0:
            # On a fast network the query ends before the answer is here (spec: hyperdht 2.13).
            self._quick_timer = self._node.timers.at(now + wait, self._waited)
            return
        self._decide(now)

    def _waited(self, now: float) -> None:
        self._quick_timer = None
        self._decide(now)

    def _decide(self, now: float) -> None:
        self._quick_armed = False
        forced = self._node.config.ephemeral is False
        if forced or self._quick_passed:
            self.update(not forced, self._updated, now)
        else:
            self._joined(now)

    def _updated(self, changed: bool, now: float) -> None:
        if changed:
            self._find_self(lambda _query, now: self._joined(now), now)
        else:
            self._joined(now)

    def _joined(self, now: float) -> None:
        self._joining = False
        self._node.joined(now)
        if self._again:
            self._again = False
            self.bootstrap(now)


class FirewallTest:
    """Asks several nodes to send to the server socket (spec: hyperdht 2.14, step 3)."""

    __slots__ = ("_asked", "_done", "_host", "_node", "_passed", "_sampler", "_waiting")

    def __init__(self, node: Node, done: Callable[[Sampler | None, float], None]) -> None:
        self._node = node
        # Called once: with the samples of the server socket, or with None for "firewalled".
        self._done = done
        self._sampler = Sampler()
        self._host = ""
        self._asked = 0
        self._waiting = 0
        self._passed = 0

    def start(self, host: str, now: float) -> None:
        """``host`` is our public host as far as known."""
        self._host = host
        node = self._node
        testers: dict[Address, bytes | None] = {}
        for contact in reversed(node.table):
            if len(testers) == TESTERS:
                break
            testers[contact.address] = contact.id
        if len(testers) < TESTERS:
            for address in node.bootstrap:
                testers.setdefault(address, None)
        if not testers:
            self._done(None, now)
            return
        self._asked = self._waiting = len(testers)
        for address, id in testers.items():  # noqa: A001
            node.request(
                address,
                PING_NAT,
                now,
                internal=True,
                value=node.server_port.to_bytes(2, "little"),
                node_id=id,
                on_done=self._answered,
            )

    def _answered(self, reply: Reply | None, now: float) -> None:
        self._waiting -= 1
        if reply is not None and reply.socket == SERVER_SOCKET:
            self._passed += 1
            self._sampler.add(reply.to)
        if self._waiting == 0:
            self._done(self._sampler if self._reachable() else None, now)

    def _reachable(self) -> bool:
        quorum = QUORUM if self._asked >= TESTERS else 1
        return (
            self._passed >= quorum
            and self._sampler.host == self._host
            and self._sampler.port == self._node.server_port
        )


class Health:
    """Whether the network is there, by how many requests are answered (spec: hyperdht 2.18)."""

    __slots__ = ("_window", "degraded", "online")

    def __init__(self) -> None:
        # Pairs of total responses and total timeouts, one a tick.
        self._window: deque[tuple[int, int]] = deque(maxlen=HEALTH_WINDOW + 1)
        self.online = True
        self.degraded = False

    def reset(self) -> None:
        """Forget the past, as after a sleep."""
        self._window.clear()
        self.online = True
        self.degraded = False

    def update(self, responses: int, timeouts: int) -> bool:
        """Take the totals of a tick. Returns whether the node came back online by it."""
        self._window.append((responses, timeouts))
        window = list(self._window)
        if len(window) <= HEALTH_WINDOW:
            return False
        intervals = [
            (after[0] - before[0], after[1] - before[1]) for before, after in pairwise(window)
        ]
        if sum(intervals[-1]) < HEALTH_EVENTS:
            return False
        was_online = self.online
        offline = [answered == 0 for answered, _ in intervals]
        bad = [lost * 2 > answered + lost for answered, lost in intervals]
        if not offline[-1]:
            self.online = True
        elif offline[-2]:
            self.online = False
        if not self.online or not any(bad):
            self.degraded = False
        elif all(bad):
            self.degraded = True
        return self.online and not was_online
