"""All punching of a node: whose an arriving punch is, and how much there may be
(spec: hyperdht 5.6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from ..transmit import Address, Transmit
from .limiter import Limiter
from .nat import Survey
from .punch import Puncher
from .sockets import Sockets

if TYPE_CHECKING:
    from .node import Node

#: What is sent; any datagram that is not longer counts (spec: hyperdht 5.6).
PUNCH = b"\x00"
#: Seconds between two searches of one node (spec: hyperdht 5.6): NATs have room for so many
#: mappings only, and need a while to forget them.
RANDOM_PAUSE = 20.0
#: Connections to be that are punched for at once, and how many of them with one key.
MAX_PUNCHERS = 1024
MAX_PUNCHERS_PER_KEY = 256
#: Punches a second of a node, echoes included; what is more is dropped.
PUNCHES_PER_SECOND = 1000.0
PUNCHES_BURST = 2000.0
#: Echoes a second to one host.
ECHOES_PER_SECOND = 200.0
ECHOES_BURST = 600.0


@dataclass(slots=True)
class Stats:
    """Counted since the start."""

    sent: int = 0
    received: int = 0
    #: Paths found by punching.
    opened: int = 0
    #: What a limit of ours kept from being sent or done.
    dropped: int = 0
    #: Punches that were nobody's.
    stray: int = 0


class Punches:
    """All punching of a node."""

    __slots__ = (
        "_by_host",
        "_by_key",
        "_by_socket",
        "_echoes",
        "_punchers",
        "_random",
        "_random_ended",
        "_total",
        "node",
        "outbox",
        "rng",
        "sockets",
        "stats",
        "survey",
    )

    def __init__(self, node: Node, rng: Random) -> None:
        self.node = node
        self.rng = rng
        self.sockets = Sockets(node.timers)
        self.survey = Survey(node)
        self.outbox: list[Transmit] = []
        self.stats = Stats()
        self._punchers: set[Puncher] = set()
        self._by_key: dict[bytes, int] = {}
        self._by_socket: dict[int, Puncher] = {}
        # Those who punch from a main socket, by the host they expect punches from.
        self._by_host: dict[str, list[Puncher]] = {}
        self._random: Puncher | None = None
        self._random_ended = -RANDOM_PAUSE
        self._total = Limiter(PUNCHES_PER_SECOND, PUNCHES_BURST)
        self._echoes = Limiter(ECHOES_PER_SECOND, ECHOES_BURST)

    def __len__(self) -> int:
        """Connections to be that are punched for."""
        return len(self._punchers)

    def create(
        self,
        key: bytes,
        *,
        on_path: Callable[[int, Address, float], None] | None = None,
        on_exhausted: Callable[[float], None] | None = None,
    ) -> Puncher | None:
        """A puncher for a connection with whoever has the 32-byte key; None beyond the limits.

        With ``on_path(socket, address, now)`` it is the initiator: that is called once, when a
        punch has come through, and the puncher is closed then but for that socket. Without, it
        echoes punches. ``on_exhausted`` is called once, when all has been tried.
        """
        count = self._by_key.get(key, 0)
        if len(self._punchers) >= MAX_PUNCHERS or count >= MAX_PUNCHERS_PER_KEY:
            self.stats.dropped += 1
            return None
        self._by_key[key] = count + 1
        puncher = Puncher(self, key, on_path, on_exhausted)
        self._punchers.add(puncher)
        return puncher

    def receive(self, socket: int, source: Address, now: float) -> None:
        """A datagram of at most one byte has arrived."""
        self.stats.received += 1
        if source[1] == 0:
            self.stats.stray += 1
            return
        owner = self._by_socket.get(socket)
        expecting = [owner] if owner is not None else [*self._by_host.get(source[0], ())]
        initiators = [puncher for puncher in expecting if puncher.initiator]
        exact = [puncher for puncher in initiators if source in puncher.expected]
        for puncher in exact or initiators:
            puncher.on_punch(socket, source, now)
        # One echo, for however many it may be meant.
        if any(not puncher.initiator for puncher in expecting):
            if self._echoes.take(source[0], now):
                self.send(socket, source, 0, now)
            else:
                self.stats.dropped += 1
        if not expecting:
            self.stats.stray += 1

    def send(self, socket: int, to: Address, ttl: int, now: float) -> bool:
        """Send one punch, unless there were too many."""
        if to[1] == 0 or not self._total.take("", now):
            self.stats.dropped += 1
            return False
        self.stats.sent += 1
        self.outbox.append(Transmit(socket, to, (PUNCH,), ttl=ttl))
        return True

    def random_pause(self, now: float) -> float:
        """Seconds until a search through a random NAT may begin, as far as known."""
        if self._random is not None:
            return RANDOM_PAUSE
        return max(0.0, self._random_ended + RANDOM_PAUSE - now)

    def close(self) -> None:
        """Stop all punching."""
        self.survey.close()
        for puncher in list(self._punchers):
            puncher.close(0.0)

    # For the punchers

    def expect(self, puncher: Puncher, host: str) -> None:
        """Punches from a host may be for this one."""
        expecting = self._by_host.setdefault(host, [])
        if puncher not in expecting:
            expecting.append(puncher)

    def own(self, puncher: Puncher, socket: int) -> None:
        """Punches on a socket are for this one."""
        self._by_socket[socket] = puncher

    def disown(self, socket: int) -> None:
        self._by_socket.pop(socket, None)

    def reserve(self, puncher: Puncher, now: float) -> bool:
        """Whether it may search; one at a time does."""
        if self._random is puncher:
            return True
        if self.random_pause(now) > 0:
            return False
        self._random = puncher
        return True

    def pass_on(self, puncher: Puncher) -> None:
        """It does not search yet, though it could."""
        if self._random is puncher and not puncher.punching:
            self._random = None

    def reserved(self, puncher: Puncher) -> bool:
        return self._random is puncher

    def forget(self, puncher: Puncher, hosts: set[str], now: float) -> None:
        """It is closed."""
        self._punchers.discard(puncher)
        left = self._by_key[puncher.key] - 1
        if left:
            self._by_key[puncher.key] = left
        else:
            del self._by_key[puncher.key]
        for host in hosts:
            expecting = self._by_host.get(host)
            if expecting is not None and puncher in expecting:
                expecting.remove(puncher)
                if not expecting:
                    del self._by_host[host]
        if self._random is puncher:
            self._random = None
            if puncher.punching:
                self._random_ended = now
