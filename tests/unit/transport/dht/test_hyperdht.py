from __future__ import annotations

import gc
import struct
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import load

from hyperseaport.transport.dht import hyperdht, messages
from hyperseaport.transport.dht.hyperdht import Attempt, Connection, HyperDHT, HyperDHTConfig
from hyperseaport.transport.dht.messages import (
    HandshakeMessage,
    Mode,
    NoisePayload,
    PeerRecord,
    UdxInfo,
)
from hyperseaport.transport.dht.node import NodeConfig
from hyperseaport.transport.dht.rpc import Pending
from hyperseaport.transport.dht.wire import Reply, decode_response, encode_request
from hyperseaport.transport.errors import Closed, InvalidInput, LocalError
from hyperseaport.transport.keys import NS_PEER_HANDSHAKE, KeyPair, target
from hyperseaport.transport.noise import Initiator
from hyperseaport.transport.transmit import CLIENT_SOCKET, SERVER_SOCKET, Address

SELF = ("7.0.0.1", 49737)
PEER = ("6.0.0.1", 6000)
KEYS = KeyPair.from_seed(bytes([1]) * 32)
TARGET = target(KEYS.public_key)


def persistent() -> HyperDHT:
    return started(NodeConfig(public_address=SELF))


def ephemeral() -> HyperDHT:
    return started(NodeConfig(ephemeral=True, quick_check=False))


def started(config: NodeConfig) -> HyperDHT:
    dht = HyperDHT(HyperDHTConfig(config, local_hosts=("192.168.1.10",)), Random(1))
    dht.start(0.0, server_port=SELF[1], client_port=40000)
    dht.on_deadline(0.0)
    dht.transmits(0.0)
    assert dht.node.ready
    return dht


def sent(dht: HyperDHT) -> list[tuple[Address, bytes]]:
    return [(t.address, b"".join(t.buffers)) for t in dht.transmits(0.0)]


def ask(dht: HyperDHT, command: int, value: bytes | None = None) -> Reply | None:
    datagram = encode_request(7, SELF, command, target=TARGET, value=value)
    dht.receive(datagram, SERVER_SOCKET, PEER, 0.0)
    answers = sent(dht)
    if not answers:
        return None
    ((to, answer),) = answers
    assert to == PEER
    return decode_response(answer, 0, SELF)


def listen(dht: HyperDHT, key_pair: KeyPair = KEYS, **options: Any) -> Any:
    return dht.listen(key_pair, 0.0, on_connection=lambda _connection, _now: None, **options)


def test_an_ephemeral_node_stores_nothing_and_relays() -> None:
    """Checklist 34."""
    dht = ephemeral()
    for command in range(messages.FIND_PEER, messages.PLUGIN + 1):
        reply = ask(dht, command)
        assert reply is not None
        assert (reply.error, reply.token, reply.value) == (1, None, None)
    message = HandshakeMessage(Mode.FROM_SERVER, b"noise", ("9.0.0.1", 9))
    datagram = encode_request(
        7, SELF, messages.PEER_HANDSHAKE, target=TARGET, value=message.encode()
    )
    dht.receive(datagram, SERVER_SOCKET, PEER, 0.0)
    ((to, answer),) = sent(dht)
    reply = decode_response(answer, 0, SELF)
    assert to == ("9.0.0.1", 9)
    assert reply.tid == 7
    assert reply.value == HandshakeMessage(Mode.REPLY, b"noise", PEER).encode()


def test_a_persistent_node_stores() -> None:
    """Checklist 23."""
    dht = persistent()
    reply = ask(dht, messages.FIND_PEER)
    assert reply is not None
    assert (reply.error, reply.value, reply.id) == (0, None, dht.node.id)
    assert reply.token is not None
    assert ask(dht, messages.PLUGIN) is None
    unknown = ask(dht, 11)
    assert unknown is not None
    assert (unknown.error, unknown.token) == (1, None)


def test_its_own_servers_are_found() -> None:
    dht = persistent()
    server = listen(dht)
    sent(dht)
    reply = ask(dht, messages.FIND_PEER)
    assert reply is not None
    assert reply.value == PeerRecord(KEYS.public_key, (SELF,)).encode()
    done: list[float] = []
    server.close(0.0, done.append)
    reply = ask(dht, messages.FIND_PEER)
    assert done == [0.0]
    assert reply is not None
    assert reply.value is None


def test_a_key_listens_once() -> None:
    dht = ephemeral()
    server = listen(dht)
    with pytest.raises(InvalidInput):
        listen(dht)
    server.close(0.0, lambda _now: None)
    listen(dht)


def test_servers_and_attempts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hyperdht, "MAX_SERVERS", 1)
    monkeypatch.setattr(hyperdht, "MAX_ATTEMPTS", 1)
    dht = ephemeral()
    listen(dht)
    with pytest.raises(LocalError):
        listen(dht, KeyPair.from_seed(bytes(32)))
    attempt = connect(dht)
    with pytest.raises(LocalError):
        connect(dht)
    attempt.cancel(0.0)
    connect(dht)


def connect(dht: HyperDHT, **options: Any) -> Any:
    def never(_connection: Connection, _now: float) -> None:
        raise AssertionError

    options = {"on_open": never, "on_error": lambda _error, _now: None} | options
    return dht.connect(KEYS.public_key, 0.0, **options)


def test_callbacks_never_come_before_connect_returns() -> None:
    dht = ephemeral()
    failed: list[Exception] = []
    connect(dht, on_error=lambda error, _now: failed.append(error))
    assert not failed
    dht.on_deadline(0.0)
    assert len(failed) == 1


def test_after_close_nothing_is_begun() -> None:
    dht = ephemeral()
    listen(dht)
    attempt = connect(dht)
    closed: list[float] = []
    dht.close(1.0, closed.append)
    assert closed == [1.0]
    assert attempt.done
    with pytest.raises(Closed):
        listen(dht, KeyPair.from_seed(bytes(32)))
    with pytest.raises(Closed):
        connect(dht)


def test_udx_packets_go_to_their_stream_and_others_to_the_node() -> None:
    dht = ephemeral()
    stream = dht.mux.create()
    stream.firewall = lambda _stream, _socket, _source, _now: True
    head = struct.pack("<BBBBI", 0xFF, 1, 32, 0, stream.local_id)
    dht.receive(head + bytes(12), CLIENT_SOCKET, PEER, 0.0)
    assert stream.has_received
    assert dht.node.stats.received == 0
    dht.receive(head[:4] + bytes(16), CLIENT_SOCKET, PEER, 0.0)
    assert dht.node.stats.ignored == 1


def test_the_deadline_is_the_earliest() -> None:
    dht = ephemeral()
    stream = dht.mux.create()
    stream.connect(CLIENT_SOCKET, 1, PEER, 0.0)
    stream.write(b"x", 0.0)
    assert sent(dht)
    before = dht.deadline()
    assert before is not None
    assert before == min(d for d in (dht.node.deadline(), dht.mux.deadline()) if d is not None)
    dht.on_deadline(before)
    assert sent(dht)


def test_the_same_seed_gives_the_same_identity() -> None:
    assert ephemeral().key_pair == ephemeral().key_pair
    given_pair = HyperDHT(HyperDHTConfig(key_pair=KEYS), Random(1))
    assert given_pair.key_pair == KEYS


def test_network_changes_are_passed_on() -> None:
    dht = ephemeral()
    seen: list[float] = []
    dht.on_network_change.append(seen.append)
    assert dht.node.on_network_change is not None
    dht.node.on_network_change(3.0)
    assert seen == [3.0]


CAPTURED = [
    bytes.fromhex(datagram["hex"])
    for capture in load("hyperdht")["captures"]
    for datagram in capture["datagrams"]
]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.binary(max_size=200)
    | st.tuples(st.sampled_from(CAPTURED), st.integers(0, 200), st.integers(0, 255)).map(
        lambda parts: parts[0][: parts[1]] + bytes([parts[2]]) + parts[0][parts[1] + 1 :]
    ),
    st.sampled_from([persistent, ephemeral]),
)
def test_whatever_arrives_is_survived(datagram: bytes, make: Any) -> None:
    dht = make()
    listen(dht, KeyPair.from_seed(bytes([3]) * 32))
    sent(dht)
    dht.receive(datagram, SERVER_SOCKET, PEER, 0.0)
    for _, answer in sent(dht):
        assert answer[0] in (0x03, 0x13)


def test_the_answer_leaves_before_the_first_bytes() -> None:
    dht = persistent()
    dht.listen(KEYS, 0.0, on_connection=lambda connection, now: connection.stream.write(b"x", now))
    sent(dht)
    client = Initiator(
        KeyPair.from_seed(bytes([2]) * 32),
        KEYS.public_key,
        prologue=NS_PEER_HANDSHAKE,
        ephemeral_seed=bytes([4]) * 32,
    )
    noise = client.message(NoisePayload(udx=UdxInfo(5)).encode())
    value = HandshakeMessage(Mode.FROM_CLIENT, noise).encode()
    datagram = encode_request(7, SELF, messages.PEER_HANDSHAKE, target=TARGET, value=value)
    dht.receive(datagram, SERVER_SOCKET, PEER, 0.0)
    answer, stream_packet = sent(dht)
    assert (answer[0], answer[1][0]) == (PEER, 0x13)
    assert (stream_packet[0], stream_packet[1][:2]) == (PEER, b"\xff\x01")


def test_a_connect_needs_no_garbage_collection() -> None:
    """What it leaves is gone with its last reference: collections cost more than connects."""
    server, client = persistent(), ephemeral()
    listen(server)
    sent(server)
    opened: list[Connection] = []
    gc.collect()
    gc.disable()
    try:
        client.connect(
            KEYS.public_key,
            0.0,
            relay_addresses=(SELF,),
            on_open=lambda connection, _now: opened.append(connection),
            on_error=lambda error, _now: pytest.fail(str(error)),
        )
        ((to, request),) = sent(client)
        assert to == SELF
        server.receive(request, SERVER_SOCKET, PEER, 0.0)
        client.receive(sent(server)[0][1], CLIENT_SOCKET, SELF, 0.0)
        assert len(opened) == 1
        assert not [thing for thing in gc.get_objects() if isinstance(thing, Attempt | Pending)]
    finally:
        gc.enable()


def test_many_answers_leave_before_more_is_taken() -> None:
    dht = persistent()
    question = encode_request(7, SELF, messages.FIND_PEER, target=TARGET)
    for _ in range(hyperdht.EARLY - 1):
        dht.receive(question, SERVER_SOCKET, PEER, 0.0)
        assert not dht.early_transmits(0.0)
    dht.receive(question, SERVER_SOCKET, PEER, 0.0)
    assert len(dht.early_transmits(0.0)) == hyperdht.EARLY
    assert not dht.transmits(0.0)
