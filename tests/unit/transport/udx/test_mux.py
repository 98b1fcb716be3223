from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import load

from hyperseaport.testing.network import datagrams
from hyperseaport.transport.errors import InvalidInput
from hyperseaport.transport.udx import packet as wire
from hyperseaport.transport.udx.mux import Mux
from hyperseaport.transport.udx.packet import Packet, encode
from hyperseaport.transport.udx.stream import Stream
from hyperseaport.transport.udx.time_wait import MAX_TIME_WAIT, TIME_WAIT

PEER = ("10.0.0.2", 1234)
CAPTURED = [
    bytes.fromhex(each["hex"])
    for scenario in load("udx")["scenarios"]
    for each in scenario["packets"]
]


def said(mux: Mux, now: float = 0.0) -> list[bytes]:
    return [each for transmit in mux.transmits(now) for each in datagrams(transmit)]


def connected(mux: Mux, local_id: int) -> Stream:
    stream = mux.create(local_id=local_id)
    stream.connect(0, local_id + 1, PEER, 0.0)
    return stream


def test_other_traffic_is_not_taken() -> None:
    mux = Mux(Random(1))
    connected(mux, 7)
    data = encode(Packet(wire.DATA, 7, 0, 0, 0, b"x"))
    for other in (b"", b"\x03abc", data[:19], b"\xff\x02" + data[2:], CAPTURED[0]):
        assert not mux.receive(other, 0, PEER, 0.0)
    assert mux.receive(data, 0, PEER, 0.0)
    assert mux.stats.unknown == 1


def test_ids_are_random_and_unused() -> None:
    class Repeating(Random):
        numbers = iter([5, 5, 6])

        def getrandbits(self, k: int) -> int:
            assert k == 32
            return next(self.numbers)

    mux = Mux(Repeating())
    assert [mux.create().local_id, mux.create().local_id] == [5, 6]
    assert len(mux) == 2


@pytest.mark.parametrize("wrong", [-1, 2**32, 7])
def test_ids_that_cannot_be(wrong: int) -> None:
    mux = Mux(Random(1))
    mux.create(local_id=7)
    with pytest.raises(InvalidInput):
        mux.create(local_id=wrong)


def test_a_closed_id_can_be_used_again() -> None:
    mux = Mux(Random(1))
    connected(mux, 7).destroy(0.0)
    again = connected(mux, 7)
    mux.receive(encode(Packet(wire.DATA, 7, 0, 0, 0, b"x")), 0, PEER, 0.0)
    assert again.readable == 1


def test_streams_are_told_apart() -> None:
    mux = Mux(Random(1))
    streams = [connected(mux, 10 * n) for n in range(3)]
    mux.receive(encode(Packet(wire.DATA, 20, 0, 0, 0, b"x")), 0, PEER, 0.0)
    assert mux.poll() == [streams[2]]
    assert mux.poll() == []
    (ack,) = said(mux)
    assert wire.decode(ack).id == 21


@pytest.mark.parametrize("wants_room", [True, False])
def test_who_does_not_want_room_hears_of_what_arrives_alone(wants_room: bool) -> None:
    mux = Mux(Random(1))
    stream = connected(mux, 7)
    stream.wants_room = wants_room
    stream.write(b"question", 0.0)
    said(mux)
    assert mux.poll() == [stream] * wants_room
    mux.receive(encode(Packet(wire.ACK, 7, 9999, 0, 1)), 0, PEER, 0.1)
    said(mux, 0.1)
    assert stream.unacked == 0
    assert mux.poll() == [stream] * wants_room
    mux.receive(encode(Packet(wire.DATA, 7, 9999, 0, 1, b"answer")), 0, PEER, 0.1)
    assert mux.poll() == [stream]


def test_what_data_acknowledges_is_applied_when_it_has_been_delivered() -> None:
    mux = Mux(Random(1))
    stream = connected(mux, 7)
    stream.write(b"question", 0.0)
    said(mux)
    mux.receive(encode(Packet(wire.DATA, 7, 9999, 0, 1, b"answer")), 0, PEER, 0.1)
    assert b"".join(stream.read()) == b"answer"
    assert stream.unacked > 0
    said(mux, 0.1)
    assert stream.unacked == 0


def test_idle_streams_have_no_deadlines_and_nothing_to_do() -> None:
    mux = Mux(Random(1))
    for number in range(1000):
        connected(mux, number)
    assert said(mux) == []
    assert mux.deadline() is None
    assert mux._dirty == []


def test_an_outdated_deadline_is_put_right() -> None:
    mux = Mux(Random(1))
    stream = connected(mux, 7)
    stream.write(b"x", 0.0)
    said(mux)
    assert mux.deadline() == 1.0
    mux.receive(encode(Packet(wire.ACK, 7, 9999, 0, 1)), 0, PEER, 0.5)
    stream.write(b"y", 0.5)
    said(mux, 0.5)
    mux.on_deadline(1.0)
    assert said(mux, 1.0) == []
    due = mux.deadline()
    assert due is not None
    assert due > 1.0


def test_closed_streams_do_not_stay_in_the_heap() -> None:
    mux = Mux(Random(1))
    for number in range(2000):
        stream = connected(mux, number)
        stream.keep_alive = 3600.0
        said(mux)
        stream.destroy(0.0)
        said(mux)
        assert len(mux._deadlines) <= 2
    assert len(mux) == 0


def test_closed_ids_are_forgotten_after_a_while_and_limited_until_then() -> None:
    mux = Mux(Random(1))
    for number in range(MAX_TIME_WAIT + 10):
        connected(mux, number).destroy(0.0)
    said(mux)
    assert len(mux._over) == MAX_TIME_WAIT
    while (when := mux.deadline()) is not None:
        mux.on_deadline(when)
        assert when <= 2 * TIME_WAIT + 1
    assert len(mux._over) == 0


def fresh() -> tuple[Mux, list[Stream]]:
    """Two streams in the middle of things, one of them not connected."""
    mux = Mux(Random(1))
    busy = connected(mux, 7)
    busy.write(bytes(30_000), 0.0)
    waiting = mux.create(local_id=8)
    waiting.firewall = lambda *_: True
    mux.transmits(0.0)
    return mux, [busy, waiting]


def held(stream: Stream) -> int:
    receiver = stream._receiver
    return receiver.readable + sum(len(each) for each in receiver._packets.values())


def settle(mux: Mux, streams: list[Stream]) -> None:
    """Whatever came in: everything else goes on working, within its limits."""
    mux.poll()
    for transmit in mux.transmits(0.1):
        assert all(len(each) <= 1472 for each in datagrams(transmit))
    for _ in range(30):
        if (when := mux.deadline()) is None:
            break
        mux.on_deadline(when)
        mux.transmits(when)
    assert all(held(stream) <= 262144 + 2048 for stream in streams)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.binary(max_size=300), max_size=10), st.booleans())
def test_arbitrary_bytes_do_no_harm(noise: list[bytes], aimed: bool) -> None:
    mux, streams = fresh()
    for each in noise:
        local_id = bytes([7 + len(each) % 2, 0, 0, 0])
        datagram = b"\xff\x01" + each[:2].ljust(2, b"\0") + local_id + each[2:] if aimed else each
        mux.receive(datagram, 0, PEER, 0.1)
    settle(mux, streams)


NEAR = st.one_of(st.integers(-3, 700), st.integers(0, 2**32 - 1)).map(lambda n: n % 2**32)
PACKETS = st.builds(
    Packet,
    type=st.one_of(
        st.sampled_from([wire.ACK, wire.SACK, wire.DATA, wire.DATA | wire.END]),
        st.integers(0, 255),
    ),
    id=st.sampled_from([7, 8]),
    window=st.integers(0, 2**32 - 1),
    seq=NEAR,
    ack=NEAR,
    payload=st.integers(0, 1500).map(bytes),
    sacks=st.lists(st.tuples(NEAR, NEAR), max_size=5).map(tuple),
    padding=st.just(0),
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(PACKETS, max_size=40))
def test_senseless_packets_do_no_harm(packets: list[Packet]) -> None:
    mux, streams = fresh()
    for each in packets:
        mux.receive(encode(each), 0, PEER, 0.1)
        mux.transmits(0.1)
    settle(mux, streams)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(CAPTURED), st.integers(2, 60), st.binary(max_size=8))),
    st.integers(0, 1),
)
def test_mutated_packets_do_no_harm(mutations: list[tuple[bytes, int, bytes]], which: int) -> None:
    mux, streams = fresh()
    for datagram, at, bytes_ in mutations:
        aimed = datagram[:4] + bytes([7 + which, 0, 0, 0]) + datagram[8:]
        mux.receive(aimed[:at] + bytes_ + aimed[at + len(bytes_) :], 0, PEER, 0.1)
    settle(mux, streams)
