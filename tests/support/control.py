"""Small programs that can be looked into through a control socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperseaport.actors.actor import Actor, ActorAddress, Address, handles
from hyperseaport.actors.control import Control, ControlArgs
from hyperseaport.actors.messages import (
    Describe,
    Described,
    Explain,
    Explained,
    Measure,
    Measured,
)
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.supervisor import ChildSpec, Supervisor, SupervisorSpec

from .supervised import Plan, Worker


class Endpoint(Actor):
    """Shows what it is given, and what it has counted."""

    def on_start(self, args: dict[str, Any]) -> None:
        self.fields = args

    @handles(Describe)
    def _describe(self, _message: Describe, sender: ActorAddress) -> None:
        self.send(sender, Described(self.fields))

    @handles(Measure)
    def _measure(self, _message: Measure, sender: ActorAddress) -> None:
        self.send(sender, Measured({"channels": 3}))


class Resolver(Actor):
    def on_start(self, args: dict[str, Any]) -> None:
        self.fields = args

    @handles(Describe)
    def _describe(self, _message: Describe, sender: ActorAddress) -> None:
        self.send(sender, Described({k: v for k, v in self.fields.items() if k != "rows"}))

    @handles(Explain)
    def _explain(self, _message: Explain, sender: ActorAddress) -> None:
        self.send(sender, Explained(self.fields["rows"]))


ROWS = (
    {
        "key": "ab" * 32,
        "role": "couchdb",
        "version": "3.2.2",
        "state": "taken",
        "reason": "newest version",
        "connections": 0,
    },
)


def resolver(role: str, wanted: str | None, rows: Any = ROWS) -> ChildSpec:
    return ChildSpec("resolver", Resolver, {"role": role, "range": wanted, "rows": rows})


def rest(*children: ChildSpec) -> SupervisorSpec:
    return SupervisorSpec("rest_for_one", children)


def proxy_node(*more: ChildSpec) -> SupervisorSpec:
    pool = SupervisorSpec("simple_one_for_one", (ChildSpec("pipe", Worker, Plan()),))
    return rest(
        ChildSpec("endpoint", Endpoint, {"address": "127.0.0.1:49737"}),
        ChildSpec("pipes", Supervisor, pool),
        ChildSpec("proxy:1", Supervisor, rest(resolver("couchdb", "3.x"))),
        *more,
    )


@dataclass
class Program:
    runtime: ActorRuntime
    root: Address


@asynccontextmanager
async def program(
    path: Path, node: SupervisorSpec | None = None, command: str = "proxy", **summary: Any
) -> AsyncIterator[Program]:
    """A program that can be looked into, once it serves."""
    args = ControlArgs(path, command, summary)
    children = [ChildSpec("control", Control, args, wait_ready=5.0)]
    if node is not None:
        children.append(ChildSpec("node", Supervisor, node, wait_ready=5.0))
    async with ActorRuntime() as runtime:
        spec = SupervisorSpec("one_for_one", tuple(children))
        root = runtime.spawn(Supervisor, spec, name="root")
        await runtime.ready(root)
        yield Program(runtime, root)
