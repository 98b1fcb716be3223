"""The endpoint actor: owns the DHT node and its UDP sockets, and hands channels to who asks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from thespian.actors import ActorAddress

from ..transport.channel import Channel
from ..transport.dht.endpoint import Endpoint, EndpointConfig, Listener
from ..transport.errors import HyperseaportError
from ..transport.keys import KeyPair
from .actor import Actor, Down, ExitReason, handles
from .messages import (
    Accepted,
    Announced,
    AnnounceTopic,
    Connect,
    Connected,
    ConnectFailed,
    EndpointReady,
    Listen,
    ListenFailed,
    Listening,
    Unlisten,
    Unlistened,
)

#: Seconds in which a channel that was handed over must have a protocol. Its new owner may have died
#: while the message was under way; nobody else would ever close the channel.
HANDOVER = 5.0
#: Seconds between announcements of a topic. Nodes forget one after 13 to 27 minutes (spec: hyperdht
#: 3.6).
REANNOUNCE = 600.0


@dataclass(frozen=True, slots=True)
class _Opened:
    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class _Bootstrapped:
    pass


@dataclass(frozen=True, slots=True)
class _Reannounce:
    topic: bytes


@dataclass(frozen=True, slots=True)
class _CheckHandovers:
    pass


class EndpointActor(Actor):
    """Args: an `EndpointConfig`. Ready when the node's bootstrap is over.

    If it dies, its sockets and every channel over them die with it: who depends on it is its
    younger sibling, and is restarted after it.
    """

    def on_start(self, args: EndpointConfig) -> None:
        self._endpoint: Endpoint | None = None
        self._listeners: dict[bytes, Listener] = {}
        self._owners: dict[ActorAddress, set[bytes]] = {}
        self._topics: dict[bytes, KeyPair] = {}
        self._handovers: deque[tuple[float, Channel]] = deque()
        self.run(Endpoint.open(args), _Opened)

    @handles(_Opened)
    def _opened(self, message: _Opened, _sender: ActorAddress) -> None:
        self._endpoint = message.endpoint
        self.own(message.endpoint.kill)
        self.run(message.endpoint.ready(), lambda _none: _Bootstrapped())

    @handles(_Bootstrapped)
    def _bootstrapped(self, _message: _Bootstrapped, _sender: ActorAddress) -> None:
        node = self._node.core.node
        self.log.info(
            "endpoint ready",
            address=":".join(map(str, self._node.address)),
            firewalled=node.firewalled,
            nodes=len(node.table),
        )
        if "console" in self.context:
            news = EndpointReady(self._node.address, len(node.table))
            self.send(self.context["console"], news)
        self.ready()

    def on_stop(self, reason: ExitReason) -> None:
        self.run(self._close(reason))

    async def _close(self, reason: ExitReason) -> None:
        if self._endpoint is not None:
            await self._endpoint.close()
        self.stop(reason)

    @property
    def _node(self) -> Endpoint:
        if self._endpoint is None:
            raise RuntimeError("the endpoint was asked before it was ready")
        return self._endpoint

    # Connections to others

    @handles(Connect)
    def _connect(self, message: Connect, sender: ActorAddress) -> None:
        self.run(self._connect_for(message, sender))

    async def _connect_for(self, message: Connect, sender: ActorAddress) -> None:
        try:
            channel = await self._node.connect(message.public_key, key_pair=message.key_pair)
        except HyperseaportError as error:
            self.send(sender, ConnectFailed(error))
            return
        self.send(sender, Connected(channel))
        self._watch_handover(channel)

    # Connections from others

    @handles(Listen)
    def _listen(self, message: Listen, sender: ActorAddress) -> None:
        self.run(self._listen_for(message, sender))

    async def _listen_for(self, message: Listen, sender: ActorAddress) -> None:
        receiver = message.deliver_to

        def deliver(channel: Channel) -> None:
            self.send(receiver, Accepted(channel))
            self._watch_handover(channel)

        try:
            listener = await self._node.listen(message.key_pair, deliver, allow=message.allow)
        except HyperseaportError as error:
            self.send(sender, ListenFailed(error))
            return
        public_key = listener.public_key
        self._listeners[public_key] = listener
        if receiver not in self._owners:
            self.monitor(receiver)
        self._owners.setdefault(receiver, set()).add(public_key)
        self.send(sender, Listening(public_key))

    @handles(Unlisten)
    def _unlisten(self, message: Unlisten, sender: ActorAddress) -> None:
        self.run(self._unlisten_for(message.public_key, sender))

    async def _unlisten_for(self, public_key: bytes, sender: ActorAddress) -> None:
        listener = self._listeners.pop(public_key, None)
        if listener is not None:
            await listener.close()
        self.send(sender, Unlistened())

    @handles(Down)
    def _owner_died(self, message: Down, _sender: ActorAddress) -> None:
        for public_key in self._owners.pop(message.address, ()):
            listener = self._listeners.pop(public_key, None)
            if listener is not None:
                listener.kill()

    @handles(AnnounceTopic)
    def _announce_topic(self, message: AnnounceTopic, sender: ActorAddress) -> None:
        self.run(self._announce_for(message.topic, message.key_pair, sender))

    async def _announce_for(self, topic: bytes, key_pair: KeyPair, sender: ActorAddress) -> None:
        await self._node.announce(topic, key_pair)
        if topic not in self._topics:
            self._topics[topic] = key_pair
            self.after(REANNOUNCE, _Reannounce(topic))
        self.send(sender, Announced())

    @handles(_Reannounce)
    def _reannounce(self, message: _Reannounce, _sender: ActorAddress) -> None:
        self.run(self._node.announce(message.topic, self._topics[message.topic]))
        self.after(REANNOUNCE, message)

    # Channels under way

    def _watch_handover(self, channel: Channel) -> None:
        if not self._handovers:
            self.after(HANDOVER, _CheckHandovers())
        self._handovers.append((self.now + HANDOVER, channel))

    @handles(_CheckHandovers)
    def _check_handovers(self, _message: _CheckHandovers, _sender: ActorAddress) -> None:
        while self._handovers and self._handovers[0][0] <= self.now:
            _, channel = self._handovers.popleft()
            if not channel.has_protocol:
                channel.abort()
        if self._handovers:
            self.after(self._handovers[0][0] - self.now, _CheckHandovers())
