"""Each kind of actor of the four programs, hurt in each way: what goes on, what restarts, what
stays behind. What was seen is `docs/fault-matrix.md`."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import structlog
from support.faults import Counts, World, ours, resident
from support.faults_cells import (
    FAULTS,
    FIRST,
    KINDS,
    TRANSFERS,
    Cell,
    Outcomes,
    document,
    rows,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "fault-matrix.md"
#: Objects of this program's classes that may be more after all faults than before: what nodes know
#: of a network in which others have come and gone.
OBJECTS = 2000
#: Bytes that the process may have grown by: as much as allocators keep of what was freed.
RESIDENT = 48 << 20

ALL = [(program, kind) for program, kinds in KINDS.items() for kind in kinds]


class Theatre:
    """One world for all tests on one event loop, and a new one after a failure."""

    def __init__(self, home: Path) -> None:
        self.outcomes: Outcomes = {}
        self._home = home
        self._worlds = 0
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self._world: World | None = None
        self._baseline = Counts(0, 0, 0)

    async def _open(self) -> World:
        if self._world is None:
            self._worlds += 1
            self._world = World()
            await self._world.boot(self._stack, self._home / str(self._worlds), relay=True)
            # What is loaded with the first connections.
            await self._world.open(TRANSFERS, FIRST)
            await self._world.finish()
            await self._world.healed()
            self._baseline = self._world.counts()
            self.objects, self.resident = ours(), resident()
        return self._world

    def test(self, name: str, kind: str) -> None:
        self._runner.run(self._test(name, kind))

    async def _test(self, name: str, kind: str) -> None:
        world = await self._open()
        try:
            (program,) = (each for each in world.programs if each.name == name)
            for fault in FAULTS:
                self.outcomes[name, kind, fault] = await Cell(world, program, kind, fault).run()
            await world.finish()
            await world.healed()
            await world.baseline(self._baseline)
        except BaseException:
            await self._close()
            raise

    async def _close(self) -> None:
        self._world = None
        stack, self._stack = self._stack, AsyncExitStack()
        await stack.aclose()

    def close(self) -> None:
        self._runner.run(self._close())
        self._runner.close()


@pytest.fixture(scope="module")
def theatre(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Theatre]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    theatre = Theatre(tmp_path_factory.mktemp("faults"))
    try:
        yield theatre
    finally:
        theatre.close()
        structlog.reset_defaults()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("program", "kind"), ALL, ids=[f"{p}:{k}" for p, k in ALL])
def test_an_actor_is_hurt(theatre: Theatre, program: str, kind: str) -> None:
    theatre.test(program, kind)
    if not os.environ.get("WRITE_SNAPSHOT"):
        seen = rows(kind, {fault: theatre.outcomes[program, kind, fault] for fault in FAULTS})
        section = DOCUMENT.read_text().split(f"## {program.capitalize()}\n")[1].split("\n## ")[0]
        written = [line for line in section.splitlines() if line.startswith(f"| `{kind}` |")]
        assert seen == written


def test_memory_is_where_it_was(theatre: Theatre) -> None:
    """After all those faults and the restarts that they brought."""
    assert theatre.outcomes, "run it after the others"
    more = ours() - theatre.objects
    assert more.total() < OBJECTS, more.most_common(10)
    assert resident() - theatre.resident < RESIDENT


def test_the_document_is_what_was_seen(theatre: Theatre) -> None:
    assert set(theatre.outcomes) == {(*each, fault) for each in ALL for fault in FAULTS}
    text = document(theatre.outcomes)
    if os.environ.get("WRITE_SNAPSHOT"):
        DOCUMENT.write_text(text)
    assert text == DOCUMENT.read_text()
