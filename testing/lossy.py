"""A UDP socket on a bad network: faults for one process, whoever it talks to.

Peers of a DHT learn addresses from each other, so no relay can stand between all of them. Instead
one of them sends and receives through faults::

    monkeypatch.setattr("hyperseaport.transport.dht.endpoint.UdpSocket", LossySockets(link, seed=1))
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from random import Random

from ..transport.transmit import Address, Transmit
from ..transport.udp import OnRun, UdpSocket
from .faults import Faults, Link
from .network import datagrams
from .schedule import Schedule


class LossyUdpSocket(UdpSocket):
    """A `UdpSocket` that sends through the ``outgoing`` and receives through the ``incoming``
    faults. Their time begins at 0 when the socket is bound. Datagrams go one by one."""

    def __init__(
        self,
        host: str,
        port: int,
        on_run: OnRun,
        on_batch: Callable[[], None],
        *,
        outgoing: Faults,
        incoming: Faults,
        bound: socket.socket | None = None,
    ) -> None:
        super().__init__(host, port, self._carry_in, on_batch, bound=bound, segmenting=False)
        self.outgoing = outgoing
        self.incoming = incoming
        self._take = on_run
        self._born = self._loop.time()
        self._leaving = Schedule()
        self._arriving = Schedule(after=on_batch)

    def send(self, transmit: Transmit) -> None:
        now = self._loop.time() - self._born
        for datagram in datagrams(transmit):
            for when, piece in self.outgoing.carry(
                datagram,
                now,
                self.address,
                transmit.address,
                may_fragment=transmit.may_fragment,
            ):
                one = transmit._replace(buffers=(piece,), segment=0)
                self._leaving.at(self._born + when, partial(super().send, one))

    def close(self) -> None:
        self._leaving.cancel()
        self._arriving.cancel()
        super().close()

    def _carry_in(self, data: memoryview, segment: int, source: Address) -> None:
        now = self._loop.time() - self._born
        for start in range(0, len(data), segment):
            datagram = bytes(data[start : start + segment])
            for when, piece in self.incoming.carry(datagram, now, source, self.address):
                arrive = partial(self._take, memoryview(piece), len(piece), source)
                self._arriving.at(self._born + when, arrive)


class LossySockets:
    """Stands in for `UdpSocket`: every socket it makes has faults of its own in both directions.
    `sockets` are those it made, oldest first, with their statistics."""

    def __init__(self, link: Link, *, seed: int) -> None:
        self._link = link
        self._rng = Random(seed)
        self.sockets: list[LossyUdpSocket] = []

    def __call__(
        self,
        host: str,
        port: int,
        on_run: OnRun,
        on_batch: Callable[[], None],
        *,
        bound: socket.socket | None = None,
    ) -> LossyUdpSocket:
        lossy = LossyUdpSocket(
            host,
            port,
            on_run,
            on_batch,
            bound=bound,
            outgoing=Faults(self._link, Random(self._rng.getrandbits(64))),
            incoming=Faults(self._link, Random(self._rng.getrandbits(64))),
        )
        self.sockets.append(lossy)
        return lossy
