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
from nacl._sodium import ffi, lib
from nacl.bindings import crypto_secretstream_xchacha20poly1305_init_pull as _initialise
from nacl.bindings import crypto_secretstream_xchacha20poly1305_rekey as _rekey

from .transmit import Buffer

HEADER_BYTES = bindings.crypto_secretstream_xchacha20poly1305_HEADERBYTES
#: A body is this much longer than its message: one tag byte and 16 bytes of MAC.
OVERHEAD_BYTES = bindings.crypto_secretstream_xchacha20poly1305_ABYTES
#: Messages from this many bytes on take the fast way, if their length lets them.
FAST_BYTES = 2048

# PyNaCl's own calls check each argument anew, which takes longer than a small message does, and
# keep a buffer of the largest message so far for each stream.
_push = lib.crypto_secretstream_xchacha20poly1305_push
_pull = lib.crypto_secretstream_xchacha20poly1305_pull
_memory = ffi.new_allocator(should_clear_after_alloc=False)
_NULL = ffi.NULL
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
        state = self._state.statebuf
        body = _memory("unsigned char[]", size + OVERHEAD_BYTES)
        # The result tells of a message longer than 256 GiB.
        _push(state, body, _NULL, bytes(message), size, _NULL, 0, 0)
        if self._aead is not None:
            self._after_slow()
        return [ffi.buffer(body)[:]]

    def open(self, body: Buffer) -> bytes:
        """The message in a body of at least `OVERHEAD_BYTES`. Raises `Damaged`."""
        size = len(body) - OVERHEAD_BYTES
        if size >= FAST_BYTES and size % 16 == 0:
            return self._open_fast(memoryview(body))
        if size < 0:
            raise Damaged
        message = _memory("unsigned char[]", size)
        sealed = bytes(body)
        if _pull(self._state.statebuf, message, _NULL, _NULL, sealed, len(sealed), _NULL, 0):
            raise Damaged
        if self._aead is not None:
            self._after_slow()
        return bytes(ffi.buffer(message))

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

    def _after_slow(self) -> None:
        # libsodium changes the key by itself when the counter wraps or a tag says so, and then
        # begins to count from 1.
        if ffi.buffer(self._state.statebuf)[32:36] == _FIRST_COUNT:
            self._aead = None
