"""Ten thousand connections that end in every way: nothing of them is left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import structlog
from support.faults_endings import Endings

from hyperseaport.actors import endpoint
from hyperseaport.transport.dht import server
from hyperseaport.transport.udx import time_wait

#: Connections in all, and those of them after which it is counted what is there: by then all is
#: made that is made once, and allocators have seen the busiest moment.
CONNECTIONS = 10_000
WARM_UP = 1_000
#: Seconds for which nodes remember what is over, so that late packets find an answer: on a loopback
#: none is as late as the 10 to 15 s that are meant for the world. All is forgotten after twice that
#: time at the latest, which is also what an actor has for taking over its channel.
MEMORY = 2.5
FORGOTTEN = 2 * MEMORY + 1.0
#: How often it is looked whether all is gone, once a second.
LOOKS = 15
#: Objects of this program's classes, and blocks of memory, that there may be more than before: what
#: nodes have learned of each other by then, and what is under way in that moment. One object that
#: one way to end left behind each time would be more than 800, a block of each connection 9000.
OBJECTS = 100
BLOCKS = 3000
#: Bytes that the process may have grown by: holes between what lives, which were 5 MiB. A leak of
#: small things is seen above; this is for buffers, of which each connection has one of more than
#: two kilobytes.
RESIDENT = 16 << 20


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    monkeypatch.setattr(time_wait, "TIME_WAIT", MEMORY)
    monkeypatch.setattr(server, "HANDSHAKE_MEMORY", MEMORY)
    monkeypatch.setattr(endpoint, "HANDOVER", 2 * MEMORY)
    yield
    structlog.reset_defaults()


@pytest.mark.timeout(500)
async def test_nothing_is_left(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        endings = Endings()
        await endings.boot(stack, tmp_path / "world")
        await endings.run(WARM_UP)
        await asyncio.sleep(FORGOTTEN)
        left, before = await endings.left(), endings.footprint()
        await endings.run(CONNECTIONS - WARM_UP)
        for _ in range(LOOKS):
            now, grown = await endings.left(), endings.footprint().since(before)
            if now == left and grown.objects <= OBJECTS and grown.blocks <= BLOCKS:
                break
            await asyncio.sleep(1.0)
        assert now == left
        assert grown.objects <= OBJECTS
        assert grown.blocks <= BLOCKS
        assert grown.resident <= RESIDENT
