"""A blind relay in a simulated network."""

from __future__ import annotations

from random import Random

from hyperseaport.transport.dht.hyperdht import Connection, HyperDHT
from hyperseaport.transport.dht.relay_server import (
    RelayControl,
    RelayLimits,
    RelayServer,
    RelaySession,
)
from hyperseaport.transport.keys import KeyPair
from hyperseaport.transport.secret_stream import SecretStream
from hyperseaport.transport.transmit import Address, Transmit
from hyperseaport.transport.udx.forward import Forwarder, Leg

from .nats import Peer, World

#: One relay serves all pairs of a test.
LIMITS = RelayLimits(pairs_per_session=1000, rate=1e9)


class _Deaf(Forwarder):
    """As the reference: it knows where a peer is by its first packet, and nothing goes there
    before (spec: hyperdht 5.8)."""

    __slots__ = ("_heard", "lost")

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._heard: set[Leg] = set()
        self.lost = 0

    def _forward(
        self,
        leg: Leg,
        run: bytearray,
        segment: int,
        socket: int,
        source: Address,
        now: float,
    ) -> None:
        self._heard.add(leg)
        if leg._far in self._heard:
            super()._forward(leg, run, segment, socket, source, now)
        else:
            self.lost += 1


class _Session:
    def __init__(self, relay: Relay, connection: Connection, now: float) -> None:
        self.stream = connection.stream
        self.secret = SecretStream(connection.handshake, relay.rng)
        self.control = RelayControl(connection.handshake.remote_public_key, now)
        key, (host, _port) = connection.handshake.remote_public_key, connection.stream.address
        session = relay.server.open(key, host, now)
        assert session is not None
        self.session: RelaySession = session
        self.stream.write(self.secret.start(), now)

    def flush(self, now: float) -> None:
        if not self.stream.closed:
            for message in self.control.messages():
                for frame in self.secret.encrypt(message):
                    self.stream.write(frame, now)


class Relay:
    """A `Core` that is a node with a relay. `deaf` relays as the reference does."""

    def __init__(self, world: World, seed: bytes = bytes([77]), *, deaf: bool = False) -> None:
        self.world = world
        self.rng = Random(1)
        self.keys = KeyPair.from_seed(seed * 32)
        peer = world.peer("open")
        self.dht: HyperDHT = peer.dht
        mux = self.dht.mux
        self.deaf = _Deaf(mux._unused_id, mux.say)
        if deaf:
            mux.forwarder = self.deaf
        self.server = RelayServer(mux.forwarder, LIMITS)
        self.sessions: list[_Session] = []
        peer.host.core = self
        self.host = peer.host
        self.peer = Peer(self.dht, peer.host, None)
        self.listener = self.dht.listen(self.keys, world.network.now, on_connection=self._accepted)
        world.network.poke(self.host)
        world.wait(1.0)

    @property
    def key(self) -> bytes:
        return self.keys.public_key

    @property
    def pairs(self) -> int:
        return self.server.pairs

    def stop(self) -> None:
        self.world.remove(self.peer)

    def _accepted(self, connection: Connection, now: float) -> None:
        self.sessions.append(_Session(self, connection, now))

    def _pump(self, now: float) -> None:
        answers = []
        for one in list(self.sessions):
            for chunk in one.stream.read():
                one.stream.credit(len(chunk), now)
                for message in one.secret.receive(chunk):
                    for request in one.control.receive(message, now):
                        stream = one.stream
                        answers += self.server.receive(
                            one.session, request, stream.socket, stream.address, now
                        )
            if one.stream.closed or one.stream.remote_ended:
                self.sessions.remove(one)
                self.server.close(one.session, now)
                if not one.stream.closed:
                    one.stream.end(now)
        for session, pair in answers:
            for one in self.sessions:
                if one.session is session:
                    one.control.answer(pair)
        for one in self.sessions:
            one.flush(now)

    # Core

    def receive(self, datagram: bytes, socket: int, source: Address, now: float) -> None:
        self.dht.receive(datagram, socket, source, now)

    def transmits(self, now: float) -> list[Transmit]:
        self._pump(now)
        return self.dht.transmits(now)

    def deadline(self) -> float | None:
        times = [self.dht.deadline(), self.server.deadline()]
        return min((each for each in times if each is not None), default=None)

    def on_deadline(self, now: float) -> None:
        self.dht.on_deadline(now)
        self.server.on_deadline(now)

    def sockets_to_open(self) -> list[int]:
        return self.dht.sockets_to_open()

    def sockets_to_close(self) -> list[int]:
        return self.dht.sockets_to_close()
