"""The values of HyperDHT's commands: their layouts, and what gets signed (spec: hyperdht 3.1-3.5).

Every structure has ``encode() -> bytes`` and ``decode(data)``; a decoder raises `DecodeError` for
bytes that do not fit and ignores bytes after the end. Addresses are IPv4 unless said otherwise.

What every handshake has is walked without a `Reader`, and is not frozen: a frozen object takes five
times as long to create.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from msgspec import Struct

from .. import keys
from ..encoding import Reader, Writer, decode_address, encode_uint, read_addresses, read_uint
from ..errors import DecodeError, InvalidInput
from ..transmit import Address
from .addresses import packed

#: Application commands (spec: hyperdht 3.1).
PEER_HANDSHAKE = 0
PEER_HOLEPUNCH = 1
FIND_PEER = 2
LOOKUP = 3
ANNOUNCE = 4
UNANNOUNCE = 5
MUTABLE_PUT = 6
MUTABLE_GET = 7
IMMUTABLE_PUT = 8
IMMUTABLE_GET = 9
PLUGIN = 10

#: Errors of a response (spec: hyperdht 2.4, 3.1).
UNKNOWN_COMMAND = 1
SEQ_REUSED = 16
SEQ_TOO_LOW = 17

#: The only version of the noise payload, and of the structures inside it.
VERSION = 1

#: More addresses in one payload than any honest peer has interfaces; the rest would only make us
#: send probes to strangers.
MAX_ADDRESSES = 64

_Z32 = "ybndrfg8ejkmcpqxot1uwisza345h769"


class Mode(IntEnum):
    """Which leg of the relayed exchange a handshake or holepunch message is on."""

    FROM_CLIENT = 0
    FROM_SERVER = 1
    FROM_RELAY = 2
    FROM_SECOND_RELAY = 3
    REPLY = 4


class Firewall(IntEnum):
    """What a peer knows of the NAT in front of it."""

    UNKNOWN = 0
    OPEN = 1
    CONSISTENT = 2
    RANDOM = 3


class PeerError(IntEnum):
    """Errors inside handshake and holepunch payloads."""

    NONE = 0
    ABORTED = 1
    VERSION_MISMATCH = 2
    TRY_LATER = 3


_MODES = tuple(Mode)


def _mode(value: int) -> Mode:
    if value >= len(_MODES):
        raise DecodeError(f"mode {value} does not exist")
    return _MODES[value]


def _addresses(reader: Reader) -> tuple[Address, ...]:
    addresses = tuple(reader.array(Reader.address))
    if len(addresses) > MAX_ADDRESSES:
        raise DecodeError(f"{len(addresses)} addresses")
    return addresses


@dataclass(slots=True)
class HandshakeMessage:
    """Value of PEER_HANDSHAKE, in requests and responses."""

    mode: Mode
    #: Noise message 1 or 2.
    noise: bytes
    peer_address: Address | None = None
    relay_address: Address | None = None

    def encode(self) -> bytes:
        flags = (self.peer_address is not None) | (self.relay_address is not None) << 1
        return b"".join(
            (
                bytes((flags, self.mode)),
                encode_uint(len(self.noise)),
                self.noise,
                b"" if self.peer_address is None else packed(self.peer_address),
                b"" if self.relay_address is None else packed(self.relay_address),
            )
        )

    @classmethod
    def decode(cls, data: bytes) -> HandshakeMessage:
        flags, position = read_uint(data, 0)
        mode, position = read_uint(data, position)
        size, position = read_uint(data, position)
        end = position + size
        if end + 6 * ((flags & 1) + (flags >> 1 & 1)) > len(data):
            raise DecodeError("handshake cut short")
        message = cls(_mode(mode), data[position:end])
        if flags & 1:
            message.peer_address = decode_address(data[end : end + 6])
            end += 6
        if flags & 2:
            message.relay_address = decode_address(data[end : end + 6])
        return message


class HolepunchMessage(Struct, frozen=True):
    """Value of PEER_HOLEPUNCH, in requests and responses."""

    mode: Mode
    #: The server's session number; 0 in messages from the server.
    id: int
    #: A `HolepunchPayload`, sealed.
    payload: bytes
    peer_address: Address | None = None

    def encode(self) -> bytes:
        writer = Writer()
        writer.uint(self.peer_address is not None).uint(self.mode).uint(self.id)
        writer.buffer(self.payload)
        if self.peer_address is not None:
            writer.address(self.peer_address)
        return bytes(writer)

    @classmethod
    def decode(cls, data: bytes) -> HolepunchMessage:
        reader = Reader(data)
        flags = reader.uint()
        mode = _mode(reader.uint())
        session = reader.uint()
        payload = reader.buffer()
        return cls(mode, session, payload, reader.address() if flags & 1 else None)


class Relay(Struct, frozen=True):
    """A DHT node that forwards to a server, and the server's address as that node sees it."""

    relay_address: Address
    peer_address: Address


class HolepunchInfo(Struct, frozen=True):
    """Where a server can be punched: its session number and its relays."""

    id: int
    relays: tuple[Relay, ...]


@dataclass(slots=True)
class UdxInfo:
    """The UDX stream a peer has made for the connection."""

    #: u32
    id: int
    seq: int = 0
    reusable_socket: bool = False


class RelayThrough(Struct, frozen=True):
    """A blind relay by its 32-byte key, and the 32-byte token that pairs the two ends there."""

    public_key: bytes
    token: bytes


@dataclass(slots=True)
class NoisePayload:
    """Plaintext inside both Noise messages. With another ``version`` all else is absent."""

    version: int = VERSION
    #: A `PeerError`, or a number that this version has no name for.
    error: int = 0
    #: A `Firewall`, or a number that this version has no name for.
    firewall: int = 0
    holepunch: HolepunchInfo | None = None
    addresses4: tuple[Address, ...] = ()
    addresses6: tuple[Address, ...] = ()
    udx: UdxInfo | None = None
    secret_stream: bool = False
    relay_through: RelayThrough | None = None
    relay_addresses: tuple[Address, ...] | None = None

    def encode(self) -> bytes:
        before, after = self.around_stream_id()
        return before + (b"" if self.udx is None else encode_uint(self.udx.id)) + after

    def around_stream_id(self) -> tuple[bytes, bytes]:
        """What is in front of the number of the UDX stream, and what behind it: the same in many
        handshakes."""
        writer = Writer().uint(self.version)
        writer.uint(
            (self.holepunch is not None)
            | bool(self.addresses4) << 1
            | bool(self.addresses6) << 2
            | (self.udx is not None) << 3
            | self.secret_stream << 4
            | (self.relay_through is not None) << 5
            | (self.relay_addresses is not None) << 6
        )
        writer.uint(self.error).uint(self.firewall)
        if self.holepunch is not None:
            writer.uint(self.holepunch.id).array(
                self.holepunch.relays,
                lambda w, relay: w.address(relay.relay_address).address(relay.peer_address),
            )
        if self.addresses4:
            writer.array(self.addresses4, Writer.address)
        if self.addresses6:
            writer.array(self.addresses6, Writer.address6)
        before = writer
        if self.udx is not None:
            before.uint(VERSION).uint(self.udx.reusable_socket)
            writer = Writer().uint(self.udx.seq)
        else:
            writer = Writer()
        if self.secret_stream:
            writer.uint(VERSION)
        if self.relay_through is not None:
            writer.uint(VERSION).uint(0)
            writer.fixed(self.relay_through.public_key, 32).fixed(self.relay_through.token, 32)
        if self.relay_addresses is not None:
            writer.array(self.relay_addresses, Writer.address)
        return bytes(before), bytes(writer)

    @classmethod
    def decode(cls, data: bytes) -> NoisePayload:
        version, position = read_uint(data, 0)
        payload = cls(version)
        if version != VERSION:
            return payload
        flags, position = read_uint(data, position)
        payload.error, position = read_uint(data, position)
        payload.firewall, position = read_uint(data, position)
        if flags & 1:
            payload.holepunch, position = _read_holepunch(data, position)
        if flags & 2:
            payload.addresses4, position = read_addresses(data, position, MAX_ADDRESSES)
        if flags & 4:
            payload.addresses6, position = _read_addresses6(data, position)
        if flags & 8:
            payload.udx, position = _read_udx(data, position)
        if flags & 16:
            _, position = read_uint(data, position)
            payload.secret_stream = True
        if flags & 32:
            payload.relay_through, position = _read_relay_through(data, position)
        if flags & 64:
            payload.relay_addresses, position = read_addresses(data, position, MAX_ADDRESSES)
        return payload


def _read_holepunch(data: bytes, position: int) -> tuple[HolepunchInfo, int]:
    session, position = read_uint(data, position)
    reader = Reader(memoryview(data)[position:])
    relays = tuple(reader.array(lambda r: Relay(r.address(), r.address())))
    if len(relays) > MAX_ADDRESSES:
        raise DecodeError(f"{len(relays)} relays")
    return HolepunchInfo(session, relays), len(data) - reader.remaining


def _read_addresses6(data: bytes, position: int) -> tuple[tuple[Address, ...], int]:
    reader = Reader(memoryview(data)[position:])
    return tuple(reader.array(Reader.address6)), len(data) - reader.remaining


def _read_udx(data: bytes, position: int) -> tuple[UdxInfo, int]:
    _, position = read_uint(data, position)
    features, position = read_uint(data, position)
    stream, position = read_uint(data, position)
    if stream > 0xFFFFFFFF:
        raise DecodeError(f"stream id {stream} has more than 32 bits")
    seq, position = read_uint(data, position)
    return UdxInfo(stream, seq, bool(features & 1)), position


def _read_relay_through(data: bytes, position: int) -> tuple[RelayThrough, int]:
    reader = Reader(memoryview(data)[position:])
    reader.uint()
    reader.uint()
    return RelayThrough(reader.fixed(32), reader.fixed(32)), len(data) - reader.remaining


class HolepunchPayload(Struct, frozen=True):
    """Plaintext inside PEER_HOLEPUNCH; `noise.seal` and `noise.unseal` are its envelope."""

    error: int = 0
    firewall: int = 0
    #: Counter of the client, echoed by the server.
    round: int = 0
    connected: bool = False
    punching: bool = False
    #: Port 0 when the firewall is RANDOM.
    addresses: tuple[Address, ...] | None = None
    #: "I have opened my NAT toward this address of yours."
    remote_address: Address | None = None
    token: bytes | None = None
    #: Echo of the token received from the other side.
    remote_token: bytes | None = None

    def encode(self) -> bytes:
        writer = Writer()
        writer.uint(
            self.connected
            | self.punching << 1
            | (self.addresses is not None) << 2
            | (self.remote_address is not None) << 3
            | (self.token is not None) << 4
            | (self.remote_token is not None) << 5
        )
        writer.uint(self.error).uint(self.firewall).uint(self.round)
        if self.addresses is not None:
            writer.array(self.addresses, Writer.address)
        if self.remote_address is not None:
            writer.address(self.remote_address)
        if self.token is not None:
            writer.fixed(self.token, 32)
        if self.remote_token is not None:
            writer.fixed(self.remote_token, 32)
        return bytes(writer)

    @classmethod
    def decode(cls, data: bytes) -> HolepunchPayload:
        reader = Reader(data)
        flags = reader.uint()
        error = reader.uint()
        firewall = reader.uint()
        counter = reader.uint()
        return cls(
            error,
            firewall,
            counter,
            bool(flags & 1),
            bool(flags & 2),
            _addresses(reader) if flags & 4 else None,
            reader.address() if flags & 8 else None,
            reader.fixed(32) if flags & 16 else None,
            reader.fixed(32) if flags & 32 else None,
        )


class PeerRecord(Struct, frozen=True):
    """What the DHT stores of a peer, and what FIND_PEER returns."""

    #: 32 bytes
    public_key: bytes
    relay_addresses: tuple[Address, ...] = ()

    def encode(self) -> bytes:
        writer = Writer().fixed(self.public_key, 32)
        return bytes(writer.array(self.relay_addresses, Writer.address))

    @classmethod
    def decode(cls, data: bytes) -> PeerRecord:
        return cls.read(Reader(data))

    @classmethod
    def read(cls, reader: Reader) -> PeerRecord:
        return cls(reader.fixed(32), _addresses(reader))


class LookupReply(Struct, frozen=True):
    """The records of a topic at one node, and its newest bump (milliseconds since 1970)."""

    peers: tuple[PeerRecord, ...]
    bump: int = 0

    @classmethod
    def decode(cls, data: bytes) -> LookupReply:
        reader = Reader(data)
        peers = tuple(reader.array(PeerRecord.read))
        # Older nodes end here (spec: hyperdht 3.2).
        return cls(peers, reader.uint() if reader.remaining else 0)


def encode_lookup_reply(records: list[bytes], bump: int) -> bytes:
    """Records that are already encoded, and a bump."""
    return bytes(Writer().array(records, Writer.raw).uint(bump))


class Announce(Struct, frozen=True):
    """Value of ANNOUNCE and UNANNOUNCE."""

    peer: PeerRecord | None = None
    #: 32 bytes: the next link of a hash chain.
    refresh: bytes | None = None
    #: 64 bytes.
    signature: bytes | None = None
    #: Milliseconds since 1970; never signed.
    bump: int = 0

    def encode(self) -> bytes:
        writer = Writer()
        writer.uint(
            (self.peer is not None)
            | (self.refresh is not None) << 1
            | (self.signature is not None) << 2
            | bool(self.bump) << 3
        )
        if self.peer is not None:
            writer.raw(self.peer.encode())
        if self.refresh is not None:
            writer.fixed(self.refresh, 32)
        if self.signature is not None:
            writer.fixed(self.signature, 64)
        if self.bump:
            writer.uint(self.bump)
        return bytes(writer)

    @classmethod
    def decode(cls, data: bytes) -> Announce:
        reader = Reader(data)
        flags = reader.uint()
        return cls(
            PeerRecord.read(reader) if flags & 1 else None,
            reader.fixed(32) if flags & 2 else None,
            reader.fixed(64) if flags & 4 else None,
            reader.uint() if flags & 8 else 0,
        )


def announce_signable(
    namespace: bytes, target: bytes, node_id: bytes, token: bytes, peer: bytes, refresh: bytes = b""
) -> bytes:
    """The 64 bytes that ANNOUNCE (`keys.NS_ANNOUNCE`) or UNANNOUNCE (`keys.NS_UNANNOUNCE`) signs:
    good for one storing node (its 32-byte id) and the token it gave (spec: hyperdht 3.5)."""
    return namespace + keys.blake2b(target, node_id, token, peer, refresh)


class MutableValue(Struct, frozen=True):
    """A signed value under a key, as stored and returned."""

    seq: int
    value: bytes
    #: 64 bytes.
    signature: bytes

    def encode(self) -> bytes:
        return bytes(Writer().uint(self.seq).buffer(self.value).fixed(self.signature, 64))

    @classmethod
    def decode(cls, data: bytes) -> MutableValue:
        return cls.read(Reader(data))

    @classmethod
    def read(cls, reader: Reader) -> MutableValue:
        return cls(reader.uint(), reader.buffer(), reader.fixed(64))

    @classmethod
    def signed(cls, key_pair: keys.KeyPair, seq: int, value: bytes) -> MutableValue:
        return cls(seq, value, key_pair.sign(mutable_signable(seq, value)))

    def verify(self, public_key: bytes) -> bool:
        """Whether the key's owner signed this."""
        return keys.verify(self.signature, mutable_signable(self.seq, self.value), public_key)


def mutable_signable(seq: int, value: bytes) -> bytes:
    """The 64 bytes that a mutable value's signature covers."""
    return keys.NS_MUTABLE_PUT + keys.blake2b(bytes(Writer().uint(seq).buffer(value)))


class MutablePut(Struct, frozen=True):
    """Value of MUTABLE_PUT."""

    #: 32 bytes
    public_key: bytes
    mutable: MutableValue

    def encode(self) -> bytes:
        return bytes(Writer().fixed(self.public_key, 32).raw(self.mutable.encode()))

    @classmethod
    def decode(cls, data: bytes) -> MutablePut:
        reader = Reader(data)
        return cls(reader.fixed(32), MutableValue.read(reader))


def parse_address(value: str | bytes) -> tuple[bytes, tuple[Address, ...]]:
    """Public key (32 bytes) and relay addresses to try first, of what people pass around: 64
    hexadecimal digits, 52 z-base-32 characters, 32 bytes, or the binary form with nodes (spec:
    hyperdht 3.2). Raises `InvalidInput`."""
    if isinstance(value, str):
        return _parse_text(value.strip()), ()
    if len(value) == keys.PUBLIC_KEY_BYTES:
        return bytes(value), ()
    try:
        reader = Reader(value)
        public_key = reader.fixed(keys.PUBLIC_KEY_BYTES)
        flags = reader.uint() if reader.remaining else 0
        return public_key, _addresses(reader) if flags & 1 else ()
    except DecodeError as error:
        raise InvalidInput(f"not a peer's address: {error}") from error


def _parse_text(text: str) -> bytes:
    if len(text) != 52:
        return keys.parse_key(text)
    bits = 0
    for character in text.lower():
        digit = _Z32.find(character)
        if digit < 0:
            raise InvalidInput(f"{character!r} is not a z-base-32 character")
        bits = bits << 5 | digit
    # 52 characters are 260 bits: the last 4 are padding.
    return (bits >> 4).to_bytes(keys.PUBLIC_KEY_BYTES, "big")
