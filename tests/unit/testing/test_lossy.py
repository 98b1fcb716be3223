"""Real sockets of 127.0.0.1 behind faults."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hyperseaport.testing.faults import Link
from hyperseaport.testing.lossy import LossySockets, LossyUdpSocket
from hyperseaport.testing.schedule import Schedule
from hyperseaport.transport.transmit import Address, Transmit

#: Seconds in which what has to happen happens, on a busy machine.
SOON = 10.0


class End:
    """A lossy socket and what it got."""

    def __init__(self, sockets: LossySockets) -> None:
        self.got: list[bytes] = []
        self.batches = 0
        self.socket: LossyUdpSocket = sockets("127.0.0.1", 0, self.on_run, self.on_batch)

    def on_run(self, data: memoryview, segment: int, source: Address) -> None:
        assert segment == len(data)
        self.got.append(bytes(data))

    def on_batch(self) -> None:
        self.batches += 1

    def send(self, other: End, *pieces: bytes, segment: int = 0) -> None:
        self.socket.send(Transmit(0, other.socket.address, pieces, segment))


async def soon(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def test_without_faults_it_is_a_socket() -> None:
    sockets = LossySockets(Link(delay=0.0), seed=1)
    a, b = End(sockets), End(sockets)
    a.send(b, b"abc", b"def", b"g", segment=3)
    await soon(lambda: len(b.got) == 3)
    assert b.got == [b"abc", b"def", b"g"]
    assert b.batches > 0
    assert sockets.sockets == [a.socket, b.socket]
    for end in (a, b):
        end.socket.close()
        end.socket.close()


async def test_losses_are_those_of_the_seed() -> None:
    async def survivors(seed: int) -> list[bytes]:
        sockets = LossySockets(Link(delay=0.001, loss=0.5), seed=seed)
        a, b = End(sockets), End(sockets)
        for number in range(40):
            a.send(b, bytes([number]))
        left = 40 - a.socket.outgoing.stats.lost
        await soon(lambda: b.socket.incoming.stats.sent == left)
        await soon(lambda: len(b.got) == left - b.socket.incoming.stats.lost)
        assert 0 < len(b.got) < left < 40
        a.socket.close()
        b.socket.close()
        return b.got

    assert await survivors(1) == await survivors(1)
    assert await survivors(1) != await survivors(2)


async def test_what_is_late_arrives_in_a_batch_and_in_order() -> None:
    sockets = LossySockets(Link(delay=0.02), seed=1)
    a, b = End(sockets), End(sockets)
    sent = [bytes([number]) for number in range(50)]
    for each in sent:
        a.send(b, each)
    assert b.got == []
    await soon(lambda: len(b.got) == 50)
    assert b.got == sent
    a.socket.close()
    b.socket.close()


async def test_nothing_happens_after_close() -> None:
    sockets = LossySockets(Link(delay=0.01), seed=1)
    a, b = End(sockets), End(sockets)
    a.send(b, b"x")
    a.socket.close()
    await asyncio.sleep(0.05)
    assert b.got == []
    assert b.socket.incoming.stats.sent == 0
    b.socket.close()


async def test_a_schedule_keeps_the_order_of_equal_times() -> None:
    done: list[int] = []
    after: list[int] = []
    schedule = Schedule(after=lambda: after.append(len(done)))
    when = asyncio.get_running_loop().time() + 0.02
    for number in range(20):
        schedule.at(when, lambda number=number: done.append(number))  # type: ignore[misc]
    schedule.at(when - 0.01, lambda: done.append(-1))
    assert len(schedule) == 21
    await soon(lambda: len(done) == 21)
    assert done == [-1, *range(20)]
    assert after[-1] == 21
    schedule.at(0.0, lambda: done.append(99))
    assert done[-1] == 99
    schedule.at(when + 3600, lambda: done.append(100))
    schedule.cancel()
    assert len(schedule) == 0
