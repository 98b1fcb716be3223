"""Punching: both sides send to each other until a datagram gets through (spec: hyperdht 5.6).

    local       remote      what is sent to the remote host, one byte each
    consistent  consistent  to its addresses: soon, then every second, ten times
    consistent  random      to random ports, until one is that of a mapping of the other side
    random      consistent  from many sockets, so that there are many such mappings
    random      random      nothing: it would not work

A `Puncher` does that for one connection to be. It uses the main socket that the node asks from as
long as the NAT lets that one appear at one address: its class is known already, nothing has to be
opened, and it goes on to answer afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

from ..transmit import Address
from .messages import Firewall
from .nat import UNKNOWN, Sampling, Verdict
from .rpc import Pending
from .timers import Timer
from .wire import PING, Reply

if TYPE_CHECKING:
    from .punches import Punches

#: Routers that a datagram passes which only opens our own NAT (spec: hyperdht 5.6). What arrives at
#: a NAT that is closed yet may spoil the mapping that it is about to make.
LOW_TTL = 5

#: Seconds between rounds of consistent punching, and how many there are. The first ones come sooner
#: than the second of the reference: a round that was lost costs less.
ROUNDS = 10
_SOON = (0.0, 0.1, 0.3)
_ROUND = 1.0
#: Rounds in which addresses are tried that nobody vouches for (spec: hyperdht 5.6).
_UNVERIFIED_ROUNDS = (4, 8)
#: Addresses of the remote side that are punched.
MAX_TARGETS = 4
#: Seconds after which the side that was asked starts, so that the side that asked has opened its
#: NAT. The reference waits a second; ours opens its own at once and then waits less.
RESPONDER_WAIT = 0.25

#: Searching through a random NAT: datagrams, seconds between two of them on the side that tries
#: ports and on the side that has the sockets, sockets, and ports (spec: hyperdht 5.6). Trying at
#: twice the pace of the reference halves the time, at 100 datagrams of one byte a second.
TRIES = 1750
TRY_EVERY = 0.01
CYCLE_EVERY = 0.02
BIRTHDAY_SOCKETS = 256
PORTS = (1000, 65535)
#: Sockets opened at once, and seconds between such groups: opening takes the shell's time.
_GROUP = 64
_GROUP_EVERY = 0.01
#: Seconds between the last socket and the first cycle.
_SETTLE = 0.1

#: Sockets that replace one whose NAT has no usable class (spec: hyperdht 7.3).
MAX_REOPENS = 3

#: Sources of punches whose genuineness one connection to be asks for at once.
MAX_CHECKS = 4


class Started(Enum):
    """What came of an attempt to start punching."""

    YES = 0
    #: Classes or addresses do not allow it.
    IMPOSSIBLE = 1
    #: Another search goes on, or the last one was a moment ago.
    BUSY = 2


class Puncher:
    """See `Punches.create`."""

    __slots__ = (
        "_checks",
        "_hosts",
        "_on_exhausted",
        "_on_path",
        "_owned",
        "_punches",
        "_remote_addresses",
        "_reopens",
        "_round",
        "_sampling",
        "_timer",
        "_tried",
        "_verified",
        "closed",
        "expected",
        "initiator",
        "key",
        "local",
        "punching",
        "remote_firewall",
        "socket",
    )

    def __init__(
        self,
        punches: Punches,
        key: bytes,
        on_path: Callable[[int, Address, float], None] | None,
        on_exhausted: Callable[[float], None] | None,
    ) -> None:
        self._punches = punches
        self._on_path = on_path
        self._on_exhausted = on_exhausted
        self.key = key
        self.initiator = on_path is not None
        #: Messages about the punching leave from here.
        self.socket = punches.node.current_socket
        #: What the NAT does to that socket, as far as known.
        self.local = UNKNOWN
        self.remote_firewall = Firewall.UNKNOWN
        #: Where a punch comes from if all is as it seems.
        self.expected: set[Address] = set()
        #: Sending goes on by itself.
        self.punching = False
        self.closed = False
        self._remote_addresses: tuple[Address, ...] = ()
        # Hosts that punches may come from, and those that have proven to be the remote side's.
        self._hosts: set[str] = set()
        self._verified: set[str] = set()
        # Sockets that nobody else uses.
        self._owned: list[int] = []
        self._sampling: Sampling | None = None
        self._reopens = 0
        self._round = 0
        self._tried: set[int] = set()
        self._timer: Timer | None = None
        self._checks: dict[tuple[int, Address], Pending] = {}

    # What is known

    @property
    def unstable(self) -> bool:
        """Whether another socket might have better luck (spec: hyperdht 7.3)."""
        return self.local.firewall == Firewall.UNKNOWN or self.both_random

    @property
    def both_random(self) -> bool:
        return self.local.firewall == self.remote_firewall == Firewall.RANDOM

    @property
    def searching(self) -> bool:
        """Whether punching means a search: one side is RANDOM."""
        return Firewall.RANDOM in (self.local.firewall, self.remote_firewall)

    def analyse(self, now: float, done: Callable[[float], None]) -> None:
        """Find the class of our NAT, then call ``done``, at once if it is known."""

        def found(verdict: Verdict, now: float) -> None:
            if not self.closed:
                self.local = verdict
                done(now)

        if self.socket in self._owned:
            found(self.local, now)
        else:
            self._punches.survey.find(now, found)

    def stabilise(self, now: float, done: Callable[[float], None]) -> None:
        """Try other sockets while the class is of no use, then call ``done``."""
        wanted = self.unstable and self._reopens < MAX_REOPENS
        socket = self._punches.sockets.open() if wanted else None
        if socket is None:
            done(now)
            return
        self._reopens += 1
        self._release(None)
        self._own(socket)
        self.socket = socket

        def sampled(now: float) -> None:
            if self._sampling is not None:
                verdict = self._sampling.nat.verdict
                if verdict.firewall != Firewall.UNKNOWN:
                    self.local = verdict
                self._sampling = None
                self.stabilise(now, done)

        self._sampling = Sampling(self._punches.node, socket, sampled)
        self._sampling.start(now)

    def expect(self, address: Address) -> None:
        """The remote side is at this address, as far as somebody in between can tell."""
        if len(self.expected) < MAX_TARGETS and address[1]:
            self.expected.add(address)
        self._expect_host(address[0])

    def learn(
        self, firewall: int, addresses: tuple[Address, ...], verified_host: str | None
    ) -> None:
        """Take over what the remote side says of itself; ``verified_host`` has proven to be its."""
        try:
            self.remote_firewall = Firewall(firewall)
        except ValueError:
            self.remote_firewall = Firewall.UNKNOWN
        if verified_host is not None:
            self._verified = {verified_host}
        self._remote_addresses = addresses[:MAX_TARGETS]
        for address in self._remote_addresses:
            self._expect_host(address[0])
            if address[1] and address[0] in self._verified:
                self.expected.add(address)

    def _expect_host(self, host: str) -> None:
        if host not in self._hosts and len(self._hosts) < 2 * MAX_TARGETS:
            self._hosts.add(host)
            self._punches.expect(self, host)

    # What is sent

    def open(self, address: Address, now: float) -> None:
        """Open our own NAT toward an address, with what does not get there."""
        self._punches.send(self.socket, address, LOW_TTL, now)

    def knock(self, address: Address, now: float) -> None:
        """Send one punch."""
        self._punches.send(self.socket, address, 0, now)

    @property
    def reserved(self) -> bool:
        """Whether the node's search through random NATs is this one's."""
        return self._punches.reserved(self)

    def reserve(self, now: float) -> bool:
        """Make sure of the node's search before the other side is told of it."""
        return self._punches.reserve(self, now)

    def pass_on(self) -> None:
        """Let others search as long as this one does not."""
        self._punches.pass_on(self)

    def start(self, now: float) -> Started:
        """Punch until something comes through or all has been tried. Twice is once."""
        if self.punching:
            return Started.YES
        unknown = Firewall.UNKNOWN in (self.local.firewall, self.remote_firewall)
        if unknown or self.both_random:
            return Started.IMPOSSIBLE
        if not self.searching:
            return self._start_rounds(now)
        target = self._target()
        if target is None:
            return Started.IMPOSSIBLE
        if not self.reserve(now):
            return Started.BUSY
        self.punching = True
        if self.local.firewall == Firewall.RANDOM:
            self._open_many(target, now)
        else:
            # The side with the sockets opens them first.
            wait = 0.0 if self.initiator else RESPONDER_WAIT
            self._later(wait, partial(self._try, target[0]), now)
        return Started.YES

    def close(self, now: float, keep: int | None = None) -> None:
        """Stop, and give up all sockets but ``keep``. Harmless twice."""
        if self.closed:
            return
        self.closed = True
        if self._sampling is not None:
            self._sampling.cancel()
            self._sampling = None
        if self._timer is not None:
            self._timer.cancel()
        for pending in self._checks.values():
            pending.cancel()
        self._release(keep)
        self._punches.forget(self, self._hosts, now)
        self.punching = False

    def _target(self) -> Address | None:
        """The first remote address of which is proven that the other side gets what is sent there;
        without that, anybody could have us flood anybody."""
        verified = (a for a in self._remote_addresses if a[0] in self._verified)
        return next(verified, None)

    def _later(self, wait: float, what: Callable[[float], None], now: float) -> None:
        self._timer = self._punches.node.timers.at(now + wait, what)

    def _exhausted(self, now: float) -> None:
        on_exhausted, self._on_exhausted = self._on_exhausted, None
        self.close(now)
        if on_exhausted is not None:
            on_exhausted(now)

    # Consistent on both sides

    def _start_rounds(self, now: float) -> Started:
        if not self._remote_addresses and not self.expected:
            return Started.IMPOSSIBLE
        self.punching = True
        if self.initiator:
            self._next_round(now)
        else:
            for address in self._targets():
                self.open(address, now)
            self._later(RESPONDER_WAIT, self._next_round, now)
        return Started.YES

    def _targets(self) -> list[Address]:
        unverified = self._round in _UNVERIFIED_ROUNDS
        remote = [a for a in self._remote_addresses if a[0] in self._verified or unverified]
        return list(dict.fromkeys([*sorted(self.expected), *remote]))[:MAX_TARGETS]

    def _next_round(self, now: float) -> None:
        if self._round == ROUNDS:
            self._exhausted(now)
            return
        self._round += 1
        for address in self._targets():
            self.knock(address, now)
        wait = _SOON[self._round] - _SOON[self._round - 1] if self._round < len(_SOON) else _ROUND
        self._later(wait, self._next_round, now)

    # One side random

    def _try(self, host: str, now: float) -> None:
        """Random ports of the side that has the sockets, each once."""
        if len(self._tried) == TRIES:
            self._later(_ROUND, self._exhausted, now)
            self._tried.add(0)
            return
        port = self._punches.rng.randint(*PORTS)
        while port in self._tried:
            port = self._punches.rng.randint(*PORTS)
        self._tried.add(port)
        self.knock((host, port), now)
        self._later(TRY_EVERY, partial(self._try, host), now)

    def _open_many(self, target: Address, now: float) -> None:
        for _ in range(_GROUP):
            if len(self._owned) == BIRTHDAY_SOCKETS:
                break
            socket = self._punches.sockets.open()
            if socket is None:
                break
            self._own(socket)
            self._punches.send(socket, target, LOW_TTL, now)
        else:
            self._later(_GROUP_EVERY, partial(self._open_many, target), now)
            return
        self._later(_SETTLE, partial(self._cycle, target, 0), now)

    def _cycle(self, target: Address, count: int, now: float) -> None:
        """From each socket in turn: keeps the mappings, and repeats what was lost."""
        if count == TRIES or not self._owned:
            self._later(_ROUND, self._exhausted, now)
            return
        ttl = LOW_TTL if count < len(self._owned) else 0
        self._punches.send(self._owned[count % len(self._owned)], target, ttl, now)
        self._later(CYCLE_EVERY, partial(self._cycle, target, count + 1), now)

    # What is received

    def on_punch(self, socket: int, source: Address, now: float) -> None:
        """A punch has come through to the initiator."""
        if source in self.expected:
            self._found(socket, source, now)
            return
        # Anybody can send a byte in the name of anybody. Who is expected at some port of this host
        # speaks the protocol of the DHT there; who only pretends to be there cannot answer.
        check = socket, source
        if check in self._checks or len(self._checks) >= MAX_CHECKS:
            return
        self._checks[check] = self._punches.node.request(
            source,
            PING,
            now,
            internal=True,
            socket=socket,
            force=True,
            timeout=0.5,
            on_done=partial(self._checked, check),
        )

    def _checked(self, check: tuple[int, Address], reply: Reply | None, now: float) -> None:
        del self._checks[check]
        if reply is not None:
            self._found(*check, now)

    def _found(self, socket: int, source: Address, now: float) -> None:
        on_path = self._on_path
        self._punches.stats.opened += 1
        self.close(now, keep=socket)
        if on_path is not None:
            on_path(socket, source, now)

    # Sockets

    def _own(self, socket: int) -> None:
        self._owned.append(socket)
        self._punches.own(self, socket)

    def _release(self, keep: int | None) -> None:
        for socket in self._owned:
            self._punches.disown(socket)
            if socket != keep:
                self._punches.sockets.close(socket)
        self._owned.clear()
