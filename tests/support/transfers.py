"""Bytes that go both ways over UDX streams on a simulated network, compared as they arrive."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from hyperseaport.testing.network import Host, Link, Network
from hyperseaport.transport.dht.hyperdht import HyperDHT
from hyperseaport.transport.noise import Handshake
from hyperseaport.transport.secret_stream import SecretStream, StreamError
from hyperseaport.transport.transmit import Address, Buffer, Transmit
from hyperseaport.transport.udx.mux import Mux
from hyperseaport.transport.udx.stream import Stream
from hyperseaport.transport.udx.window import MAX_RECEIVE_WINDOW

ADDRESSES: tuple[Address, Address] = (("10.0.0.1", 1), ("10.0.0.2", 2))

#: Bytes written at once, and bytes not in flight above which a writer waits: as channels do.
CHUNK = 16_384
WRITE_HIGH = 65_536
#: The longest packet, and what a frame of the secret stream adds to its message.
PACKET = 1500
FRAME = 20

#: Positions in a packet where a flipped bit makes it nobody's: magic, version and stream id. UDX
#: has no checksum, so what hits the other bytes is for the secret stream to find.
SAFELY_CORRUPTED = (0, 1, 4, 5, 6, 7)


@dataclass(slots=True, eq=False)
class Half:
    """One end of a stream: what it sends, and what it expects."""

    stream: Stream
    sends: bytes
    expects: bytes
    secret: SecretStream | None = None
    #: Its direction ends behind what it sends.
    ends: bool = True
    written: int = 0
    received: int = 0
    #: Something else arrived than was expected.
    wrong: bool = False
    #: What the secret stream found.
    failure: StreamError | None = None
    #: When the last byte was received.
    last_at: float = 0.0
    #: Bytes at most, at any time: unread, offered to the peer, written and not acknowledged.
    most_held: int = 0
    most_offered: int = 0
    most_queued: int = 0

    @property
    def complete(self) -> bool:
        return self.received == len(self.expects) and not self.wrong

    @property
    def error(self) -> Exception | None:
        return self.failure or self.stream.error

    def start(self, now: float) -> None:
        if self.secret is not None:
            self.stream.write(self.secret.start(), now)

    def serve(self, now: float) -> bool:
        """Read and write what is possible. Whether anything was written."""
        stream, receiver = self.stream, self.stream._receiver
        self.most_held = max(self.most_held, receiver.held)
        self.most_offered = max(self.most_offered, receiver.offer.capacity)
        if stream.readable:
            pieces = stream.read()
            for piece in pieces:
                self._take(piece, now)
            if self.secret is not None:
                stream.authentic = self.secret.authentic
                stream.expects = self.secret.buffered > 0
            stream.credit(sum(map(len, pieces)), now)
        wrote = False
        while not stream.closed and self.written < len(self.sends) and stream.unsent < WRITE_HIGH:
            self._write(now)
            wrote = True
        self.most_queued = max(self.most_queued, stream.unsent + stream.unacked)
        if self.ends and self.written == len(self.sends) and not stream.closed:
            stream.end(now)
        return wrote

    def _write(self, now: float) -> None:
        chunk = self.sends[self.written : self.written + CHUNK]
        for piece in [chunk] if self.secret is None else self.secret.encrypt(chunk):
            self.stream.write(piece, now)
        self.written += len(chunk)

    def _take(self, piece: Buffer, now: float) -> None:
        messages: list[bytes] = []
        if self.secret is None:
            messages = [bytes(piece)]
        elif self.failure is None:
            try:
                messages = self.secret.receive(piece)
            except StreamError as error:
                self.failure, messages = error, error.messages
                self.stream.destroy(now)
        for message in messages:
            end = self.received + len(message)
            self.wrong |= self.expects[self.received : end] != message
            self.received = end
            self.last_at = now


class Party:
    """A host: a mux, or a whole DHT node with one, and the halves that it serves."""

    def __init__(self, core: Mux | HyperDHT) -> None:
        self.core = core
        self.mux = core if isinstance(core, Mux) else core.mux
        self.halves: list[Half] = []

    def receive(self, datagram: bytes, socket: int, source: Address, now: float) -> None:
        self.core.receive(datagram, socket, source, now)

    def transmits(self, now: float) -> list[Transmit]:
        out: list[Transmit] = []
        more = True
        while more:
            self.mux.poll()
            wrote = sum(half.serve(now) for half in self.halves) > 0
            sent = self.core.transmits(now)
            out += sent
            # What was waiting is in flight now: whoever waited for that may write more.
            more = wrote and bool(sent)
        return out

    def deadline(self) -> float | None:
        return self.core.deadline()

    def on_deadline(self, now: float) -> None:
        self.core.on_deadline(now)


class Pair:
    """Two hosts with a link, and streams between them."""

    def __init__(self, link: Link, seed: int = 1) -> None:
        self.network = Network(Random(seed), link)
        self.parties = Party(Mux(Random(seed + 1))), Party(Mux(Random(seed + 2)))
        first, second = self.parties
        self.hosts: tuple[Host, Host] = (
            self.network.attach(first, {0: ADDRESSES[0]}),
            self.network.attach(second, {0: ADDRESSES[1]}),
        )

    def stream(self, there: bytes, back: bytes, *, secret: bool = False) -> tuple[Half, Half]:
        """A stream on which the first host sends ``there`` and the second ``back``."""
        now = self.network.now
        a, b = (party.mux.create() for party in self.parties)
        a.connect(0, b.local_id, ADDRESSES[1], now)
        b.connect(0, a.local_id, ADDRESSES[0], now)
        ciphers = secret_pair() if secret else (None, None)
        halves = Half(a, there, back, ciphers[0]), Half(b, back, there, ciphers[1])
        for party, half, host in zip(self.parties, halves, self.hosts, strict=True):
            party.halves.append(half)
            half.start(now)
            self.network.poke(host)
        return halves

    def run(self, seconds: float) -> bool:
        """Until every stream is closed at both ends; whether they are."""
        streams = [half.stream for party in self.parties for half in party.halves]
        until = self.network.now + seconds
        return self.network.run(until=until, done=lambda: all(s.closed for s in streams))


def secret_pair() -> tuple[SecretStream, SecretStream]:
    """The secret streams of both ends of a handshake that is over."""
    rng = Random(5)
    keys, hash_ = (rng.randbytes(32), rng.randbytes(32)), rng.randbytes(64)
    sides = [
        Handshake(
            is_initiator=not side,
            tx=keys[side],
            rx=keys[1 - side],
            hash=hash_,
            public_key=bytes(32),
            remote_public_key=bytes(32),
        )
        for side in (0, 1)
    ]
    return SecretStream(sides[0], Random(6)), SecretStream(sides[1], Random(7))


def assert_delivered(*halves: Half) -> None:
    """Both got all they expected, without an error, and held no more than they may."""
    for half in halves:
        assert half.error is None
        assert half.complete, f"{half.received} of {len(half.expects)} bytes"
        assert half.stream.closed
    assert_bounded(*halves)


def assert_bounded(*halves: Half) -> None:
    """Neither end held more unread than it had offered, nor more unacknowledged than it may write
    ahead and the other had offered. Behind a gap that may be twice as much: the window is for what
    comes next, and what lies behind the gap is acknowledged, but not in sum."""
    offered = max(half.most_offered for half in halves)
    assert offered <= MAX_RECEIVE_WINDOW
    for half in halves:
        assert half.most_held <= half.most_offered + PACKET
        assert half.most_queued <= WRITE_HIGH + CHUNK + FRAME + 2 * (offered + PACKET)
