"""Network namespaces that make up an internet: public hosts, and sites behind NATs of all kinds.

Between any two of them lies a relay (`laboratory_relay.py`) that delays, loses and ages packets.
The namespaces have no names and no way out, and they exist as long as this process and what runs in
them: nothing is left behind, and any number of laboratories can be on one machine.

    host -- router ---.
                       \\
    host -- router ---- relay ---- public host
            (NAT)
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["open", "consistent", "random", "cgnat", "lan", "lan-hairpin", "udp-blocked"]
KINDS: tuple[Kind, ...] = (
    "open",
    "consistent",
    "random",
    "cgnat",
    "lan",
    "lan-hairpin",
    "udp-blocked",
)

#: Seconds from any host to any other and back.
ROUND_TRIP = 0.040
#: What each end adds to the delay between two: one in sum, or a tenth when one is near.
FAR, NEAR = 0.5, -0.4
#: A device of this name, and no other, is the mark of a host of the laboratory: Node programs send
#: to others only where they find it (``tests/peers/preload.js``).
DEVICE = "laboratory"
#: Addresses that look public. Peers do not take private and reserved ones for each other's.
PUBLIC = "11.0"
#: Every site has the same private network, as most homes have.
HOME = "192.168.1"
#: What is between a home's router and the NAT of its provider.
CARRIER = "100.64.0"
#: Seconds for a command of `ip` or `nft`.
COMMAND_LIMIT = 20

CLONE_NEWNET = 0x40000000
RELAY = Path(__file__).with_name("laboratory_relay.py")


class NotPermitted(Exception):
    """This machine or this user cannot make the laboratory; the text says why."""


class Namespace:
    """A network namespace without a name. It ends with this process and those inside."""

    def __init__(self) -> None:
        with _returning():
            _check(_libc().unshare(CLONE_NEWNET))
            self._descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        self.inode = os.fstat(self._descriptor).st_ino
        self.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
        self.run("ip", "link", "set", "lo", "up")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This thread is inside: sockets and processes that it makes now belong there and stay
        there. No other task runs meanwhile, so the block must not await."""
        with _returning():
            _check(_libc().setns(self._descriptor, CLONE_NEWNET))
            yield

    def run(self, *command: str, given: str = "") -> str:
        """What a command prints that runs inside, with `given` on its standard input."""
        with self.entered():
            done = subprocess.run(
                command,
                input=given,
                capture_output=True,
                text=True,
                timeout=COMMAND_LIMIT,
                check=False,
            )
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def ip(self, *lines: str) -> None:
        self.run("ip", "-batch", "-", given="\n".join(lines))

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass(slots=True)
class Host:
    """Where programs run. `address` is its own, which a NAT hides from others."""

    namespace: Namespace
    address: str

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """See `Namespace.entered`."""
        with self.namespace.entered():
            yield


class Site:
    """One or two hosts and what is between them and the world; `public` is what others see.

    | kind | the router |
    |---|---|
    | open | none: the host is public |
    | consistent | keeps the port, whatever the destination; admits only answers |
    | random | takes another port for each destination; admits only answers |
    | cgnat | two consistent ones, one behind the other |
    | lan, lan-hairpin | consistent, two hosts; the second kind also lets each reach the other at
      the public address |
    | udp-blocked | drops UDP |
    """

    def __init__(self, kind: Kind, public: str, hosts: list[Host], routers: list[Namespace]):
        self.kind = kind
        self.public = public
        self.hosts = hosts
        self._routers = routers

    def mapping_timeout(self, seconds: int) -> None:
        """From now on a mapping that carries nothing for that long is forgotten."""
        for router in self._routers:
            for name in ("nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"):
                router.run("sysctl", "-qw", f"net.netfilter.{name}={seconds}")

    def reboot(self) -> None:
        """The routers forget every mapping."""
        for router in self._routers:
            with router.entered():
                _forget_mappings()


class Laboratory:
    """Makes hosts and sites; `close` ends all that runs in them. NotPermitted if it cannot be."""

    def __init__(self, *, round_trip: float = ROUND_TRIP, loss: float = 0.0, seed: int = 1) -> None:
        if reason := missing():
            raise NotPermitted(reason)
        self._namespaces: list[Namespace] = []
        self._prefixes = itertools.count(1)
        self._core = self._namespace(guarded=False)
        with self._core.entered():
            self._relay = subprocess.Popen(
                [sys.executable, RELAY, str(seed)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # an interrupt from the terminal is not for it
            )
        self.impose(loss=loss, round_trip=round_trip)

    def impose(self, *, loss: float, round_trip: float) -> None:
        """From now on: `loss` (0 to 1) each way, and `round_trip` (seconds) between any two."""
        self._order(f"impose {loss} {round_trip / 2}")

    def host(self, *, near: bool = False) -> Host:
        """A public host. One that is near is at a tenth of the distance from all others."""
        namespace = self._namespace()
        return Host(namespace, self._uplink(namespace, DEVICE, NEAR if near else FAR))

    def site(self, kind: Kind) -> Site:
        if kind == "open":
            host = self.host()
            return Site(kind, host.address, [host], [])
        outer = self._namespace()
        public = self._uplink(outer, "wan")
        routers = [outer]
        if kind == "cgnat":
            self._rules(outer, "consistent", CARRIER, public)
            inner = self._namespace()
            _bridge(outer, CARRIER)
            _join(outer, inner, "wan", CARRIER, f"{CARRIER}.10")
            routers.append(inner)
        home = routers[-1]
        self._rules(home, kind, HOME, public)
        _bridge(home, HOME)
        hosts = []
        for number in range(2 if kind in ("lan", "lan-hairpin") else 1):
            host = Host(self._namespace(), f"{HOME}.{10 + number}")
            _join(home, host.namespace, DEVICE, HOME, host.address)
            hosts.append(host)
        return Site(kind, public, hosts, routers)

    def close(self) -> None:
        """Kill what runs in the laboratory, and end it. Can be called twice."""
        assert self._relay.stdin is not None
        assert self._relay.stdout is not None
        with contextlib.suppress(OSError):
            self._relay.stdin.close()
        self._relay.wait()
        self._relay.stdout.close()
        while self._namespaces:
            self._namespaces.pop().close()

    def _namespace(self, *, guarded: bool = True) -> Namespace:
        namespace = Namespace()
        self._namespaces.append(namespace)
        if guarded:
            self._order(f"guard {namespace.inode}")
        return namespace

    def _uplink(self, namespace: Namespace, name: str, weight: float = FAR) -> str:
        """Connect a namespace to the relay. Returns its public address."""
        prefix = f"{PUBLIC}.{next(self._prefixes)}"
        device = self._order(f"end {prefix} {weight}")
        self._core.ip(f"link set {device} netns {namespace.path} name {name}")
        namespace.ip(
            f"address add {prefix}.1/32 dev {name}",
            f"link set {name} up txqueuelen 1000",
            f"route add default dev {name}",
        )
        return f"{prefix}.1"

    def _rules(self, router: Namespace, kind: Kind, inside: str, public: str) -> None:
        router.run(
            *("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.send_redirects=0"),
            *("net.ipv4.conf.default.send_redirects=0", "net.ipv4.conf.all.rp_filter=0"),
        )
        # What two hosts of one home say to each other passes no router.
        router.run("sysctl", "-qew", "net.bridge.bridge-nf-call-iptables=0")
        router.run("nft", "-f", "-", given=_ruleset(kind, f"{inside}.0/24", public))

    def _order(self, line: str) -> str:
        assert self._relay.stdin is not None
        assert self._relay.stdout is not None
        self._relay.stdin.write(f"{line}\n")
        self._relay.stdin.flush()
        answer = self._relay.stdout.readline().strip()
        if not answer:
            raise NotPermitted("the relay ended: there is no /dev/net/tun, or it may not be used")
        return answer


def missing() -> str | None:
    """Why there can be no laboratory here, or None."""
    if platform.system() != "Linux":
        return "the laboratory is made of Linux network namespaces; this is not Linux"
    if os.geteuid() != 0:
        return "the laboratory needs root, for network namespaces: run it with sudo"
    for program, package in (
        ("ip", "iproute2"),
        ("nft", "nftables"),
        ("sysctl", "procps"),
    ):
        if shutil.which(program) is None:
            return f"the laboratory needs the program {program} (package {package})"
    if not os.path.exists("/dev/net/tun"):
        return "the laboratory needs TUN devices: there is no /dev/net/tun"
    try:
        namespace = Namespace()
    except OSError as error:
        return f"the laboratory may not make network namespaces here: {error}"
    try:
        namespace.run("nft", "-f", "-", given=_ruleset("lan-hairpin", f"{HOME}.0/24", "11.0.0.1"))
        namespace.ip("link add veth0 type veth peer name veth1", "link add br0 type bridge")
    except OSError as error:
        return f"the laboratory needs a kernel with nftables NAT, veth and bridge: {error}"
    finally:
        namespace.close()
    return None


# Routers


def _ruleset(kind: Kind, inside: str, public: str) -> str:
    """Rules for nft. What comes unasked is dropped, not refused: a refusal would leave a trace in
    the connection table, and spoil the port for the mapping that is to come."""
    forward = ['iifname "wan" ct state established,related accept', 'iifname "wan" drop']
    postrouting = ['oifname "wan" masquerade']
    sets, seen, prerouting = "", "", ""
    if kind == "random":
        postrouting = ['oifname "wan" masquerade random,fully-random']
    elif kind == "udp-blocked":
        forward = ["meta l4proto udp drop", *forward]
    elif kind == "lan-hairpin":
        # The port outside is the port inside here, so that who last sent from it is whom it maps.
        sets = "map mapped { type inet_service : ipv4_addr; flags dynamic; size 65535; }"
        seen = f'oifname "wan" ip saddr {inside} update @mapped {{ udp sport : ip saddr }}'
        prerouting = f'iifname "lan" ip daddr {public} dnat to udp dport map @mapped'
        postrouting.append(
            f'iifname "lan" oifname "lan" ip saddr {inside} ct status dnat snat to {public}'
        )
    return f"""
        table ip laboratory {{
            {sets}
            chain input {{
                type filter hook input priority filter; policy accept;
                iifname "wan" ct state established,related accept
                iifname "wan" drop
            }}
            chain forward {{
                type filter hook forward priority filter; policy accept;
                {"; ".join(forward)}
            }}
            chain seen {{
                type filter hook postrouting priority srcnat - 1; policy accept;
                {seen}
            }}
            chain prerouting {{
                type nat hook prerouting priority dstnat; policy accept;
                {prerouting}
            }}
            chain postrouting {{
                type nat hook postrouting priority srcnat; policy accept;
                {"; ".join(postrouting)}
            }}
        }}
    """


def _bridge(router: Namespace, inside: str) -> None:
    router.ip(
        "link add lan type bridge",
        f"address add {inside}.1/24 dev lan",
        "link set lan up",
    )


def _join(router: Namespace, inner: Namespace, device: str, inside: str, address: str) -> None:
    """A cable from the router's bridge to a namespace, whose way out it is."""
    port = f"port{address.rpartition('.')[2]}"
    router.ip(
        f"link add {port} type veth peer name {device} netns {inner.path}",
        f"link set {port} master lan up",
    )
    inner.ip(
        f"address add {address}/24 dev {device}",
        f"link set {device} up",
        f"route add default via {inside}.1",
    )


def _forget_mappings() -> None:
    """Empty the connection table of the namespace that this thread is in, by netlink."""
    netlink_netfilter, delete, request, ack = 12, (1 << 8) | 2, 1, 4
    message = struct.pack("=IHHII", 20, delete, request | ack, 1, 0) + bytes(4)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netlink_netfilter) as control:
        control.send(message)
        answer = control.recv(4096)
    (error,) = struct.unpack_from("=i", answer, 16)
    _check(error)


# System calls that Python 3.11 does not have


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result:
        code = -result if result < -1 else ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def _returning() -> Iterator[None]:
    """Afterwards this thread is in the namespace where it was."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        try:
            _check(_libc().setns(home, CLONE_NEWNET))
        finally:
            os.close(home)
