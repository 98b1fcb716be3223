"""A network of protocol cores on a virtual clock.

Everything happens in one thread and in an order that the seed alone decides, so a run that failed
can be run again. Hosts are cores that follow `hyperseaport.transport.transmit.Core`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from ..transport.transmit import Address, Core, Transmit

#: A run that needs more steps than this is taken for one that never ends.
MAX_STEPS = 50_000_000


@dataclass(slots=True)
class Link:
    """What happens to a datagram on its way. Times in seconds, shares from 0 to 1."""

    delay: float = 0.001
    #: Added to the delay, uniformly from 0 to this: above the spacing of packets it reorders them.
    jitter: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    #: Called with each datagram; True drops it. For losses that a test chooses.
    drop: Callable[[bytes, Address, Address], bool] | None = None


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
    _hosts: list[Host] = field(default_factory=list)
    _by_address: dict[Address, tuple[Host, int]] = field(default_factory=dict)
    _agenda: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _sequence: int = 0

    def attach(self, core: Core, sockets: Mapping[int, Address]) -> Host:
        """Put a core on the network; its first transmits leave at the next step."""
        host = Host(core, dict(sockets))
        self._hosts.append(host)
        for socket, address in sockets.items():
            if address in self._by_address:
                raise ValueError(f"{address} is taken")
            self._by_address[address] = (host, socket)
        self.poke(host)
        return host

    def detach(self, host: Host) -> None:
        """Take a host off, as `kill -9` would: what it had not sent is never sent."""
        self._hosts.remove(host)
        for address in host.sockets.values():
            del self._by_address[address]
        host.wake = None

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
        for transmit in host.core.transmits(self.now):
            source = host.sockets.get(transmit.socket)
            if source is not None:
                for datagram in datagrams(transmit):
                    self._send(datagram, source, transmit.address)
        self._rearm(host)

    def _rearm(self, host: Host) -> None:
        deadline = host.core.deadline()
        if deadline is None or host not in self._hosts:
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

    def _send(self, datagram: bytes, source: Address, destination: Address) -> None:
        link, rng = self.link, self.rng
        if link.drop is not None and link.drop(datagram, source, destination):
            self.lost += 1
            return
        if link.loss and rng.random() < link.loss:
            self.lost += 1
            return
        copies = 2 if link.duplicate and rng.random() < link.duplicate else 1
        for _ in range(copies):
            delay = link.delay + (rng.uniform(0, link.jitter) if link.jitter else 0.0)
            self.at(self.now + delay, lambda: self._deliver(datagram, source, destination))

    def _deliver(self, datagram: bytes, source: Address, destination: Address) -> None:
        entry = self._by_address.get(destination)
        if entry is None:
            self.lost += 1
            return
        host, socket = entry
        self.delivered += 1
        host.core.receive(datagram, socket, source, self.now)
        self._flush(host)


def datagrams(transmit: Transmit) -> list[bytes]:
    """The datagrams of a transmit, each in one piece."""
    data = b"".join(transmit.buffers)
    size = transmit.segment or max(len(data), 1)
    return [data[start : start + size] for start in range(0, max(len(data), 1), size)]
