from __future__ import annotations

import struct
from typing import Any

import pytest
from support.dht_fakes import FakeNode, context, reply

from hyperseaport.transport import keys
from hyperseaport.transport.dht import context as limits
from hyperseaport.transport.dht import server as server_module
from hyperseaport.transport.dht.context import Connection
from hyperseaport.transport.dht.messages import (
    Firewall,
    HolepunchInfo,
    HolepunchMessage,
    HolepunchPayload,
    Mode,
    NoisePayload,
    PeerError,
    PeerRecord,
    Relay,
    UdxInfo,
)
from hyperseaport.transport.dht.router import Incoming, IncomingPunch
from hyperseaport.transport.dht.server import Server
from hyperseaport.transport.keys import KeyPair
from hyperseaport.transport.noise import Initiator, seal, unseal
from hyperseaport.transport.transmit import CLIENT_SOCKET, SERVER_SOCKET, Address

KEYS = KeyPair.from_seed(bytes([1]) * 32)
CLIENT_KEYS = KeyPair.from_seed(bytes([2]) * 32)
CLIENT = ("6.0.0.1", 6000)
RELAY = ("5.0.0.1", 49737)
SELF = ("7.0.0.1", 40000)
PAYLOAD = NoisePayload(udx=UdxInfo(77), secret_stream=True)


class Fixture:
    def __init__(self, **options: Any) -> None:
        self.node = FakeNode()
        self.context = context(self.node)
        self.connections: list[Connection] = []
        self.closed: list[Server] = []
        options = {"firewall": None, "on_listening": None} | options
        self.server = Server(
            self.context,
            KEYS,
            on_connection=lambda connection, _now: self.connections.append(connection),
            on_close=self.closed.append,
            **options,
        )

    def handshake(
        self,
        noise: bytes,
        *,
        direct: bool = False,
        client: Address = CLIENT,
        sender: Address = RELAY,
        socket: int = CLIENT_SOCKET,
    ) -> bytes | None:
        """The answer; None for none."""
        answers: list[bytes] = []
        sender = client if direct else sender
        incoming = Incoming(noise, client, direct, SELF, sender, socket)
        self.server.on_handshake(incoming, answers.append, self.node.now)
        assert len(answers) <= 1
        return answers[0] if answers else None

    def packet(self, stream_id: int, socket: int, source: Address) -> bool:
        """A HEARTBEAT arrives for a stream."""
        packet = struct.pack("<BBBBIIII", 0xFF, 1, 32, 0, stream_id, 1 << 20, 0, 0)
        return self.context.mux.receive(packet, socket, source, self.node.now)


def initiator(payload: NoisePayload | bytes = PAYLOAD, seed: int = 3) -> tuple[Initiator, bytes]:
    """A client and its message 1."""
    one = Initiator(
        CLIENT_KEYS,
        KEYS.public_key,
        prologue=keys.NS_PEER_HANDSHAKE,
        ephemeral_seed=seed.to_bytes(32, "big"),
    )
    return one, one.message(payload if isinstance(payload, bytes) else payload.encode())


def read(one: Initiator, answer: bytes | None) -> NoisePayload:
    assert answer is not None
    return NoisePayload.decode(one.read(answer)[0])


def test_a_firewalled_server_waits_for_the_first_packet() -> None:
    fixture = Fixture()
    one, noise = initiator()
    answer = fixture.handshake(noise)
    assert answer is not None
    plain, handshake = one.read(answer)
    payload = NoisePayload.decode(plain)
    assert (payload.error, payload.firewall, payload.holepunch) == (0, Firewall.UNKNOWN, None)
    assert payload.addresses4 == (("192.168.1.10", 49737),)
    assert payload.secret_stream
    assert payload.udx is not None
    assert payload.udx.reusable_socket
    assert not fixture.connections
    elsewhere = ("6.0.0.1", 9999)
    assert fixture.packet(payload.udx.id, SERVER_SOCKET, elsewhere)
    (connection,) = fixture.connections
    stream = connection.stream
    assert (stream.socket, stream.address, stream.remote_id) == (SERVER_SOCKET, elsewhere, 77)
    assert stream.has_received
    assert connection.remote_address == elsewhere
    assert connection.handshake.hash == handshake.hash
    assert connection.handshake.remote_public_key == CLIENT_KEYS.public_key
    # From then on no packet moves the stream, and none is lost for its socket.
    assert fixture.packet(payload.udx.id, CLIENT_SOCKET, CLIENT)
    assert (stream.socket, stream.address) == (SERVER_SOCKET, elsewhere)
    assert fixture.context.mux.stats.blocked == 0
    fixture.node.wait(60)
    assert not stream.closed


def test_a_client_that_never_comes_is_given_up() -> None:
    fixture = Fixture()
    fixture.handshake(initiator()[1])
    fixture.node.wait(9.9)
    assert len(fixture.context.mux) == 1
    fixture.node.wait(0.1)
    assert len(fixture.context.mux) == 0
    assert fixture.server.stats.abandoned == 1
    fixture.node.wait(60)
    assert fixture.node.timers.deadline() is None


def test_a_direct_handshake_connects_at_once() -> None:
    """Checklist 46."""
    fixture = Fixture()
    assert fixture.handshake(initiator()[1], direct=True, socket=SERVER_SOCKET)
    (connection,) = fixture.connections
    assert (connection.stream.socket, connection.stream.address) == (SERVER_SOCKET, CLIENT)


def test_an_open_client_is_connected_to_from_the_current_socket() -> None:
    fixture = Fixture()
    payload = NoisePayload(firewall=Firewall.OPEN, udx=UdxInfo(77), secret_stream=True)
    assert fixture.handshake(initiator(payload)[1], socket=SERVER_SOCKET)
    (connection,) = fixture.connections
    assert (connection.stream.socket, connection.stream.address) == (CLIENT_SOCKET, CLIENT)


def test_an_open_server_says_so() -> None:
    """Checklist 44."""
    fixture = Fixture()
    fixture.node.public = ("7.0.0.1", 49737)
    one, noise = initiator()
    payload = read(one, fixture.handshake(noise))
    assert payload.firewall == Firewall.OPEN
    assert payload.holepunch is None
    assert payload.addresses4 == (("7.0.0.1", 49737), ("192.168.1.10", 49737))
    assert payload.relay_addresses == (("7.0.0.1", 49737),)
    assert PeerRecord.decode(fixture.server.record()) == PeerRecord(
        KEYS.public_key, (("7.0.0.1", 49737),)
    )


def test_copies_get_the_same_answer_and_one_connection() -> None:
    """Checklist 41."""
    fixture = Fixture()
    _, noise = initiator()
    first = fixture.handshake(noise, direct=True)
    assert first is not None
    assert fixture.handshake(noise, sender=("5.0.0.2", 1)) == first
    fixture.node.wait(9.9)
    assert fixture.handshake(noise) == first
    assert len(fixture.connections) == 1
    assert fixture.server.stats.copies == 2
    fixture.node.wait(0.2)
    second = fixture.handshake(noise)
    assert second is not None
    assert second != first


def test_the_rejected_are_told_so_and_nothing_else() -> None:
    """Unlike checklist 42: their programs need not wait for an answer that never comes."""
    asked: list[tuple[bytes, Address]] = []

    def reject(public_key: bytes, address: Address) -> bool:
        asked.append((public_key, address))
        return True

    fixture = Fixture(firewall=reject)
    one, noise = initiator()
    told = fixture.handshake(noise)
    assert fixture.handshake(noise) == told
    assert read(one, told) == NoisePayload(error=PeerError.ABORTED)
    assert asked == [(CLIENT_KEYS.public_key, CLIENT)]
    assert len(fixture.context.mux) == 0
    assert not fixture.connections


def test_a_hook_that_fails_lets_nobody_in() -> None:
    def broken(_public_key: bytes, _address: Address) -> bool:
        raise RuntimeError("no idea")

    fixture = Fixture(firewall=broken)
    _, noise = initiator()
    with pytest.raises(RuntimeError):
        fixture.handshake(noise)
    assert fixture.handshake(noise) is None


@pytest.mark.parametrize(
    ("payload", "error"),
    [(NoisePayload(), 1), (bytes.fromhex("02030405060708"), 2)],
    ids=["no udx", "newer version"],
)
def test_what_cannot_be_served_is_answered_with_an_error(
    payload: NoisePayload | bytes, error: int
) -> None:
    """Checklist 39, 43."""
    fixture = Fixture()
    one, noise = initiator(payload)
    answer = read(one, fixture.handshake(noise))
    assert answer == NoisePayload(error=error)
    assert len(fixture.context.mux) == 0


def test_garbage_is_silent_and_limited() -> None:
    fixture = Fixture()
    assert fixture.handshake(b"") is None
    assert fixture.handshake(bytes(95)) is None
    patience = int(limits.GARBAGE_PER_CLIENT * limits.GARBAGE_PATIENCE)
    for index in range(patience):
        assert fixture.handshake(index.to_bytes(200, "little")) is None
    assert fixture.server.stats.malformed == patience + 2
    one, noise = initiator()
    assert fixture.handshake(noise) is None
    assert fixture.server.stats.limited == 1
    # Others through the same relay, and the host itself a moment later, are served.
    assert fixture.handshake(initiator(seed=4)[1], client=("6.0.0.2", 1)) is not None
    fixture.node.wait(0.1)
    assert read(one, fixture.handshake(noise)).error == 0


def test_a_relay_of_much_garbage_is_limited() -> None:
    fixture = Fixture()
    patience = int(limits.GARBAGE_PER_SENDER * limits.GARBAGE_PATIENCE)
    for index in range(patience):
        client = (f"9.0.{index >> 8}.{index & 255}", 1)
        assert fixture.handshake(index.to_bytes(200, "little"), client=client) is None
    assert fixture.handshake(initiator()[1]) is None
    assert fixture.handshake(initiator()[1], sender=("5.0.0.2", 1)) is not None


def test_waiting_handshakes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_WAITING", 3)
    fixture = Fixture()
    answered = [fixture.handshake(initiator(seed=n)[1]) is not None for n in range(10, 15)]
    assert answered == [True, True, True, False, False]
    fixture.node.wait(10)
    assert fixture.handshake(initiator(seed=20)[1]) is not None


def test_close_ends_what_waits_and_keeps_what_is_connected() -> None:
    fixture = Fixture()
    fixture.context.router.serve(fixture.server.target, fixture.server)
    fixture.handshake(initiator(seed=5)[1], direct=True)
    fixture.handshake(initiator(seed=6)[1])
    done: list[float] = []
    fixture.server.close(1.0, done.append)
    assert done == [1.0]
    assert fixture.closed == [fixture.server]
    assert len(fixture.context.mux) == 1
    assert not fixture.connections[0].stream.closed
    assert fixture.handshake(initiator(seed=7)[1]) is None
    fixture.server.close(2.0, done.append)
    assert done == [1.0, 2.0]
    assert fixture.node.timers.deadline() is None


RELAYS = (Relay(RELAY, ("7.0.0.1", 777)), Relay(("5.0.0.2", 49737), ("7.0.0.1", 777)))


def punchable(**options: Any) -> Fixture:
    """A server that is announced, and whose NAT is consistent."""
    fixture = Fixture(**options)
    fixture.server._announcer.relays = RELAYS
    for index in range(3):
        seen = reply((f"9.0.0.{index}", 1))
        seen.to = SELF
        fixture.context.punches.survey.note(seen, fixture.node.now)
    return fixture


class Punching:
    """A client that punches."""

    def __init__(self, fixture: Fixture, seed: int = 3) -> None:
        self.fixture = fixture
        one, noise = initiator(seed=seed)
        answer = fixture.handshake(noise)
        assert answer is not None
        plain, handshake = one.read(answer)
        self.payload = NoisePayload.decode(plain)
        self.secret = handshake.holepunch_secret
        self.answers: list[HolepunchPayload] = []

    @property
    def number(self) -> int:
        assert self.payload.holepunch is not None
        return self.payload.holepunch.id

    @property
    def stream_id(self) -> int:
        assert self.payload.udx is not None
        return self.payload.udx.id

    def send(self, payload: HolepunchPayload, *, client: Address = CLIENT) -> None:
        sealed = seal(payload.encode(), self.secret, bytes(24))
        message = HolepunchMessage(Mode.FROM_RELAY, self.number, sealed, client)
        incoming = IncomingPunch(message, client, RELAY)
        self.fixture.server.on_holepunch(incoming, self._answer, self.fixture.node.now)

    def _answer(self, sealed: bytes, _socket: int, _now: float) -> None:
        plain = unseal(sealed, self.secret)
        assert plain is not None
        self.answers.append(HolepunchPayload.decode(plain))


def test_a_firewalled_server_says_how_to_punch_it() -> None:
    """Checklist 44; the lowest free numbers."""
    fixture = punchable()
    clients = [Punching(fixture, seed) for seed in range(3, 6)]
    assert clients[0].payload.holepunch == HolepunchInfo(0, RELAYS)
    assert [client.number for client in clients] == [0, 1, 2]
    fixture.packet(clients[1].stream_id, CLIENT_SOCKET, CLIENT)
    assert [Punching(fixture, seed).number for seed in (6, 7)] == [1, 3]


def test_who_need_not_punch_is_not_told_how() -> None:
    fixture = punchable()
    one, noise = initiator(NoisePayload(firewall=Firewall.OPEN, udx=UdxInfo(77)))
    assert read(one, fixture.handshake(noise)).holepunch is None
    one, noise = initiator(seed=9)
    assert read(one, fixture.handshake(noise, direct=True)).holepunch is None
    # On our own machine, with no NAT in front of it.
    fixture.context.local_hosts = (SELF[0],)
    one, noise = initiator(seed=10)
    assert read(one, fixture.handshake(noise, client=(SELF[0], 5))).holepunch is None
    one, noise = initiator(seed=11)
    assert read(one, fixture.handshake(noise)).holepunch is not None
    fixture.node.public = ("7.0.0.1", 49737)
    one, noise = initiator(seed=12)
    assert read(one, fixture.handshake(noise)).holepunch is None


def test_punching_leads_to_a_connection() -> None:
    fixture = punchable()
    client = Punching(fixture)
    client.send(HolepunchPayload(remote_address=SELF))
    (answer,) = client.answers
    assert (answer.firewall, answer.addresses) == (Firewall.CONSISTENT, (SELF,))
    assert [t.address for t in fixture.context.punches.outbox] == [CLIENT]
    # The client's punch is echoed, and its first packet connects.
    fixture.context.punches.receive(CLIENT_SOCKET, CLIENT, 0.0)
    assert [t.address for t in fixture.context.punches.outbox] == [CLIENT, CLIENT]
    fixture.packet(client.stream_id, CLIENT_SOCKET, CLIENT)
    assert len(fixture.connections) == 1
    assert len(fixture.context.punches) == 0
    client.send(HolepunchPayload(round=1))
    assert len(client.answers) == 1
    assert fixture.server.stats.punch_messages == 1
    assert fixture.server.stats.punch_strays == 1
    fixture.node.wait(60)
    assert fixture.node.timers.deadline() is None


def test_punching_takes_as_long_as_it_takes() -> None:
    """A session lives while there is hope: ten rounds, or a search."""
    for firewall, lasts in ((2, server_module.PUNCH_WAIT), (3, server_module.SEARCH_WAIT)):
        fixture = punchable()
        client = Punching(fixture)
        fixture.node.wait(5)
        client.send(HolepunchPayload())
        token = client.answers[0].token
        asked = HolepunchPayload(
            round=1,
            punching=True,
            firewall=firewall,
            addresses=((CLIENT[0], 0 if firewall == 3 else 5),),
            remote_token=token,
        )
        client.send(asked)
        assert client.answers[1].punching
        fixture.node.wait(4)
        # Asking again does not make it longer.
        client.send(asked)
        fixture.node.wait(lasts - 4.1)
        assert len(fixture.context.mux) == 1
        fixture.node.wait(0.2)
        assert len(fixture.context.mux) == len(fixture.context.punches) == 0
        assert fixture.server.stats.abandoned == 1


def test_sessions_of_one_key_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_WAITING_PER_KEY", 2)
    fixture = punchable()
    answered = [fixture.handshake(initiator(seed=n)[1]) is not None for n in range(10, 14)]
    assert answered == [True, True, False, False]
    assert fixture.server.stats.limited == 2
    fixture.node.wait(10)
    assert not fixture.server._waiting_by_key
    assert fixture.handshake(initiator(seed=20)[1]) is not None


def test_messages_about_punching_are_bounded() -> None:
    """A flood costs a bounded number of openings a second, whatever client it names."""
    fixture = punchable()
    client = Punching(fixture)
    burst = int(limits.PUNCH_MESSAGES_PER_CLIENT * limits.PUNCH_MESSAGES_PATIENCE)
    for _ in range(burst + 50):
        client.send(HolepunchPayload(remote_address=SELF))
    assert len(client.answers) == burst
    assert fixture.server.stats.limited == 50
    spoofed = int(limits.PUNCH_MESSAGES_PER_SENDER * limits.PUNCH_MESSAGES_PATIENCE)
    for index in range(spoofed):
        client.send(HolepunchPayload(), client=(f"6.1.{index >> 8}.{index & 255}", 1))
    assert len(client.answers) == spoofed
    assert len(fixture.context.punches) == 1


def test_closing_stops_punching() -> None:
    fixture = punchable()
    client = Punching(fixture)
    client.send(HolepunchPayload())
    fixture.server._announcer.relays = ()
    fixture.server.close(1.0, lambda _now: None)
    assert len(fixture.context.punches) == len(fixture.context.mux) == 0
    client.send(HolepunchPayload(round=1))
    assert len(client.answers) == 1
    assert fixture.node.timers.deadline() is None
