from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import load

from hyperseaport.transport.dht.blind_relay import (
    PAIR,
    PROTOCOL,
    TOKEN_BYTES,
    UNPAIR,
    Pair,
    RelayMessage,
    Unpair,
    decode,
)
from hyperseaport.transport.errors import DecodeError, InvalidInput

RECORDED = load("hyperdht")["blindRelay"]
TOKEN = bytes(range(TOKEN_BYTES))

PAIRS = st.builds(
    Pair,
    is_initiator=st.booleans(),
    token=st.binary(min_size=TOKEN_BYTES, max_size=TOKEN_BYTES),
    id=st.integers(0, 2**32 - 1),
    seq=st.integers(0, 2**32 - 1),
)


def of_vector(vector: dict[str, Any]) -> RelayMessage:
    value = vector["value"]
    token = bytes.fromhex(value["token"])
    if vector["type"] == "unpair":
        return Unpair(token)
    return Pair(value["isInitiator"], token, value["id"], value["seq"])


@pytest.mark.parametrize("vector", RECORDED, ids=lambda vector: vector["hex"][:4])
def test_vectors(vector: dict[str, Any]) -> None:
    message = of_vector(vector)
    data = bytes.fromhex(vector["hex"])
    assert message.encode() == data
    assert decode(UNPAIR if isinstance(message, Unpair) else PAIR, data) == message


def test_protocol_of_the_recording() -> None:
    frame = bytes.fromhex(load("hyperdht")["blindRelayProtomux"]["frames"][0])
    assert PROTOCOL.encode() in frame


@given(PAIRS)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_round_trips(pair: Pair) -> None:
    assert decode(PAIR, pair.encode() + b"of a later version") == pair
    assert decode(UNPAIR, Unpair(pair.token).encode()) == Unpair(pair.token)


@given(st.integers(0, 3), st.binary(max_size=60))
@settings(deadline=None, derandomize=True, max_examples=300)
def test_survives_arbitrary_bytes(kind: int, data: bytes) -> None:
    with suppress(DecodeError):
        decode(kind, data)


def test_other_types_mean_nothing() -> None:
    assert decode(2, b"anything") is None


def test_other_flags_mean_nothing() -> None:
    data = bytearray(Pair(True, TOKEN, 5).encode())
    data[0] = 0b1011
    assert decode(PAIR, bytes(data)) == Pair(True, TOKEN, 5)
    data[0] = 0b1010
    assert decode(PAIR, bytes(data)) == Pair(False, TOKEN, 5)


def test_an_id_beyond_32_bits_is_none() -> None:
    data = Pair(True, TOKEN, 0).encode()[:-2]
    with pytest.raises(DecodeError):
        Pair.decode(data + b"\xff" + (2**32).to_bytes(8, "little") + b"\x00")


def test_a_token_of_another_size_is_none() -> None:
    with pytest.raises(InvalidInput):
        Pair(True, TOKEN[1:], 5).encode()
    with pytest.raises(DecodeError):
        Unpair.decode(Unpair(TOKEN).encode()[:-1])
