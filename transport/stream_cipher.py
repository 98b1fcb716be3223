"""One direction of libsodium's secretstream (XChaCha20-Poly1305), by the faster of two ways.

Both ways give the same bytes. libsodium's own takes any message. For messages whose length is a
multiple of 16, what secretstream computes is the IETF AEAD over a 64-byte block (the tag byte, then
zeros) followed by the message, of whose encrypted block only the first byte is sent: the MAC's
padding is the AEAD's for just these lengths. OpenSSL does that several times faster; below
`FAST_BYTES` its set-up costs more than it saves.

State, shared by both ways: 32 bytes key, 4 bytes little-endian counter, 8 bytes inner nonce. After
each message the first 8 bytes of its MAC are XORed into the inner nonce and the counter goes up.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from nacl import bindings
from nacl._sodium import ffi
from nacl.bindings import crypto_secretstream_xchacha20poly1305_init_pull as _initialise
from nacl.bindings import crypto_secretstream_xchacha20poly1305_pull as _pull
from nacl.bindings import crypto_secretstream_xchacha20poly1305_push as _push
from nacl.bindings import crypto_secretstream_xchacha20poly1305_rekey as _rekey
from nacl.exceptions import CryptoError

from .transmit import Buffer

HEADER_BYTES = bindings.crypto_secretstream_xchacha20poly1305_HEADERBYTES
#: A body is this much longer than its message: one tag byte and 16 bytes of MAC.
OVERHEAD_BYTES = bindings.crypto_secretstream_xchacha20poly1305_ABYTES
#: Messages from this many bytes on take the fast way, if their length lets them.
FAST_BYTES = 2048

#: PyNaCl keeps a scratch buffer as large as the largest message so far for each direction. Above
#: this it is given back: tens of thousands of idle streams must not hold what they once needed.
_MAX_SCRATCH = 4096
_BLOCK = bytes(64)
_MAC_BYTES = 16
_TAG_REKEY = 2
_FIRST_COUNT = bytes((1, 0, 0, 0))


class Damaged(Exception):
    """A body is not what its sender sent next. The direction cannot go on."""


class StreamCipher:
    """``header`` is the direction's 24 random bytes, ``key`` its 32-byte key. An object either
    seals or opens, never both."""

    __slots__ = ("_aead", "_state")

    def __init__(self, header: bytes, key: bytes) -> None:
        # Sending and receiving states are alike, and this call takes the header from outside,
        # where the sender's own would make it from libsodium's randomness.
        self._state = bindings.crypto_secretstream_xchacha20poly1305_state()
        _initialise(self._state, header, key)
        self._aead: ChaCha20Poly1305 | None = None

    def seal(self, message: Buffer) -> list[Buffer]:
        """The body of the next message, in pieces: `OVERHEAD_BYTES` longer than it."""
        size = len(message)
        if size >= FAST_BYTES and size % 16 == 0:
            memory, aead = self._fast()
            sealed = aead.encrypt(bytes(memory[32:44]), b"".join((_BLOCK, message)), None)
            self._advance(memory, sealed[-_MAC_BYTES:])
            return [sealed[:1], memoryview(sealed)[len(_BLOCK) :]]
        body = _push(self._state, bytes(message))
        self._after_slow(size)
        return [body]

    def open(self, body: Buffer) -> bytes:
        """The message in a body of at least `OVERHEAD_BYTES`. Raises `Damaged`."""
        size = len(body) - OVERHEAD_BYTES
        if size >= FAST_BYTES and size % 16 == 0:
            return self._open_fast(memoryview(body))
        try:
            message, _ = _pull(self._state, bytes(body))
        except CryptoError as error:
            raise Damaged from error
        self._after_slow(size)
        return message

    def _open_fast(self, body: memoryview) -> bytes:
        memory, aead = self._fast()
        nonce = bytes(memory[32:44])
        # The sender dropped the rest of the encrypted block, which is that of the key stream.
        block = aead.encrypt(nonce, _BLOCK, None)
        try:
            opened = aead.decrypt(nonce, b"".join((body[:1], block[1:64], body[1:])), None)
        except InvalidTag as error:
            raise Damaged from error
        self._advance(memory, bytes(body[-_MAC_BYTES:]), opened[0])
        return opened[len(_BLOCK) :]

    def _fast(self) -> tuple[memoryview, ChaCha20Poly1305]:
        """The state's memory, and OpenSSL's cipher with the state's key."""
        memory = memoryview(ffi.buffer(self._state.statebuf)).cast("B")
        if self._aead is None:
            self._aead = ChaCha20Poly1305(bytes(memory[:32]))
        return memory, self._aead

    def _advance(self, memory: memoryview, mac: bytes, tag: int = 0) -> None:
        inner = int.from_bytes(memory[36:44], "little") ^ int.from_bytes(mac[:8], "little")
        memory[36:44] = inner.to_bytes(8, "little")
        counter = (int.from_bytes(memory[32:36], "little") + 1) & 0xFFFFFFFF
        memory[32:36] = counter.to_bytes(4, "little")
        if counter == 0 or tag & _TAG_REKEY:
            _rekey(self._state)
            self._aead = None

    def _after_slow(self, size: int) -> None:
        # libsodium changes the key by itself when the counter wraps or a tag says so, and then
        # begins to count from 1.
        if self._aead is not None and ffi.buffer(self._state.statebuf)[32:36] == _FIRST_COUNT:
            self._aead = None
        if size > _MAX_SCRATCH:
            self._state.rawbuf = None
