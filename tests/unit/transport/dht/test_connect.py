from __future__ import annotations

import struct
from random import Random
from typing import Any

import pytest
from support.dht_fakes import FakeNode, FakeRequest, context, reply

from hyperseaport.transport import keys
from hyperseaport.transport.dht import connect, lanes
from hyperseaport.transport.dht.addresses import node_id
from hyperseaport.transport.dht.connect import Attempt
from hyperseaport.transport.dht.context import MAX_REMEMBERED, Connection, Route
from hyperseaport.transport.dht.messages import (
    FIND_PEER,
    PEER_HANDSHAKE,
    PEER_HOLEPUNCH,
    Firewall,
    HandshakeMessage,
    HolepunchInfo,
    HolepunchMessage,
    Mode,
    NoisePayload,
    PeerRecord,
    Relay,
    UdxInfo,
)
from hyperseaport.transport.dht.store import Forward
from hyperseaport.transport.dht.table import Contact, Table
from hyperseaport.transport.dht.wire import PING, Reply
from hyperseaport.transport.errors import (
    ConnectError,
    InvalidInput,
    PeerNotFound,
    PeerUnreachable,
)
from hyperseaport.transport.keys import KeyPair
from hyperseaport.transport.noise import Handshake, Responder
from hyperseaport.transport.transmit import CLIENT_SOCKET, SERVER_SOCKET, Address

SERVER_KEYS = KeyPair.from_seed(bytes([1]) * 32)
KEYS = KeyPair.from_seed(bytes([2]) * 32)
KEY = SERVER_KEYS.public_key
TARGET = keys.target(KEY)
RECORD = PeerRecord(KEY).encode()
RELAYS = [(f"5.0.0.{n}", 49737) for n in range(1, 7)]
#: The server as its relay sees it, and where it says it is.
SERVER = ("8.0.0.1", 8000)
UDX = UdxInfo(99)


class Fixture:
    def __init__(self) -> None:
        self.node = FakeNode()
        self.context = context(self.node)
        self.opened: list[Connection] = []
        self.failed: list[Exception] = []

    def connect(self, *relays: Address, key: bytes = KEY) -> Attempt:
        attempt = Attempt(
            self.context,
            key,
            KEYS,
            on_open=lambda connection, _now: self.opened.append(connection),
            on_error=lambda error, _now: self.failed.append(error),
        )
        attempt.start(relays, self.node.now)
        return attempt

    @property
    def asked(self) -> list[FakeRequest]:
        """Handshakes that wait for an answer."""
        # PING has the same number, in another space.
        asked = self.node.asked(PEER_HANDSHAKE)
        return [request for request in asked if not request.options.get("internal")]

    def find(self, *nodes: Address) -> None:
        """The query finds nodes with the record."""
        for node in nodes:
            self.node.queries[-1].options["on_reply"](reply(node, RECORD), self.node.now)

    def answer(
        self, payload: NoisePayload | bytes, *, server: Address | None = SERVER, index: int = 0
    ) -> Handshake:
        """The server answers one of the handshakes."""
        request = self.asked[index]
        value, handshake = serve(request, payload, server)
        self.node.answer(request, reply(request.to, value))
        return handshake

    @property
    def stream_id(self) -> int:
        """The id that the server gets to know."""
        first = next(r for r in self.node.requests if r.command == PEER_HANDSHAKE)
        payload, _ = read(first)
        assert payload.udx is not None
        return payload.udx.id

    def packet(self, stream_id: int, socket: int, source: Address, kind: int = 32) -> None:
        packet = struct.pack("<BBBBIIII", 0xFF, 1, kind, 0, stream_id, 1 << 20, 0, 0)
        assert self.context.mux.receive(packet, socket, source, self.node.now)


def read(request: FakeRequest) -> tuple[NoisePayload, Responder]:
    message = HandshakeMessage.decode(request.options["value"])
    assert (message.mode, message.peer_address) == (Mode.FROM_CLIENT, None)
    assert request.options["target"] == TARGET
    responder = Responder(
        SERVER_KEYS, prologue=keys.NS_PEER_HANDSHAKE, ephemeral_seed=bytes([8]) * 32
    )
    return NoisePayload.decode(responder.read(message.noise)), responder


def serve(
    request: FakeRequest, payload: NoisePayload | bytes, server: Address | None
) -> tuple[bytes, Handshake]:
    _, responder = read(request)
    plain = payload if isinstance(payload, bytes) else payload.encode()
    noise, handshake = responder.message(plain)
    return HandshakeMessage(Mode.REPLY, noise, server).encode(), handshake


def only(connections: list[Connection]) -> tuple[int, Address, int | None]:
    (connection,) = connections
    stream = connection.stream
    assert stream.connected
    assert stream.address == connection.remote_address
    return stream.socket, stream.address, stream.remote_id


# Finding the server


def test_the_first_message() -> None:
    fixture = Fixture()
    fixture.connect()
    (query,) = fixture.node.queries
    assert (query.target, query.command, query.options["retries"]) == (TARGET, FIND_PEER, 3)
    fixture.find(RELAYS[0])
    payload, responder = read(fixture.asked[0])
    assert responder.remote_public_key == KEYS.public_key
    assert (payload.firewall, payload.addresses4) == (
        Firewall.UNKNOWN,
        (("192.168.1.10", 49737),),
    )
    assert payload.secret_stream
    assert payload.holepunch is None
    assert payload.relay_addresses is None


def test_two_handshakes_run_in_parallel_with_the_same_bytes() -> None:
    fixture = Fixture()
    fixture.connect()
    fixture.find(*RELAYS[:4])
    assert [request.to for request in fixture.asked] == RELAYS[:2]
    assert fixture.asked[0].options["value"] == fixture.asked[1].options["value"]
    fixture.node.answer(fixture.asked[0], reply(RELAYS[0]))
    assert [request.to for request in fixture.asked] == [RELAYS[1], RELAYS[2]]
    fixture.node.wait(lanes.STAGGER)
    assert len(fixture.asked) == 3


def test_records_of_others_are_not_used() -> None:
    fixture = Fixture()
    fixture.connect()
    for value in (None, b"", b"short", PeerRecord(KEYS.public_key).encode()):
        fixture.node.queries[0].options["on_reply"](reply(RELAYS[0], value), 0.0)
    assert not fixture.asked
    fixture.node.finish(fixture.node.queries[0])
    assert isinstance(fixture.failed[0], PeerNotFound)
    assert len(fixture.context.mux) == 0
    assert fixture.node.timers.deadline() is None


def test_remembered_relays_come_first_and_without_a_query() -> None:
    """Checklist 58."""
    fixture = Fixture()
    fixture.context.remember_relays(KEY, tuple(RELAYS[:3]))
    fixture.connect()
    assert [request.to for request in fixture.asked] == RELAYS[:1]
    assert not fixture.node.queries
    fixture.node.wait(lanes.STAGGER)
    assert [request.to for request in fixture.asked] == RELAYS[:2]
    assert len(fixture.node.queries) == 1
    fixture.find(RELAYS[0], RELAYS[5])
    assert [request.to for request in fixture.asked] == [*RELAYS[:2], RELAYS[5]]


def test_relays_that_know_nothing_lead_to_a_query_at_once() -> None:
    fixture = Fixture()
    fixture.connect(*RELAYS[:2])
    fixture.node.answer(fixture.asked[0], reply(RELAYS[0]))
    fixture.node.answer(fixture.asked[0], reply(RELAYS[1], error=1))
    assert len(fixture.node.queries) == 1
    assert not fixture.failed


def test_the_route_of_an_earlier_connection_comes_first() -> None:
    fixture = Fixture()
    fixture.context.remember_relays(KEY, tuple(RELAYS[:3]))
    fixture.context.remember_route(KEY, Route(SERVER_SOCKET, SERVER))
    fixture.connect()
    (request,) = fixture.asked
    assert (request.to, request.options["socket"]) == (SERVER, SERVER_SOCKET)
    fixture.node.answer(request, None)
    assert KEY not in fixture.context.routes
    assert [request.to for request in fixture.asked] == RELAYS[:1]
    assert fixture.asked[0].options["socket"] is None


def test_a_route_that_others_overtake_is_forgotten() -> None:
    fixture = Fixture()
    fixture.context.remember_relays(KEY, tuple(RELAYS[:1]))
    fixture.context.remember_route(KEY, Route(SERVER_SOCKET, ("8.0.0.9", 1)))
    fixture.connect()
    fixture.node.wait(lanes.STAGGER)
    assert [request.to for request in fixture.asked] == [("8.0.0.9", 1), RELAYS[0]]
    fixture.answer(NoisePayload(firewall=Firewall.OPEN, udx=UDX), index=1)
    assert only(fixture.opened) == (CLIENT_SOCKET, SERVER, 99)
    assert not fixture.context.routes


def test_a_relay_of_the_server_asks_it_straight() -> None:
    fixture = Fixture()
    fixture.node.ephemeral = False
    fixture.context.forwards.put(TARGET, Forward(RECORD, SERVER), 0.0)
    fixture.connect(*RELAYS)
    assert [request.to for request in fixture.asked] == [SERVER]


def test_nodes_are_bounded() -> None:
    fixture = Fixture()
    fixture.connect()
    fixture.find(*((f"9.0.0.{n}", 1) for n in range(200)))
    answered = 0
    while fixture.asked:
        fixture.node.answer(fixture.asked[0], reply(fixture.asked[0].to))
        answered += 1
    assert answered == lanes.MAX_RELAYS
    fixture.node.finish(fixture.node.queries[0])
    assert isinstance(fixture.failed[0], PeerUnreachable)


def test_a_server_that_is_silent() -> None:
    fixture = Fixture()
    fixture.connect()
    fixture.find(*RELAYS[:3])
    fixture.node.finish(fixture.node.queries[0])
    while fixture.asked:
        assert not fixture.failed
        fixture.node.answer(fixture.asked[0], None)
    assert isinstance(fixture.failed[0], PeerUnreachable)
    assert fixture.node.timers.deadline() is None


def test_nothing_takes_longer_than_the_limit() -> None:
    fixture = Fixture()
    fixture.connect()
    fixture.node.wait(connect.CONNECT_TIMEOUT - 0.1)
    assert not fixture.failed
    fixture.node.wait(0.2)
    assert isinstance(fixture.failed[0], PeerNotFound)
    assert fixture.node.queries[0].cancelled


# Answers


def test_the_first_genuine_answer_wins() -> None:
    """Pitfall 27: a forged answer spoils nothing."""
    fixture = Fixture()
    fixture.connect()
    fixture.find(*RELAYS[:5])
    forged = [
        b"\xff",
        HandshakeMessage(Mode.REPLY, b"").encode(),
        HandshakeMessage(Mode.REPLY, bytes(100)).encode(),
        HandshakeMessage(Mode.FROM_SERVER, bytes(100)).encode(),
    ]
    for value in forged:
        fixture.node.answer(fixture.asked[0], reply(fixture.asked[0].to, value))
    assert not fixture.opened
    fixture.answer(NoisePayload(firewall=Firewall.OPEN, udx=UDX))
    assert only(fixture.opened) == (CLIENT_SOCKET, SERVER, 99)
    assert not fixture.asked
    assert fixture.node.queries[0].cancelled
    assert not fixture.context.attempts
    assert fixture.node.timers.deadline() is None


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (bytes.fromhex("02030405060708"), "version 2"),
        (NoisePayload(error=1), f"refuses this key, {KEYS.public_key.hex()}"),
        (NoisePayload(error=9), "error 9"),
        (NoisePayload(), "refused"),
        (b"\x01", "broken"),
    ],
    ids=["version", "refused", "unknown error", "no udx", "broken"],
)
def test_an_answer_that_cannot_be_used(payload: NoisePayload | bytes, text: str) -> None:
    """Checklist 39."""
    fixture = Fixture()
    fixture.connect()
    fixture.find(*RELAYS[:2])
    fixture.answer(payload)
    (error,) = fixture.failed
    assert isinstance(error, ConnectError)
    assert text in str(error)
    assert len(fixture.context.mux) == 0
    assert not fixture.asked


def test_relays_are_remembered() -> None:
    fixture = Fixture()
    fixture.connect()
    fixture.find(RELAYS[4])
    fixture.answer(NoisePayload(udx=UDX, relay_addresses=tuple(RELAYS[:3])), server=None)
    assert fixture.context.relays[KEY] == tuple(RELAYS[:3])
    other = Fixture()
    other.connect()
    other.find(RELAYS[4])
    other.answer(NoisePayload(udx=UDX), server=None)
    assert other.context.relays[KEY] == (RELAYS[4],)


def test_what_is_remembered_is_bounded() -> None:
    shared = Fixture().context
    for index in range(MAX_REMEMBERED + 5):
        name = index.to_bytes(32, "big")
        shared.remember_relays(name, (SERVER,))
        shared.remember_route(name, Route(0, SERVER))
        shared.remember_relays(bytes(31) + b"\x02", (SERVER,))
    assert len(shared.relays) == len(shared.routes) == MAX_REMEMBERED
    assert bytes(31) + b"\x02" in shared.relays
    assert bytes(31) + b"\x01" not in shared.relays


# Decision


def approach(fixture: Fixture, payload: NoisePayload, **options: Any) -> None:
    fixture.connect()
    fixture.find(RELAYS[0])
    fixture.answer(payload, **options)


def test_a_server_that_answered_itself() -> None:
    fixture = Fixture()
    approach(fixture, NoisePayload(udx=UDX), server=None)
    assert only(fixture.opened) == (CLIENT_SOCKET, RELAYS[0], 99)
    assert not fixture.context.routes


def test_a_reusable_route_is_remembered() -> None:
    fixture = Fixture()
    approach(fixture, NoisePayload(udx=UdxInfo(99, reusable_socket=True)), server=None)
    assert fixture.context.routes[KEY] == Route(CLIENT_SOCKET, RELAYS[0])


def test_an_open_server_is_met_at_its_public_address() -> None:
    fixture = Fixture()
    addresses = (("192.168.7.7", 1), ("8.8.0.1", 2), ("8.8.0.2", 3))
    approach(fixture, NoisePayload(firewall=Firewall.OPEN, addresses4=addresses, udx=UDX))
    assert only(fixture.opened) == (CLIENT_SOCKET, ("8.8.0.1", 2), 99)


def test_a_firewalled_server_is_met_where_a_ping_gets_through() -> None:
    fixture = Fixture()
    approach(fixture, NoisePayload(addresses4=(("8.8.0.1", 2),), udx=UDX))
    first, second = fixture.node.asked(PING)
    assert [first.to, second.to] == [("8.8.0.1", 2), SERVER]
    fixture.node.answer(first, None)
    assert not fixture.failed
    fixture.node.answer(second, reply(SERVER, socket=SERVER_SOCKET))
    assert only(fixture.opened) == (SERVER_SOCKET, SERVER, 99)


def test_no_way_to_a_firewalled_server() -> None:
    fixture = Fixture()
    approach(fixture, NoisePayload(udx=UDX))
    (ping,) = fixture.node.asked(PING)
    fixture.node.answer(ping, None)
    (error,) = fixture.failed
    assert isinstance(error, PeerUnreachable)
    assert len(fixture.context.mux) == 0
    assert fixture.node.timers.deadline() is None


def lan_reply(request: FakeRequest, value: bytes) -> Reply:
    """As a relay outside of the NAT that both share answers."""
    answer = reply(request.to, value)
    answer.to = (SERVER[0], 5555)
    return answer


def test_a_server_behind_the_same_nat_is_tried_inside() -> None:
    """5.3: entries like our own addresses first; nothing reserved, and not too many."""
    fixture = Fixture()
    fixture.connect()
    fixture.find(RELAYS[0])
    inside = (("198.18.0.1", 1), ("10.0.0.1", 2), ("192.168.1.77", 3), ("192.168.2.1", 4))
    request = fixture.asked[0]
    value, _ = serve(request, NoisePayload(addresses4=inside, udx=UDX), SERVER)
    fixture.node.answer(request, lan_reply(request, value))
    pings = fixture.node.asked(PING)
    assert [ping.to for ping in pings] == [SERVER, ("192.168.1.77", 3), ("10.0.0.1", 2)]
    fixture.node.answer(pings[1], reply(pings[1].to))
    assert only(fixture.opened) == (CLIENT_SOCKET, ("192.168.1.77", 3), 99)
    assert not fixture.node.asked(PING)


def test_an_open_client_waits_for_a_server_that_would_punch() -> None:
    fixture = Fixture()
    fixture.node.public = ("7.0.0.1", 49737)
    punch = HolepunchInfo(0, (Relay(RELAYS[0], SERVER),))
    fixture.connect()
    fixture.find(RELAYS[0])
    assert read(fixture.asked[0])[0].firewall == Firewall.OPEN
    stream_id = fixture.stream_id
    fixture.answer(NoisePayload(holepunch=punch, udx=UDX))
    assert not fixture.node.asked(PING)
    fixture.node.wait(9.9)
    assert not fixture.failed
    elsewhere = ("8.0.0.1", 8888)
    fixture.packet(stream_id, SERVER_SOCKET, elsewhere)
    assert only(fixture.opened) == (SERVER_SOCKET, elsewhere, 99)


def test_an_open_client_does_not_wait_forever() -> None:
    fixture = Fixture()
    fixture.node.public = ("7.0.0.1", 49737)
    approach(fixture, NoisePayload(udx=UDX))
    (ping,) = fixture.node.asked(PING)
    fixture.node.answer(ping, None)
    fixture.node.wait(9.9)
    assert not fixture.failed
    fixture.node.wait(0.2)
    assert isinstance(fixture.failed[0], PeerUnreachable)


def test_an_attempt_has_one_timer_until_it_is_given_up() -> None:
    """Also one whose server has answered, and waits for a way to it."""
    fixture = Fixture()
    approach(fixture, NoisePayload(udx=UDX))
    assert fixture.node.asked(PING)
    fixture.node.wait(connect.CONNECT_TIMEOUT - 0.1)
    assert not fixture.failed
    fixture.node.wait(0.2)
    assert isinstance(fixture.failed[0], PeerUnreachable)
    assert fixture.node.timers.deadline() is None


def test_a_packet_before_the_answer_shows_the_way() -> None:
    """Checklist 61."""
    fixture = Fixture()
    fixture.connect()
    fixture.find(RELAYS[0])
    early = ("8.0.0.1", 8888)
    fixture.packet(fixture.stream_id, SERVER_SOCKET, early)
    fixture.packet(fixture.stream_id, CLIENT_SOCKET, ("8.0.0.2", 1))
    assert not fixture.opened
    handshake = fixture.answer(NoisePayload(firewall=Firewall.OPEN, udx=UDX))
    assert only(fixture.opened) == (SERVER_SOCKET, early, 99)
    assert fixture.opened[0].stream.has_received
    assert fixture.opened[0].handshake.hash == handshake.hash


def test_a_stream_that_is_destroyed_before_the_answer() -> None:
    fixture = Fixture()
    fixture.connect()
    fixture.find(RELAYS[0])
    fixture.packet(fixture.stream_id, SERVER_SOCKET, SERVER, kind=16)
    fixture.answer(NoisePayload(firewall=Firewall.OPEN, udx=UDX))
    assert isinstance(fixture.failed[0], PeerUnreachable)
    assert not fixture.opened


# Punching

PUNCH = HolepunchInfo(3, (Relay(RELAYS[0], SERVER), Relay(RELAYS[1], SERVER)))


def test_a_server_behind_a_nat_is_punched() -> None:
    """No PING goes there: it might spoil the mapping that the server is about to make."""
    fixture = Fixture()
    approach(fixture, NoisePayload(holepunch=PUNCH, udx=UDX))
    assert not fixture.node.asked(PING)
    (request,) = fixture.node.asked(PEER_HOLEPUNCH)
    assert request.to == RELAYS[0]
    message = HolepunchMessage.decode(request.options["value"])
    assert (message.id, message.peer_address) == (3, SERVER)
    fixture.context.punches.receive(CLIENT_SOCKET, SERVER, 0.0)
    assert only(fixture.opened) == (CLIENT_SOCKET, SERVER, 99)
    assert not fixture.context.routes
    assert not fixture.node.asked(PEER_HOLEPUNCH)
    assert fixture.node.timers.deadline() is None


def test_a_punch_that_leads_nowhere_says_why() -> None:
    fixture = Fixture()
    approach(fixture, NoisePayload(holepunch=PUNCH, udx=UDX))
    for _ in range(2):
        fixture.node.answer(fixture.node.asked(PEER_HOLEPUNCH)[0], None)
    (error,) = fixture.failed
    assert isinstance(error, PeerUnreachable)
    assert "did it stop?" in str(error)
    assert len(fixture.context.mux) == 0


def lan_approach(fixture: Fixture, inside: tuple[Address, ...]) -> list[FakeRequest]:
    """A server behind the same NAT answers. The PINGs."""
    fixture.connect()
    fixture.find(RELAYS[0])
    request = fixture.asked[0]
    payload = NoisePayload(addresses4=inside, holepunch=PUNCH, udx=UDX)
    fixture.node.answer(request, lan_reply(request, serve(request, payload, SERVER)[0]))
    return fixture.node.asked(PING)


def test_inside_and_punching_race() -> None:
    """Pitfall 24."""
    inside = ("192.168.1.77", 3)
    for first in range(2):
        fixture = Fixture()
        (ping,) = lan_approach(fixture, (inside,))
        assert ping.to == inside
        assert len(fixture.node.asked(PEER_HOLEPUNCH)) == 1
        if first:
            fixture.node.answer(ping, reply(inside))
            assert only(fixture.opened) == (CLIENT_SOCKET, inside, 99)
        else:
            fixture.context.punches.receive(CLIENT_SOCKET, SERVER, 0.0)
            assert only(fixture.opened) == (CLIENT_SOCKET, SERVER, 99)
        assert not fixture.node.asked(PING)
        assert not fixture.node.asked(PEER_HOLEPUNCH)
        assert len(fixture.context.mux) == 1


def test_neither_inside_nor_punching() -> None:
    fixture = Fixture()
    (ping,) = lan_approach(fixture, (("192.168.1.77", 3),))
    for _ in range(2):
        fixture.node.answer(fixture.node.asked(PEER_HOLEPUNCH)[0], None)
    assert not fixture.failed
    fixture.node.answer(ping, None)
    assert len(fixture.failed) == 1


def test_nobody_connects_to_itself() -> None:
    """Inner addresses are the same behind many NATs."""
    fixture = Fixture()
    (own,) = fixture.context.addresses()
    assert not lan_approach(fixture, (own,))


def test_connects_to_one_server_share_a_path() -> None:
    fixture = Fixture()
    for _ in range(3):
        fixture.connect()
        fixture.find(RELAYS[0])
        fixture.answer(NoisePayload(holepunch=PUNCH, udx=UDX))
    unanswered = fixture.connect()
    assert len(fixture.node.asked(PEER_HOLEPUNCH)) == 3
    fixture.context.punches.receive(CLIENT_SOCKET, SERVER, 0.0)
    assert len(fixture.opened) == 3
    assert {only([connection])[1] for connection in fixture.opened} == {SERVER}
    assert not unanswered.done
    assert len(fixture.context.punches) == 0


def test_a_punched_route_is_no_reason_to_wait() -> None:
    fixture = Fixture()
    fixture.context.remember_relays(KEY, tuple(RELAYS[:3]))
    fixture.context.remember_route(KEY, Route(CLIENT_SOCKET, SERVER, punched=True))
    fixture.connect()
    assert [request.to for request in fixture.asked] == [SERVER, RELAYS[0]]
    fixture.answer(NoisePayload(udx=UdxInfo(99, reusable_socket=True)), server=None)
    assert fixture.context.routes[KEY].punched


def test_a_route_over_a_socket_that_is_gone() -> None:
    fixture = Fixture()
    fixture.context.remember_route(KEY, Route(77, SERVER))
    fixture.connect()
    assert not fixture.asked
    assert not fixture.context.routes


def test_nodes_of_a_small_network_are_asked_at_once() -> None:
    fixture = Fixture()
    nodes = [(f"9.0.0.{n}", 49737) for n in range(1, 8)]
    table = Table(bytes(32))
    for node in nodes:
        table.add(Contact(node_id(node), node, 0))
    fixture.node.table = table  # type: ignore[assignment]
    fixture.connect()
    nearest = [contact.address for contact in table.nearest(TARGET, lanes.GUESSES)]
    assert [request.to for request in fixture.asked] == nearest
    assert len(fixture.node.queries) == 1
    # They are not asked again, and nothing is missed if they do not know the server.
    fixture.find(nearest[0], next(node for node in nodes if node not in nearest))
    assert len(fixture.asked) == lanes.GUESSES + 1


def test_patience_has_an_end() -> None:
    fixture = Fixture()
    fixture.connect()
    fixture.find(*RELAYS[:6])
    fixture.node.finish(fixture.node.queries[0])
    fixture.node.wait(lanes.PATIENCE - 0.1)
    assert not fixture.failed
    fixture.node.wait(0.2)
    assert isinstance(fixture.failed[0], PeerUnreachable)
    assert not fixture.asked
    assert fixture.node.timers.deadline() is None


# The end


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(32), bytes([2]) + bytes(31)])
def test_what_cannot_be_a_key(key: bytes) -> None:
    """Pitfall 32."""
    fixture = Fixture()
    with pytest.raises(InvalidInput):
        fixture.connect(key=key)
    assert len(fixture.context.mux) == 0
    assert not fixture.context.attempts
    assert fixture.node.timers.deadline() is None


def test_cancel_leaves_nothing_behind() -> None:
    for progress in range(3):
        fixture = Fixture()
        attempt = fixture.connect()
        if progress:
            fixture.find(RELAYS[0])
        if progress == 2:
            fixture.answer(NoisePayload(udx=UDX))
        attempt.cancel(fixture.node.now)
        attempt.cancel(fixture.node.now)
        assert attempt.done
        assert not [request for request in fixture.node.requests if not request.cancelled]
        assert len(fixture.context.mux) == 0
        assert fixture.node.timers.deadline() is None
        assert not fixture.opened
        assert not fixture.failed


def test_arbitrary_answers_are_survived() -> None:
    rng = Random(1)
    fixture = Fixture()
    fixture.connect()
    fixture.find(*RELAYS)
    genuine, _ = serve(fixture.asked[0], NoisePayload(udx=UDX), SERVER)
    for _ in range(len(RELAYS)):
        position = rng.randrange(4, len(genuine) - 6)
        broken = bytearray(genuine)
        broken[position] ^= 1 << rng.randrange(8)
        fixture.node.answer(fixture.asked[0], reply(fixture.asked[0].to, bytes(broken)))
    assert not fixture.opened
    fixture.node.finish(fixture.node.queries[0])
    assert isinstance(fixture.failed[0], PeerUnreachable)
