"""Relaying of handshakes and holepunch messages between clients and servers (spec: hyperdht 3.7,
3.8).

A relay keeps no state for a handshake, retries nothing and verifies nothing. What it passes on
leaves from the socket on which it came.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..errors import DecodeError
from ..transmit import Address
from .limiter import Limiter
from .messages import PEER_HANDSHAKE, PEER_HOLEPUNCH, HandshakeMessage, HolepunchMessage, Mode
from .store import Forwards
from .wire import Request

#: Messages a second that one host can have us send to addresses of its choice: forwarding asks for
#: no proof that anybody there wants it (spec: hyperdht 9.1, pitfall 28). A host behind which many
#: connects happen sends three or four messages for each.
FORWARDS_PER_SECOND = 4000.0
FORWARDS_BURST = 8000.0


@dataclass(slots=True)
class Incoming:
    """A handshake that reached the node whose server it is for."""

    #: Noise message 1.
    noise: bytes
    #: The client as the relay sees it, or as we do when it came straight.
    client_address: Address
    #: Whether it came straight from the client.
    direct: bool
    #: Our address as the sender wrote it.
    server_address: Address
    #: Who sent us this datagram, and the socket it arrived on.
    sender: Address
    socket: int


@dataclass(slots=True)
class IncomingPunch:
    """A message about punching that reached the node whose server it is for."""

    message: HolepunchMessage
    #: The client's punching socket, as the relay sees it.
    client_address: Address
    #: The relay.
    sender: Address


#: Sends a sealed payload back: (payload, socket, now). The socket's mapping is what the relay, and
#: then the client, gets to see.
PunchAnswer = Callable[[bytes, int, float], None]


class Acceptor(Protocol):
    """A server, as the router sees it."""

    def on_handshake(self, incoming: Incoming, answer: Callable[[bytes], None], now: float) -> None:
        """Take a handshake; call ``answer`` at most once with Noise message 2."""

    def on_holepunch(self, incoming: IncomingPunch, answer: PunchAnswer, now: float) -> None:
        """Take a message about punching; call ``answer`` at most once, now or later."""


class Relay(Protocol):
    """What a router needs of a `Node`."""

    def reply(
        self,
        request: Request,
        now: float,
        *,
        value: bytes | None = None,
        error: int = 0,
        token: bool = True,
        closer_nodes: bool = True,
        socket: int | None = None,
        to: Address | None = None,
    ) -> None:
        """Answer a request, to another address if given."""

    def forward(
        self, request: Request, to: Address, value: bytes, now: float, *, socket: int | None = None
    ) -> None:
        """Send the request on with another value."""


class Router:
    """Every node has one, persistent or not."""

    __slots__ = ("_forwards", "_limiter", "_node", "_servers", "dropped")

    def __init__(self, node: Relay, forwards: Forwards) -> None:
        self._node = node
        self._forwards = forwards
        self._servers: dict[bytes, Acceptor] = {}
        self._limiter = Limiter(FORWARDS_PER_SECOND, FORWARDS_BURST)
        #: Messages that fitted nowhere or were too many.
        self.dropped = 0

    def serve(self, target: bytes, server: Acceptor) -> None:
        """Hand handshakes for ``target`` to a server of this node."""
        self._servers[target] = server

    def unserve(self, target: bytes) -> None:
        self._servers.pop(target, None)

    def on_request(self, request: Request, now: float) -> bool:
        """Pass on, answer or drop. False if the command is none of a router's."""
        if request.command == PEER_HANDSHAKE:
            handle = self._handshake
        elif request.command == PEER_HOLEPUNCH:
            handle = self._holepunch
        else:
            return False
        try:
            handled = request.target is not None and handle(request, request.target, now)
        except DecodeError:
            handled = False
        if not handled:
            self.dropped += 1
        return True

    def _handshake(self, request: Request, target: bytes, now: float) -> bool:
        if request.value is None:
            return False
        message = HandshakeMessage.decode(request.value)
        server = self._servers.get(target)
        if server is not None:
            return self._accept(server, request, message, now)
        match message.mode:
            case Mode.FROM_CLIENT:
                return self._from_client(request, target, message, now)
            case Mode.FROM_RELAY:
                forward = self._forwards.get(target, now)
                if forward is None or message.peer_address is None:
                    return False
                second = HandshakeMessage(
                    Mode.FROM_SECOND_RELAY, message.noise, message.peer_address, request.source
                )
                return self._forward(request, forward.address, second.encode(), now)
            case Mode.FROM_SERVER:
                reply = HandshakeMessage(Mode.REPLY, message.noise, request.source)
                return self._answer_client(request, message.peer_address, reply.encode(), now)
        return False

    def _from_client(
        self, request: Request, target: bytes, message: HandshakeMessage, now: float
    ) -> bool:
        next_hop = message.relay_address
        if next_hop is None:
            forward = self._forwards.get(target, now)
            if forward is None:
                self._node.reply(request, now, token=False)
                return True
            next_hop = forward.address
        onward = HandshakeMessage(Mode.FROM_RELAY, message.noise, request.source)
        return self._forward(request, next_hop, onward.encode(), now)

    def _accept(
        self, server: Acceptor, request: Request, message: HandshakeMessage, now: float
    ) -> bool:
        client = message.peer_address
        match message.mode:
            case Mode.FROM_CLIENT:
                client, return_to = request.source, None
            case Mode.FROM_RELAY:
                return_to = request.source
            case Mode.FROM_SECOND_RELAY if message.relay_address is not None:
                return_to = message.relay_address
            case _:
                return False
        if client is None or client[1] == 0:
            return False

        def answer(noise: bytes) -> None:
            if return_to is None:
                value = HandshakeMessage(Mode.REPLY, noise).encode()
                self._node.reply(request, now, value=value, token=False, closer_nodes=False)
                return
            # A request, not a response: only so does the relay pass it on (spec: hyperdht 9.1,
            # pitfall 4).
            value = HandshakeMessage(Mode.FROM_SERVER, noise, client).encode()
            self._node.forward(request, return_to, value, now)

        incoming = Incoming(
            message.noise,
            client,
            return_to is None,
            request.to,
            request.source,
            request.socket,
        )
        server.on_handshake(incoming, answer, now)
        return True

    def _holepunch(self, request: Request, target: bytes, now: float) -> bool:
        if request.value is None:
            return False
        message = HolepunchMessage.decode(request.value)
        if message.mode == Mode.FROM_CLIENT:
            next_hop = message.peer_address
            if next_hop is None:
                forward = self._forwards.get(target, now)
                if forward is None:
                    return False
                next_hop = forward.address
            onward = HolepunchMessage(Mode.FROM_RELAY, message.id, message.payload, request.source)
            return self._forward(request, next_hop, onward.encode(), now)
        if message.mode == Mode.FROM_SERVER:
            reply = HolepunchMessage(Mode.REPLY, message.id, message.payload, request.source)
            return self._answer_client(request, message.peer_address, reply.encode(), now)
        server = self._servers.get(target)
        client = message.peer_address
        if message.mode != Mode.FROM_RELAY or server is None or client is None or client[1] == 0:
            return False

        def answer(payload: bytes, socket: int, now: float) -> None:
            # A request, as with handshakes, and with the number 0 (spec: hyperdht 3.8).
            value = HolepunchMessage(Mode.FROM_SERVER, 0, payload, client).encode()
            self._node.forward(request, request.source, value, now, socket=socket)

        server.on_holepunch(IncomingPunch(message, client, request.source), answer, now)
        return True

    def _forward(self, request: Request, to: Address, value: bytes, now: float) -> bool:
        if to[1] == 0 or not self._limiter.take(request.source[0], now):
            return False
        self._node.forward(request, to, value, now)
        return True

    def _answer_client(
        self, request: Request, client: Address | None, value: bytes, now: float
    ) -> bool:
        if client is None or client[1] == 0:
            return False
        if not self._limiter.take(request.source[0], now):
            return False
        self._node.reply(request, now, value=value, token=False, closer_nodes=False, to=client)
        return True
