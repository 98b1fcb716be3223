"""A server whose connections may begin at a blind relay."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from support.dht_fakes import FakeNode, context, reply
from support.fake_relays import RELAY, RELAY_ID, FakePair, FakeRelays

from hyperseaport.transport import keys
from hyperseaport.transport.dht import server_relay
from hyperseaport.transport.dht.blind_relay import PAIR_SECONDS
from hyperseaport.transport.dht.context import Connection
from hyperseaport.transport.dht.messages import (
    Firewall,
    NoisePayload,
    RelayThrough,
    UdxInfo,
)
from hyperseaport.transport.dht.router import Incoming
from hyperseaport.transport.dht.server import Server
from hyperseaport.transport.errors import StreamReset
from hyperseaport.transport.keys import KeyPair
from hyperseaport.transport.noise import Initiator
from hyperseaport.transport.transmit import CLIENT_SOCKET, SERVER_SOCKET, Address

KEYS = KeyPair.from_seed(bytes([1]) * 32)
CLIENT_KEYS = KeyPair.from_seed(bytes([2]) * 32)
CLIENT: Address = ("6.0.0.1", 6000)
NODE: Address = ("5.0.0.1", 49737)
SELF: Address = ("7.0.0.1", 40000)
OWN, NAMED = bytes([5]) * 32, bytes([6]) * 32
TOKEN = bytes([9]) * 32
WANTED = RelayThrough(NAMED, TOKEN)


class Fixture:
    def __init__(self, **options: Any) -> None:
        self.node = FakeNode()
        self.context = context(self.node)
        self.blind = FakeRelays(self.context)
        self.connections: list[Connection] = []
        self.server = Server(
            self.context,
            KEYS,
            firewall=None,
            on_listening=None,
            on_connection=lambda connection, _now: self.connections.append(connection),
            on_close=lambda _server: None,
            **options,
        )
        self.answered = NoisePayload()

    def handshake(
        self, wanted: RelayThrough | None = None, *, direct: bool = False, **payload: Any
    ) -> NoisePayload:
        one = Initiator(
            CLIENT_KEYS,
            KEYS.public_key,
            prologue=keys.NS_PEER_HANDSHAKE,
            ephemeral_seed=self.context.rng.randbytes(32),
        )
        offer = NoisePayload(udx=UdxInfo(77), relay_through=wanted, **payload)
        incoming = Incoming(
            one.message(offer.encode()),
            CLIENT,
            direct,
            SELF,
            CLIENT if direct else NODE,
            CLIENT_SOCKET,
        )
        answers: list[bytes] = []
        self.server.on_handshake(incoming, answers.append, self.node.now)
        self.answered = NoisePayload.decode(one.read(answers[0])[0])
        return self.answered

    def packet(self, socket: int, source: Address) -> bool:
        assert self.answered.udx is not None
        identifier = self.answered.udx.id
        packet = struct.pack("<BBBBIIII", 0xFF, 1, 32, 0, identifier, 1 << 20, 0, 0)
        return self.context.mux.receive(packet, socket, source, self.node.now)

    @property
    def pair(self) -> FakePair:
        (pair,) = self.blind.asked
        return pair


def path(connection: Connection) -> tuple[int, Address, int | None]:
    stream = connection.stream
    return stream.socket, stream.address, stream.remote_id


def test_it_names_its_relay() -> None:
    fixture = Fixture(relay_through=(OWN,))
    through = fixture.handshake().relay_through
    pair = fixture.pair
    assert through == RelayThrough(OWN, pair.token)
    assert (pair.key, pair.initiator) == (OWN, True)
    assert fixture.answered.udx is not None
    assert pair.options["stream_id"] == fixture.answered.udx.id


def test_its_choice_wins() -> None:
    fixture = Fixture(relay_through=(OWN,))
    through = fixture.handshake(WANTED).relay_through
    assert through is not None
    assert through.public_key == fixture.pair.key == OWN
    assert through.token != TOKEN


@pytest.mark.parametrize(
    "options",
    [
        {"relay_through": (OWN, NAMED)},
        {"allow_relays": frozenset([NAMED])},
        {"allow_relays": None},
        {"relay_through": (OWN,), "allow_relays": None},
    ],
)
def test_a_relay_that_it_agrees_to(options: dict[str, Any]) -> None:
    """The client asks there already: to name another would cost a round trip."""
    fixture = Fixture(**options)
    assert fixture.handshake(WANTED).relay_through is None
    pair = fixture.pair
    assert (pair.key, pair.token, pair.initiator) == (NAMED, TOKEN, False)


def test_a_client_does_not_choose_whom_it_connects_to() -> None:
    fixture = Fixture()
    assert fixture.handshake(WANTED).relay_through is None
    assert not fixture.blind.asked


def test_no_relay_where_none_is_needed() -> None:
    fixture = Fixture(relay_through=(OWN,))
    assert fixture.handshake(direct=True).relay_through is None
    assert fixture.handshake(firewall=Firewall.OPEN).relay_through is None
    fixture.node.public = ("7.0.0.1", 49737)
    assert fixture.handshake(WANTED).relay_through is None
    assert not fixture.blind.asked


def test_the_connection_begins_at_the_relay() -> None:
    fixture = Fixture(relay_through=(OWN,))
    fixture.handshake()
    assert not fixture.connections
    fixture.pair.come_about(fixture.node.now)
    (connection,) = fixture.connections
    assert path(connection) == (CLIENT_SOCKET, RELAY, RELAY_ID)
    assert connection.stream.relayed
    assert fixture.server.stats.accepted == 1
    assert fixture.packet(CLIENT_SOCKET, RELAY)
    assert connection.stream.relayed
    fixture.node.wait(300)
    assert not connection.stream.closed
    assert fixture.server.stats.abandoned == 0


def test_it_follows_its_client_to_a_direct_path() -> None:
    fixture = Fixture(relay_through=(OWN,))
    fixture.handshake()
    fixture.pair.come_about(fixture.node.now)
    assert fixture.packet(SERVER_SOCKET, CLIENT)
    (connection,) = fixture.connections
    assert path(connection) == (SERVER_SOCKET, CLIENT, 77)
    assert not connection.stream.relayed
    for _ in range(8):
        fixture.node.wait(1.0)
        assert fixture.packet(SERVER_SOCKET, CLIENT)
    assert fixture.pair.released
    assert len(fixture.server._relaying) == 0
    fixture.node.wait(60)
    assert not fixture.server._sessions
    assert fixture.node.timers.deadline() is None


def test_a_direct_path_before_the_pair() -> None:
    fixture = Fixture(relay_through=(OWN,))
    fixture.handshake()
    assert fixture.packet(SERVER_SOCKET, CLIENT)
    assert path(fixture.connections[0]) == (SERVER_SOCKET, CLIENT, 77)
    assert fixture.pair.released
    assert len(fixture.server._relaying) == 0


def test_packets_of_the_relay_show_no_direct_path() -> None:
    fixture = Fixture(relay_through=(OWN,))
    fixture.handshake()
    assert fixture.packet(CLIENT_SOCKET, RELAY)
    assert not fixture.connections
    fixture.pair.come_about(fixture.node.now)
    assert path(fixture.connections[0]) == (CLIENT_SOCKET, RELAY, RELAY_ID)


def test_a_client_that_comes_nowhere() -> None:
    fixture = Fixture(relay_through=(OWN,))
    fixture.handshake()
    fixture.node.wait(PAIR_SECONDS - 0.1)
    assert len(fixture.context.mux) == 1
    fixture.node.wait(0.2)
    assert len(fixture.context.mux) == 0
    assert fixture.pair.released
    assert fixture.server.stats.abandoned == 1
    assert len(fixture.server._relaying) == 0


def test_a_relay_that_is_lost_is_waited_for_no_longer() -> None:
    fixture = Fixture(relay_through=(OWN,))
    fixture.handshake()
    fixture.pair.lose(fixture.node.now)
    assert len(fixture.server._relaying) == 0
    assert fixture.packet(SERVER_SOCKET, CLIENT)
    assert not fixture.connections[0].stream.relayed


def test_a_connection_ends_with_its_relay() -> None:
    fixture = Fixture(relay_through=(OWN,))
    fixture.handshake()
    fixture.pair.come_about(fixture.node.now)
    fixture.pair.lose(fixture.node.now)
    fixture.blind.pump(fixture.node.now)
    assert isinstance(fixture.connections[0].stream.error, StreamReset)
    assert len(fixture.server._relaying) == 0


def test_pairs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_relay, "MAX_PAIRS", 1)
    fixture = Fixture(relay_through=(OWN,))
    fixture.handshake()
    fixture.handshake()
    assert len(fixture.blind.asked) == 1
    assert fixture.server.stats.limited == 1
    fixture.blind.asked[0].come_about(fixture.node.now)
    fixture.connections[0].stream.destroy(fixture.node.now)
    fixture.blind.pump(fixture.node.now)
    assert fixture.blind.asked[0].released
    fixture.handshake()
    assert len(fixture.blind.asked) == 2


def announce(fixture: Fixture) -> None:
    """As far as the DHT takes part in it."""
    fixture.server.refresh(fixture.node.now)
    query = fixture.node.queries[-1]
    fixture.node.finish(query, reply(NODE))
    for request in list(fixture.node.requests):
        if not request.cancelled:
            fixture.node.answer(request, reply(request.to))


def test_it_stays_connected_with_its_relays_while_it_listens() -> None:
    fixture = Fixture(relay_through=(OWN, NAMED))
    assert not fixture.blind.holding
    announce(fixture)
    announce(fixture)
    assert fixture.blind.holding == [OWN, NAMED]
    fixture.handshake()
    fixture.handshake()
    fixture.blind.asked[1].come_about(fixture.node.now)
    fixture.server.close(fixture.node.now, lambda _now: None)
    assert not fixture.blind.holding
    waiting, through = fixture.blind.asked
    assert waiting.released
    # Open connections stay.
    assert not through.released
    assert not fixture.connections[0].stream.closed


def test_an_open_server_needs_no_relays() -> None:
    fixture = Fixture(relay_through=(OWN,))
    fixture.node.public = ("7.0.0.1", 49737)
    announce(fixture)
    assert not fixture.blind.holding
