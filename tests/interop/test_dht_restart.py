"""A DHT of ours that dies and comes back on the same ports is usable again.

It has forgotten who announced what. For its first 9 s a node leaves pings without an id
unanswered, so that those who believe they are announced do it again (spec: hyperdht 4.1).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.peers import KINDS, PROXIES, REGISTRIES, SERVICES, START, Kind, OurDHT, Peer, seed
from support.ports import free_port
from support.servers import Backend, answering, exchange

#: Seconds after the DHT serves again in which everything must be reachable for newcomers.
BACK = 15.0

#: Seconds after which a newcomer is replaced by another: a Node program that found nobody at its
#: first attempt does not try again soon.
ATTEMPT = 4.0

COMBINATIONS = list(itertools.product(KINDS, repeat=2))


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    """What is added here is killed at the test's end, newest first."""
    peers: list[Peer] = []
    yield peers
    for peer in reversed(peers):
        peer.close()


def folder(home: Path, name: str) -> Path:
    place = home / name
    place.mkdir()
    return place


def ports_in_a_row(count: int) -> int:
    """The first of so many free ports: the nodes of a DHT take those that follow its ``--port``."""
    while True:
        ports = [free_port() for _ in range(count)]
        if ports[-1] - ports[0] == count - 1:
            return ports[0]


async def arrives(kind: Kind, home: Path, bootstrap: str, key: str, peers: list[Peer]) -> bool:
    """Whether a proxy that starts now comes through to the service, by way of the registry."""
    place = folder(home, f"newcomer-{len(peers)}"), bootstrap, key
    proxy = PROXIES[kind](*place, role="restart@1.x")
    peers.append(proxy)
    try:
        async with asyncio.timeout(ATTEMPT):
            await proxy.ready()
            await answering(proxy.port)
    except TimeoutError:
        proxy.close()
        return False
    return True


@pytest.mark.parametrize(
    ("announced", "newcomer"), COMBINATIONS, ids=["-".join(kinds) for kinds in COMBINATIONS]
)
async def test_who_was_announced_is_found_again(
    announced: Kind, newcomer: Kind, tmp_path: Path, peers: list[Peer]
) -> None:
    """A registry and a service live through the restart; a proxy that starts afterwards finds
    both. What is announced is of one kind, and the newcomer of either."""
    port = ports_in_a_row(4)
    dht = OurDHT(folder(tmp_path, "dht"), port=port)
    peers.append(dht)
    await dht.ready()
    registry = REGISTRIES[announced](
        folder(tmp_path, "registry"), dht.bootstrap, seed=seed("restart")
    )
    peers.append(registry)
    await registry.ready()
    backend = Backend()
    try:
        place = folder(tmp_path, "service"), dht.bootstrap, registry.key
        service = SERVICES[announced](*place, port=backend.port, role="restart@1.2.3")
        peers.append(service)
        await service.ready()
        async with backend.serving():
            place = folder(tmp_path, "before"), dht.bootstrap, registry.key
            before = PROXIES[newcomer](*place, role="restart@1.x")
            peers.append(before)
            await before.ready()
            await answering(before.port, deadline=START)

            dht.close()
            again = OurDHT(folder(tmp_path, "dht-again"), port=port)
            peers.append(again)
            await again.ready()
            assert again.bootstrap == dht.bootstrap

            async with asyncio.timeout(BACK):
                while not await arrives(newcomer, tmp_path, dht.bootstrap, registry.key, peers):
                    pass
            # Connections that need no DHT were never in danger, and new ones come through as well.
            await answering(before.port, deadline=START)
            await exchange(before.port, b"before")
        assert not backend.errors
    finally:
        backend.close()
    for peer in (registry, service, before):
        assert peer.process.returncode is None, f"{peer.process.name} has ended"
