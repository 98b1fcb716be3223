"""What a link keeps registered: signed leases where the registry takes them, else plain entries."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, Protocol

from thespian.actors import ActorAddress

from ...transport.errors import InvalidInput
from ...transport.keys import KeyPair
from ...transport.rpc import RpcResponse
from ..actor import Actor
from ..messages import Register, Registered, RegistrationRefused, Unregister
from . import lease, roles
from .client_session import Alarm, ClientSession
from .roles import Meta

#: Services that one program keeps registered: what a registry takes of one session.
MAX_REGISTRATIONS = 1000
#: Registrations in flight. Each may be a line of more than 64 KiB, and what waits here can still be
#: taken back.
MAX_ASKED = 32
#: Seconds that a registry may grant at least: less would be renewed all the time.
MIN_TTL = 3.0
#: A lease is renewed after this part of its time, so that two renewals may go wrong; and somewhat
#: before, so that those made at the same time are not renewed at the same time.
RENEWAL = 1 / 3
RENEWAL_JITTER = 0.6, 1.0
#: Seconds until a registration that was refused is tried again.
REFUSED_RETRY = 30.0
#: Milliseconds by which a registry may push our sequence ahead of our clock. Without a bound, a
#: malicious one could push it to the last number there is, and nobody would take our leases again.
MAX_LEAD = 24 * 3600 * 1000

_STALE = re.compile(r"stale sequence, the last was (\d{1,16})\b")


@dataclass(slots=True, eq=False)
class Registration:
    meta: Meta
    service_key: bytes
    key_pair: KeyPair | None = None
    instance: str = ""
    #: Who wants it; when nobody does, it is taken back and then forgotten.
    owners: dict[ActorAddress, None] = field(default_factory=dict)
    #: The next renewal, or the next attempt after a refusal.
    alarm: Alarm | None = None
    #: This session's registry may have it.
    asked: bool = False
    asking: bool = False
    #: Something has changed since the question in flight.
    again: bool = False
    #: The owners know that this session's registry has it.
    told: bool = False
    #: The sequence was raised at the registry's word, and that has not succeeded yet.
    raised: bool = False
    #: Why the registry does not take it.
    refusal: str = ""
    #: Registered with this session's registry.
    held: bool = False
    #: When the lease ends, by the loop's clock; None for a plain entry.
    ends_at: float | None = None

    @property
    def params(self) -> dict[str, Any]:
        return {"meta": self.meta, "servicePublicKey": self.service_key.hex()}

    @property
    def place(self) -> tuple[str, str, bytes]:
        return place(self)


class _Placed(Protocol):
    @property
    def meta(self) -> Meta: ...
    @property
    def service_key(self) -> bytes: ...


def place(what: _Placed) -> tuple[str, str, bytes]:
    """What makes two registrations the same one."""
    return str(what.meta.get("role")), str(what.meta.get("version")), what.service_key


class Registrations:
    """Belongs to a link, which tells it what its owners want and when a session begins and ends.

    ``clock`` gives seconds of Unix time. It may jump: sequences only rise.
    """

    def __init__(
        self,
        actor: Actor,
        session: ClientSession,
        registry_key: bytes,
        rng: Random,
        clock: Callable[[], float],
    ) -> None:
        self._actor = actor
        self._session = session
        self._registry_key = registry_key
        self._rng = rng
        self._clock = clock
        self._registrations: dict[tuple[str, str, bytes], Registration] = {}
        # Waiting to be asked for or taken back, first come, first served.
        self._queue: dict[Registration, None] = {}
        self._asked = 0
        self._asking_next = False
        # Whose lease a key has in this session: it can have one.
        self._leases: dict[bytes, Registration] = {}
        # Over all keys: each key's own sequence then rises too.
        self._sequence = 0

    # What owners want

    def register(self, message: Register, owner: ActorAddress) -> None:
        registration = self._registrations.get(place(message))
        if registration is None:
            if len(self._registrations) >= MAX_REGISTRATIONS:
                text = f"one program registers at most {MAX_REGISTRATIONS} services"
                refusal = RegistrationRefused(
                    message.meta, message.service_key, text, self._registry_key
                )
                self._actor.send(owner, refusal)
                return
            registration = Registration(message.meta, message.service_key)
            self._registrations[registration.place] = registration
        registration.meta = message.meta
        registration.key_pair = message.key_pair or registration.key_pair
        registration.instance = message.instance or registration.instance
        if not registration.instance:
            registration.instance = f"{self._rng.getrandbits(128):032x}"
        registration.owners[owner] = None
        registration.told = False
        self._actor.monitor(owner)
        self._push(registration)

    def unregister(self, message: Unregister, owner: ActorAddress) -> None:
        registration = self._registrations.get(place(message))
        if registration is not None:
            self._disown(registration, owner)

    def owner_died(self, owner: ActorAddress) -> None:
        for registration in tuple(self._registrations.values()):
            self._disown(registration, owner)

    # What happens to the session

    def opened(self) -> None:
        for registration in tuple(self._registrations.values()):
            self._push(registration)

    def lost(self) -> None:
        self._queue.clear()
        self._asked = 0
        self._leases.clear()
        for registration in tuple(self._registrations.values()):
            _cancel(registration)
            registration.asked = registration.asking = registration.again = False
            registration.told = registration.raised = registration.held = False
            registration.ends_at = None
            if not registration.owners:
                del self._registrations[registration.place]

    def sign_off(self) -> None:
        """Take everything back, without waiting for answers."""
        for registration in self._registrations.values():
            if not registration.owners and registration.asking and not registration.again:
                continue  # that is under way
            if self._leases.get(registration.service_key) is registration:
                with contextlib.suppress(InvalidInput):
                    self._session.notify("lease", self._statement(registration, 0))
            elif registration.asked:
                self._session.notify("unregister", registration.params)

    # Looking in

    def describe(self) -> list[dict[str, Any]]:
        return [
            {
                "role": roles.text(each.meta),
                "service": each.service_key.hex(),
                "state": _state(each),
                "lease": None if each.ends_at is None else round(each.ends_at - self._actor.now, 1),
                "refusal": each.refusal or None,
            }
            for each in self._registrations.values()
            if each.owners
        ]

    # One after the other

    def _push(self, registration: Registration) -> None:
        if not self._session.up:
            return
        _cancel(registration)
        if registration.asking:
            registration.again = True
            return
        self._queue[registration] = None
        self._ask_next()

    def _ask_next(self) -> None:
        if self._asking_next:
            return  # a question that was answered at once
        self._asking_next = True
        while self._queue and self._asked < MAX_ASKED:
            registration = next(iter(self._queue))
            del self._queue[registration]
            self._ask(registration)
        self._asking_next = False

    def _ask(self, registration: Registration) -> None:
        if not registration.owners:
            if registration.asked:
                self._take_back(registration)
            else:
                del self._registrations[registration.place]
        elif registration.key_pair is None or not self._session.can("lease"):
            self._request(registration, "register", registration.params, self._registered)
        else:
            self._lease(registration)

    def _request(
        self,
        registration: Registration,
        method: str,
        params: Any,
        then: Callable[[Registration, RpcResponse], None],
    ) -> None:
        self._asked += 1
        registration.asked = registration.asking = True
        self._session.request(method, params, partial(self._answered, registration, then))

    def _answered(
        self,
        registration: Registration,
        then: Callable[[Registration, RpcResponse], None],
        response: RpcResponse | None,
    ) -> None:
        self._asked -= 1
        registration.asking = False
        if response is not None:
            then(registration, response)
        if registration.again:
            registration.again = False
            self._push(registration)
        self._ask_next()

    # Asking for it

    def _lease(self, registration: Registration) -> None:
        holder = self._leases.setdefault(registration.service_key, registration)
        if holder is not registration:
            if holder.owners:
                role = roles.text(holder.meta)
                self._refused(registration, f"this key is registered as {role}: use another key")
            return  # else it follows when the other one is taken back
        try:
            statement = self._statement(registration, lease.DEFAULT_TTL)
        except InvalidInput as error:
            self._free(registration)
            self._refused(registration, str(error))
            return
        self._request(registration, "lease", statement, self._leased)

    def _leased(self, registration: Registration, response: RpcResponse) -> None:
        if response.error is not None:
            if self._raise(registration, response.error):
                registration.again = True
                return
            registration.raised = False
            self._free(registration)
            self._refused(registration, response.error)
            return
        registration.raised = False
        ttl = _granted(response.result)
        registration.ends_at = self._actor.now + ttl
        part = RENEWAL * self._rng.uniform(*RENEWAL_JITTER)
        registration.alarm = self._session.later(ttl * part, partial(self._push, registration))
        self._accepted(registration, verified=True)

    def _registered(self, registration: Registration, response: RpcResponse) -> None:
        if response.error is not None:
            self._refused(registration, response.error)
        else:
            self._accepted(registration, verified=False)

    def _accepted(self, registration: Registration, verified: bool) -> None:
        registration.held = True
        registration.refusal = ""
        if registration.told or registration.again:
            return
        registration.told = True
        answer = Registered(
            registration.meta, registration.service_key, self._registry_key, verified
        )
        for owner in registration.owners:
            self._actor.send(owner, answer)

    def _refused(self, registration: Registration, text: str) -> None:
        registration.held = registration.told = False
        registration.ends_at = None
        registration.refusal = text
        if not registration.owners:
            return
        registration.alarm = self._session.later(REFUSED_RETRY, partial(self._push, registration))
        answer = RegistrationRefused(
            registration.meta, registration.service_key, text, self._registry_key
        )
        for owner in registration.owners:
            self._actor.send(owner, answer)

    # Taking it back

    def _disown(self, registration: Registration, owner: ActorAddress) -> None:
        if registration.owners.pop(owner, self) is self or registration.owners:
            return
        _cancel(registration)
        if self._session.up:
            self._push(registration)
        else:
            del self._registrations[registration.place]

    def _take_back(self, registration: Registration) -> None:
        if self._leases.get(registration.service_key) is registration:
            try:
                statement = self._statement(registration, 0)
            except InvalidInput:  # what it was changed to has been refused; the lease will end
                self._forget(registration)
                return
            self._request(registration, "lease", statement, self._taken_back)
        else:
            # The registry may not know the method: the entry then goes with the connection only.
            params = registration.params
            self._request(registration, "unregister", params, self._taken_back)

    def _taken_back(self, registration: Registration, response: RpcResponse) -> None:
        if response.error is not None and self._raise(registration, response.error):
            registration.again = True
            return
        registration.raised = registration.held = False
        registration.ends_at = None
        if registration.owners:
            registration.again = True  # somebody wants it again
            self._free(registration)
        else:
            self._forget(registration)

    def _forget(self, registration: Registration) -> None:
        del self._registrations[registration.place]
        self._free(registration)

    def _free(self, registration: Registration) -> None:
        """Let another registration of the same key have the lease."""
        if self._leases.get(registration.service_key) is not registration:
            return
        del self._leases[registration.service_key]
        for other in tuple(self._registrations.values()):
            if other.service_key == registration.service_key and other is not registration:
                self._push(other)

    # Sequences

    def _statement(self, registration: Registration, ttl: float) -> dict[str, str]:
        """Params of `lease`; with a ttl of 0 they take it back. Raises `InvalidInput`."""
        key_pair = registration.key_pair
        if key_pair is None or key_pair.public_key != registration.service_key:
            raise InvalidInput("cannot be leased: the key pair is not the service's")
        now = self._clock()
        self._sequence = lease.next_sequence(self._sequence, now)
        signed = lease.sign(
            key_pair,
            registration.meta,
            instance=registration.instance,
            sequence=self._sequence,
            issued=int(now * 1000),
            ttl=ttl,
        )
        return {"statement": signed.text, "signature": signed.signature.hex()}

    def _raise(self, registration: Registration, refusal: str) -> bool:
        """Whether the registry has seen a higher sequence, and we may go above that: once."""
        stale = _STALE.search(refusal)
        if stale is None or registration.raised:
            return False
        last = int(stale[1])
        if last > int(self._clock() * 1000) + MAX_LEAD:
            return False
        registration.raised = True
        self._sequence = max(self._sequence, last)
        return True


def _state(registration: Registration) -> str:
    if not registration.held:
        return "refused" if registration.refusal else "waiting"
    return "registered" if registration.ends_at is None else "leased"


def _granted(result: Any) -> float:
    """Seconds of a granted lease; a registry that does not say has granted what was asked."""
    ttl = result.get("ttl") if isinstance(result, Mapping) else None
    if not isinstance(ttl, (int, float)) or isinstance(ttl, bool):
        return lease.DEFAULT_TTL
    return min(max(float(ttl), MIN_TTL), lease.MAX_TTL)


def _cancel(registration: Registration) -> None:
    if registration.alarm is not None:
        registration.alarm.cancel()
        registration.alarm = None
