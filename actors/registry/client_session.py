"""A client's session with a registry: requests, what the registry can do, and whether it lives.

One object outlives many connections, so that those who ask need not know which one is theirs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from ...transport.errors import LocalError
from ...transport.rpc import ABSENT, RpcResponse
from ..actor import Actor, Timer
from .wire import RpcProtocol

if TYPE_CHECKING:
    from ...transport.channel import Channel

#: Version of what our programs say to each other beyond what the Node programs know.
VERSION = 1
#: Seconds in which a registry must answer; else the session is taken for dead. Longer than the 15
#: to 16 s that `waitFor` takes by design (spec: registry 6.3).
REQUEST_TIMEOUT = 20.0
#: Seconds without a byte from the registry after which it is asked for one.
PING_AFTER = 5.0
#: Seconds without a byte after which the session is dead: three pings have gone unanswered.
SILENCE = 15.0
#: Seconds by which a timer may come early.
_EARLY = 0.001

#: Called with the response, or with None if none came and that is no reason to give up the session.
Then = Callable[[RpcResponse | None], None]


class Alarm:
    """An action at a later time; see `ClientSession.later`."""

    __slots__ = ("_action", "_timer")

    def __init__(self, action: Callable[[], None]) -> None:
        self._action: Callable[[], None] | None = action
        self._timer: Timer | None = None

    def set(self, timer: Timer) -> None:
        self._timer = timer

    def cancel(self) -> None:
        self._action = None
        if self._timer is not None:
            self._timer.cancel()

    def ring(self) -> None:
        # A timer's message may have been on its way when the alarm was cancelled.
        action, self._action = self._action, None
        if action is not None:
            action()


class Due(Struct, frozen=True):
    """To the actor itself: its handler calls `alarm.ring()`."""

    alarm: Alarm


class FromWire(Struct, frozen=True):
    """To the actor itself: what a connection brought; it may be a former one."""

    wire: RpcProtocol
    event: object


@dataclass(slots=True, eq=False)
class _Request:
    method: str
    then: Then
    alarm: Alarm
    must_answer: bool


class _Wire(RpcProtocol):
    """Notes when a byte came: a long answer is a sign of life before it is complete."""

    def __init__(self, channel: Channel, deliver: Callable[[object], None]) -> None:
        super().__init__(channel, deliver)
        self._loop = asyncio.get_running_loop()
        self.heard_at = self._loop.time()

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._loop.time()
        super().data_received(data)


class ClientSession:
    """Belongs to one actor. ``lose`` is called with a reason when the registry has to be given up;
    it is expected to call `close`."""

    def __init__(self, actor: Actor, lose: Callable[[str], None]) -> None:
        self._actor = actor
        self._lose = lose
        self._wire: _Wire | None = None
        self._requests: dict[int, _Request] = {}
        self._heartbeat: Alarm | None = None
        self._heard_at = actor.now
        #: What the registry can do beyond the methods of the Node programs; None until it has
        #: been greeted, and while there is no session.
        self.features: frozenset[str] | None = None
        #: What its clock showed when it was greeted, in Unix seconds; None if it did not say.
        self.clock: float | None = None
        #: Seconds that the answer to the last ping took; None before the first.
        self.round_trip: float | None = None

    @property
    def up(self) -> bool:
        """The registry can be asked."""
        return self.features is not None

    @property
    def heard_at(self) -> float:
        """When the registry last sent a byte."""
        return self._heard_at if self._wire is None else self._wire.heard_at

    def can(self, feature: str) -> bool:
        return self.features is not None and feature in self.features

    def later(self, seconds: float, action: Callable[[], None]) -> Alarm:
        alarm = Alarm(action)
        alarm.set(self._actor.after(seconds, Due(alarm)))
        return alarm

    def open(self, channel: Channel, greeted: Callable[[], None]) -> None:
        """Take over a connection, and ask what its registry can do. One that does not know the
        question can do nothing special."""
        wire = _Wire(channel, self._from_wire)
        self._wire = wire
        self.round_trip = None
        wire.start()

        def answered(response: RpcResponse | None) -> None:
            self.features, self.clock = _greeting(response)
            greeted()

        self.request("hello", {"version": VERSION}, answered)
        self._heartbeat = self.later(PING_AFTER, self._beat)

    def close(self, *, in_order: bool = False) -> None:
        """Nothing asked will be answered any more."""
        wire = self._wire
        if wire is None:
            return
        self._heard_at = wire.heard_at
        self._wire = None
        self.features = None
        for request in self._requests.values():
            request.alarm.cancel()
        self._requests.clear()
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if in_order:
            wire.close()
        else:
            wire.abort()

    def is_of(self, wire: RpcProtocol) -> bool:
        """Whether this is the connection of the session that there is now."""
        return wire is self._wire

    def request(self, method: str, params: Any, then: Then, must_answer: bool = True) -> None:
        """Ask; a session whose registry does not answer what it must is given up. What cannot be
        sent, as when no line can hold the params, is answered with an error at once."""
        wire = self._wire
        if wire is None:
            return
        try:
            number, line = wire.peer.request(method, params)
        except LocalError as error:
            then(RpcResponse(0, ABSENT, str(error)))
            return
        alarm = self.later(REQUEST_TIMEOUT, lambda: self._timed_out(number))
        self._requests[number] = _Request(method, then, alarm, must_answer)
        wire.write(line)

    def notify(self, method: str, params: Any) -> None:
        """Say what needs no answer."""
        if self._wire is not None:
            self._wire.write(self._wire.peer.notify(method, params))

    def answered(self, response: RpcResponse) -> None:
        request = self._requests.pop(response.id)
        request.alarm.cancel()
        request.then(response)

    def _timed_out(self, number: int) -> None:
        request = self._requests.pop(number)
        if request.must_answer:
            self._lose(f"no answer to {request.method} in {REQUEST_TIMEOUT:g} s")
            return
        if self._wire is not None:
            self._wire.peer.forget(number)
        request.then(None)

    def _beat(self) -> None:
        now = self._actor.now
        silent = now - self.heard_at
        if silent >= SILENCE - _EARLY:
            self._lose(f"nothing heard for {SILENCE:g} s")
            return
        wait = PING_AFTER
        if silent >= PING_AFTER - _EARLY:
            # That it knows no such method is an answer too.
            self.request("ping", {}, lambda answer: self._pinged(now, answer), must_answer=False)
        else:
            wait -= silent
        self._heartbeat = self.later(wait, self._beat)

    def _pinged(self, asked_at: float, response: RpcResponse | None) -> None:
        if response is not None:
            self.round_trip = self._actor.now - asked_at

    def _from_wire(self, event: object) -> None:
        if self._wire is not None:
            self._actor.send(self._actor.myAddress, FromWire(self._wire, event))


def _greeting(response: RpcResponse | None) -> tuple[frozenset[str], float | None]:
    if response is None or response.error is not None or not isinstance(response.result, Mapping):
        return frozenset(), None
    features, time = response.result.get("features"), response.result.get("time")
    return (
        frozenset(each for each in features if isinstance(each, str))
        if isinstance(features, list)
        else frozenset(),
        time / 1000 if isinstance(time, (int, float)) else None,
    )
