"""What a node's host looks like from outside: what its NAT does, and who answers how fast
(spec: hyperdht 2.14, 7).

    round -> all known nodes are asked from the current main socket; and strangers are asked to
             send to the server socket, unless it is known to be reachable
    pause -> what a NAT or a network forgets is forgotten by then
    round -> the same once more, and from the other main socket
    hairpin -> each socket asks the other one at its public address

The server socket asks nobody before strangers have tried it: what it sends would let answers in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from msgspec import Struct

from ..transmit import CLIENT_SOCKET, SERVER_SOCKET, Address
from .messages import Firewall
from .nat import Nat
from .network_state import QUORUM, TESTERS
from .rpc import Pending
from .timers import Timer
from .wire import FIND_NODE, PING, PING_NAT, Reply

if TYPE_CHECKING:
    from .node import Node

#: Nodes asked in a round: as many as a `Nat` takes samples.
NODES = 16
#: Seconds that a round lasts at most, and after which those that are silent are asked once more,
#: otherwise: nodes that have just started leave PINGs unanswered (spec: hyperdht 4.1), and
#: datagrams get lost.
ROUND = 1.5
ASK_AGAIN = 0.5
#: Seconds that strangers have to reach the server socket; they are asked again after half of them.
STRANGERS = 2.0
#: Seconds from the first round to the second.
APART = 3.0
#: Seconds that a datagram to our own router and back waits for its answer, and how often it is
#: repeated.
HAIRPIN_TIMEOUT = 0.3
HAIRPIN_RETRIES = 1


class Findings(Struct, frozen=True):
    """Times in seconds. What could not be found out is None, or `Firewall.UNKNOWN`."""

    #: Addresses of the host's interfaces.
    local_hosts: tuple[str, ...]
    #: Nodes that were asked, and for each that has answered its fastest round trip, sorted.
    asked: int
    round_trips: tuple[float, ...]
    #: OPEN: strangers reach the server socket.
    firewall: Firewall = Firewall.UNKNOWN
    #: For the local port of each socket, where the nodes see it.
    seen: tuple[tuple[int, tuple[Address, ...]], ...] = ()
    #: Everybody sees each socket at its own port.
    port_kept: bool | None = None
    #: The same node saw us at the same address in both rounds.
    stable: bool | None = None
    #: What is sent to our own public address comes back in. None also without a NAT.
    hairpin: bool | None = None

    @property
    def reachable(self) -> bool:
        """Whether anybody has answered."""
        return bool(self.round_trips)

    @property
    def public_hosts(self) -> tuple[str, ...]:
        """Where nodes see us."""
        return tuple(dict.fromkeys(host for _, where in self.seen for host, _ in where))

    @property
    def translated(self) -> bool:
        """Whether others see an address that is none of ours; the loopback is."""
        others = (host for host in self.public_hosts if not host.startswith("127."))
        return any(host not in self.local_hosts for host in others)


class _Round:
    """Asks nodes from one socket, each twice at most. What is not answered is cancelled, so that
    the node does not take dead nodes for an outage of its own."""

    __slots__ = ("_node", "_on_done", "_open", "_socket", "_timer", "nat", "round_trips", "seen")

    def __init__(self, node: Node, socket: int, on_done: Callable[[float], None]) -> None:
        self._node = node
        self._socket = socket
        self._on_done = on_done
        self._open: dict[Address, list[Pending]] = {}
        self._timer: Timer | None = None
        self.nat = Nat()
        #: By the node that says so.
        self.seen: dict[Address, Address] = {}
        self.round_trips: dict[Address, float] = {}

    def start(self, nodes: Sequence[Address], now: float) -> None:
        """``on_done`` is called once, after this has returned."""
        for address in nodes:
            self._open[address] = []
            self._ask(address, PING, now)
        self._timer = self._node.timers.at(now + ASK_AGAIN, self._ask_again)

    def _ask_again(self, now: float) -> None:
        for address in self._open:
            self._ask(address, FIND_NODE, now)
        self._timer = self._node.timers.at(now + ROUND - ASK_AGAIN, self._finish)

    def _ask(self, address: Address, command: int, now: float) -> None:
        pending = self._node.request(
            address,
            command,
            now,
            internal=True,
            target=self._node.id if command == FIND_NODE else None,
            socket=self._socket,
            retries=0,
            timeout=2 * ROUND,
            force=True,
            on_done=partial(self._answered, address),
        )
        self._open[address].append(pending)

    def _answered(self, address: Address, reply: Reply | None, now: float) -> None:
        if reply is None:
            return
        self.nat.add(reply.to, address)
        self.seen[address] = reply.to
        self.round_trips[address] = reply.rtt
        for pending in self._open.pop(address):
            pending.cancel()
        if not self._open:
            self._finish(now)

    def _finish(self, now: float) -> None:
        for several in self._open.values():
            for pending in several:
                pending.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self._on_done(now)


class Examination:
    """Of one node that has bootstrapped; ``on_done(findings, now)`` is called once, some
    `APART` seconds after `start`, or before that returns when nobody has ever answered."""

    __slots__ = (
        "_first",
        "_hairpins",
        "_left",
        "_local_hosts",
        "_main",
        "_node",
        "_nodes",
        "_on_done",
        "_passed",
        "_reachable",
        "_second",
        "_started",
        "_strangers",
    )

    def __init__(
        self,
        node: Node,
        local_hosts: tuple[str, ...],
        on_done: Callable[[Findings, float], None],
    ) -> None:
        self._node = node
        self._local_hosts = local_hosts
        self._on_done = on_done
        self._nodes: list[Address] = []
        # Strangers that were asked to send to the server socket, and how many did.
        self._strangers: list[Pending] = []
        self._passed = 0
        self._reachable = False
        # What has to end until the next step begins.
        self._left = 0
        self._started = 0.0
        self._main = CLIENT_SOCKET
        self._first: _Round | None = None
        self._second: dict[int, _Round] = {}
        self._hairpins: list[bool] = []

    def start(self, now: float) -> None:
        """Begin."""
        node = self._node
        self._started, self._main = now, node.current_socket
        known = dict.fromkeys(contact.address for contact in reversed(node.table))
        known.update(dict.fromkeys(node.bootstrap))
        self._nodes = list(known)[:NODES]
        if not self._nodes or not node.stats.responses:
            # The bootstrap has been patient enough with them.
            self._finish(now)
            return
        self._reachable = not node.firewalled
        self._left = 1
        if not self._reachable:
            self._ask_strangers(now)
        self._first = _Round(node, self._main, self._step_done)
        self._first.start(self._nodes, now)

    def _ask_strangers(self, now: float) -> None:
        self._left += 1
        for address in self._nodes[:TESTERS]:
            pending = self._node.request(
                address,
                PING_NAT,
                now,
                internal=True,
                value=self._node.server_port.to_bytes(2, "little"),
                timeout=STRANGERS / 2,
                force=True,
                on_done=self._tried,
            )
            self._strangers.append(pending)
        self._node.timers.at(now + STRANGERS, self._all_tried)

    def _tried(self, reply: Reply | None, _now: float) -> None:
        if reply is not None and reply.socket == SERVER_SOCKET:
            self._passed += 1

    def _all_tried(self, now: float) -> None:
        for pending in self._strangers:
            pending.cancel()
        # In a small network few could try.
        self._reachable = self._passed >= (QUORUM if len(self._strangers) >= TESTERS else 1)
        self._step_done(now)

    def _step_done(self, now: float) -> None:
        self._left -= 1
        if self._left:
            return
        if self._second:
            self._reach_ourselves(now)
        else:
            self._node.timers.at(max(now, self._started + APART), self._again)

    def _again(self, now: float) -> None:
        self._left = 2
        for socket in (SERVER_SOCKET, CLIENT_SOCKET):
            self._second[socket] = _Round(self._node, socket, self._step_done)
        for each in self._second.values():
            each.start(self._nodes, now)

    def _reach_ourselves(self, now: float) -> None:
        server, client = map(_place, (self._second[SERVER_SOCKET], self._second[CLIENT_SOCKET]))
        if server is None or client is None or not self._findings().translated:
            self._finish(now)
            return
        # Both at once, so that a router that only lets answers in takes them for that.
        for socket, other in ((SERVER_SOCKET, client), (CLIENT_SOCKET, server)):
            self._node.request(
                other,
                PING,
                now,
                internal=True,
                socket=socket,
                retries=HAIRPIN_RETRIES,
                timeout=HAIRPIN_TIMEOUT,
                force=True,
                on_done=self._came_back,
            )

    def _came_back(self, reply: Reply | None, now: float) -> None:
        self._hairpins.append(reply is not None)
        if len(self._hairpins) == 2:
            self._finish(now)

    def _finish(self, now: float) -> None:
        self._on_done(self._findings(), now)

    def _findings(self) -> Findings:
        first, second = self._first, self._second
        if first is None or not second:
            return Findings(self._local_hosts, len(self._nodes), ())
        round_trips: dict[Address, float] = {}
        for each in (first, *second.values()):
            for address, seconds in each.round_trips.items():
                round_trips[address] = min(seconds, round_trips.get(address, seconds))
        ports = {SERVER_SOCKET: self._node.server_port, CLIENT_SOCKET: self._node.client_port}
        seen = tuple(
            (ports[socket], tuple(dict.fromkeys(each.seen.values())))
            for socket, each in second.items()
        )
        kept = [port == place[1] for port, places in seen for place in places]
        before, again = first.seen, second[self._main].seen
        same = [before[address] == again[address] for address in before if address in again]
        return Findings(
            self._local_hosts,
            len(self._nodes),
            tuple(sorted(round_trips.values())),
            self._firewall(),
            seen,
            all(kept) if kept else None,
            all(same) if same else None,
            any(self._hairpins) if self._hairpins else None,
        )

    def _firewall(self) -> Firewall:
        if self._reachable:
            return Firewall.OPEN
        verdicts = {each.nat.verdict.firewall for each in self._second.values()}
        # The less favourable one: which socket a connection will use is not known beforehand.
        for firewall in (Firewall.RANDOM, Firewall.CONSISTENT):
            if firewall in verdicts:
                return firewall
        return Firewall.UNKNOWN


def _place(asked: _Round) -> Address | None:
    """Where everybody sees a socket; None when they do not agree."""
    places = set(asked.seen.values())
    return next(iter(places)) if len(places) == 1 else None
