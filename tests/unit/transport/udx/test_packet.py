from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import load

from hyperseaport.transport.errors import DecodeError
from hyperseaport.transport.udx import packet as wire
from hyperseaport.transport.udx.packet import (
    HEADER_BYTES,
    Packet,
    cells,
    decode,
    encode,
    expand,
    plain_headers,
)

CAPTURED = [
    pytest.param(each, id=f"{scenario['name']}-{each['n']}")
    for scenario in load("udx")["scenarios"]
    for each in scenario["packets"]
]
U32 = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("captured", CAPTURED)
def test_captured_packets_decode_and_encode_again(captured: dict[str, Any]) -> None:
    datagram, expected = bytes.fromhex(captured["hex"]), captured["decoded"]
    packet = decode(datagram)
    assert (packet.type, packet.id, packet.window) == (
        expected["type"],
        expected["id"],
        expected["window"],
    )
    assert (packet.seq, packet.ack) == (expected["seq"], expected["ack"])
    assert [list(pair) for pair in packet.sacks] == expected.get("sacks", [])
    assert packet.padding == expected["data_offset"]
    assert len(packet.payload) == expected["payload_len"]
    assert encode(packet) == datagram


def test_other_traffic_does_not_decode() -> None:
    udx = encode(Packet(0, 5, 0, 0, 0))
    for other in (b"", b"\x00", udx[:19], b"\xfe" + udx[1:], b"\xff\x02" + udx[2:]):
        with pytest.raises(DecodeError):
            decode(other)


def test_extension_beyond_the_end() -> None:
    datagram = bytearray(encode(Packet(wire.DATA, 1, 0, 0, 0, b"abc")))
    datagram[3] = 4
    with pytest.raises(DecodeError):
        decode(bytes(datagram))
    datagram[3] = 3
    assert decode(bytes(datagram)).payload == b""


def test_data_behind_sack_blocks() -> None:
    packet = Packet(wire.DATA | wire.SACK, 1, 0, 0, 0, b"data", ((3, 4), (6, 9)))
    datagram = encode(packet)
    assert datagram[3] == 16
    assert decode(datagram) == packet


def test_stray_bytes_behind_sack_blocks_are_ignored() -> None:
    datagram = encode(Packet(wire.SACK, 1, 0, 0, 0, b"", ((3, 4),)))
    assert decode(datagram + b"1234567").sacks == ((3, 4),)


def test_no_more_than_fifty_sack_blocks_are_read() -> None:
    blocks = tuple((i, i + 1) for i in range(0, 140, 2))
    assert decode(encode(Packet(wire.SACK, 1, 0, 0, 0, b"", blocks))).sacks == blocks[:50]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(U32, U32, U32, U32, st.integers(1, 64))
def test_headers_of_a_run_are_those_of_its_packets(
    identifier: int, window: int, first: int, ack: int, count: int
) -> None:
    packets = [
        Packet(wire.DATA, identifier, window, (first + each) % 2**32, ack) for each in range(count)
    ]
    assert list(plain_headers(identifier, window, first, ack, count)) == list(map(encode, packets))


def test_headers_of_a_run_across_the_last_number() -> None:
    headers = plain_headers(1, 2, 2**32 - 2, 3, 4)
    assert [decode(each).seq for each in headers] == [2**32 - 2, 2**32 - 1, 0, 1]
    assert all(len(each) == HEADER_BYTES for each in headers)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_cells(kind: type[bytes]) -> None:
    assert cells(kind(b"abcdefgh"), 1, 2, 3) == (b"bc", b"de", b"fg")


@pytest.mark.parametrize("near", [0, 5, 2**31, 2**32 - 1, 2**32, 2**40 + 77])
@pytest.mark.parametrize("distance", [-(2**31), -1, 0, 1, 2**31 - 1])
def test_expand_is_serial_arithmetic(near: int, distance: int) -> None:
    assert expand((near + distance) % 2**32, near) == near + distance


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.builds(
        Packet,
        type=st.sampled_from([0, wire.DATA, wire.END, wire.MESSAGE, wire.DESTROY, 0xC1]),
        id=U32,
        window=U32,
        seq=U32,
        ack=U32,
        payload=st.binary(max_size=100),
        sacks=st.just(()),
        padding=st.integers(0, 255),
    )
)
def test_round_trip(packet: Packet) -> None:
    assert decode(encode(packet)) == packet


@settings(deadline=None, derandomize=True, max_examples=500)
@given(st.binary(max_size=600), st.booleans())
def test_arbitrary_bytes_decode_or_raise_decode_error(noise: bytes, udx: bool) -> None:
    try:
        packet = decode(b"\xff\x01" + noise if udx else noise)
    except DecodeError:
        return
    assert len(packet.sacks) <= wire.MAX_SACK_BLOCKS
    assert len(packet.payload) + packet.padding <= len(noise)
