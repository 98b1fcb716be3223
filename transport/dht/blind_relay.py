"""What is said to a blind relay and by it (spec: hyperdht 5.8).

Two ends that know the same token ask a relay to pair them. It gives each a UDX stream of its own,
and what it receives on the one it sends on the other, of which it can read nothing.

The messages go over a `protomux` channel of protocol `PROTOCOL`, whose key is the public key of
the end that is not the relay.
"""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from ..encoding import Reader, Writer
from ..errors import DecodeError

PROTOCOL = "blind-relay"

#: Types of messages in the channel.
PAIR = 0
UNPAIR = 1

TOKEN_BYTES = 32
#: Seconds for which one end waits for the other to ask for the same pair.
PAIR_SECONDS = 15.0

_INITIATOR = 1
_MAX_STREAM_ID = 2**32 - 1


class Pair(Struct, frozen=True):
    """To the relay: pair me with who has the other flag. From it: here is your stream."""

    #: Set for the end whose relay was chosen.
    is_initiator: bool
    #: 32 bytes.
    token: bytes
    #: u32: the sender's UDX stream.
    id: int
    #: First number of that stream: always 0.
    seq: int = 0

    def encode(self) -> bytes:
        writer = Writer().u8(_INITIATOR if self.is_initiator else 0)
        return bytes(writer.fixed(self.token, TOKEN_BYTES).uint(self.id).uint(self.seq))

    @classmethod
    def decode(cls, data: bytes) -> Pair:
        reader = Reader(data)
        is_initiator = bool(reader.uint() & _INITIATOR)
        token, identifier, seq = reader.fixed(TOKEN_BYTES), reader.uint(), reader.uint()
        if identifier > _MAX_STREAM_ID:
            raise DecodeError(f"{identifier} is no id of a UDX stream")
        return cls(is_initiator, token, identifier, seq)


class Unpair(Struct, frozen=True):
    """To the relay: end the pair with this token, or stop waiting for it."""

    #: 32 bytes.
    token: bytes

    def encode(self) -> bytes:
        return bytes(Writer().u8(0).fixed(self.token, TOKEN_BYTES))

    @classmethod
    def decode(cls, data: bytes) -> Unpair:
        reader = Reader(data)
        reader.uint()
        return cls(reader.fixed(TOKEN_BYTES))


RelayMessage: TypeAlias = Pair | Unpair


def decode(kind: int, payload: bytes) -> RelayMessage | None:
    """A message of type ``kind``; None for types of later versions. Raises `DecodeError`."""
    if kind == PAIR:
        return Pair.decode(payload)
    if kind == UNPAIR:
        return Unpair.decode(payload)
    return None
