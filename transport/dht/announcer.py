"""Keeping a server findable: announce, watch the relays, announce again (spec: hyperdht 4.1).

cycle:  FIND_PEER query -> ANNOUNCE at the 3 closest -> unannounce at those no longer used
watch:  every 3 s all relays are asked; one that does not hold us any more, or sees us at another
        address than it forwards to, starts a new cycle
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from .. import keys
from ..errors import DecodeError
from ..keys import KeyPair
from ..transmit import Address
from . import messages
from .messages import Announce, PeerRecord, Relay
from .node import Node
from .query import Query
from .rpc import Pending
from .timers import Timer
from .wire import PING, Reply

#: Nodes that a server announces to.
RELAYS = 3
#: Seconds between two rounds: short enough to keep a NAT's mapping toward the relays open.
WATCH_INTERVAL = 3.0
#: Rounds before a new cycle, so about five minutes.
ROUNDS = 100
#: Every so many rounds relays are asked whether they still hold the announcement: one that was
#: restarted answers pings and forwards nothing (spec: hyperdht 4.1).
CHECK_EVERY = 2
#: Seconds until the next cycle after one without any relay: the first, and the limit of doubling.
#: A cycle without a network takes 6 s, in which it asks once a second.
FIRST_RETRY = 1.0
LAST_RETRY = 3.0
#: Seconds between two cycles because a relay sees us elsewhere: there are NATs that never settle.
MOVE_PAUSE = 15.0


class Announcer:
    """Announces one key pair until closed. ``on_announced`` is called after each cycle that made
    the key findable."""

    __slots__ = (
        "_answers",
        "_closed",
        "_closest",
        "_found",
        "_key_pair",
        "_moved_at",
        "_node",
        "_on_announced",
        "_query",
        "_record",
        "_requests",
        "_retry",
        "_rounds",
        "_target",
        "_timer",
        "relays",
    )

    def __init__(
        self, node: Node, key_pair: KeyPair, on_announced: Callable[[float], None]
    ) -> None:
        self._node = node
        self._key_pair = key_pair
        self._on_announced = on_announced
        self._target = keys.target(key_pair.public_key)
        # Servers announce without relay addresses: the node they announce to is the relay.
        self._record = PeerRecord(key_pair.public_key)
        #: In the order in which they accepted.
        self.relays: tuple[Relay, ...] = ()
        self._closest: list[Address] = []
        self._found: list[Relay] = []
        self._query: Query | None = None
        self._requests: set[Pending] = set()
        self._timer: Timer | None = None
        self._rounds = 0
        self._answers = 0
        self._retry = FIRST_RETRY
        self._moved_at = -inf
        self._closed = False

    def refresh(self, now: float) -> None:
        """Announce now: at the start, and when our address may have changed. Without effect before
        the node is ready: its address is not known then."""
        if self._closed or not self._node.ready:
            return
        self._stop()
        self._found = []
        self._query = self._node.query(
            self._target,
            messages.FIND_PEER,
            now,
            nodes=tuple(self._closest),
            on_done=self._on_closest,
        )

    def close(self, now: float, on_closed: Callable[[float], None]) -> None:
        """Unannounce at all relays. ``on_closed`` comes when they have answered or are taken for
        dead; at once if there are none."""
        self._stop()
        self._closed = True
        relays, self.relays = self.relays, ()
        left = len(relays)

        def done(now: float) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                on_closed(now)

        for relay in relays:
            self._unannounce(relay.relay_address, done, now)
        if not relays:
            on_closed(now)

    def _stop(self) -> None:
        if self._query is not None:
            self._query.cancel()
            self._query = None
        for request in self._requests:
            request.cancel()
        self._requests.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Cycle

    def _on_closest(self, query: Query, now: float) -> None:
        self._query = None
        # After one that found nobody, the next begins with those who were there before.
        self._closest = [reply.source for reply in query.closest] or self._closest
        chosen = [reply for reply in query.closest if reply.token is not None][:RELAYS]
        self._answers = len(chosen)
        for reply in chosen:
            self._announce(reply, now)
        if not chosen:
            self._end_cycle(now)

    def _announce(self, found: Reply, now: float) -> None:
        relay = Relay(found.source, found.to)

        def on_done(reply: Reply | None, now: float) -> None:
            if pending not in self._requests:
                return  # its cycle was given up while the answer was looked at
            self._requests.discard(pending)
            self._answers -= 1
            if reply is not None and reply.error == 0:
                self._found.append(relay)
            if self._answers == 0:
                self._end_cycle(now)

        pending = self._node.request(
            found.source,
            messages.ANNOUNCE,
            now,
            target=self._target,
            token=found.token,
            value=self._signed(keys.NS_ANNOUNCE, found),
            node_id=found.id,
            on_done=on_done,
        )
        self._requests.add(pending)

    def _signed(self, namespace: bytes, found: Reply) -> bytes:
        signable = messages.announce_signable(
            namespace,
            self._target,
            found.id or b"",
            found.token or b"",
            self._record.encode(),
        )
        return Announce(self._record, signature=self._key_pair.sign(signable)).encode()

    def _end_cycle(self, now: float) -> None:
        kept = {relay.relay_address for relay in self._found}
        for relay in self.relays:
            if relay.relay_address not in kept:
                self._unannounce(relay.relay_address, _ignore, now)
        self.relays = tuple(self._found)
        self._rounds = 0
        if self.relays:
            self._retry = FIRST_RETRY
            self._timer = self._node.timers.at(now + WATCH_INTERVAL, self._watch)
        else:
            self._try_later(now)
        # A persistent node answers for its own servers, so these are found without any relay.
        if self.relays or not self._node.ephemeral:
            self._on_announced(now)

    def _try_later(self, now: float) -> None:
        self._timer = self._node.timers.at(now + self._retry, self._try_again)
        self._retry = min(self._retry * 2, LAST_RETRY)

    def _try_again(self, now: float) -> None:
        if self._node.silent:
            # Nobody would answer. The node looks for the network, and tells when it is back.
            self._try_later(now)
        else:
            self.refresh(now)

    # Watch

    def _watch(self, now: float) -> None:
        self._timer = None
        self._rounds += 1
        if self._rounds > ROUNDS:
            self.refresh(now)
            return
        self._answers = 0
        asked = len(self.relays)
        check = self._rounds % CHECK_EVERY == 0
        for relay in self.relays:
            self._ask(relay, check, asked, now)

    def _ask(self, relay: Relay, check: bool, left: int, now: float) -> None:
        def on_done(reply: Reply | None, now: float) -> None:
            if pending not in self._requests:
                return
            self._requests.discard(pending)
            if reply is not None and self._serves(relay, reply, check, now):
                self._answers += 1
            if self._requests:
                return
            if self._answers < left:
                self.refresh(now)
            else:
                self._timer = self._node.timers.at(now + WATCH_INTERVAL, self._watch)

        pending = self._node.request(
            relay.relay_address,
            messages.FIND_PEER if check else PING,
            now,
            internal=not check,
            target=self._target if check else None,
            on_done=on_done,
        )
        self._requests.add(pending)

    def _serves(self, relay: Relay, reply: Reply, check: bool, now: float) -> bool:
        """Whether a relay still forwards to us, as far as its answer tells."""
        if reply.to != relay.peer_address and now - self._moved_at >= MOVE_PAUSE:
            self._moved_at = now
            return False
        return not check or self._holds(reply)

    def _holds(self, reply: Reply) -> bool:
        if reply.error or not reply.value:
            return False
        try:
            return PeerRecord.decode(reply.value).public_key == self._key_pair.public_key
        except DecodeError:
            return False

    # Unannounce

    def _unannounce(self, relay: Address, done: Callable[[float], None], now: float) -> None:
        def on_found(reply: Reply | None, now: float) -> None:
            if reply is None or reply.id is None or reply.token is None or not reply.value:
                done(now)
                return
            self._node.request(
                relay,
                messages.UNANNOUNCE,
                now,
                target=self._target,
                token=reply.token,
                value=self._signed(keys.NS_UNANNOUNCE, reply),
                on_done=lambda _reply, now: done(now),
            )

        self._node.request(relay, messages.FIND_PEER, now, target=self._target, on_done=on_found)


def _ignore(_now: float) -> None:
    """Nobody waits for an unannounce between two cycles."""
