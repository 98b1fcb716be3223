"""Streams through everything a network does to datagrams, under fixed seeds.

Bytes are compared as they arrive: equal bytes in equal numbers are equal hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.transfers import (
    ADDRESSES,
    SAFELY_CORRUPTED,
    Half,
    Pair,
    Party,
    assert_bounded,
    assert_delivered,
)

from hyperseaport.testing.network import Bursts, Link, Network
from hyperseaport.transport.dht.context import Connection
from hyperseaport.transport.dht.hyperdht import HyperDHT, HyperDHTConfig
from hyperseaport.transport.dht.node import NodeConfig
from hyperseaport.transport.keys import KeyPair
from hyperseaport.transport.secret_stream import SecretStream
from hyperseaport.transport.transmit import CLIENT_SOCKET, SERVER_SOCKET, Address

MIB = 1024 * 1024
DATA = Random(1).randbytes(MIB), Random(2).randbytes(MIB)

FAULTS = {
    "loss": Link(delay=0.01, loss=0.1),
    "reorder": Link(delay=0.01, reorder=0.3),
    "duplicate": Link(delay=0.01, duplicate=0.3),
    # A burst lasts for five packets, also at the end, when few are sent.
    "bursts": Link(delay=0.01, bursts=Bursts(begin=0.01, end=0.2)),
    "corruption": Link(delay=0.01, corrupt=0.01, corrupt_at=SAFELY_CORRUPTED),
    "blackhole": Link(delay=0.01, blackholes=((0.1, 5.1),)),
    "queue": Link(delay=0.01, bandwidth=1e6, queue=30_000),
    "everything": Link(
        delay=0.01,
        jitter=0.002,
        loss=0.02,
        duplicate=0.05,
        bursts=Bursts(begin=0.002, end=0.3),
        reorder=0.1,
        corrupt=0.01,
        corrupt_at=SAFELY_CORRUPTED,
        blackholes=((0.1, 1.1),),
        bandwidth=5e6,
        queue=100_000,
    ),
}
#: What must have happened, or the test has shown nothing.
COUNTS = {
    "loss": "lost",
    "reorder": "reordered",
    "duplicate": "duplicated",
    "bursts": "lost",
    "corruption": "corrupted",
    "blackhole": "blackholed",
    "queue": "overflowed",
    "everything": "blackholed",
}


@pytest.mark.parametrize("secret", [False, True], ids=["plain", "secret"])
@pytest.mark.parametrize("fault", FAULTS)
def test_both_directions_arrive(fault: str, secret: bool) -> None:
    pair = Pair(FAULTS[fault])
    there = pair.network.path(*pair.hosts)
    halves = pair.stream(*DATA, secret=secret)
    assert pair.run(300.0)
    assert_delivered(*halves)
    assert getattr(there.stats, COUNTS[fault]) > 0


def test_an_mtu_that_shrinks_in_mid_transfer() -> None:
    """While the search for the largest packet goes on: what is too large are probes."""
    link = Link(delay=0.01)
    pair = Pair(link)
    there = pair.network.path(*pair.hosts)
    halves = pair.stream(DATA[0] * 4, DATA[1])
    assert pair.network.run(until=10.0, done=lambda: halves[0].stream._sender.mtu.mtu > 1200)
    link.mtu = 1300
    assert pair.run(120.0)
    assert_delivered(*halves)
    assert there.stats.too_large > 0


@pytest.mark.parametrize("loss", [0.0, 0.02])
@pytest.mark.parametrize("mtu", [1228, 1300])
@pytest.mark.parametrize("largest", [1328, 1424])
def test_an_mtu_that_shrinks_below_what_is_in_flight(largest: int, mtu: int, loss: float) -> None:
    """A packet has one number and cannot be cut in two: what is too large arrives in fragments,
    and what follows is small enough again."""
    link = Link(delay=0.01, loss=loss)
    pair = Pair(link)
    there = pair.network.path(*pair.hosts)
    halves = pair.stream(DATA[0] * 4, DATA[1] * 4)
    senders = [half.stream._sender for half in halves]
    assert pair.network.run(until=10.0, done=lambda: senders[0].mtu.mtu >= largest)
    link.mtu = mtu
    assert pair.run(60.0)
    assert_delivered(*halves)
    assert there.stats.too_large > 0
    assert there.stats.fragmented > 0
    assert all(sender.mtu.mtu <= mtu for sender in senders)


@pytest.mark.parametrize("seed", range(12))
def test_an_mtu_that_changes_at_any_time(seed: int) -> None:
    rng = Random(seed)
    link = Link(delay=rng.choice([0.001, 0.01, 0.05]), loss=rng.choice([0.0, 0.02]))
    pair = Pair(link, seed)
    for when in (0.01, 0.1, 0.3, 1.0):
        mtu = rng.choice([1228, 1300, 1400, 1500])
        pair.network.at(when + rng.random(), partial(setattr, link, "mtu", mtu))
    halves = pair.stream(DATA[0], DATA[1][: rng.choice([0, MIB])])
    assert pair.run(120.0)
    assert_delivered(*halves)


@pytest.mark.parametrize("seed", range(40))
def test_a_burst_does_not_swallow_all_repetitions_of_an_end(seed: int) -> None:
    pair = Pair(Link(delay=0.01, bursts=Bursts(begin=0.05, end=0.15)), seed)
    halves = pair.stream(DATA[0][:30_000], DATA[1][:30_000])
    assert pair.run(120.0)
    assert_delivered(*halves)


def test_faults_of_one_direction_alone() -> None:
    """A path may be bad for ACKs only."""
    pair = Pair(Link(delay=0.01))
    back = pair.network.path(pair.hosts[1], pair.hosts[0], Link(delay=0.05, loss=0.3))
    halves = pair.stream(DATA[0], b"")
    assert pair.run(60.0)
    assert_delivered(*halves)
    assert back.stats.lost > 0


@pytest.mark.parametrize("seed", range(8))
def test_damaged_bytes_never_reach_the_application(seed: int) -> None:
    """Flipped bits anywhere, also where they end, reset or acknowledge: the secret stream lets
    nothing pass that was not sent. Whether all arrives or an error comes, nobody can promise."""
    pair = Pair(Link(delay=0.01, corrupt=0.01), seed)
    a, b = pair.hosts
    there, back = pair.network.path(a, b), pair.network.path(b, a)
    halves = pair.stream(*DATA, secret=True)
    pair.run(60.0)
    assert there.stats.corrupted + back.stats.corrupted > 0
    for half in halves:
        assert not half.wrong
    assert_bounded(*halves)
    assert not all(half.complete for half in halves), "one in a hundred packets is damaged"


SHARES = st.sampled_from([0.0, 0.01, 0.05, 0.2])


@st.composite
def links(draw: st.DrawFn) -> Link:
    start = draw(st.sampled_from([0.0, 0.05, 0.3, 2.0]))
    gap = draw(st.sampled_from([0.0, 0.5, 5.0, 30.0]))
    return Link(
        delay=draw(st.sampled_from([0.0, 0.001, 0.02, 0.2])),
        jitter=draw(st.sampled_from([0.0, 0.001, 0.05])),
        loss=draw(SHARES),
        duplicate=draw(SHARES),
        bursts=draw(st.none() | st.builds(Bursts, begin=SHARES, end=st.just(0.2))),
        reorder=draw(st.sampled_from([0.0, 0.1, 0.5])),
        corrupt=draw(SHARES),
        corrupt_at=SAFELY_CORRUPTED,
        blackholes=((start, start + gap),),
        bandwidth=draw(st.none() | st.sampled_from([50_000.0, 1e6, 1e7])),
        queue=draw(st.sampled_from([5_000, 60_000])),
    )


@settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    seed=st.integers(0, 2**32),
    link=links(),
    sizes=st.tuples(st.integers(0, 120_000), st.integers(0, 120_000)),
    shrinks=st.none() | st.tuples(st.sampled_from([0.01, 0.1, 1.0]), st.sampled_from([1228, 1300])),
    secret=st.booleans(),
)
def test_a_prefix_and_then_an_error_or_all_of_it(
    seed: int,
    link: Link,
    sizes: tuple[int, int],
    shrinks: tuple[float, int] | None,
    secret: bool,
) -> None:
    pair = Pair(link, seed)
    if shrinks is not None:
        when, mtu = shrinks
        pair.network.at(when, lambda: setattr(link, "mtu", mtu))
    halves = pair.stream(DATA[0][: sizes[0]], DATA[1][: sizes[1]], secret=secret)
    # A stream gives up 13 RTOs after the last progress, of up to 30 s each where ACKs were as late;
    # and where nearly all is lost, there is a little progress now and then.
    pair.run(3600.0)
    for half, peer in (halves, halves[::-1]):
        assert not half.wrong, "exactly a prefix"
        if half.stream.remote_ended or peer.stream.ended:
            assert half.complete, "an end is never early"
    if not all(half.complete and half.stream.closed for half in halves):
        assert any(half.error is not None for half in halves)
    assert_bounded(*halves)


def test_secret_streams_between_whole_nodes() -> None:
    """Announced, found, connected and used with faults from the first datagram on."""
    link = Link(delay=0.005, jitter=0.003, loss=0.05, duplicate=0.05, reorder=0.1)
    network = Network(Random(3), link)
    bootstrap: tuple[Address, ...] = ()
    for number in range(4):
        here = f"10.1.0.{number + 1}"
        attached(network, here, NodeConfig(bootstrap=bootstrap, public_address=(here, 1)))
        bootstrap = bootstrap or ((here, 1),)
    config = NodeConfig(bootstrap=bootstrap, ephemeral=True)
    parties = [attached(network, host, config) for host in ("10.2.0.1", "10.2.0.2")]
    keys = KeyPair.from_seed(bytes([1]) * 32)
    halves: list[Half] = []

    def connected(side: int) -> Callable[[Connection, float], None]:
        def on_connection(connection: Connection, now: float) -> None:
            cipher = SecretStream(connection.handshake, Random(side))
            half = Half(connection.stream, DATA[side], DATA[1 - side], cipher)
            half.start(now)
            parties[side].halves.append(half)
            halves.append(half)

        return on_connection

    listening: list[float] = []
    failed: list[Exception] = []
    server, client = parties[0].core, parties[1].core
    assert isinstance(server, HyperDHT)
    assert isinstance(client, HyperDHT)
    server.listen(
        keys,
        network.now,
        on_connection=connected(0),
        on_listening=listening.append,
    )
    assert network.run(until=network.now + 60.0, done=lambda: bool(listening))
    client.connect(
        keys.public_key,
        network.now,
        on_open=connected(1),
        on_error=lambda error, _now: failed.append(error),
    )
    until = network.now + 120.0
    assert network.run(
        until=until,
        done=lambda: len(halves) == 2 and all(half.stream.closed for half in halves),
    ), failed
    assert_delivered(*halves)
    assert hashlib.sha256(DATA[0]).digest() != hashlib.sha256(DATA[1]).digest()


def attached(network: Network, host: str, config: NodeConfig) -> Party:
    """A DHT node that is ready."""
    dht = HyperDHT(HyperDHTConfig(node=config, local_hosts=(host,)), Random(host))
    dht.start(network.now, server_port=1, client_port=2)
    party = Party(dht)
    network.attach(party, {SERVER_SOCKET: (host, 1), CLIENT_SOCKET: (host, 2)})
    assert network.run(until=network.now + 60.0, done=lambda: dht.node.ready)
    return party


def test_a_partition_that_heals() -> None:
    pair = Pair(Link(delay=0.01))
    halves = pair.stream(*DATA)
    pair.network.run(until=0.1)
    pair.network.partition(pair.hosts[:1], pair.hosts[1:])
    pair.network.run(until=4.0)
    assert not halves[1].complete
    pair.network.heal()
    assert pair.run(60.0)
    assert_delivered(*halves)
    assert pair.network.lost > 0
    assert {half.stream.address for half in halves} == set(ADDRESSES)
