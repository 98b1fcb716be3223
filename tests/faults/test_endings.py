"""Ten thousand connections that end in every way: nothing of them is left."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import structlog
from support import endpoint
from support.faults import Memory, channels, ours, resident
from support.faults_endings import BATCH, Endings

#: Connections in all. Most of them meet in memory, which leaves out nothing of the actors and of
#: TCP; those over real nodes show the same of channels.
REAL = 1000
IN_MEMORY = 9000
#: Objects of this program's classes, and bytes, that may be more than before: what a DHT node has
#: learned, what the allocator keeps. One object of each connection would be more.
OBJECTS = 500
RESIDENT = 24 << 20


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    monkeypatch.setattr(endpoint, "channel_pair", channels)
    yield
    structlog.reset_defaults()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("count", "memory"), [(REAL, None), (IN_MEMORY, Memory)])
async def test_nothing_is_left(tmp_path: Path, count: int, memory: type[Memory] | None) -> None:
    async with AsyncExitStack() as stack:
        endings = Endings()
        await endings.boot(stack, tmp_path / "world", memory() if memory else None)
        world = endings.world
        # Each ending once, for all that is made at the first time.
        for end in endings.all.values():
            await end(BATCH)
        await world.healed()
        counts, objects, bytes_before = world.counts(), ours(), resident()
        each = count // len(endings.all)
        for end in endings.all.values():
            for start in range(0, each, BATCH):
                await end(min(BATCH, each - start))
                for program in world.programs:
                    program.runtime.journal.clear()
        await world.healed()
        await world.baseline(counts)
        await world.until(lambda: (ours() - objects).total() < OBJECTS, "objects are gone")
        assert resident() - bytes_before < RESIDENT
