"""The real Node programs and ours in every pairing of the four roles.

Ids read DHT-registry-service-proxy; `node-node-node-node` proves the tests themselves.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from support.network import Network
from support.peers import KINDS, Kind
from support.servers import exchange, half_close

MIB = 1024 * 1024

NETWORKS = list(itertools.product(KINDS, repeat=2))
PAIRS = list(itertools.product(KINDS, repeat=2))


def ids(kinds: tuple[Kind, Kind]) -> str:
    return "-".join(kinds)


def in_every_pairing(test: Callable[..., Any]) -> Callable[..., Any]:
    pairs = pytest.mark.parametrize("pair", PAIRS, ids=ids)
    networks = pytest.mark.parametrize("network", NETWORKS, indirect=True, scope="module", ids=ids)
    both: Callable[..., Any] = pairs(networks(test))
    return both


@in_every_pairing
async def test_half_close(network: Network, pair: tuple[Kind, Kind]) -> None:
    """The client's EOF reaches the server, and the answer to it still comes back.

    Small, because a Node end drops what is queued once its own TCP socket has closed.
    """
    async with network.chain(*pair) as chain:
        await half_close(chain.proxy.port, random.Random(1).randbytes(3000))
        await half_close(chain.proxy.port, b"")


@in_every_pairing
async def test_sixteen_mebibytes_each_way(network: Network, pair: tuple[Kind, Kind]) -> None:
    payload = random.Random(2).randbytes(16 * MIB)
    async with network.chain(*pair) as chain:
        await exchange(chain.proxy.port, payload, b"", b"still in step")


@in_every_pairing
async def test_thirty_connections_at_once(network: Network, pair: tuple[Kind, Kind]) -> None:
    rng = random.Random(3)
    payloads = [rng.randbytes(64 * 1024 + index) for index in range(30)]
    async with network.chain(*pair) as chain, asyncio.TaskGroup() as clients:
        for payload in payloads:
            clients.create_task(exchange(chain.proxy.port, payload, payload[:100]))


@pytest.mark.parametrize("network", NETWORKS, indirect=True, scope="module", ids=ids)
async def test_node_proxy_that_replicates_the_registry(network: Network) -> None:
    """Without ``--skipReaderRegistry`` a Node proxy waits for a swarm peer that has the
    registry's log, and connects only then (spec: registry 6.7).
    """
    async with network.chain("node", "node"):
        proxy = await network.proxy("node", "node-files@1.x", reader_registry=True)
        await exchange(proxy.port, b"found without the flag")
