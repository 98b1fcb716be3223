"""A stream and a peer made by hand, who says one packet at a time."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from hyperseaport.testing.network import datagrams
from hyperseaport.transport.transmit import Address, Transmit
from hyperseaport.transport.udx import packet as wire
from hyperseaport.transport.udx.mux import Mux
from hyperseaport.transport.udx.packet import Packet, decode, encode

PEER: Address = ("10.0.0.2", 1234)
LOCAL_ID = 7
REMOTE_ID = 1234


class Hand:
    """`stream` of `mux`, connected unless told otherwise, and the packets it says to its peer."""

    def __init__(
        self,
        *,
        connect: bool = True,
        first_seq: int = 0,
        first_ack: int = 0,
        receive_window: int = 262144,
        link_mtu: int = 1500,
    ) -> None:
        self.mux = Mux(Random(1), receive_window=receive_window, link_mtu=link_mtu)
        self.stream = self.mux.create(local_id=LOCAL_ID, first_seq=first_seq, first_ack=first_ack)
        self.now = 0.0
        #: Transmits of the last call of `sent`.
        self.transmits: list[Transmit] = []
        if connect:
            self.stream.connect(0, REMOTE_ID, PEER, self.now)

    def sent(self) -> list[Packet]:
        """What leaves now."""
        self.transmits = self.mux.transmits(self.now)
        return [decode(each) for transmit in self.transmits for each in datagrams(transmit)]

    def give(
        self,
        type: int,  # noqa: A002
        seq: int = 0,
        ack: int = 0,
        payload: bytes = b"",
        *,
        window: int = 4194304,
        sacks: tuple[tuple[int, int], ...] = (),
        padding: int = 0,
        socket: int = 0,
        source: Address = PEER,
    ) -> list[Packet]:
        """Say one packet; returns the answer."""
        packet = Packet(type, LOCAL_ID, window, seq, ack, payload, sacks, padding)
        assert self.mux.receive(encode(packet), socket, source, self.now)
        return self.sent()

    def wait(self, until: float) -> list[tuple[float, Packet]]:
        """Let time pass; returns what left and when."""
        said = [(self.now, packet) for packet in self.sent()]
        while (when := self.mux.deadline()) is not None and when <= until:
            self.now = max(self.now, when)
            self.mux.on_deadline(self.now)
            said += [(self.now, packet) for packet in self.sent()]
        self.now = until
        return said

    def read(self) -> bytes:
        """All there is to read, consumed at once."""
        data = b"".join(self.stream.read())
        self.stream.credit(len(data), self.now)
        return data

    def warm_up(self, rtt: float = 0.05) -> int:
        """Send and have acknowledged one packet; returns the next number."""
        self.stream.write(b"warm", self.now)
        packets = self.sent()
        self.now += rtt
        following = packets[-1].seq + 1
        self.give(wire.ACK, ack=following)
        return following


@pytest.fixture
def hand() -> Callable[..., Hand]:
    return Hand
