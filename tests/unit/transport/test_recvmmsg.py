"""Datagrams read together, from real sockets of the loopback."""

from __future__ import annotations

import ctypes
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import pytest

from hyperseaport.transport.recvmmsg import MAX_EXPECTED, MOST, Batch
from hyperseaport.transport.transmit import Address

HOST = "127.0.0.1"
_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104


class Reader:
    """A socket, its batch, and what was handed over."""

    def __init__(self) -> None:
        self.socket = bound()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self.socket.setsockopt(_SOL_UDP, _UDP_GRO, 1)
        self.address: Address = self.socket.getsockname()
        self.batch = Batch(self.socket.fileno())
        self.runs: list[tuple[bytes, int, Address]] = []

    def read(self) -> list[int]:
        return self.batch.read(self._run)

    def _run(self, data: memoryview, segment: int, source: Address) -> None:
        self.runs.append((bytes(data), segment, source))

    @property
    def datagrams(self) -> list[tuple[bytes, Address]]:
        return [
            (data[at : at + segment], source)
            for data, segment, source in self.runs
            for at in range(0, len(data), segment)
        ]


def bound() -> socket.socket:
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.setblocking(False)
    udp.bind((HOST, 0))
    return udp


@contextmanager
def stage(senders: int = 1) -> Iterator[tuple[Reader, list[socket.socket]]]:
    reader, others = Reader(), [bound() for _ in range(senders)]
    try:
        yield reader, others
    finally:
        for each in (reader.socket, *others):
            each.close()


def test_equal_datagrams_are_one_run() -> None:
    with stage() as (reader, (sender,)):
        reader.batch.expect(20)
        sent = [bytes([number]) * 20 for number in range(MOST + 6)]
        for datagram in sent:
            sender.sendto(datagram, reader.address)
        assert reader.read() == [20] * MOST
        assert reader.read() == [20] * 6
        source = sender.getsockname()
        assert reader.runs == [
            (b"".join(sent[:MOST]), 20, source),
            (b"".join(sent[MOST:]), 20, source),
        ]


def test_nothing_is_there() -> None:
    with stage() as (reader, _):
        reader.batch.expect(20)
        assert reader.read() == []
        assert reader.runs == []


@pytest.mark.parametrize("seed", range(8))
def test_whatever_comes_arrives_in_order(seed: int) -> None:
    rng = Random(seed)
    with stage(2) as (reader, senders):
        for _ in range(6):
            expected = rng.choice((1, 20, 1472, MAX_EXPECTED))
            reader.batch.expect(expected)
            sent = []
            for _ in range(rng.randrange(MOST)):
                size = rng.choice((expected, expected, 1, 28, 1200, 9000))
                datagram, sender = rng.randbytes(size), rng.choice(senders)
                sender.sendto(datagram, reader.address)
                sent.append((datagram, sender.getsockname()))
            assert reader.read() == [len(datagram) for datagram, _ in sent]
            assert reader.datagrams == sent
            reader.runs.clear()


def test_empty_datagrams_are_nobodys() -> None:
    with stage() as (reader, (sender,)):
        reader.batch.expect(20)
        for datagram in (b"", b"a" * 20, b""):
            sender.sendto(datagram, reader.address)
        assert reader.read() == [0, 20, 0]
        assert reader.datagrams == [(b"a" * 20, sender.getsockname())]


def test_what_the_kernel_has_put_together_comes_with_its_segment() -> None:
    with stage() as (reader, (sender,)):
        reader.batch.expect(20)
        data = Random(1).randbytes(60_000)
        size = (1200).to_bytes(2, "little")
        sender.sendto(b"a" * 20, reader.address)
        sender.sendmsg((data,), ((_SOL_UDP, _UDP_SEGMENT, size),), 0, reader.address)
        sender.sendto(b"b" * 20, reader.address)
        while reader.read():
            pass
        cut = [data[at : at + 1200] for at in range(0, len(data), 1200)]
        assert [each for each, _ in reader.datagrams] == [b"a" * 20, *cut, b"b" * 20]


def test_a_machine_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    with stage() as (reader, _):
        monkeypatch.setattr(sys, "byteorder", "big")
        with pytest.raises(OSError, match="64-bit Linux"):
            Batch(reader.socket.fileno())
        monkeypatch.undo()
        monkeypatch.setattr(ctypes, "PyDLL", lambda _name: object())
        with pytest.raises(AttributeError):
            Batch(reader.socket.fileno())
