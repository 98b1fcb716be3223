from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hyperseaport.transport.dht import messages, router
from hyperseaport.transport.dht.messages import HandshakeMessage, HolepunchMessage, Mode
from hyperseaport.transport.dht.router import Incoming, IncomingPunch, PunchAnswer, Router
from hyperseaport.transport.dht.store import Forward, Forwards
from hyperseaport.transport.dht.wire import Request
from hyperseaport.transport.transmit import Address

TARGET = bytes([9]) * 32
SELF = ("5.0.0.1", 1000)
CLIENT = ("5.0.0.2", 2000)
SERVER = ("5.0.0.3", 3000)
RELAY = ("5.0.0.4", 4000)
NOISE = b"noise"


class FakeNode:
    """Takes down what a router sends."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Address, bytes | None]] = []
        self.options: dict[str, Any] = {}
        self.sockets: list[int | None] = []

    def reply(self, request: Request, now: float, **options: Any) -> None:
        to = options.pop("to", None) or request.source
        self.sent.append(("reply", to, options.pop("value", None)))
        self.options = options

    def forward(
        self, request: Request, to: Address, value: bytes, now: float, *, socket: int | None = None
    ) -> None:
        self.sockets.append(socket)
        self.sent.append(("forward", to, value))


class FakeServer:
    def __init__(self, noise: bytes | None = b"noise 2") -> None:
        self.noise = noise
        self.incoming: list[Incoming] = []
        self.punches: list[tuple[IncomingPunch, PunchAnswer]] = []

    def on_holepunch(self, incoming: IncomingPunch, answer: PunchAnswer, now: float) -> None:
        self.punches.append((incoming, answer))

    def on_handshake(self, incoming: Incoming, answer: Callable[[bytes], None], now: float) -> None:
        self.incoming.append(incoming)
        if self.noise is not None:
            answer(self.noise)


class Fixture:
    def __init__(self, *, forward: bool = False) -> None:
        self.node = FakeNode()
        self.forwards = Forwards()
        self.router = Router(self.node, self.forwards)
        if forward:
            self.forwards.put(TARGET, Forward(b"record", SERVER), 0.0)

    def ask(
        self,
        message: HandshakeMessage | HolepunchMessage | bytes,
        source: Address,
        *,
        target: bytes | None = TARGET,
        now: float = 0.0,
    ) -> list[tuple[str, Address, Any]]:
        """What is sent, with messages decoded."""
        command = messages.PEER_HANDSHAKE
        if isinstance(message, HolepunchMessage):
            command = messages.PEER_HOLEPUNCH
        value = message if isinstance(message, bytes) else message.encode()
        self.node.sent.clear()
        request = Request(7, command, False, target, None, value, None, SELF, source, 3)
        assert self.router.on_request(request, now)
        decode = type(message).decode if not isinstance(message, bytes) else HandshakeMessage.decode
        return [(kind, to, v and decode(v)) for kind, to, v in self.node.sent]


def test_from_client_is_forwarded_to_the_announced_address() -> None:
    """Checklist 29."""
    sent = Fixture(forward=True).ask(HandshakeMessage(Mode.FROM_CLIENT, NOISE), CLIENT)
    assert sent == [("forward", SERVER, HandshakeMessage(Mode.FROM_RELAY, NOISE, CLIENT))]


def test_from_client_may_name_the_next_relay() -> None:
    message = HandshakeMessage(Mode.FROM_CLIENT, NOISE, None, RELAY)
    sent = Fixture(forward=True).ask(message, CLIENT)
    assert sent == [("forward", RELAY, HandshakeMessage(Mode.FROM_RELAY, NOISE, CLIENT))]


def test_from_client_without_a_forward_gets_closer_nodes_only() -> None:
    """Checklist 32."""
    fixture = Fixture()
    sent = fixture.ask(HandshakeMessage(Mode.FROM_CLIENT, NOISE), CLIENT)
    assert sent == [("reply", CLIENT, None)]
    assert fixture.node.options == {"token": False}


def test_from_server_becomes_a_reply_to_the_client() -> None:
    """Checklist 30."""
    fixture = Fixture()
    sent = fixture.ask(HandshakeMessage(Mode.FROM_SERVER, NOISE, CLIENT), SERVER)
    assert sent == [("reply", CLIENT, HandshakeMessage(Mode.REPLY, NOISE, SERVER))]
    assert fixture.node.options == {"token": False, "closer_nodes": False}


def test_from_relay_goes_on_to_the_announced_address() -> None:
    """Checklist 31."""
    message = HandshakeMessage(Mode.FROM_RELAY, NOISE, CLIENT)
    sent = Fixture(forward=True).ask(message, RELAY)
    onward = HandshakeMessage(Mode.FROM_SECOND_RELAY, NOISE, CLIENT, RELAY)
    assert sent == [("forward", SERVER, onward)]


def test_what_fits_nowhere_is_dropped() -> None:
    fixture = Fixture()
    wrong: list[HandshakeMessage | HolepunchMessage | bytes] = [
        HandshakeMessage(Mode.FROM_RELAY, NOISE, CLIENT),
        HandshakeMessage(Mode.FROM_SECOND_RELAY, NOISE, CLIENT, RELAY),
        HandshakeMessage(Mode.FROM_SERVER, NOISE),
        HandshakeMessage(Mode.FROM_SERVER, NOISE, ("1.2.3.4", 0)),
        HandshakeMessage(Mode.FROM_CLIENT, NOISE, None, ("1.2.3.4", 0)),
        HandshakeMessage(Mode.REPLY, NOISE, CLIENT),
        HolepunchMessage(Mode.FROM_CLIENT, 1, b"p"),
        HolepunchMessage(Mode.FROM_SERVER, 1, b"p"),
        HolepunchMessage(Mode.FROM_RELAY, 1, b"p", CLIENT),
        HolepunchMessage(Mode.REPLY, 1, b"p", CLIENT),
        b"",
        b"\x00\x09\x00",
    ]
    for message in wrong:
        assert fixture.ask(message, CLIENT) == []
    assert fixture.ask(HandshakeMessage(Mode.FROM_CLIENT, NOISE), CLIENT, target=None) == []
    assert fixture.router.dropped == len(wrong) + 1


def test_a_server_answers_its_client_directly() -> None:
    fixture, server = Fixture(forward=True), FakeServer()
    fixture.router.serve(TARGET, server)
    sent = fixture.ask(HandshakeMessage(Mode.FROM_CLIENT, NOISE), CLIENT)
    assert sent == [("reply", CLIENT, HandshakeMessage(Mode.REPLY, b"noise 2"))]
    assert fixture.node.options == {"token": False, "closer_nodes": False}
    assert server.incoming == [Incoming(NOISE, CLIENT, True, SELF, CLIENT, 3)]


def test_a_server_answers_through_the_relay_with_a_request() -> None:
    fixture, server = Fixture(), FakeServer()
    fixture.router.serve(TARGET, server)
    answer = HandshakeMessage(Mode.FROM_SERVER, b"noise 2", CLIENT)
    sent = fixture.ask(HandshakeMessage(Mode.FROM_RELAY, NOISE, CLIENT), RELAY)
    assert sent == [("forward", RELAY, answer)]
    second = HandshakeMessage(Mode.FROM_SECOND_RELAY, NOISE, CLIENT, RELAY)
    assert fixture.ask(second, SERVER) == [("forward", RELAY, answer)]
    assert server.incoming == [
        Incoming(NOISE, CLIENT, False, SELF, RELAY, 3),
        Incoming(NOISE, CLIENT, False, SELF, SERVER, 3),
    ]
    for message in (
        HandshakeMessage(Mode.FROM_RELAY, NOISE),
        HandshakeMessage(Mode.FROM_RELAY, NOISE, ("1.2.3.4", 0)),
        HandshakeMessage(Mode.FROM_SECOND_RELAY, NOISE, CLIENT),
        HandshakeMessage(Mode.FROM_SERVER, NOISE, CLIENT),
        HandshakeMessage(Mode.REPLY, NOISE),
    ):
        assert fixture.ask(message, RELAY) == []
    assert len(server.incoming) == 2
    fixture.router.unserve(TARGET)
    assert fixture.ask(second, SERVER) == []


def test_a_silent_server_sends_nothing() -> None:
    fixture = Fixture()
    fixture.router.serve(TARGET, FakeServer(None))
    assert fixture.ask(HandshakeMessage(Mode.FROM_CLIENT, NOISE), CLIENT) == []


def test_holepunch_prefers_the_named_address() -> None:
    """Checklist 33."""
    fixture = Fixture(forward=True)
    onward = HolepunchMessage(Mode.FROM_RELAY, 4, b"p", CLIENT)
    sent = fixture.ask(HolepunchMessage(Mode.FROM_CLIENT, 4, b"p", RELAY), CLIENT)
    assert sent == [("forward", RELAY, onward)]
    sent = fixture.ask(HolepunchMessage(Mode.FROM_CLIENT, 4, b"p"), CLIENT)
    assert sent == [("forward", SERVER, onward)]


def test_holepunch_from_the_server_becomes_a_reply() -> None:
    sent = Fixture().ask(HolepunchMessage(Mode.FROM_SERVER, 0, b"p", CLIENT), SERVER)
    assert sent == [("reply", CLIENT, HolepunchMessage(Mode.REPLY, 0, b"p", SERVER))]


def test_holepunch_for_a_server_is_answered_from_the_socket_it_names() -> None:
    """3.8: through the relay, as a request with the number 0; now or later."""
    fixture, server = Fixture(), FakeServer()
    fixture.router.serve(TARGET, server)
    message = HolepunchMessage(Mode.FROM_RELAY, 5, b"p", CLIENT)
    assert fixture.ask(message, RELAY) == []
    ((incoming, answer),) = server.punches
    assert incoming == IncomingPunch(message, CLIENT, RELAY)
    answer(b"sealed", 12, 1.0)
    value = HolepunchMessage(Mode.FROM_SERVER, 0, b"sealed", CLIENT).encode()
    assert fixture.node.sent == [("forward", RELAY, value)]
    assert fixture.node.sockets == [12]
    for wrong in (
        HolepunchMessage(Mode.FROM_RELAY, 5, b"p"),
        HolepunchMessage(Mode.FROM_RELAY, 5, b"p", ("1.2.3.4", 0)),
        HolepunchMessage(Mode.FROM_SECOND_RELAY, 5, b"p", CLIENT),
        HolepunchMessage(Mode.REPLY, 5, b"p", CLIENT),
    ):
        assert fixture.ask(wrong, RELAY) == []
    assert len(server.punches) == 1
    assert fixture.router.dropped == 4
    # Others' clients are passed on by a server's node as well.
    assert fixture.ask(HolepunchMessage(Mode.FROM_CLIENT, 4, b"p", SERVER), CLIENT)


def test_one_host_cannot_have_everything_forwarded() -> None:
    fixture = Fixture()
    burst = int(router.FORWARDS_BURST)
    message = HolepunchMessage(Mode.FROM_CLIENT, 4, b"p", RELAY)
    passed = sum(bool(fixture.ask(message, ("6.6.6.6", 1 + n % 9))) for n in range(burst + 50))
    assert passed == burst
    assert fixture.ask(message, CLIENT)
    assert fixture.ask(message, ("6.6.6.6", 1), now=1.0)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.binary(max_size=100), st.booleans())
def test_arbitrary_values_are_survived(value: bytes, holepunch: bool) -> None:
    fixture = Fixture(forward=True)
    fixture.router.serve(bytes(32), FakeServer())
    for target in (TARGET, bytes(32), None):
        command = messages.PEER_HOLEPUNCH if holepunch else messages.PEER_HANDSHAKE
        request = Request(7, command, False, target, None, value, None, SELF, CLIENT, 0)
        assert fixture.router.on_request(request, 0.0)
        assert len(fixture.node.sent) <= 3


def test_other_commands_are_not_a_routers() -> None:
    request = Request(7, messages.FIND_PEER, False, TARGET, None, b"", None, SELF, CLIENT, 0)
    assert not Fixture().router.on_request(request, 0.0)
