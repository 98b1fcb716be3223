"""JSON-RPC over a stream of messages (spec: secure-stream-and-registry 5).

One JSON text a line, both ends may ask, there is no greeting. Lines in, events out; texts are those
that ``JSON.stringify`` makes of the same values, since Node programs are on the other side.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal
from enum import Enum
from typing import Final, TypeAlias

from msgspec import Struct

from .errors import Closed, InvalidInput, LocalError, ProtocolError

#: Longest line, in bytes, either way. The protocol has no limit; what the registry exchanges stays
#: far below this, and a peer must not fill memory with one line.
MAX_LINE = 1024 * 1024
#: Requests that wait for their response. A peer that never answers must not make this grow.
MAX_IN_FLIGHT = 1024
#: Depth of arrays and objects in a received line. Whoever walks a value may do so recursively.
MAX_NESTING = 100

_MAX_EXACT_INTEGER = 2**53
#: From here on JavaScript prints whole numbers with an exponent, as Python does floats.
_MIN_EXPONENT_FORM = 1e21


class Absent(Enum):
    """What JavaScript calls undefined: the member is not in the text at all."""

    ABSENT = "absent"

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Final = Absent.ABSENT

#: `ABSENT` or a JSON value as the json module has it. Numbers that JavaScript prints as whole ones
#: are ints, whatever form they came in; other numbers are finite floats.
Json: TypeAlias = object


class RpcRequest(Struct, frozen=True):
    """The peer asks. Answer with `RpcPeer.reply` or `RpcPeer.fail`, at any time, in any order."""

    #: A method that is no text is here as its JSON text, which names none.
    method: str
    params: Json
    #: Any JSON value, echoed as it came.
    id: Json

    @property
    def wants_reply(self) -> bool:
        """False for a notification."""
        return _truthy(self.id)


class RpcResponse(Struct, frozen=True):
    """The peer has answered the request of this id, which is no longer in flight."""

    id: int
    #: `ABSENT` when the peer's handler returned nothing. Means nothing when there is an error.
    result: Json
    #: Why the request failed, else None.
    error: str | None


class RpcFailure(Struct, frozen=True):
    """The last event of a peer that sent no JSON: destroy the stream (spec 5.3)."""

    error: ProtocolError


RpcEvent: TypeAlias = RpcRequest | RpcResponse | RpcFailure


class RpcPeer:
    """One end of one connection."""

    __slots__ = ("_closed", "_failed", "_in_flight", "_line", "_next_id")

    def __init__(self) -> None:
        self._next_id = 1
        self._in_flight: set[int] = set()
        self._line = bytearray()
        self._failed = False
        self._closed = False

    @property
    def in_flight(self) -> frozenset[int]:
        """Ids of the requests that wait for their response."""
        return frozenset(self._in_flight)

    def request(self, method: str, params: Json = ABSENT) -> tuple[int, bytes]:
        """The id, 1 and up, and the line to send.

        Raises `Closed` after `close`, `LocalError` when `MAX_IN_FLIGHT` requests wait already, and
        `InvalidInput` for params that are no JSON values or above `MAX_LINE`.
        """
        if self._closed:
            raise Closed("the connection is closed: open a new one")
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            raise LocalError(f"{MAX_IN_FLIGHT} requests wait already: await responses first")
        identifier = self._next_id
        line = _line({"method": method, "params": params, "id": identifier})
        self._next_id += 1
        self._in_flight.add(identifier)
        return identifier, line

    def notify(self, method: str, params: Json = ABSENT) -> bytes:
        """The line of a request that gets no response."""
        if self._closed:
            raise Closed("the connection is closed: open a new one")
        return _line({"method": method, "params": params, "id": 0})

    def forget(self, identifier: int) -> None:
        """Give up waiting for a response: if it comes after all, it is ignored."""
        self._in_flight.discard(identifier)

    def reply(self, request: RpcRequest, result: Json = ABSENT) -> bytes:
        """The line that answers a request; empty when it wants no reply."""
        if not request.wants_reply:
            return b""
        return _line({"result": result, "error": None, "id": request.id})

    def fail(self, request: RpcRequest, text: str) -> bytes:
        """The line that says why a request failed; empty when it wants no reply."""
        if not request.wants_reply:
            return b""
        # A peer takes an empty text for success (spec 5.2).
        return _line({"result": None, "error": text or "request failed", "id": request.id})

    def receive(self, data: bytes) -> list[RpcEvent]:
        """What these bytes complete. Never raises; after an `RpcFailure` all bytes are ignored."""
        events: list[RpcEvent] = []
        if self._failed:
            return events
        searched = len(self._line)
        self._line += data
        start = 0
        try:
            while (stop := self._line.find(b"\n", searched)) >= 0:
                event = self._event(self._line[start:stop])
                if event is not None:
                    events.append(event)
                start = searched = stop + 1
            if len(self._line) - start > MAX_LINE:
                raise ProtocolError(f"line of more than {MAX_LINE} bytes")
            del self._line[:start]
        except ProtocolError as error:
            self._failed = True
            self._line = bytearray()
            events.append(RpcFailure(error))
        return events

    def close(self) -> frozenset[int]:
        """Ids of the requests that will not be answered any more; `request` raises from now on."""
        lost = frozenset(self._in_flight)
        self._in_flight.clear()
        self._closed = True
        return lost

    def _event(self, line: bytearray) -> RpcEvent | None:
        value = _parse(line)
        if not isinstance(value, dict):
            return None
        identifier = value.get("id")
        method = value.get("method")
        if _truthy(method):
            name = method if isinstance(method, str) else _text(method)
            return RpcRequest(name, value.get("params", ABSENT), identifier)
        # The type counts too: "1" and true are not 1.
        if type(identifier) is not int or identifier not in self._in_flight:
            return None
        self._in_flight.remove(identifier)
        error = value.get("error")
        if not _truthy(error):
            return RpcResponse(identifier, value.get("result", ABSENT), None)
        text = error if isinstance(error, str) else _text(error)
        return RpcResponse(identifier, value.get("result", ABSENT), text)


def _parse(line: bytearray) -> object:
    if len(line) > MAX_LINE:
        raise ProtocolError(f"line of {len(line)} bytes, more than {MAX_LINE}")
    try:
        # No UTF-8 character contains a newline's byte, so whole lines decode as the stream would.
        value: object = _DECODER.decode(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise ProtocolError("line is not JSON") from error
    if line.count(b"[") + line.count(b"{") > MAX_NESTING and _nesting(value) > MAX_NESTING:
        raise ProtocolError(f"line nests deeper than {MAX_NESTING}")
    return value


def _nesting(value: object) -> int:
    depth = 0
    level = [value]
    while level := [
        item
        for container in level
        if isinstance(container, (dict, list))
        for item in (container.values() if isinstance(container, dict) else container)
    ]:
        depth += 1
    return depth


def _integer(text: str) -> float | int | None:
    # Beyond 16 digits the number may not be exact in JavaScript, and from 4300 digits on Python
    # refuses.
    if len(text) <= 16 and abs(value := int(text)) <= _MAX_EXACT_INTEGER:
        return value
    return _float(text)


def _float(text: str) -> float | int | None:
    """The number as JavaScript would print it: 1.0 is 1, and 1e999, which it prints null, None."""
    value = float(text)
    if not math.isfinite(value):
        return None
    if value.is_integer() and abs(value) < _MIN_EXPONENT_FORM:
        return int(Decimal(repr(value)))
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_float, parse_constant=_refuse)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _text(value: object) -> str:
    try:
        return _ENCODER.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"the value has no JSON text: {error}") from error


def _line(members: dict[str, object]) -> bytes:
    present = {name: value for name, value in members.items() if value is not ABSENT}
    # A lone surrogate, which JSON can carry and UTF-8 cannot, becomes its JSON escape.
    line = _text(present).encode("utf-8", "backslashreplace")
    if len(line) > MAX_LINE:
        raise InvalidInput(f"a line has at most {MAX_LINE} bytes, not {len(line)}")
    return line + b"\n"


def _truthy(value: object) -> bool:
    """JavaScript's notion: empty arrays and objects are true."""
    return isinstance(value, (list, dict)) or bool(value)
