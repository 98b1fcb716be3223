"""One laboratory for the whole run, in which all scenarios run at once, a few at a time.

A scenario mostly waits: for round trips, and for what never comes. So all that the selected tests
ask for run side by side before the first test, and each test then looks at its own outcome.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import npm
from support.laboratory import missing
from support.laboratory_cells import Cell, World

#: Scenarios at once: what two cores carry without being late.
AT_ONCE = 8

Scenario = Cell | Callable[[World], Awaitable[Any]]


@dataclass(slots=True)
class Outcomes:
    """What came of each scenario: what it returned, or raised."""

    found: dict[Scenario, Any]

    def of(self, scenario: Scenario) -> Any:
        outcome = self.found[scenario]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--nat-all", action="store_true", help="every cell of the NAT matrix (7 minutes)"
    )


@pytest.fixture(scope="session", autouse=True)
def _permitted() -> None:
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    npm.node_modules()
    params = (getattr(item, "callspec", None) for item in request.session.items)
    scenarios = [each.params["scenario"] for each in params if each and "scenario" in each.params]
    return Outcomes(asyncio.run(_run(dict.fromkeys(scenarios), tmp_path_factory.mktemp("nat"))))


async def _run(scenarios: Iterable[Scenario], home: Path) -> dict[Scenario, Any]:
    turns = asyncio.Semaphore(AT_ONCE)

    async def outcome(scenario: Scenario) -> Any:
        async with turns:
            try:
                if isinstance(scenario, Cell):
                    return await world.measure(scenario)
                return await scenario(world)
            except Exception as error:
                return error

    async with World(home) as world:
        results = await asyncio.gather(*map(outcome, scenarios))
    return dict(zip(scenarios, results, strict=True))
