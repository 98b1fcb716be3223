"""A private network on the virtual clock: servers, clients, relays that die and come back."""

from __future__ import annotations

import functools
from random import Random

import pytest

from hyperseaport.testing.network import Host, Link, Network
from hyperseaport.transport.dht.hyperdht import Connection, HyperDHT, HyperDHTConfig, Server
from hyperseaport.transport.dht.messages import MutableValue
from hyperseaport.transport.dht.node import NodeConfig
from hyperseaport.transport.dht.records import Found, Stored
from hyperseaport.transport.errors import (
    ConnectError,
    InvalidInput,
    PeerNotFound,
    PeerUnreachable,
)
from hyperseaport.transport.keys import KeyPair, blake2b, target
from hyperseaport.transport.transmit import CLIENT_SOCKET, SERVER_SOCKET, Address

LOOPBACK = "127.0.0.1"
#: Seconds in which a client knows that a server is dead.
KNOWN_SOON = 4.0
SERVER_KEYS = KeyPair.from_seed(bytes([1]) * 32)
CLIENT_KEYS = KeyPair.from_seed(bytes([2]) * 32)


class World:
    """A network with four DHT nodes."""

    def __init__(self, seed: int = 1, link: Link | None = None) -> None:
        self.network = Network(Random(seed), link or Link())
        self.seed = seed
        self.ports = iter(range(40001, 65536))
        self.hosts: dict[HyperDHT, Host] = {}
        self.bootstrap: tuple[Address, ...] = ()
        self.relays = [self.relay() for _ in range(4)]

    def relay(self, port: int | None = None) -> HyperDHT:
        """A persistent node; the first is everybody's bootstrap node."""
        port = next(self.ports) if port is None else port
        bootstrap = tuple(address for address in self.bootstrap if address[1] != port)
        config = NodeConfig(bootstrap=bootstrap, public_address=(LOOPBACK, port))
        dht = self.start(config, port)
        if not self.bootstrap:
            self.bootstrap = ((LOOPBACK, port),)
        return dht

    def peer(self, *, is_open: bool = False, key_pair: KeyPair | None = None) -> HyperDHT:
        """An ephemeral node, firewalled in its own eyes or known not to be."""
        config = NodeConfig(
            bootstrap=self.bootstrap, ephemeral=True, firewalled=not is_open, quick_check=False
        )
        return self.start(config, next(self.ports), key_pair)

    def start(self, config: NodeConfig, port: int, key_pair: KeyPair | None = None) -> HyperDHT:
        self.seed += 1
        dht = HyperDHT(
            HyperDHTConfig(node=config, key_pair=key_pair, local_hosts=(LOOPBACK,)),
            Random(self.seed),
        )
        client_port = next(self.ports)
        sockets = {SERVER_SOCKET: (LOOPBACK, port), CLIENT_SOCKET: (LOOPBACK, client_port)}
        dht.start(self.network.now, server_port=port, client_port=client_port)
        self.hosts[dht] = self.network.attach(dht, sockets)
        assert self.run(lambda: dht.node.ready, 10)
        return dht

    def kill(self, dht: HyperDHT) -> None:
        self.network.detach(self.hosts.pop(dht))

    def poke(self, dht: HyperDHT) -> None:
        self.network.poke(self.hosts[dht])

    def run(self, done: object, seconds: float) -> bool:
        assert callable(done)
        return self.network.run(until=self.network.now + seconds, done=done)

    def wait(self, seconds: float) -> None:
        self.network.run(until=self.network.now + seconds)


class Listening:
    """A server and what it got."""

    def __init__(
        self, world: World, dht: HyperDHT, key_pair: KeyPair = SERVER_KEYS, **options: object
    ) -> None:
        self.world = world
        self.dht = dht
        self.connections: list[Connection] = []
        self.listening = False
        self.server: Server = dht.listen(
            key_pair,
            world.network.now,
            on_connection=lambda connection, _now: self.connections.append(connection),
            on_listening=self.on_listening,
            **options,  # type: ignore[arg-type]
        )
        world.poke(dht)
        assert world.run(lambda: self.listening, 20)

    def on_listening(self, _now: float) -> None:
        self.listening = True


class Connecting:
    """A connect and what became of it."""

    def __init__(self, world: World, dht: HyperDHT, public_key: bytes, **options: object) -> None:
        self.world = world
        self.connection: Connection | None = None
        self.error: Exception | None = None
        self.started = world.network.now
        self.ended = 0.0
        self.attempt = dht.connect(
            public_key,
            self.started,
            on_open=self.on_open,
            on_error=self.on_error,
            **options,  # type: ignore[arg-type]
        )
        world.poke(dht)

    def on_open(self, connection: Connection, now: float) -> None:
        assert self.connection is None
        assert self.error is None
        self.connection = connection
        self.ended = now

    def on_error(self, error: Exception, now: float) -> None:
        assert self.connection is None
        assert self.error is None
        self.error = error
        self.ended = now

    def wait(self, seconds: float = 60) -> Connecting:
        assert self.world.run(lambda: bool(self.connection or self.error), seconds)
        return self

    def open(self) -> Connection:
        self.wait()
        if self.error is not None:
            raise self.error
        assert self.connection is not None
        return self.connection


def greet(
    world: World, client: HyperDHT, connection: Connection, listening: Listening
) -> Connection:
    """The client speaks first; returns the server's end."""

    def accepted() -> Connection | None:
        hash_ = connection.handshake.hash
        return next((c for c in listening.connections if c.handshake.hash == hash_), None)

    connection.stream.write(b"hello", world.network.now)
    world.poke(client)
    assert world.run(lambda: (end := accepted()) is not None and end.stream.readable == 5, 5)
    end = accepted()
    assert end is not None
    assert b"".join(bytes(piece) for piece in end.stream.read()) == b"hello"
    return end


def talk(world: World, a: tuple[HyperDHT, Connection], b: tuple[HyperDHT, Connection]) -> None:
    """Bytes both ways, more than one packet."""
    got: dict[int, bytes] = {0: b"", 1: b""}
    sent = [Random(3).randbytes(5000), Random(4).randbytes(7000)]
    ends = [a, b]
    for (dht, connection), data in zip(ends, sent, strict=True):
        connection.stream.write(data, world.network.now)
        world.poke(dht)

    def arrived() -> bool:
        for index, (_, connection) in enumerate(ends):
            got[index] += b"".join(bytes(piece) for piece in connection.stream.read())
        return got == {0: sent[1], 1: sent[0]}

    assert world.run(arrived, 30)
    assert a[1].handshake.hash == b[1].handshake.hash
    assert (a[1].handshake.tx, a[1].handshake.rx) == (b[1].handshake.rx, b[1].handshake.tx)


@pytest.mark.parametrize("server_open", [True, False])
@pytest.mark.parametrize("client_open", [True, False])
def test_connect(server_open: bool, client_open: bool) -> None:
    world = World()
    listening = Listening(world, world.peer(is_open=server_open))
    assert len(listening.server.relays) == 3
    client = world.peer(is_open=client_open, key_pair=CLIENT_KEYS)
    connecting = Connecting(world, client, SERVER_KEYS.public_key)
    connection = connecting.open()
    assert connecting.ended - connecting.started < 0.1
    accepted = greet(world, client, connection, listening)
    assert accepted.handshake.remote_public_key == CLIENT_KEYS.public_key
    assert connection.handshake.remote_public_key == SERVER_KEYS.public_key
    talk(world, (client, connection), (listening.dht, accepted))
    world.wait(15)
    assert len(listening.connections) == 1
    assert listening.server.stats.accepted == 1
    assert listening.server.stats.abandoned == 0


def test_bytes_may_come_before_the_handshake_answer() -> None:
    """Checklist 61: both open, the server speaks at once and the answer takes the longer way."""
    world = World()
    server, client = world.peer(is_open=True), world.peer(is_open=True)
    greeting = b"from the server"

    def accept(connection: Connection, now: float) -> None:
        connection.stream.write(greeting, now)

    server.listen(SERVER_KEYS, world.network.now, on_connection=accept)
    world.poke(server)
    world.wait(1)
    connection = Connecting(world, client, SERVER_KEYS.public_key).open()
    assert connection.stream.has_received
    assert connection.stream.readable == len(greeting)


def test_an_open_client_is_connected_by_a_firewalled_server() -> None:
    world = World()
    listening = Listening(world, world.peer())
    client = world.peer(is_open=True)
    assert client.node.remote_address() is not None
    Connecting(world, client, SERVER_KEYS.public_key).open()
    assert len(listening.connections) == 1
    assert listening.connections[0].remote_address == client.node.remote_address()


def test_a_key_that_nobody_announces() -> None:
    world = World()
    failed = Connecting(world, world.peer(), SERVER_KEYS.public_key).wait()
    assert isinstance(failed.error, PeerNotFound)
    assert failed.ended - failed.started < 1


def test_a_key_that_is_no_point_is_refused_at_once() -> None:
    world = World()
    client = world.peer()
    with pytest.raises(InvalidInput):
        Connecting(world, client, bytes([2]) + bytes(31))
    with pytest.raises(InvalidInput):
        Connecting(world, client, b"short")
    assert len(client.mux) == 0
    Connecting(world, client, SERVER_KEYS.public_key).wait()


def test_a_network_that_died() -> None:
    world = World()
    client = world.peer()
    for relay in world.relays:
        world.kill(relay)
    failed = Connecting(world, client, SERVER_KEYS.public_key).wait()
    assert isinstance(failed.error, PeerNotFound)
    assert failed.ended - failed.started < 10


@pytest.mark.parametrize("is_open", [True, False])
def test_a_server_that_died(is_open: bool) -> None:
    world = World()
    listening = Listening(world, world.peer(is_open=is_open))
    client = world.peer()
    Connecting(world, client, SERVER_KEYS.public_key).open()
    world.kill(listening.dht)
    for dht in (client, world.peer()):
        failed = Connecting(world, dht, SERVER_KEYS.public_key).wait()
        assert isinstance(failed.error, PeerUnreachable)
        assert "does not answer" in str(failed.error)
        assert failed.ended - failed.started < KNOWN_SOON
        assert len(dht.mux) == (1 if dht is client else 0)


def test_a_server_that_came_back_elsewhere() -> None:
    """Neither the remembered route nor the remembered relays cost more than a moment."""
    world = World()
    listening = Listening(world, world.peer())
    client = world.peer()
    Connecting(world, client, SERVER_KEYS.public_key).open()
    world.kill(listening.dht)
    for relay in world.relays[1:]:
        world.kill(relay)
    for _ in range(4):
        world.relay()
    again = Listening(world, world.peer())
    connecting = Connecting(world, client, SERVER_KEYS.public_key)
    greet(world, client, connecting.open(), again)
    assert connecting.ended - connecting.started < 1


def test_a_server_that_closes_unannounces() -> None:
    world = World()
    listening = Listening(world, world.peer())
    closed: list[float] = []
    listening.server.close(world.network.now, closed.append)
    world.poke(listening.dht)
    assert world.run(lambda: bool(closed), 5)
    failed = Connecting(world, world.peer(), SERVER_KEYS.public_key).wait()
    assert isinstance(failed.error, PeerNotFound)
    Listening(world, listening.dht)


def test_closing_the_node_closes_everything() -> None:
    world = World()
    listening = Listening(world, world.peer())
    connecting = Connecting(world, listening.dht, CLIENT_KEYS.public_key)
    closed: list[float] = []
    listening.dht.close(world.network.now, closed.append)
    world.poke(listening.dht)
    assert connecting.attempt.done
    assert world.run(lambda: bool(closed), 5)
    assert connecting.error is None
    assert isinstance(
        Connecting(world, world.peer(), SERVER_KEYS.public_key).wait().error, PeerNotFound
    )


@pytest.mark.parametrize("is_open", [True, False])
def test_a_rejected_client_is_told_so_at_once(is_open: bool) -> None:
    world = World()
    seen: list[tuple[bytes, Address]] = []

    def reject(public_key: bytes, address: Address) -> bool:
        seen.append((public_key, address))
        return True

    listening = Listening(world, world.peer(is_open=is_open), firewall=reject)
    client = world.peer(key_pair=CLIENT_KEYS)
    failed = Connecting(world, client, SERVER_KEYS.public_key).wait()
    assert isinstance(failed.error, ConnectError)
    assert "refuses this key" in str(failed.error)
    assert failed.ended - failed.started < 1
    assert [key for key, _ in seen] == [CLIENT_KEYS.public_key]
    assert seen[0][1][0] == LOOPBACK
    assert listening.server.stats.rejected == 1
    assert len(listening.dht.mux) == 0


@pytest.mark.parametrize("silence", [9.0, 0.0])
def test_relays_that_restart_are_told_again(silence: float) -> None:
    """With silence the pings fail, without it the relays are found not to know the server."""
    world = World()
    listening = Listening(world, world.peer())
    client = world.peer()
    ports = [relay.node.server_port for relay in world.relays]
    for relay in world.relays:
        world.kill(relay)
    world.wait(1)
    for port in ports:
        config = NodeConfig(
            bootstrap=tuple(a for a in world.bootstrap if a[1] != port),
            public_address=(LOOPBACK, port),
            ignore_idless_pings=silence,
        )
        world.start(config, port)
    world.wait(20)
    connecting = Connecting(world, client, SERVER_KEYS.public_key)
    connecting.open()
    assert connecting.ended - connecting.started < 1
    assert len(listening.server.relays) == 3


def test_the_second_connect_needs_no_relay() -> None:
    world = World()
    listening = Listening(world, world.peer())
    client = world.peer()
    greet(world, client, Connecting(world, client, SERVER_KEYS.public_key).open(), listening)
    ports = {address[1] for address in world.hosts[listening.dht].sockets.values()}
    ports |= {address[1] for address in world.hosts[client].sockets.values()}
    others: list[Address] = []

    def watch(_datagram: bytes, source: Address, destination: Address) -> bool:
        if not {source[1], destination[1]} <= ports:
            others.append(destination)
        return False

    world.network.link.drop = watch
    second = Connecting(world, client, SERVER_KEYS.public_key)
    connection = second.open()
    assert second.ended - second.started < 0.01
    assert not others
    world.wait(0.01)
    talk(world, (client, connection), (listening.dht, listening.connections[1]))


def test_many_connects_at_once_through_loss() -> None:
    world = World(seed=7, link=Link(loss=0.05, jitter=0.002, duplicate=0.01))
    listening = Listening(world, world.peer())
    client = world.peer()
    connects = [Connecting(world, client, SERVER_KEYS.public_key) for _ in range(20)]
    connections = [connecting.open() for connecting in connects]
    for index, connection in enumerate(connections):
        connection.stream.write(bytes([index]), world.network.now)
    world.poke(client)
    said: dict[bytes, bytes] = {}

    def all_said() -> bool:
        for each in listening.connections:
            if each.stream.readable:
                said[each.handshake.hash] = bytes(each.stream.read()[0])
        return len(said) == 20

    assert world.run(all_said, 30)
    expected = {each.handshake.hash: bytes([i]) for i, each in enumerate(connections)}
    assert said == expected
    assert max(each.ended - each.started for each in connects) < 5
    world.wait(15)
    assert len(client.mux) == len(listening.dht.mux) == 20


def test_a_cancelled_connect_is_silent() -> None:
    world = World()
    Listening(world, world.peer())
    client = world.peer()
    connecting = Connecting(world, client, SERVER_KEYS.public_key)
    world.wait(0.002)
    connecting.attempt.cancel(world.network.now)
    connecting.attempt.cancel(world.network.now)
    world.wait(30)
    assert connecting.connection is None
    assert connecting.error is None
    assert len(client.mux) == 0


def test_the_same_seed_gives_the_same_trace() -> None:
    def trace() -> list[bytes]:
        seen: list[bytes] = []
        world = World(seed=5, link=Link(loss=0.05))

        def watch(datagram: bytes, _source: Address, _destination: Address) -> bool:
            seen.append(datagram)
            return False

        world.network.link.drop = watch
        Listening(world, world.peer())
        Connecting(world, world.peer(), SERVER_KEYS.public_key).open()
        return seen

    assert trace() == trace()


def test_a_server_that_listens_before_the_node_is_ready() -> None:
    world = World()
    dht = HyperDHT(HyperDHTConfig(NodeConfig(bootstrap=world.bootstrap)), Random(9))
    port = next(world.ports)
    sockets = {SERVER_SOCKET: (LOOPBACK, port), CLIENT_SOCKET: (LOOPBACK, next(world.ports))}
    dht.start(world.network.now, server_port=port, client_port=sockets[CLIENT_SOCKET][1])
    world.hosts[dht] = world.network.attach(dht, sockets)
    ready: list[float] = []
    dht.on_ready.append(ready.append)
    assert not dht.node.ready
    Listening(world, dht)
    assert len(ready) == 1
    Connecting(world, world.peer(), SERVER_KEYS.public_key).open()


def test_a_server_without_a_network_is_announced_when_there_is_one() -> None:
    world = World()
    dht = world.peer()
    ports = [relay.node.server_port for relay in world.relays]
    for relay in world.relays:
        world.kill(relay)
    listening: list[float] = []
    dht.listen(
        SERVER_KEYS,
        world.network.now,
        on_connection=lambda _connection, _now: None,
        on_listening=listening.append,
    )
    world.poke(dht)
    world.wait(60)
    assert not listening
    for port in ports:
        world.relay(port)
    assert world.run(lambda: bool(listening), 30)


def test_records() -> None:
    world = World()
    publisher, reader = world.peer(), world.peer()
    topic = bytes([7]) * 32
    stored: list[Stored] = []
    now = world.network.now
    publisher.records.announce(
        topic,
        SERVER_KEYS,
        now,
        lambda result, _now: stored.append(result),
        relay_addresses=((LOOPBACK, 1), (LOOPBACK, 2)),
    )
    publisher.records.announce(topic, CLIENT_KEYS, now, lambda result, _now: stored.append(result))
    world.poke(publisher)
    assert world.run(lambda: len(stored) == 2, 10)
    assert stored == [Stored(4), Stored(4)]

    found: list[Found] = []

    def lookup() -> dict[bytes, tuple[Address, ...]]:
        found.clear()
        reader.records.lookup(topic, world.network.now, lambda result, _now: found.append(result))
        world.poke(reader)
        assert world.run(lambda: bool(found), 10)
        return {peer.public_key: peer.relay_addresses for peer in found[0].peers}

    assert lookup() == {
        SERVER_KEYS.public_key: ((LOOPBACK, 1), (LOOPBACK, 2)),
        CLIENT_KEYS.public_key: (),
    }
    gone: list[float] = []
    publisher.records.unannounce(topic, SERVER_KEYS, world.network.now, gone.append)
    world.poke(publisher)
    assert world.run(lambda: bool(gone), 10)
    assert list(lookup()) == [CLIENT_KEYS.public_key]


def test_values() -> None:
    world = World()
    publisher, reader = world.peer(), world.peer()
    results: list[object] = []

    def collect(*result: object) -> None:
        results.append(result[:-1])

    def outcome(dht: HyperDHT) -> object:
        results.clear()
        world.poke(dht)
        assert world.run(lambda: bool(results), 10)
        world.wait(1)
        assert len(results) == 1
        return results[0]

    name = blake2b(b"hello")

    publisher.records.immutable_put(b"hello", world.network.now, collect)
    assert outcome(publisher) == (name, Stored(4))
    reader.records.immutable_get(name, world.network.now, collect)
    assert outcome(reader) == (b"hello",)
    reader.records.immutable_get(bytes(32), world.network.now, collect)
    assert outcome(reader) == (None,)

    put = publisher.records.mutable_put
    put(SERVER_KEYS, b"one", world.network.now, collect, seq=1)
    assert outcome(publisher) == (Stored(4),)
    put(SERVER_KEYS, b"two", world.network.now, collect, seq=1)
    assert outcome(publisher) == (Stored(0, refused=4),)
    put(SERVER_KEYS, b"two", world.network.now, collect, seq=2)
    assert outcome(publisher) == (Stored(4),)
    put(SERVER_KEYS, b"old", world.network.now, collect, seq=1)
    assert outcome(publisher) == (Stored(0, refused=4),)
    expected = MutableValue.signed(SERVER_KEYS, 2, b"two")
    for latest in (True, False):
        reader.records.mutable_get(
            SERVER_KEYS.public_key, world.network.now, collect, latest=latest
        )
        assert outcome(reader) == (expected,)
    reader.records.mutable_get(SERVER_KEYS.public_key, world.network.now, collect, seq=3)
    assert outcome(reader) == (None,)
    with pytest.raises(InvalidInput):
        publisher.records.immutable_put(bytes(1001), world.network.now, collect)


def test_a_server_on_a_dht_node_is_found_there() -> None:
    world = World()
    listening = Listening(world, world.relays[2])
    assert target(SERVER_KEYS.public_key) == listening.server.target
    client = world.peer()
    connection = Connecting(world, client, SERVER_KEYS.public_key).open()
    accepted = greet(world, client, connection, listening)
    talk(world, (client, connection), (listening.dht, accepted))


@pytest.mark.parametrize("is_open", [True, False])
def test_a_node_connects_to_its_own_server(is_open: bool) -> None:
    world = World()
    listening = Listening(world, world.peer(is_open=is_open))
    connection = Connecting(world, listening.dht, SERVER_KEYS.public_key).open()
    accepted = greet(world, listening.dht, connection, listening)
    talk(world, (listening.dht, connection), (listening.dht, accepted))


def test_many_connections_leave_nothing_behind() -> None:
    world = World()
    listening = Listening(world, world.peer())
    client = world.peer()
    for _ in range(100):
        connection = Connecting(world, client, SERVER_KEYS.public_key).open()
        accepted = greet(world, client, connection, listening)
        connection.stream.destroy(world.network.now)
        world.poke(client)
        assert world.run(functools.partial(getattr, accepted.stream, "closed"), 5)
    assert listening.server.stats.accepted == 100
    world.wait(15)
    assert len(client.mux) == len(listening.dht.mux) == 0
    assert not listening.server._sessions
    assert not client._context.attempts
    Connecting(world, client, SERVER_KEYS.public_key).open()
