"""What a program learns of the machine it runs on: its addresses, those of names, and that it
slept."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence

from .errors import InvalidInput, LocalError
from .transmit import Address

#: Every interface.
ANY_HOST = "0.0.0.0"
#: An address of which the kernel says from where it would be reached; nothing is sent there. It is
#: one for documentation (RFC 5737), so that no route but the default one leads to it.
_ANYWHERE = ("192.0.2.1", 9)


class Machine:
    """The machine as a node with sockets at ``host`` sees it."""

    def __init__(self, host: str, clock: Callable[[], float]) -> None:
        self._host = host
        self._calendar = calendar_of(clock)
        # By how much the calendar is ahead of the clock.
        self._ahead = self._calendar() - clock()
        #: The addresses of its interfaces.
        self.hosts = local_hosts(host)
        self._route = _route()

    def slept(self, now: float) -> float:
        """Seconds that passed without the clock, since the last call; ``now`` is what it shows."""
        before, self._ahead = self._ahead, self._calendar() - now
        return max(0.0, self._ahead - before)

    def look(self) -> bool | None:
        """Whether it is in another network: traffic leaves from another address. False: it has
        other addresses besides. None: nothing has changed."""
        if self._host != ANY_HOST:
            return None
        route = _route()
        if route == self._route and sys.platform != "linux":
            return None  # to list the addresses may take seconds there
        hosts = local_hosts(self._host)
        if (hosts, route) == (self.hosts, self._route):
            return None
        # Without a way to the world, as in a LAN by itself, what counts is an address less.
        gone = route is None and not set(self.hosts) <= set(hosts)
        elsewhere = route != self._route or gone
        self.hosts, self._route = hosts, route
        return elsewhere


def clock_of(loop: asyncio.AbstractEventLoop) -> Callable[[], float]:
    """What shows a loop's time in seconds. Loops not made of asyncio's have a coarser clock: theirs
    moves once a turn, by whole milliseconds, where a round trip may take a tenth of one."""
    known = type(loop).time is asyncio.BaseEventLoop.time
    return time.monotonic if known or not isinstance(loop, asyncio.BaseEventLoop) else loop.time


def calendar_of(clock: Callable[[], float]) -> Callable[[], float]:
    """A clock in seconds that goes on while the machine sleeps, as loops' clocks do not. Where
    there is none it is the wall clock, which is set forward sometimes; to take that for a sleep
    does no harm."""
    if clock is not time.monotonic:
        return clock
    if sys.platform != "linux":
        return time.time
    return lambda: time.clock_gettime(time.CLOCK_BOOTTIME)


def local_hosts(host: str) -> tuple[str, ...]:
    """The IPv4 addresses under which peers on the same host or LAN reach a socket bound to
    ``host``: itself, or those of all interfaces but the loopback (spec: hyperdht 4.4)."""
    if host != ANY_HOST:
        return (host,)
    return tuple(dict.fromkeys(_interface_hosts())) or ("127.0.0.1",)


def _route() -> str | None:
    """The address that traffic to the world leaves from."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_ANYWHERE)
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _interface_hosts() -> Sequence[str]:
    if sys.platform != "linux":
        try:
            hosts: Sequence[str] = socket.gethostbyname_ex(socket.gethostname())[2]
        except OSError:
            return ()
        return [host for host in hosts if not ipaddress.ip_address(host).is_loopback]
    import fcntl

    siocgifaddr = 0x8915
    hosts = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), siocgifaddr, request)
            except OSError:
                continue  # an interface without an IPv4 address
            found = socket.inet_ntoa(answer[20:24])
            if not ipaddress.ip_address(found).is_loopback:
                hosts.append(found)
    return hosts


async def resolve(bootstrap: Sequence[str]) -> tuple[Address, ...]:
    """IPv4 addresses of ``host:port`` or ``ip@name:port`` entries; a name that does not resolve is
    left out as long as another entry is left. Raises `InvalidInput` for a text of another form."""
    loop = asyncio.get_running_loop()
    addresses: list[Address] = []
    unresolved = ""
    for text in bootstrap:
        host, port = parse_address(text)
        try:
            found = await loop.getaddrinfo(host, port, family=socket.AF_INET)
        except (OSError, UnicodeError):  # of names that cannot be one
            unresolved = host
            continue
        addresses.append((str(found[0][4][0]), port))
    if unresolved and not addresses:
        raise LocalError(f"bootstrap node {unresolved} has no address: check the name and the DNS")
    return tuple(addresses)


def parse_address(text: str) -> Address:
    """Host and port of ``host:port`` or ``ip@name:port`` (then the ip). Raises `InvalidInput`."""
    host, separator, port = text.strip().rpartition(":")
    host = host.partition("@")[0]
    valid = separator and host and port.isdecimal() and len(port) <= 5
    if not valid or not 0 < int(port) < 65536:
        raise InvalidInput(f"{text!r} is not HOST:PORT with a port from 1 to 65535")
    return host, int(port)
