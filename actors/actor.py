"""The base class of every actor here: typed dispatch, owned things, let it crash."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import structlog
import thespian.actors
from structlog.typing import FilteringBoundLogger
from thespian.actors import ActorAddress, ActorSystemMessage

from ..transport.errors import InvalidInput, LocalError
from .cell import Address, Cell, Owned, Timer
from .lifecycle import (
    KILLED,
    NORMAL,
    SHUTDOWN,
    ActorGone,
    CallTimeout,
    Crashed,
    Down,
    Exited,
    ExitReason,
    MailboxOverflow,
    Ready,
)

if TYPE_CHECKING:
    import asyncio

__all__ = [
    "KILLED",
    "NORMAL",
    "SHUTDOWN",
    "Actor",
    "ActorAddress",
    "ActorGone",
    "Address",
    "CallTimeout",
    "Crashed",
    "Down",
    "ExitReason",
    "Exited",
    "InvalidInput",
    "LocalError",
    "MailboxOverflow",
    "Owned",
    "Ready",
    "Timer",
    "handles",
]

MAILBOX_LIMIT = 65_536
"""Messages that may wait for one actor: some ten megabytes, or half a second of its work. What the
system itself reports (exits, timers, results of owned tasks) is bounded by what the actor started,
and not counted."""

T = TypeVar("T")
H = TypeVar("H", bound=Callable[..., None])


def handles(*message_types: type) -> Callable[[H], H]:
    """Mark a method `(self, message, sender) -> None` as the handler of these message types.

    A type's handler also takes its subclasses, unless they have their own. A subclass of the actor
    inherits handlers, and may override one by its method's name or by its message type.
    """

    def mark(method: H) -> H:
        if inspect.iscoroutinefunction(method):
            raise InvalidInput(f"handler {method.__qualname__} is async: start an owned task in it")
        method._handles = message_types  # type: ignore[attr-defined]
        return method

    return mark


class Actor(thespian.actors.Actor):
    """An actor that lets it crash.

    Handlers run one at a time, never block and never await. The first exception out of a handler
    or an owned task kills the actor: the parent gets `Exited`, and whatever the actor owned is
    closed. Nothing here works in `__init__`, which runs before the actor has its place in the
    tree: use `on_start`.
    """

    mailbox_limit: ClassVar[int] = MAILBOX_LIMIT

    _myRef: Cell  # noqa: N815
    # Message type -> method, and by and by the subclasses of those types that were met.
    _handlers: ClassVar[dict[type, Callable[..., None] | None]] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        names: dict[type, str] = {}
        for base in reversed(cls.__mro__):
            for name, member in vars(base).items():
                for message_type in getattr(member, "_handles", ()):
                    names[message_type] = name
        cls._handlers = {message_type: getattr(cls, name) for message_type, name in names.items()}

    # For subclasses to override.

    def on_start(self, args: Any) -> None:
        """The first turn. `args` is what the parent gave to `spawn`."""

    def on_stop(self, reason: ExitReason) -> None:
        """It was asked to stop. An actor that needs time begins its end here, and then calls
        `stop`; whoever asked kills it when that takes too long. Unless overridden, its children
        are asked first, the youngest first, and it stops when the last of them is gone."""
        self._myRef.system.stop_after_children(self._myRef, reason)

    def on_exit(self, reason: ExitReason) -> None:
        """The last turn, exactly once however it dies, also when `on_start` failed. Children are
        gone by now; what it owns is still open, and is closed right after."""

    # Who it is.

    @property
    def path(self) -> str:
        """Its place in the tree, such as `/root/proxy:5985/pipes/42`."""
        return self._myRef.address.path

    @property
    def context(self) -> Mapping[str, ActorAddress]:
        """Elder siblings and ancestors' elder siblings, by child id, as they were at its start."""
        return self._myRef.context

    @property
    def log(self) -> FilteringBoundLogger:
        """A logger that names this actor."""
        cell = self._myRef
        if cell.log is None:
            cell.log = structlog.get_logger().bind(actor=cell.address.path)
        return cell.log

    @property
    def now(self) -> float:
        """Seconds on the loop's clock."""
        return self._myRef.system.loop.time()

    # What it owns.

    def run(
        self, coroutine: Coroutine[Any, Any, T], then: Callable[[T], object] | None = None
    ) -> asyncio.Task[T]:
        """Start a task that dies with this actor, and whose exception kills it.

        `then(result)` is delivered to this actor as a message, from itself; without `then`, the
        result is dropped. A task that the actor cancels itself ends quietly.

        Raises LocalError: this actor is dead.
        """
        return self._myRef.system.run(self._myRef, coroutine, then)

    def own(self, close: Callable[[], object]) -> Owned:
        """Have `close` called once when this actor dies: last acquired, first closed.

        Raises LocalError: this actor is dead; `close` was called.
        """
        return self._myRef.own(close)

    def after(self, seconds: float, message: object) -> Timer:
        """Send `message` to this actor `seconds` from now, unless it dies before.

        Raises LocalError: this actor is dead.
        """
        return self._myRef.after(seconds, message)

    # Its children.

    def spawn(
        self,
        actor_class: type[thespian.actors.Actor],
        args: object = None,
        name: str | None = None,
        context: Mapping[str, ActorAddress] | None = None,
    ) -> Address:
        """Start a child; a number is its name unless one is given, and this actor's context is its
        context. Its death arrives as `Exited`, and then as Thespian's `ChildActorExited`.

        Raises LocalError: this actor is dead, or a living child has that name.
        Raises InvalidInput: the name is empty or has a slash in it.
        """
        context = self._myRef.context if context is None else context
        return self._myRef.system.spawn_below(self._myRef, actor_class, args, name, context)

    def stop(self, reason: ExitReason = NORMAL) -> None:
        """Die when the handler that runs now is done, before any other message; children that are
        left die first, the youngest first."""
        self._myRef.system.exit_soon(self._myRef, reason)

    def stop_child(self, child: ActorAddress, timeout: float) -> None:
        """Ask a child to stop, and kill it `timeout` seconds later if it still lives. At 0 it is
        killed at once. Either way `Exited` follows."""
        cell = self._child(child)
        if cell is not None:
            cell.system.stop_cell(cell, timeout)

    def kill_child(self, child: ActorAddress, reason: ExitReason = KILLED) -> None:
        """End a child and all below it without asking. `Exited` follows."""
        cell = self._child(child)
        if cell is not None:
            cell.system.exit_soon(cell, reason)

    def ready(self) -> None:
        """Tell the parent that this actor serves. Only the first time says anything."""
        self._myRef.system.mark_ready(self._myRef)

    # Other actors.

    async def call(
        self, address: ActorAddress, message: object, timeout: float | None = None
    ) -> Any:
        """Send `message` and return the reply: what its handler sends to its `sender`. That sender
        is an address for this one reply; a receiver that must know who calls needs to be told in
        the message. For owned tasks; `timeout` is in seconds.

        Raises ActorGone: the receiver is dead, or dies before it replies; at once in both cases.
        Raises CallTimeout: no reply in time.
        """
        return await self._myRef.system.call(address, message, timeout, caller=self.path)

    def monitor(self, address: ActorAddress) -> None:
        """Have a `Down` sent to this actor when `address` dies; at once if it is dead. To monitor
        twice is to monitor once."""
        self._myRef.system.monitor(self._myRef, address)

    def demonitor(self, address: ActorAddress) -> None:
        """Have no `Down` sent after all; one that is on its way still arrives."""
        self._myRef.system.demonitor(self._myRef, address)

    def whereis(self, path: str) -> ActorAddress | None:
        """The actor that lives at a path now; the name of the only top-level actor may be left out.
        For the successor of one that died: whom to work with says the context."""
        return self._myRef.system.find(path)

    # Delivery.

    def receiveMessage(self, message: object, sender: ActorAddress) -> None:  # noqa: N802
        """Call the handler of this type of message. One without a handler is counted and logged,
        unless it comes from the system, which reports to those who care."""
        kind = type(message)
        try:
            handler = self._handlers[kind]
        except KeyError:
            handler = self._inherited_handler(kind)
        if handler is not None:
            handler(self, message, sender)
        elif not isinstance(message, ActorSystemMessage):
            self._myRef.system.unhandled += 1
            self.log.warning("message.unhandled", type=kind.__name__)

    @classmethod
    def _inherited_handler(cls, kind: type) -> Callable[..., None] | None:
        handlers = (cls._handlers.get(base) for base in kind.__mro__)
        handler = next((each for each in handlers if each is not None), None)
        cls._handlers[kind] = handler
        return handler

    def _child(self, address: ActorAddress) -> Cell | None:
        """The living child at `address`; None if it died meanwhile."""
        cell = address.target if isinstance(address, Address) else None
        if not isinstance(cell, Cell):
            return None
        if cell.parent is not self._myRef:
            raise LocalError(f"{cell.address.path} is no child of {self.path}: ask its parent")
        return cell
