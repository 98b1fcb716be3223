"""Punching over real sockets on the loopback interface: what the shell does for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from hyperseaport.transport.channel import Channel
from hyperseaport.transport.dht import endpoint as endpoint_module
from hyperseaport.transport.dht.endpoint import Endpoint, EndpointConfig
from hyperseaport.transport.errors import LocalError
from hyperseaport.transport.keys import KeyPair

HOST = "127.0.0.1"
KEYS = KeyPair.from_seed(bytes([5]) * 32)


@asynccontextmanager
async def network(count: int = 4) -> AsyncIterator[tuple[str, ...]]:
    """The bootstrap text of a network of permanent nodes."""
    nodes: list[Endpoint] = []
    bootstrap: tuple[str, ...] = ()
    try:
        for _ in range(count):
            config = EndpointConfig(bootstrap=bootstrap, host=HOST, permanent=True)
            nodes.append(await Endpoint.open(config))
            bootstrap = bootstrap or (f"{HOST}:{nodes[0].address[1]}",)
        for node in nodes:
            await node.ready()
        yield bootstrap
    finally:
        for node in nodes:
            node.kill()


async def firewalled(bootstrap: tuple[str, ...]) -> Endpoint:
    """A peer that does not know that its sockets can be reached."""
    peer = await Endpoint.open(EndpointConfig(bootstrap=bootstrap, host=HOST))
    await peer.ready()
    peer.core.node.firewalled = True
    return peer


async def test_a_connection_is_punched() -> None:
    async with network() as bootstrap:
        server, client = await firewalled(bootstrap), await firewalled(bootstrap)
        for peer in (server, client):
            # Peers that know to be on one machine need not punch.
            peer.core._context.local_hosts = ()
        accepted: asyncio.Queue[Channel] = asyncio.Queue()
        await server.listen(KEYS, accepted.put_nowait)
        channel = await asyncio.wait_for(client.connect(KEYS.public_key), 10)
        await asyncio.wait_for(accepted.get(), 10)
        assert client.metrics()["punch.opened"] == 1
        assert server.metrics()["punch.sent"] >= 1
        assert client.metrics()["punch.under_way"] == 0
        channel.abort()
        for peer in (client, server):
            peer.kill()


async def test_sockets_are_opened_and_closed_as_the_core_wants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endpoint = await Endpoint.open(EndpointConfig(bootstrap=(), host=HOST, permanent=True))
    sockets = endpoint.core.punches.sockets
    wanted = [sockets.open() for _ in range(3)]
    assert None not in wanted
    for which in wanted:
        endpoint.core.punches.send(which or 0, endpoint.address, 0, endpoint.now())
    endpoint.wake()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert sorted(endpoint._sockets) == [0, 1, *wanted]
    assert endpoint.metrics()["punch.sockets"] == 3
    ports = {udp.address[1] for udp in endpoint._sockets.values()}
    assert len(ports) == 5
    for _ in range(100):
        if endpoint.metrics()["punch.received"] == 3:
            break
        await asyncio.sleep(0.01)
    assert endpoint.metrics()["punch.received"] == 3
    sockets.close(wanted[0] or 0)
    endpoint.wake()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert sorted(endpoint._sockets) == [0, 1, *wanted[1:]]

    def exhausted(*_args: object) -> None:
        raise LocalError("no descriptors are left")

    monkeypatch.setattr(endpoint_module, "UdpSocket", exhausted)
    failing = sockets.open()
    assert failing is not None
    endpoint.wake()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not sockets.usable(failing)
    assert failing not in endpoint._sockets
    endpoint.kill()
    assert not endpoint._sockets
