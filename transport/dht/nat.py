"""What the NAT in front of a socket does, from what others see of it (spec: hyperdht 7).

`Nat` classifies samples, `Sampling` collects them for a socket, and `Survey` does so for the main
sockets on behalf of all who punch from them: what was found there holds for a while.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from ..transmit import Address
from .messages import Firewall
from .rpc import Pending
from .timers import Timer
from .wire import FIND_NODE, PING, Reply

if TYPE_CHECKING:
    from .node import Node

T = TypeVar("T")

#: Nodes asked for what they see, and samples from which a decision is possible
#: (spec: hyperdht 7.1, 7.2).
SAMPLES = 4
ENOUGH = 3
#: Samples of one socket that have a say; a peer's messages add to them, too.
MAX_SAMPLES = 16
#: A table of at least so many nodes leaves out those heard from last: others ask them, too.
_ROOMY = 8
_SKIPPED = 5
#: Seconds after which nodes that have not answered are made up for by others. A lost datagram then
#: costs less than the second of a request.
SECOND_PASS = 0.25
#: Seconds for which samples of a main socket are believed. Mappings that are used live longer on
#: every NAT; one that is rebooted meanwhile shows in the next answer.
FRESH = 15.0


class Verdict(NamedTuple):
    """The class of a NAT, and where it lets a socket appear; a port is 0 when it is RANDOM."""

    firewall: Firewall = Firewall.UNKNOWN
    addresses: tuple[Address, ...] = ()

    @property
    def consistent(self) -> bool:
        """Whether everybody sees the same address: OPEN counts as that (spec: hyperdht 5.6)."""
        return self.firewall in (Firewall.CONSISTENT, Firewall.OPEN)


UNKNOWN = Verdict()


class Nat:
    """The class of the NAT in front of one socket, from at most `MAX_SAMPLES` samples.

    ``is_open``: the node knows that it is reachable.
    """

    __slots__ = ("_addresses", "_hosts", "_referrers", "is_open", "verdict")

    def __init__(self, *, is_open: bool = False) -> None:
        self.is_open = is_open
        self.verdict = Verdict(Firewall.OPEN) if is_open else UNKNOWN
        # Each with its hits, the most hits first, those of equal hits by age.
        self._hosts: dict[str, int] = {}
        self._addresses: dict[Address, int] = {}
        self._referrers: set[Address] = set()

    @property
    def sampled(self) -> int:
        """Samples so far."""
        return len(self._referrers)

    @property
    def finished(self) -> bool:
        """Whether more samples are not worth waiting for."""
        if self.is_open:
            return self.sampled > 0
        return self.verdict.consistent or self.sampled >= SAMPLES

    def heard(self, referrer: Address) -> bool:
        """Whether it has had its say."""
        return referrer in self._referrers

    def add(self, address: Address, referrer: Address) -> None:
        """``referrer`` sees us at ``address``. Each has one say."""
        if referrer in self._referrers or self.sampled >= MAX_SAMPLES:
            return
        self._referrers.add(referrer)
        self._hosts = _counted(self._hosts, address[0])
        self._addresses = _counted(self._addresses, address)
        if self.sampled >= ENOUGH and not self.is_open:
            self.verdict = self._decide()

    def _decide(self) -> Verdict:
        hits = list(self._addresses.values())
        if hits[0] >= 3:
            return self._consistent()
        if hits[0] == 1:
            return self._random()
        if len(self._hosts) == 1 and self.sampled >= SAMPLES:
            return self._random()
        if len(self._hosts) > 1 and hits[1] >= 2:
            return self._consistent()
        return self._random() if self.sampled > SAMPLES else self.verdict

    def _random(self) -> Verdict:
        return Verdict(Firewall.RANDOM, ((next(iter(self._hosts)), 0),))

    def _consistent(self) -> Verdict:
        listed: list[Address] = []
        for address, hits in self._addresses.items():
            if hits >= 2 or len(listed) < 2:
                listed.append(address)
        return Verdict(Firewall.CONSISTENT, tuple(listed))


def _counted(counts: dict[T, int], key: T) -> dict[T, int]:
    counts[key] = counts.get(key, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


class Sampling:
    """PINGs nodes from a socket until its NAT is classified or nobody is left to ask."""

    __slots__ = ("_asked", "_node", "_on_done", "_pending", "_socket", "_timer", "done", "nat")

    def __init__(self, node: Node, socket: int, on_done: Callable[[float], None]) -> None:
        self._node = node
        self._socket = socket
        self._on_done = on_done
        self._asked: dict[Address, None] = {}
        self._pending: dict[tuple[Address, int], Pending] = {}
        self._timer: Timer | None = None
        #: What is known so far.
        self.nat = Nat()
        #: Nothing more will come.
        self.done = False

    def start(self, now: float) -> None:
        """Begin; ``on_done`` is called once unless it is cancelled: before this returns, if there
        is nobody to ask."""
        self._ask(now)
        if self._pending:
            self._timer = self._node.timers.at(now + SECOND_PASS, self._again)
        self._check(now)

    def cancel(self) -> None:
        """Stop asking. Harmless when it is done."""
        self.done = True
        for pending in self._pending.values():
            pending.cancel()
        self._pending.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _again(self, now: float) -> None:
        self._timer = None
        silent = [address for address in self._asked if not self.nat.heard(address)]
        self._ask(now)
        # Nodes that have just started leave a PING unanswered, but nothing else (spec: hyperdht
        # 4.1); and datagrams get lost.
        for address in silent:
            self._request(address, FIND_NODE, now)
        self._check(now)

    def _ask(self, now: float) -> None:
        # Each is asked once: whoever does not answer is made up for by another.
        for address in self._others()[: SAMPLES - self.nat.sampled]:
            self._asked[address] = None
            self._request(address, PING, now)

    def _request(self, address: Address, command: int, now: float) -> None:
        self._pending[address, command] = self._node.request(
            address,
            command,
            now,
            internal=True,
            target=self._node.id if command == FIND_NODE else None,
            socket=self._socket,
            retries=0,
            force=True,
            on_done=partial(self._answered, address, command),
        )

    def _others(self) -> list[Address]:
        contacts = [contact.address for contact in reversed(self._node.table)]
        if len(contacts) >= _ROOMY:
            contacts = contacts[_SKIPPED:] + contacts[:_SKIPPED]
        known = dict.fromkeys((*contacts, *self._node.bootstrap))
        return [address for address in known if address not in self._asked]

    def _answered(self, address: Address, command: int, reply: Reply | None, now: float) -> None:
        del self._pending[address, command]
        if reply is not None:
            self.nat.add(reply.to, address)
        if self._timer is not None and not self._pending and not self.nat.finished:
            self._timer.cancel()
            self._again(now)
        else:
            self._check(now)

    def _check(self, now: float) -> None:
        if self.done or not (self.nat.finished or (not self._pending and self._timer is None)):
            return
        self.cancel()
        self._on_done(now)


class Survey:
    """The class of the NAT in front of the current main socket, for all who punch from it.

    Answers that come in anyway count, so that it is often known before anybody asks.
    """

    __slots__ = ("_node", "_samples", "_sampling", "_socket", "_verdict", "_waiting", "_when")

    def __init__(self, node: Node) -> None:
        self._node = node
        self._socket = -1
        # What was last seen of us by whom, and when; the oldest first.
        self._samples: dict[Address, tuple[Address, float]] = {}
        self._verdict = UNKNOWN
        self._when = -FRESH
        self._sampling: Sampling | None = None
        self._waiting: list[Callable[[Verdict, float], None]] = []

    def note(self, reply: Reply, now: float) -> None:
        """Take an answer's word for where we are."""
        if reply.socket != self._current():
            return
        samples = self._samples
        samples.pop(reply.source, None)
        if len(samples) >= MAX_SAMPLES:
            del samples[next(iter(samples))]
        samples[reply.source] = reply.to, now
        if self._verdict.firewall == Firewall.CONSISTENT and (
            reply.to not in self._verdict.addresses
        ):
            # The NAT has forgotten us, or we are behind another one.
            self._verdict = UNKNOWN

    def known(self, now: float) -> Verdict:
        """The class if it is known well enough, else `UNKNOWN`."""
        self._current()
        if now - self._when < FRESH and self._verdict.firewall != Firewall.UNKNOWN:
            return self._verdict
        fresh = [to for to, when in self._samples.values() if now - when < FRESH]
        if len(fresh) >= ENOUGH and len(set(fresh)) == 1:
            return Verdict(Firewall.CONSISTENT, (fresh[0],))
        return UNKNOWN

    def find(self, now: float, on_done: Callable[[Verdict, float], None]) -> None:
        """Call ``on_done`` with the class, at once if it is known; `UNKNOWN` if it cannot be
        found. Who asks meanwhile gets the same answer."""
        verdict = self.known(now)
        if verdict.firewall != Firewall.UNKNOWN:
            on_done(verdict, now)
            return
        self._waiting.append(on_done)
        self._sample(now)

    def prepare(self, now: float) -> None:
        """Somebody is about to ask: find it out meanwhile."""
        if self.known(now).firewall == Firewall.UNKNOWN:
            self._sample(now)

    def forget(self, now: float) -> None:
        """We are in another network: what was found out holds no more."""
        self._samples.clear()
        self._verdict = UNKNOWN
        if self._sampling is not None:
            self._sampling.cancel()
            self._sampling = None
            self._sample(now)

    def close(self) -> None:
        """Ask nobody any more, and answer nobody."""
        if self._sampling is not None:
            self._sampling.cancel()
            self._sampling = None
        self._waiting.clear()

    def _sample(self, now: float) -> None:
        if self._sampling is None:
            self._sampling = Sampling(self._node, self._socket, self._sampled)
            self._sampling.start(now)

    def _sampled(self, now: float) -> None:
        if self._sampling is not None:
            self._verdict = self._sampling.nat.verdict
            self._when = now
            self._sampling = None
        waiting, self._waiting = self._waiting, []
        for on_done in waiting:
            on_done(self._verdict, now)

    def _current(self) -> int:
        """The main socket in use; what was known of the other says nothing about it."""
        socket = self._node.current_socket
        if socket != self._socket:
            self._socket = socket
            self._samples.clear()
            self._verdict = UNKNOWN
        return socket
