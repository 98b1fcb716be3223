"""What listens under a key, and has each connection served by an actor of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import ClassVar, Protocol, cast

from thespian.actors import ActorAddress

from ..supervisor import ChildRefused, ChildStarted, StartChild
from ..transport.channel import Channel
from .actor import Actor, ActorGone, Address, ExitReason, handles
from .console import tell
from .messages import Accepted, Listen, ListenFailed, Unlisten


class ChannelArgs(Protocol):
    """Args of an actor that serves a channel."""

    @property
    def channel(self) -> Channel: ...


class Listener(Actor):
    """A subclass calls `listen` when it starts. Context: ``endpoint``, and a supervisor with the
    name of `servers`. Ready when the DHT knows the key."""

    #: Whose children serve the connections, by its name in the context.
    servers: ClassVar[str]

    def listen(
        self, question: Listen, news: object, serve: Callable[[Channel], ChannelArgs]
    ) -> None:
        """Listen, tell the console ``news``, and have a child started with what ``serve`` returns
        for each connection."""
        self._public_key = question.key_pair.public_key
        self._serve = serve
        self._counts = {"accepted": 0, "refused": 0}
        self.run(self._listen(question, news))

    async def _listen(self, question: Listen, news: object) -> None:
        answer = await self.call(self.context["endpoint"], question)
        if isinstance(answer, ListenFailed):
            raise answer.error
        self.log.info("listening", public_key=self._public_key.hex())
        tell(self, news)
        self.ready()

    @handles(Accepted)
    def _accepted(self, message: Accepted, _sender: ActorAddress) -> None:
        servers = self.context[self.servers]
        if not cast(Address, servers).alive:
            # We are restarted soon; until then nobody would take the channel, nor tell its peer.
            message.channel.abort()
            return
        self._counts["accepted"] += 1
        self.send(servers, StartChild(self._serve(message.channel)))

    @handles(ChildStarted)
    def _started(self, _message: ChildStarted, _sender: ActorAddress) -> None:
        pass

    @handles(ChildRefused)
    def _refused(self, message: ChildRefused, _sender: ActorAddress) -> None:
        self._counts["refused"] += 1
        self.log.warning("connection refused", reason=message.reason)
        if message.args is not None:
            cast(ChannelArgs, message.args).channel.abort()

    def on_stop(self, reason: ExitReason) -> None:
        self.run(self._withdraw(reason))

    async def _withdraw(self, reason: ExitReason) -> None:
        with contextlib.suppress(ActorGone):
            await self.call(self.context["endpoint"], Unlisten(self._public_key))
        self.stop(reason)
