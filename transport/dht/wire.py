"""dht-rpc datagrams: requests and responses (spec: hyperdht 2.3, 2.4).

A datagram is decoded in one walk without a cursor object: this runs for every datagram of the
DHT. Reading past the end shows as a position behind the end, checked once.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from ..encoding import encode_uint, read_uint
from ..errors import DecodeError
from ..transmit import Address
from .addresses import node_id, packed

#: First byte of a datagram: version 3 and the type (spec: hyperdht 2.1).
REQUEST = 0x03
RESPONSE = 0x13

#: Internal commands (spec: hyperdht 2.6).
PING = 0
PING_NAT = 1
FIND_NODE = 2
DOWN_HINT = 3
DELAYED_PING = 4

#: Errors of a response; 16 and above belong to the application (spec: hyperdht 2.4).
ERROR_NONE = 0
ERROR_UNKNOWN_COMMAND = 1
ERROR_INVALID_TOKEN = 2

_ID = 1
_TOKEN = 2
_INTERNAL = 4
_CLOSER_NODES = 4
_TARGET = 8
_ERROR = 8
_VALUE = 16

_HEAD = struct.Struct("<BBH")
_FIELDS = struct.Struct("<BBHBBBBH")
_NODE = struct.Struct("<BBBBH")


@dataclass(slots=True)
class Request:
    """A request as it arrived."""

    tid: int
    #: In the number space that ``internal`` selects.
    command: int
    internal: bool
    #: 32 bytes each, or None.
    target: bytes | None
    token: bytes | None
    value: bytes | None
    #: The sender's id; None when it sent none or one that is not the hash of its address.
    id: bytes | None
    #: Our address as the sender wrote it.
    to: Address
    source: Address
    #: The socket it arrived on, and from which it is answered.
    socket: int


@dataclass(slots=True)
class Reply:
    """A response as it arrived."""

    #: The responder's id; None when it sent none or one that is not the hash of its address.
    id: bytes | None
    source: Address
    #: Our address as the responder sees it.
    to: Address
    #: 32 bytes, or None.
    token: bytes | None
    closer_nodes: list[Address]
    error: int
    value: bytes | None
    #: The socket it arrived on; not always the one the request left from (PING_NAT).
    socket: int
    tid: int
    #: Seconds since the last transmission of the request, and since it was made; 0 until it is
    #: matched with one.
    rtt: float = 0.0
    waited: float = 0.0


def encode_request(
    tid: int,
    to: Address,
    command: int,
    *,
    internal: bool = False,
    id: bytes | None = None,  # noqa: A002 -- the wire's name
    token: bytes | None = None,
    target: bytes | None = None,
    value: bytes | None = None,
) -> bytes:
    """A request datagram. ``id``, ``token`` and ``target`` have 32 bytes; an empty ``value`` is
    sent as one, None as absent."""
    flags = (
        (_ID if id is not None else 0)
        | (_TOKEN if token is not None else 0)
        | (_INTERNAL if internal else 0)
        | (_TARGET if target is not None else 0)
        | (_VALUE if value is not None else 0)
    )
    return b"".join(
        (
            _HEAD.pack(REQUEST, flags, tid),
            packed(to),
            id or b"",
            token or b"",
            encode_uint(command),
            target or b"",
            b"" if value is None else encode_uint(len(value)),
            value or b"",
        )
    )


def encode_response(
    tid: int,
    to: Address,
    *,
    id: bytes | None = None,  # noqa: A002 -- the wire's name
    token: bytes | None = None,
    closer_nodes: Sequence[Address] = (),
    error: int = ERROR_NONE,
    value: bytes | None = None,
) -> bytes:
    """A response datagram; the list of closer nodes is left out when empty, the error when 0."""
    flags = (
        (_ID if id is not None else 0)
        | (_TOKEN if token is not None else 0)
        | (_CLOSER_NODES if closer_nodes else 0)
        | (_ERROR if error else 0)
        | (_VALUE if value is not None else 0)
    )
    parts = [_HEAD.pack(RESPONSE, flags, tid), packed(to), id or b"", token or b""]
    if closer_nodes:
        parts.append(encode_uint(len(closer_nodes)))
        parts.extend(map(packed, closer_nodes))
    if error:
        parts.append(encode_uint(error))
    if value is not None:
        parts.append(encode_uint(len(value)))
        parts.append(value)
    return b"".join(parts)


def decode_request(datagram: bytes, socket: int, source: Address) -> Request:
    """Raises `DecodeError` for anything cut short. Bytes behind the request are ignored."""
    kind, flags, tid, to, position = _decode_head(datagram)
    if kind != REQUEST:
        raise DecodeError("not a request")
    sender = token = target = value = None
    if flags & _ID:
        sender, position = _validated(datagram[position : position + 32], source), position + 32
    if flags & _TOKEN:
        token, position = datagram[position : position + 32], position + 32
    command, position = read_uint(datagram, position)
    if flags & _TARGET:
        target, position = datagram[position : position + 32], position + 32
    if flags & _VALUE:
        size, position = read_uint(datagram, position)
        value, position = datagram[position : position + size], position + size
    if position > len(datagram):
        raise DecodeError("request cut short")
    internal = bool(flags & _INTERNAL)
    return Request(tid, command, internal, target, token, value, sender, to, source, socket)


def decode_response(datagram: bytes, socket: int, source: Address) -> Reply:
    """Raises `DecodeError` for anything cut short. Bytes behind the response are ignored."""
    kind, flags, tid, to, position = _decode_head(datagram)
    if kind != RESPONSE:
        raise DecodeError("not a response")
    sender = token = value = None
    closer_nodes: list[Address] = []
    error = ERROR_NONE
    if flags & _ID:
        sender, position = _validated(datagram[position : position + 32], source), position + 32
    if flags & _TOKEN:
        token, position = datagram[position : position + 32], position + 32
    if flags & _CLOSER_NODES:
        count, position = read_uint(datagram, position)
        end = position + 6 * count
        if end > len(datagram):
            raise DecodeError(f"{count} nodes announced, not there")
        for a, b, c, d, port in _NODE.iter_unpack(datagram[position:end]):
            closer_nodes.append((f"{a}.{b}.{c}.{d}", port))
        position = end
    if flags & _ERROR:
        error, position = read_uint(datagram, position)
    if flags & _VALUE:
        size, position = read_uint(datagram, position)
        value, position = datagram[position : position + size], position + size
    if position > len(datagram):
        raise DecodeError("response cut short")
    return Reply(sender, source, to, token, closer_nodes, error, value, socket, tid)


def _decode_head(datagram: bytes) -> tuple[int, int, int, Address, int]:
    if len(datagram) < _FIELDS.size:
        raise DecodeError("datagram cut short")
    kind, flags, tid, a, b, c, d, port = _FIELDS.unpack_from(datagram)
    if flags > 252:
        raise DecodeError("flags of more than one byte")
    return kind, flags, tid, (f"{a}.{b}.{c}.{d}", port), _FIELDS.size


def _validated(id: bytes, source: Address) -> bytes | None:  # noqa: A002
    """An id that is not the hash of the sender's address counts as none (spec: hyperdht 2.2)."""
    return id if id == node_id(source) else None
