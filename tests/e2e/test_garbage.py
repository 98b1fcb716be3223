"""Live processes of the command line under bytes that no peer of theirs would send.

Loopback only, and a bounded number of datagrams. Throughout, a connection that was there before
goes on, and bytes through it hash right.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from random import Random
from typing import Any

from support.peers import OurService, Peer
from support.servers import Backend, answering, exchange, half_close
from support.stage import Stage
from support.waiting import until
from vectors import load

from hyperseaport.transport.channel import Channel
from hyperseaport.transport.dht.endpoint import Endpoint, EndpointConfig
from hyperseaport.transport.dht.messages import PEER_HANDSHAKE, HandshakeMessage, Mode
from hyperseaport.transport.dht.wire import encode_request
from hyperseaport.transport.keys import NS_PEER_HANDSHAKE, KeyPair, target
from hyperseaport.transport.noise import MESSAGE_1_OVERHEAD, Initiator

HOST = "127.0.0.1"
#: Datagrams for each UDP port.
DATAGRAMS = 2000
#: Datagrams sent before the processes get a turn: what their kernel buffers take.
BURST = 50
#: Bytes by which a process may have grown: allocators keep what a burst once needed, and a leak of
#: one datagram's memory for each would be more.
GROWTH = 24 * 1024 * 1024


def udp_ports(peer: Peer) -> list[int]:
    """The UDP ports that a process has bound."""
    pid = peer.process.pid
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            inodes.add(os.readlink(f"/proc/{pid}/fd/{name}").removeprefix("socket:[").rstrip("]"))
    rows = [row.split() for row in Path(f"/proc/{pid}/net/udp").read_text().splitlines()[1:]]
    return [int(row[1].partition(":")[2], 16) for row in rows if row[9] in inodes]


def resident(peer: Peer) -> int:
    """Bytes of memory that a process has now."""
    pages = int(Path(f"/proc/{peer.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def captured() -> list[bytes]:
    """Datagrams that real programs have sent to each other."""
    found: set[bytes] = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for each in value.values():
                walk(each)
        elif isinstance(value, list):
            for each in value:
                walk(each)
        elif isinstance(value, str) and 8 <= len(value) <= 4096 and len(value) % 2 == 0:
            with contextlib.suppress(ValueError):
                found.add(bytes.fromhex(value))

    for name in ("hyperdht", "udx"):
        walk(load(name))
    return sorted(found)


def garbage(rng: Random) -> Iterator[bytes]:
    """Noise, real datagrams, and real datagrams with something wrong with them."""
    real = captured()
    assert len(real) > 100
    while True:
        kind = rng.randrange(8)
        datagram = bytearray(rng.choice(real))
        if kind == 0:
            datagram = bytearray(rng.randbytes(rng.randrange(1500)))
        elif kind == 1:
            # What any first look lets through: dht-rpc's versions and kinds, and UDX's.
            head = rng.choice((b"\x03", b"\x13", b"\xff\x01", b"\xff\x01\x01", b"\xff\x01\x02"))
            datagram = bytearray(head + rng.randbytes(rng.randrange(200)))
        elif kind == 2:
            del datagram[rng.randrange(len(datagram)) :]
        elif kind == 3:
            datagram += rng.randbytes(rng.randrange(60_000 - len(datagram)))
        elif kind in {4, 5, 6}:
            for _ in range(rng.randrange(1, 6)):
                datagram[rng.randrange(len(datagram))] = rng.randrange(256)
        yield bytes(datagram)


def handshakes(rng: Random, keys: list[bytes]) -> Iterator[bytes]:
    """Requests to pass a handshake on to a server: broken, or whole with a payload of noise."""
    number = 0
    while True:
        number += 1
        key = rng.choice(keys)
        noise = rng.randbytes(rng.choice((0, 10, MESSAGE_1_OVERHEAD, 300, 1100)))
        if number % 4 == 0:
            initiator = Initiator(
                KeyPair.from_seed(rng.randbytes(32)),
                key,
                prologue=NS_PEER_HANDSHAKE,
                ephemeral_seed=rng.randbytes(32),
            )
            noise = initiator.message(rng.randbytes(rng.randrange(1, 300)))
        message = HandshakeMessage(rng.choice(list(Mode)), noise)
        if rng.random() < 0.3:
            message = HandshakeMessage(Mode.FROM_RELAY, noise, (HOST, rng.randrange(1, 65536)))
        yield encode_request(
            number & 0xFFFF,
            (HOST, 1),
            PEER_HANDSHAKE,
            target=target(key),
            value=message.encode(),
        )


async def throw(datagrams: Iterator[bytes], peers: list[Peer], count: int) -> None:
    """Send `count` datagrams to each UDP port of each peer, in bursts."""
    addresses = [(HOST, port) for peer in peers for port in udp_ports(peer)]
    assert len(addresses) >= 2 * len(peers)
    with contextlib.ExitStack() as stack:
        sources = []
        for _ in range(4):
            source = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            source.setblocking(False)
            sources.append(source)
        for number in range(count):
            for address in addresses:
                with contextlib.suppress(OSError):
                    sources[number % 4].sendto(next(datagrams), address)
            if number % BURST == 0:
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def under_fire(stage: Stage, name: str) -> AsyncIterator[tuple[list[Peer], Endpoint]]:
    """Processes of all kinds, and an endpoint of ours beside them. Around the block, a connection
    carries bytes; after it, old and new ones work, and nothing has died or grown."""
    backend = Backend()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(backend.close)
        await stack.enter_async_context(backend.serving())
        service, proxy = await stage.chain(backend.port, name)
        await answering(proxy.port)
        peers = [*stage.network.peers, service, proxy]
        config = EndpointConfig(bootstrap=(stage.bootstrap,), host=HOST)
        endpoint = await Endpoint.open(config)
        stack.push_async_callback(endpoint.close)
        await endpoint.ready()
        data = Random(1).randbytes(300_000)
        over = asyncio.Event()

        async def payloads() -> None:
            # One connection, which lives through all of it.
            reader, writer = await asyncio.open_connection(HOST, proxy.port)
            try:
                writer.write(b"F")
                while not over.is_set():
                    writer.write(len(data).to_bytes(8, "big") + data)
                    answer = await reader.readexactly(32 + 8 + len(data))
                    assert answer[40:] == data
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

        async with stage.undisturbed(service, proxy):
            before = {peer.process.name: resident(peer) for peer in peers}
            living = asyncio.create_task(payloads())
            yield peers, endpoint
            over.set()
            async with asyncio.timeout(30):
                await living
            await exchange(proxy.port, data)
            await half_close(proxy.port, data)
            after = {peer.process.name: resident(peer) for peer in peers}
        for name, size in after.items():
            assert size - before[name] < GROWTH, f"{name}: {before[name]} bytes, then {size}"
        for peer in peers:
            assert "Traceback" not in peer.process.text(), peer.process.name


async def test_datagrams_that_make_no_sense(stage: Stage) -> None:
    async with under_fire(stage, "datagrams") as (peers, _):
        await throw(garbage(Random(1)), peers, DATAGRAMS)


async def test_handshakes_that_make_no_sense(stage: Stage) -> None:
    async with under_fire(stage, "handshakes") as (peers, _):
        registry = bytes.fromhex(stage.key)
        [service] = [peer for peer in peers if isinstance(peer, OurService)]
        keys = [registry, bytes.fromhex(service.key)]
        await throw(handshakes(Random(2), keys), peers, 200)


class Answers(asyncio.Protocol):
    def __init__(self) -> None:
        self.data = b""
        self.lost = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()


async def session(endpoint: Endpoint, registry: bytes) -> tuple[Channel, Answers]:
    channel = await endpoint.connect(registry, key_pair=KeyPair.generate())
    answers = Answers()
    channel.set_protocol(answers)
    return channel, answers


async def settle(channel: Channel, answers: Answers) -> bytes:
    """What the registry says to all that was written, once it has said everything."""
    channel.write_eof()
    async with asyncio.timeout(30):
        await answers.lost.wait()
    return answers.data


#: Lines that are no JSON, or too long: the session ends.
NO_JSON = [
    b"\n\n\n{\n",
    b"not json\n",
    b"\xff\xfe\x00\n",
    b'{"method":"query"' + b"\n",
    b"[" * 200_000 + b"\n",
    b'{"id":1e999,"method":NaN}\n',
    b"x" * (2 * 1024 * 1024) + b"\n",
    b"x" * (2 * 1024 * 1024),
]

#: Requests of the right form about the wrong things: an error each, or nothing, and life goes on.
HOSTILE = [
    b"null",
    b"1",
    b'"text"',
    b"[]",
    b"{}",
    b'{"id":1}',
    b'{"id":[[]],"method":[]}',
    b'{"id":1,"method":"register"}',
    b'{"id":1,"method":"register","params":[]}',
    b'{"id":1,"method":"register","params":null}',
    b'{"id":1,"method":"register","params":{"role":1,"version":{}}}',
    b'{"id":1,"method":"register","params":{"role":"__proto__","version":"1.0.0"}}',
    b'{"id":1,"method":"register","params":{"role":"../../etc/passwd","version":"1.0.0"}}',
    b'{"id":1,"method":"register","params":{"role":"a/b/c@d","version":"not a version"}}',
    b'{"id":1,"method":"register","params":{"role":"\\u0000\\ud800","version":"1.0.0"}}',
    b'{"id":1,"method":"register","params":{"role":"' + b"r" * 500_000 + b'"}}',
    b'{"id":1,"method":"query","params":{"role":"' + b"(a+)+" * 1000 + b'","version":">=0"}}',
    b'{"id":1,"method":"query","params":{"version":"' + b">=1 || " * 5000 + b'"}}',
    b'{"id":1,"method":"query","params":' + b"[" * 90 + b"]" * 90 + b"}",
    b'{"id":1,"method":"unregister","params":{"role":{"a":1}}}',
    b'{"id":1,"method":"waitFor","params":{"role":7,"version":7}}',
    b'{"id":1,"method":"constructor"}',
    b'{"id":1,"method":"__class__","params":{}}',
    b'{"id":1,"result":1}',
    b'{"id":99999999999999999999,"method":"getRegistryKey"}',
]


async def test_lines_that_a_registry_never_asked_for(stage: Stage) -> None:
    async with under_fire(stage, "lines") as (_, endpoint):
        registry = bytes.fromhex(stage.key)
        for line in NO_JSON:
            channel, answers = await session(endpoint, registry)
            channel.write(line)
            await settle(channel, answers)
        asked = b'{"id":"still here?","method":"getRegistryKey"}'
        for line in HOSTILE:
            channel, answers = await session(endpoint, registry)
            channel.write(line + b"\n" + asked + b"\n")

            async def told(answers: Answers = answers) -> bool:
                return b"still here?" in answers.data

            await until(told, f"an answer after {line[:60]!r}", deadline=10, every=0.005)
            channel.abort()
        # All at once, on sessions that are cut off at any place.
        rng = Random(4)
        everything = b"\n".join(HOSTILE) + b"\n"
        for _ in range(20):
            channel, _answers = await session(endpoint, registry)
            channel.write(everything[: rng.randrange(len(everything))])
            if rng.random() < 0.5:
                await asyncio.sleep(0)
            channel.abort()


async def test_channels_that_do_not_speak_the_protocol(stage: Stage) -> None:
    """A real handshake, and then a stream of something else: to the registry and to the service."""
    async with under_fire(stage, "streams") as (peers, endpoint):
        [service] = [peer for peer in peers if isinstance(peer, OurService)]
        rng = Random(5)
        for key in (stage.key, service.key):
            for first in ("noise", "half", "silence") * 8:
                channel = await endpoint.connect(bytes.fromhex(key))
                now = asyncio.get_running_loop().time()
                if first == "noise":
                    channel.stream.write(rng.randbytes(rng.randrange(1, 100_000)), now)
                elif first == "half":
                    channel.stream.write(b"\xff\xff\xff" + bytes(1000), now)
                channel.stream.end(now)
                endpoint.wake()
                await asyncio.sleep(0.01)
                channel.abort()
