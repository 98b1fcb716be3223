"""Key pairs and the hashes that name things (spec: secure-stream-and-registry 1, 3.1)."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field

from nacl import bindings

from .errors import InvalidInput

SEED_BYTES = 32
PUBLIC_KEY_BYTES = 32

_HEX = frozenset("0123456789abcdefABCDEF")


def blake2b(*parts: bytes, key: bytes = b"") -> bytes:
    """BLAKE2b with a 32-byte digest over the parts in a row, keyed when ``key`` is given (64 bytes
    at most)."""
    digest = hashlib.blake2b(key=key, digest_size=32)
    for part in parts:
        digest.update(part)
    return digest.digest()


def namespace(name: bytes, identifier: int) -> bytes:
    """The 32-byte domain separator ``identifier`` (0..255) of the protocol called ``name``."""
    return blake2b(blake2b(name), bytes((identifier,)))


_DHT = b"hyperswarm/dht"
_STREAM = b"hyperswarm/secret-stream"

NS_ANNOUNCE = namespace(_DHT, 4)
NS_UNANNOUNCE = namespace(_DHT, 5)
NS_MUTABLE_PUT = namespace(_DHT, 6)
NS_PEER_HANDSHAKE = namespace(_DHT, 0)
NS_PEER_HOLEPUNCH = namespace(_DHT, 1)
NS_PLUGIN = namespace(_DHT, 10)
NS_INITIATOR = namespace(_STREAM, 0)
NS_RESPONDER = namespace(_STREAM, 1)
NS_SEND = namespace(_STREAM, 2)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """An Ed25519 key pair. Only the public half ever appears in a repr."""

    #: 32 bytes; who has them is the peer.
    seed: bytes = field(repr=False)
    #: 32 bytes; the peer's address.
    public_key: bytes

    @classmethod
    def from_seed(cls, seed: bytes) -> KeyPair:
        """The pair of a 32-byte seed."""
        if len(seed) != SEED_BYTES:
            raise InvalidInput(f"a seed has {SEED_BYTES} bytes, not {len(seed)}")
        public_key, _ = bindings.crypto_sign_seed_keypair(bytes(seed))
        return cls(bytes(seed), public_key)

    @classmethod
    def generate(cls) -> KeyPair:
        """A pair from the operating system's randomness."""
        return cls.from_seed(os.urandom(SEED_BYTES))

    @property
    def secret_key(self) -> bytes:
        """64 bytes: seed and public key, as libsodium wants it."""
        return self.seed + self.public_key

    def sign(self, message: bytes) -> bytes:
        """The 64-byte detached signature."""
        return bindings.crypto_sign(message, self.secret_key)[: bindings.crypto_sign_BYTES]

    def __str__(self) -> str:
        return self.public_key.hex()


def verify(signature: bytes, message: bytes, public_key: bytes) -> bool:
    """Whether the 64-byte detached signature is the key's own over the message."""
    if len(signature) != bindings.crypto_sign_BYTES:
        return False
    try:
        bindings.crypto_sign_open(signature + message, public_key)
    except Exception:  # PyNaCl has several error types for what is one answer: no
        return False
    return True


def target(public_key: bytes) -> bytes:
    """Where a key lives in the DHT: 32 bytes."""
    return blake2b(public_key)


def parse_key(text: str, what: str = "public key") -> bytes:
    """32 bytes from 64 hexadecimal digits. Raises `InvalidInput` saying what is wrong."""
    text = text.strip()
    if len(text) != 64:
        raise InvalidInput(f"a {what} has 64 hexadecimal digits, this one has {len(text)}")
    if not _HEX.issuperset(text):
        raise InvalidInput(f"a {what} has hexadecimal digits only (0-9, a-f)")
    return bytes.fromhex(text)
