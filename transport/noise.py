"""The Noise handshake of a connection, and what both ends derive from it.

`Initiator` and `Responder` are the two ends of one ``Noise_IK_Ed25519_ChaChaPoly_BLAKE2b``
handshake (spec: secure-stream-and-registry 2; hyperdht 3.3): the initiator knows the responder's
key beforehand, the responder learns the initiator's from message 1. Both end with the same
`Handshake`, seen from their side. The state machine is the ``noiseprotocol`` package's; the
Diffie-Hellman over Ed25519 keys, which it does not have, is here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from nacl import bindings
from nacl._sodium import ffi, lib
from nacl.exceptions import CryptoError

from .errors import HandshakeError, InvalidInput, LocalError
from .keys import (
    NS_INITIATOR,
    NS_PEER_HOLEPUNCH,
    NS_RESPONDER,
    PUBLIC_KEY_BYTES,
    SEED_BYTES,
    KeyPair,
    blake2b,
)

PROTOCOL = b"Noise_IK_Ed25519_ChaChaPoly_BLAKE2b"
#: What the two messages are longer than their payloads (spec 2.1).
MESSAGE_1_OVERHEAD = 96
MESSAGE_2_OVERHEAD = 48

#: Shared secrets of pairs of static keys that are remembered: those who connect again and again.
STATIC_SECRETS = 1024
#: States before the first message that are remembered, one for each key of ours and, of an
#: initiator, each key that it connects to: some 2 KiB each.
STARTS = 256

_NUMBER_BYTES = 32
_NONCE_BYTES = bindings.crypto_secretbox_NONCEBYTES
#: A sealed payload has at least one byte inside (spec 3.2).
_SEALED_MIN = _NONCE_BYTES + bindings.crypto_secretbox_MACBYTES + 1


@dataclass(slots=True)  # Not frozen: that makes each of them five times as slow to create.
class Handshake:
    """What a finished handshake leaves to one side. Secrets never appear in a repr."""

    is_initiator: bool
    #: 32-byte keys of the stream's two directions: what this side sends with, and receives with.
    tx: bytes = field(repr=False)
    rx: bytes = field(repr=False)
    #: 64 bytes, the same on both sides, and secret to them.
    hash: bytes = field(repr=False)
    #: 32 bytes each: this side's static key and the peer's, both proven by the handshake.
    public_key: bytes
    remote_public_key: bytes

    @property
    def holepunch_secret(self) -> bytes:
        """32 bytes: the key of `seal` and `unseal` (spec 2.4)."""
        return blake2b(NS_PEER_HOLEPUNCH, key=self.hash)

    @property
    def local_stream_id(self) -> bytes:
        """32 bytes: what this side's stream header carries (spec 2.4)."""
        return blake2b(NS_INITIATOR if self.is_initiator else NS_RESPONDER, key=self.hash)

    @property
    def remote_stream_id(self) -> bytes:
        """32 bytes: what the peer's stream header has to carry (spec 2.4)."""
        return blake2b(NS_RESPONDER if self.is_initiator else NS_INITIATOR, key=self.hash)


class Initiator:
    """The connecting side.

    ``ephemeral_seed`` is 32 bytes from the caller's randomness, never used twice. Raises
    `InvalidInput` for a remote key or seed that has not 32 bytes.
    """

    __slots__ = ("_key_pair", "_remote_public_key", "_sent", "_state")

    def __init__(
        self,
        key_pair: KeyPair,
        remote_public_key: bytes,
        *,
        prologue: bytes,
        ephemeral_seed: bytes,
    ) -> None:
        if len(remote_public_key) != PUBLIC_KEY_BYTES:
            raise InvalidInput(
                f"a public key has {PUBLIC_KEY_BYTES} bytes, not {len(remote_public_key)}"
            )
        self._key_pair = key_pair
        self._remote_public_key = bytes(remote_public_key)
        self._state = handshake_state(
            PROTOCOL,
            True,
            prologue=prologue,
            key_pair=key_pair,
            ephemeral_seed=ephemeral_seed,
            remote_public_key=self._remote_public_key,
        )
        self._sent = False

    def message(self, payload: bytes) -> bytes:
        """Message 1: `MESSAGE_1_OVERHEAD` bytes more than the payload.

        Made once an attempt: the same bytes go through every node that is tried (spec 2.4). Raises
        `InvalidInput` when the remote key is no usable point of the curve, which is so for most
        random 32 bytes (spec: hyperdht 9.1, pitfall 32).
        """
        if self._sent:
            raise LocalError("message 1 exists already: send the same bytes again")
        message = bytearray()
        try:
            self._state.write_message(payload, message)
        except Exception as error:  # PyNaCl has several types for a point that does not multiply
            raise InvalidInput(
                f"{self._remote_public_key.hex()} is not a public key: check its digits"
            ) from error
        self._sent = True
        return bytes(message)

    def read(self, message: bytes) -> tuple[bytes, Handshake]:
        """The payload of message 2, and the result.

        Raises `HandshakeError` for a message that does not verify, and is then as it was: the true
        message may still come (spec 2.4).
        """
        state = self._state
        if not self._sent or not state.message_patterns:
            raise LocalError("message 2 is read once, after message 1 was made")
        symmetric = state.symmetric_state
        # Reading changes these and the cipher key, which message 2 replaces before it is used.
        before = symmetric.h, symmetric.ck, list(state.message_patterns)
        payload = bytearray()
        try:
            state.read_message(bytes(message), payload)
        except Exception as error:  # half a dozen types of three packages, one meaning (spec 2.3)
            symmetric.h, symmetric.ck, state.message_patterns = before
            raise HandshakeError("the handshake reply does not verify") from error
        return bytes(payload), _result(state, self._key_pair, self._remote_public_key)


class Responder:
    """The listening side; one for each message 1 that arrives.

    ``ephemeral_seed`` is 32 bytes from the caller's randomness, never used twice.
    """

    __slots__ = ("_key_pair", "_state", "remote_public_key")

    def __init__(self, key_pair: KeyPair, *, prologue: bytes, ephemeral_seed: bytes) -> None:
        self._key_pair = key_pair
        self._state = handshake_state(
            PROTOCOL,
            False,
            prologue=prologue,
            key_pair=key_pair,
            ephemeral_seed=ephemeral_seed,
        )
        #: The initiator's 32-byte static key, known and verified after `read`, else empty.
        self.remote_public_key = b""

    def read(self, message: bytes) -> bytes:
        """The payload of message 1. Raises `HandshakeError` for one that does not verify, after
        which this object is used up."""
        if len(self._state.message_patterns) != 2:
            raise LocalError("message 1 is read once: make a new Responder for another")
        payload = bytearray()
        try:
            self._state.read_message(bytes(message), payload)
        except Exception as error:  # half a dozen types of three packages, one meaning (spec 2.3)
            raise HandshakeError("the handshake request does not verify") from error
        self.remote_public_key = self._state.rs.public_bytes
        return bytes(payload)

    def message(self, payload: bytes) -> tuple[bytes, Handshake]:
        """Message 2, `MESSAGE_2_OVERHEAD` bytes more than the payload, and the result."""
        if not self.remote_public_key or not self._state.message_patterns:
            raise LocalError("message 2 is made once, after message 1 was read")
        message = bytearray()
        self._state.write_message(payload, message)
        return bytes(message), _result(self._state, self._key_pair, self.remote_public_key)


def seal(plain: bytes, secret: bytes, nonce: bytes) -> bytes:
    """A hole punching payload on the wire: nonce (24 bytes), tag (16), ciphertext (spec 3.2)."""
    return nonce + bindings.crypto_secretbox(plain, nonce, secret)


def unseal(data: bytes, secret: bytes) -> bytes | None:
    """What `seal` was given, or None when it was not sealed with the secret."""
    if len(data) < _SEALED_MIN:
        return None
    try:
        return bindings.crypto_secretbox_open(
            bytes(data[_NONCE_BYTES:]), bytes(data[:_NONCE_BYTES]), secret
        )
    except CryptoError:
        return None


def host_token(host: str, local_secret: bytes) -> bytes:
    """32 bytes that only who receives at the IPv4 host can echo (spec 3.2). The secret is 32 random
    bytes of one connection attempt."""
    return blake2b(host.encode(), key=local_secret)


def scalar(seed: bytes) -> bytes:
    """The 32-byte secret number of an Ed25519 seed: hashed and clamped (spec 2.2)."""
    number = hashlib.sha512(seed).digest()
    return bytes((number[0] & 248,)) + number[1:31] + bytes((number[31] & 127 | 64,))


def diffie_hellman(number: bytes, public_key: bytes) -> bytes:
    """The shared point of a `scalar` and a public key: 32 bytes (spec 2.2).

    Raises `HandshakeError` for anything but a point of the main subgroup.
    """
    # libsodium reads 32 bytes of each, whatever there is.
    if len(number) == _NUMBER_BYTES and len(public_key) == PUBLIC_KEY_BYTES:
        shared = ffi.new("unsigned char[]", PUBLIC_KEY_BYTES)
        if not lib.crypto_scalarmult_ed25519_noclamp(shared, number, public_key):
            return bytes(ffi.buffer(shared))
    raise HandshakeError("the public key is no point of the curve's main subgroup")


def public_point(number: bytes) -> bytes:
    """The public key of a `scalar`: 32 bytes."""
    public_key = ffi.new("unsigned char[]", PUBLIC_KEY_BYTES)
    if len(number) != _NUMBER_BYTES or lib.crypto_scalarmult_ed25519_base_noclamp(
        public_key, number
    ):
        raise HandshakeError("the secret number is no number, or zero")
    return bytes(ffi.buffer(public_key))


def handshake_state(
    protocol_name: bytes,
    is_initiator: bool,
    *,
    prologue: bytes,
    key_pair: KeyPair,
    ephemeral_seed: bytes,
    remote_public_key: bytes | None = None,
) -> Any:
    """The package's ``HandshakeState`` for any two- or three-message pattern over Ed25519."""
    if len(ephemeral_seed) != SEED_BYTES:
        raise InvalidInput(f"a seed has {SEED_BYTES} bytes, not {len(ephemeral_seed)}")
    start = _start(protocol_name, is_initiator, prologue, key_pair, remote_public_key)
    # The four objects of a handshake change as it goes on; what they refer to does not.
    protocol, state = _twin(start), _twin(start.handshake_state)
    symmetric, cipher = _twin(start.symmetric_state), _twin(start.cipher_state_handshake)
    protocol.handshake_state = state
    protocol.symmetric_state = state.symmetric_state = symmetric
    protocol.cipher_state_handshake = symmetric.cipher_state = cipher
    protocol.dh_fn = _Ed25519(state)
    symmetric.noise_protocol = state.noise_protocol = protocol
    state.message_patterns = list(state.message_patterns)
    # The package's connection class would warn about an ephemeral key that comes from outside; here
    # it always does, because randomness belongs to the caller.
    number = scalar(ephemeral_seed)
    state.e = _Point(public_point(number), number)
    return state


@lru_cache(STARTS)
def _start(
    protocol_name: bytes,
    is_initiator: bool,
    prologue: bytes,
    key_pair: KeyPair,
    remote_public_key: bytes | None,
) -> Any:
    """The package's protocol object before the first message, for all handshakes that begin alike.

    Nothing of a single handshake is in it: no ephemeral key, and of secrets only the static one.
    """
    protocol = _twin(_protocol(protocol_name))
    protocol.initiator = is_initiator
    protocol.prologue = prologue
    protocol.keypairs = {
        "s": _Point(key_pair.public_key, scalar(key_pair.seed)),
        "rs": None if remote_public_key is None else _Point(remote_public_key),
    }
    protocol.initialise_handshake_state()
    return protocol


T = TypeVar("T")


def _twin(thing: T) -> T:
    """Another object with the same attributes: `copy.copy` for a fraction of its time."""
    twin = object.__new__(type(thing))
    twin.__dict__ = thing.__dict__.copy()
    return twin


def _result(state: Any, key_pair: KeyPair, remote_public_key: bytes) -> Handshake:
    protocol = state.noise_protocol
    return Handshake(
        is_initiator=state.initiator,
        tx=protocol.cipher_state_encrypt.k,
        rx=protocol.cipher_state_decrypt.k,
        hash=protocol.handshake_hash,
        public_key=key_pair.public_key,
        remote_public_key=remote_public_key,
    )


class _Point:
    """A key as the package wants it: a public one, or a pair."""

    __slots__ = ("private", "public", "public_bytes")

    def __init__(self, public_key: bytes, number: bytes = b"") -> None:
        self.public = self.public_bytes = public_key
        self.private = number

    @classmethod
    def from_public_bytes(cls, data: bytes) -> _Point:
        return cls(data)


class _Ed25519:
    """The Diffie-Hellman function of one handshake, as the package wants it."""

    __slots__ = ("_state",)

    dhlen = PUBLIC_KEY_BYTES

    def __init__(self, state: Any = None) -> None:
        self._state = state

    def dh(self, number: bytes, public_key: bytes) -> bytes:
        state = self._state
        if number is state.s.private and public_key is getattr(state.rs, "public", None):
            return _static_secret(number, public_key)
        return diffie_hellman(number, public_key)


@lru_cache(STATIC_SECRETS)
def _static_secret(number: bytes, public_key: bytes) -> bytes:
    """What two static keys share: the same in each of their handshakes, and a quarter of the work.

    It stays in memory only, as the static secret does that it is made from; what an ephemeral key
    has a part in is never remembered.
    """
    return diffie_hellman(number, public_key)


class _Blake2b:
    """The hash as the package wants it."""

    hashlen = 64
    blocklen = 128
    fn = hashlib.blake2b

    def hash(self, data: bytes) -> bytes:
        return hashlib.blake2b(data).digest()


# HMAC's pads (RFC 2104) for a key of half a block: what its bytes become, and what follows them.
_INNER = bytes(value ^ 0x36 for value in range(256))
_OUTER = bytes(value ^ 0x5C for value in range(256))
_INNER_REST = b"\x36" * 64
_OUTER_REST = b"\x5c" * 64


def _hkdf(key: bytes, data: bytes, _count: int) -> tuple[bytes, bytes]:
    """HKDF over HMAC-BLAKE2b with a key of 64 bytes, to two outputs of 64: what all patterns
    without pre-shared keys need."""
    hash_fn = hashlib.blake2b
    inner = hash_fn(key.translate(_INNER) + _INNER_REST + data).digest()
    secret = hash_fn(key.translate(_OUTER) + _OUTER_REST + inner).digest()
    # Both outputs have the same key, and so the same pads.
    inner_pad = secret.translate(_INNER) + _INNER_REST
    outer_pad = secret.translate(_OUTER) + _OUTER_REST
    first = hash_fn(outer_pad + hash_fn(inner_pad + b"\1").digest()).digest()
    return first, hash_fn(outer_pad + hash_fn(inner_pad + first + b"\2").digest()).digest()


class _ChaChaPoly:
    """The cipher as the package wants it. It keeps nothing: a key seals one message or none."""

    __slots__ = ()

    def initialize(self, key: bytes) -> None:
        """The key comes with each message."""

    def encrypt(self, key: bytes, count: int, data: bytes, plain: bytes) -> bytes:
        return ChaCha20Poly1305(key).encrypt(_nonce(count), plain, data)

    def decrypt(self, key: bytes, count: int, data: bytes, sealed: bytes) -> bytes:
        return ChaCha20Poly1305(key).decrypt(_nonce(count), sealed, data)


def _nonce(count: int) -> bytes:
    return bytes(4) + count.to_bytes(8, "little")


@lru_cache(4)
def _protocol(name: bytes) -> Any:
    """What all handshakes of a protocol have in common."""
    # Imported on the first handshake, for the sake of commands that make none.
    from noise.backends.noise_backend import NoiseBackend
    from noise.noise_protocol import NoiseProtocol

    backend = NoiseBackend()
    backend.diffie_hellmans["Ed25519"] = _Ed25519
    backend.keypairs["Ed25519"] = _Point
    backend.ciphers["ChaChaPoly"] = _ChaChaPoly
    backend.hashes["BLAKE2b"] = _Blake2b
    # The package would bind an HMAC to its HKDF, and wants one for that; ours has it inside.
    backend.hmac = hashlib.blake2b
    protocol = NoiseProtocol(name, backend)
    protocol.hkdf = _hkdf
    return protocol
