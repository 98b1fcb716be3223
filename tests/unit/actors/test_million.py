"""A million actors later, memory is where it was."""

from __future__ import annotations

import gc
import logging
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from hyperseaport.actors.actor import Actor, ActorAddress, Exited, ExitReason, handles
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.testing.clock import run_virtual

BATCH = 1000
MILLION = 1_000_000
RESIDENT_SLACK = 4 << 20
"""Bytes: 4 an actor. The smallest thing kept of each, a dict entry, would be dozens."""


@pytest.fixture(autouse=True)
def _without_debug_log() -> Iterator[None]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
    yield
    structlog.reset_defaults()


class Shortlived(Actor):
    def on_start(self, _args: object) -> None:
        self.own(bytes)

    def on_exit(self, _reason: ExitReason) -> None:
        pass


class Maker(Actor):
    """Starts a batch of actors, kills each when it has started, and replies when all are gone."""

    @handles(int)
    def _on_batch(self, count: int, sender: ActorAddress) -> None:
        self.left, self.customer = count, sender
        self.batch = [self.spawn(Shortlived) for _ in range(count)]
        self.send(self.myAddress, "all started")

    @handles(str)
    def _on_started(self, _message: str, _sender: ActorAddress) -> None:
        for child in self.batch:
            self.kill_child(child)
        self.batch.clear()

    @handles(Exited)
    def _on_exited(self, _message: Exited, _sender: ActorAddress) -> None:
        self.left -= 1
        if not self.left:
            self.send(self.customer, "all gone")


async def make(runtime: ActorRuntime, maker: ActorAddress, count: int) -> None:
    for _ in range(count // BATCH):
        assert await runtime.call(maker, BATCH) == "all gone"
    assert runtime.actor_count == 1
    gc.collect()


def resident() -> int:
    """Bytes of memory in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_python_allocates_nothing_lasting() -> None:
    async def program() -> int:
        async with ActorRuntime() as runtime:
            maker = runtime.spawn(Maker)
            await make(runtime, maker, 2 * BATCH)
            tracemalloc.start()
            try:
                await make(runtime, maker, 2 * BATCH)
                before, _ = tracemalloc.get_traced_memory()
                await make(runtime, maker, 10 * BATCH)
                after, _ = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            return after - before

    assert run_virtual(program()) < 10 * BATCH  # Less than a byte an actor.


@pytest.mark.timeout(300)
def test_a_million_actors_leave_memory_flat() -> None:
    async def program() -> int:
        async with ActorRuntime() as runtime:
            maker = runtime.spawn(Maker)
            await make(runtime, maker, 20 * BATCH)
            before = resident()
            await make(runtime, maker, MILLION)
            return resident() - before

    assert run_virtual(program()) < RESIDENT_SLACK
