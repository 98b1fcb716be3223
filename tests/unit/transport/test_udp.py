"""Real UDP sockets on 127.0.0.1, with and without the kernel's runs of datagrams."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from hyperseaport.transport.errors import LocalError
from hyperseaport.transport.recvmmsg import MAX_EXPECTED
from hyperseaport.transport.transmit import Address, Buffer, Transmit
from hyperseaport.transport.udp import MAX_READS, MAX_SINGLE, MAX_UNSENT, UdpSocket

HOST = "127.0.0.1"

#: Whether runs are left to the kernel.
kernels = pytest.mark.parametrize("segmenting", [True, False], ids=["runs", "singly"])


class Peer:
    """A `UdpSocket` and what it received."""

    def __init__(self, *, segmenting: bool = True, host: str = HOST, port: int = 0) -> None:
        self.datagrams: list[bytes] = []
        self.sources: set[Address] = set()
        self.batches = 0
        self.on_batch: Callable[[], None] = lambda: None
        self._changed = asyncio.Event()
        self.udp = UdpSocket(host, port, self._run, self._batch, segmenting=segmenting)
        self.address = self.udp.address

    async def until(self, count: int) -> list[bytes]:
        """All datagrams, once there are so many."""
        async with asyncio.timeout(10):
            while len(self.datagrams) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.datagrams

    def send(self, to: Address, *buffers: Buffer, segment: int = 0) -> None:
        self.udp.send(Transmit(0, to, buffers, segment))

    def _run(self, data: memoryview, segment: int, source: Address) -> None:
        self.sources.add(source)
        for start in range(0, len(data), segment):
            self.datagrams.append(bytes(data[start : start + segment]))
        self._changed.set()

    def _batch(self) -> None:
        self.batches += 1
        self.on_batch()


class Pair:
    def __init__(self, segmenting: bool) -> None:
        self.left, self.right = Peer(segmenting=segmenting), Peer(segmenting=segmenting)

    def __enter__(self) -> tuple[Peer, Peer]:
        return self.left, self.right

    def __exit__(self, *_exc_info: object) -> None:
        self.left.udp.close()
        self.right.udp.close()


def cut(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@kernels
async def test_datagrams_arrive_whole_and_say_where_they_come_from(segmenting: bool) -> None:
    with Pair(segmenting) as (left, right):
        assert left.address[0] == HOST
        assert 0 < left.address[1] < 65536
        assert left.udp.address != right.udp.address
        left.send(right.address, b"one")
        left.send(right.address, b"t", bytearray(b"w"), memoryview(b"xoy")[1:2])
        left.send(right.address, bytes(1472))
        assert await right.until(3) == [b"one", b"two", bytes(1472)]
        assert right.sources == {left.address}
        right.send(left.address, b"back")
        assert await left.until(1) == [b"back"]
        assert left.udp.dropped == right.udp.dropped == 0


@kernels
@pytest.mark.parametrize(
    ("size", "segment"), [(1200, 1200), (2400, 1200), (2401, 1200), (40_000, 1180), (63_000, 1400)]
)
async def test_a_run_arrives_as_datagrams(segmenting: bool, size: int, segment: int) -> None:
    with Pair(segmenting) as (left, right):
        data = Random(size).randbytes(size)
        pieces = list(cut(data, segment))
        # As UDX makes them: a header and a body, neither of which crosses into the next datagram.
        buffers = [
            part for piece in pieces for part in (piece[:20], memoryview(piece)[20:]) if part
        ]
        left.send(right.address, *buffers, segment=segment)
        assert await right.until(len(pieces)) == pieces


@kernels
async def test_runs_and_single_datagrams_of_all_sizes_stay_apart(segmenting: bool) -> None:
    """Whatever was put together on the way is taken apart where it was joined."""
    rng = Random(3)
    with Pair(segmenting) as (left, right):
        sent: list[bytes] = []
        for _ in range(200):
            segment = rng.choice((1, 2, 20, 500, 1180, 1180, 1400))
            data = rng.randbytes(rng.randrange(1, segment * rng.choice((1, 1, 5, 20)) + 1))
            if len(data) <= segment:
                left.send(right.address, data)
            else:
                left.send(right.address, *cut(data, segment), segment=segment)
            sent += cut(data, segment)
            if rng.random() < 0.3:
                await right.until(len(sent))
        assert await right.until(len(sent)) == sent


async def test_two_sources_are_told_apart() -> None:
    with Pair(True) as (left, right):
        third = Peer()
        try:
            heard: list[tuple[bytes, Address]] = []
            real = right._run

            def run(data: memoryview, segment: int, source: Address) -> None:
                heard.extend((bytes(piece), source) for piece in cut(bytes(data), segment))
                real(data, segment, source)

            right.udp._on_run = run
            for number in range(20):
                peer = left if number % 2 else third
                peer.send(right.address, bytes([number]) * 10)
            await right.until(20)
            for data, source in heard:
                assert source == (left if data[0] % 2 else third).address
        finally:
            third.udp.close()


async def test_one_batch_is_answered_as_a_whole() -> None:
    with Pair(True) as (left, right):
        for number in range(30):
            left.send(right.address, bytes([number]))
        await right.until(30)
        assert right.batches < 10


class CountedReads:
    """Stands for a socket, and counts how often it is asked for a datagram."""

    def __init__(self, real: socket.socket) -> None:
        self._real = real
        self.reads = 0

    def recvmsg_into(self, *arguments: Any) -> Any:
        self.reads += 1
        return self._real.recvmsg_into(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


async def test_where_datagrams_come_one_by_one_the_kernel_is_not_asked_for_more() -> None:
    with Pair(True) as (left, right):
        counted = CountedReads(right.udp._socket)
        right.udp._socket = counted  # type: ignore[assignment]
        for number in range(18):
            left.send(right.address, bytes([number]))
            await right.until(number + 1)
        # Once in nine times it is.
        assert counted.reads == 18 + 2
        # And when there is more after all, it comes.
        for number in range(18, 60):
            left.send(right.address, bytes([number]))
        assert await right.until(60) == [bytes([number]) for number in range(60)]


async def test_a_flood_leaves_other_work_its_turn() -> None:
    with Pair(False) as (left, right):
        loop = asyncio.get_running_loop()
        turns = 0

        def turn() -> None:
            nonlocal turns
            turns += 1

        def batch() -> None:
            loop.call_soon(turn)

        right.on_batch = batch
        for number in range(300):
            left.send(right.address, number.to_bytes(2, "big"))
        await right.until(300)
        assert turns >= 3


@pytest.mark.parametrize("size", [0, 1, 2047, 2048, 2049, 9000, 60_000])
async def test_datagrams_of_strangers_of_any_size_do_no_harm(size: int) -> None:
    peer = Peer()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        try:
            stranger.sendto(bytes(size), peer.address)
            stranger.sendto(b"afterwards", peer.address)
            while (await peer.until(1))[-1] != b"afterwards":
                await peer.until(len(peer.datagrams) + 1)
            assert all(data.strip(b"\0") in {b"", b"afterwards"} for data in peer.datagrams)
        finally:
            peer.udp.close()


@kernels
async def test_errors_of_the_network_are_ignored(segmenting: bool) -> None:
    with Pair(segmenting) as (left, right):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
            gone.bind((HOST, 0))
            nobody: Address = gone.getsockname()
        # ICMP says that nobody is there, which the kernel tells at the next call.
        for _ in range(3):
            left.send(nobody, b"anybody?")
            left.send(nobody, bytes(100), bytes(100), segment=100)
        # Too long, no way there, and not permitted.
        left.send(right.address, bytes(70_000))
        left.send(("255.255.255.255", 9), b"broadcast")
        assert left.udp.dropped >= 2
        left.send(right.address, b"still here")
        assert await right.until(1) == [b"still here"]


class FullKernel:
    """Stands for a socket whose kernel takes nothing more until it is told to."""

    def __init__(self, real: socket.socket) -> None:
        self._real = real
        self.full = True
        self.error: OSError | None = None

    def sendmsg(self, *arguments: Any) -> int:
        if self.full:
            raise BlockingIOError
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self._real.sendmsg(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@kernels
async def test_what_the_kernel_does_not_take_waits_in_order(segmenting: bool) -> None:
    with Pair(segmenting) as (left, right):
        kernel = FullKernel(left.udp._socket)
        left.udp._socket = kernel  # type: ignore[assignment]
        left.send(right.address, b"first")
        left.send(right.address, b"ab", b"cd", b"e", segment=2)
        await asyncio.sleep(0)
        assert right.datagrams == []
        kernel.full = False
        left.send(right.address, b"last")
        assert await right.until(5) == [b"first", b"ab", b"cd", b"e", b"last"]
        assert left.udp.dropped == 0
        left.send(right.address, b"at once")
        assert (await right.until(6))[-1] == b"at once"


async def test_what_waits_is_bounded_and_an_error_costs_one_datagram() -> None:
    with Pair(True) as (left, right):
        kernel = FullKernel(left.udp._socket)
        left.udp._socket = kernel  # type: ignore[assignment]
        size = 1024
        room = MAX_UNSENT // size
        for number in range(room + 10):
            left.send(right.address, number.to_bytes(4, "big") + bytes(size - 4))
        assert left.udp.dropped == 10
        kernel.error = OSError(101, "Network is unreachable")
        kernel.full = False
        datagrams = await right.until(room - 1)
        assert [int.from_bytes(data[:4], "big") for data in datagrams] == list(range(1, room))
        assert left.udp.dropped == 11
        left.send(right.address, b"room again")
        assert (await right.until(room))[-1] == b"room again"


async def test_close_lets_go_of_everything_and_is_harmless_twice() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Pair(True) as (left, right):
        left.send(right.address, b"under way")
        kernel = FullKernel(left.udp._socket)
        left.udp._socket = kernel  # type: ignore[assignment]
        left.send(right.address, b"waits")
        right.udp.close()
        right.udp.close()
        left.udp.close()
        left.udp.close()
        kernel.full = False
        left.send(right.address, b"too late")
        await asyncio.sleep(0)
        assert right.datagrams == []
    assert len(os.listdir("/proc/self/fd")) == before


async def test_the_owner_may_close_while_it_is_told() -> None:
    with Pair(False) as (left, right):
        heard: list[bytes] = []
        called = asyncio.Event()

        def run(data: memoryview, _segment: int, _source: Address) -> None:
            heard.append(bytes(data))
            right.udp.close()
            called.set()

        right.udp._on_run = run
        third = Peer()
        for peer in (left, third, left):
            peer.send(right.address, b"x")
        async with asyncio.timeout(10):
            await called.wait()
        for _ in range(5):
            await asyncio.sleep(0)
        assert heard == [b"x"]
        third.udp.close()


async def test_an_address_that_cannot_be_had_is_one_line() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(LocalError, match="cannot listen on UDP") as caught:
        Peer(host="192.0.2.1")
    assert "\n" not in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_port_in_use_is_one_line() -> None:
    peer = Peer()
    try:
        with pytest.raises(LocalError, match=f"{HOST}:{peer.address[1]}"):
            Peer(port=peer.address[1])
    finally:
        peer.udp.close()


# Datagrams that come singly, and many of them


async def crowd(left: Peer, right: Peer, sizes: list[int], seed: int) -> None:
    """What `left` sends before `right` looks arrives in order."""
    rng = Random(seed)
    sent = [rng.randbytes(size) for size in sizes]
    before = len(right.datagrams)
    for datagram in sent:
        left.send(right.address, datagram)
    assert (await right.until(before + len(sent)))[before:] == sent


async def test_many_single_datagrams_are_read_together() -> None:
    with Pair(segmenting=True) as (left, right):
        await crowd(left, right, [20] * 500, 1)
        assert right.udp._singly
        batches = right.batches
        await crowd(left, right, [20] * 640, 2)
        assert right.batches - batches <= 640 // MAX_READS + 1
        # Others than are expected, and then those.
        await crowd(left, right, [28, 20] * 50 + [1200] * 200 + [9, 1200], 3)
        assert right.udp._singly
        assert right.udp._many is not None
        assert right.udp._many.expected == 1200


async def test_single_datagrams_stop_coming() -> None:
    with Pair(segmenting=True) as (left, right):
        await crowd(left, right, [20] * 200, 1)
        for number in range(20):
            await crowd(left, right, [30], number)
        assert not right.udp._singly
        await crowd(left, right, [20] * 200, 4)
        data = Random(5).randbytes(50_000)
        left.send(right.address, data, segment=1000)
        before = len(right.datagrams)
        assert b"".join((await right.until(before + 50))[before:]) == data
        assert not right.udp._singly


def test_what_is_read_together_has_room() -> None:
    assert MAX_SINGLE <= MAX_EXPECTED


async def test_closed_while_many_are_read() -> None:
    with Pair(segmenting=True) as (left, right):
        await crowd(left, right, [20] * 200, 1)
        assert right.udp._singly
        right._changed.clear()
        right._run = lambda *_: right.udp.close()  # type: ignore[method-assign]
        right.udp._on_run = right._run
        batches = right.batches
        for _ in range(10):
            left.send(right.address, bytes(20))
        await asyncio.sleep(0.05)
        assert right.batches == batches


async def test_a_kernel_that_reads_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int) -> None:
        raise OSError("no such call")

    monkeypatch.setattr("hyperseaport.transport.recvmmsg.Batch", refuse)
    with Pair(segmenting=True) as (left, right):
        await crowd(left, right, [20] * 300, 1)
        assert not right.udp._singly
