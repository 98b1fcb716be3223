"""A UDP relay between real sockets that loses, delays, reorders and damages what it carries.

    python -m hyperseaport.testing.relay 127.0.0.1:PORT --both delay=0.02,loss=0.02 --seed 1

Clients send to the relay instead of the target; each has a socket of the relay's own towards the
target, so that answers find back.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import signal
import socket
from collections.abc import Callable
from functools import partial
from random import Random
from types import TracebackType
from typing import Self

import click

from ..transport.errors import HyperseaportError, InvalidInput, LocalError
from ..transport.transmit import Address
from .faults import Faults, Link, parse_link
from .schedule import Schedule

#: Clients at a time; the one that came first makes room for one more.
MAX_CLIENTS = 256
#: Datagrams read for each wake-up, so that timers get their turn.
MAX_READS = 64
#: The kernel's buffers, bytes: a burst of a whole window survives.
BUFFER = 1 << 21

LOOPBACK = "127.0.0.1"


class Relay:
    """Stands before ``target`` while entered::

        async with Relay(("127.0.0.1", 5000), Link(loss=0.02), seed=1) as relay:
            connect_to(relay.address)

    The first link holds for what clients send, ``back`` for the answers; one link is for both. The
    faults' times begin at 0 when the relay starts. Equal seeds give equal decisions, datagram by
    datagram. Raises `InvalidInput` for addresses beyond this machine, unless ``anywhere``.
    """

    #: Where clients send to, once entered.
    address: Address

    def __init__(
        self,
        target: Address,
        link: Link,
        back: Link | None = None,
        *,
        seed: int = 0,
        host: str = LOOPBACK,
        port: int = 0,
        anywhere: bool = False,
    ) -> None:
        for each in (target[0], host):
            if not (anywhere or _is_loopback(each)):
                raise InvalidInput(f"{each} is beyond this machine: use {LOOPBACK}")
        rng = Random(seed)
        self.target = target
        self.there = Faults(link, Random(rng.getrandbits(64)))
        self.back = Faults(link if back is None else back, Random(rng.getrandbits(64)))
        self._host, self._port = host, port
        self._clients: dict[Address, socket.socket] = {}

    async def __aenter__(self) -> Self:
        """Raises `LocalError` when the address cannot be had."""
        self._loop = asyncio.get_running_loop()
        self._schedule = Schedule()
        try:
            self._front = _bound(self._host, self._port)
        except OSError as error:
            raise LocalError(
                f"cannot listen on UDP {self._host}:{self._port}: choose another port"
            ) from error
        self.address = self._front.getsockname()[:2]
        self._born = self._loop.time()
        self._loop.add_reader(self._front, self._readable, self._front, self._from_client)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._schedule.cancel()
        for each in (self._front, *self._clients.values()):
            self._close(each)
        self._clients.clear()

    def _from_client(self, datagram: bytes, client: Address) -> None:
        upstream = self._clients.get(client)
        if upstream is None:
            upstream = self._clients[client] = _bound(self._host, 0)
            answer = partial(self._from_target, client)
            self._loop.add_reader(upstream, self._readable, upstream, answer)
            if len(self._clients) > MAX_CLIENTS:
                self._close(self._clients.pop(next(iter(self._clients))))
        for when, piece in self.there.carry(datagram, self._now(), client, self.target):
            self._schedule.at(self._born + when, partial(_send, upstream, piece, self.target))

    def _from_target(self, client: Address, datagram: bytes, source: Address) -> None:
        if source != self.target:
            return
        for when, piece in self.back.carry(datagram, self._now(), source, client):
            self._schedule.at(self._born + when, partial(_send, self._front, piece, client))

    def _now(self) -> float:
        return self._loop.time() - self._born

    def _readable(self, udp: socket.socket, take: Callable[[bytes, Address], None]) -> None:
        for _ in range(MAX_READS):
            try:
                datagram, source = udp.recvfrom(65_536)
            except BlockingIOError:
                return
            except OSError:
                # An ICMP error of some earlier datagram; it says nothing about this socket.
                continue
            take(datagram, source)

    def _close(self, udp: socket.socket) -> None:
        self._loop.remove_reader(udp)
        udp.close()


def _send(udp: socket.socket, datagram: bytes, address: Address) -> None:
    # What the kernel does not take is lost, as on any network; the socket may be closed by now.
    with contextlib.suppress(OSError):
        udp.sendto(datagram, address)


def _bound(host: str, port: int) -> socket.socket:
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        udp.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            udp.setsockopt(socket.SOL_SOCKET, option, BUFFER)
        udp.bind((host, port))
    except OSError:
        udp.close()
        raise
    return udp


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise InvalidInput(f"{text!r} is no HOST:PORT")
    return host, int(port)


@click.command()
@click.argument("target", metavar="HOST:PORT")
@click.option("--listen", default=f"{LOOPBACK}:0", show_default=True, metavar="HOST:PORT")
@click.option("--both", default="", metavar="FAULTS", help="delay=0.02,loss=0.01,... both ways")
@click.option("--there", default="", metavar="FAULTS", help="only for what clients send")
@click.option("--back", default="", metavar="FAULTS", help="only for the answers")
@click.option("--seed", default=0, show_default=True)
@click.option("--anywhere", is_flag=True, help="allow addresses beyond this machine")
def main(
    target: str, listen: str, both: str, there: str, back: str, seed: int, anywhere: bool
) -> None:
    """Carry UDP datagrams to HOST:PORT and back, with faults, until interrupted."""
    try:
        link = parse_link(both)
        host, port = _address(listen)
        relay = Relay(
            _address(target),
            parse_link(there, link),
            parse_link(back, link),
            seed=seed,
            host=host,
            port=port,
            anywhere=anywhere,
        )
        asyncio.run(_run(relay))
    except HyperseaportError as error:
        raise click.ClickException(str(error)) from error


async def _run(relay: Relay) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with relay:
        click.echo(f"relay listening on {relay.address[0]}:{relay.address[1]}")
        await stop.wait()
    for name, faults in (("there", relay.there), ("back", relay.back)):
        counts = dataclasses.asdict(faults.stats)
        click.echo(f"{name} " + " ".join(f"{key}={count}" for key, count in counts.items()))


if __name__ == "__main__":
    main()
