"""A run of datagrams is taken as the same datagrams one by one would be."""

from __future__ import annotations

from itertools import groupby
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperseaport.testing.network import datagrams
from hyperseaport.transport.transmit import Address
from hyperseaport.transport.udx import packet as wire
from hyperseaport.transport.udx.mux import Mux
from hyperseaport.transport.udx.stream import Stream

HERE: Address = ("127.0.0.1", 1)
THERE: Address = ("127.0.0.1", 2)


def endpoint(streams: int, *, window: int = 1 << 20) -> tuple[Mux, list[Stream]]:
    """A mux with connected streams 1, 2, ... whose peers have the same ids."""
    mux = Mux(Random(1), receive_window=window)
    made = [mux.create(local_id=number) for number in range(1, streams + 1)]
    for number, stream in enumerate(made, 1):
        stream.connect(0, number, THERE, 0.0)
    return mux, made


def sent(mux: Mux, now: float) -> list[bytes]:
    return [datagram for transmit in mux.transmits(now) for datagram in datagrams(transmit)]


def feed_in_runs(mux: Mux, traffic: list[bytes], now: float) -> list[bytes]:
    """As the socket does: what has one size and comes in a row is one run."""
    others = []
    for size, group in groupby(traffic, len):
        run = b"".join(group)
        others += mux.receive_run(memoryview(run), size, 0, THERE, now)
    return others


def feed_singly(mux: Mux, traffic: list[bytes], now: float) -> list[bytes]:
    return [each for each in traffic if not mux.receive(each, 0, THERE, now)]


def mixed(rng: Random, traffic: list[bytes]) -> list[bytes]:
    """Some swapped, some twice, some lost, some of another protocol or damaged."""
    result: list[bytes] = []
    for datagram in traffic:
        fate = rng.random()
        if fate < 0.05:
            continue
        result.append(datagram)
        if fate < 0.10:
            result.append(datagram)
        elif fate < 0.15 and len(result) > 1:
            result[-2], result[-1] = result[-1], result[-2]
        elif fate < 0.18:
            result.append(b"\x03" + datagram[1:])
        elif fate < 0.21:
            result.append(datagram[:2] + bytes((rng.randrange(256),)) + datagram[3:])
        elif fate < 0.24:
            result.append(datagram[:4] + (99).to_bytes(4, "little") + datagram[8:])
    return result


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_data_in_runs_is_data_singly(seed: int, streams: int) -> None:
    rng = Random(seed)
    source, writers = endpoint(streams)
    for _ in range(3):
        for writer in writers:
            writer.write(rng.randbytes(rng.randrange(1, 9_000)), 0.0)
    traffic = mixed(rng, sent(source, 0.0))
    (one, singly), (many, in_runs) = endpoint(streams), endpoint(streams)
    assert feed_in_runs(many, traffic, 0.1) == feed_singly(one, traffic, 0.1)
    for single, run in zip(singly, in_runs, strict=True):
        assert run.readable == single.readable
        assert b"".join(run.read()) == b"".join(single.read())
        assert (run.closed, run.remote_ended, run.has_received) == (
            single.closed,
            single.remote_ended,
            single.has_received,
        )
    assert many.stats.duplicates == one.stats.duplicates
    assert sent(many, 0.2) == sent(one, 0.2)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.integers(0, 2**32))
def test_acks_in_runs_free_what_acks_singly_free(seed: int) -> None:
    rng = Random(seed)
    data = rng.randbytes(12_000)
    (one, (single,)), (many, (run,)) = endpoint(1), endpoint(1)
    for stream in (single, run):
        stream.write(data, 0.0)
    first, second = sent(one, 0.0), sent(many, 0.0)
    assert first == second
    peer, _ = endpoint(1)
    acks = []
    for datagram in mixed(rng, first):
        peer.receive(datagram, 0, HERE, 0.05)
        acks += sent(peer, 0.05)
    acks = mixed(rng, acks)
    assert feed_in_runs(many, acks, 0.1) == feed_singly(one, acks, 0.1)
    assert run.unacked == single.unacked
    assert run.closed == single.closed


def test_the_last_ack_of_a_run_does_for_all() -> None:
    mux, (stream,) = endpoint(1)
    stream.write(bytes(8_000), 0.0)
    count = len(sent(mux, 0.0))
    pack = wire.HEADER.pack
    acks = [pack(255, 1, 0, 0, 1, 50_000, 0, number) for number in range(1, count + 1)]
    mux.receive_run(memoryview(b"".join(acks)), wire.HEADER_BYTES, 0, THERE, 0.1)
    sent(mux, 0.1)
    assert stream.unacked == 0
    assert mux.stats.received == count


@pytest.mark.parametrize("size", [1, 19, 20, 21, 300])
def test_runs_of_another_protocol_come_back_one_by_one(size: int) -> None:
    mux, _ = endpoint(1)
    traffic = [bytes((3,)) * size, bytes((4,)) * size, bytes((5,)) * (size - size // 2)]
    found = mux.receive_run(memoryview(b"".join(traffic)), size, 0, THERE, 0.0)
    assert found == traffic
