"""UDX packets: 20 bytes of header, an extension, a payload (spec: udx 1).

    0    1    2     3        4   8       12   16   20         20 + offset
    ff | 01 | type | offset | id | window | seq | ack | extension | payload

All numbers are little-endian. ``id`` is the receiver's name for the stream, ``offset`` the length
of the extension in bytes, which holds SACK blocks or the zeros of an MTU probe.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

from ..errors import DecodeError
from ..transmit import Buffer

HEADER_BYTES = 20
MAGIC = 0xFF
VERSION = 1

#: The types are bits; none of them set is a pure ACK (spec: udx 1.2).
ACK = 0x00
DATA = 0x01
END = 0x02
SACK = 0x04
MESSAGE = 0x08
DESTROY = 0x10
HEARTBEAT = 0x20

#: Blocks in one packet: the reference sends no more, and more are not looked at (spec: udx 1.5).
MAX_SACK_BLOCKS = 50
#: The extension's length is one byte.
MAX_PADDING = 255

SEQ_MASK = 0xFFFFFFFF
_SEQ_HALF = 0x80000000

#: The whole header, magic and version first.
HEADER = struct.Struct("<BBBBIIII")
_BLOCK = struct.Struct("<II")


class Packet(NamedTuple):
    """One packet. Numbers are as on the wire: 0..2**32 - 1."""

    type: int
    #: The receiver's id of the stream.
    id: int
    #: Free bytes in the sender's receive buffer.
    window: int
    #: Number of this packet, or of the sender's next one if the type takes none (spec: udx 1.4).
    seq: int
    #: Next number the sender expects.
    ack: int
    payload: bytes = b""
    #: Half-open ranges of numbers that arrived beyond ``ack``, ascending.
    sacks: tuple[tuple[int, int], ...] = ()
    #: Zero bytes between header and payload; not together with ``sacks``.
    padding: int = 0


def decode(datagram: bytes) -> Packet:
    """The packet in a datagram. Unknown type bits and SACK blocks beyond `MAX_SACK_BLOCKS` are
    left for the reader to ignore. Raises DecodeError."""
    if len(datagram) < HEADER_BYTES:
        raise DecodeError(f"{len(datagram)} bytes are too short for a UDX header")
    magic, version, kind, offset, identifier, window, seq, ack = HEADER.unpack_from(datagram)
    if magic != MAGIC or version != VERSION:
        raise DecodeError("not a UDX packet of version 1")
    if offset == 0 and not kind & SACK:
        return Packet(kind, identifier, window, seq, ack, datagram[HEADER_BYTES:])
    body = len(datagram) - HEADER_BYTES
    if offset > body:
        raise DecodeError(f"the extension of {offset} bytes exceeds the {body} bytes there are")
    payload = datagram[HEADER_BYTES + offset :]
    if not kind & SACK:
        return Packet(kind, identifier, window, seq, ack, payload, (), offset)
    # The blocks are the extension if there is one with something behind it, else the whole body
    # (spec: udx 1.3).
    area = offset if 0 < offset < body else body
    blocks = min(area // _BLOCK.size, MAX_SACK_BLOCKS)
    numbers = struct.unpack_from(f"<{2 * blocks}I", datagram, HEADER_BYTES)
    sacks = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    if not kind & (DATA | MESSAGE):
        payload = b""
    return Packet(kind, identifier, window, seq, ack, payload, sacks)


class PacketRun(NamedTuple):
    """The fields of packets of one size, packet by packet."""

    #: Magic, version, type and offset: 4 bytes.
    starts: tuple[bytes, ...]
    ids: tuple[int, ...]
    windows: tuple[int, ...]
    seqs: tuple[int, ...]
    acks: tuple[int, ...]
    #: What follows the header.
    payloads: tuple[bytes, ...]

    def consecutive(self, first: int) -> int:
        """The index behind the packets that begin and continue with packet ``first``: the same
        stream and type, and one number after the other."""
        start, name, seq = self.starts[first], self.ids[first], self.seqs[first]
        seqs = self.seqs
        whole = len(seqs) - first
        if (
            seqs[-1] - seq == whole - 1
            and self.ids.count(name) == len(seqs)
            and self.starts.count(start) == len(seqs)
            and seqs[first:] == tuple(range(seq, seq + whole))
        ):
            return len(seqs)
        index = first + 1
        while (
            index < len(seqs)
            and seqs[index] == (seq + index - first) & SEQ_MASK
            and self.ids[index] == name
            and self.starts[index] == start
        ):
            index += 1
        return index


@lru_cache(maxsize=256)
def _rows(size: int) -> struct.Struct:
    return struct.Struct(f"<4sIIII{size - HEADER_BYTES}s")


def split(data: memoryview, size: int) -> PacketRun:
    """Take apart packets of ``size`` bytes each, at least one; a shorter rest is left alone. All
    in a few calls: this is where bulk data comes in."""
    whole = len(data) // size * size
    return PacketRun(*zip(*_rows(size).iter_unpack(data[:whole]), strict=True))


@lru_cache(maxsize=256)
def _cells(size: int, count: int) -> struct.Struct:
    return struct.Struct("<" + f"{size}s" * count)


def cells(data: Buffer, offset: int, size: int, count: int) -> tuple[bytes, ...]:
    """``count`` pieces of ``size`` bytes each, from ``offset`` on, in one call."""
    return _cells(size, count).unpack_from(data, offset)


@lru_cache(maxsize=64)
def _table(count: int) -> struct.Struct:
    return struct.Struct("<" + "12sII" * count)


def plain_headers(
    identifier: int, window: int, first: int, ack: int, count: int
) -> tuple[bytes, ...]:
    """The headers of ``count`` packets of plain data, numbered from ``first`` on."""
    fields: list[bytes | int] = [
        HEADER.pack(MAGIC, VERSION, DATA, 0, identifier, window, 0, 0)[:12]
    ]
    fields *= 3 * count
    numbers = range(first, first + count)
    wraps = first + count > SEQ_MASK
    fields[1::3] = [number & SEQ_MASK for number in numbers] if wraps else numbers
    fields[2::3] = [ack] * count
    return cells(_table(count).pack(*fields), 0, HEADER_BYTES, count)


def encode(packet: Packet) -> bytes:
    """The datagram of a packet. SACK blocks of packets with a payload go into the extension."""
    kind, identifier, window, seq, ack, payload, sacks, padding = packet
    blocks = b"".join([_BLOCK.pack(start, end) for start, end in sacks])
    offset = len(blocks) if blocks and payload else padding
    header = HEADER.pack(MAGIC, VERSION, kind, offset, identifier, window, seq, ack)
    return b"".join((header, blocks, bytes(padding), payload))


def expand(seq: int, near: int) -> int:
    """The number without wrap-around that a number of the wire means, within 2**31 of ``near``
    (spec: udx, serial arithmetic)."""
    distance = (seq - near) & SEQ_MASK
    return near + (distance if distance < _SEQ_HALF else distance - SEQ_MASK - 1)
