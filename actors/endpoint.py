"""The endpoint actor: owns the DHT node and its UDP sockets, and hands channels to who asks."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from dataclasses import dataclass, field
from math import inf
from typing import Any, cast

from msgspec import Struct
from thespian.actors import ActorAddress

from ..transport.channel import Channel
from ..transport.dht.endpoint import Endpoint, EndpointConfig, Listener
from ..transport.dht.timings import Timings
from ..transport.errors import HyperseaportError
from ..transport.keys import KeyPair
from .actor import Actor, Address, Down, ExitReason, handles
from .console import tell
from .messages import (
    Accepted,
    Announced,
    AnnounceTopic,
    BorrowForwarder,
    Connect,
    Connected,
    ConnectFailed,
    Describe,
    Described,
    EndpointReady,
    Examine,
    Examined,
    ForwarderBorrowed,
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


class _Bootstrapped(Struct, frozen=True):
    pass


class _Reannounce(Struct, frozen=True):
    topic: bytes


class _NetworkChanged(Struct, frozen=True):
    pass


class _CheckHandovers(Struct, frozen=True):
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
        # What is over is nobody's any more, and not kept for this.
        self._handovers: deque[tuple[float, weakref.ref[Channel]]] = deque()
        self.run(self._open(args), lambda _none: _Bootstrapped())

    async def _open(self, args: EndpointConfig) -> None:
        self._endpoint = await Endpoint.open(args)
        # Here and not in a handler: a message to a dead actor would leave the sockets open.
        self.own(self._endpoint.kill)
        self._endpoint.core.on_network_change.append(
            lambda _now: self.send(self.myAddress, _NetworkChanged())
        )
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

    # Looking in, also before it is ready

    @handles(Measure)
    def _measure(self, _message: Measure, sender: ActorAddress) -> None:
        endpoint = self._endpoint
        self.send(sender, Measured({} if endpoint is None else endpoint.metrics()))

    @handles(Describe)
    def _describe(self, _message: Describe, sender: ActorAddress) -> None:
        fields: dict[str, Any] = {}
        if self._endpoint is not None:
            node = self._endpoint.core.node
            fields = {
                "address": ":".join(map(str, self._endpoint.address)),
                "firewalled": node.firewalled,
                # In its routing table.
                "nodes": len(node.table),
                # Seconds since bytes last moved through a pipe; None for never.
                "traffic_age_s": _age(self._endpoint.piped_at, self.now),
            }
        self.send(sender, Described(fields))

    @handles(Examine)
    def _examine(self, _message: Examine, sender: ActorAddress) -> None:
        self.run(self._examine_for(sender))

    async def _examine_for(self, sender: ActorAddress) -> None:
        self.send(sender, Examined(await self._node.examine()))

    # Connections to others

    @handles(Connect)
    def _connect(self, message: Connect, sender: ActorAddress) -> None:
        def opened(channel: Channel, timings: Timings | None) -> None:
            self._hand_over(channel, sender, Connected(channel, timings))

        def failed(error: Exception) -> None:
            self.send(sender, ConnectFailed(error))

        try:
            self._node.dial(
                message.public_key, message.key_pair, opened, failed, message.relay_through
            )
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
            self._hand_over(channel, receiver, Accepted(channel))

        try:
            listener = await self._node.listen(
                message.key_pair,
                deliver,
                allow=message.allow,
                relay_through=message.relay_through,
                allow_relays=message.allow_relays,
            )
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

    @handles(_NetworkChanged)
    def _network_changed(self, _message: _NetworkChanged, _sender: ActorAddress) -> None:
        """We came back, moved or woke up: what was announced may be forgotten, or name a place
        where we are not. The node does this by itself for keys that listen."""
        node = self._node
        self.log.info("endpoint.network", hosts=node.core.local_hosts, online=node.core.node.online)
        for topic, key_pair in self._topics.items():
            self.run(node.announce(topic, key_pair))

    @handles(BorrowForwarder)
    def _lend_forwarder(self, _message: BorrowForwarder, sender: ActorAddress) -> None:
        self.send(sender, ForwarderBorrowed(self._node.core.mux.forwarder))

    # Channels under way

    def _hand_over(
        self, channel: Channel, receiver: ActorAddress, message: Connected | Accepted
    ) -> None:
        if not cast(Address, receiver).alive:
            # Its peer shall not wait for `HANDOVER` to be over.
            channel.abort()
            return
        self.send(receiver, message)
        if not self._handovers:
            self.after(HANDOVER, _CheckHandovers())
        self._handovers.append((self.now + HANDOVER, weakref.ref(channel)))

    @handles(_CheckHandovers)
    def _check_handovers(self, _message: _CheckHandovers, _sender: ActorAddress) -> None:
        while self._handovers and self._handovers[0][0] <= self.now:
            channel = self._handovers.popleft()[1]()
            if channel is not None and not channel.has_protocol:
                channel.abort()
        if self._handovers:
            self.after(self._handovers[0][0] - self.now, _CheckHandovers())


def _age(when: float, now: float) -> float | None:
    return None if when == -inf else round(max(now - when, 0.0), 3)
