"""The Supervisor actor: starts children in order, restarts them by strategy, gives up beyond an
intensity.

Words and meanings are those of Erlang/OTP's supervisor, with these differences:

- Restarts after the first are delayed by a backoff with jitter.
- A child with `wait_ready` counts as started when it says that it serves, not when it exists. Until
  then the children after it wait.
- A child that fails while the supervisor itself starts is an ordinary failure and restarted; OTP
  gives up. On a network, the first attempt is no more telling than the second. But a `LocalError`
  before the child has ever served is the caller's fault, which no restart mends: then the
  supervisor gives up at once, for the child's reason.
- A supervisor that gives up exits abnormally, so that also a parent for which it is transient
  restarts it; and its reason names the child that failed, how often, and why.
- No child is significant: a supervisor whose children have all ended for good lives on.

What is to be done follows from where things stand rather than from what happened: each event notes
what it changes, and calls `_proceed`. That stops what has to be down, the youngest first, and then
starts what has to be up, the eldest first.
"""

from __future__ import annotations

import random
from collections import deque
from itertools import islice

from msgspec import Struct

from .actors.actor import (
    Actor,
    ActorAddress,
    Crashed,
    Exited,
    ExitReason,
    LocalError,
    Ready,
    Timer,
    handles,
)
from .actors.supervision import (
    Backoff,
    ChildRefused,
    Children,
    ChildSpec,
    ChildStarted,
    ChildStatus,
    ChildTerminated,
    GaveUp,
    Restart,
    StartChild,
    State,
    Strategy,
    SupervisorSpec,
    TerminateChild,
    WhichChildren,
)

__all__ = [
    "Backoff",
    "ChildRefused",
    "ChildSpec",
    "ChildStarted",
    "ChildStatus",
    "ChildTerminated",
    "Children",
    "GaveUp",
    "Restart",
    "StartChild",
    "State",
    "Strategy",
    "Supervisor",
    "SupervisorSpec",
    "TerminateChild",
    "WhichChildren",
]


class _Child:
    """Where one child stands."""

    __slots__ = (
        "address",
        "args",
        "done",
        "failures",
        "id",
        "last_reason",
        "position",
        "restart_at",
        "served_once",
        "serving",
        "since",
        "spec",
        "starter",
        "starts",
        "stopping",
        "terminators",
        "timer",
    )

    def __init__(self, spec: ChildSpec, id: str, args: object, position: int) -> None:  # noqa: A002
        self.spec = spec
        self.id = id
        self.args = args
        # In the order of start, from 0.
        self.position = position
        # None while it is down.
        self.address: ActorAddress | None = None
        # When it started last, or ended last.
        self.since = 0.0
        self.starts = 0
        self.last_reason = ""
        self.serving = False
        self.served_once = False
        # It was asked to stop.
        self.stopping = False
        # It is not to be started: it finished, or was terminated.
        self.done = False
        # Those since the last quiet time.
        self.failures = 0
        # While it is up, kills it if it does not get ready; while it is down, restarts it.
        self.timer: Timer | None = None
        # When that is, while it is down.
        self.restart_at = 0.0
        # Who waits for its start, and for its end.
        self.starter: ActorAddress | None = None
        self.terminators: tuple[ActorAddress, ...] = ()

    def cancel_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class _NotReady(Struct, frozen=True):
    """The time of a child's incarnation to get ready is over."""

    child: _Child
    address: ActorAddress


class _RestartDue(Struct, frozen=True):
    child: _Child


class _GateOpens(Struct, frozen=True):
    """At this time, children may be started in order again."""

    when: float


class Supervisor(Actor):
    """An actor whose work is its children; `args` is a `SupervisorSpec`. It is ready when all of
    them are."""

    def on_start(self, args: SupervisorSpec) -> None:
        self._spec = args
        self._rng = args.rng or random.SystemRandom()
        # The last number that became the id of a child.
        self._serial = 0
        self._children: dict[str, _Child] = {}
        self._by_address: dict[ActorAddress, _Child] = {}
        self._started = self.now
        # All children have served at the same time once.
        self._serving = False
        # The times of restarts within the period, and who failed.
        self._restarts: deque[tuple[float, str]] = deque()
        # Why it exits once all children are down.
        self._ending: ExitReason | None = None
        # Children from this position on have to be down before any starts.
        self._doomed_from: int | None = None
        # No child starts in order before this timer's message.
        self._gate: Timer | None = None
        self._gate_opens = 0.0
        self._simple = args.strategy == "simple_one_for_one"
        if self._simple:
            self._serve()
            return
        for position, spec in enumerate(args.children):
            self._children[spec.id] = _Child(spec, spec.id, spec.args, position)
        self._proceed()

    def on_stop(self, reason: ExitReason) -> None:
        self._end(reason)

    @handles(Exited)
    def _on_exited(self, message: Exited, _sender: ActorAddress) -> None:
        child = self._by_address.pop(message.child, None)
        if child is None:
            return
        asked = child.stopping
        uptime = self.now - child.since
        child.since = self.now
        child.address = None
        child.serving = child.stopping = False
        child.cancel_timer()
        if self._ending is not None or asked:
            self._after_stop(child)
        elif self._restarts_after(child.spec, message.reason):
            child.last_reason = message.reason.text
            self._restart(child, uptime, message.reason)
        else:
            self._finish(child, message.reason)
        self._proceed()

    @handles(Ready)
    def _on_ready(self, message: Ready, _sender: ActorAddress) -> None:
        child = self._by_address.get(message.child)
        if child is None or child.serving:
            return
        child.cancel_timer()
        self._serves(child)
        self._proceed()

    @handles(_NotReady)
    def _on_not_ready(self, message: _NotReady, _sender: ActorAddress) -> None:
        child = message.child
        if child.address is not message.address or child.serving or child.stopping:
            return
        child.timer = None
        reason = ExitReason(f"not ready within {child.spec.wait_ready:g} s")
        self.kill_child(message.address, reason)

    @handles(_RestartDue)
    def _on_restart_due(self, message: _RestartDue, _sender: ActorAddress) -> None:
        child = message.child
        if child.timer is None:
            return
        child.timer = None
        if self._simple and self._ending is None:
            self._start(child)
        self._proceed()

    @handles(_GateOpens)
    def _on_gate_opens(self, message: _GateOpens, _sender: ActorAddress) -> None:
        # One that was cancelled may have been on its way already.
        if message.when == self._gate_opens:
            self._gate = None
            self._proceed()

    @handles(StartChild)
    def _on_start_child(self, message: StartChild, sender: ActorAddress) -> None:
        refusal = self._refusal(message)
        if refusal is not None:
            self.send(sender, ChildRefused(refusal, message.args))
            return
        template = self._spec.children[0]
        args = template.args if message.args is None else message.args
        child = _Child(template, message.id or self._next_id(), args, 0)
        child.starter = sender
        self._children[child.id] = child
        self._start(child)

    @handles(TerminateChild)
    def _on_terminate_child(self, message: TerminateChild, sender: ActorAddress) -> None:
        child = self._children.get(message.id)
        if child is None:
            self.send(sender, ChildRefused(f"there is no child {message.id!r}"))
            return
        child.terminators += (sender,)
        child.done = True
        child.cancel_timer()
        if child.address is None:
            self._after_stop(child)
            self._proceed()
        else:
            self._stop(child)

    @handles(WhichChildren)
    def _on_which_children(self, message: WhichChildren, sender: ActorAddress) -> None:
        limit = message.limit if self._simple else None
        shown = tuple(self._status(child) for child in islice(self._children.values(), limit))
        more = len(self._children) - len(shown)
        age = self.now - self._started
        self.send(sender, Children(shown, more, self._spec.strategy, self._own_state(), age))

    def _own_state(self) -> State:
        if self._ending is not None:
            return "stopping"
        return "serving" if self._serving else "starting"

    def _status(self, child: _Child) -> ChildStatus:
        state = self._state(child)
        return ChildStatus(
            id=child.id,
            actor=child.spec.actor,
            address=child.address,
            state=state,
            since=self.now - child.since if child.starts else 0.0,
            restarts=max(child.starts - 1, 0),
            last_reason=child.last_reason,
            restarts_in=self._restarts_in(child) if state == "waiting" else None,
        )

    def _state(self, child: _Child) -> State:
        if child.stopping:
            return "stopping"
        if child.address is not None:
            return "serving" if child.serving else "starting"
        return "down" if child.done or self._ending is not None else "waiting"

    def _restarts_in(self, child: _Child) -> float | None:
        if child.timer is not None:
            return max(child.restart_at - self.now, 0.0)
        if self._gate is not None:
            return max(self._gate_opens - self.now, 0.0)
        return None

    # Failure.

    def _restarts_after(self, spec: ChildSpec, reason: ExitReason) -> bool:
        if spec.restart == "transient":
            return not reason.normal
        return spec.restart == "permanent"

    def _restart(self, child: _Child, uptime: float, reason: ExitReason) -> None:
        """Bring a failed child back, and with it those that the strategy says."""
        if not child.served_once and _is_callers_fault(reason):
            self.log.info("supervisor.gave_up", child=child.id, reason=reason.text)
            self._end(reason)
            return
        backoff = self._spec.backoff
        child.failures = 1 if uptime >= backoff.quiet else child.failures + 1
        if self._beyond_intensity(child):
            self.log.error("supervisor.gave_up", child=child.id, reason=reason.text)
            self._end(self._too_often(child, reason))
            return
        delay = backoff.delay(child.failures, self._rng)
        self.log.warning(
            "child.restarting", child=child.id, reason=reason.text, delay=round(delay, 3)
        )
        if self._in_order:
            self._doom_from(0 if self._spec.strategy == "one_for_all" else child.position)
            self._close_gate(delay)
        elif delay > 0:
            child.timer = self.after(delay, _RestartDue(child))
            child.restart_at = self.now + delay
        elif self._simple:
            self._start(child)

    @property
    def _in_order(self) -> bool:
        """Restarts wait for elder siblings, rather than being each child's own affair."""
        return self._spec.strategy in ("one_for_all", "rest_for_one")

    def _beyond_intensity(self, child: _Child) -> bool:
        """Count a restart."""
        restarts = self._restarts
        restarts.append((self.now, child.id))
        while restarts[0][0] < self.now - self._spec.period:
            restarts.popleft()
        return len(restarts) > self._spec.intensity

    def _too_often(self, child: _Child, reason: ExitReason) -> GaveUp:
        """What to say of the restarts within the period, the last of which was this child's."""
        path = f"{self.path}/{child.id}"
        failed = f"{path[path.index('/', 1) :]} failed"
        total = len(self._restarts)
        own = sum(each == child.id for _, each in self._restarts)
        if total > 1:
            siblings = f" and its siblings {_times(total - own)}" if total > own else ""
            failed += f" {_times(own)}{siblings} in {self._spec.period:g} s"
        if isinstance(reason, GaveUp):
            return GaveUp(f"{reason.text}, and so {failed}")
        return GaveUp(f"{failed}{', the last time' if total > 1 else ''}: {reason.text}")

    def _doom_from(self, position: int) -> None:
        doomed = self._doomed_from
        self._doomed_from = position if doomed is None else min(position, doomed)

    def _close_gate(self, delay: float) -> None:
        opens = self.now + delay
        if delay <= 0 or (self._gate is not None and self._gate_opens >= opens):
            return
        if self._gate is not None:
            self._gate.cancel()
        self._gate = self.after(delay, _GateOpens(opens))
        self._gate_opens = opens

    def _finish(self, child: _Child, reason: ExitReason) -> None:
        """A child ended for good, by its own will."""
        self._answer_starter(child, ChildRefused(f"it exited: {reason}"))
        child.done = True
        if self._simple or child.spec.restart == "temporary":
            del self._children[child.id]

    def _after_stop(self, child: _Child) -> None:
        """A child ended because this supervisor wanted it to."""
        self._answer_starter(child, ChildRefused("it was stopped"))
        for sender in child.terminators:
            self.send(sender, ChildTerminated(child.id))
        child.terminators = ()
        if self._simple or child.spec.restart == "temporary":
            self._children.pop(child.id, None)

    # Progress.

    def _end(self, reason: ExitReason) -> None:
        """Stop all children, and then exit."""
        if self._ending is not None:
            return
        self._ending = reason
        if self._simple:
            # There may be a hundred thousand, which have no order among them.
            for child in reversed(self._children.values()):
                self._stop(child)
        self._proceed()

    def _proceed(self) -> None:
        """Do what can be done now: stop what has to be down, then start what has to be up."""
        if self._ending is not None:
            self._proceed_to_the_end(self._ending)
        elif self._simple:
            return
        elif self._doomed_from is None:
            self._start_in_order()
        elif self._all_down(self._doomed_from):
            self._revive_from(self._doomed_from)
            self._start_in_order()

    def _proceed_to_the_end(self, reason: ExitReason) -> None:
        if not self._by_address:
            self.stop(reason)
        elif not self._simple:
            self._all_down(0)

    def _all_down(self, position: int) -> bool:
        """Stop the youngest child that is up, from this position on. Returns whether there was
        none; its exit leads here again."""
        for child in reversed(self._children.values()):
            if child.position >= position and child.address is not None:
                self._stop(child)
                return False
        return True

    def _revive_from(self, position: int) -> None:
        """As in OTP, children that had finished or been terminated take part in a restart of their
        group; temporary ones are forgotten by now."""
        self._doomed_from = None
        for child in self._children.values():
            if child.position >= position:
                child.done = False

    def _start_in_order(self) -> None:
        if self._gate is not None:
            return
        complete = True
        for child in self._children.values():
            if child.done or self._bring_up(child):
                continue
            if self._in_order or not child.served_once:
                return
            complete = False
        if complete:
            self._serve()

    def _serve(self) -> None:
        self._serving = True
        self.ready()

    def _bring_up(self, child: _Child) -> bool:
        """Start it if it is down and need not wait. Returns whether it serves."""
        if child.address is None and child.timer is None:
            self._start(child)
        return child.serving

    def _start(self, child: _Child) -> None:
        spec = child.spec
        context = self.context if self._simple else self._context_of(child)
        child.address = self.spawn(spec.actor, child.args, child.id, context)
        child.since = self.now
        child.starts += 1
        self._by_address[child.address] = child
        if spec.wait_ready is None:
            self._serves(child)
        else:
            child.timer = self.after(spec.wait_ready, _NotReady(child, child.address))

    def _context_of(self, child: _Child) -> dict[str, ActorAddress]:
        context = dict(self.context)
        for elder in self._children.values():
            if elder.position < child.position and elder.address is not None:
                context[elder.id] = elder.address
        return context

    def _serves(self, child: _Child) -> None:
        child.serving = child.served_once = True
        if child.address is not None:
            self._answer_starter(child, ChildStarted(child.address, child.id))

    def _stop(self, child: _Child) -> None:
        child.cancel_timer()
        if child.address is not None and not child.stopping:
            child.stopping = True
            self.stop_child(child.address, child.spec.shutdown)

    # Dynamic children.

    def _refusal(self, message: StartChild) -> str | None:
        if not self._simple:
            return "children are started on demand by simple_one_for_one supervisors only"
        if self._ending is not None:
            return "the supervisor is stopping"
        limit = self._spec.limit
        if limit is not None and len(self._children) >= limit:
            return f"there are {limit} children already, which is the limit"
        if message.id is not None and message.id in self._children:
            return f"there is a child {message.id!r} already"
        if message.id is not None and (not message.id or "/" in message.id):
            return f"an id has at least one character and no slash, unlike {message.id!r}"
        return None

    def _next_id(self) -> str:
        while True:
            self._serial += 1
            if str(self._serial) not in self._children:
                return str(self._serial)

    def _answer_starter(self, child: _Child, answer: ChildStarted | ChildRefused) -> None:
        starter, child.starter = child.starter, None
        if starter is not None:
            self.send(starter, answer)


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _is_callers_fault(reason: ExitReason) -> bool:
    return isinstance(reason, Crashed) and isinstance(reason.exception, LocalError)
