"""A private network for each pair (DHT, registry), shared by the tests of one module."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from support import npm
from support.network import Network


@pytest.fixture(scope="session", autouse=True)
def _node_peers() -> None:
    """Installs the Node programs before the first test, whose time limit is not for that."""
    npm.node_modules()


@pytest.fixture(scope="module")
def network(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Network]:
    dht, registry = request.param
    network = Network(tmp_path_factory.mktemp(f"dht-{dht}-registry-{registry}"), dht, registry)
    try:
        asyncio.run(network.start())
        yield network
    finally:
        network.close()
