"""Compact encoding against the recorded bytes, and against any bytes at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import load

from hyperseaport.transport.encoding import (
    MAX_INTEGER,
    Reader,
    Writer,
    decode_address,
    encode_address,
    encode_uint,
    read_addresses,
    read_uint,
)
from hyperseaport.transport.errors import DecodeError, InvalidInput


def _address(value: dict[str, Any]) -> tuple[str, int]:
    return value["host"], value["port"]


#: Type -> (write a vector's value, read it back as the vector has it).
CODECS: dict[str, tuple[Callable[[Writer, Any], object], Callable[[Reader], Any]]] = {
    "uint": (Writer.uint, Reader.uint),
    "uint16": (Writer.u16, Reader.u16),
    "uint32": (Writer.u32, Reader.u32),
    "uint64": (Writer.u64, Reader.u64),
    "buffer": (lambda w, v: w.buffer(bytes.fromhex(v)), lambda r: r.buffer().hex()),
    "optionalBuffer": (
        lambda w, v: w.buffer(None if v is None else bytes.fromhex(v)),
        lambda r: (lambda v: None if v is None else v.hex())(r.optional_buffer()),
    ),
    "string": (Writer.string, Reader.string),
    "bool": (Writer.bool, Reader.bool),
    "fixed32": (lambda w, v: w.fixed(bytes.fromhex(v), 32), lambda r: r.fixed(32).hex()),
    "fixed64": (lambda w, v: w.fixed(bytes.fromhex(v), 64), lambda r: r.fixed(64).hex()),
    "raw": (lambda w, v: w.raw(bytes.fromhex(v)), lambda r: r.raw().hex()),
    "ipv4Address": (lambda w, v: w.address(_address(v)), Reader.address),
    "ipv6Address": (lambda w, v: w.address6(_address(v)), Reader.address6),
    "array<ipv4Address>": (
        lambda w, v: w.array(map(_address, v), Writer.address),
        lambda r: r.array(Reader.address),
    ),
}


def _comparable(kind: str, value: Any) -> Any:
    if kind == "ipv4Address":
        return _address(value)
    if kind == "ipv6Address":
        return Reader(bytes(Writer().address6(_address(value)))).address6()
    if kind == "array<ipv4Address>":
        return [_address(item) for item in value]
    return value


@pytest.mark.parametrize("vector", load("hyperdht")["primitives"], ids=lambda v: v["type"])
def test_primitives_encode_and_decode(vector: dict[str, Any]) -> None:
    write, read = CODECS[vector["type"]]
    writer = Writer()
    write(writer, vector["value"])
    assert bytes(writer).hex() == vector["hex"]
    reader = Reader(bytes.fromhex(vector["hex"]))
    assert read(reader) == _comparable(vector["type"], vector["value"])
    assert reader.remaining == 0


@given(st.integers(0, MAX_INTEGER))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_integers_round_trip_in_their_shortest_form(value: int) -> None:
    data = encode_uint(value)
    assert Reader(data).uint() == value
    assert len(data) == next(
        size for size, limit in ((1, 252), (3, 2**16 - 1), (5, 2**32 - 1), (9, MAX_INTEGER))
        if value <= limit
    )  # fmt: skip


@pytest.mark.parametrize("data", ["fd0100", "fe01000000", "ff0100000000000000"])
def test_longer_forms_of_an_integer_are_read_too(data: str) -> None:
    assert Reader(bytes.fromhex(data)).uint() == 1


def test_integers_that_javascript_cannot_hold_are_refused() -> None:
    with pytest.raises(DecodeError):
        Reader(b"\xff" + (MAX_INTEGER + 1).to_bytes(8, "little")).uint()
    with pytest.raises(InvalidInput):
        encode_uint(MAX_INTEGER + 1)
    with pytest.raises(InvalidInput):
        encode_uint(-1)


def test_an_array_of_too_many_items_is_refused_before_it_is_read() -> None:
    with pytest.raises(DecodeError, match="array"):
        Reader(encode_uint(1_048_577)).array(Reader.u8)


@pytest.mark.parametrize("host", ["", "1.2.3", "1.2.3.4.5", "1.2.3.256", "localhost", "::1"])
def test_only_dotted_ipv4_hosts_are_encoded(host: str) -> None:
    with pytest.raises(InvalidInput):
        encode_address((host, 1))


@given(st.tuples(st.ip_addresses(v=4).map(str), st.integers(0, 65535)))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_addresses_round_trip(address: tuple[str, int]) -> None:
    data = encode_address(address)
    assert len(data) == 6
    assert decode_address(data) == address


@given(st.binary(max_size=64), st.sampled_from(sorted(CODECS)))
@settings(deadline=None, derandomize=True, max_examples=400)
def test_readers_survive_any_bytes(data: bytes, kind: str) -> None:
    reader = Reader(data)
    try:
        CODECS[kind][1](reader)
    except DecodeError:
        return
    assert 0 <= reader.remaining <= len(data)


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 65535)), max_size=8), st.binary())
@settings(deadline=None, derandomize=True)
def test_addresses_without_a_reader(numbers: list[tuple[int, int]], rest: bytes) -> None:
    addresses = tuple((f"1.2.3.{octet}", port) for octet, port in numbers)
    data = b"?" + bytes(Writer().array(addresses, Writer.address))
    assert read_addresses(data + rest, 1, 8) == (addresses, len(data))
    with pytest.raises(DecodeError):
        read_addresses(data[:-1], 1, 8)
    if addresses:
        with pytest.raises(DecodeError):
            read_addresses(data, 1, len(addresses) - 1)


@given(st.binary(max_size=12), st.integers(0, 3))
@settings(deadline=None, derandomize=True)
def test_integers_without_a_reader(data: bytes, position: int) -> None:
    reader = Reader(data[position:])
    try:
        value = reader.uint()
    except DecodeError:
        with pytest.raises(DecodeError):
            read_uint(data, position)
    else:
        assert read_uint(data, position) == (value, len(data) - reader.remaining)
