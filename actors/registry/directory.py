"""All registries as one: what clients want is said to each of them, what they tell is merged.

Any one registry is enough. One that is away keeps the last word it had, until it says otherwise.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct, structs
from thespian.actors import ActorAddress

from ...supervisor import Children, WhichChildren
from ..actor import Actor, Down, Timer, handles
from ..messages import (
    Describe,
    Described,
    Find,
    Found,
    LinkDown,
    LinkUp,
    Refresh,
    Register,
    Registered,
    RegistrationRefused,
    ServiceRecord,
    Services,
    Unregister,
    Unwatch,
    Watch,
)
from . import roles
from .link import Attend
from .records import by_version, same
from .registrations import MAX_REGISTRATIONS, place
from .roles import Meta
from .searches import MAX_FINDERS, MAX_SEARCHES, wanted

#: Hexadecimal digits of a registry's key that are the id of its link.
ID_DIGITS = 8
#: Seconds after which a link that is down is looked for again: its supervisor restarts the first
#: time at once, and later after a while.
LOOK_AGAIN = 0.25
#: Seconds that the first answer to a `Find` waits for those of other registries.
GATHER = 0.2
#: Seconds between two entries in the log that say how old the knowledge is.
REMIND = 60.0
#: Instances that have been unregistered here and may still be listed by a registry that is away:
#: more than one program registers.
MAX_WITHDRAWN = 2 * MAX_REGISTRATIONS

Records = tuple[ServiceRecord, ...]


def link_id(registry_key: bytes) -> str:
    """The id of the child of ``links`` that is the link to this registry."""
    return registry_key.hex()[:ID_DIGITS]


@dataclass(slots=True, eq=False)
class _Registry:
    key: bytes
    #: None while its link is down.
    link: ActorAddress | None = None
    #: It can be asked.
    up: bool = False


@dataclass(slots=True, eq=False)
class _Part:
    """What one registry says to one search."""

    records: Records = ()
    live: bool = False
    #: When it last vouched for this, unless it does so now.
    vouched_at: float = 0.0


@dataclass(slots=True, eq=False)
class _Registration:
    message: Register
    owners: dict[ActorAddress, None] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Search:
    meta: Meta
    watchers: dict[ActorAddress, None] = field(default_factory=dict)
    #: By registry; those that have said something.
    parts: dict[bytes, _Part] = field(default_factory=dict)
    #: What the watchers know.
    told: Services | None = None


@dataclass(slots=True, eq=False)
class _Finding:
    """All who wait for the same."""

    message: Find
    #: Who, and the end of their time.
    finders: dict[int, tuple[ActorAddress, Timer]] = field(default_factory=dict)
    parts: dict[bytes, Records] = field(default_factory=dict)
    gathering: Timer | None = None


class _Look(Struct, frozen=True):
    pass


class _Remind(Struct, frozen=True):
    pass


class _FindOver(Struct, frozen=True):
    finding: _Finding
    finder: int


class _Gathered(Struct, frozen=True):
    finding: _Finding


class Directory(Actor):
    """Args: the registries' keys. Context: ``links``, the supervisor of their links, each of which
    has `link_id` for its id.

    Takes `Register`, `Unregister`, `Find`, `Watch`, `Unwatch`, `Refresh` and `Describe`. Each
    registry answers a `Register` for itself.
    """

    def on_start(self, args: Iterable[bytes]) -> None:
        self._registries = {key: _Registry(key) for key in args}
        self._by_link: dict[ActorAddress, _Registry] = {}
        self._registrations: dict[tuple[str, str, bytes], _Registration] = {}
        self._searches: dict[tuple[str, str | None], _Search] = {}
        self._findings: dict[tuple[str, str | None], _Finding] = {}
        self._finders = 0
        self._serial = 0
        # Service keys and instances that have been unregistered here, the oldest first.
        self._withdrawn: dict[tuple[bytes, str], None] = {}
        self._looking = False
        self._reminder: Timer | None = None
        self._away_since: float | None = None
        self._look()
        self.ready()

    # The links

    def _look(self) -> None:
        self._looking = True
        self.send(self.context["links"], WhichChildren())

    @handles(_Look)
    def _look_again(self, _message: _Look, _sender: ActorAddress) -> None:
        self._look()

    @handles(Children)
    def _links_are(self, message: Children, _sender: ActorAddress) -> None:
        self._looking = False
        addresses = {child.id: child.address for child in message.children}
        for registry in self._registries.values():
            link = addresses.get(link_id(registry.key))
            if registry.link is None and link is not None:
                self._attach(registry, link)
        if not all(registry.link for registry in self._registries.values()):
            self._looking = True
            self.after(LOOK_AGAIN, _Look())

    def _attach(self, registry: _Registry, link: ActorAddress) -> None:
        """Say everything to a link that knows nothing yet."""
        registry.link = link
        self._by_link[link] = registry
        self.monitor(link)
        self.send(link, Attend())
        for registration in self._registrations.values():
            self.send(link, registration.message)
        for search in self._searches.values():
            self.send(link, Watch(search.meta))
        for finding in self._findings.values():
            self.send(link, finding.message)

    def _link_died(self, registry: _Registry) -> None:
        registry.link = None
        for search in tuple(self._searches.values()):
            part = search.parts.get(registry.key)
            if part is not None and part.live:
                part.live = False
                part.vouched_at = self.now
                self._publish(search)
        self._went_away(registry)
        if not self._looking:
            self._look()

    def _say(self, message: object) -> None:
        for link in self._by_link:
            self.send(link, message)

    @handles(Down)
    def _died(self, message: Down, _sender: ActorAddress) -> None:
        registry = self._by_link.pop(message.address, None)
        if registry is not None:
            self._link_died(registry)
            return
        client = message.address
        for registration in tuple(self._registrations.values()):
            self._disown(registration, client)
        for search in tuple(self._searches.values()):
            if search.watchers.pop(client, self) is None:
                self._drop_if_unused(search)

    # Whether there is a registry

    @handles(LinkUp)
    def _link_up(self, _message: LinkUp, sender: ActorAddress) -> None:
        registry = self._by_link.get(sender)
        if registry is None:
            return
        registry.up = True
        if self._away_since is not None:
            self.log.info("registries.back", after=round(self.now - self._away_since, 1))
            self._away_since = None
        if self._reminder is not None:
            self._reminder.cancel()
            self._reminder = None

    @handles(LinkDown)
    def _link_down(self, _message: LinkDown, sender: ActorAddress) -> None:
        registry = self._by_link.get(sender)
        if registry is not None:
            self._went_away(registry)

    def _went_away(self, registry: _Registry) -> None:
        if not registry.up:
            return
        registry.up = False
        if any(each.up for each in self._registries.values()):
            return
        self._away_since = self.now
        self.log.warning("registries.away", registries=len(self._registries), known=self._known())
        self._reminder = self.after(REMIND, _Remind())

    @handles(_Remind)
    def _remind(self, _message: _Remind, _sender: ActorAddress) -> None:
        if self._away_since is None:
            return  # one came back meanwhile
        age = round(self.now - self._away_since)
        self.log.info("registries.away", known=self._known(), age=age)
        self._reminder = self.after(REMIND, _Remind())

    def _known(self) -> int:
        return sum(len(search.told.records) for search in self._searches.values() if search.told)

    # Registrations

    @handles(Register)
    def _register(self, message: Register, sender: ActorAddress) -> None:
        registration = self._registrations.get(place(message))
        if registration is None:
            if len(self._registrations) >= MAX_REGISTRATIONS:
                text = f"one program registers at most {MAX_REGISTRATIONS} services"
                self.send(sender, RegistrationRefused(message.meta, message.service_key, text))
                return
            registration = self._registrations[place(message)] = _Registration(message)
        if not message.instance:
            # All registries shall know it as the same one.
            instance = registration.message.instance or secrets.token_hex(16)
            message = structs.replace(message, instance=instance)
        registration.message = message
        registration.owners[sender] = None
        self.monitor(sender)
        if self._withdrawn.pop((message.service_key, message.instance), self) is None:
            self._publish_all()
        self._say(message)

    @handles(Unregister)
    def _unregister(self, message: Unregister, sender: ActorAddress) -> None:
        registration = self._registrations.get(place(message))
        if registration is not None:
            self._disown(registration, sender)

    def _disown(self, registration: _Registration, owner: ActorAddress) -> None:
        if registration.owners.pop(owner, self) is self or registration.owners:
            return
        message = registration.message
        del self._registrations[place(message)]
        self._say(Unregister(message.meta, message.service_key))
        if message.key_pair is None:
            return
        # A registry that is away does not hear of it, and its last word would stand.
        self._withdrawn[message.service_key, message.instance] = None
        if len(self._withdrawn) > MAX_WITHDRAWN:
            del self._withdrawn[next(iter(self._withdrawn))]
        self._publish_all()

    @handles(Registered, RegistrationRefused)
    def _registration_answered(
        self, message: Registered | RegistrationRefused, sender: ActorAddress
    ) -> None:
        registration = self._registrations.get(place(message))
        if registration is not None and sender in self._by_link:
            for owner in registration.owners:
                self.send(owner, message)

    # Watching

    @handles(Watch)
    def _watch(self, message: Watch, sender: ActorAddress) -> None:
        search = self._searches.get(wanted(message.meta))
        if search is None:
            if self._is_full(message.meta):
                reason = f"one program watches at most {MAX_SEARCHES} roles"
                self.log.warning("watch.refused", role=roles.text(message.meta), reason=reason)
                self.send(sender, Services(message.meta, (), live=False))
                return
            search = self._searches[wanted(message.meta)] = _Search(message.meta)
            self._say(message)
        search.watchers[sender] = None
        self.monitor(sender)
        if search.told is not None:
            self.send(sender, self._services(search, search.told.records))

    @handles(Unwatch)
    def _unwatch(self, message: Unwatch, sender: ActorAddress) -> None:
        search = self._searches.get(wanted(message.meta))
        if search is not None:
            search.watchers.pop(sender, None)
            self._drop_if_unused(search)

    @handles(Refresh)
    def _refresh(self, message: Refresh, _sender: ActorAddress) -> None:
        self._say(message)

    @handles(Services)
    def _services_are(self, message: Services, sender: ActorAddress) -> None:
        registry = self._by_link.get(sender)
        search = self._searches.get(wanted(message.meta))
        if registry is None or search is None:
            return
        vouched_at = self.now - message.age
        search.parts[registry.key] = _Part(message.records, message.live, vouched_at)
        self._publish(search)

    def _publish(self, search: _Search) -> None:
        told = search.told
        services = self._services(search, self._merged(search))
        if told and told.live == services.live and same(told.records, services.records):
            return
        search.told = services
        for watcher in search.watchers:
            self.send(watcher, services)

    def _publish_all(self) -> None:
        for search in self._searches.values():
            if search.told is not None:
                self._publish(search)

    def _merged(self, search: _Search) -> Records:
        parts = search.parts.values()
        if len(parts) == 1 and not self._withdrawn:
            return next(iter(parts)).records
        # In the order of the registries, whichever answered first.
        ordered = [search.parts[key].records for key in self._registries if key in search.parts]
        return merged(ordered, self._withdrawn)

    def _services(self, search: _Search, records: Records) -> Services:
        parts = search.parts.values()
        live = any(part.live for part in parts)
        age = 0.0 if live else min(self.now - part.vouched_at for part in parts)
        return Services(search.meta, records, live, age)

    def _is_full(self, meta: Meta) -> bool:
        known = self._searches.keys() | self._findings.keys()
        return wanted(meta) not in known and len(known) >= MAX_SEARCHES

    def _drop_if_unused(self, search: _Search) -> None:
        if not search.watchers and self._searches.pop(wanted(search.meta), None) is not None:
            self._say(Unwatch(search.meta))

    # Finding

    @handles(Find)
    def _find(self, message: Find, sender: ActorAddress) -> None:
        finding = self._findings.get(wanted(message.meta))
        if self._finders >= MAX_FINDERS or (finding is None and self._is_full(message.meta)):
            reason = f"at most {MAX_SEARCHES} roles and {MAX_FINDERS} questions"
            self.log.warning("find.refused", role=roles.text(message.meta), reason=reason)
            self.send(sender, Found(message.meta, ()))
            return
        if finding is None:
            finding = self._findings[wanted(message.meta)] = _Finding(message)
        elif message.timeout > finding.message.timeout:
            finding.message = message
        self._finders += 1
        self._serial += 1
        timer = self.after(message.timeout, _FindOver(finding, self._serial))
        finding.finders[self._serial] = sender, timer
        self._say(message)

    @handles(Found)
    def _found(self, message: Found, sender: ActorAddress) -> None:
        registry = self._by_link.get(sender)
        finding = self._findings.get(wanted(message.meta))
        if registry is None or finding is None:
            return
        # One that has nothing to say leaves it to the others, or to the time.
        records = merged([message.records], self._withdrawn)
        if not records:
            return
        finding.parts[registry.key] = records
        if all(each.key in finding.parts for each in self._registries.values() if each.up):
            self._answer(finding)
        elif finding.gathering is None:
            finding.gathering = self.after(GATHER, _Gathered(finding))

    @handles(_Gathered)
    def _gathered(self, message: _Gathered, _sender: ActorAddress) -> None:
        self._answer(message.finding)

    def _answer(self, finding: _Finding) -> None:
        records = merged(finding.parts.values(), self._withdrawn)
        for number in tuple(finding.finders):
            self._answer_finder(finding, number, records)

    @handles(_FindOver)
    def _find_over(self, message: _FindOver, _sender: ActorAddress) -> None:
        self._answer_finder(message.finding, message.finder, ())

    def _answer_finder(self, finding: _Finding, number: int, records: Records) -> None:
        waiting = finding.finders.pop(number, None)
        if waiting is None:
            return  # its time was over, or the answer came, in the same moment
        finder, timer = waiting
        timer.cancel()
        self._finders -= 1
        self.send(finder, Found(finding.message.meta, records))
        if not finding.finders:
            del self._findings[wanted(finding.message.meta)]
            if finding.gathering is not None:
                finding.gathering.cancel()

    # Looking in

    @handles(Describe)
    def _describe(self, _message: Describe, sender: ActorAddress) -> None:
        away = self._away_since
        fields: dict[str, Any] = {
            "registries": [
                {"registry": each.key.hex(), "connected": each.up}
                for each in self._registries.values()
            ],
            "live": any(each.up for each in self._registries.values()),
            # Seconds without any registry.
            "away": None if away is None else round(self.now - away, 1),
            "registrations": [
                {"role": roles.text(each.message.meta), "service": each.message.service_key.hex()}
                for each in self._registrations.values()
            ],
            "watches": [self._described(search) for search in self._searches.values()],
        }
        self.send(sender, Described(fields))

    def _described(self, search: _Search) -> dict[str, Any]:
        if search.told is None:
            return {"role": roles.text(search.meta), "services": None}
        now = self._services(search, search.told.records)
        return {
            "role": roles.text(search.meta),
            "services": len(now.records),
            "live": now.live,
            "age": round(now.age, 1),
        }


def merged(parts: Iterable[Records], withdrawn: Iterable[tuple[bytes, str]] = ()) -> Records:
    """What several registries list, highest version first.

    A service that has proven itself is there once, by its newest statement, and not as what
    somebody else says of it. Leases of a key and instance in ``withdrawn`` are left out.
    """
    proven: dict[bytes, ServiceRecord] = {}
    others: dict[tuple[bytes, str], ServiceRecord] = {}
    gone = withdrawn if isinstance(withdrawn, dict) else dict.fromkeys(withdrawn)
    for records in parts:
        for record in records:
            if not record.verified:
                others.setdefault((record.public_key, record.version), record)
                continue
            best = proven.get(record.public_key)
            if (record.public_key, record.instance) not in gone and (
                best is None or record.sequence > best.sequence
            ):
                proven[record.public_key] = record
    rest = (each for each in others.values() if each.public_key not in proven)
    return by_version((*proven.values(), *rest))
