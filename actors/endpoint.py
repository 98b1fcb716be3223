"""The endpoint actor: owns the DHT node and its UDP sockets, and hands channels to who asks."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from thespian.actors import ActorAddress

from ..transport.channel import Channel
from ..transport.dht.endpoint import Endpoint, EndpointConfig, Listener
from ..transport.errors import HyperseaportError
from ..transport.keys import KeyPair
from .actor import Actor, Down, ExitReason, handles
from .console import tell
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
    Measure,
    Measured,
    Unlisten,
    Unlistened,
)

#: Seconds in which a channel that was handed over must have a protocol. Its new owner may have died
#: while the message was under way; nobody else would ever close the channel. Longer than a pipe may
#: take to connect to the TCP service (`pipe.CONNECT_TIMEOUT`).
HANDOVER = 15.0
#: Seconds between announcements of a topic. Nodes forget one after 13 to 27 minutes (spec: hyperdht
#: 3.6).
REANNOUNCE = 600.0


@dataclass(frozen=True, slots=True)
class _Bootstrapped:
    pass


@dataclass(frozen=True, slots=True)
class _Reannounce:
    topic: bytes


@dataclass(frozen=True, slots=True)
class _CheckHandovers:
    pass


@dataclass(slots=True, eq=False)
class _Owner:
    """What an actor that accepts connections has here, and loses when it dies."""

    #: Keys that listen.
    keys: set[bytes] = field(default_factory=set)
    #: Those that do not yet.
    starts: set[asyncio.Task[None]] = field(default_factory=set)


class EndpointActor(Actor):
    """Args: an `EndpointConfig`. Ready when the node's bootstrap is over.

    If it dies, its sockets and every channel over them die with it: who depends on it is its
    younger sibling, and is restarted after it.
    """

    def on_start(self, args: EndpointConfig) -> None:
        self._endpoint: Endpoint | None = None
        self._listeners: dict[bytes, Listener] = {}
        self._owners: dict[ActorAddress, _Owner] = {}
        self._topics: dict[bytes, KeyPair] = {}
        self._handovers: deque[tuple[float, Channel]] = deque()
        self.run(self._open(args), lambda _none: _Bootstrapped())

    async def _open(self, args: EndpointConfig) -> None:
        self._endpoint = await Endpoint.open(args)
        # Here and not in a handler: a message to a dead actor would leave the sockets open.
        self.own(self._endpoint.kill)
        await self._endpoint.ready()

    @handles(_Bootstrapped)
    def _bootstrapped(self, _message: _Bootstrapped, _sender: ActorAddress) -> None:
        node = self._node.core.node
        self.log.info(
            "endpoint ready",
            address=":".join(map(str, self._node.address)),
            firewalled=node.firewalled,
            nodes=len(node.table),
        )
        tell(self, EndpointReady(self._node.address, len(node.table)))
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

    @handles(Measure)
    def _measure(self, _message: Measure, sender: ActorAddress) -> None:
        self.send(sender, Measured(self._node.metrics()))

    @handles(Connect)
    def _connect(self, message: Connect, sender: ActorAddress) -> None:
        def opened(channel: Channel) -> None:
            self.send(sender, Connected(channel))
            self._watch_handover(channel)

        def failed(error: Exception) -> None:
            self.send(sender, ConnectFailed(error))

        try:
            self._node.dial(message.public_key, message.key_pair, opened, failed)
        except HyperseaportError as error:
            failed(error)

    # Connections from others

    @handles(Listen)
    def _listen(self, message: Listen, sender: ActorAddress) -> None:
        receiver = message.deliver_to
        owner = self._owners.get(receiver)
        if owner is None:
            owner = self._owners[receiver] = _Owner()
            self.monitor(receiver)
        task = self.run(self._listen_for(message, sender, owner))
        owner.starts.add(task)
        task.add_done_callback(owner.starts.discard)

    async def _listen_for(self, message: Listen, sender: ActorAddress, owner: _Owner) -> None:
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
        owner.keys.add(public_key)
        self.send(sender, Listening(public_key))

    @handles(Unlisten)
    def _unlisten(self, message: Unlisten, sender: ActorAddress) -> None:
        self.run(self._unlisten_for(message.public_key, sender))

    async def _unlisten_for(self, public_key: bytes, sender: ActorAddress) -> None:
        for owner in self._owners.values():
            owner.keys.discard(public_key)
        listener = self._listeners.pop(public_key, None)
        if listener is not None:
            await listener.close()
        self.send(sender, Unlistened())

    @handles(Down)
    def _owner_died(self, message: Down, _sender: ActorAddress) -> None:
        owner = self._owners.pop(message.address)
        for task in owner.starts:
            # Else its successor would find the key in use.
            task.cancel()
        for public_key in owner.keys:
            self._listeners.pop(public_key).kill()

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
