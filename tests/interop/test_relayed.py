"""Ours at a blind relay of Node's, with Node's and with our own at the other end.

On one machine everybody reaches everybody, so ours are kept from finding that out.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.blind_relays import RELAYS, RelayedProxy, RelayedService
from support.peers import DHTS, KINDS, Kind, Peer
from support.servers import DIGEST, Backend, exchange
from support.waiting import until

from hyperseaport.transport.channel import Channel
from hyperseaport.transport.dht.approach import Approach
from hyperseaport.transport.dht.endpoint import Endpoint, EndpointConfig
from hyperseaport.transport.dht.node import Node
from hyperseaport.transport.dht.server_punch import ServerPunch
from hyperseaport.transport.keys import KeyPair

#: Seconds for a few bytes, and for megabytes, on a busy machine.
SOON, LATER = 15.0, 30.0
PAYLOAD = random.Random(1).randbytes(4 * 1024 * 1024)


@pytest.fixture(autouse=True)
def _nothing_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Node, "remote_address", lambda _self: None)
    monkeypatch.setattr(Approach, "start", lambda *_arguments: None)
    monkeypatch.setattr(ServerPunch, "receive", lambda *_arguments: True)


@dataclass(slots=True)
class Place:
    """A private DHT with a relay."""

    home: Path
    bootstrap: str
    relay: bytes
    stack: contextlib.AsyncExitStack

    async def start(self, peer: Peer) -> None:
        self.stack.callback(peer.close)
        await peer.ready()

    def folder(self, name: str) -> Path:
        (self.home / name).mkdir()
        return self.home / name

    async def endpoint(self) -> Endpoint:
        endpoint = await Endpoint.open(EndpointConfig(bootstrap=(self.bootstrap,)))
        self.stack.push_async_callback(endpoint.close)
        await endpoint.ready()
        return endpoint


@contextlib.asynccontextmanager
async def place(home: Path, relay: Kind = "node") -> AsyncIterator[Place]:
    async with contextlib.AsyncExitStack() as stack:
        it = Place(home, "", b"", stack)
        network = DHTS["ours"](it.folder("dht"))
        await it.start(network)
        it.bootstrap = network.bootstrap
        middle = RELAYS[relay](it.folder("relay"), it.bootstrap)
        await it.start(middle)
        it.relay = bytes.fromhex(middle.key)
        yield it


class Join(asyncio.Protocol):
    """A channel in front of a TCP port."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._early: list[bytes] = []
        self._plain: asyncio.StreamWriter | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._task = asyncio.create_task(self._run(transport))  # type: ignore[arg-type]

    async def _run(self, channel: asyncio.Transport) -> None:
        reader, self._plain = await asyncio.open_connection("127.0.0.1", self._port)
        self._plain.writelines(self._early)
        while data := await reader.read(65_536):
            channel.write(data)
        channel.write_eof()

    def data_received(self, data: bytes) -> None:
        if self._plain is None:
            self._early.append(data)
        else:
            self._plain.write(data)

    def eof_received(self) -> bool:
        assert self._plain is not None
        self._plain.write_eof()
        return True

    def connection_lost(self, _error: Exception | None) -> None:
        assert self._plain is not None
        self._plain.close()


async def there_and_back(channel: Channel) -> None:
    """As `exchange` of `support.servers`, on a channel."""
    reader = asyncio.StreamReader()
    channel.set_protocol(asyncio.StreamReaderProtocol(reader))
    channel.write(b"F" + len(PAYLOAD).to_bytes(8, "big") + PAYLOAD)
    async with asyncio.timeout(LATER):
        answer = await reader.readexactly(DIGEST + 8 + len(PAYLOAD))
    assert answer[:DIGEST] == hashlib.sha256(PAYLOAD).digest()
    assert answer[DIGEST + 8 :] == PAYLOAD
    channel.close()


@pytest.mark.parametrize("relay", KINDS)
async def test_a_node_proxy_meets_our_service(tmp_path: Path, relay: Kind) -> None:
    async with place(tmp_path, relay) as it:
        backend = Backend()
        it.stack.callback(backend.close)
        endpoint = await it.endpoint()
        accepted: list[Channel] = []

        def accept(channel: Channel) -> None:
            accepted.append(channel)
            channel.set_protocol(Join(backend.port))

        listener = await endpoint.listen(
            KeyPair.generate(), accept, allow_relays=frozenset([it.relay])
        )
        key = listener.public_key.hex()
        proxy = RelayedProxy(it.folder("proxy"), it.bootstrap, key, relay=it.relay.hex())
        await it.start(proxy)
        async with backend.serving(), asyncio.timeout(LATER):
            await exchange(proxy.port, PAYLOAD, b"", b"still in step")
        assert [channel.relayed for channel in accepted] == [True]
        assert endpoint.metrics()["relayed.opened"] == 1
        await _all_over(endpoint)


@pytest.mark.parametrize("named_by", ["service", "proxy"])
async def test_our_proxy_meets_a_node_service(tmp_path: Path, named_by: str) -> None:
    async with place(tmp_path) as it:
        backend = Backend()
        it.stack.callback(backend.close)
        named = it.relay.hex() if named_by == "service" else "none"
        service = RelayedService(it.folder("service"), it.bootstrap, port=backend.port, relay=named)
        await it.start(service)
        endpoint = await it.endpoint()
        key = bytes.fromhex(service.key)
        through = (it.relay,) if named_by == "proxy" else ()
        async with backend.serving():
            for _ in range(2):
                async with asyncio.timeout(SOON):
                    channel = await endpoint.connect(key, relay_through=through)
                assert channel.relayed
                await there_and_back(channel)
            # One connection to the relay served both.
            assert endpoint.metrics()["relayed.relays"] == 1
            await _all_over(endpoint)


@pytest.mark.parametrize("named_by", ["both", "service", "proxy"])
async def test_ours_meet(tmp_path: Path, named_by: str) -> None:
    async with place(tmp_path) as it:
        backend = Backend()
        it.stack.callback(backend.close)
        service, client = await it.endpoint(), await it.endpoint()
        through = (it.relay,)
        listener = await service.listen(
            KeyPair.generate(),
            lambda channel: channel.set_protocol(Join(backend.port)),
            relay_through=() if named_by == "proxy" else through,
            allow_relays=None if named_by == "proxy" else frozenset(),
        )
        async with backend.serving():
            async with asyncio.timeout(SOON):
                channel = await client.connect(
                    listener.public_key,
                    relay_through=() if named_by == "service" else through,
                )
            assert channel.relayed
            await there_and_back(channel)
            for endpoint in (service, client):
                await _all_over(endpoint)


async def _all_over(endpoint: Endpoint) -> None:
    async def over() -> bool:
        return not endpoint.metrics()["relayed.pairs"]

    await until(over, "no pair is left", deadline=SOON)
