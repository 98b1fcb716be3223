"""A service: what listens under its key, and the announcement that keeps it registered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from thespian.actors import ActorAddress

from ..transport.keys import KeyPair
from .actor import Actor, ExitReason, handles
from .console import tell
from .listener import Listener
from .messages import (
    Describe,
    Described,
    Follow,
    HealthChanged,
    Listen,
    Register,
    Registered,
    RegistrationRefused,
    ServiceListening,
    ServiceUnhealthy,
    Unregister,
)
from .pipe import ServicePipe


class ListenerArgs(Struct, frozen=True):
    """Who is served, and to whom."""

    key_pair: KeyPair
    #: The TCP service.
    host: str
    port: int
    #: Client keys that may connect; None admits everybody.
    allow: frozenset[bytes] | None = None
    #: Blind relays where connections may begin: ours, and those that only clients name, None for
    #: all.
    relay_through: tuple[bytes, ...] = ()
    allow_relays: frozenset[bytes] | None = frozenset()


class ServiceListener(Listener):
    """Listens under the service's key, and turns each connection into a pipe. Once it is asked to
    stop, the registry has forgotten us; then the DHT does.

    Args: `ListenerArgs`. Context as of a `Listener`, with ``pipes``.
    """

    servers = "pipes"

    def on_start(self, args: ListenerArgs) -> None:
        self._args = args
        self.listen(
            Listen(
                args.key_pair, self.myAddress, args.allow, args.relay_through, args.allow_relays
            ),
            ServiceListening(args.key_pair.public_key),
            lambda channel: ServicePipe(channel, args.host, args.port),
        )

    @handles(Describe)
    def _describe(self, _message: Describe, sender: ActorAddress) -> None:
        args = self._args
        fields = {
            "key": args.key_pair.public_key.hex(),
            "target": f"{args.host}:{args.port}",
            "allowed": None if args.allow is None else len(args.allow),
            **self._counts,
        }
        self.send(sender, Described(fields))


class AnnouncementArgs(Struct, frozen=True):
    """What is registered."""

    key_pair: KeyPair
    #: Role, version and tags, as registered.
    meta: Mapping[str, Any]
    #: 32 hexadecimal digits that tell this run of the program from others with the same key.
    instance: str = ""


class Announcement(Actor):
    """Keeps the service registered while it is healthy.

    Args: `AnnouncementArgs`. Context: ``link``; ``health`` when the TCP target is watched, and then
    nothing is registered before it was found healthy.
    """

    def on_start(self, args: AnnouncementArgs) -> None:
        self._args = args
        self._healthy: bool | None = None
        self._health_reason = ""
        self._answers: dict[bytes, Mapping[str, Any]] = {}
        if "health" in self.context:
            self.send(self.context["health"], Follow())
        else:
            self._register()
        self.ready()

    def _register(self) -> None:
        args = self._args
        self.send(
            self.context["link"],
            Register(args.meta, args.key_pair.public_key, args.key_pair, args.instance),
        )

    def _unregister(self) -> None:
        self._answers.clear()
        self.send(self.context["link"], Unregister(self._args.meta, self._args.key_pair.public_key))

    @handles(HealthChanged)
    def _health(self, message: HealthChanged, _sender: ActorAddress) -> None:
        was, self._healthy = self._healthy, message.healthy
        self._health_reason = message.reason
        if message.healthy and not was:
            self._register()
        elif not message.healthy:
            self.log.warning("service unhealthy", reason=message.reason)
            tell(self, ServiceUnhealthy(message.reason))
            if was:
                self._unregister()

    @handles(Registered)
    def _registered(self, message: Registered, _sender: ActorAddress) -> None:
        self._answers[message.registry_key] = {
            "registered": True,
            "verified": message.verified,
            "at": self.now,
        }
        self.log.info("registered", role=message.meta.get("role"))
        tell(self, message)

    @handles(RegistrationRefused)
    def _refused(self, message: RegistrationRefused, _sender: ActorAddress) -> None:
        self._answers[message.registry_key] = {
            "registered": False,
            "reason": message.text,
            "at": self.now,
        }
        tell(self, message)

    @handles(Describe)
    def _describe(self, _message: Describe, sender: ActorAddress) -> None:
        registries = {
            key.hex(): {name: value for name, value in answer.items() if name != "at"}
            | {"age": round(self.now - answer["at"], 1)}
            for key, answer in self._answers.items()
        }
        fields: dict[str, Any] = {
            "role": self._args.meta.get("role"),
            "version": self._args.meta.get("version"),
            "key": self._args.key_pair.public_key.hex(),
            "instance": self._args.instance,
            "registries": registries,
        }
        if self._healthy is not None:
            fields["healthy"] = self._healthy
            fields["health_reason"] = self._health_reason
        self.send(sender, Described(fields))

    def on_stop(self, reason: ExitReason) -> None:
        """No new clients: the registries forget us before anybody stops listening."""
        if self._healthy is not False:
            self._unregister()
        self.stop(reason)
