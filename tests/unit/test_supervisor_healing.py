"""Faults at random, from which a tree has to heal."""

from __future__ import annotations

import asyncio
import random

import pytest
from support.supervised import Plan, Worker, supervisor

from hyperseaport.actors.system import ActorRuntime
from hyperseaport.supervisor import (
    Backoff,
    ChildSpec,
    Strategy,
    Supervisor,
    SupervisorSpec,
    WhichChildren,
)
from hyperseaport.testing.clock import run_virtual


def random_tree(rng: random.Random, depth: int) -> tuple[SupervisorSpec, dict[str, int]]:
    """A supervisor of permanent children, and the paths of all supervisors, with their number of
    children. Its own path is empty."""
    children: list[ChildSpec] = []
    sizes: dict[str, int] = {}
    for name in "abc"[: rng.randint(1, 3)]:
        wait_ready = rng.choice([None, 20.0])
        if depth and rng.random() < 0.6:
            nested, below = random_tree(rng, depth - 1)
            children.append(ChildSpec(name, Supervisor, nested, wait_ready=wait_ready))
            sizes |= {f"/{name}{path}": size for path, size in below.items()}
        else:
            plan = Plan(ready_after=rng.uniform(0, 2), stop_after=rng.uniform(0, 2))
            children.append(ChildSpec(name, Worker, plan, wait_ready=wait_ready))
    sizes[""] = len(children)
    strategies: list[Strategy] = ["one_for_one", "rest_for_one", "one_for_all"]
    backoff = Backoff(maximum=2.0)
    return supervisor(rng.choice(strategies), *children, intensity=1000, backoff=backoff), sizes


def hurt_somebody(runtime: ActorRuntime, rng: random.Random) -> None:
    """Kill, or ask to stop, anybody but the root."""
    victims = [path for path in runtime.tree() if path != "/root"]
    victim = runtime.find(rng.choice(victims)) if victims else None
    if victim is None:
        return
    if rng.random() < 0.5:
        runtime.kill(victim)
    else:
        runtime.stop(victim, timeout=rng.uniform(0, 3))


@pytest.mark.parametrize("seed", range(30))
def test_a_tree_heals_whatever_is_killed_whenever(seed: int) -> None:
    rng = random.Random(seed)
    spec, sizes = random_tree(rng, depth=3)

    async def program() -> None:
        async with ActorRuntime() as runtime:
            root = runtime.spawn(Supervisor, spec, name="root")
            for _ in range(30):
                hurt_somebody(runtime, rng)
                # Also in the middle of a restart, and before the first turn.
                await asyncio.sleep(rng.choice([0, 0, 0.01, 0.3, 2]))
            await asyncio.sleep(300)
            await runtime.ready(root)
            assert runtime.actor_count == sum(sizes.values()) + 1
            for path, size in sizes.items():
                address = runtime.find(f"/root{path}")
                assert address is not None
                children = (await runtime.call(address, WhichChildren())).children
                assert [child.id for child in children] == list("abc")[:size]
                assert all(child.ready for child in children)
                assert [child.address for child in children] == [
                    runtime.find(f"/root{path}/{child.id}") for child in children
                ]
        assert runtime.actor_count == 0

    run_virtual(program())
