"""A relay between real sockets of 127.0.0.1."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from hyperseaport.testing import relay as module
from hyperseaport.testing.faults import Link
from hyperseaport.testing.relay import Relay
from hyperseaport.transport.errors import InvalidInput, LocalError
from hyperseaport.transport.transmit import Address

#: Seconds in which what has to happen happens, on a busy machine.
SOON = 20.0


class End(asyncio.DatagramProtocol):
    """Keeps what arrives; an echo sends it back as well."""

    transport: asyncio.DatagramTransport

    def __init__(self, *, echo: bool) -> None:
        self.echo = echo
        self.got: asyncio.Queue[bytes] = asyncio.Queue()
        self.sources: set[Address] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, source: Address) -> None:
        self.got.put_nowait(data)
        self.sources.add(source)
        if self.echo:
            self.transport.sendto(data, source)

    @property
    def address(self) -> Address:
        name: Address = self.transport.get_extra_info("sockname")
        return name

    async def next(self) -> bytes:
        return await asyncio.wait_for(self.got.get(), SOON)


@asynccontextmanager
async def end(*, echo: bool = False) -> AsyncIterator[End]:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(
        lambda: End(echo=echo), local_addr=("127.0.0.1", 0)
    )
    try:
        yield protocol
    finally:
        transport.close()


async def test_it_carries_both_ways_and_keeps_clients_apart() -> None:
    async with (
        end(echo=True) as target,
        end() as one,
        end() as other,
        Relay(target.address, Link(delay=0.005)) as relay,
    ):
        assert relay.address[0] == "127.0.0.1"
        one.transport.sendto(b"one", relay.address)
        other.transport.sendto(b"other", relay.address)
        assert (await one.next(), await other.next()) == (b"one", b"other")
        assert one.sources == other.sources == {relay.address}
        assert len(target.sources) == 2
        assert relay.there.stats.sent == relay.back.stats.sent == 2


async def test_order_is_kept_unless_a_fault_is_to_change_it() -> None:
    async with (
        end() as target,
        end() as client,
        Relay(target.address, Link(delay=0.01)) as relay,
    ):
        sent = [bytes([number]) for number in range(50)]
        for each in sent:
            client.transport.sendto(each, relay.address)
        assert [await target.next() for _ in sent] == sent


async def test_each_direction_has_faults_of_its_own() -> None:
    async with (
        end(echo=True) as target,
        end() as client,
        Relay(target.address, Link(delay=0.0), Link(delay=0.0, loss=1.0)) as relay,
    ):
        client.transport.sendto(b"x", relay.address)
        assert await target.next() == b"x"
        async with asyncio.timeout(SOON):
            while not relay.back.stats.lost:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        assert client.got.empty()


async def test_the_seed_decides_what_is_lost() -> None:
    async def survivors(seed: int) -> list[bytes]:
        async with (
            end() as target,
            end() as client,
            Relay(target.address, Link(delay=0.0, loss=0.5), seed=seed) as relay,
        ):
            for number in range(60):
                client.transport.sendto(bytes([number]), relay.address)
            async with asyncio.timeout(SOON):
                while relay.there.stats.sent < 60:  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
            return [await target.next() for _ in range(60 - relay.there.stats.lost)]

    assert await survivors(1) == await survivors(1)
    assert await survivors(1) != await survivors(2)


async def test_strangers_cannot_answer() -> None:
    async with (
        end() as target,
        end() as client,
        end() as stranger,
        Relay(target.address, Link(delay=0.0)) as relay,
    ):
        client.transport.sendto(b"hello", relay.address)
        await target.next()
        (inner,) = target.sources
        stranger.transport.sendto(b"forged", inner)
        target.transport.sendto(b"true", inner)
        assert await client.next() == b"true"


async def test_the_oldest_client_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CLIENTS", 1)
    async with (
        end(echo=True) as target,
        end() as one,
        end() as other,
        Relay(target.address, Link(delay=0.0)) as relay,
    ):
        for client in (one, other, one):
            client.transport.sendto(b"x", relay.address)
            assert await client.next() == b"x"
        assert len(target.sources) == 3


async def test_a_taken_address_is_the_callers_fault() -> None:
    async with end() as target, end() as other:
        with pytest.raises(LocalError, match="choose another port"):
            async with Relay(target.address, Link(), port=other.address[1]):
                raise AssertionError("it listens where somebody else does")


@pytest.mark.parametrize("host", ["192.0.2.1", "0.0.0.0", "localhost.example"])
def test_it_stays_on_this_machine(host: str) -> None:
    with pytest.raises(InvalidInput, match="beyond this machine"):
        Relay((host, 1), Link())
    with pytest.raises(InvalidInput, match="beyond this machine"):
        Relay(("127.0.0.1", 1), Link(), host=host)
    Relay((host, 1), Link(), anywhere=True)


def command(place: Path, *arguments: str) -> subprocess.Popen[str]:
    """Started in ``place``, a directory that is not the checkout's."""
    return subprocess.Popen(
        [sys.executable, "-m", "hyperseaport.testing.relay", *arguments],
        cwd=place,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


async def test_the_command(tmp_path: Path) -> None:
    async with end(echo=True) as target, end() as client:
        there = f"127.0.0.1:{target.address[1]}"
        with command(tmp_path, there, "--both", "delay=0.001", "--back", "duplicate=1") as process:
            assert process.stdout is not None
            line = await asyncio.to_thread(process.stdout.readline)
            assert line.startswith("relay listening on 127.0.0.1:")
            client.transport.sendto(b"x", ("127.0.0.1", int(line.rpartition(":")[2])))
            assert [await client.next(), await client.next()] == [b"x", b"x"]
            process.send_signal(signal.SIGTERM)
            output, errors = await asyncio.to_thread(process.communicate, timeout=SOON)
        assert process.returncode == 0
        assert errors == ""
        assert "there sent=1 sent_bytes=1 lost=0" in output
        assert "duplicated=1" in output.splitlines()[1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["127.0.0.1"], "no HOST:PORT"),
        (["127.0.0.1:65536"], "no HOST:PORT"),
        (["192.0.2.1:1"], "beyond this machine"),
        (["127.0.0.1:1", "--both", "colour=blue"], "is no fault"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], text: str, tmp_path: Path) -> None:
    with command(tmp_path, *arguments) as process:
        _, errors = process.communicate(timeout=SOON)
    assert process.returncode == 1
    assert text in errors
    assert errors.count("\n") == 1
