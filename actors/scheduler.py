"""The mechanism: queues messages, starts actors, lets them die, runs what they own.

Messages wait in one queue for the whole system, in the order in which they were sent: this makes
delivery FIFO for each pair, and a run repeatable. A turn of the loop delivers a bounded number of
them. Deaths that an actor asks for take effect between two messages; others at once. All of it runs
in the loop's thread, so nothing here is locked.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, TypeVar

import structlog
import thespian.actors
from structlog.typing import FilteringBoundLogger
from thespian.actors import (
    ActorAddress,
    ActorExitRequest,
    ChildActorExited,
    DeadEnvelope,
    InvalidActorAddress,
    NoCompatibleSystemForActor,
)
from thespian.system.utilis import actualActorClass, withPossibleInitArgs

from ..transport.errors import HyperseaportError, InvalidInput, LocalError
from .actor import Actor
from .cell import Address, Cell, Waiter
from .lifecycle import (
    KILLED,
    SHUTDOWN,
    ActorGone,
    CallTimeout,
    Crashed,
    Exited,
    ExitReason,
    MailboxOverflow,
    Ready,
)

MESSAGES_PER_TURN = 128
"""Delivered before the loop looks at its sockets again: under a millisecond of most handlers."""

CHILD_SHUTDOWN = 5.0
"""Seconds for a child to stop when its parent, which is not a supervisor, is asked to."""

SYSTEM_SHUTDOWN = 30.0
"""Seconds for each top-level actor to stop in order when the system ends; then it is killed."""

DEFAULT_MAILBOX_LIMIT = Actor.mailbox_limit
"""For actors of other make."""

T = TypeVar("T")

_START = object()


class _StopRequest(ActorExitRequest):
    """A request to stop that says why."""

    def __init__(self, reason: ExitReason) -> None:
        super().__init__()
        self.reason = reason


class Scheduler:
    """Runs actors on `loop`. `AsyncioSystemBase` puts Thespian's names on it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, capabilities: dict[str, object]) -> None:
        self.loop = loop
        self.capabilities = capabilities
        # Living actors, and since the beginning: messages that no handler took, messages that
        # found nobody alive.
        self.actor_count = 0
        self.unhandled = 0
        self.dead_letters = 0
        # Bound once: structlog's proxy would look up its configuration at each actor's death.
        self.log: FilteringBoundLogger = structlog.get_logger().bind()
        self._top: dict[str, Cell] = {}
        # How many top-level actors were ever named by the system.
        self.serial = 0
        # Receiver, message, sender, and whether it counts towards the receiver's limit.
        self._queue: deque[tuple[Cell, object, ActorAddress, bool]] = deque()
        self._exits: deque[tuple[Cell, ExitReason]] = deque()
        # A turn is running, or will be.
        self._scheduled = False
        # A handler, or the last turn of an actor, is on the stack: nobody else may die now.
        self._busy = False
        self._closing = False
        # Cancelled tasks of dead actors, which may still be cleaning up.
        self._lingering: set[asyncio.Task[Any]] = set()
        self._starting: dict[Cell, list[Waiter]] = {}
        self._global_names: dict[str, Cell] = {}
        self._dead_letter_boxes: dict[Address, None] = {}
        # The sender of what comes from no actor.
        self.outside = Address("/outside", None)

    # Who lives.

    def find(self, path: str) -> Address | None:
        """The living actor at a path such as `/root/endpoint`. When there is one top-level actor,
        its name may be left out: `/endpoint`."""
        names = path.removeprefix("/").split("/")
        if len(self._top) == 1 and names[0] not in self._top:
            names = [*self._top, *names]
        level, cell = self._top, None
        for name in names:
            cell = level.get(name)
            if cell is None:
                return None
            level = cell.children or {}
        return cell.address if cell is not None else None

    # Life and death.

    def spawn_below(
        self,
        parent: Cell | None,
        actor_class: type[thespian.actors.Actor],
        args: object,
        name: str | None,
        context: Mapping[str, ActorAddress],
    ) -> Address:
        """Start an actor below `parent`, or at the top. Its first turn comes through the queue."""
        if parent is None:
            if self._closing:
                raise LocalError("the actor system is stopping: start another one")
            siblings = self._top
        else:
            if not parent.alive:
                raise LocalError(f"actor {parent.address.path} has exited: it can have no children")
            if parent.children is None:
                parent.children = {}
            siblings = parent.children
        if name is None:
            name = self._number(parent, siblings)
        elif not name or "/" in name:
            raise InvalidInput(f"an actor's name has at least one character and no slash: {name!r}")
        elif name in siblings:
            raise LocalError(f"actor {siblings[name].address.path} is alive: use another name")
        cell = siblings[name] = Cell(self, parent, name, actor_class, args, context)
        self.actor_count += 1
        self.post(cell, _START, self.outside)
        if parent is not None and parent.stopping is not None:
            self.stop_cell(cell, CHILD_SHUTDOWN)
        return cell.address

    def create(
        self,
        parent: Cell | None,
        actor_class: type[thespian.actors.Actor] | str,
        requirements: Mapping[str, object] | None,
        global_name: str | None,
        source_hash: str | None,
    ) -> ActorAddress:
        if source_hash is not None:
            raise LocalError("this system runs installed code only: give the actor's class instead")
        if global_name and global_name in self._global_names:
            return self._global_names[global_name].address
        actor_class = actualActorClass(actor_class)
        check = getattr(actor_class, "actorSystemCapabilityCheck", None)
        if check is not None and not check(self.capabilities, requirements or {}):
            raise NoCompatibleSystemForActor(actor_class, "capabilities are missing")
        context = parent.context if parent is not None else {}
        address = self.spawn_below(parent, actor_class, requirements, None, context)
        cell = self._cell(address)
        if global_name and cell is not None:
            cell.globalName = global_name
            self._global_names[global_name] = cell
        return address

    def shutdown(self) -> None:
        """Ask all actors to stop, the youngest first. Does not wait for them."""
        for cell in reversed(self._top.values()):
            self.stop_cell(cell, SYSTEM_SHUTDOWN)

    def exit_soon(self, cell: Cell, reason: ExitReason) -> None:
        """Let an actor die before the next message is delivered."""
        self._exits.append((cell, reason))
        self._schedule()

    def terminate(self, cell: Cell, reason: ExitReason) -> None:
        """Let an actor and all below it die: at once, or when the running handler is done."""
        if self._busy:
            self.exit_soon(cell, reason)
        elif cell.alive:
            self._busy = True
            try:
                self._terminate(cell, reason)
            finally:
                self._busy = False

    def ask_to_stop(self, cell: Cell, reason: ExitReason) -> None:
        self.post(cell, _StopRequest(reason), self.outside)

    def stop_cell(self, cell: Cell, timeout: float) -> None:
        """Ask an actor to stop, and kill it if it lives `timeout` seconds later."""
        if timeout <= 0:
            self.exit_soon(cell, KILLED)
            return
        self.ask_to_stop(cell, SHUTDOWN)
        # Owned by the one that is to stop, so that its death cancels the timer.
        cell.own(self.loop.call_later(timeout, self.terminate, cell, KILLED).cancel)

    def stop_after_children(self, cell: Cell, reason: ExitReason) -> None:
        if not cell.children:
            self.exit_soon(cell, reason)
        elif cell.stopping is None:
            cell.stopping = reason
            for child in reversed(cell.children.values()):
                self.stop_cell(child, CHILD_SHUTDOWN)

    def mark_ready(self, cell: Cell) -> None:
        if cell.ready or not cell.alive:
            return
        cell.ready = True
        if cell.parent is not None:
            self.post(cell.parent, Ready(cell.address), cell.address)
        for waiter in self._starting.pop(cell, ()):
            waiter.done()

    def monitor(self, watcher: Cell, address: ActorAddress) -> None:
        cell = self._cell(address)
        if cell is not None:
            watcher.watch(cell)
        else:
            watcher.down(self._own_address(address), self._own_address(address).reason)

    def demonitor(self, watcher: Cell, address: ActorAddress) -> None:
        cell = self._cell(address)
        if cell is not None:
            watcher.unwatch(cell)

    def _terminate(self, cell: Cell, reason: ExitReason) -> None:
        # Not recursive: a tree may be deeper than Python's stack.
        doomed, reached = [], [cell]
        while reached:
            each = reached.pop()
            doomed.append(each)
            if each.children:
                reached.extend(reversed(each.children.values()))
        reason_below = KILLED if reason == KILLED else SHUTDOWN
        for each in doomed:
            each.address.reason = reason if each is cell else reason_below
            each.address.target = None
        # Backwards, this is every actor after all below it and after its younger siblings.
        for each in reversed(doomed):
            self._bury(each)

    def _bury(self, cell: Cell) -> None:
        address, actor, owned = cell.address, cell.actor, cell.owned
        reason = address.reason
        self._log_exit(address, reason)
        if isinstance(actor, Actor):
            self._guard("actor.on_exit.failed", address, partial(actor.on_exit, reason))
        cell.actor = cell.owned = None
        while owned:
            self._guard("actor.close.failed", address, owned.popitem()[0].close)
        self._forget(cell)
        watchers, cell.watchers = cell.watchers, None
        for watcher in watchers or ():
            watcher.down(address, reason)
        parent = cell.parent
        if parent is None or not parent.alive:
            return
        self.post(parent, Exited(address, reason), address)
        self.post(parent, ChildActorExited(address), address)
        if parent.stopping is not None and not parent.children:
            self.exit_soon(parent, parent.stopping)

    def _forget(self, cell: Cell) -> None:
        """Remove what leads to a dead actor."""
        self.actor_count -= 1
        siblings = self._top if cell.parent is None else cell.parent.children
        if siblings is not None:
            del siblings[cell.name]
        for watched in (cell.watching or {}).values():
            if watched.watchers is not None:
                watched.watchers.pop(cell, None)
        cell.watching = None
        cell.children = None
        if self._dead_letter_boxes:
            self._dead_letter_boxes.pop(cell.address, None)
        if self._starting:
            self._starting.pop(cell, None)
        if cell.globalName:
            del self._global_names[cell.globalName]

    def _log_exit(self, address: Address, reason: ExitReason) -> None:
        if not isinstance(reason, Crashed):
            self.log.debug("actor.exited", actor=address.path, reason=reason.text)
            return
        exception = reason.exception
        if isinstance(exception, HyperseaportError):
            # Of the world or of the caller: its text says what there is to say.
            self.log.info("actor.failed", actor=address.path, error=reason.text)
        else:
            self.log.error(
                "actor.crashed", actor=address.path, error=reason.text, exc_info=exception
            )
        # Whoever keeps the reason shall not keep the frames, and with them the dead actor.
        _drop_tracebacks(exception)

    def _guard(self, event: str, address: Address, last_act: Callable[[], object]) -> None:
        """Let nothing that a dying actor does keep the rest of it from being closed."""
        try:
            last_act()
        except Exception as error:
            self.log.error(event, actor=address.path, error=str(Crashed(error)), exc_info=error)

    def _number(self, parent: Cell | None, siblings: Mapping[str, Cell]) -> str:
        """The next number that is nobody's name."""
        counter = parent if parent is not None else self
        while True:
            name = str(counter.serial)
            counter.serial += 1
            if name not in siblings:
                return name

    # Messages.

    def send(self, address: ActorAddress, message: object, sender: ActorAddress) -> None:
        """Send a message; to a dead address it is a dead letter.

        Raises InvalidActorAddress: the address is of another system.
        """
        target = self._own_address(address).target
        if target is not None:
            target.receive(message, sender)
        else:
            self._dead_letter(address, message)

    def handle_dead_letters(self, address: Address, enable: bool) -> None:
        if enable:
            self._dead_letter_boxes[address] = None
        else:
            self._dead_letter_boxes.pop(address, None)

    def mail(self, cell: Cell, message: object, sender: ActorAddress) -> None:
        """Queue a message that somebody sent; one too many kills the receiver."""
        limit = getattr(cell.actor_class, "mailbox_limit", DEFAULT_MAILBOX_LIMIT)
        if cell.pending > limit:
            # It is about to die of the one before.
            self._dead_letter(cell.address, message)
            return
        cell.pending += 1
        if cell.pending > limit:
            self.exit_soon(cell, Crashed(MailboxOverflow(cell.address.path, limit)))
            return
        self._queue.append((cell, message, sender, True))
        self._schedule()

    def post(self, cell: Cell, message: object, sender: ActorAddress) -> None:
        """Queue a message of the system's own."""
        self._queue.append((cell, message, sender, False))
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._turn)

    def _turn(self) -> None:
        queue = self._queue
        try:
            self._settle()
            for _ in range(MESSAGES_PER_TURN):
                if not queue:
                    break
                cell, message, sender, counted = queue.popleft()
                if counted:
                    cell.pending -= 1
                if cell.alive:
                    self._deliver(cell, message, sender)
                elif counted:
                    self._dead_letter(cell.address, message)
                if self._exits:
                    self._settle()
        finally:
            # Also when an interrupt passes through: the runtime still has to stop in order.
            self._scheduled = False
            if queue or self._exits:
                self._schedule()

    def _settle(self) -> None:
        while self._exits:
            self.terminate(*self._exits.popleft())

    def _deliver(self, cell: Cell, message: object, sender: ActorAddress) -> None:
        self._busy = True
        try:
            if message is _START:
                self._start(cell)
            elif isinstance(message, ActorExitRequest):
                self._request_stop(cell, message, sender)
            elif cell.actor is not None:
                cell.actor.receiveMessage(message, sender)
        except (Exception, asyncio.CancelledError) as error:
            self._terminate(cell, Crashed(error))
        finally:
            self._busy = False

    def _start(self, cell: Cell) -> None:
        actor_class, args = cell.actor_class, cell.args
        # The parent keeps what a restart needs.
        cell.args = None
        if issubclass(actor_class, Actor):
            actor = cell.actor = actor_class()
            actor._myRef = cell
            actor.on_start(args)
            return
        cell.actor = withPossibleInitArgs(capabilities=self.capabilities, requirements=args).create(
            actor_class
        )
        cell.actor._myRef = cell

    def _request_stop(self, cell: Cell, request: ActorExitRequest, sender: ActorAddress) -> None:
        reason = request.reason if isinstance(request, _StopRequest) else SHUTDOWN
        if isinstance(cell.actor, Actor):
            cell.actor.on_stop(reason)
        elif cell.actor is not None:
            cell.actor.receiveMessage(request, sender)
            self.stop_after_children(cell, reason)

    def updateCapability(self, name: str, value: object) -> None:  # noqa: N802
        if value is None:
            self.capabilities.pop(name, None)
        else:
            self.capabilities[name] = value

    def _dead_letter(self, address: ActorAddress, message: object) -> None:
        self.dead_letters += 1
        if isinstance(message, DeadEnvelope):
            return
        for box in self._dead_letter_boxes:
            self.send(box, DeadEnvelope(address, message), self.outside)

    def _own_address(self, address: ActorAddress) -> Address:
        if not isinstance(address, Address):
            raise InvalidActorAddress(address, "not an address of this actor system")
        return address

    def _cell(self, address: ActorAddress) -> Cell | None:
        """The living actor at an address."""
        target = self._own_address(address).target
        return target if isinstance(target, Cell) else None

    # Tasks and calls.

    def run(
        self,
        cell: Cell,
        coroutine: Coroutine[Any, Any, T],
        then: Callable[[T], object] | None,
    ) -> asyncio.Task[T]:
        """See `Actor.run`."""
        if not cell.alive:
            coroutine.close()
            raise LocalError(f"actor {cell.address.path} has exited: it can start no task")
        task = self.loop.create_task(coroutine, name=cell.address.path)
        owned = cell.own(partial(self._cancel, task))

        def finish(task: asyncio.Task[T]) -> None:
            owned.release()
            self._lingering.discard(task)
            if task.cancelled():
                return
            error = task.exception()
            if error is not None:
                self._fail(cell, error)
            elif then is not None and cell.alive:
                self._deliver_result(cell, then, task.result())

        task.add_done_callback(finish)
        return task

    async def call(
        self, address: ActorAddress, message: object, timeout: float | None, caller: str
    ) -> Any:
        """See `Actor.call`."""
        cell = self._cell(address)
        if cell is None:
            raise ActorGone(address, self._own_address(address).reason)
        waiter = Waiter(self.loop.create_future())
        reply_to = Address(f"{caller}?", waiter)
        waiter.watch(cell)
        cell.receive(message, reply_to)
        try:
            async with asyncio.timeout(timeout):
                return await waiter.result()
        except TimeoutError:
            # The one above, as nothing else raises in there.
            raise CallTimeout(address, timeout or 0.0) from None
        finally:
            reply_to.target = None
            waiter.unwatch(cell)

    def _cancel(self, task: asyncio.Task[Any]) -> None:
        if not task.done():
            self._lingering.add(task)
            task.cancel()

    def _fail(self, cell: Cell, error: BaseException) -> None:
        if cell.alive:
            self.terminate(cell, Crashed(error))
            return
        path, text = cell.address.path, str(Crashed(error))
        self.log.warning("task.failed_after_exit", actor=path, error=text, exc_info=error)

    def _deliver_result(self, cell: Cell, then: Callable[[T], object], result: T) -> None:
        try:
            message = then(result)
        except Exception as error:
            self._fail(cell, error)
        else:
            self.post(cell, message, cell.address)


def _drop_tracebacks(exception: BaseException) -> None:
    """Of an exception and of all that led to it."""
    left, seen = [exception], set()
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        each.__traceback__ = None
        left += [cause for cause in (each.__cause__, each.__context__) if cause is not None]
