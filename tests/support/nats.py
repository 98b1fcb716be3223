"""A DHT of public nodes, and peers behind NATs, on the virtual clock."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from hyperseaport.testing.nat import Nat, NatNetwork
from hyperseaport.testing.network import Host, Link
from hyperseaport.transport.dht.hyperdht import Connection, HyperDHT, HyperDHTConfig, Server
from hyperseaport.transport.dht.node import NodeConfig
from hyperseaport.transport.keys import KeyPair
from hyperseaport.transport.transmit import CLIENT_SOCKET, SERVER_SOCKET, Address

#: Seconds from anywhere to anywhere else.
ONE_WAY = 0.02
NODES = 12
KINDS = ("open", "consistent", "random", "double")


class Peer:
    """A node, and what it sits behind."""

    def __init__(self, dht: HyperDHT, host: Host, nat: Nat | None) -> None:
        self.dht = dht
        self.host = host
        self.nat = nat
        self.connections: list[Connection] = []
        self.server: Server | None = None


class World:
    """`NODES` persistent nodes with public addresses."""

    def __init__(self, seed: int, link: Link | None = None) -> None:
        self.rng = Random(seed)
        self.network = NatNetwork(Random(seed), link or Link(delay=ONE_WAY))
        self.hosts = 0
        self.bootstrap: tuple[Address, ...] = ()
        self.nodes: list[Peer] = []
        for index in range(NODES):
            address = f"5.0.0.{index + 1}"
            config = NodeConfig(
                bootstrap=self.bootstrap,
                public_address=(address, 49737),
                ignore_idless_pings=0.0,
            )
            self.nodes.append(self.start(config, address))
            if not self.bootstrap:
                self.bootstrap = ((address, 49737),)

    def reseed(self, seed: int) -> None:
        """All that happens from now on is decided by this seed."""
        self.rng = Random(seed)
        self.network.rng.seed(seed)

    def start(
        self, config: NodeConfig, host: str, nat: Nat | None = None, port: int = 49737
    ) -> Peer:
        core = HyperDHT(
            HyperDHTConfig(node=config, local_hosts=(host,)), Random(self.rng.getrandbits(64))
        )
        sockets = {SERVER_SOCKET: (host, port), CLIENT_SOCKET: (host, port + 1)}
        core.start(self.network.now, server_port=port, client_port=port + 1)
        if nat is None:
            attached = self.network.attach(core, sockets)
        else:
            attached = self.network.attach_behind(nat, core, sockets)
        assert self.run(lambda: core.node.ready, 20)
        return Peer(core, attached, nat)

    def nat(self, kind: str) -> Nat | None:
        """None for ``open``."""
        self.hosts += 1
        host = f"6.{self.hosts >> 8}.{self.hosts & 255}.1"
        if kind == "open":
            return None
        nat = self.network.nat(host)
        if kind == "random":
            nat.random = True
        elif kind == "double":
            nat = self.network.nat(f"100.64.{self.hosts >> 8}.{self.hosts & 255}", outer=nat)
        return nat

    def peer(self, kind: str = "consistent", nat: Nat | None = None) -> Peer:
        """A node behind a NAT of a kind, or behind that one. Inner addresses are the same behind
        each NAT, as they are in real life."""
        config = NodeConfig(bootstrap=self.bootstrap, ephemeral=True)
        if nat is None:
            nat = self.nat(kind)
        if nat is None:
            return self.start(config, f"6.{self.hosts >> 8}.{self.hosts & 255}.1")
        inside = sum(peer is nat for peer in self.network._nats.values())
        return self.start(config, f"192.168.0.{10 + inside}", nat)

    def listen(self, peer: Peer, key_pair: KeyPair, **options: Any) -> Server:
        listening: list[float] = []

        def accept(connection: Connection, now: float) -> None:
            # As a channel does: the header of its secret stream is the first packet.
            connection.stream.write(b"welcome", now)
            peer.connections.append(connection)

        peer.server = peer.dht.listen(
            key_pair,
            self.network.now,
            on_connection=accept,
            on_listening=listening.append,
            **options,
        )
        self.network.poke(peer.host)
        assert self.run(lambda: bool(listening), 20)
        return peer.server

    def connect(self, peer: Peer, public_key: bytes, **options: Any) -> Connect:
        return Connect(self, peer, public_key, **options)

    def remove(self, peer: Peer) -> None:
        self.network.detach(peer.host)

    def poke(self, peer: Peer) -> None:
        self.network.poke(peer.host)

    def run(self, done: Callable[[], bool], seconds: float) -> bool:
        return self.network.run(until=self.network.now + seconds, done=done)

    def wait(self, seconds: float) -> None:
        self.network.run(until=self.network.now + seconds)


class Connect:
    """A connect and what becomes of it."""

    def __init__(self, world: World, peer: Peer, public_key: bytes, **options: Any) -> None:
        self.world = world
        self.peer = peer
        self.connection: Connection | None = None
        self.error: Exception | None = None
        self.started = world.network.now
        self.ended = 0.0
        self.attempt = peer.dht.connect(
            public_key, self.started, on_open=self._opened, on_error=self._failed, **options
        )
        world.poke(peer)

    def _opened(self, connection: Connection, now: float) -> None:
        assert self.connection is None
        assert self.error is None
        self.connection = connection
        self.ended = now

    def _failed(self, error: Exception, now: float) -> None:
        assert self.connection is None
        assert self.error is None
        self.error = error
        self.ended = now

    @property
    def took(self) -> float:
        """Seconds."""
        return self.ended - self.started

    def wait(self, seconds: float = 60) -> Connect:
        assert self.world.run(lambda: bool(self.connection or self.error), seconds)
        return self

    def greet(self, server: Peer) -> Connection:
        """Prove that bytes pass both ways. Returns the server's end."""
        self.wait()
        if self.error is not None:
            raise self.error
        connection = self.connection
        assert connection is not None
        world, hash_ = self.world, connection.handshake.hash
        connection.stream.write(b"hello", world.network.now)
        world.poke(self.peer)

        def accepted() -> Connection | None:
            return next((c for c in server.connections if c.handshake.hash == hash_), None)

        assert world.run(lambda: (end := accepted()) is not None and end.stream.readable == 5, 15)
        end = accepted()
        assert end is not None
        assert b"".join(bytes(piece) for piece in end.stream.read()) == b"hello"
        assert world.run(lambda: connection.stream.readable == 7, 15)
        return end


#: What the server and the client sit behind; "lan" for the client: the same NAT as the server.
PAIRS = [
    *((server, client) for server in KINDS for client in KINDS),
    *((server, "lan") for server in KINDS),
]


class Outcome:
    """Of a first connect, and of a second one that remembers the relays but no path."""

    def __init__(self, world: World, pair: tuple[str, str], seed: int) -> None:
        """New peers in the same network, with new seeds."""
        world.reseed(seed)
        keys = KeyPair.from_seed(world.rng.randbytes(32))
        server = world.peer(pair[0])
        world.listen(server, keys)
        if pair[1] == "lan" and server.nat is None:
            # Two hosts of one network without a NAT.
            client = world.peer("open")
        else:
            client = world.peer(pair[1], server.nat if pair[1] == "lan" else None)
        first = world.connect(client, keys.public_key).wait()
        self.error = first.error
        self.first = first.took
        self.remembered = self.routed = 0.0
        if first.error is None:
            first.greet(server)
            again = world.connect(client, keys.public_key)
            again.greet(server)
            self.routed = again.took
            if "random" not in pair:
                client.dht._context.routes.clear()
                third = world.connect(client, keys.public_key)
                third.greet(server)
                self.remembered = third.took
        for peer in (server, client):
            peer.dht.punches.close()
            world.remove(peer)
