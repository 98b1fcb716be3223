"""The resolver of a proxy: knows which services match, and which of them to try first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from thespian.actors import ActorAddress

from .actor import Actor, Address, Down, handles
from .messages import (
    Follow,
    Refresh,
    Resolve,
    Resolved,
    ServiceFailed,
    ServiceRecord,
    Services,
    Watch,
)

#: Seconds that a connection waits for a first service to appear, before it is closed.
PATIENCE = 10.0
#: Seconds for which a service that could not be reached is tried after all others.
PENALTY = 10.0
#: Services that one connection tries at most.
MAX_TRIES = 3
#: Connections that may wait for a service to appear; more are told at once that there is none.
MAX_WAITING = 4096


@dataclass(frozen=True, slots=True)
class _GiveUp:
    asker: ActorAddress


class Resolver(Actor):
    """Args: a meta object whose version is a range. Context: ``link``."""

    def on_start(self, args: Mapping[str, Any]) -> None:
        self._meta = args
        # None until the link has told for the first time.
        self._records: tuple[ServiceRecord, ...] | None = None
        # When a service that failed is trusted again.
        self._penalties: dict[bytes, float] = {}
        self._waiting: dict[ActorAddress, None] = {}
        # What each was told last.
        self._followers: dict[ActorAddress, tuple[ServiceRecord, ...] | None] = {}
        self.send(self.context["link"], Watch(args))
        self.ready()

    @handles(Services)
    def _services(self, message: Services, _sender: ActorAddress) -> None:
        self._records = message.records
        known = {record.public_key for record in message.records}
        self._penalties = {k: v for k, v in self._penalties.items() if k in known}
        if self._records:
            for asker in self._waiting:
                self.send(asker, self._resolved())
            self._waiting.clear()
        self._tell_followers()

    @handles(Resolve)
    def _resolve(self, _message: Resolve, sender: ActorAddress) -> None:
        if self._records or self._waiting_is_full():
            answer = self._resolved()
            self.send(sender, answer)
            # A penalty may be over by now.
            self._tell_followers(answer)
            return
        self._waiting[sender] = None
        self.send(self.context["link"], Refresh(self._meta))
        self.after(PATIENCE, _GiveUp(sender))

    @handles(_GiveUp)
    def _give_up(self, message: _GiveUp, _sender: ActorAddress) -> None:
        if message.asker in self._waiting:
            del self._waiting[message.asker]
            self.send(message.asker, Resolved(()))

    @handles(ServiceFailed)
    def _failed(self, message: ServiceFailed, _sender: ActorAddress) -> None:
        self._penalties[message.public_key] = self.now + PENALTY
        self.send(self.context["link"], Refresh(self._meta))
        self._tell_followers()

    @handles(Follow)
    def _follow(self, _message: Follow, sender: ActorAddress) -> None:
        self.monitor(sender)
        self._followers[sender] = None
        self._tell_followers()

    @handles(Down)
    def _follower_died(self, message: Down, _sender: ActorAddress) -> None:
        self._followers.pop(message.address, None)

    def _waiting_is_full(self) -> bool:
        if len(self._waiting) < MAX_WAITING:
            return False
        self._waiting = {asker: None for asker in self._waiting if cast(Address, asker).alive}
        return len(self._waiting) >= MAX_WAITING

    def _resolved(self) -> Resolved:
        """The highest version first, those that failed lately last."""
        if not self._penalties:
            return Resolved((self._records or ())[:MAX_TRIES])
        now = self.now
        penalties = self._penalties
        ordered = sorted(self._records or (), key=lambda r: penalties.get(r.public_key, 0.0) > now)
        return Resolved(tuple(ordered[:MAX_TRIES]))

    def _tell_followers(self, answer: Resolved | None = None) -> None:
        if self._records is None:
            return
        answer = answer or self._resolved()
        first = answer.services[:1]
        for follower, told in self._followers.items():
            if told != first:
                self._followers[follower] = first
                self.send(follower, answer)
