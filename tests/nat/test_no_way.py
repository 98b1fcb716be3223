"""Where no way leads to a service, the user is told why, and soon."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from support.laboratory_cells import Cell, NotOpened, World, exchange

if TYPE_CHECKING:
    from .conftest import Outcomes, Scenario

pytestmark = pytest.mark.timeout(900)

#: Seconds that a proxy tries without being told otherwise, and in which the client knows.
PATIENCE, KNOWN = 10.0, 15.0


async def random_and_ours(world: World) -> tuple[float, str]:
    return await _refused(world, Cell("random", "random"))


async def random_and_node(world: World) -> tuple[float, str]:
    return await _refused(world, Cell("random", "random", service="node"))


async def _refused(world: World, cell: Cell) -> tuple[float, str]:
    """Seconds until the client was refused, and what the proxy said of it."""
    role = await world.service(cell)
    async with world.proxy(cell, role, patience=PATIENCE) as (host, proxy):
        begin = time.monotonic()
        with pytest.raises(NotOpened, match="after"):
            await exchange(host, proxy.port, cell.limit)
        seconds = time.monotonic() - begin
        said = await proxy.process.line("no service reached.*")
        return seconds, said[0]


@pytest.mark.parametrize("scenario", [random_and_ours, random_and_node])
def test_both_random_without_a_relay(scenario: Scenario, outcomes: Outcomes) -> None:
    seconds, said = outcomes.of(scenario)
    assert seconds < KNOWN
    assert "both sides are behind NATs that use another port for every peer" in said
    assert "--relay-through" in said
