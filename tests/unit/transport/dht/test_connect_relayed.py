"""A connect that may begin at a blind relay."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from support.dht_fakes import FakeNode, FakeRequest, context, reply
from support.fake_relays import RELAY, RELAY_ID, FakePair, FakeRelays

from hyperseaport.transport import keys
from hyperseaport.transport.dht import connect, relayed
from hyperseaport.transport.dht.connect import Attempt
from hyperseaport.transport.dht.context import Connection, Route
from hyperseaport.transport.dht.messages import (
    PEER_HANDSHAKE,
    PEER_HOLEPUNCH,
    Firewall,
    HandshakeMessage,
    HolepunchInfo,
    Mode,
    NoisePayload,
    Relay,
    RelayThrough,
    UdxInfo,
)
from hyperseaport.transport.dht.wire import PING
from hyperseaport.transport.errors import PeerUnreachable, StreamReset
from hyperseaport.transport.keys import KeyPair
from hyperseaport.transport.noise import Responder
from hyperseaport.transport.transmit import CLIENT_SOCKET, SERVER_SOCKET, Address

SERVER_KEYS = KeyPair.from_seed(bytes([1]) * 32)
KEYS = KeyPair.from_seed(bytes([2]) * 32)
KEY = SERVER_KEYS.public_key
NODE: Address = ("5.0.0.1", 49737)
SERVER: Address = ("8.0.0.1", 8000)
UDX = UdxInfo(99)
NAMED, OTHER = bytes([5]) * 32, bytes([6]) * 32
TOKEN = bytes([9]) * 32
PUNCH = HolepunchInfo(3, (Relay(NODE, SERVER),))
BEHIND = NoisePayload(holepunch=PUNCH, udx=UDX)


class Fixture:
    def __init__(self) -> None:
        self.node = FakeNode()
        self.context = context(self.node)
        self.blind = FakeRelays(self.context)
        self.opened: list[Connection] = []
        self.failed: list[Exception] = []

    def connect(self, *through: bytes, relayable: bool = True) -> Attempt:
        attempt = Attempt(
            self.context,
            KEY,
            KEYS,
            relayable=relayable,
            on_open=lambda connection, _now: self.opened.append(connection),
            on_error=lambda error, _now: self.failed.append(error),
        )
        attempt.start((NODE,), self.node.now, relay_through=through)
        return attempt

    @property
    def asked(self) -> FakeRequest:
        (request,) = self.node.asked(PEER_HANDSHAKE)[:1]
        return request

    def read(self) -> tuple[NoisePayload, Responder]:
        responder = Responder(
            SERVER_KEYS, prologue=keys.NS_PEER_HANDSHAKE, ephemeral_seed=bytes([8]) * 32
        )
        message = HandshakeMessage.decode(self.asked.options["value"])
        return NoisePayload.decode(responder.read(message.noise)), responder

    def answer(self, payload: NoisePayload, server: Address | None = SERVER) -> None:
        _, responder = self.read()
        noise, _ = responder.message(payload.encode())
        request = self.asked
        value = HandshakeMessage(Mode.REPLY, noise, server).encode()
        self.node.answer(request, reply(request.to, value))

    def packet(self, socket: int, source: Address) -> None:
        """The server's, before or after everything else."""
        packet = struct.pack("<BBBBIIII", 0xFF, 1, 32, 0, self.stream_id, 1 << 20, 0, 0)
        assert self.context.mux.receive(packet, socket, source, self.node.now)

    @property
    def stream_id(self) -> int:
        if self.opened:
            return self.opened[0].stream.local_id
        return int(self.blind.asked[0].options["stream_id"])

    def punched(self) -> None:
        self.context.punches.receive(CLIENT_SOCKET, SERVER, self.node.now)

    @property
    def pair(self) -> FakePair:
        (pair,) = self.blind.asked
        return pair


def relays(connection: Connection) -> bool:
    return connection.stream.relayed


def path(connection: Connection) -> tuple[int, Address, int | None]:
    stream = connection.stream
    return stream.socket, stream.address, stream.remote_id


def test_the_relay_is_named_and_asked_at_once() -> None:
    fixture = Fixture()
    fixture.connect(NAMED)
    payload, _ = fixture.read()
    assert payload.relay_through == RelayThrough(NAMED, fixture.pair.token)
    assert payload.udx is not None
    assert fixture.pair.key == NAMED
    assert fixture.pair.initiator
    assert fixture.pair.options["stream_id"] == payload.udx.id


def test_nobody_is_asked_when_none_is_named() -> None:
    fixture = Fixture()
    fixture.connect()
    assert fixture.read()[0].relay_through is None
    fixture.answer(BEHIND)
    assert not fixture.blind.asked


def test_an_open_client_needs_none() -> None:
    fixture = Fixture()
    fixture.node.public = ("7.0.0.1", 49737)
    fixture.connect(NAMED)
    assert fixture.read()[0].relay_through is None
    fixture.answer(NoisePayload(udx=UDX, relay_through=RelayThrough(OTHER, TOKEN)))
    assert not fixture.blind.asked


def test_it_opens_through_the_relay_and_goes_on_to_punch() -> None:
    fixture = Fixture()
    attempt = fixture.connect(NAMED)
    fixture.answer(BEHIND)
    assert not fixture.opened
    fixture.pair.come_about(fixture.node.now)
    (connection,) = fixture.opened
    assert path(connection) == (CLIENT_SOCKET, RELAY, RELAY_ID)
    assert relays(connection)
    assert connection.remote_address == RELAY
    assert connection.timings is not None
    assert connection.timings.how == "relayed"
    assert attempt in fixture.context.attempts
    fixture.punched()
    assert path(connection) == (CLIENT_SOCKET, SERVER, 99)
    assert not relays(connection)
    assert attempt.done
    assert len(fixture.opened) == 1
    assert (fixture.blind.stats.opened, fixture.blind.stats.upgraded) == (1, 1)
    # The peer sees the new path by a message, and is asked whether it does.
    sent = fixture.context.mux.transmits(fixture.node.now)
    assert [(each.address, each.buffers[0][2]) for each in sent] == [(SERVER, 8), (SERVER, 32)]


def test_the_word_of_the_relay_may_come_before_the_answer() -> None:
    fixture = Fixture()
    fixture.connect(NAMED)
    fixture.pair.come_about(fixture.node.now)
    fixture.packet(CLIENT_SOCKET, RELAY)
    assert not fixture.opened
    fixture.answer(BEHIND)
    assert path(fixture.opened[0]) == (CLIENT_SOCKET, RELAY, RELAY_ID)
    assert fixture.opened[0].stream.has_received


@pytest.mark.parametrize("answered", [False, True])
def test_packets_of_the_relay_show_no_direct_path(answered: bool) -> None:
    """They may be faster than its word, or that may be lost."""
    fixture = Fixture()
    fixture.connect(NAMED)
    if answered:
        fixture.answer(BEHIND)
    fixture.packet(CLIENT_SOCKET, RELAY)
    if not answered:
        fixture.answer(BEHIND)
    assert not fixture.opened
    fixture.pair.come_about(fixture.node.now)
    assert path(fixture.opened[0]) == (CLIENT_SOCKET, RELAY, RELAY_ID)


def test_the_choice_of_the_server_wins() -> None:
    fixture = Fixture()
    fixture.connect(NAMED)
    named = RelayThrough(OTHER, TOKEN)
    fixture.answer(NoisePayload(holepunch=PUNCH, udx=UDX, relay_through=named))
    ours, theirs = fixture.blind.asked
    assert ours.released
    assert (theirs.key, theirs.token, theirs.initiator) == (OTHER, TOKEN, False)
    theirs.come_about(fixture.node.now)
    assert len(fixture.opened) == 1


def test_a_connect_to_a_relay_goes_through_none() -> None:
    fixture = Fixture()
    fixture.connect(NAMED, relayable=False)
    assert fixture.read()[0].relay_through is None
    fixture.answer(NoisePayload(holepunch=PUNCH, udx=UDX, relay_through=RelayThrough(OTHER, TOKEN)))
    assert not fixture.blind.asked


def test_a_direct_answer_makes_the_relay_superfluous() -> None:
    for server, payload in (
        (None, NoisePayload(udx=UDX)),
        (SERVER, NoisePayload(firewall=Firewall.OPEN, udx=UDX)),
    ):
        fixture = Fixture()
        fixture.connect(NAMED)
        fixture.answer(payload, server)
        assert fixture.pair.released
        assert not relays(fixture.opened[0])


def test_a_known_route_needs_no_relay_before_the_answer() -> None:
    fixture = Fixture()
    fixture.context.remember_route(KEY, Route(CLIENT_SOCKET, NODE))
    fixture.connect(NAMED)
    assert not fixture.blind.asked
    # The answer came from elsewhere.
    fixture.answer(BEHIND)
    assert fixture.pair.key == NAMED


def test_a_path_before_the_pair() -> None:
    fixture = Fixture()
    fixture.connect(NAMED)
    fixture.answer(BEHIND)
    fixture.punched()
    assert path(fixture.opened[0]) == (CLIENT_SOCKET, SERVER, 99)
    assert fixture.pair.released


def fail_to_punch(fixture: Fixture) -> None:
    fixture.node.answer(fixture.node.asked(PEER_HOLEPUNCH)[0], None)


def test_no_path_is_no_failure_while_a_relay_is_hoped_for() -> None:
    fixture = Fixture()
    attempt = fixture.connect(NAMED)
    fixture.answer(BEHIND)
    fail_to_punch(fixture)
    assert not fixture.failed
    fixture.pair.come_about(fixture.node.now)
    assert relays(fixture.opened[0])
    assert attempt.done
    assert not fixture.context.attempts


def test_neither_a_path_nor_a_relay() -> None:
    for relay_first in (False, True):
        fixture = Fixture()
        fixture.connect(NAMED)
        fixture.answer(BEHIND)
        for relay in (relay_first, not relay_first):
            assert not fixture.failed
            if relay:
                fixture.pair.lose(fixture.node.now)
            else:
                fail_to_punch(fixture)
        (error,) = fixture.failed
        assert isinstance(error, PeerUnreachable)
        assert "did it stop?" in str(error)
        if not relay_first:
            assert "does not come to the relay" in str(error)
        assert len(fixture.context.mux) == 0
        assert fixture.node.timers.deadline() is None


def test_a_relay_that_fails_before_the_answer_is_not_asked_again() -> None:
    fixture = Fixture()
    fixture.connect(NAMED)
    fixture.pair.lose(fixture.node.now)
    fixture.answer(NoisePayload(udx=UDX))
    assert len(fixture.blind.asked) == 1
    fixture.node.answer(fixture.node.asked(PING)[0], None)
    assert len(fixture.failed) == 1


def test_a_limit_of_ours_leaves_the_direct_way() -> None:
    fixture = Fixture()
    fixture.blind.refusing = True
    fixture.connect(NAMED)
    fixture.answer(BEHIND)
    fixture.punched()
    assert len(fixture.opened) == 1


def test_the_peer_may_find_the_path() -> None:
    """Its packets come from elsewhere: on another socket, or on the same."""
    for socket in (CLIENT_SOCKET, SERVER_SOCKET):
        fixture = Fixture()
        attempt = fixture.connect(NAMED)
        fixture.answer(BEHIND)
        fixture.pair.come_about(fixture.node.now)
        elsewhere = ("8.0.0.1", 8888)
        fixture.packet(socket, elsewhere)
        assert path(fixture.opened[0]) == (socket, elsewhere, 99)
        assert attempt.done
        # What the relay still brings is taken, and moves nothing.
        fixture.packet(CLIENT_SOCKET, RELAY)
        assert path(fixture.opened[0]) == (socket, elsewhere, 99)
        assert not fixture.pair.released


def test_the_pair_is_kept_until_the_relay_is_quiet() -> None:
    fixture = Fixture()
    fixture.connect(NAMED)
    fixture.answer(BEHIND)
    fixture.pair.come_about(fixture.node.now)
    fixture.punched()
    # Nothing direct has come yet: it may be that only the relay leads there.
    for _ in range(10):
        fixture.node.wait(1.0)
        fixture.packet(CLIENT_SOCKET, RELAY)
    assert [pair.released for pair in fixture.blind.asked] == [False]
    fixture.node.wait(0.5)
    fixture.packet(CLIENT_SOCKET, SERVER)
    fixture.node.wait(relayed.QUIET + 1.5)
    assert fixture.pair.released
    assert fixture.node.timers.deadline() is None
    stream = fixture.opened[0].stream
    assert (stream.origin, stream.on_close) == (None, None)


def test_a_stream_that_closes_is_unpaired() -> None:
    fixture = Fixture()
    attempt = fixture.connect(NAMED)
    fixture.answer(BEHIND)
    fixture.pair.come_about(fixture.node.now)
    fixture.opened[0].stream.destroy(fixture.node.now)
    fixture.blind.pump(fixture.node.now)
    assert fixture.pair.released
    assert attempt.done
    assert not fixture.node.asked(PEER_HOLEPUNCH)
    assert fixture.node.timers.deadline() is None


def test_a_stream_ends_with_its_relay() -> None:
    """Long before anybody would find that nothing passes any more."""
    fixture = Fixture()
    fixture.connect(NAMED)
    fixture.answer(BEHIND)
    fixture.pair.come_about(fixture.node.now)
    fixture.pair.lose(fixture.node.now)
    fixture.blind.pump(fixture.node.now)
    stream = fixture.opened[0].stream
    assert isinstance(stream.error, StreamReset)
    assert not fixture.failed
    assert not fixture.context.attempts
    assert fixture.node.timers.deadline() is None


def test_a_stream_that_is_direct_needs_its_relay_no_more() -> None:
    fixture = Fixture()
    fixture.connect(NAMED)
    fixture.answer(BEHIND)
    fixture.pair.come_about(fixture.node.now)
    fixture.punched()
    fixture.pair.lose(fixture.node.now)
    stream = fixture.opened[0].stream
    assert not stream.closed
    assert stream.origin is None
    assert not fixture.failed
    assert fixture.node.timers.deadline() is None


def test_looking_for_a_path_has_an_end() -> None:
    fixture = Fixture()
    attempt = fixture.connect(NAMED)
    fixture.answer(BEHIND)
    fixture.pair.come_about(fixture.node.now)
    fixture.node.wait(connect.UPGRADE_WAIT - 1)
    assert attempt in fixture.context.attempts
    fixture.node.wait(2)
    assert attempt.done
    assert not fixture.failed
    assert not fixture.opened[0].stream.closed
    # The peer may still find one.
    fixture.packet(SERVER_SOCKET, SERVER)
    assert not relays(fixture.opened[0])


def test_cancel() -> None:
    for opened in (False, True):
        fixture = Fixture()
        attempt = fixture.connect(NAMED)
        fixture.answer(BEHIND)
        if opened:
            fixture.pair.come_about(fixture.node.now)
        attempt.cancel(fixture.node.now)
        assert fixture.pair.released is not opened
        assert len(fixture.context.mux) == opened
        assert not fixture.node.asked(PEER_HOLEPUNCH)


def test_what_may_have_been_lost_at_the_relay_is_repeated_soon() -> None:
    """5.8: it knows where the other end is by its first packet."""
    fixture = Fixture()
    fixture.connect(NAMED)
    fixture.answer(BEHIND)
    fixture.pair.come_about(fixture.node.now)
    mux, stream = fixture.context.mux, fixture.opened[0].stream
    stream.write(b"header", fixture.node.now)
    times: list[float] = []
    while fixture.node.now < relayed.REPEAT_UNTIL:
        if mux.transmits(fixture.node.now):
            times.append(fixture.node.now)
        fixture.node.wait(0.001)
    assert times[0] == 0
    assert times[1] == pytest.approx(relayed.REPEAT_FIRST, abs=0.001)
    # Never later than half as long again as it could have been.
    waits = [after / before for before, after in pairwise(times[1:])]
    assert max(waits) < 2.6
    assert 8 < len(times) < 20


def test_nothing_is_repeated_once_the_peer_is_heard() -> None:
    fixture = Fixture()
    fixture.connect(NAMED)
    fixture.answer(BEHIND)
    fixture.pair.come_about(fixture.node.now)
    mux, stream = fixture.context.mux, fixture.opened[0].stream
    stream.write(b"header", fixture.node.now)
    mux.transmits(fixture.node.now)
    fixture.packet(CLIENT_SOCKET, RELAY)
    mux.transmits(fixture.node.now)
    fixture.node.wait(1.0)
    assert not mux.transmits(fixture.node.now)
