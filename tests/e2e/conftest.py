"""One private network of our own for each module, and a stage on which a test starts the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.stage import Network, Stage


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """A DHT and a registry of ours."""
    network = Network(tmp_path_factory.mktemp("network"))
    try:
        asyncio.run(network.start())
        yield network
    finally:
        network.close()


@pytest.fixture
def stage(network: Network, tmp_path: Path) -> Iterator[Stage]:
    """Where a test starts its services, proxies and servers; all are killed at its end."""
    stage = Stage(network, tmp_path)
    try:
        yield stage
    finally:
        stage.close()
