"""An endpoint without a network: connects actors of one process by memory channels.

It answers the messages that the real endpoint actor answers, so registries, links, services and
proxies run on it unchanged, also in virtual time.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import cast

from thespian.actors import ActorAddress

from hyperseaport.actors.actor import Actor, Down, handles
from hyperseaport.actors.messages import (
    Accepted,
    Announced,
    AnnounceTopic,
    Connect,
    Connected,
    ConnectFailed,
    Listen,
    ListenFailed,
    Listening,
    Unlisten,
    Unlistened,
)
from hyperseaport.testing.channels import MemoryChannel, channel_pair
from hyperseaport.transport.channel import Channel
from hyperseaport.transport.errors import ConnectError, InvalidInput, PeerNotFound, PeerUnreachable
from hyperseaport.transport.keys import KeyPair

#: Seconds in which a channel that was handed over must have a protocol, as at the real endpoint.
HANDOVER = 5.0


@dataclass(slots=True, eq=False)
class MemoryNetwork:
    """What the endpoints of a test share. Tests may change all of it at any time."""

    #: Seconds that a byte takes, one way.
    delay: float = 0.0
    #: Seconds that connecting takes.
    connect_delay: float = 0.0
    #: While False, every attempt to connect or to listen fails.
    up: bool = True
    listeners: dict[bytes, Listen] = field(default_factory=dict)
    topics: dict[bytes, KeyPair] = field(default_factory=dict)
    #: Both ends of every connection ever made: the connecting one and the accepting one.
    connections: list[tuple[MemoryChannel, MemoryChannel]] = field(default_factory=list)
    #: Attempts to connect.
    attempts: int = 0

    def connect(self, public_key: bytes, key_pair: KeyPair) -> tuple[MemoryChannel, ActorAddress]:
        """Our end, and who accepts. Raises `PeerNotFound` or `PeerUnreachable`."""
        listen = self.listeners.get(public_key)
        if listen is None or not self.up:
            raise PeerNotFound(f"nobody announces {public_key.hex()}")
        if listen.allow is not None and key_pair.public_key not in listen.allow:
            raise PeerUnreachable(f"{public_key.hex()} does not answer")
        ends = channel_pair(key_pair.public_key, public_key, delay=self.delay)
        self.connections.append(ends)
        return ends[0], listen.deliver_to


@dataclass(frozen=True, slots=True)
class _CheckHandover:
    channel: MemoryChannel


class MemoryEndpoint(Actor):
    """Args: a `MemoryNetwork`. When it dies, every channel that it opened or accepted dies too."""

    def on_start(self, args: MemoryNetwork) -> None:
        self._network = args
        self._listening: set[bytes] = set()
        self._channels: list[MemoryChannel] = []
        self.own(self._close)
        self.ready()

    @handles(Connect)
    def _connect(self, message: Connect, sender: ActorAddress) -> None:
        self._network.attempts += 1
        self.run(self._connect_for(message, sender))

    async def _connect_for(self, message: Connect, sender: ActorAddress) -> None:
        await asyncio.sleep(self._network.connect_delay)
        key_pair = message.key_pair or KeyPair.generate()
        try:
            channel, acceptor = self._network.connect(message.public_key, key_pair)
        except ConnectError as error:
            self.send(sender, ConnectFailed(error))
            return
        self._channels += (channel, channel.peer)
        self.send(acceptor, Accepted(cast(Channel, channel.peer)))
        self.send(sender, Connected(cast(Channel, channel)))
        for each in (channel, channel.peer):
            self.after(HANDOVER, _CheckHandover(each))

    @handles(_CheckHandover)
    def _check_handover(self, message: _CheckHandover, _sender: ActorAddress) -> None:
        # The new owner may have died while the message was under way.
        if not message.channel.has_protocol:
            message.channel.abort()

    @handles(Listen)
    def _listen(self, message: Listen, sender: ActorAddress) -> None:
        public_key = message.key_pair.public_key
        if not self._network.up:
            self.send(sender, ListenFailed(PeerUnreachable("the network is down")))
            return
        if public_key in self._network.listeners:
            self.send(sender, ListenFailed(InvalidInput("this key listens already")))
            return
        self._network.listeners[public_key] = message
        self._listening.add(public_key)
        self.monitor(message.deliver_to)
        self.send(sender, Listening(public_key))

    @handles(Unlisten)
    def _unlisten(self, message: Unlisten, sender: ActorAddress) -> None:
        self._forget(message.public_key)
        self.send(sender, Unlistened())

    @handles(Down)
    def _listener_died(self, message: Down, _sender: ActorAddress) -> None:
        for public_key in tuple(self._listening):
            if self._network.listeners[public_key].deliver_to == message.address:
                self._forget(public_key)

    @handles(AnnounceTopic)
    def _announce_topic(self, message: AnnounceTopic, sender: ActorAddress) -> None:
        self._network.topics[message.topic] = message.key_pair
        self.send(sender, Announced())

    def _forget(self, public_key: bytes) -> None:
        if public_key in self._listening:
            self._listening.remove(public_key)
            del self._network.listeners[public_key]

    def _close(self) -> None:
        for public_key in tuple(self._listening):
            self._forget(public_key)
        for channel in self._channels:
            channel.abort()
