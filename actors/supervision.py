"""What a supervisor is told and tells: the specs of children and supervisors, and its messages.

The names and what they mean are those of Erlang/OTP; `supervisor` says where it differs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

from msgspec import Struct

from .actor import Actor, ActorAddress, ExitReason, InvalidInput

Strategy = Literal["one_for_one", "one_for_all", "rest_for_one", "simple_one_for_one"]
Restart = Literal["permanent", "transient", "temporary"]
State = Literal["starting", "serving", "stopping", "waiting", "down"]


@dataclass(frozen=True, slots=True)
class GaveUp(ExitReason):
    """A supervisor's children failed too often. The text begins with the child where it began, such
    as `/node/endpoint failed 4 times in 5 s, the last time: OSError: no space left on device`, and
    ends with those above that failed because of it."""


class ChildSpec(Struct, frozen=True):
    """One child, which its supervisor knows by `id`.

    `restart`: permanent always, transient after an abnormal exit, temporary never. `shutdown` is
    the seconds it gets to stop before it is killed; 0 kills at once. `wait_ready` is the seconds
    within which it has to say that it serves, or else it is killed as a failure; None takes it as
    serving from the start.
    """

    id: str
    actor: type[Actor]
    args: object = None
    restart: Restart = "permanent"
    shutdown: float = 5.0
    wait_ready: float | None = None

    def __post_init__(self) -> None:
        if not self.id or "/" in self.id:
            raise InvalidInput(f"a child's id has at least one character and no slash: {self.id!r}")
        if self.restart not in get_args(Restart):
            raise InvalidInput(f"restart is one of {get_args(Restart)}, not {self.restart!r}")


class Backoff(Struct, frozen=True):
    """How long a failed child waits for its restart.

    The first restart is immediate. The n-th after it waits `initial * factor ** (n - 1)` seconds,
    `maximum` at most, of which a random part of up to `jitter` (0 to 1) is taken off. A child that
    ran for `quiet` seconds begins anew.
    """

    initial: float = 0.1
    maximum: float = 10.0
    factor: float = 2.0
    jitter: float = 0.5
    quiet: float = 30.0

    def delay(self, failures: int, rng: random.Random) -> float:
        """Seconds to wait after this many failures (1 or more) without a quiet time between."""
        if failures <= 1:
            return 0.0
        # The exponent is bounded as a float's range is; the maximum is reached long before.
        delay = min(self.initial * self.factor ** min(failures - 2, 64), self.maximum)
        return delay * (1 - self.jitter * rng.random())


class SupervisorSpec(Struct, frozen=True):
    """The children of a supervisor, in the order of their start.

    one_for_one restarts the one that failed, rest_for_one it and those after it, one_for_all all of
    them. simple_one_for_one takes one child as a template for any number, started on demand.
    More than `intensity` restarts within `period` seconds make the supervisor stop its children and
    exit. `rng` decides the jitter. `limit` bounds the children of simple_one_for_one.
    """

    strategy: Strategy
    children: tuple[ChildSpec, ...]
    intensity: int = 3
    period: float = 5.0
    backoff: Backoff = Backoff()
    rng: random.Random | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise InvalidInput(f"strategy is one of {get_args(Strategy)}, not {self.strategy!r}")
        if self.strategy == "simple_one_for_one" and len(self.children) != 1:
            raise InvalidInput("simple_one_for_one takes exactly one child, the template")
        if len({child.id for child in self.children}) < len(self.children):
            raise InvalidInput("two children have the same id: give each its own")
        if self.intensity < 0 or self.period <= 0:
            raise InvalidInput("intensity is 0 or more, and period more than 0 seconds")


class StartChild(Struct, frozen=True):
    """Start another child of a simple_one_for_one supervisor, by default with the template's args
    and the next number as its id. Answer: `ChildStarted`, when it serves, or `ChildRefused`."""

    args: object = None
    id: str | None = None


class ChildStarted(Struct, frozen=True):
    address: ActorAddress
    id: str


class ChildRefused(Struct, frozen=True):
    reason: str
    #: As in `StartChild`: what they hold is the starter's again.
    args: object = None


class TerminateChild(Struct, frozen=True):
    """Stop a child, which is not restarted unless its siblings' failure restarts it with them.
    Answer: `ChildTerminated`, when it is gone, or `ChildRefused`."""

    id: str


class ChildTerminated(Struct, frozen=True):
    id: str


class WhichChildren(Struct, frozen=True):
    """Answer: `Children`, with at most `limit` children of a simple_one_for_one supervisor, which
    may have very many."""

    limit: int | None = None


class ChildStatus(Struct, frozen=True):
    """How a child is, and its address, which is None while it is waiting or down."""

    id: str
    actor: type[Actor]
    address: ActorAddress | None
    #: starting until it serves; stopping when it was asked to; waiting for its restart or for its
    #: elders; down when nothing will start it but a restart of its group.
    state: State
    #: Seconds since its start, or since its end while it is waiting or down; 0 before its start.
    since: float
    #: Starts after the first, whoever's failure it was. A supervisor that was itself restarted
    #: counts anew, as OTP's do; its own restart is in what its supervisor says of it.
    restarts: int
    #: Of its last exit that was a failure; empty when there was none.
    last_reason: str
    #: Seconds until its restart, while it is waiting and that is known.
    restarts_in: float | None

    @property
    def ready(self) -> bool:
        return self.state == "serving"


class Children(Struct, frozen=True):
    """Children in the order of their start, and how their supervisor is, as in `ChildStatus`."""

    children: tuple[ChildStatus, ...]
    #: How many there are beyond those.
    more: int
    strategy: Strategy
    state: State
    since: float
