"""Supervised workers that do as planned and write down what happens to them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from hyperseaport.actors.actor import (
    KILLED,
    Actor,
    ActorAddress,
    ExitReason,
    handles,
)
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.supervisor import (
    Backoff,
    ChildSpec,
    Strategy,
    SupervisorSpec,
)

AT_ONCE = Backoff(initial=0.0)
EXACT = Backoff(jitter=0.0)

Journal = list[Any]


@dataclass(frozen=True)
class Plan:
    """What a worker does, and where it writes that it did."""

    journal: Journal = field(default_factory=list)
    # Seconds after its start: says that it serves; takes to stop; exits by itself.
    ready_after: float | None = None
    stop_after: float = 0.0
    exit_after: float | None = None
    exit_reason: ExitReason = KILLED


class Worker(Actor):
    def on_start(self, args: Plan) -> None:
        self.plan = args
        self.name = self.path.rpartition("/")[2]
        args.journal.append(f"+{self.name}")
        if args.ready_after is not None:
            self.after(args.ready_after, "ready")
        if args.exit_after is not None:
            self.after(args.exit_after, args.exit_reason)

    def on_stop(self, reason: ExitReason) -> None:
        self.after(self.plan.stop_after, reason)

    def on_exit(self, reason: ExitReason) -> None:
        self.plan.journal.append(f"-{self.name}")

    @handles(str)
    def _on_ready(self, _message: str, _sender: ActorAddress) -> None:
        self.ready()

    @handles(ExitReason)
    def _on_end(self, reason: ExitReason, _sender: ActorAddress) -> None:
        self.stop(reason)

    @handles(Exception)
    def _on_crash(self, error: Exception, _sender: ActorAddress) -> None:
        raise error

    @handles(dict)
    def _on_context(self, _message: object, sender: ActorAddress) -> None:
        self.send(sender, dict(self.context))


def supervisor(strategy: Strategy, *children: ChildSpec, **options: Any) -> SupervisorSpec:
    options.setdefault("backoff", AT_ONCE)
    return SupervisorSpec(strategy, children, rng=random.Random(1), **options)


def end(runtime: ActorRuntime, path: str, reason: ExitReason = KILLED) -> None:
    """Let the worker at a path exit by itself."""
    address = runtime.find(path)
    assert address is not None
    runtime.tell(address, reason)
