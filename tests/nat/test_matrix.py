"""Who reaches whom: services and proxies, ours and Node's, behind every kind of NAT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
from support.laboratory import Kind
from support.laboratory_cells import Cell, NotOpened
from support.peers import Kind as Program

if TYPE_CHECKING:
    from .conftest import Outcomes

#: Starting everything and waiting for all scenarios is part of the first test.
pytestmark = pytest.mark.timeout(900)


def _pairs(sites: Sequence[Kind]) -> list[tuple[Kind, Kind]]:
    return [(service, proxy) for service in sites for proxy in sites]


SITES: tuple[Kind, ...] = ("open", "consistent", "random", "cgnat", "lan", "udp-blocked")
PAIRS: tuple[tuple[Program, Program], ...] = (("ours", "ours"), ("ours", "node"), ("node", "ours"))
#: Both at one site.
HOMES: list[tuple[Kind, Kind]] = [("lan", "lan"), ("lan-hairpin", "lan-hairpin")]
#: What runs without --nat-all, of ours, and of ours with Node's.
OURS: list[tuple[Kind, Kind]] = [
    *_pairs(SITES[:4]),
    *HOMES,
    ("open", "udp-blocked"),
    ("udp-blocked", "open"),
]
MIXED: list[tuple[Kind, Kind]] = [
    *_pairs(SITES[:3]),
    *HOMES,
    ("cgnat", "cgnat"),
]
#: Slower is broken: the first connection takes five round trips of 40 ms, and one more to punch.
#: Not so where the port of a random NAT is searched for.
SLOW = 3000.0


def cells(every: bool) -> list[Cell]:
    found = []
    for service, proxy in PAIRS:
        sites = OURS if service == proxy else MIXED
        if every:
            sites = [*_pairs(SITES), *HOMES[1:]]
        found += [Cell(*each, service, proxy) for each in sites]
    return found


def shortfall(cell: Cell) -> str | None:
    """Why the two cannot meet, or None if they must."""
    if "udp-blocked" in cell.sites:
        return "where UDP is dropped there is no DHT, and nothing else to reach a registry by"
    if cell.sites == {"random"}:
        return "two random NATs meet at a blind relay only, and these programs name none"
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    params = []
    for cell in cells(metafunc.config.getoption("nat_all", False)):
        marks = []
        if reason := shortfall(cell):
            marks = [pytest.mark.xfail(strict=True, raises=NotOpened, reason=reason)]
        params.append(pytest.param(cell, id=cell.name, marks=marks))
    metafunc.parametrize("scenario", params)


def test_bytes_go_both_ways(scenario: Cell, outcomes: Outcomes) -> None:
    times = outcomes.of(scenario)
    assert times.next < SLOW
    assert times.first < SLOW or scenario.alone
