"""The announcement of a service: listens under the service's key, keeps it registered, and turns
each connection into a pipe."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from thespian.actors import ActorAddress

from ..supervisor import ChildRefused, ChildStarted, StartChild
from ..transport.keys import KeyPair
from .actor import Actor, ActorGone, ExitReason, handles
from .messages import (
    Accepted,
    Listen,
    ListenFailed,
    Register,
    Registered,
    RegistrationRefused,
    ServiceListening,
    Unlisten,
    Unregister,
)
from .pipe import ServicePipe


@dataclass(frozen=True, slots=True)
class ServiceArgs:
    """What is served, and to whom."""

    key_pair: KeyPair
    #: Role, version and tags, as registered.
    meta: Mapping[str, Any]
    #: The TCP service.
    host: str
    port: int
    #: Client keys that may connect; None admits everybody.
    allow: frozenset[bytes] | None = None


class Announcement(Actor):
    """Args: `ServiceArgs`. Context: ``endpoint``, ``link``, ``pipes``, ``console``. Ready when the
    DHT knows the key; the registration follows when there is a registry."""

    def on_start(self, args: ServiceArgs) -> None:
        self._args = args
        self.run(self._listen())

    async def _listen(self) -> None:
        args = self._args
        answer = await self.call(
            self.context["endpoint"], Listen(args.key_pair, self.myAddress, args.allow)
        )
        if isinstance(answer, ListenFailed):
            raise answer.error
        self.send(self.context["console"], ServiceListening(args.key_pair.public_key))
        self.send(self.context["link"], Register(args.meta, args.key_pair.public_key))
        self.ready()

    @handles(Registered)
    def _registered(self, message: Registered, _sender: ActorAddress) -> None:
        self.log.info("registered", role=message.meta.get("role"))
        self.send(self.context["console"], message)

    @handles(RegistrationRefused)
    def _refused(self, message: RegistrationRefused, _sender: ActorAddress) -> None:
        self.send(self.context["console"], message)

    @handles(Accepted)
    def _accepted(self, message: Accepted, _sender: ActorAddress) -> None:
        channel = message.channel
        pipe = ServicePipe(channel, self._args.host, self._args.port)
        self.send(self.context["pipes"], StartChild(pipe))

    @handles(ChildStarted)
    def _pipe_started(self, _message: ChildStarted, _sender: ActorAddress) -> None:
        pass

    @handles(ChildRefused)
    def _pipe_refused(self, message: ChildRefused, _sender: ActorAddress) -> None:
        self.log.warning("connection refused", reason=message.reason)
        if message.args is not None:
            cast(ServicePipe, message.args).channel.abort()

    def on_stop(self, reason: ExitReason) -> None:
        self.run(self._withdraw(reason))

    async def _withdraw(self, reason: ExitReason) -> None:
        """No new clients: the registry forgets us first, then the DHT."""
        args = self._args
        self.send(self.context["link"], Unregister(args.meta, args.key_pair.public_key))
        with contextlib.suppress(ActorGone):
            await self.call(self.context["endpoint"], Unlisten(args.key_pair.public_key))
        self.stop(reason)
