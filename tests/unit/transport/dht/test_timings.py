"""Where the time of a connect goes, 40 ms from anywhere to anywhere and back."""

from __future__ import annotations

import pytest
from support.nats import ONE_WAY, Connect, World
from support.relays import Relay

from hyperseaport.transport.dht.timings import How, Timings
from hyperseaport.transport.keys import KeyPair

KEYS = KeyPair.from_seed(bytes([1]) * 32)
KEY = KEYS.public_key
ROUND_TRIP = 2 * ONE_WAY


def timings(connect: Connect) -> Timings:
    """Its parts are all there is."""
    assert connect.connection is not None
    found = connect.connection.timings
    assert found is not None
    assert found.total == pytest.approx(connect.took)
    return found


def close(connect: Connect) -> None:
    assert connect.connection is not None
    connect.connection.stream.destroy(connect.world.network.now)
    connect.world.poke(connect.peer)


@pytest.mark.parametrize(
    ("server", "client", "how", "path"),
    [
        ("open", "consistent", "direct", 0),
        ("consistent", "open", "direct", 0),
        ("consistent", "consistent", "punched", ROUND_TRIP),
    ],
)
def test_a_first_connect(server: str, client: str, how: How, path: float) -> None:
    world = World(3)
    serving = world.peer(server)
    world.listen(serving, KEYS)
    connect = world.connect(world.peer(client), KEY)
    connect.greet(serving)
    found = timings(connect)
    assert found.how == how
    # A relay passes the handshake on: four ways.
    assert found.handshake == pytest.approx(2 * ROUND_TRIP, abs=0.001)
    assert found.path == pytest.approx(path, abs=ONE_WAY * 1.5)
    assert found.lookup < 3 * ROUND_TRIP


def test_where_an_earlier_connection_has_left_a_path() -> None:
    world = World(3)
    serving, client = world.peer("open"), world.peer("consistent")
    world.listen(serving, KEYS)
    first = world.connect(client, KEY)
    first.greet(serving)
    close(first)
    second = world.connect(client, KEY)
    second.greet(serving)
    found = timings(second)
    assert (found.lookup, found.how) == (0.0, "remembered")
    assert found.handshake == pytest.approx(ROUND_TRIP)
    assert found.path == pytest.approx(0.0)


def test_inside_the_same_network() -> None:
    world = World(3)
    serving = world.peer("consistent")
    world.listen(serving, KEYS)
    connect = world.connect(world.peer("consistent", serving.nat), KEY)
    connect.greet(serving)
    assert timings(connect).how == "local"


def test_through_a_blind_relay() -> None:
    world = World(3)
    relay = Relay(world)
    serving, client = world.peer("random"), world.peer("random")
    world.listen(serving, KEYS, relay_through=(relay.key,), allow_relays=frozenset([relay.key]))
    world.wait(2)
    connect = world.connect(client, KEY).wait()
    found = timings(connect)
    assert found.how == "relayed"
    # The client gets to know the relay by the answer: it is connected with, and asked to pair.
    assert found.path == pytest.approx(3 * ROUND_TRIP, abs=ROUND_TRIP)


def test_the_end_that_accepts_has_none() -> None:
    world = World(3)
    serving = world.peer("open")
    world.listen(serving, KEYS)
    end = world.connect(world.peer("consistent"), KEY).greet(serving)
    assert end.timings is None
