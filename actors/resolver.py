"""The resolver of a proxy: knows which instances of a service there are and how they fare, and says
for each connection which of them to try."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random, SystemRandom
from typing import Any, cast

from msgspec import Struct, field
from thespian.actors import ActorAddress

from .actor import Actor, Address, Down, Timer, handles
from .balance import Balancer
from .instances import HEDGE_FIRST, ConnectTimes, Instances
from .messages import (
    Describe,
    Described,
    Explain,
    Explained,
    Follow,
    Refresh,
    Resolve,
    Resolved,
    ServiceFailed,
    ServiceRecord,
    Services,
    ServiceTaken,
    ServiceWorked,
    Watch,
)

#: Seconds that a connection waits for an instance to appear, before it is closed.
PATIENCE = 10.0
#: Instances named in one answer: more than a connection tries before it asks again.
MAX_OFFERED = 8
#: Connections that may wait for an instance to appear; more are told at once that there is none.
MAX_WAITING = 4096
#: Seconds after which a waiting connection is offered what it has excluded and others trust.
RECONSIDER = 1.0


class ResolverArgs(Struct, frozen=True):
    """What is looked for, and how one of those who match is chosen."""

    #: Role and range.
    meta: Mapping[str, Any]
    #: One of `balance.POLICIES`.
    balance: str = "highest"
    #: Refuse instances that no signature vouches for.
    verified_only: bool = False
    #: The proxy's public key.
    own_key: bytes = b""
    #: Seconds that a connection waits for an instance.
    patience: float = PATIENCE
    #: Whether it waits at all.
    wait: bool = True
    rng: Random = field(default_factory=SystemRandom)


class Offer(Resolved, frozen=True):
    """Which instances to try, and how patiently."""

    #: Seconds after which an attempt to connect gets a rival.
    hedge: float = HEDGE_FIRST


@dataclass(slots=True)
class _Asker:
    """A connection that waits for an instance."""

    excluding: set[bytes]


@dataclass(slots=True)
class _User:
    """A connection that has been offered an instance: it connects, or runs."""

    public_key: bytes
    #: When it was offered; None once it is taken.
    offered_at: float | None


class _GiveUp(Struct, frozen=True):
    address: ActorAddress
    asker: _Asker


class _Reconsider(Struct, frozen=True):
    address: ActorAddress
    asker: _Asker


class _SomeDue(Struct, frozen=True):
    pass


class Resolver(Actor):
    """Args: `ResolverArgs`. Context: ``link``.

    An instance that fails is set aside, longer each time, and comes last meanwhile. When its time
    is over, one connection tries it; whether that succeeds decides for the others. A connection
    that has tried all there are waits: for another one, or until one of them works again or is due.
    """

    def on_start(self, args: ResolverArgs) -> None:
        self._args = args
        self._balancer = Balancer(args.balance, args.rng, args.own_key)
        self._instances = Instances(self._balancer, args.rng, args.verified_only)
        self._connect_times = ConnectTimes()
        # Whether the link has told of any registry's answer yet.
        self._told = False
        self._live = False
        # What is known is an old answer, as no registry can be asked.
        self._stale = False
        # When a registry last vouched for what is known.
        self._vouched_at = self.now
        self._waiting: dict[ActorAddress, _Asker] = {}
        self._users: dict[ActorAddress, _User] = {}
        self._connections: Counter[bytes] = Counter()
        self._due_timer: Timer | None = None
        self._leader: ServiceRecord | None = None
        # Whether each has been told who leads, for the first time.
        self._followers: dict[ActorAddress, bool] = {}
        self.send(self.context["link"], Watch(args.meta))
        self.ready()

    # What the registries say

    @handles(Services)
    def _services(self, message: Services, _sender: ActorAddress) -> None:
        self._note_registries(message)
        if not message.live and not message.records:
            # Nobody can be asked, so nobody has said that the instances are gone.
            return
        self._told = True
        self._vouched_at = self.now - message.age
        for key in self._instances.update(message.records):
            self._pardon(key)
        self._serve_waiting()
        self._tell_followers()

    def _note_registries(self, message: Services) -> None:
        self._live = message.live
        stale = not message.live and (self._told or bool(message.records))
        if stale == self._stale:
            return
        self._stale = stale
        if stale:
            known = len(message.records) or len(self._instances)
            age = message.age if message.records else self.now - self._vouched_at
            self.log.warning("no registry: using its last answer", age=round(age, 3), known=known)
        else:
            self.log.info("registry back", known=len(message.records))

    # Who goes where

    @handles(Resolve)
    def _resolve(self, message: Resolve, sender: ActorAddress) -> None:
        offered = self._instances.choose(message.excluding, self._connections, self.now)
        if offered or not self._args.wait or self._waiting_is_full():
            self._offer(sender, offered)
            return
        asker = _Asker(set(message.excluding))
        self._waiting[sender] = asker
        self.send(self.context["link"], Refresh(self._args.meta))
        self.after(self._args.patience, _GiveUp(sender, asker))
        if self._trusted_among(asker.excluding):
            self.after(RECONSIDER, _Reconsider(sender, asker))
        self._arm()

    def _offer(self, address: ActorAddress, services: list[ServiceRecord]) -> None:
        if services:
            first = services[0].public_key
            self._instances.begin(first, address, self.now)
            self._use(address, first, self.now)
        offer = Offer(tuple(services[:MAX_OFFERED]), self._connect_times.hedge)
        self.send(address, offer)

    def _serve_waiting(self) -> None:
        for address, asker in tuple(self._waiting.items()):
            offered = self._instances.choose(asker.excluding, self._connections, self.now)
            if offered:
                self._answer_waiting(address, offered)
        self._arm()

    def _answer_waiting(self, address: ActorAddress, services: list[ServiceRecord]) -> None:
        del self._waiting[address]
        if cast(Address, address).alive:
            self._offer(address, services)

    @handles(_GiveUp)
    def _give_up(self, message: _GiveUp, _sender: ActorAddress) -> None:
        if self._waiting.get(message.address) is message.asker:
            self._answer_waiting(message.address, [])

    @handles(_Reconsider)
    def _reconsider(self, message: _Reconsider, _sender: ActorAddress) -> None:
        if self._waiting.get(message.address) is message.asker:
            excluding = message.asker.excluding
            excluding -= self._trusted_among(excluding)
            self._serve_waiting()

    def _trusted_among(self, keys: set[bytes]) -> set[bytes]:
        return {key for key in keys if self._instances.is_trusted(key)}

    def _waiting_is_full(self) -> bool:
        if len(self._waiting) < MAX_WAITING:
            return False
        alive = {a: asker for a, asker in self._waiting.items() if cast(Address, a).alive}
        self._waiting = alive
        return len(alive) >= MAX_WAITING

    # How they fare

    @handles(ServiceFailed)
    def _failed(self, message: ServiceFailed, sender: ActorAddress) -> None:
        key = message.public_key
        news = self._instances.failed(key, message.reason, self.now)
        user = self._users.get(sender)
        if user is not None and user.public_key == key:
            self._unuse(sender)
        if news:
            self._set_aside(key)

    def _set_aside(self, public_key: bytes) -> None:
        instance = self._instances[public_key]
        self.log.info(
            "instance set aside",
            key=public_key.hex(),
            reason=instance.reason,
            failures=instance.failures,
            seconds=round(instance.due_at - self.now, 3),
        )
        self.send(self.context["link"], Refresh(self._args.meta))
        self._arm()
        self._tell_followers()

    @handles(ServiceTaken)
    def _taken(self, message: ServiceTaken, sender: ActorAddress) -> None:
        # It may have asked for rivals meanwhile.
        self._waiting.pop(sender, None)
        user = self._users.get(sender)
        self._instances.connected(message.public_key)
        if user is None or user.public_key != message.public_key:
            if user is not None and self._was_late(user):
                self._overtaken(user.public_key, sender)
            self._use(sender, message.public_key, None)
        elif user.offered_at is not None:
            self._connect_times.add(self.now - user.offered_at)
            user.offered_at = None

    def _was_late(self, user: _User) -> bool:
        offered_at = user.offered_at
        return offered_at is not None and self.now - offered_at >= self._connect_times.hedge

    def _overtaken(self, public_key: bytes, by: ActorAddress) -> None:
        if self._instances.overtaken(public_key, by, self.now):
            self._set_aside(public_key)

    @handles(ServiceWorked)
    def _worked(self, message: ServiceWorked, _sender: ActorAddress) -> None:
        if self._instances.worked(message.public_key, self.now, message):
            self.log.info("instance works again", key=message.public_key.hex())
            self._pardon(message.public_key)
            self._serve_waiting()
            self._tell_followers()

    def _use(self, address: ActorAddress, public_key: bytes, offered_at: float | None) -> None:
        if address in self._users:
            self._unuse(address)
        self._users[address] = _User(public_key, offered_at)
        self._connections[public_key] += 1
        self.monitor(address)

    def _unuse(self, address: ActorAddress) -> None:
        key = self._users.pop(address).public_key
        self._connections[key] -= 1
        if not self._connections[key]:
            del self._connections[key]
        if self._instances.release(key, address):
            self._arm()

    @handles(Down)
    def _died(self, message: Down, _sender: ActorAddress) -> None:
        self._followers.pop(message.address, None)
        self._waiting.pop(message.address, None)
        if message.address in self._users:
            self._unuse(message.address)

    # Second chances

    def _pardon(self, public_key: bytes) -> None:
        """Those who wait may try again what they have tried."""
        for asker in self._waiting.values():
            asker.excluding.discard(public_key)

    def _arm(self) -> None:
        """Have `_SomeDue` come when somebody who waits can try an instance again."""
        if self._due_timer is not None:
            self._due_timer.cancel()
            self._due_timer = None
        if not self._waiting:
            return
        now = self.now
        due = now if any(True for _ in self._instances.due(now)) else self._instances.next_due(now)
        if due is not None:
            self._due_timer = self.after(due - now, _SomeDue())

    @handles(_SomeDue)
    def _some_due(self, _message: _SomeDue, _sender: ActorAddress) -> None:
        self._due_timer = None
        for record in tuple(self._instances.due(self.now)):
            alive = False
            while self._waiting and not alive:
                # They have tried all there are, or they would not wait.
                address = next(iter(self._waiting))
                alive = cast(Address, address).alive
                self._answer_waiting(address, [record])
        self._arm()

    # Who looks on

    @handles(Follow)
    def _follow(self, _message: Follow, sender: ActorAddress) -> None:
        self.monitor(sender)
        self._followers[sender] = False
        self._tell_followers()

    def _tell_followers(self) -> None:
        if not self._told:
            return
        leader = self._instances.leader(self._leader, self._connections)
        changed = leader != self._leader
        self._leader = leader
        for follower, told in self._followers.items():
            if changed or not told:
                self._followers[follower] = True
                self.send(follower, Resolved(() if leader is None else (leader,)))

    @handles(Explain)
    def _explain(self, _message: Explain, sender: ActorAddress) -> None:
        self.send(sender, Explained(tuple(self._instances.explain(self._connections, self.now))))

    @handles(Describe)
    def _describe(self, _message: Describe, sender: ActorAddress) -> None:
        args, times = self._args, self._connect_times
        typical = times.typical
        fields = {
            "role": args.meta.get("role"),
            "range": args.meta.get("version"),
            "balance": args.balance,
            "verified_only": args.verified_only,
            "wait": args.wait,
            "registry": self._live,
            "age": round(self.now - self._vouched_at, 3) if self._told else None,
            "instances": len(self._instances),
            "usable": self._instances.usable,
            "connections": self._connections.total(),
            "waiting": len(self._waiting),
            "connect_seconds": None if typical is None else round(typical, 4),
            "hedge_seconds": round(times.hedge, 4),
        }
        self.send(sender, Described(fields))
