from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import load

from hyperseaport.transport.encoding import Writer
from hyperseaport.transport.errors import Closed, InvalidInput, LocalError
from hyperseaport.transport.protomux import (
    MAX_BATCH,
    MAX_CHANNELS,
    MAX_FRAME,
    ChannelClosed,
    ChannelMessage,
    ChannelOpened,
    Protomux,
    ProtomuxEvent,
    ProtomuxFailure,
)

RECORDED = load("hyperdht")["blindRelayProtomux"]
KEY = bytes.fromhex(RECORDED["channelId"])
FRAMES = [bytes.fromhex(frame) for frame in RECORDED["frames"]]


def pump(one: Protomux, other: Protomux) -> tuple[list[ProtomuxEvent], list[ProtomuxEvent]]:
    """Carry messages until none is left; the events of each end."""
    events: tuple[list[ProtomuxEvent], list[ProtomuxEvent]] = ([], [])
    while (there := one.messages()) or (back := other.messages()):
        for message in there:
            events[1].extend(other.receive(message))
        if not there:
            for message in back:
                events[0].extend(one.receive(message))
    return events


def pair() -> tuple[Protomux, Protomux]:
    one, other = Protomux(), Protomux()
    one.open("p", b"k")
    other.open("p", b"k")
    pump(one, other)
    return one, other


def open_frame(channel: int, protocol: str = "p", key: bytes | None = b"k") -> bytes:
    return bytes(Writer().uint(0).uint(1).uint(channel).string(protocol).buffer(key))


def batch(*frames: tuple[int, bytes]) -> bytes:
    writer = Writer().uint(0).uint(0).uint(frames[0][0])
    last = frames[0][0]
    for channel, frame in frames:
        if channel != last:
            writer.uint(0).uint(channel)
            last = channel
        writer.buffer(frame)
    return bytes(writer)


def fails(mux: Protomux, message: bytes) -> bool:
    events = mux.receive(message)
    return bool(events) and isinstance(events[-1], ProtomuxFailure)


def test_writes_what_the_reference_wrote() -> None:
    mux = Protomux()
    channel = mux.open("blind-relay", KEY)
    mux.send(channel, 0, FRAMES[1][2:])
    mux.send(channel, 1, FRAMES[2][2:])
    mux.close(channel)
    assert mux.messages() == FRAMES
    assert mux.messages() == []


def test_reads_what_the_reference_wrote() -> None:
    mux = Protomux()
    channel = mux.open("blind-relay", KEY)
    events = [event for frame in FRAMES for event in mux.receive(frame)]
    assert events == [
        ChannelOpened(channel),
        ChannelMessage(channel, 0, FRAMES[1][2:]),
        ChannelMessage(channel, 1, FRAMES[2][2:]),
        ChannelClosed(channel, False),
    ]


def test_works_once_both_have_opened_it() -> None:
    one, other = Protomux(), Protomux()
    first = one.open("p", b"k")
    one.send(first, 7, b"early")
    second = other.open("p", b"k")
    assert not one.is_open(first)
    assert pump(one, other) == (
        [ChannelOpened(first)],
        [ChannelOpened(second), ChannelMessage(second, 7, b"early")],
    )
    assert one.is_open(first)
    assert other.is_open(second)


def test_each_end_numbers_its_own_channels() -> None:
    one, other = Protomux(), Protomux()
    one.open("a")
    first = one.open("b")
    second = other.open("b")
    other.open("a")
    pump(one, other)
    assert (first, second) == (2, 1)
    one.send(first, 0, b"x")
    assert pump(one, other)[1] == [ChannelMessage(second, 0, b"x")]


@pytest.mark.parametrize(("protocol", "key"), [("q", b"k"), ("p", b"l"), ("p", None)])
def test_rejects_what_it_has_not_opened(protocol: str, key: bytes | None) -> None:
    one, other = Protomux(), Protomux()
    other.open("p", b"k")
    channel = one.open(protocol, key)
    one.send(channel, 0, b"lost")
    mine, theirs = pump(one, other)
    assert ChannelClosed(channel, True) in mine
    assert not any(isinstance(event, ChannelMessage) for event in theirs)
    with pytest.raises(Closed):
        one.send(channel, 0, b"")


def test_a_close_ends_it_for_both_and_the_number_serves_again() -> None:
    one, other = pair()
    one.close(1)
    other.send(1, 0, b"crosses the close")
    assert pump(one, other) == ([], [ChannelClosed(1, False)])
    for mux in (one, other):
        assert not mux.is_open(1)
        assert mux.open("p", b"k") == 1
    assert pump(one, other) == ([ChannelOpened(1)], [ChannelOpened(1)])


def test_closes_that_cross() -> None:
    one, other = pair()
    one.close(1)
    other.close(1)
    assert pump(one, other) == ([], [])
    one.close(1)
    assert one.messages() == []


def test_a_close_before_the_peer_opened() -> None:
    one, other = Protomux(), Protomux()
    one.close(one.open("p"))
    second = other.open("p")
    assert pump(one, other) == ([], [ChannelOpened(second), ChannelClosed(second, False)])
    assert one.open("p") == 1


def test_opened_again_before_the_peer_opened_the_first() -> None:
    one, other = Protomux(), Protomux()
    first = one.open("p")
    one.close(first)
    second = one.open("p")
    assert second != first
    early = one.messages()
    other.open("p")
    events = [event for message in early[:2] for event in other.receive(message)]
    assert events == [ChannelOpened(1), ChannelClosed(1, False)]
    other.open("p")
    assert other.receive(early[2]) == [ChannelOpened(1)]
    events = [event for message in other.messages() for event in one.receive(message)]
    assert events == [ChannelOpened(second)]


def test_a_batch_carries_frames_of_several_channels() -> None:
    one, other = Protomux(), Protomux()
    one.open("a")
    one.open("b")
    for message in one.messages():
        other.receive(message)
    data = batch((0, open_frame(1, "a", None)[1:]), (1, b"\x05one"), (1, b"\x06"), (0, b"\x63"))
    assert one.receive(data) == [
        ChannelOpened(1),
        ChannelMessage(1, 5, b"one"),
        ChannelMessage(1, 6, b""),
    ]


def test_nested_and_endless_batches_are_refused() -> None:
    assert fails(Protomux(), batch((0, b"\x00\x01\x02\x00\x00")))
    assert not fails(Protomux(), b"\x00\x00\x05" + b"\x01\x00" * MAX_BATCH)
    assert fails(Protomux(), b"\x00\x00\x05" + b"\x01\x00" * (MAX_BATCH + 1))


@pytest.mark.parametrize(
    "message",
    [
        b"\x00",
        b"\x01",
        open_frame(2),
        b"\x00\x02\x09",
        b"\x00\x00\x01\x05ab",
        b"\x00\x01\x01\x05ab",
        bytes(MAX_FRAME + 1),
    ],
    ids=["no type", "no type of a message", "a gap", "a stray reject", "cut", "cut open", "huge"],
)
def test_malformed_frames_end_it(message: bytes) -> None:
    mux = Protomux()
    mux.open("p", b"k")
    assert fails(mux, message)
    assert mux.messages() == []
    assert mux.receive(open_frame(1)) == []


def test_a_number_in_use_cannot_be_opened() -> None:
    one, _ = pair()
    assert fails(one, open_frame(1))


def test_a_reject_of_an_open_channel_is_no_reject() -> None:
    one, _ = pair()
    assert fails(one, b"\x00\x02\x01")


def test_what_means_nothing_is_ignored() -> None:
    one, _ = pair()
    for message in (b"", b"\x00\x09", b"\x07\x00stray", b"\x00\x03\x00", b"\x00\x03\x09"):
        assert one.receive(message) == []
    assert one.is_open(1)
    assert one.messages() == []


def test_number_zero_is_rejected() -> None:
    mux = Protomux()
    assert mux.receive(open_frame(0)) == []
    assert mux.messages() == [b"\x00\x02\x00"]


def test_limits() -> None:
    mux = Protomux()
    for number in range(MAX_CHANNELS):
        assert mux.open("p", bytes((number,))) == number + 1
    with pytest.raises(LocalError, match="close some"):
        mux.open("q")
    with pytest.raises(LocalError, match="use that one"):
        mux.open("p", b"\x03")
    with pytest.raises(InvalidInput):
        mux.send(1, 0, bytes(MAX_FRAME))
    stranger = Protomux()
    for number in range(1, MAX_CHANNELS + 1):
        assert not fails(stranger, open_frame(number))
    assert fails(stranger, open_frame(MAX_CHANNELS + 1))


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["open", "close", "send", "carry"]), st.booleans(), st.integers(0, 3)
    ),
    max_size=60,
)


@given(ACTIONS)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_two_ends_never_disagree(actions: list[tuple[str, bool, int]]) -> None:
    ends = (Protomux(), Protomux())
    queues: tuple[list[bytes], list[bytes]] = ([], [])
    known: tuple[dict[int, int], dict[int, int]] = ({}, {})

    def carry(who: int, count: int) -> None:
        for message in queues[1 - who][:count]:
            for event in ends[who].receive(message):
                assert not isinstance(event, ProtomuxFailure)
                if isinstance(event, ChannelClosed):
                    del known[who][event.channel]
                if isinstance(event, ChannelMessage):
                    assert event.payload == bytes((known[who][event.channel],))
        del queues[1 - who][:count]
        queues[who].extend(ends[who].messages())

    for action, flag, number in actions:
        who = int(flag)
        mux, mine = ends[who], known[who]
        if action == "open" and number not in mine.values():
            mine[mux.open("p", bytes((number,)))] = number
        elif action == "carry":
            carry(who, number)
        elif number in mine.values():
            channel = next(key for key, value in mine.items() if value == number)
            if action == "send":
                mux.send(channel, 0, bytes((number,)))
            else:
                mux.close(channel)
                del mine[channel]
        queues[who].extend(mux.messages())
    while queues[0] or queues[1]:
        carry(0, 1000)
        carry(1, 1000)
    opened = [
        {mine[channel] for channel in mine if mux.is_open(channel)}
        for mux, mine in zip(ends, known, strict=True)
    ]
    assert opened[0] == opened[1]


@given(st.lists(st.binary(max_size=40), max_size=20))
@settings(deadline=None, derandomize=True, max_examples=300)
def test_survives_arbitrary_messages(messages: list[bytes]) -> None:
    mux = Protomux()
    mux.open("p")
    for message in messages:
        mux.receive(message)
        mux.receive(b"\x00" + message)
        mux.messages()


@given(st.integers(0, 2**53 - 1), st.binary(max_size=200))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_round_trips_messages(kind: int, payload: bytes) -> None:
    one, other = pair()
    one.send(1, kind, payload)
    events: Any = pump(one, other)[1]
    assert events == [ChannelMessage(1, kind, payload)]
