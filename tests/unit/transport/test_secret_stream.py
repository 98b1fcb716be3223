from __future__ import annotations

import hashlib
import tracemalloc
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl import bindings
from vectors import load

from hyperseaport.transport import noise
from hyperseaport.transport.errors import InvalidInput, LocalError, ProtocolError
from hyperseaport.transport.keys import KeyPair
from hyperseaport.transport.noise import Handshake
from hyperseaport.transport.secret_stream import MAX_MESSAGE, SecretStream, StreamError

VECTORS = load("secret-stream")
GIVEN = VECTORS["given_keys"]
SIDES = GIVEN["sides"]
by_role = pytest.mark.parametrize("side", SIDES, ids=[side["role"] for side in SIDES])

#: Cases of the recording that are about bytes; the rest is the transport's or the XX handshake's.
CASES = [
    case
    for case in VECTORS["receiver_cases"]["cases"]
    if not case["name"].startswith(("XX", "receive timeout"))
]


def unhex(text: str) -> bytes:
    return bytes.fromhex(text)


class Chosen(Random):
    """A source that returns what the recording's peers drew, in order."""

    def __init__(self, *draws: bytes) -> None:
        super().__init__(0)
        self._draws = list(draws)

    def randbytes(self, n: int) -> bytes:
        draw = self._draws.pop(0)
        assert len(draw) == n
        return draw


def handshake(role: str) -> Handshake:
    side = next(side for side in SIDES if side["role"] == role)
    return Handshake(
        is_initiator=role == "initiator",
        tx=unhex(side["tx"]),
        rx=unhex(side["rx"]),
        hash=unhex(GIVEN["handshake_hash"]),
        public_key=bytes(32),
        remote_public_key=bytes(32),
    )


def pair(**options: int) -> tuple[SecretStream, SecretStream]:
    """Both ends; what the first sends, the second is ready for."""
    here = SecretStream(handshake("initiator"), Random(1), **options)
    there = SecretStream(handshake("responder"), Random(2), **options)
    assert there.receive(here.start()) == []
    here.receive(there.start())
    return here, there


def frame(stream: SecretStream, message: bytes) -> bytes:
    return b"".join(stream.encrypt(message))


def plain(row: dict[str, Any]) -> bytes:
    if row["plain"].startswith("pattern("):
        return bytes((31 * i + i // 256) % 256 for i in range(70000))
    return unhex(row["plain"])


def fed(stream: SecretStream, chunks: list[bytes]) -> tuple[list[bytes], str | None]:
    """All messages, and the error's text if there was one."""
    messages: list[bytes] = []
    for chunk in chunks:
        try:
            messages += stream.receive(chunk)
        except StreamError as error:
            return messages + error.messages, str(error)
    return messages, None


# Recordings


@by_role
def test_recorded_frames(side: dict[str, Any]) -> None:
    stream = SecretStream(handshake(side["role"]), Chosen(unhex(side["header"])))
    first = stream.start()
    assert len(first) == 59
    assert first.hex() == side["first_bytes"]
    for row in side["frames"]:
        data = frame(stream, plain(row))
        if "frame" in row:
            assert data.hex() == row["frame"]
        else:
            assert len(data) == row["frame_length"]
            assert hashlib.sha256(data).hexdigest() == row["frame_sha256"]


@by_role
def test_recorded_frames_are_read(side: dict[str, Any]) -> None:
    role = "responder" if side["role"] == "initiator" else "initiator"
    sender = SecretStream(handshake(side["role"]), Chosen(unhex(side["header"])))
    data = sender.start() + b"".join(frame(sender, plain(row)) for row in side["frames"])
    assert data.startswith(unhex(side["first_bytes"] + side["frames"][0]["frame"]))
    expected = [plain(row) for row in side["frames"] if row["plain"]]
    for size in (len(data), 1, 7, 1200):
        reader = SecretStream(handshake(role), Random(0))
        chunks = [data[at : at + size] for at in range(0, len(data), size)]
        assert fed(reader, chunks) == (expected, None)
        assert not reader.truncated


def test_recorded_stream_of_hyperdht() -> None:
    vectors = load("hyperdht")
    keys, row = vectors["noise"], vectors["secretStream"]
    ends = [
        Handshake(
            is_initiator=name == "initiator",
            tx=unhex(keys[f"{name}Tx"]),
            rx=unhex(keys[f"{name}Rx"]),
            hash=unhex(keys["handshakeHash"]),
            public_key=bytes(32),
            remote_public_key=bytes(32),
        )
        for name in ("initiator", "responder")
    ]
    sender = SecretStream(ends[0], Chosen(unhex(row["headerFrame"])[35:]))
    reader = SecretStream(ends[1], Random(0))
    assert sender.start().hex() == row["headerFrame"]
    assert reader.receive(unhex(row["headerFrame"])) == []
    assert reader.opened
    for recorded in row["frames"]:
        message = unhex(recorded["plaintext"])
        assert frame(sender, message).hex() == recorded["hex"]
        assert reader.receive(unhex(recorded["hex"])) == ([message] if message else [])


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "byte by byte"])
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_recorded_receiver_case(case: dict[str, Any], whole: bool) -> None:
    # Items that are no bytes name an event of the transport.
    chunks = [unhex(item) for item in case["received"] if item not in ("END", "DESTROY")]
    if not whole:
        chunks = [bytes((byte,)) for chunk in chunks for byte in chunk]
    stream = SecretStream(handshake("responder"), Random(0))
    messages, error = fed(stream, chunks)
    expected = [unhex(item) for item in case["data"] if item]
    if case["name"] == "replayed message":
        # Node destroys its stream before its reader gets the message that came in the same chunk.
        expected = [plain(SIDES[0]["frames"][0])]
    assert messages == expected
    assert (error is None) == (case["error"] is None)
    assert stream.truncated == (case["name"] == "end in the middle of a frame")
    if error is not None:
        with pytest.raises(ProtocolError, match=error):
            stream.receive(b"")


def test_recorded_standalone_stream() -> None:
    row = next(row for row in load("noise")["handshakes"] if row["pattern"] == "XX")
    recorded = VECTORS["standalone_xx"]
    pairs = {
        side: KeyPair.from_seed(unhex(row[side]["static_seed"]))
        for side in ("initiator", "responder")
    }
    states = {
        side: noise.handshake_state(
            row["protocol_name"].encode(),
            side == "initiator",
            prologue=b"",
            key_pair=pairs[side],
            ephemeral_seed=unhex(row[side]["ephemeral_seed"]),
        )
        for side in pairs
    }
    written = []
    order = [("initiator", "responder"), ("responder", "initiator"), ("initiator", "responder")]
    for writer, reader in order:
        message = bytearray()
        states[writer].write_message(b"", message)
        states[reader].read_message(bytes(message), bytearray())
        written.append(len(message).to_bytes(3, "little") + message)
    streams = {}
    for side, state in states.items():
        protocol = state.noise_protocol
        keys = Handshake(
            is_initiator=side == "initiator",
            tx=protocol.cipher_state_encrypt.k,
            rx=protocol.cipher_state_decrypt.k,
            hash=protocol.handshake_hash,
            public_key=pairs[side].public_key,
            remote_public_key=state.rs.public_bytes,
        )
        streams[side] = SecretStream(keys, Chosen(unhex(recorded[f"{side}_header"])))
    starts = {side: stream.start() for side, stream in streams.items()}
    transcript = [
        written[0],
        written[1],
        written[2] + starts["initiator"],
        starts["responder"],
        frame(streams["initiator"], b"hello"),
        frame(streams["responder"], b"world"),
    ]
    assert [item.hex() for item in transcript] == [item["bytes"] for item in recorded["transcript"]]
    assert streams["responder"].receive(starts["initiator"] + transcript[4]) == [b"hello"]
    assert streams["initiator"].receive(starts["responder"] + transcript[5]) == [b"world"]


# Sending


def test_random_headers_come_from_the_source() -> None:
    starts = [SecretStream(handshake("initiator"), Random(seed)).start() for seed in (5, 5, 6)]
    assert starts[0] == starts[1]
    assert starts[0] != starts[2]


def test_start_comes_first_and_once() -> None:
    stream = SecretStream(handshake("initiator"), Random(0))
    with pytest.raises(LocalError, match="start"):
        stream.encrypt(b"x")
    stream.start()
    with pytest.raises(LocalError, match="once"):
        stream.start()


def test_data_may_follow_the_header_before_the_peers_came() -> None:
    here = SecretStream(handshake("initiator"), Random(0))
    there = SecretStream(handshake("responder"), Random(0))
    data = here.start() + frame(here, b"early")
    assert there.receive(data) == [b"early"]
    assert not here.opened


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_sent_and_received(kind: Any) -> None:
    here, there = pair()
    assert there.receive(kind(frame(here, kind(b"message")))) == [b"message"]


def test_keep_alive_is_swallowed() -> None:
    here, there = pair()
    data = b"".join(here.keep_alive())
    assert len(data) == 20
    assert there.receive(data + frame(here, b"x") + b"".join(here.keep_alive())) == [b"x"]


def test_what_is_the_peers_own_is_counted() -> None:
    here, there = pair()
    assert there.authentic == 0
    there.receive(frame(here, b"one") + b"".join(here.keep_alive()))
    assert there.authentic == 2
    there.receive_whole(frame(here, b"three"))
    assert there.authentic == 3
    with pytest.raises(StreamError):
        there.receive(bytes((17, 0, 0)) + bytes(17))
    assert there.authentic == 3


def test_largest_message() -> None:
    limit = VECTORS["size_limit"]
    assert limit["largest_plain"] == MAX_MESSAGE
    here, there = pair()
    message = bytes(MAX_MESSAGE)
    data = frame(here, message)
    assert len(data) == limit["frame_bytes_for_it"]
    assert there.receive(data[:-1]) == []
    assert there.buffered == len(data) - 1
    assert there.receive(data[-1:]) == [message]
    assert there.buffered == 0
    with pytest.raises(InvalidInput, match=f"at most {MAX_MESSAGE} bytes, not {MAX_MESSAGE + 1}"):
        here.encrypt(bytes(MAX_MESSAGE + 1))
    assert there.receive(frame(here, b"still good")) == [b"still good"]


def test_own_limit_works_both_ways() -> None:
    here, there = pair(max_message=100)
    assert there.receive(frame(here, bytes(100))) == [bytes(100)]
    with pytest.raises(InvalidInput, match="at most 100 bytes, not 101"):
        here.encrypt(bytes(101))
    with pytest.raises(StreamError, match="118 bytes, longer than is accepted"):
        there.receive((101 + 17).to_bytes(3, "little"))


def test_large_messages_leave_no_large_buffers() -> None:
    here, there = pair()
    there.receive(frame(here, bytes(100_000)))
    for state in (here._sender, there._receiver):
        assert state is not None
        assert state._state.rawbuf is None


# Receiving


def test_bytes_held_of_an_incomplete_frame() -> None:
    here, there = pair()
    data = frame(here, b"abc")
    for count in range(1, len(data)):
        assert there.receive(data[count - 1 : count]) == []
        assert there.buffered == count
        assert there.truncated
    assert there.receive(data[-1:]) == [b"abc"]
    assert not there.truncated


@pytest.mark.parametrize("length", [0, 16, 55, 57, 2**24 - 1])
def test_length_before_the_header_is_refused_at_once(length: int) -> None:
    stream = SecretStream(handshake("responder"), Random(0))
    with pytest.raises(StreamError, match=f"header of {length} bytes"):
        stream.receive(length.to_bytes(3, "little"))
    assert stream.buffered == 0


def test_announced_length_alone_costs_no_memory() -> None:
    _, there = pair()
    tracemalloc.start()
    try:
        there.receive((2**24 - 1).to_bytes(3, "little") + bytes(100))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert there.buffered == 103
    assert peak < 10_000


def test_error_after_good_messages_of_the_same_bytes() -> None:
    here, there = pair()
    good, bad = frame(here, b"good"), bytearray(frame(here, b"bad"))
    bad[-1] ^= 1
    after = frame(here, b"after")
    with pytest.raises(StreamError, match="damaged") as caught:
        there.receive(good + bad + after)
    assert caught.value.messages == [b"good"]
    with pytest.raises(StreamError, match="damaged") as caught:
        there.receive(after)
    assert caught.value.messages == []


def test_reflected_stream_is_refused() -> None:
    here = SecretStream(handshake("initiator"), Random(0))
    with pytest.raises(StreamError, match="another connection"):
        here.receive(here.start())


@pytest.mark.parametrize("change", ["replay", "reorder", "drop"])
def test_order_is_protected(change: str) -> None:
    here, there = pair()
    frames = [frame(here, text) for text in (b"one", b"two", b"three")]
    order = {"replay": (0, 0), "reorder": (0, 2, 1), "drop": (0, 2)}[change]
    messages, error = fed(there, [frames[index] for index in order])
    assert messages == [b"one"]
    assert error == "message is damaged, replayed or out of order"


@pytest.mark.parametrize(
    "tag",
    [
        bindings.crypto_secretstream_xchacha20poly1305_TAG_PUSH,
        bindings.crypto_secretstream_xchacha20poly1305_TAG_REKEY,
        bindings.crypto_secretstream_xchacha20poly1305_TAG_FINAL,
    ],
)
def test_tags_do_not_matter(tag: int) -> None:
    here, there = pair()
    assert here._sender is not None
    state = here._sender._state
    data = b""
    for text, text_tag in ((b"tagged", tag), (b"next", 0)):
        body = bindings.crypto_secretstream_xchacha20poly1305_push(state, text, tag=text_tag)
        data += len(body).to_bytes(3, "little") + body
    assert there.receive(data) == [b"tagged", b"next"]


# Unordered messages


@by_role
def test_recorded_unordered_messages(side: dict[str, Any]) -> None:
    row = side["unordered"]
    peer = "responder" if side["role"] == "initiator" else "initiator"
    sender = SecretStream(handshake(side["role"]), Chosen(unhex(row["initial_counter"])))
    reader = SecretStream(handshake(peer), Random(0))
    for message in row["messages"]:
        assert sender.encode_message(unhex(message["plain"])).hex() == message["message"]
        assert reader.decode_message(unhex(message["message"])) == unhex(message["plain"])
        assert sender.decode_message(unhex(message["message"])) is None


def test_keys_of_unordered_messages() -> None:
    row = load("hyperdht")["secretStreamUnordered"]
    keys = load("hyperdht")["noise"]
    for is_initiator, name in ((True, "initiator"), (False, "responder")):
        stream = SecretStream(
            Handshake(is_initiator, b"", b"", unhex(keys["handshakeHash"]), b"", b""), Random(0)
        )
        payload = stream.encode_message(b"message")
        key = unhex(row[f"{name}SendKey"])
        nonce = payload[:8] + bytes(16)
        assert bindings.crypto_secretbox_open(payload[8:], nonce, key) == b"message"


def test_unordered_messages_end_before_a_nonce_repeats() -> None:
    stream = SecretStream(handshake("initiator"), Chosen(bytes(8)))
    stream.encode_message(b"")
    stream._counter = 2**64 - 2
    assert stream.encode_message(b"").startswith(b"\xff" * 8)
    for _ in range(2):
        with pytest.raises(LocalError, match="no nonce is left"):
            stream.encode_message(b"")


# Arbitrary input


@settings(deadline=None, derandomize=True)
@given(st.lists(st.binary(max_size=200), max_size=5), st.booleans())
def test_arbitrary_bytes(chunks: list[bytes], opened: bool) -> None:
    stream = SecretStream(handshake("responder"), Random(0), max_message=1000)
    if opened:
        stream.receive(SecretStream(handshake("initiator"), Random(0)).start())
    messages, error = fed(stream, chunks)
    assert messages == []
    assert stream.buffered <= sum(map(len, chunks))
    if error is not None:
        with pytest.raises(StreamError, match=error):
            stream.receive(b"")


@settings(deadline=None, derandomize=True)
@given(st.binary(max_size=100))
def test_arbitrary_unordered_messages(payload: bytes) -> None:
    assert SecretStream(handshake("responder"), Random(0)).decode_message(payload) is None


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.binary(max_size=400), max_size=6),
    st.lists(st.integers(min_value=0, max_value=600), max_size=12),
)
def test_any_fragmentation(messages: list[bytes], cuts: list[int]) -> None:
    here = SecretStream(handshake("initiator"), Random(3))
    there = SecretStream(handshake("responder"), Random(4))
    data = here.start() + b"".join(frame(here, message) for message in messages)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    chunks = [data[start:stop] for start, stop in pairwise(edges)]
    assert fed(there, chunks) == ([message for message in messages if message], None)
    assert not there.truncated


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.data())
def test_any_damage_is_found(data: st.DataObject) -> None:
    here, there = pair()
    frames = bytearray(frame(here, b"first") + frame(here, b"second"))
    index = data.draw(st.integers(0, len(frames) - 1))
    frames[index] ^= data.draw(st.integers(1, 255))
    messages, error = fed(there, [bytes(frames)])
    # A damaged length may leave the reader waiting for bytes that the frame does not have.
    assert messages in ([], [b"first"])
    assert error is not None or there.truncated


# Whole frames


def test_a_whole_frame_is_read_in_one_step() -> None:
    here, there = pair()
    for size in (1, 64, 2048, 5000):
        message = Random(size).randbytes(size)
        assert there.receive_whole(frame(here, message)) == message
    assert there.receive_whole(frame(here, b"")) == b""
    assert there.authentic == 5
    assert there.buffered == 0
    assert there.receive(frame(here, b"and the usual way")) == [b"and the usual way"]


def test_what_is_no_whole_frame_is_left_alone() -> None:
    here, there = pair(max_message=5000)
    one, two = frame(here, b"one"), frame(here, b"two")
    for data in (b"", one[:2], one[:-1], one + two[:1], one + two, b"\xff\xff\xff" + one):
        assert there.receive_whole(data) is None
    assert there.receive(one[:5]) == []
    assert there.receive_whole(two) is None
    assert there.receive(one[5:]) == [b"one"]
    assert there.receive_whole(two) == b"two"
    damaged = bytearray(frame(here, b"three"))
    damaged[-1] ^= 1
    assert there.receive_whole(damaged) is None
    with pytest.raises(StreamError, match="damaged"):
        there.receive(damaged)
    assert there.receive_whole(frame(here, b"four")) is None


def test_before_the_header_there_is_no_whole_frame() -> None:
    here = SecretStream(handshake("initiator"), Random(1))
    there = SecretStream(handshake("responder"), Random(2))
    header = here.start()
    assert there.receive_whole(header) is None
    assert there.receive(header) == []
    assert there.receive_whole(frame(here, b"now")) == b"now"
