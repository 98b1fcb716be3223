from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from hyperseaport.transport.udx.send import SendBuffer


def test_pieces_are_slices_of_what_was_written() -> None:
    buffer, data = SendBuffer(), bytearray(b"abcdef")
    buffer.append(data)
    (piece,) = buffer.pieces(2, 3)
    assert isinstance(piece, memoryview)
    assert piece.obj is data
    assert bytes(piece) == b"cde"


def test_pieces_across_buffers() -> None:
    buffer = SendBuffer()
    for data in (b"ab", b"", b"cdef", b"gh"):
        buffer.append(data)
    assert buffer.end == 8
    assert [bytes(each) for each in buffer.pieces(1, 6)] == [b"b", b"cdef", b"g"]


def test_many_pieces_are_joined() -> None:
    buffer = SendBuffer()
    for _ in range(1000):
        buffer.append(b"x")
    assert buffer.pieces(10, 900) == [b"x" * 900]


def test_any_buffer_counts_in_bytes() -> None:
    buffer = SendBuffer()
    buffer.append(memoryview(array("I", [1, 2])))
    assert buffer.end == 8


def test_release_keeps_what_is_not_over() -> None:
    buffer, freed = SendBuffer(), bytearray(b"ab")
    buffer.append(freed)
    buffer.append(b"cdef")
    buffer.release(1)
    assert buffer.pieces(1, 2) == [b"b", b"c"]
    buffer.release(2)
    freed.append(0)  # a bytearray that is still referred to cannot grow
    assert buffer.pieces(2, 4) == [b"cdef"]
    buffer.release(6)
    buffer.append(b"gh")
    assert buffer.pieces(6, 2) == [b"gh"]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.binary(max_size=20), max_size=20), st.integers(0, 400), st.integers(0, 400))
def test_any_part_of_any_writes(writes: list[bytes], one: int, two: int) -> None:
    buffer, data = SendBuffer(), b"".join(writes)
    for each in writes:
        buffer.append(each)
    start, end = sorted((min(one, len(data)), min(two, len(data))))
    buffer.release(start)
    assert b"".join(buffer.pieces(start, end - start)) == data[start:end]
