"""Real Node programs against ours on a bad network, both ways round.

Ours runs in the test's process, with sockets that lose, delay, duplicate and reorder whatever they
send and receive; everything else is as on a good network.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from support.network import Network
from support.peers import NodeProxy, NodeService
from support.servers import Backend, answering, exchange

import hyperseaport
from hyperseaport.testing.faults import Link
from hyperseaport.testing.lossy import LossySockets

MIB = 1024 * 1024
PAYLOAD = random.Random(4).randbytes(4 * MIB)

#: Seconds for 4 MiB each way, on a busy machine.
PATIENCE = 90.0

LINKS = {
    "one": Link(delay=0.002, loss=0.01, reorder=0.05, reorder_delay=0.004, duplicate=0.01),
    "two": Link(delay=0.002, loss=0.02, reorder=0.1, reorder_delay=0.004, duplicate=0.02),
}

on_a_network_of_node = pytest.mark.parametrize(
    "network", [("node", "node")], indirect=True, scope="module", ids=["node-node"]
)
on_each_link = pytest.mark.parametrize("link", LINKS.values(), ids=LINKS.keys())


@pytest.fixture
def lossy(monkeypatch: pytest.MonkeyPatch, link: Link) -> LossySockets:
    """From now on this process has no other UDP sockets."""
    sockets = LossySockets(link, seed=7)
    monkeypatch.setattr("hyperseaport.transport.dht.endpoint.UdpSocket", sockets)
    return sockets


@on_a_network_of_node
@on_each_link
async def test_our_proxy_to_a_node_service(
    network: Network, link: Link, lossy: LossySockets, tmp_path: Path
) -> None:
    backend = Backend()
    bootstrap, key = network.dht.bootstrap, network.registry.key
    role = f"lossy-{tmp_path.name}"
    service = NodeService(tmp_path, bootstrap, key, port=backend.port, role=f"{role}@1.2.3")
    try:
        await service.ready()
        async with (
            backend.serving(),
            hyperseaport.Proxy(f"{role}@1.x", registry=key, bootstrap=[bootstrap]) as proxy,
        ):
            await answering(proxy.port)
            async with asyncio.timeout(PATIENCE):
                await exchange(proxy.port, PAYLOAD, b"still in step")
        assert not backend.errors
    finally:
        service.close()
        backend.close()
    assert_lossy(lossy)


@on_a_network_of_node
@on_each_link
async def test_a_node_proxy_to_our_service(
    network: Network, link: Link, lossy: LossySockets, tmp_path: Path
) -> None:
    backend = Backend()
    bootstrap, key = network.dht.bootstrap, network.registry.key
    role = f"lossy-{tmp_path.name}"
    async with hyperseaport.Service(
        f"{role}@1.2.3", registry=key, port=backend.port, bootstrap=[bootstrap]
    ) as service:
        await service.registered()
        proxy = NodeProxy(tmp_path, bootstrap, key, role=f"{role}@1.x")
        try:
            await proxy.ready()
            async with backend.serving():
                await answering(proxy.port)
                async with asyncio.timeout(PATIENCE):
                    await exchange(proxy.port, PAYLOAD, b"still in step")
            assert not backend.errors
        finally:
            proxy.close()
            backend.close()
    assert_lossy(lossy)


def assert_lossy(lossy: LossySockets) -> None:
    """The bytes went through the faults, in both directions."""
    for way in ("outgoing", "incoming"):
        every = [getattr(socket, way).stats for socket in lossy.sockets]
        assert sum(stats.lost for stats in every) > 10
        assert sum(stats.reordered for stats in every) > 10
        assert sum(stats.duplicated for stats in every) > 10
        assert sum(stats.sent_bytes for stats in every) > len(PAYLOAD)
