from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hyperseaport.testing.channels import WRITE_HIGH, MemoryChannel, channel_pair
from hyperseaport.testing.clock import run_virtual
from hyperseaport.transport.errors import StreamReset


class Recorder(asyncio.Protocol):
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.calls.append("made")

    def data_received(self, data: bytes) -> None:
        self.calls.append(data)

    def eof_received(self) -> bool:
        self.calls.append("eof")
        return True

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append(("lost", exc))


def pair(delay: float) -> tuple[MemoryChannel, Recorder, MemoryChannel, Recorder]:
    left, right = channel_pair(delay=delay)
    ours, theirs = Recorder(), Recorder()
    left.set_protocol(ours)
    right.set_protocol(theirs)
    return left, ours, right, theirs


@pytest.mark.parametrize("delay", [0.0, 0.5])
def test_bytes_and_ends_arrive_in_order(delay: float) -> None:
    async def scenario() -> None:
        left, ours, right, theirs = pair(delay)
        assert left.remote_public_key == right.public_key
        for number in range(50):
            left.write(bytes((number,)))
        left.write_eof()
        await asyncio.sleep(delay + 0.01)
        assert theirs.calls == ["made", *(bytes((number,)) for number in range(50)), "eof"]
        right.write(b"still open")
        right.close()
        await asyncio.sleep(delay + 0.01)
        # Both directions have ended: that is the end.
        assert ours.calls == ["made", b"still open", "eof", ("lost", None)]
        assert theirs.calls[-1] == ("lost", None)

    run_virtual(scenario())


def test_an_abort_is_a_reset_for_the_peer() -> None:
    async def scenario() -> None:
        left, ours, _, theirs = pair(0.0)
        left.write(b"before")
        left.abort()
        await asyncio.sleep(0.01)
        assert ours.calls == ["made", ("lost", None)]
        assert theirs.calls[1] == b"before"
        assert isinstance(theirs.calls[2][1], StreamReset)

    run_virtual(scenario())


def test_a_reader_that_pauses_makes_the_writer_pause() -> None:
    async def scenario() -> None:
        left, ours, right, theirs = pair(0.0)
        right.pause_reading()
        left.write(b"x" * (WRITE_HIGH + 1))
        await asyncio.sleep(0.01)
        left.write(b"y")
        paused = ours.paused
        assert theirs.calls == ["made"]
        right.resume_reading()
        await asyncio.sleep(0.01)
        assert (paused, ours.paused) == (True, False)
        assert theirs.calls[2] == b"y"

    run_virtual(scenario())


def test_a_black_hole_tells_nobody() -> None:
    async def scenario() -> None:
        left, ours, right, theirs = pair(0.0)
        left.blackhole()
        right.write(b"lost")
        left.abort()
        await asyncio.sleep(100)
        assert ours.calls == ["made", ("lost", None)]
        assert theirs.calls == ["made"]
        right.fail(TimeoutError())
        await asyncio.sleep(0.01)
        assert len(theirs.calls) == 2

    run_virtual(scenario())
