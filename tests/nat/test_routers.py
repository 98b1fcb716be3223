"""What routers do to connections and services that are there already."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from typing import TYPE_CHECKING

import pytest
from support.laboratory import Kind
from support.laboratory_cells import Cell, NotOpened, World, connected, exchange, first_exchange

if TYPE_CHECKING:
    from .conftest import Outcomes, Scenario

pytestmark = pytest.mark.timeout(900)

#: Seconds in which a mapping is forgotten, for routers of the impatient kind; and a pause that is
#: longer. Peers say something every 5 s (spec: hyperdht 6).
SHORT, PAUSE = 8, 13.0
PATIENCE = 5.0
#: Idle connections to one peer, and seconds in which that has said something.
MANY = 10
SAID = 7.0
#: Seconds for a few bytes on a connection that is open.
SOON = 3.0
#: Seconds until a service whose mappings are gone is reachable: it asks its relays every 3 s (spec:
#: hyperdht 4.1). And what one attempt is given.
FOUND_AGAIN = 20.0
#: Bytes each way of a transfer whose router reboots half-way, seconds for all of them, and until
#: they flow again: as long as a peer is silent before it is given up (13 s), or it is another one.
IN_FLIGHT = 16 * 1024 * 1024
POURED = 120.0
FLOWS_AGAIN = 5.0
#: A Node program that only receives writes something every 5 s (spec: hyperdht 6).
NODE_FLOWS_AGAIN = 10.0


async def idle_proxy(world: World) -> None:
    await _idle(world, Cell("open", "consistent"))


async def idle_service(world: World) -> None:
    await _idle(world, Cell("consistent", "open"))


async def idle_reboot_of_service(world: World) -> None:
    await _idle_reboot(world, Cell("random", "open"))


async def idle_reboot_of_proxy(world: World) -> None:
    await _idle_reboot(world, Cell("open", "random"))


async def _idle_reboot(world: World, cell: Cell) -> None:
    """Many connections, of which one in turn says something every 5 s."""
    homes = [world.laboratory.site(kind) for kind in (cell.service_site, cell.proxy_site)]
    role = await world.service(cell, site=homes[0])
    async with (
        world.proxy(cell, role, site=homes[1]) as (host, proxy),
        contextlib.AsyncExitStack() as stack,
    ):
        open_ones = [
            (await stack.enter_async_context(connected(host, proxy.port, cell.limit)))[0]
            for _ in range(MANY)
        ]
        next(home for home in homes if home.kind != "open").reboot()
        await asyncio.sleep(SAID)
        async with asyncio.timeout(SOON):
            for connection in open_ones:
                await connection.send(b"still there?")


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


async def in_flight_service_consistent(world: World) -> float:
    return await _in_flight(world, Cell("consistent", "open"))


async def in_flight_service_random(world: World) -> float:
    return await _in_flight(world, Cell("random", "open"))


async def in_flight_proxy_consistent(world: World) -> float:
    return await _in_flight(world, Cell("open", "consistent"))


async def in_flight_proxy_random(world: World) -> float:
    return await _in_flight(world, Cell("open", "random"))


async def in_flight_node_service(world: World) -> float:
    return await _in_flight(world, Cell("random", "open", service="node"))


async def in_flight_node_proxy(world: World) -> float:
    return await _in_flight(world, Cell("open", "random", proxy="node"))


async def in_flight_to_node_service(world: World) -> float:
    return await _in_flight(world, Cell("open", "random", service="node"))


async def _in_flight(world: World, cell: Cell) -> float:
    """Seconds without a byte after the router has rebooted in the middle of a transfer."""
    homes = [world.laboratory.site(kind) for kind in (cell.service_site, cell.proxy_site)]
    hidden = next(home for home in homes if home.kind != "open")
    role = await world.service(cell, site=homes[0])
    came: list[float] = []
    rebooted_at = 0.0

    def arrived(size: int) -> None:
        nonlocal rebooted_at
        came.append(time.monotonic())
        if size >= IN_FLIGHT // 2 and not rebooted_at:
            hidden.reboot()
            rebooted_at = time.monotonic()

    async with world.proxy(cell, role, site=homes[1]) as (host, proxy):
        await first_exchange(host, proxy, cell.limit)
        async with connected(host, proxy.port, cell.limit) as (connection, _):
            async with asyncio.timeout(POURED):
                await connection.pour(IN_FLIGHT, arrived)
    after = [rebooted_at, *(when for when in came if when > rebooted_at)]
    return max(b - a for a, b in itertools.pairwise(after))


@pytest.mark.parametrize("scenario", [idle_reboot_of_service, idle_reboot_of_proxy])
def test_idle_connections_outlive_a_reboot_of_the_router(
    scenario: Scenario, outcomes: Outcomes
) -> None:
    outcomes.of(scenario)


@pytest.mark.parametrize("scenario", [idle_proxy, idle_service])
def test_an_idle_connection_outlives_short_mappings(scenario: Scenario, outcomes: Outcomes) -> None:
    outcomes.of(scenario)


@pytest.mark.parametrize(
    "scenario",
    [
        in_flight_service_consistent,
        in_flight_service_random,
        in_flight_proxy_consistent,
        in_flight_proxy_random,
    ],
)
def test_a_transfer_outlives_a_reboot_of_the_router(scenario: Scenario, outcomes: Outcomes) -> None:
    """16 MiB each way; every byte is compared."""
    assert outcomes.of(scenario) < FLOWS_AGAIN


@pytest.mark.parametrize("scenario", [in_flight_node_service, in_flight_node_proxy])
def test_node_programs_behind_the_router_are_followed(
    scenario: Scenario, outcomes: Outcomes
) -> None:
    assert outcomes.of(scenario) < NODE_FLOWS_AGAIN


@pytest.mark.parametrize("scenario", [in_flight_to_node_service])
def test_whom_node_programs_do_not_follow_sees_a_reset(
    scenario: Scenario, outcomes: Outcomes
) -> None:
    """They go on sending to where we were. The end must not look like one of the service's."""
    with pytest.raises(ConnectionResetError):
        outcomes.of(scenario)


@pytest.mark.parametrize("scenario", [reboot_of_consistent, reboot_of_random])
def test_a_service_is_reached_after_a_reboot_of_its_router(
    scenario: Scenario, outcomes: Outcomes
) -> None:
    assert outcomes.of(scenario) < FOUND_AGAIN
