"""Connections to relays, with the relay's side done by hand."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperseaport.transport.dht import blind_relay, relay_client
from hyperseaport.transport.dht.blind_relay import PAIR_SECONDS, PROTOCOL
from hyperseaport.transport.dht.context import Connection
from hyperseaport.transport.dht.relay_client import Relays
from hyperseaport.transport.dht.timers import Timers
from hyperseaport.transport.errors import InvalidInput, PeerUnreachable
from hyperseaport.transport.keys import NS_PEER_HANDSHAKE, KeyPair
from hyperseaport.transport.noise import Initiator, Responder
from hyperseaport.transport.protomux import ChannelMessage, Protomux
from hyperseaport.transport.secret_stream import KEEP_ALIVE_INTERVAL, SecretStream
from hyperseaport.transport.transmit import Address
from hyperseaport.transport.udx.mux import Mux

NODE = KeyPair.from_seed(bytes([1]) * 32)
RELAY = KeyPair.from_seed(bytes([2]) * 32)
OTHER = KeyPair.from_seed(bytes([3]) * 32)
TOKEN, TOKEN_2 = bytes([7]) * 32, bytes([8]) * 32
OURS: Address = ("10.0.0.1", 1)
THEIRS: Address = ("10.0.0.2", 2)


class Dialled:
    """A connect to a relay, and the relay's end of it."""

    def __init__(self, lab: Laboratory, key: bytes) -> None:
        self.lab = lab
        self.key = key
        self.cancelled = False
        self.pairs: list[blind_relay.Pair] = []
        self.unpaired: list[bytes] = []
        self.keep_alives = 0

    def cancel(self, _now: float) -> None:
        self.cancelled = True

    def open(self) -> None:
        """The relay answers."""
        lab = self.lab
        server = RELAY if self.key == RELAY.public_key else OTHER
        one = Initiator(
            NODE, self.key, prologue=NS_PEER_HANDSHAKE, ephemeral_seed=lab.rng.randbytes(32)
        )
        other = Responder(server, prologue=NS_PEER_HANDSHAKE, ephemeral_seed=lab.rng.randbytes(32))
        other.read(one.message(b""))
        message, there = other.message(b"")
        _, here = one.read(message)
        mine, self.stream = lab.mux.create(), lab.far.create()
        mine.connect(0, self.stream.local_id, THEIRS, lab.now)
        self.stream.connect(0, mine.local_id, OURS, lab.now)
        self.secret = SecretStream(there, lab.rng)
        self.stream.write(self.secret.start(), lab.now)
        self.protomux = Protomux()
        self.channel = self.protomux.open(PROTOCOL, NODE.public_key)
        self.on_open(Connection(mine, here, THEIRS), lab.now)

    on_open: Callable[[Connection, float], None]
    on_error: Callable[[Exception, float], None]

    def fail(self) -> None:
        self.on_error(PeerUnreachable("is not there"), self.lab.now)

    def answer(self, pair: blind_relay.Pair) -> None:
        self.protomux.send(self.channel, blind_relay.PAIR, pair.encode())

    def read(self) -> None:
        for chunk in self.stream.read():
            for message in self.secret.receive(chunk):
                for event in self.protomux.receive(message):
                    if isinstance(event, ChannelMessage):
                        told = blind_relay.decode(event.type, event.payload)
                        if isinstance(told, blind_relay.Pair):
                            self.pairs.append(told)
                        elif told is not None:
                            self.unpaired.append(told.token)
        if not self.stream.closed:
            for message in self.protomux.messages():
                self.say(message)

    def say(self, message: bytes) -> None:
        for frame in self.secret.encrypt(message):
            self.stream.write(frame, self.lab.now)


class Laboratory:
    def __init__(self) -> None:
        self.now = 0.0
        self.rng = Random(1)
        self.mux, self.far = Mux(Random(2)), Mux(Random(3))
        self.timers = Timers()
        self.relays = Relays(self.timers, Random(4))
        self.relays.dial = self.dial
        self.dialled: list[Dialled] = []
        self.silent = False
        self.paired: list[tuple[int, Address, int]] = []
        self.lost: list[str] = []

    def dial(
        self,
        public_key: bytes,
        now: float,
        *,
        on_open: Callable[[Connection, float], None],
        on_error: Callable[[Exception, float], None],
    ) -> Dialled:
        if public_key == bytes(32):
            raise InvalidInput("that is no key")
        dialled = Dialled(self, public_key)
        dialled.on_open, dialled.on_error = on_open, on_error
        self.dialled.append(dialled)
        return dialled

    def pair(
        self, token: bytes = TOKEN, *, key: bytes = RELAY.public_key, initiator: bool = True
    ) -> relay_client.Pair | None:
        return self.relays.pair(
            key,
            token,
            self.now,
            initiator=initiator,
            stream_id=55,
            on_paired=lambda *path: self.paired.append(path[:3]),
            on_lost=lambda reason, _now: self.lost.append(reason),
        )

    def turn(self) -> None:
        """Carry bytes between both ends until nothing moves."""
        for _ in range(20):
            self.relays.pump(self.now)
            for transmit in self.mux.transmits(self.now):
                if not self.silent:
                    datagram = b"".join(transmit.buffers)
                    self.far.receive(datagram, 0, OURS, self.now)
            for dialled in self.dialled:
                if hasattr(dialled, "stream"):
                    dialled.read()
            for transmit in self.far.transmits(self.now):
                if not self.silent:
                    datagram = b"".join(transmit.buffers)
                    self.mux.receive(datagram, 0, THEIRS, self.now)

    def wait(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + 0.25, end)
            self.timers.run(self.now)
            self.mux.on_deadline(self.now)
            self.far.on_deadline(self.now)
            self.turn()


def connected() -> tuple[Laboratory, Dialled]:
    """A pair that was asked for."""
    lab = Laboratory()
    assert lab.pair() is not None
    (dialled,) = lab.dialled
    dialled.open()
    lab.turn()
    return lab, dialled


def test_a_pair() -> None:
    lab, dialled = connected()
    assert dialled.pairs == [blind_relay.Pair(True, TOKEN, 55)]
    assert not lab.paired
    dialled.answer(blind_relay.Pair(True, TOKEN, 77))
    lab.turn()
    assert lab.paired == [(0, THEIRS, 77)]
    assert not lab.lost
    # Another word about it changes nothing.
    dialled.answer(blind_relay.Pair(True, TOKEN, 78))
    lab.turn()
    assert len(lab.paired) == 1


def test_what_was_not_asked_for() -> None:
    lab, dialled = connected()
    dialled.answer(blind_relay.Pair(False, TOKEN, 77))
    dialled.answer(blind_relay.Pair(True, TOKEN_2, 77))
    lab.turn()
    assert not lab.paired
    assert not lab.lost
    assert lab.relays.pairs == 1


def test_pairs_share_one_connection() -> None:
    lab, dialled = connected()
    assert lab.pair(TOKEN_2, initiator=False) is not None
    lab.turn()
    assert len(lab.dialled) == 1
    assert dialled.pairs[1] == blind_relay.Pair(False, TOKEN_2, 55)
    assert lab.pair(key=OTHER.public_key) is not None
    assert len(lab.dialled) == 2
    assert (len(lab.relays), lab.relays.pairs) == (2, 3)


def test_pairs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    lab, _ = connected()
    assert lab.pair() is None
    monkeypatch.setattr(relay_client, "MAX_PAIRS", 1)
    assert lab.pair(TOKEN_2) is None
    monkeypatch.setattr(relay_client, "MAX_RELAYS", 1)
    assert lab.pair(key=OTHER.public_key) is None
    assert lab.relays.stats.dropped == 3


def test_a_release_is_told() -> None:
    lab, dialled = connected()
    pair = lab.pair(TOKEN_2)
    assert pair is not None
    pair.release(lab.now)
    pair.release(lab.now)
    lab.turn()
    assert dialled.unpaired == [TOKEN_2]
    dialled.answer(blind_relay.Pair(True, TOKEN_2, 77))
    lab.turn()
    assert not lab.paired
    lab.wait(PAIR_SECONDS + 1)
    assert len(lab.lost) == 1


def test_a_release_before_the_relay_is_connected() -> None:
    lab = Laboratory()
    pair = lab.pair()
    assert pair is not None
    pair.release(lab.now)
    lab.dialled[0].open()
    lab.turn()
    assert not lab.dialled[0].pairs
    assert not lab.dialled[0].unpaired


def test_who_does_not_come_is_not_waited_for() -> None:
    lab, dialled = connected()
    lab.wait(PAIR_SECONDS - 0.5)
    assert not lab.lost
    lab.wait(1)
    assert lab.lost == ["does not come to the relay"]
    assert dialled.unpaired == [TOKEN]
    assert lab.relays.pairs == 0
    assert lab.relays.stats.failed == 1


def test_a_pair_that_came_about_is_waited_for_no_more() -> None:
    lab, dialled = connected()
    dialled.answer(blind_relay.Pair(True, TOKEN, 77))
    lab.wait(2 * PAIR_SECONDS)
    assert not lab.lost
    assert lab.relays.pairs == 1


def test_a_relay_that_cannot_be_reached() -> None:
    lab = Laboratory()
    lab.pair()
    lab.dialled[0].fail()
    assert lab.lost == ["cannot be met at its relay: is not there"]
    assert len(lab.relays) == 0
    lab.pair(key=bytes(32))
    assert len(lab.lost) == 1
    lab.turn()
    assert lab.lost[1:] == ["cannot be met at its relay: that is no key"]


def test_without_a_way_to_dial_there_are_no_relays() -> None:
    lab = Laboratory()
    lab.relays.dial = None
    assert lab.pair() is None


def test_keep_alives_and_silence() -> None:
    lab, dialled = connected()
    dialled.answer(blind_relay.Pair(True, TOKEN, 77))
    before = dialled.stream.heard_at
    lab.wait(4 * relay_client.SILENCE)
    assert dialled.stream.heard_at > before + 3 * KEEP_ALIVE_INTERVAL
    assert not lab.lost
    lab.silent = True
    lab.wait(relay_client.SILENCE + KEEP_ALIVE_INTERVAL + 1)
    assert len(lab.lost) == 1
    assert "its relay" in lab.lost[0]
    assert len(lab.relays) == 0


def test_a_pause_of_the_machine_is_no_silence() -> None:
    lab, _ = connected()
    lab.now += 100.0
    lab.relays.woke_up(lab.now)
    lab.turn()
    lab.timers.run(lab.now)
    assert len(lab.relays) == 1


@pytest.mark.parametrize("end", ["reset", "end", "close", "reject"])
def test_a_relay_that_stops(end: str) -> None:
    lab, dialled = connected()
    if end == "reset":
        dialled.stream.destroy(lab.now)
    elif end == "end":
        dialled.stream.end(lab.now)
    elif end == "close":
        dialled.protomux.close(dialled.channel)
    else:
        dialled.say(bytes((0, 2, 1)))
    lab.turn()
    assert len(lab.lost) == 1
    assert "relay" in lab.lost[0]
    assert len(lab.relays) == 0
    # The next one is another connection.
    lab.pair()
    assert len(lab.dialled) == 2


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.binary(max_size=80))
def test_arbitrary_messages_are_survived(message: bytes) -> None:
    lab, dialled = connected()
    dialled.say(message)
    lab.turn()
    assert not lab.paired
    assert len(lab.lost) == (len(lab.relays) == 0)


def test_a_connection_that_nobody_uses_is_closed() -> None:
    lab, dialled = connected()
    pair = next(iter(lab.relays._links.values())).pairs[TOKEN]
    pair.release(lab.now)
    lab.wait(relay_client.LINGER - KEEP_ALIVE_INTERVAL)
    assert len(lab.relays) == 1
    lab.wait(2 * KEEP_ALIVE_INTERVAL)
    assert len(lab.relays) == 0
    assert not dialled.protomux.is_open(dialled.channel)
    assert dialled.stream.remote_ended
    lab.wait(relay_client.FAREWELL + 1)
    assert len(lab.mux) == 0
    assert lab.timers.deadline() is None


def test_a_relay_that_is_held_is_found_again() -> None:
    lab = Laboratory()
    lab.relays.hold(RELAY.public_key, lab.now)
    for count in range(1, 5):
        assert len(lab.dialled) == count
        lab.dialled[-1].fail()
        lab.wait(relay_client.RETRY_FIRST * 2 ** (count - 1) + 0.5)
    lab.dialled[-1].open()
    lab.wait(2 * relay_client.LINGER)
    assert len(lab.relays) == 1
    # It was well: the next pauses are short again.
    lab.dialled[-1].stream.destroy(lab.now)
    lab.turn()
    lab.wait(relay_client.RETRY_FIRST + 0.5)
    assert len(lab.dialled) == 6
    lab.dialled[-1].open()
    lab.relays.let_go(RELAY.public_key)
    lab.wait(relay_client.LINGER + 2 * KEEP_ALIVE_INTERVAL)
    assert len(lab.relays) == 0


def test_the_choice() -> None:
    lab, _ = connected()
    relays, both = lab.relays, (RELAY.public_key, OTHER.public_key)
    assert relays.choose((), lab.now) is None
    assert {relays.choose(both, lab.now) for _ in range(20)} == {RELAY.public_key}
    relays.close(lab.now)
    assert {relays.choose(both, lab.now) for _ in range(20)} == set(both)
    lab.pair(TOKEN_2)
    lab.dialled[-1].fail()
    assert {relays.choose(both, lab.now) for _ in range(20)} == {OTHER.public_key}
    assert relays.choose(both[:1], lab.now) == RELAY.public_key
    later = lab.now + relay_client.AVOID
    assert {relays.choose(both, later) for _ in range(20)} == set(both)


def test_close_ends_everything_in_silence() -> None:
    lab, dialled = connected()
    lab.pair(key=OTHER.public_key)
    lab.relays.close(lab.now)
    assert lab.dialled[1].cancelled
    lab.turn()
    assert dialled.stream.remote_ended
    lab.wait(relay_client.FAREWELL + 1)
    assert not lab.lost
    assert len(lab.mux) == 0
