"""Network address translators for the simulated network.

A `NatNetwork` is a `Network` whose hosts may sit behind a `Nat`, and a NAT behind another one.
Hosts behind one NAT reach each other by their inner addresses; what leaves is translated, and what
comes back passes only if it fits a mapping and its filter.

    core on 192.168.0.10 -- Nat 5.0.0.1 -- the rest
    core on 192.168.0.10 -- Nat 100.64.0.1 -- Nat 5.0.0.2 -- the rest

Everything is decided by the network's seeded randomness and its virtual clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Protocol, runtime_checkable

from ..transport.transmit import Address, Core, Transmit
from .network import Host, Network

#: Seconds for which a mapping and what it lets in are remembered while they are not used.
TIMEOUT = 60.0
#: Ports that mappings get.
PORTS = (1024, 65535)
#: Routers between any two NATs, or hosts without one.
HOPS = 10
#: Seconds for which a NAT that is spoilt by unexpected packets remembers them.
SPOILT = 30.0


@runtime_checkable
class OpensSockets(Protocol):
    """A core that asks for sockets beside those it was attached with."""

    def sockets_to_open(self) -> list[int]: ...

    def sockets_to_close(self) -> list[int]: ...


@dataclass(slots=True)
class _Entry:
    """A mapping: who is behind a port, and whom it lets in, each with the last use."""

    inner: Address
    port: int
    used: float
    remotes: dict[Address, float] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Nat:
    """One NAT. Its fields may be changed while it is in use."""

    #: The address that others see; below another NAT one of that NAT's inner addresses.
    host: str
    rng: Random
    #: A new mapping for each destination, or one for all.
    random: bool = False
    #: Only those get in to whom something was sent: address and port have to fit.
    filtering: bool = True
    #: The same port outside as inside, where it is free.
    preserving: bool = False
    timeout: float = TIMEOUT
    #: Inner hosts reach each other by their outer addresses.
    hairpin: bool = False
    #: A packet that is not let in makes the NAT use another port toward its sender for a while, as
    #: connection tracking does that takes it for a connection of the NAT's own.
    spoilable: bool = False
    outer: Nat | None = None
    #: Packets that were not let in.
    refused: int = 0
    _entries: dict[tuple[Address, Address | None], _Entry] = field(default_factory=dict, repr=False)
    _by_port: dict[int, tuple[Address, Address | None]] = field(default_factory=dict, repr=False)
    _spoilt: dict[tuple[int, Address], float] = field(default_factory=dict, repr=False)

    def reboot(self) -> None:
        """Forget all mappings."""
        self._entries.clear()
        self._by_port.clear()
        self._spoilt.clear()

    def outbound(self, source: Address, destination: Address, now: float) -> Address:
        """What ``source`` becomes on the way to ``destination``."""
        entry = self._entry((source, destination if self.random else None), now)
        spoilt = self._spoilt.get((entry.port, destination))
        if spoilt is not None and now - spoilt < SPOILT:
            entry = self._entry((source, destination), now)
        entry.used = now
        entry.remotes[destination] = now
        return self.host, entry.port

    def inbound(self, port: int, source: Address, now: float) -> Address | None:
        """Who gets what ``source`` sends to a port; None for nobody."""
        key = self._by_port.get(port)
        entry = None if key is None else self._entries[key]
        if entry is not None and now - entry.used <= self.timeout:
            last = entry.remotes.get(source)
            if not self.filtering or (last is not None and now - last <= self.timeout):
                entry.used = entry.remotes[source] = now
                return entry.inner
        self.refused += 1
        if self.spoilable:
            self._spoilt[port, source] = now
        return None

    def _entry(self, key: tuple[Address, Address | None], now: float) -> _Entry:
        entry = self._entries.get(key)
        if entry is not None:
            if now - entry.used <= self.timeout:
                return entry
            del self._by_port[entry.port]
        port = key[0][1]
        while not self.preserving or port in self._by_port:
            port = self.rng.randint(*PORTS)
            if port not in self._by_port:
                break
        entry = self._entries[key] = _Entry(key[0], port, now)
        self._by_port[port] = key
        return entry


@dataclass(slots=True)
class NatNetwork(Network):
    """A `Network` with NATs. Attach hosts that have one by `attach_behind`."""

    hops: int = HOPS
    #: Datagrams that NATs have dropped, and those whose time to live was over.
    refused: int = 0
    expired: int = 0
    _nats: dict[Host, Nat] = field(default_factory=dict)
    # Who has an address behind a NAT, and behind no NAT at all.
    _inside: dict[tuple[Nat | None, Address], tuple[Host, int]] = field(default_factory=dict)
    _nat_hosts: dict[tuple[Nat | None, str], Nat] = field(default_factory=dict)
    _free_port: int = 20_000

    def nat(self, host: str, outer: Nat | None = None) -> Nat:
        """A new NAT; change its fields to make it another kind than consistent and filtering."""
        nat = Nat(host, Random(self.rng.getrandbits(64)), outer=outer)
        self._nat_hosts[outer, host] = nat
        return nat

    def attach_behind(self, nat: Nat, core: Core, sockets: Mapping[int, Address]) -> Host:
        """As `attach`, with inner addresses."""
        host = Host(core, dict(sockets))
        self._hosts.add(host)
        self._nats[host] = nat
        for socket, address in host.sockets.items():
            self._inside[nat, address] = (host, socket)
        self.poke(host)
        return host

    def detach(self, host: Host) -> None:
        """Take a host off, as `kill -9` would."""
        nat = self._nats.pop(host, None)
        if nat is None:
            Network.detach(self, host)
            return
        self._hosts.remove(host)
        for address in host.sockets.values():
            del self._inside[nat, address]
        host.wake = None

    def _flush(self, host: Host) -> None:
        core = host.core
        if host not in self._hosts or not isinstance(core, OpensSockets):
            Network._flush(self, host)
            return
        for socket in core.sockets_to_open():
            self._open(host, socket)
        Network._flush(self, host)
        for socket in core.sockets_to_close():
            self._close(host, socket)

    def _open(self, host: Host, socket: int) -> None:
        nat, inner = self._nats.get(host), next(iter(host.sockets.values()))[0]
        taken = True
        while taken:
            self._free_port = 20_000 + (self._free_port - 19_999) % 40_000
            address = inner, self._free_port
            taken = address in self._by_address if nat is None else (nat, address) in self._inside
        host.sockets[socket] = address
        if nat is None:
            self._by_address[address] = (host, socket)
        else:
            self._inside[nat, address] = (host, socket)

    def _close(self, host: Host, socket: int) -> None:
        address = host.sockets.pop(socket)
        nat = self._nats.get(host)
        if nat is None:
            self._by_address.pop(address, None)
        else:
            self._inside.pop((nat, address), None)

    def _send(self, datagram: bytes, host: Host, source: Address, transmit: Transmit) -> None:
        nat = self._nats.get(host)
        destination = transmit.address
        while nat is not None:
            if (nat, destination) in self._inside or (nat, destination[0]) in self._nat_hosts:
                break
            if destination[0] == nat.host and not nat.hairpin:
                self.lost += 1
                return
            source = nat.outbound(source, destination, self.now)
            nat = nat.outer
        if transmit.ttl and transmit.ttl <= self.hops and nat is None:
            self.expired += 1
            return
        faults = self._faults(host, None)
        arrivals = faults.carry(
            datagram, self.now, source, destination, may_fragment=transmit.may_fragment
        )
        if not arrivals:
            self.lost += 1
        for when, arrived in arrivals:
            self.at(when, partial(self._arrive, nat, arrived, source, destination))

    def _arrive(
        self, realm: Nat | None, datagram: bytes, source: Address, destination: Address
    ) -> None:
        """Lead a datagram inward from where its way out has ended."""
        while (nat := self._nat_hosts.get((realm, destination[0]))) is not None:
            inner = nat.inbound(destination[1], source, self.now)
            if inner is None:
                self.refused += 1
                return
            realm, destination = nat, inner
        if realm is None:
            self._deliver(datagram, source, destination)
            return
        entry = self._inside.get((realm, destination))
        if entry is None:
            self.lost += 1
            return
        host, socket = entry
        self.delivered += 1
        host.core.receive(datagram, socket, source, self.now)
        self._flush(host)
