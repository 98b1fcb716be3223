"""A Thespian system base that runs actors on one asyncio event loop.

`ActorRuntime` is the way in: an async context in which actors live. Thespian's own `ActorSystem`
is there too, as `runtime.system`; what of it would block the loop refuses, and says what to await.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, NoReturn, Self

import thespian.actors
from thespian.actors import ActorAddress, ActorSystem

from ..transport.errors import LocalError
from .cell import Address, Cell, Waiter
from .lifecycle import KILLED, ActorGone, ExitReason
from .scheduler import CHILD_SHUTDOWN, SYSTEM_SHUTDOWN, Scheduler

TASK_SHUTDOWN = 5.0
"""Seconds for the cancelled tasks of dead actors to finish when the runtime ends."""


class AsyncioSystemBase(Scheduler):
    """What Thespian's `ActorSystem` and actors expect of a system base, under Thespian's names."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.system = ActorSystem(systemBase=self, transientUnique=True)
        super().__init__(loop, self.system.capabilities)

    def newPrimaryActor(  # noqa: N802
        self,
        actor_class: type[thespian.actors.Actor] | str,
        requirements: Mapping[str, object] | None,
        global_name: str | None,
        source_hash: str | None = None,
    ) -> ActorAddress:
        return self.create(None, actor_class, requirements, global_name, source_hash)

    def tell(self, address: ActorAddress, message: object) -> None:
        self.send(address, message, self.outside)

    def ask(self, _address: ActorAddress, _message: object, _timeout: object) -> NoReturn:
        raise LocalError(
            "ask() would block the event loop that has to answer it: "
            "use `await runtime.call(address, message, timeout)`"
        )

    def listen(self, _timeout: object) -> NoReturn:
        raise LocalError(
            "listen() would block the event loop that runs the actors: "
            "use `await runtime.call(address, message, timeout)`"
        )

    def external_clone(self) -> NoReturn:
        raise LocalError("this system belongs to one thread: use `runtime.call` in its event loop")

    def loadActorSource(self, _name: object) -> NoReturn:  # noqa: N802
        raise LocalError("this system runs installed code only: import the actor's class instead")

    unloadActorSource = loadActorSource  # noqa: N815


class ActorRuntime(AsyncioSystemBase):
    """The actors of a program, as an async context on the running loop.

    Leaving it stops all of them in order: the youngest top-level actor first, each given
    `shutdown` seconds and then killed; then it waits for what their tasks still clean up.

        async with ActorRuntime() as runtime:
            root = runtime.spawn(Supervisor, spec, name="root")
            await runtime.ready(root)

    Thespian's own face of it is `runtime.system`.
    """

    def __init__(self, shutdown: float = SYSTEM_SHUTDOWN) -> None:
        super().__init__(asyncio.get_running_loop())
        self._shutdown_time = shutdown

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._closing = True
        try:
            while self._top:
                youngest = next(reversed(self._top.values()))
                self.stop_cell(youngest, self._shutdown_time)
                await self.stopped(youngest.address)
        finally:
            for cell in list(reversed(self._top.values())):
                self.terminate(cell, KILLED)
        if self._lingering:
            _, stuck = await asyncio.wait(self._lingering, timeout=TASK_SHUTDOWN)
            for task in stuck:
                self.log.warning("task.stuck", actor=task.get_name())

    def spawn(
        self,
        actor_class: type[thespian.actors.Actor],
        args: object = None,
        name: str | None = None,
        context: Mapping[str, ActorAddress] | None = None,
    ) -> Address:
        """Start a top-level actor.

        Raises LocalError: a living top-level actor has that name, or the runtime is stopping.
        Raises InvalidInput: the name is empty or has a slash in it.
        """
        return self.spawn_below(None, actor_class, args, name, context or {})

    async def call(
        self,
        address: ActorAddress,
        message: object,
        timeout: float | None = None,
        caller: str = "/outside",
    ) -> Any:
        """Send a message and return the reply. Errors as for `Actor.call`."""
        return await super().call(address, message, timeout, caller)

    def stop(self, address: ActorAddress, timeout: float = CHILD_SHUTDOWN) -> None:
        """Ask an actor to stop, and kill it after `timeout` seconds; `stopped` waits for it."""
        cell = self._cell(address)
        if cell is not None:
            self.stop_cell(cell, timeout)

    def kill(
        self,
        whom: ActorAddress | str,
        reason: ExitReason | str = KILLED,
        *,
        missing_ok: bool = False,
    ) -> None:
        """Let an actor, by path or address, and all below it die without asking (for fault
        injection): at once, or if a handler is running, as soon as it returns.

        Raises LocalError: no living actor has that path, unless `missing_ok`.
        """
        address = self.find(whom) if isinstance(whom, str) else whom
        if isinstance(reason, str):
            reason = KILLED if reason == KILLED.text else ExitReason(reason)
        cell = None if address is None else self._cell(address)
        if cell is not None:
            self.terminate(cell, reason)
        elif isinstance(whom, str) and not missing_ok:
            raise LocalError(f"no actor lives at {whom}: see `tree` for those that do")

    def tree(self) -> list[str]:
        """The paths of all living actors: parents first, then the elder first."""
        return [cell.address.path for cell in self._walk()]

    async def stopped(self, address: ActorAddress) -> ExitReason:
        """Wait until an actor is dead; why it died."""
        cell = self._cell(address)
        if cell is not None:
            waiter = Waiter(self.loop.create_future())
            waiter.watch(cell)
            try:
                await waiter.future
            finally:
                waiter.unwatch(cell)
        return self._own_address(address).reason

    async def ready(self, address: ActorAddress) -> None:
        """Wait until an actor has said that it serves.

        Raises ActorGone: it is dead, or dies before.
        """
        cell = self._cell(address)
        if cell is None:
            raise ActorGone(address, self._own_address(address).reason)
        if cell.ready:
            return
        waiter = Waiter(self.loop.create_future())
        waiter.watch(cell)
        self._starting.setdefault(cell, []).append(waiter)
        try:
            await waiter.result()
        finally:
            waiter.unwatch(cell)

    def _walk(self) -> Iterator[Cell]:
        reached = list(reversed(self._top.values()))
        while reached:
            cell = reached.pop()
            yield cell
            if cell.children:
                reached.extend(reversed(cell.children.values()))
