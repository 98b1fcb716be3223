"""Signed leases: what a service says of itself, so that nobody has to believe a registry.

A statement is a JSON text, signed as it stands:

    {"v":1,"key":<64 hex>,"meta":{...},"instance":<32 hex>,"sequence":<int>,
     "issued":<Unix ms>,"ttl":<seconds>}

The signature is Ed25519, by the service's key, over `PREFIX` and the text in UTF-8. Whoever gets
one, from a service or by way of a registry, goes through `Verifier.verify`.
"""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...transport.errors import InvalidInput, RemoteError
from ...transport.keys import KeyPair, blake2b, verify
from . import matching
from .roles import Meta

#: Keeps these signatures apart from whatever else a service's key may sign.
PREFIX = b"hyperseaport lease 1\n"
#: Seconds that a lease lives unless its owner says otherwise, and the most that it may say: a
#: service that is gone without a word is forgotten in that time.
DEFAULT_TTL = 30.0
MAX_TTL = 3600.0
#: Seconds by which the clocks of a service and a registry may differ.
MAX_SKEW = 600.0
#: Bytes of a description as JSON, compact and in UTF-8. Each is kept in memory.
MAX_META = 64 * 1024
#: Bytes of a statement: a description and the rest, of about 250.
MAX_STATEMENT = MAX_META + 1024
#: Characters of a role name. It is part of every answer about it.
MAX_ROLE = 1024
#: Depth of arrays and objects in a description: it travels inside of others, and a line of JSON-RPC
#: may be `transport.rpc.MAX_NESTING` deep.
MAX_NESTING = 32
#: Signatures remembered as verified, of about 150 bytes each: the instances that one proxy knows.
CACHE_SIZE = 16_384

#: What the Node programs answer to a bad version; clients may compare it (spec: registry 6.2).
BAD_VERSION = "needs to be valid semver"

_VERSION = 1
#: What takes two bytes for one in a string of JSON. Other control characters are not in JSON.
_ESCAPED = b'"\\\n\r\t'
_MAX_INTEGER = 2**53 - 1
_KEY = re.compile(r"[0-9a-f]{64}", re.ASCII)
_INSTANCE = re.compile(r"[0-9a-f]{32}", re.ASCII)
_SIGNATURE = re.compile(r"[0-9a-fA-F]{128}", re.ASCII)


class Refused(RemoteError):
    """What a peer sent is not taken; the text, of one line, is the answer to it.

    ``kind`` is what it is counted under: `forged`, `expired`, `replayed`, `oversized`, `malformed`,
    and from the registry `policy`, `limit` and `leased`.
    """

    def __init__(self, text: str, kind: str = "malformed") -> None:
        super().__init__(text)
        self.kind = kind


# Not frozen, though nobody changes one: that would take four times as long to make, and a registry
# that starts makes all of its leases at once.
@dataclass(slots=True)
class Lease:
    """A statement and its signature. Out of `sign` or `Verifier.verify`, the signature is good."""

    #: The service's public key: 32 bytes.
    key: bytes
    meta: Meta
    #: 32 lower-case hexadecimal digits that a running service has chosen.
    instance: str
    sequence: int
    #: Unix milliseconds.
    issued: int
    #: Seconds; 0 withdraws.
    ttl: float
    #: As it was signed, and the 64 bytes.
    text: str = field(repr=False)
    signature: bytes = field(repr=False)
    #: Bytes of the description as JSON.
    meta_size: int = field(default=0, repr=False, compare=False)

    @property
    def withdrawal(self) -> bool:
        """It ends the lease rather than making one."""
        return self.ttl == 0

    @property
    def expires(self) -> float:
        """Unix seconds."""
        return self.issued / 1000 + self.ttl

    @property
    def size(self) -> int:
        """Bytes of the statement as a string in a line of JSON."""
        return statement_size(self.text.encode())


def sign(
    key_pair: KeyPair,
    meta: Meta,
    *,
    instance: str,
    sequence: int,
    issued: int,
    ttl: float = DEFAULT_TTL,
) -> Lease:
    """The statement that ``meta`` can be had under the key, for ``ttl`` seconds from ``issued``
    (Unix ms); with a ttl of 0, that it no longer can.

    ``instance`` is 32 lower-case hexadecimal digits, ``sequence`` what `next_sequence` says.
    Raises `InvalidInput` for what no registry would take.
    """
    statement = {
        "v": _VERSION,
        "key": key_pair.public_key.hex(),
        "meta": meta,
        "instance": instance,
        "sequence": sequence,
        "issued": issued,
        "ttl": int(ttl) if float(ttl).is_integer() else ttl,
    }
    try:
        text = encode(statement)
        return parse(text, key_pair.sign(PREFIX + text.encode()).hex())
    except (Refused, ValueError, TypeError, RecursionError) as error:
        raise InvalidInput(f"cannot be leased: {error}") from error


def next_sequence(last: int, now: float) -> int:
    """The number after ``last``, which is 0 when there was none or nobody remembers; ``now`` is in
    Unix seconds. It grows over restarts as well, as long as the clock is not set back."""
    return max(last + 1, int(now * 1000))


def parse(text: object, signature: object) -> Lease:
    """The lease in two values out of untrusted JSON: the statement's text, and 128 hexadecimal
    digits. The signature is not verified. Raises `Refused`: malformed or oversized."""
    if not isinstance(text, str):
        raise Refused("a lease needs a statement, which is a text")
    if not isinstance(signature, str) or _SIGNATURE.fullmatch(signature) is None:
        raise Refused("a lease needs a signature of 128 hexadecimal digits")
    if len(text) > MAX_STATEMENT or len(_utf8(text)) > MAX_STATEMENT:
        raise Refused(f"a statement has at most {MAX_STATEMENT} bytes", "oversized")
    try:
        statement = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise Refused("the statement is not JSON") from error
    if not isinstance(statement, dict) or type(statement.get("v")) is not int:
        raise Refused("the statement is not an object with a version")
    if statement["v"] != _VERSION:
        raise Refused(f"the statement has version {statement['v']}, only {_VERSION} is known")
    meta: Any = statement.get("meta")
    size = check_meta(meta)
    if matching.valid(meta.get("version")) is None:
        raise Refused(BAD_VERSION)
    return Lease(
        bytes.fromhex(_matched(statement, "key", _KEY, "64 lower-case hexadecimal digits")),
        meta,
        _matched(statement, "instance", _INSTANCE, "32 lower-case hexadecimal digits"),
        _integer(statement, "sequence"),
        _integer(statement, "issued"),
        _ttl(statement.get("ttl")),
        text,
        bytes.fromhex(signature),
        size,
    )


def check_meta(meta: Any) -> int:
    """Whether this is a description with a role and within the limits; returns its bytes as JSON.
    Raises `Refused`."""
    if not isinstance(meta, Mapping):
        raise Refused("needs a meta object with a role")
    role = meta.get("role")
    if not isinstance(role, str) or not role:
        raise Refused("needs a role, which is a text")
    if len(role) > MAX_ROLE:
        raise Refused(f"a role has at most {MAX_ROLE} characters", "oversized")
    if _too_deep(meta):
        raise Refused(f"a meta object nests at most {MAX_NESTING} deep", "oversized")
    size = json_size(meta)
    if size > MAX_META:
        raise Refused(f"a meta object has at most {MAX_META} bytes", "oversized")
    return size


def check_time(lease: Lease, now: float) -> None:
    """Whether a registry takes the statement at ``now`` (Unix s): it was issued at most `MAX_SKEW`
    seconds before or after. Raises `Refused`: expired."""
    age = now - lease.issued / 1000
    if age > MAX_SKEW:
        raise Refused(f"the statement was issued {age:.0f} s ago: make a new one", "expired")
    if age < -MAX_SKEW:
        raise Refused(f"the statement was issued {-age:.0f} s from now: set the clock", "expired")


class Verifier:
    """Verifies leases, and remembers the last `CACHE_SIZE` that were good, since registries send
    whole lists again and again."""

    def __init__(self, capacity: int = CACHE_SIZE) -> None:
        self._capacity = capacity
        self._good: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._good)

    def verify(self, text: object, signature: object) -> Lease:
        """The lease in two values out of untrusted JSON, signed by the key that it names; its time
        is not looked at. Raises `Refused`: malformed, oversized or forged."""
        lease = parse(text, signature)
        message = PREFIX + lease.text.encode()
        digest = blake2b(lease.signature, message)
        if digest in self._good:
            self._good.move_to_end(digest)
            return lease
        if not verify(lease.signature, message, lease.key):
            raise Refused(f"not signed by the key {lease.key.hex()}", "forged")
        self._good[digest] = None
        if len(self._good) > self._capacity:
            self._good.popitem(last=False)
        return lease


def statement_size(text: bytes) -> int:
    """Bytes of a statement, which is JSON itself, as a string in a line of JSON."""
    return 2 * len(text) - len(text.translate(None, _ESCAPED))


def encode(value: object) -> str:
    """Compact JSON text, as ``JSON.stringify`` makes it. Raises ValueError or TypeError for what is
    not JSON."""
    return _ENCODER.encode(value)


def json_size(value: object) -> int:
    """Bytes of a JSON value in a line of JSON-RPC."""
    # A lone surrogate, which JSON can carry and UTF-8 cannot, travels as its escape.
    return len(encode(value).encode("utf-8", "backslashreplace"))


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise Refused("the statement is not a text that UTF-8 can carry") from error


def _too_deep(meta: Meta) -> bool:
    depth = 0
    level: list[Any] = [meta]
    while level:
        depth += 1
        if depth > MAX_NESTING:
            return True
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
            if isinstance(inner, (Mapping, list))
        ]
    return False


def _matched(statement: Meta, name: str, pattern: re.Pattern[str], what: str) -> str:
    value = statement.get(name)
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise Refused(f"the statement's {name} must be {what}")
    return value


def _integer(statement: Meta, name: str) -> int:
    value = statement.get(name)
    # Not a bool either, which Python takes for a number.
    if type(value) is not int or not 0 <= value <= _MAX_INTEGER:
        raise Refused(f"the statement's {name} must be an integer from 0 to 2**53 - 1")
    return value


def _ttl(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= MAX_TTL:
        raise Refused(f"the statement's ttl must be a number from 0 to {MAX_TTL:g} seconds")
    return float(value)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
