"""Compact encoding: the bytes of every structure on the wire (spec: hyperdht 1).

A `Writer` appends, a `Reader` walks a cursor. There are no type tags and no terminators, and bytes
after a complete structure are ignored: that is how the format grows.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TypeVar

from .errors import DecodeError, InvalidInput
from .transmit import Address, Buffer

T = TypeVar("T")

#: Counts above this are refused: nothing on this wire has so many items.
MAX_ARRAY = 1_048_576
#: Lists of addresses whose decoded form is remembered: peers say the same in each handshake.
_LISTS = 256
#: JavaScript peers cannot represent integers above this exactly.
MAX_INTEGER = 2**53 - 1

_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_ADDRESS = struct.Struct("<BBBBH")


def encode_uint(value: int) -> bytes:
    """Shortest form of an integer 0..2**53-1: 1, 3, 5 or 9 bytes (signatures cover these bytes)."""
    if value < 0 or value > MAX_INTEGER:
        raise InvalidInput(f"{value} does not fit: use an integer from 0 to {MAX_INTEGER}")
    if value <= 252:
        return bytes((value,))
    if value <= 0xFFFF:
        return b"\xfd" + _U16.pack(value)
    if value <= 0xFFFFFFFF:
        return b"\xfe" + _U32.pack(value)
    return b"\xff" + _U64.pack(value)


def encode_address(address: Address) -> bytes:
    """6 bytes: the host in dotted order, the port little-endian."""
    host, port = address
    try:
        octets = bytes(map(int, host.split(".")))
        if len(octets) != 4:
            raise ValueError(host)
        return octets + _U16.pack(port)
    except (ValueError, struct.error) as error:
        raise InvalidInput(f"{host}:{port} is not an IPv4 address and port") from error


def decode_address(data: Buffer) -> Address:
    """The host in dotted text and the port of 6 bytes."""
    return f"{data[0]}.{data[1]}.{data[2]}.{data[3]}", data[4] | data[5] << 8


def read_uint(data: bytes, position: int) -> tuple[int, int]:
    """The integer at ``position``, and where it ends: `Reader.uint` for those who walk a structure
    without a `Reader`. Raises `DecodeError` when bytes are missing."""
    if position >= len(data):
        raise DecodeError("integer missing")
    first = data[position]
    if first <= 252:
        return first, position + 1
    end = position + 1 + (2 << (first - 253))
    if end > len(data):
        raise DecodeError("integer cut short")
    value = int.from_bytes(data[position + 1 : end], "little")
    if value > MAX_INTEGER:
        raise DecodeError("integer above 2**53-1")
    return value, end


def read_addresses(data: bytes, position: int, limit: int) -> tuple[tuple[Address, ...], int]:
    """The array of addresses at ``position``, and where it ends. Raises `DecodeError` when bytes
    are missing or there are more than ``limit``."""
    count, position = read_uint(data, position)
    end = position + 6 * count
    if count > limit:
        raise DecodeError(f"{count} addresses")
    if end > len(data):
        raise DecodeError(f"{count} addresses announced, not there")
    return _decoded(data[position:end]), end


@lru_cache(_LISTS)
def _decoded(data: bytes) -> tuple[Address, ...]:
    return tuple((f"{a}.{b}.{c}.{d}", port) for a, b, c, d, port in _ADDRESS.iter_unpack(data))


def encode_address6(address: Address) -> bytes:
    """18 bytes: eight big-endian groups, the port little-endian."""
    host, port = address
    try:
        return ipaddress.IPv6Address(host).packed + _U16.pack(port)
    except (ValueError, struct.error) as error:
        raise InvalidInput(f"{host} is not an IPv6 address") from error


class Writer:
    """Collects fields; `bytes(writer)` is the structure."""

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        self._parts: list[Buffer] = []

    def __bytes__(self) -> bytes:
        return b"".join(self._parts)

    def uint(self, value: int) -> Writer:
        self._parts.append(encode_uint(value))
        return self

    def u8(self, value: int) -> Writer:
        self._parts.append(bytes((value,)))
        return self

    def u16(self, value: int) -> Writer:
        self._parts.append(_U16.pack(value))
        return self

    def u32(self, value: int) -> Writer:
        self._parts.append(_U32.pack(value))
        return self

    def u64(self, value: int) -> Writer:
        self._parts.append(_U64.pack(value))
        return self

    def fixed(self, value: bytes, size: int) -> Writer:
        """Exactly ``size`` raw bytes (fixed32, fixed64)."""
        if len(value) != size:
            raise InvalidInput(f"{size} bytes are needed, not {len(value)}")
        self._parts.append(value)
        return self

    def raw(self, value: Buffer) -> Writer:
        """Bytes without a length, up to the end of the structure."""
        self._parts.append(value)
        return self

    def buffer(self, value: Buffer | None) -> Writer:
        """Length and bytes. None is written as length 0 (the wire's ``optionalBuffer``)."""
        value = b"" if value is None else value
        self._parts.append(encode_uint(len(value)))
        self._parts.append(value)
        return self

    def string(self, value: str) -> Writer:
        return self.buffer(value.encode())

    def bool(self, value: bool) -> Writer:
        return self.u8(1 if value else 0)

    def address(self, value: Address) -> Writer:
        self._parts.append(encode_address(value))
        return self

    def address6(self, value: Address) -> Writer:
        self._parts.append(encode_address6(value))
        return self

    def array(self, values: Iterable[T], write: Callable[[Writer, T], object]) -> Writer:
        """A count, then each item by ``write(self, item)``."""
        items = list(values)
        self.uint(len(items))
        for item in items:
            write(self, item)
        return self


class Reader:
    """A cursor over one structure. Every method raises `DecodeError` when bytes are missing."""

    __slots__ = ("_end", "_position", "_view")

    def __init__(self, data: Buffer) -> None:
        self._view = memoryview(data)
        self._position = 0
        self._end = len(self._view)

    @property
    def remaining(self) -> int:
        """Bytes not yet read."""
        return self._end - self._position

    def _take(self, size: int) -> memoryview:
        start = self._position
        stop = start + size
        if stop > self._end:
            raise DecodeError(f"{size} bytes announced, {self._end - start} there")
        self._position = stop
        return self._view[start:stop]

    def uint(self) -> int:
        """Any of the four forms, shortest or not; above 2**53-1 is an error."""
        first = self._take(1)[0]
        if first <= 252:
            return first
        if first == 0xFD:
            return self.u16()
        if first == 0xFE:
            return self.u32()
        return self.u64()

    def u8(self) -> int:
        return self._take(1)[0]

    def u16(self) -> int:
        value: int = _U16.unpack(self._take(2))[0]
        return value

    def u32(self) -> int:
        value: int = _U32.unpack(self._take(4))[0]
        return value

    def u64(self) -> int:
        value: int = _U64.unpack(self._take(8))[0]
        if value > MAX_INTEGER:
            raise DecodeError("integer above 2**53-1")
        return value

    def fixed(self, size: int) -> bytes:
        return bytes(self._take(size))

    def raw(self) -> bytes:
        return bytes(self._take(self.remaining))

    def buffer(self) -> bytes:
        return bytes(self._take(self.uint()))

    def optional_buffer(self) -> bytes | None:
        """Length 0 means absent."""
        return self.buffer() or None

    def string(self) -> str:
        try:
            return self.buffer().decode()
        except UnicodeDecodeError as error:
            raise DecodeError("text is not UTF-8") from error

    def bool(self) -> bool:
        return self.u8() == 1

    def address(self) -> Address:
        return decode_address(self._take(6))

    def address6(self) -> Address:
        return str(ipaddress.IPv6Address(bytes(self._take(16)))), self.u16()

    def array(self, read: Callable[[Reader], T]) -> list[T]:
        count = self.uint()
        if count > MAX_ARRAY:
            raise DecodeError(f"array of {count} items")
        return [read(self) for _ in range(count)]
