"""What only we say, as Node takes it: that a client is refused, and challenges of a path."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support import npm
from support.network import Network
from support.peers import START, node
from support.process import Process

from hyperseaport.transport.channel import Channel
from hyperseaport.transport.dht.endpoint import Endpoint, EndpointConfig
from hyperseaport.transport.dht.moves import ANSWER, CHALLENGE
from hyperseaport.transport.keys import KeyPair

KEYS = KeyPair.generate()
#: Milliseconds until a client knows that it is refused; the silence of the reference takes 4000.
AT_ONCE = 2000

pytestmark = pytest.mark.parametrize(
    "network", [("node", "node")], indirect=True, scope="module", ids=["node-node"]
)


class Collector(asyncio.Protocol):
    """Keeps what comes."""

    def __init__(self) -> None:
        self.data = b""
        self.more = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.more.set()

    async def until(self, data: bytes) -> None:
        while self.data != data:
            self.more.clear()
            await self.more.wait()


@contextlib.asynccontextmanager
async def endpoint(network: Network) -> AsyncIterator[Endpoint]:
    config = EndpointConfig(bootstrap=(network.dht.bootstrap,), host="127.0.0.1")
    ours = await Endpoint.open(config)
    try:
        await ours.ready()
        yield ours
    finally:
        await ours.close()


def client(network: Network, home: Path) -> Process:
    words: list[str | Path] = [npm.PEERS / "client.js", KEYS.public_key.hex()]
    return node("node client", words, home, bootstrap=network.dht.bootstrap)


async def test_a_node_client_that_is_refused_knows_at_once(
    network: Network, tmp_path: Path
) -> None:
    async with endpoint(network) as ours:
        await ours.listen(KEYS, lambda _channel: None, allow=frozenset())
        with client(network, tmp_path) as process:
            said = await process.line(r"^error (\S+) after (\d+) ms$", deadline=START)
            assert said[1] == "SERVER_ERROR"
            assert int(said[2]) < AT_ONCE


async def test_a_node_client_ignores_challenges(network: Network, tmp_path: Path) -> None:
    async with endpoint(network) as ours:
        accepted: asyncio.Queue[Channel] = asyncio.Queue()
        await ours.listen(KEYS, accepted.put_nowait)
        with client(network, tmp_path):
            async with asyncio.timeout(START):
                channel = await accepted.get()
                collector = Collector()
                channel.set_protocol(collector)
                channel.write(b"one")
                await collector.until(b"one")
                now = ours.now()
                for kind in (CHALLENGE, ANSWER):
                    channel.stream.send_message(bytes((kind,)) + bytes(32), now)
                channel.stream.send_aside(
                    bytes((CHALLENGE,)) + bytes(32), channel.stream.socket, channel.stream.address
                )
                ours.wake()
                await asyncio.sleep(0.2)
                channel.write(b"two")
                await collector.until(b"onetwo")
            assert not channel.is_closing()
