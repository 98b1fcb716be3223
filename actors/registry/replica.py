"""What a 3.x proxy program wants to meet before it starts (spec: registry 6.4, 6.7).

It asks a registry for the key of its replicated log and waits until a peer of that log has shown
itself, but never reads the log. So there is no log: this peer can be found, accepts, and ends.
"""

from __future__ import annotations

import asyncio

from msgspec import Struct
from thespian.actors import ActorAddress

from ...transport.channel import Channel
from ...transport.keys import KeyPair, blake2b
from ..actor import Actor, handles
from ..messages import Accepted, AnnounceTopic, Listen, ListenFailed

#: Seconds that a visitor is kept: enough for it to count us as a peer.
VISIT = 0.3
#: Visitors at a time. Each is a channel and a timer.
MAX_VISITORS = 256
#: Seconds until the next attempt when listening failed.
RETRY = 30.0


def log_key(registry: KeyPair) -> bytes:
    """The 32 bytes that a registry gives as its log's key: the same after a restart, and known to
    nobody who has only the public key."""
    return blake2b(b"hyperseaport log", key=registry.seed)


def topic(key: bytes) -> bytes:
    """Where the peers of a log meet: 32 bytes."""
    return blake2b(b"hypercore", key=key)


class _Ignore(asyncio.Protocol):
    """Keeps our end open until it is closed here, whatever the visitor sends."""

    def eof_received(self) -> bool:
        return True


class _Leave(Struct, frozen=True):
    channel: Channel


class _Retry(Struct, frozen=True):
    pass


class Replica(Actor):
    """Args: the registry's key pair. Context: ``endpoint``.

    Nothing else depends on it, so what the network does to it is logged and tried again later.
    """

    def on_start(self, args: KeyPair) -> None:
        self._topic = topic(log_key(args))
        self._key_pair = KeyPair.from_seed(blake2b(b"hyperseaport replica", key=args.seed))
        self._visitors: set[Channel] = set()
        self.own(self._abort_visitors)
        self.ready()
        self._begin()

    def _begin(self) -> None:
        self.run(self._listen())

    async def _listen(self) -> None:
        endpoint = self.context["endpoint"]
        answer = await self.call(endpoint, Listen(self._key_pair, self.myAddress))
        if isinstance(answer, ListenFailed):
            self.log.warning("replica.listen_failed", error=str(answer.error), retry_in=RETRY)
            self.after(RETRY, _Retry())
            return
        await self.call(endpoint, AnnounceTopic(self._topic, self._key_pair))

    @handles(_Retry)
    def _retry(self, _message: _Retry, _sender: ActorAddress) -> None:
        self._begin()

    @handles(Accepted)
    def _accepted(self, message: Accepted, _sender: ActorAddress) -> None:
        channel = message.channel
        if len(self._visitors) >= MAX_VISITORS:
            channel.abort()
            return
        channel.set_protocol(_Ignore())
        self._visitors.add(channel)
        self.after(VISIT, _Leave(channel))

    @handles(_Leave)
    def _leave(self, message: _Leave, _sender: ActorAddress) -> None:
        self._visitors.discard(message.channel)
        message.channel.close()

    def _abort_visitors(self) -> None:
        for channel in self._visitors:
            channel.abort()
