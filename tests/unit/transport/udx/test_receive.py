from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperseaport.transport.errors import InvalidInput
from hyperseaport.transport.udx.receive import Receiver

KIB = 1024


def taken(receiver: Receiver, limit: int | None = None) -> bytes:
    return b"".join(receiver.take(limit))


def test_in_order_bytes_are_readable_at_once() -> None:
    receiver = Receiver()
    assert receiver.accept(0, b"ab", end=False)
    assert receiver.accept(1, b"cd", end=False)
    assert (receiver.next, receiver.readable) == (2, 4)
    assert taken(receiver) == b"abcd"
    assert receiver.readable == 0


def test_a_gap_holds_back_what_is_behind_it() -> None:
    receiver = Receiver()
    assert not receiver.accept(1, b"cd", end=False)
    assert receiver.blocks() == ((1, 2),)
    assert receiver.readable == 0
    assert receiver.accept(0, b"ab", end=False)
    assert receiver.blocks() == ()
    assert taken(receiver) == b"abcd"


def test_duplicates_change_nothing() -> None:
    receiver = Receiver()
    receiver.accept(0, b"a", end=False)
    receiver.accept(2, b"c", end=False)
    window = receiver.window
    assert not receiver.accept(0, b"x", end=False)
    assert not receiver.accept(2, b"x", end=False)
    assert receiver.duplicates == 2
    assert receiver.window == window
    receiver.accept(1, b"b", end=False)
    assert taken(receiver) == b"abc"


def test_an_empty_packet_uses_a_number() -> None:
    receiver = Receiver()
    assert receiver.accept(0, b"", end=False)
    assert receiver.next == 1
    assert receiver.take() == []


def test_the_end_is_reached_when_everything_before_it_is() -> None:
    receiver = Receiver()
    receiver.accept(1, b"", end=True)
    assert (receiver.end, receiver.finished) == (1, False)
    receiver.accept(0, b"a", end=False)
    assert receiver.finished
    assert receiver.next == 2


def test_nothing_comes_after_the_end() -> None:
    receiver = Receiver()
    receiver.accept(2, b"", end=True)
    receiver.accept(3, b"late", end=False)
    assert receiver.blocks() == ((2, 3),)
    receiver.accept(0, b"a", end=False)
    receiver.accept(1, b"b", end=False)
    receiver.accept(3, b"late", end=False)
    assert receiver.next == 3
    assert taken(receiver) == b"ab"


def test_an_end_below_what_is_stored_ends_there() -> None:
    receiver = Receiver()
    receiver.accept(2, b"stray", end=False)
    receiver.accept(1, b"", end=True)
    receiver.accept(0, b"a", end=False)
    assert receiver.next == 2
    assert receiver.blocks() == ()
    assert receiver.window == receiver.offer.capacity - 1


def test_bytes_count_against_the_window_until_credited() -> None:
    receiver = Receiver(capacity=100)
    receiver.accept(0, b"x" * 30, end=False)
    receiver.accept(2, b"x" * 20, end=False)
    assert receiver.window == 50
    receiver.take()
    assert receiver.window == 50
    receiver.credit(30)
    assert receiver.window == 80


def test_credit_for_more_than_was_read() -> None:
    receiver = Receiver()
    receiver.accept(0, b"abcd", end=False)
    with pytest.raises(InvalidInput):
        receiver.credit(1)
    taken(receiver, 3)
    receiver.credit(3)
    with pytest.raises(InvalidInput):
        receiver.credit(1)
    with pytest.raises(InvalidInput):
        receiver.credit(-1)


def test_take_cuts_at_the_limit() -> None:
    receiver = Receiver()
    for seq in range(4):
        receiver.accept(seq, bytes([seq]) * 600, end=False)
    assert taken(receiver, 0) == taken(receiver, -1) == b""
    assert taken(receiver, 700) == b"\0" * 600 + b"\1" * 100
    assert receiver.readable == 1700
    assert taken(receiver, 10_000) == b"\1" * 500 + b"\2" * 600 + b"\3" * 600


def test_what_was_taken_does_not_change_with_what_comes() -> None:
    receiver = Receiver()
    receiver.accept(0, b"ab", end=False)
    part = receiver.take(1)
    receiver.accept(1, b"cd", end=False)
    assert b"".join(part) == b"a"
    rest = receiver.take()
    receiver.accept(2, b"ef", end=False)
    assert b"".join(rest) == b"bcd"
    assert taken(receiver) == b"ef"


def test_one_packet_more_is_taken_while_the_window_is_not_closed() -> None:
    receiver = Receiver(capacity=100)
    assert receiver.accept(0, b"x" * 99, end=False)
    assert receiver.accept(1, b"x" * 50, end=False)
    assert receiver.window == 0
    assert not receiver.accept(2, b"x", end=False)
    assert receiver.dropped == 1
    assert receiver.accept(2, b"", end=True), "an END needs no room"


def test_out_of_order_packets_keep_within_the_window() -> None:
    receiver = Receiver(capacity=100)
    receiver.accept(1, b"x" * 60, end=False)
    receiver.accept(2, b"x" * 60, end=False)
    assert receiver.blocks() == ((1, 2),)
    receiver.accept(1_000_000, b"x", end=False)
    assert receiver.blocks() == ((1, 2),)
    assert receiver.dropped == 2
    assert receiver.accept(0, b"x" * 60, end=False), "the gap can always be filled"


def test_single_bytes_do_not_cost_a_buffer_each() -> None:
    receiver = Receiver()
    for seq in range(5000):
        receiver.accept(seq, b"x", end=False)
    assert len(receiver.take()) <= 10


def test_the_lowest_fifty_blocks_are_told() -> None:
    receiver = Receiver()
    for seq in range(1, 121, 2):
        receiver.accept(seq, b"x", end=False)
    assert receiver.blocks() == tuple((seq, seq + 1) for seq in range(1, 101, 2))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.binary(max_size=700), min_size=1, max_size=40), st.integers(0, 2**32))
def test_any_order_gives_the_same_bytes(payloads: list[bytes], seed: int) -> None:
    receiver, rng = Receiver(first=5), Random(seed)
    packets = [(5 + i, payload, False) for i, payload in enumerate(payloads)]
    packets.append((5 + len(payloads), b"", True))
    packets += rng.choices(packets, k=10)
    rng.shuffle(packets)
    for seq, payload, end in packets:
        receiver.accept(seq, payload, end)
    assert receiver.finished
    assert receiver.duplicates == 10
    data = b"".join(payloads)
    assert taken(receiver) == data
    receiver.credit(len(data))
    assert receiver.window == receiver.offer.capacity


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300), st.booleans()), max_size=200))
def test_a_hostile_sender_fills_two_windows_at_most(
    packets: list[tuple[int, int, bool]],
) -> None:
    receiver = Receiver(capacity=1000)
    for seq, size, end in packets:
        receiver.accept(seq, bytes(size), end)
        held = receiver.readable + sum(len(each) for each in receiver._packets.values())
        assert held < 2 * 1000 + 300
        assert receiver.window == max(0, 1000 - held)
