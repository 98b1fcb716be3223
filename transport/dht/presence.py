"""Whether the network is there, and whether we are still where we were (spec: hyperdht 2.17, 2.18).

    present --requests in a row without an answer--> silent: somebody is asked now and then
       ^-----------------anybody answers-----------------'

Others say with each answer where they see us. When they agree on another host, we have moved.
"""

from __future__ import annotations

from math import inf
from random import Random
from typing import TYPE_CHECKING

from ..transmit import Address
from .table import K
from .wire import FIND_NODE, Reply

if TYPE_CHECKING:
    from .node import Node

#: Requests given up in a row after which the fault is taken to be on our side. One dead node is
#: asked once at a time.
SILENT_AFTER = 3
#: Seconds between two looks for anybody, and how many are asked each time: what being offline
#: costs, and how late its end is seen.
PROBE_EVERY = 2.0
PROBES = 2
#: Nodes that left the table without an answer, remembered for when nobody else is left: it may have
#: been our fault.
LAST_RESORT = K
#: Nodes that must see us elsewhere before we look into it.
DOUBTS = 2
#: Seconds between two times that we look where we are, and that we are elsewhere: on a host with
#: several ways out others never agree.
PAUSE = 10.0


class Presence:
    """Of one node. It is told of all answers and of all requests without one."""

    __slots__ = (
        "_doubts",
        "_looked_at",
        "_moved_at",
        "_node",
        "_rng",
        "_unanswered",
        "last_resort",
        "silent",
    )

    def __init__(self, node: Node, rng: Random) -> None:
        self._node = node
        self._rng = rng
        #: Nobody answers.
        self.silent = False
        #: Who was known once, the latest last.
        self.last_resort: dict[Address, None] = {}
        self._unanswered = 0
        # Who sees us elsewhere than our samples say, since the last one who agreed.
        self._doubts: set[Address] = set()
        self._looked_at = -inf
        self._moved_at = -inf

    def gone(self, address: Address) -> None:
        """A node left the table, as it did not answer."""
        self.last_resort.pop(address, None)
        self.last_resort[address] = None
        if len(self.last_resort) > LAST_RESORT:
            del self.last_resort[next(iter(self.last_resort))]

    def unanswered(self, now: float) -> None:
        """A request was given up."""
        self._unanswered += 1
        if self._unanswered >= SILENT_AFTER and not self.silent and self._node.ready:
            self.silent = True
            self._node.timers.at(now + PROBE_EVERY, self._probe)

    def heard(self, reply: Reply, now: float) -> None:
        """A request was answered."""
        self._unanswered = 0
        if self.silent:
            self.silent = False
            self._node.came_back(now)
        elif reply.socket == self._node.current_socket:
            self._compare(reply, now)

    def moves(self, now: float) -> bool:
        """Others agree on another host than before. Whether to believe it: not, if the last time is
        not long ago."""
        if now - self._moved_at < PAUSE:
            return False
        self._moved_at = now
        return True

    def _compare(self, reply: Reply, now: float) -> None:
        host = self._node.public_host
        if host is None or host == reply.to[0]:
            self._doubts.clear()
            return
        self._doubts.add(reply.source)
        enough = min(DOUBTS, max(1, len(self._node.table)))
        if len(self._doubts) >= enough and now - self._looked_at >= PAUSE:
            self._looked_at = now
            self._doubts.clear()
            self._node.sample_again(now)

    def _probe(self, now: float) -> None:
        if not self.silent:
            return
        node = self._node
        known = dict.fromkeys((*node.config.bootstrap, *self.last_resort))
        known.update((contact.address, None) for contact in node.table)
        for address in self._rng.sample(list(known), min(PROBES, len(known))):
            # No PING: a node that was restarted leaves those unanswered for a while.
            node.request(
                address,
                FIND_NODE,
                now,
                internal=True,
                target=node.id,
                retries=0,
                on_done=lambda _reply, _now: None,
            )
        node.timers.at(now + PROBE_EVERY, self._probe)
