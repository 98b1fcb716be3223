"""Requests and responses, byte for byte."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import load

from hyperseaport.transport.dht.addresses import node_id
from hyperseaport.transport.dht.wire import (
    REQUEST,
    Reply,
    Request,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)
from hyperseaport.transport.errors import DecodeError

VECTORS = load("hyperdht")
SENDER = ("127.0.0.1", 40001)


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else bytes.fromhex(text)


def _address(value: dict[str, Any]) -> tuple[str, int]:
    return value["host"], value["port"]


def encode(message: Request | Reply) -> bytes:
    if isinstance(message, Request):
        return encode_request(
            message.tid,
            message.to,
            message.command,
            internal=message.internal,
            id=message.id,
            token=message.token,
            target=message.target,
            value=message.value,
        )
    return encode_response(
        message.tid,
        message.to,
        id=message.id,
        token=message.token,
        closer_nodes=message.closer_nodes,
        error=message.error,
        value=message.value,
    )


def decode(datagram: bytes, source: tuple[str, int] = SENDER) -> Request | Reply:
    if datagram[0] == REQUEST:
        return decode_request(datagram, 0, source)
    return decode_response(datagram, 0, source)


@pytest.mark.parametrize("vector", VECTORS["requests"], ids=lambda v: v["note"])
def test_requests(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    request = decode_request(data, 1, SENDER)
    expected_id = _bytes(vector["senderId"]) if vector["idIncluded"] else None
    assert request == Request(
        vector["tid"],
        vector["command"],
        vector["internal"],
        _bytes(vector["target"]),
        _bytes(vector["token"]),
        _bytes(vector["value"]),
        expected_id,
        _address(vector["to"]),
        SENDER,
        1,
    )
    assert encode(request) == data


@pytest.mark.parametrize("vector", VECTORS["responses"], ids=lambda v: v["note"])
def test_responses(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    reply = decode_response(data, 1, SENDER)
    assert reply == Reply(
        _bytes(vector["responderId"]) if vector["idIncluded"] else None,
        SENDER,
        _address(vector["to"]),
        _bytes(vector["tokenSent"]),
        [_address(node) for node in vector["closerNodes"]],
        vector["error"],
        _bytes(vector["value"]),
        1,
        vector["tid"],
    )
    assert encode(reply) == data


@pytest.mark.parametrize("capture", VECTORS["captures"], ids=lambda c: c["name"])
def test_every_captured_datagram_encodes_to_itself(capture: dict[str, Any]) -> None:
    for entry in capture["datagrams"]:
        if entry["decoded"].get("kind") not in ("request", "response"):
            continue
        data = bytes.fromhex(entry["hex"])
        host, port = entry["src"].split(":")
        message = decode(data, (host, int(port)))
        assert message.tid == entry["decoded"]["tid"]
        assert encode(message) == data


def test_an_id_of_another_address_counts_as_none() -> None:
    data = encode_request(1, ("1.2.3.4", 5), 0, internal=True, id=node_id(("9.9.9.9", 9)))
    assert decode_request(data, 0, SENDER).id is None
    response = encode_response(1, ("1.2.3.4", 5), id=node_id(("9.9.9.9", 9)), value=b"x")
    reply = decode_response(response, 0, SENDER)
    assert reply.id is None
    assert reply.value == b"x"


@pytest.mark.parametrize(
    "vector", [*VECTORS["requests"], *VECTORS["responses"]], ids=lambda v: v["note"]
)
def test_a_message_cut_anywhere_is_refused_and_trailing_bytes_are_not(
    vector: dict[str, Any],
) -> None:
    data = bytes.fromhex(vector["hex"])
    for size in range(1, len(data)):
        with pytest.raises(DecodeError):
            decode(data[:size])
    assert decode(data + b"\x01\x02\x03") == decode(data)


def test_empty_and_absent_values_differ() -> None:
    empty = encode_request(1, SENDER, 0, value=b"")
    absent = encode_request(1, SENDER, 0)
    assert decode_request(empty, 0, SENDER).value == b""
    assert decode_request(absent, 0, SENDER).value is None


def test_a_list_longer_than_the_datagram_is_refused() -> None:
    data = encode_response(1, SENDER, closer_nodes=[SENDER])
    with pytest.raises(DecodeError):
        decode_response(data.replace(b"\x01\x7f", b"\xfe\xff\xff\xff\xff\x7f"), 0, SENDER)


def test_the_other_kind_of_message_is_refused() -> None:
    with pytest.raises(DecodeError):
        decode_request(encode_response(1, SENDER), 0, SENDER)
    with pytest.raises(DecodeError):
        decode_response(encode_request(1, SENDER, 0), 0, SENDER)


@given(st.sampled_from([b"\x03", b"\x13"]), st.binary(max_size=200))
@settings(deadline=None, derandomize=True, max_examples=500)
def test_decoders_survive_any_bytes(kind: bytes, data: bytes) -> None:
    try:
        message = decode(kind + data)
    except DecodeError:
        return
    again = decode(encode(message))
    assert again == message


_HASHES = st.none() | st.binary(min_size=32, max_size=32)
_ADDRESSES = st.tuples(st.ip_addresses(v=4).map(str), st.integers(0, 65535))


@given(
    st.builds(
        Request,
        tid=st.integers(0, 65535),
        command=st.integers(0, 2**32),
        internal=st.booleans(),
        target=_HASHES,
        token=_HASHES,
        value=st.none() | st.binary(max_size=300),
        id=st.sampled_from([None, node_id(SENDER)]),
        to=_ADDRESSES,
        source=st.just(SENDER),
        socket=st.just(0),
    )
)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_requests_round_trip(request: Request) -> None:
    assert decode(encode(request)) == request


@given(
    st.builds(
        Reply,
        id=st.sampled_from([None, node_id(SENDER)]),
        source=st.just(SENDER),
        to=_ADDRESSES,
        token=_HASHES,
        closer_nodes=st.lists(_ADDRESSES, max_size=30),
        error=st.integers(0, 300),
        value=st.none() | st.binary(max_size=300),
        socket=st.just(0),
        tid=st.integers(0, 65535),
    )
)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_responses_round_trip(reply: Reply) -> None:
    assert decode(encode(reply)) == reply
