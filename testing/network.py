"""A network of protocol cores on a virtual clock.

Everything happens in one thread and in an order that the seed alone decides, so a run that failed
can be run again. Hosts are cores that follow `hyperseaport.transport.transmit.Core`.

One `Link` holds between all hosts, unless `Network.path` gives one direction between two of them
a link of its own. `Network.partition` cuts hosts off from each other.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from random import Random

from ..transport.transmit import Address, Core, Transmit
from .faults import Bursts, Faults, Link

__all__ = ["MAX_STEPS", "Bursts", "Faults", "Host", "Link", "Network", "datagrams"]

#: A run that needs more steps than this is taken for one that never ends.
MAX_STEPS = 50_000_000


@dataclass(slots=True, eq=False)
class Host:
    """One core and the addresses its sockets have."""

    core: Core
    sockets: dict[int, Address]
    wake: float | None = None


@dataclass(slots=True)
class Network:
    """Delivers datagrams between hosts and wakes them at their deadlines."""

    rng: Random
    link: Link = field(default_factory=Link)
    now: float = 0.0
    #: Datagrams delivered, and datagrams lost on the way or sent to nobody.
    delivered: int = 0
    lost: int = 0
    _hosts: set[Host] = field(default_factory=set)
    _by_address: dict[Address, tuple[Host, int]] = field(default_factory=dict)
    _agenda: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _sequence: int = 0
    _common: Faults = field(init=False)
    # Directions that somebody asked for by `path`, and those that need a queue of their own.
    _paths: dict[tuple[Host, Host], Faults] = field(default_factory=dict)
    _queues: dict[tuple[Host, Host], Faults] = field(default_factory=dict)
    _cuts: list[tuple[frozenset[Host], frozenset[Host]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._common = Faults(self.link, self.rng)

    def attach(self, core: Core, sockets: Mapping[int, Address]) -> Host:
        """Put a core on the network; its first transmits leave at the next step. Raises ValueError
        for an address that another host has."""
        host = Host(core, dict(sockets))
        for address in host.sockets.values():
            if address in self._by_address:
                raise ValueError(f"{address} is taken")
        self._hosts.add(host)
        for socket, address in host.sockets.items():
            self._by_address[address] = (host, socket)
        self.poke(host)
        return host

    def detach(self, host: Host) -> None:
        """Take a host off, as `kill -9` would: what it had not sent is never sent."""
        self._hosts.remove(host)
        for address in host.sockets.values():
            del self._by_address[address]
        host.wake = None
        for paths in (self._paths, self._queues):
            for pair in [pair for pair in paths if host in pair]:
                del paths[pair]

    def path(self, source: Host, destination: Host, link: Link | None = None) -> Faults:
        """The direction from one host to another, apart from all others from now on: its own
        statistics, its own queue and, if given, its own link."""
        pair = (source, destination)
        faults = self._paths.get(pair)
        if faults is None:
            faults = self._paths[pair] = Faults(self.link, self.rng)
        if link is not None:
            faults.link = link
        return faults

    def share(self, faults: Faults, pairs: Iterable[tuple[Host, Host]]) -> None:
        """Lead several directions, (source, destination) each, through one bottleneck."""
        for pair in pairs:
            self._paths[pair] = faults

    def partition(self, left: Iterable[Host], right: Iterable[Host]) -> None:
        """From now on nothing passes between the two sides. What is under way arrives."""
        self._cuts.append((frozenset(left), frozenset(right)))

    def heal(self) -> None:
        """End all partitions."""
        self._cuts.clear()

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Run ``action`` when the clock reaches ``when``."""
        self._sequence += 1
        heapq.heappush(self._agenda, (when, self._sequence, action))

    def poke(self, host: Host) -> None:
        """Send what a core has to send now. Call it after calling the core from outside."""
        self.at(self.now, lambda: self._flush(host))

    def run(self, *, until: float | None = None, done: Callable[[], bool] | None = None) -> bool:
        """Let time pass until ``done()`` holds, the clock reaches ``until`` (seconds), or nothing
        is left to happen. Returns whether ``done()`` holds (True without one)."""
        for _ in range(MAX_STEPS):
            if done is not None and done():
                return True
            if not self._agenda or (until is not None and self._agenda[0][0] > until):
                break
            when, _, action = heapq.heappop(self._agenda)
            self.now = max(self.now, when)
            action()
        else:
            raise RuntimeError(f"no end after {MAX_STEPS} steps at {self.now} s")
        if until is not None:
            self.now = max(self.now, until)
        return done is None or done()

    def _flush(self, host: Host) -> None:
        if host not in self._hosts:
            return
        for transmit in host.core.transmits(self.now):
            source = host.sockets.get(transmit.socket)
            if source is not None:
                for datagram in datagrams(transmit):
                    self._send(datagram, host, source, transmit)
        self._rearm(host)

    def _rearm(self, host: Host) -> None:
        deadline = host.core.deadline()
        if deadline is None:
            host.wake = None
            return
        if host.wake is not None and host.wake <= deadline and host.wake > self.now:
            return
        wake = max(deadline, self.now)
        host.wake = wake
        self.at(wake, lambda: self._wake(host, wake))

    def _wake(self, host: Host, when: float) -> None:
        if host.wake != when:
            return
        host.wake = None
        host.core.on_deadline(self.now)
        self._flush(host)

    def _send(self, datagram: bytes, host: Host, source: Address, transmit: Transmit) -> None:
        destination = transmit.address
        entry = self._by_address.get(destination)
        if entry is not None and self._cuts and self._cut(host, entry[0]):
            self.lost += 1
            return
        faults = self._faults(host, None if entry is None else entry[0])
        arrivals = faults.carry(
            datagram, self.now, source, destination, may_fragment=transmit.may_fragment
        )
        if not arrivals:
            self.lost += 1
        for when, arrived in arrivals:
            self.at(when, partial(self._deliver, arrived, source, destination))

    def _deliver(self, datagram: bytes, source: Address, destination: Address) -> None:
        entry = self._by_address.get(destination)
        if entry is None:
            self.lost += 1
            return
        host, socket = entry
        self.delivered += 1
        host.core.receive(datagram, socket, source, self.now)
        self._flush(host)

    def _cut(self, one: Host, other: Host) -> bool:
        return any(
            (one in left and other in right) or (other in left and one in right)
            for left, right in self._cuts
        )

    def _faults(self, source: Host, destination: Host | None) -> Faults:
        link, faults = self.link, self._common
        if destination is not None:
            pair = (source, destination)
            own = self._paths.get(pair) if self._paths else None
            if own is not None:
                return own
            if link.bandwidth is not None or link.bursts is not None:
                faults = self._queues.get(pair) or faults
                if faults is self._common:
                    faults = self._queues[pair] = Faults(link, self.rng)
        faults.link = link
        return faults


def datagrams(transmit: Transmit) -> list[bytes]:
    """The datagrams of a transmit, each in one piece."""
    data = b"".join(transmit.buffers)
    size = transmit.segment or max(len(data), 1)
    return [data[start : start + size] for start in range(0, max(len(data), 1), size)]
