"""What the system keeps of one living actor, and the address by which others know it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, Protocol

from structlog.typing import FilteringBoundLogger
from thespian.actors import Actor, ActorAddress, WakeupMessage

from ..transport.errors import LocalError
from .lifecycle import SHUTDOWN, ActorGone, Down, ExitReason

if TYPE_CHECKING:
    import asyncio

    from .scheduler import Scheduler


class Target(Protocol):
    """What stands behind a living address: an actor, or a call that waits for its reply."""

    def receive(self, message: object, sender: ActorAddress) -> None: ...


class Watcher(Protocol):
    """Who is told, at once, that an actor died."""

    def down(self, address: Address, reason: ExitReason) -> None: ...


class Address(ActorAddress):
    """The name of one incarnation of an actor: a successor under the same path is another.

    It can be hashed and compares by identity. A dead address is a path and an exit reason, and
    nothing else remembers the actor.
    """

    __slots__ = ("_aaddr", "reason", "target")

    def __init__(self, path: str, target: Target | None) -> None:
        self._aaddr = path
        self.target = target
        # Why it died; meaningless while `target` is set.
        self.reason = SHUTDOWN

    @property
    def path(self) -> str:
        """For people: `/root/proxy:5985/pipes/42`."""
        return self._aaddr

    @property
    def alive(self) -> bool:
        return self.target is not None

    def __repr__(self) -> str:
        return f"<{self._aaddr}>"

    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__


class Owned:
    """Something to be closed when its owner dies; see `Actor.own`."""

    __slots__ = ("_cell", "_close")

    def __init__(self, cell: Cell, close: Callable[[], object]) -> None:
        self._cell = cell
        self._close: Callable[[], object] | None = close

    def release(self) -> None:
        """Forget it without closing it: it is somebody else's now, or closed already."""
        self._take()

    def close(self) -> None:
        """Close it now rather than at the owner's death. Does nothing the second time."""
        close = self._take()
        if close is not None:
            close()

    def _take(self) -> Callable[[], object] | None:
        close, self._close = self._close, None
        if self._cell.owned is not None:
            self._cell.owned.pop(self, None)
        return close


class Timer(Owned):
    """A message to oneself that is on its way; see `Actor.after`."""

    __slots__ = ()

    def cancel(self) -> None:
        self.close()


class Waiter:
    """One reply, or one event in an actor's life, that a task waits for."""

    __slots__ = ("future", "gone", "reply")

    def __init__(self, future: asyncio.Future[None]) -> None:
        self.future = future
        self.reply: object = None
        # Not the future's exception: if the task is cancelled, nobody would retrieve it.
        self.gone: ActorGone | None = None

    async def result(self) -> object:
        await self.future
        if self.gone is not None:
            raise self.gone
        return self.reply

    def receive(self, message: object, _sender: ActorAddress) -> None:
        if not self.future.done():
            self.reply = message
            self.future.set_result(None)

    def down(self, address: Address, reason: ExitReason) -> None:
        if not self.future.done():
            self.gone = ActorGone(address, reason)
            self.future.set_result(None)

    def done(self) -> None:
        self.receive(None, Address("", None))

    def watch(self, cell: Cell) -> None:
        if cell.watchers is None:
            cell.watchers = {}
        cell.watchers[self] = None

    def unwatch(self, cell: Cell) -> None:
        if cell.watchers is not None:
            cell.watchers.pop(self, None)


class Cell:
    """One actor in the system: its place in the tree, what it owns, who watches it.

    This is also Thespian's `_myRef`, so its methods in mixed case are Thespian's. What most actors
    never need (children, owned things, watchers) is None until it is used: a process has tens of
    thousands of these.
    """

    __slots__ = (
        "actor",
        "actor_class",
        "address",
        "args",
        "children",
        "context",
        "globalName",
        "log",
        "name",
        "owned",
        "parent",
        "pending",
        "ready",
        "serial",
        "stopping",
        "system",
        "watchers",
        "watching",
    )

    def __init__(
        self,
        system: Scheduler,
        parent: Cell | None,
        name: str,
        actor_class: type[Actor],
        args: object,
        context: Mapping[str, ActorAddress],
    ) -> None:
        self.system = system
        self.parent = parent
        self.name = name
        above = parent.address.path if parent is not None else ""
        self.address: Address = Address(f"{above}/{name}", self)
        self.actor_class = actor_class
        self.args = args
        self.context = context
        # None before the first turn and after death.
        self.actor: Actor | None = None
        self.children: dict[str, Cell] | None = None
        # How many children were ever named by the system.
        self.serial = 0
        # In the order of acquisition.
        self.owned: dict[Owned, None] | None = None
        self.watchers: dict[Watcher, None] | None = None
        # Those that live; a dead one leaves, or who watches many in turn would keep them all.
        self.watching: dict[Address, Cell] | None = None
        # Messages sent to it and not yet delivered.
        self.pending = 0
        self.ready = False
        # Set while it waits for its children's orderly end before its own.
        self.stopping: ExitReason | None = None
        self.log: FilteringBoundLogger | None = None
        self.globalName = ""

    @property
    def alive(self) -> bool:
        return self.address.target is not None

    def receive(self, message: object, sender: ActorAddress) -> None:
        self.system.mail(self, message, sender)

    def down(self, address: Address, reason: ExitReason) -> None:
        self._stop_watching(address)
        self.system.post(self, Down(address, reason), address)

    def own(self, close: Callable[[], object]) -> Owned:
        if not self.alive:
            close()
            self._refuse_after_death("own anything")
        return self._keep(Owned(self, close))

    def after(self, seconds: float, message: object) -> Timer:
        if not self.alive:
            self._refuse_after_death("start a timer")
        timer: Timer

        def fire() -> None:
            timer.release()
            self.system.post(self, message, self.address)

        handle: asyncio.TimerHandle = self.system.loop.call_later(seconds, fire)
        timer = Timer(self, handle.cancel)
        self._keep(timer)
        return timer

    def watch(self, target: Cell) -> None:
        target.watchers = target.watchers or {}
        target.watchers[self] = None
        self.watching = self.watching or {}
        self.watching[target.address] = target

    def unwatch(self, target: Cell) -> None:
        if target.watchers is not None:
            target.watchers.pop(self, None)
        self._stop_watching(target.address)

    def _stop_watching(self, address: Address) -> None:
        if self.watching is not None:
            self.watching.pop(address, None)
            self.watching = self.watching or None

    def _keep(self, owned: Owned) -> Owned:
        if self.owned is None:
            self.owned = {}
        self.owned[owned] = None
        return owned

    def _refuse_after_death(self, what: str) -> NoReturn:
        raise LocalError(f"actor {self.address.path} has exited and can no longer {what}")

    # What Thespian's Actor asks of its reference.

    def createActor(  # noqa: N802
        self,
        actor_class: type[Actor] | str,
        requirements: Mapping[str, object] | None,
        global_name: str | None,
        source_hash: str | None,
    ) -> ActorAddress:
        return self.system.create(self, actor_class, requirements, global_name, source_hash)

    def actor_send(self, address: ActorAddress, message: object) -> None:
        self.system.send(address, message, self.address)

    def wakeupAfter(self, period: timedelta | float, payload: object) -> None:  # noqa: N802
        seconds = period.total_seconds() if isinstance(period, timedelta) else period
        self.after(seconds, WakeupMessage(period, payload))

    def handleDeadLetters(self, address: Address, enable: bool) -> None:  # noqa: N802
        self.system.handle_dead_letters(address, enable)

    def updateCapability(self, name: str, value: object) -> None:  # noqa: N802
        self.system.updateCapability(name, value)

    def actorSystemShutdown(self) -> None:  # noqa: N802
        self.system.shutdown()

    def notifyOnSystemRegistrationChanges(self, _address: object, _enable: bool) -> None:  # noqa: N802
        """There is one system, this one: nothing ever changes."""

    def notifyOnSourceAvailability(self, _address: object, _enable: bool) -> None:  # noqa: N802
        """No sources are ever loaded."""

    def loadActorSource(self, _name: object) -> NoReturn:  # noqa: N802
        raise LocalError("this system runs installed code only: import the actor's class instead")

    unloadActorSource = registerSourceAuthority = loadActorSource  # noqa: N815

    def preRegisterRemoteSystem(self, *_: object) -> NoReturn:  # noqa: N802
        raise LocalError("this system has no remote systems: use a process actor instead")

    deRegisterRemoteSystem = preRegisterRemoteSystem  # noqa: N815
