from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperseaport.transport.dht import moves as module
from hyperseaport.transport.dht.moves import (
    ANSWER,
    CHALLENGE,
    HESITATION,
    MAX_CANDIDATES,
    MIN_SILENCE,
    PATIENCE,
    REST,
    TOKEN_BYTES,
    TRIAL_AFTER,
    TRIAL_PACKETS,
    TRIAL_REACH,
    Moves,
    Path,
)
from hyperseaport.transport.dht.timers import Timers
from hyperseaport.transport.noise import Handshake
from hyperseaport.transport.transmit import Address
from hyperseaport.transport.udx import packet as wire
from hyperseaport.transport.udx.mux import Mux
from hyperseaport.transport.udx.packet import Packet, decode, encode
from hyperseaport.transport.udx.stream import Stream

HOME: Address = ("6.0.0.1", 1000)
NEW: Address = ("6.0.0.1", 2000)
FAR: Address = ("9.9.9.9", 3000)
KEY = bytes([7]) * 32
#: The shortest time in which home could have said something.
SOON = MIN_SILENCE + 0.001


def handshake(*, is_initiator: bool, key: bytes = KEY, session: int = 0) -> Handshake:
    there, back = bytes([session, 1]) * 16, bytes([session, 2]) * 16
    return Handshake(
        is_initiator=is_initiator,
        tx=there if is_initiator else back,
        rx=back if is_initiator else there,
        hash=bytes(64),
        public_key=bytes(32),
        remote_public_key=key,
    )


class World:
    """Streams to one peer, which is played by the test."""

    def __init__(self) -> None:
        self.mux = Mux(Random(1))
        self.timers = Timers()
        self.now = 100.0
        self.moved: list[tuple[bytes, Path, Path]] = []
        self.moves = Moves(
            self.timers, Random(2), lambda key, old, new, _now: self.moved.append((key, old, new))
        )
        #: What has left: kind, payload and where to.
        self.sent: list[tuple[int, bytes, Address]] = []

    def stream(self, key: bytes = KEY, home: Address = HOME, session: int = 0) -> Stream:
        stream = self.mux.create()
        stream.connect(0, 99, home, self.now)
        self.moves.watch(stream, handshake(is_initiator=False, key=key, session=session))
        self.give(stream, wire.ACK, source=home)
        return stream

    def give(
        self,
        stream: Stream,
        kind: int,
        payload: bytes = b"",
        *,
        seq: int = 0,
        source: Address = NEW,
        socket: int = 0,
    ) -> None:
        packet = Packet(kind, stream.local_id, 4194304, seq, 0, payload)
        assert self.mux.receive(encode(packet), socket, source, self.now)
        self.flush()

    def flush(self) -> None:
        self.timers.run(self.now)
        for transmit in self.mux.transmits(self.now):
            packet = decode(b"".join(transmit.buffers))
            self.sent.append((packet.type, packet.payload, transmit.address))

    def wait(self, seconds: float) -> None:
        end = self.now + seconds
        while (when := self.timers.deadline()) is not None and when <= end:
            self.now = max(self.now, when)
            self.flush()
        self.now = end

    def challenges(self, address: Address = NEW) -> list[bytes]:
        """The tokens that were sent there."""
        return [
            payload[1 : 1 + TOKEN_BYTES]
            for kind, payload, to in self.sent
            if kind == wire.MESSAGE and to == address and payload[0] == CHALLENGE
        ]

    def answer(self, token: bytes, kind: int = ANSWER, *, by_initiator: bool = True) -> bytes:
        return module._seal(kind, token, handshake(is_initiator=by_initiator))

    def doubtful(self) -> Stream:
        """A stream whose home has been silent for a while, and a stray."""
        stream = self.stream()
        self.wait(1.0)
        self.give(stream, wire.DATA, b"stray")
        return stream


@pytest.fixture
def world() -> World:
    return World()


def test_a_peer_that_answers_the_challenge_is_followed(world: World) -> None:
    stream = world.doubtful()
    assert not stream.readable
    assert world.mux.stats.strays == 1
    # Both are asked: home by a packet that everybody answers.
    assert (wire.HEARTBEAT, b"", HOME) in world.sent
    (token,) = world.challenges()
    world.now += 0.01
    world.give(stream, wire.MESSAGE, world.answer(token))
    assert stream.address == HOME
    world.wait(SOON)
    assert stream.address == NEW
    assert world.moved == [(KEY, (0, HOME), (0, NEW))]
    assert world.sent[-1] == (wire.ACK, b"", NEW)
    assert len(world.moves) == 0
    world.give(stream, wire.DATA, b"heard")
    assert b"".join(stream.read()) == b"heard"


def test_all_streams_of_the_peer_that_had_the_same_home_move(world: World) -> None:
    same, elsewhere, other = world.stream(), world.stream(home=FAR), world.stream(bytes(32))
    stream = world.doubtful()
    world.give(stream, wire.MESSAGE, world.answer(world.challenges()[0]))
    world.wait(SOON)
    assert [each.address for each in (stream, same, elsewhere, other)] == [NEW, NEW, FAR, HOME]


def test_home_outweighs_a_proof(world: World) -> None:
    stream = world.doubtful()
    world.now += 0.01
    world.give(stream, wire.MESSAGE, world.answer(world.challenges()[0]))
    world.give(stream, wire.ACK, source=HOME)
    world.wait(10)
    assert stream.address == HOME
    assert not world.moved


def test_as_long_as_home_is_heard_nobody_is_asked(world: World) -> None:
    stream = world.stream()
    for _ in range(100):
        world.wait(0.02)
        world.give(stream, wire.ACK, source=HOME)
        world.give(stream, wire.DATA, b"stray")
    assert not world.challenges()
    assert wire.HEARTBEAT not in [kind for kind, _, _ in world.sent]
    assert not stream.readable


def test_doubts_come_at_most_so_often(world: World) -> None:
    stream = world.stream()
    seconds, answered, asked = 20.0, 0, 0
    for _ in range(int(seconds / 0.01)):
        world.wait(0.01)
        world.give(stream, wire.DATA, b"stray")
        asked = [kind for kind, _, _ in world.sent].count(wire.HEARTBEAT)
        if asked > answered:
            answered = asked
            world.now += 0.001
            world.give(stream, wire.ACK, source=HOME)
    assert 2 < asked <= seconds / REST + 1
    assert stream.address == HOME


@pytest.mark.parametrize(
    "wrong",
    ["other token", "reflected", "own direction", "from elsewhere", "another session", "too soon"],
)
def test_what_is_no_proof(world: World, wrong: str) -> None:
    stream = world.doubtful()
    (token,) = world.challenges()
    payload, source = world.answer(token), NEW
    match wrong:
        case "other token":
            payload = world.answer(bytes(TOKEN_BYTES))
        case "reflected":
            payload = next(each for kind, each, _ in world.sent if kind == wire.MESSAGE)
        case "own direction":
            payload = world.answer(token, by_initiator=False)
        case "from elsewhere":
            source = FAR
        case "another session":
            other = handshake(is_initiator=True, session=1)
            payload = module._seal(ANSWER, token, other)
        case "too soon":
            payload = world.answer(token, CHALLENGE)
    world.give(stream, wire.MESSAGE, payload, source=source)
    world.wait(PATIENCE + 1)
    assert stream.address == HOME
    assert len(world.moves) == 0


def test_challenges_are_answered_at_home_only(world: World) -> None:
    stream = world.stream()
    token = bytes(range(TOKEN_BYTES))
    challenge = world.answer(token, CHALLENGE)
    world.give(stream, wire.MESSAGE, challenge, source=HOME)
    kind, payload, address = world.sent[-1]
    assert (kind, address) == (wire.MESSAGE, HOME)
    assert payload[: 1 + TOKEN_BYTES] == bytes((ANSWER,)) + token
    assert not stream.messages
    before = len(world.sent)
    world.wait(1.0)
    world.give(stream, wire.MESSAGE, challenge, source=FAR)
    assert not any(payload[:1] == bytes((ANSWER,)) for _, payload, _ in world.sent[before:])


def test_other_messages_are_the_readers(world: World) -> None:
    stream = world.stream()
    world.give(stream, wire.MESSAGE, b"for the reader", source=HOME)
    world.give(stream, wire.MESSAGE, bytes((CHALLENGE,)) + bytes(32), source=HOME)
    assert list(stream.messages) == [b"for the reader", bytes((CHALLENGE,)) + bytes(32)]


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.binary(max_size=60), st.sampled_from([HOME, NEW]))
def test_arbitrary_messages_are_survived(payload: bytes, source: Address) -> None:
    world = World()
    stream = world.doubtful()
    world.give(stream, wire.MESSAGE, payload, source=source)
    world.wait(1)
    assert stream.address == HOME


def test_few_candidates_are_asked_and_silent_ones_make_room(world: World) -> None:
    stream = world.doubtful()
    sources = [(f"9.9.9.{n}", 1) for n in range(20)]
    for source in sources:
        world.give(stream, wire.DATA, b"stray", source=source)
    asked = {address for kind, _, address in world.sent if kind == wire.MESSAGE}
    assert len(asked) == MAX_CANDIDATES
    world.wait(module.CANDIDATE_AGE)
    world.give(stream, wire.DATA, b"stray", source=FAR)
    assert world.challenges(FAR)


def test_doubts_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DOUBTS", 3)
    for n in range(5):
        stream = world.stream(bytes([n]) * 32)
        world.give(stream, wire.DATA, b"stray")
    assert len(world.moves) == 3


def test_a_port_of_zero_is_nobodys(world: World) -> None:
    stream = world.stream()
    world.wait(1)
    world.give(stream, wire.DATA, b"stray", source=("9.9.9.9", 0))
    world.wait(1)
    assert {address for _, _, address in world.sent} == {HOME}
    assert not stream.readable


def test_a_stream_that_closes_is_forgotten(world: World) -> None:
    stream = world.doubtful()
    stream.destroy(world.now)
    world.wait(1)
    assert len(world.moves) == 0
    assert not world.moves._handshakes
    assert not world.moves._streams


def test_before_the_peer_has_come_from_its_address_it_may_come_from_anywhere(world: World) -> None:
    stream = world.mux.create()
    stream.connect(0, 99, HOME, world.now)
    world.moves.watch(stream, handshake(is_initiator=False))
    world.give(stream, wire.DATA, b"asymmetric", source=NEW)
    assert stream.readable
    assert len(world.moves) == 0


class TestTrial:
    """Of peers that answer no challenge."""

    def test_what_is_written_from_there_proves_who_it_is(self, world: World) -> None:
        stream = world.doubtful()
        world.wait(TRIAL_AFTER)
        world.give(stream, wire.DATA, b"a message")
        assert b"".join(stream.read()) == b"a message"
        # So that the peer can go on, though it hears nothing else from us.
        assert (wire.ACK, NEW) in [each[::2] for each in world.sent[-2:]]
        stream.authentic += 1
        world.wait(3)
        assert stream.address == NEW

    def test_it_proves_nothing_that_it_is_no_message(self, world: World) -> None:
        stream = world.doubtful()
        world.wait(TRIAL_AFTER)
        world.give(stream, wire.DATA, b"half")
        world.wait(3)
        assert stream.address == HOME

    def test_nor_does_what_had_come_before(self, world: World) -> None:
        stream = world.stream()
        world.give(stream, wire.DATA, b"unread", source=HOME)
        world.wait(1.0)
        world.give(stream, wire.ACK)
        world.wait(TRIAL_AFTER)
        world.give(stream, wire.DATA, b"more", seq=1)
        assert b"".join(stream.read()) == b"unread"
        stream.authentic += 1
        world.wait(3)
        assert stream.address == HOME

    @pytest.mark.parametrize(
        ("kind", "seq"), [(wire.DESTROY, 0), (wire.DATA, TRIAL_REACH + 1), (wire.DATA, 2**31)]
    )
    def test_what_is_not_let_in(self, world: World, kind: int, seq: int) -> None:
        stream = world.doubtful()
        world.wait(TRIAL_AFTER)
        world.give(stream, kind, b"x" if kind == wire.DATA else b"", seq=seq)
        assert not stream.closed
        assert stream.heard_at < world.now

    def test_it_ends_when_home_is_heard(self, world: World) -> None:
        stream = world.doubtful()
        world.wait(TRIAL_AFTER)
        world.give(stream, wire.DATA, b"a message")
        stream.authentic += 1
        world.now += 0.001
        world.give(stream, wire.ACK, source=HOME)
        world.wait(3)
        assert stream.address == HOME

    def test_it_has_an_end(self, world: World) -> None:
        stream = world.doubtful()
        world.wait(TRIAL_AFTER)
        for seq in range(TRIAL_PACKETS + 10):
            world.give(stream, wire.DATA, b"x", seq=seq)
        assert len(b"".join(stream.read())) == TRIAL_PACKETS


def test_hesitation_is_longer_than_a_round_trip() -> None:
    """Or a path with jitter would never be in doubt."""
    assert HESITATION >= 2 * MIN_SILENCE
