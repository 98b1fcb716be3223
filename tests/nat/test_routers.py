"""What routers do to connections and services that are there already."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest
from support.laboratory import Kind
from support.laboratory_cells import Cell, NotOpened, World, connected, exchange

if TYPE_CHECKING:
    from .conftest import Outcomes, Scenario

pytestmark = pytest.mark.timeout(900)

#: Seconds in which a mapping is forgotten, for routers of the impatient kind; and a pause that is
#: longer. Peers say something every 5 s (spec: hyperdht 6).
SHORT, PAUSE = 8, 13.0
PATIENCE = 5.0
#: Seconds for a few bytes on a connection that is open.
SOON = 3.0
#: Seconds until a service whose mappings are gone is reachable: it asks its relays every 3 s (spec:
#: hyperdht 4.1). And what one attempt is given.
FOUND_AGAIN = 20.0


async def idle_proxy(world: World) -> None:
    await _idle(world, Cell("open", "consistent"))


async def idle_service(world: World) -> None:
    await _idle(world, Cell("consistent", "open"))


async def _idle(world: World, cell: Cell) -> None:
    homes = [world.laboratory.site(kind) for kind in (cell.service_site, cell.proxy_site)]
    for home in homes:
        home.mapping_timeout(SHORT)
    role = await world.service(cell, site=homes[0])
    async with (
        world.proxy(cell, role, site=homes[1]) as (host, proxy),
        connected(host, proxy.port, cell.limit) as (connection, _),
    ):
        await asyncio.sleep(PAUSE)
        async with asyncio.timeout(SOON):
            await connection.send(b"still there?")


async def reboot_of_consistent(world: World) -> float:
    return await _reboot(world, "consistent")


async def reboot_of_random(world: World) -> float:
    return await _reboot(world, "random")


async def _reboot(world: World, kind: Kind) -> float:
    """Seconds from the reboot of the service's router to the next connection."""
    home = world.laboratory.site(kind)
    cell = Cell(kind, "open")
    role = await world.service(cell, site=home)
    async with world.proxy(cell, role) as (host, proxy):
        await exchange(host, proxy.port, cell.limit)
        home.reboot()
        begin = time.monotonic()
        while True:
            try:
                await exchange(host, proxy.port, PATIENCE)
                return time.monotonic() - begin
            except NotOpened:
                if time.monotonic() - begin > FOUND_AGAIN:
                    raise


@pytest.mark.parametrize("scenario", [idle_proxy, idle_service])
def test_an_idle_connection_outlives_short_mappings(scenario: Scenario, outcomes: Outcomes) -> None:
    outcomes.of(scenario)


@pytest.mark.parametrize("scenario", [reboot_of_consistent, reboot_of_random])
def test_a_service_is_reached_after_a_reboot_of_its_router(
    scenario: Scenario, outcomes: Outcomes
) -> None:
    assert outcomes.of(scenario) < FOUND_AGAIN
