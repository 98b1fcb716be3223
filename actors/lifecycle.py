"""How actors live and die: exit reasons, the messages about them, and the errors of a call."""

from __future__ import annotations

from dataclasses import dataclass, field

from thespian.actors import ActorAddress, ActorSystemMessage

from ..transport.errors import HyperseaportError, LocalError


@dataclass(frozen=True, slots=True)
class ExitReason:
    """Why an actor died. `text` is one line; `normal` says that nothing went wrong."""

    text: str
    normal: bool = False

    def __str__(self) -> str:
        return self.text


NORMAL = ExitReason("normal", normal=True)
"""It had done its work."""

SHUTDOWN = ExitReason("shutdown", normal=True)
"""It was asked to stop, or its parent died."""

KILLED = ExitReason("killed")
"""It was not asked."""


@dataclass(frozen=True, slots=True, init=False)
class Crashed(ExitReason):
    """An exception came out of a handler or of an owned task."""

    exception: BaseException = field(kw_only=True)

    def __init__(self, exception: BaseException) -> None:
        first_line = str(exception).partition("\n")[0]
        name = type(exception).__name__
        object.__setattr__(self, "text", f"{name}: {first_line}" if first_line else name)
        object.__setattr__(self, "normal", False)
        object.__setattr__(self, "exception", exception)

    # The decorator writes a __str__ of its own only for repr; the text of the base is wanted.
    __str__ = ExitReason.__str__


@dataclass(frozen=True, slots=True)
class Exited(ActorSystemMessage):
    """To the parent, once for each child that died, just before Thespian's `ChildActorExited`."""

    child: ActorAddress
    reason: ExitReason


@dataclass(frozen=True, slots=True)
class Down(ActorSystemMessage):
    """To whoever monitors `address`: it is dead."""

    address: ActorAddress
    reason: ExitReason


@dataclass(frozen=True, slots=True)
class Ready(ActorSystemMessage):
    """To the parent: `child` serves."""

    child: ActorAddress


class ActorGone(HyperseaportError):
    """A call whose receiver is dead or died before it replied; `reason` says why it died."""

    def __init__(self, address: ActorAddress, reason: ExitReason) -> None:
        self.address = address
        self.reason = reason
        super().__init__(
            f"actor {address.actorAddressString} is gone ({reason}): ask for its successor"
        )


class CallTimeout(HyperseaportError, TimeoutError):
    """A call that got no reply in time. The receiver lives, and may still act on the message."""

    def __init__(self, address: ActorAddress, timeout: float) -> None:
        self.address = address
        self.timeout = timeout
        super().__init__(
            f"actor {address.actorAddressString} did not reply within {timeout:g} s: "
            "try again or give it longer"
        )


class MailboxOverflow(LocalError):
    """What a receiver dies of when more messages wait for it than its limit allows."""

    def __init__(self, path: str, limit: int) -> None:
        self.path = path
        self.limit = limit
        super().__init__(
            f"more than {limit} messages wait for actor {path}: its senders must wait for replies"
        )
