"""The two ways of `StreamCipher` against libsodium's own secretstream."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl import bindings

from hyperseaport.transport.stream_cipher import (
    FAST_BYTES,
    HEADER_BYTES,
    OVERHEAD_BYTES,
    Damaged,
    StreamCipher,
)

KEY = bytes(range(32))
HEADER = bytes(range(100, 100 + HEADER_BYTES))

REKEY = bindings.crypto_secretstream_xchacha20poly1305_TAG_REKEY

# Both ways, the border between them, and lengths for which only libsodium's is right.
SIZES = st.one_of(
    st.integers(0, 64),
    st.integers(FAST_BYTES - 33, FAST_BYTES + 33),
    st.integers(1, 1024).map(lambda blocks: FAST_BYTES + 16 * blocks),
    st.integers(FAST_BYTES, 20_000),
)


def libsodium() -> bindings.crypto_secretstream_xchacha20poly1305_state:
    state = bindings.crypto_secretstream_xchacha20poly1305_state()
    bindings.crypto_secretstream_xchacha20poly1305_init_pull(state, HEADER, KEY)
    return state


def push(
    state: bindings.crypto_secretstream_xchacha20poly1305_state, message: bytes, tag: int = 0
) -> bytes:
    body: bytes = bindings.crypto_secretstream_xchacha20poly1305_push(state, message, None, tag)
    return body


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(SIZES, max_size=12), st.integers(0, 2**32))
def test_every_sequence_of_messages_seals_as_libsodium_does(sizes: list[int], seed: int) -> None:
    rng = Random(seed)
    reference, cipher = libsodium(), StreamCipher(HEADER, KEY)
    for size in sizes:
        message = rng.randbytes(size)
        assert b"".join(cipher.seal(message)) == push(reference, message)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.tuples(SIZES, st.integers(0, 3)), max_size=12), st.integers(0, 2**32))
def test_what_libsodium_seals_opens_whatever_its_tags(
    messages: list[tuple[int, int]], seed: int
) -> None:
    rng = Random(seed)
    reference, cipher = libsodium(), StreamCipher(HEADER, KEY)
    for size, tag in messages:
        message = rng.randbytes(size)
        assert cipher.open(push(reference, message, tag)) == message


def test_a_rekey_between_fast_messages() -> None:
    reference, cipher = libsodium(), StreamCipher(HEADER, KEY)
    for tag in (0, REKEY, 0, 0, REKEY, REKEY, 0):
        assert cipher.open(push(reference, bytes(FAST_BYTES), tag)) == bytes(FAST_BYTES)


def test_the_counter_wraps_with_a_rekey() -> None:
    from nacl._sodium import ffi

    reference, sealing, opening = libsodium(), StreamCipher(HEADER, KEY), StreamCipher(HEADER, KEY)
    for state in (reference, sealing._state, opening._state):
        memoryview(ffi.buffer(state.statebuf)).cast("B")[32:36] = b"\xfe\xff\xff\xff"
    for _ in range(4):
        body = push(reference, bytes(FAST_BYTES))
        assert b"".join(sealing.seal(bytes(FAST_BYTES))) == body
        assert opening.open(body) == bytes(FAST_BYTES)


@pytest.mark.parametrize("size", [0, 5, FAST_BYTES, FAST_BYTES + 1, 65_536])
@pytest.mark.parametrize("where", [0, 1, -OVERHEAD_BYTES, -1])
def test_a_damaged_body_does_not_open(size: int, where: int) -> None:
    body = bytearray(b"".join(StreamCipher(HEADER, KEY).seal(bytes(size))))
    body[where] ^= 0x40
    with pytest.raises(Damaged):
        StreamCipher(HEADER, KEY).open(bytes(body))


@pytest.mark.parametrize("size", [1, FAST_BYTES])
def test_a_replayed_body_does_not_open(size: int) -> None:
    body = b"".join(StreamCipher(HEADER, KEY).seal(bytes(size)))
    cipher = StreamCipher(HEADER, KEY)
    assert cipher.open(body) == bytes(size)
    with pytest.raises(Damaged):
        cipher.open(body)


def test_buffers_of_every_kind() -> None:
    for kind in (bytes, bytearray, memoryview):
        message = kind(bytes(FAST_BYTES))
        body = b"".join(StreamCipher(HEADER, KEY).seal(message))
        assert StreamCipher(HEADER, KEY).open(kind(body)) == bytes(FAST_BYTES)
