from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import load

from hyperseaport.transport.dht import relay_server
from hyperseaport.transport.dht.blind_relay import (
    PAIR,
    PAIR_SECONDS,
    PROTOCOL,
    UNPAIR,
    Pair,
    Unpair,
)
from hyperseaport.transport.dht.relay_server import (
    IDLE,
    LINGER,
    LOOK,
    MAX_REQUESTS,
    REQUESTS_PER_SECOND,
    SESSIONS_PER_KEY,
    SILENCE,
    RelayControl,
    RelayLimits,
    RelayServer,
    RelaySession,
)
from hyperseaport.transport.protomux import ChannelMessage, ChannelOpened, Protomux
from hyperseaport.transport.transmit import Address
from hyperseaport.transport.udx.forward import MIN_BURST
from hyperseaport.transport.udx.mux import Mux
from hyperseaport.transport.udx.packet import DATA, Packet, decode, encode

RECORDED = load("hyperdht")["blindRelayProtomux"]
ALICE, BOB, EVE = (bytes((number,)) * 32 for number in (1, 2, 3))
AT: dict[bytes, tuple[int, Address]] = {
    ALICE: (0, ("10.0.0.1", 1001)),
    BOB: (1, ("10.0.0.2", 1002)),
    EVE: (0, ("10.0.0.3", 1003)),
}
HOST = "10.0.0.9"
TOKEN = bytes(range(32))
#: What Alice and Bob call their own streams.
ALICES, BOBS = 77, 88


class Relay:
    """A relay, and peers that ask it by name of their key."""

    def __init__(
        self, limits: RelayLimits | None = None, allow: frozenset[bytes] | None = None
    ) -> None:
        self.mux = Mux(Random(1))
        self.server = RelayServer(self.mux.forwarder, limits, allow)
        self.now = 0.0
        #: Sessions that the relay has ended.
        self.over: list[RelaySession] = []

    def open(self, key: bytes) -> RelaySession:
        session = self.server.open(key, AT.get(key, AT[EVE])[1][0], self.now)
        assert session is not None
        return session

    def ask(
        self, session: RelaySession, flag: bool, identifier: int, token: bytes = TOKEN
    ) -> list[tuple[RelaySession, Pair]]:
        socket, address = AT[session.public_key]
        request = Pair(flag, token, identifier)
        return self.server.receive(session, request, socket, address, self.now)

    def unpair(self, session: RelaySession, token: bytes = TOKEN) -> None:
        socket, address = AT[session.public_key]
        assert self.server.receive(session, Unpair(token), socket, address, self.now) == []

    def pair(self, one: RelaySession, other: RelaySession, token: bytes = TOKEN) -> list[int]:
        """Our ids of both legs."""
        assert self.ask(one, True, ALICES, token) == []
        return [answer.id for _, answer in self.ask(other, False, BOBS, token)]

    def wait(self, seconds: float) -> None:
        """Let time pass, deadline by deadline."""
        until = self.now + seconds
        while (due := self.server.deadline()) is not None and due <= until:
            self.now = due
            self.over += self.server.on_deadline(due)
            again = self.server.deadline()
            assert again is None or again > due
        self.now = until

    def passes(self, leg: int, sender: bytes) -> list[tuple[Address, int]]:
        """Where a packet for a leg leaves to, and under which id."""
        socket, address = AT[sender]
        self.mux.receive(encode(Packet(DATA, leg, 1, 2, 3, b"x")), socket, address, self.now)
        return [
            (transmit.address, decode(bytes(transmit.buffers[0])).id)
            for transmit in self.mux.transmits(self.now)
        ]

    @property
    def counts(self) -> tuple[int, int, int, int]:
        server = self.server
        return server.keys, server.sessions, server.waiting, server.pairs


def test_two_halves_make_a_pair() -> None:
    relay = Relay()
    alice, bob = relay.open(ALICE), relay.open(BOB)
    assert relay.ask(alice, True, ALICES) == []
    assert relay.counts == (2, 2, 1, 0)
    answers = relay.ask(bob, False, BOBS)
    assert [(session, pair.is_initiator, pair.token) for session, pair in answers] == [
        (alice, True, TOKEN),
        (bob, False, TOKEN),
    ]
    assert relay.counts == (2, 2, 0, 1)
    alices, bobs = (pair.id for _, pair in answers)
    # Before Bob has sent anything, to where his session comes from.
    assert relay.passes(alices, ALICE) == [(AT[BOB][1], BOBS)]
    assert relay.passes(bobs, BOB) == [(AT[ALICE][1], ALICES)]
    assert relay.passes(bobs, EVE) == []


def test_the_order_and_one_session_for_both_do_not_matter() -> None:
    relay = Relay()
    alice, bob = relay.open(ALICE), relay.open(BOB)
    relay.ask(bob, False, BOBS)
    assert [session for session, _ in relay.ask(alice, True, ALICES)] == [bob, alice]
    other = bytes(32)
    assert relay.ask(alice, True, 5, other) == []
    assert len(relay.ask(alice, False, 6, other)) == 2
    relay.server.close(bob, relay.now)
    relay.server.close(alice, relay.now)
    assert relay.counts == (0, 0, 0, 0)


def test_a_second_half_with_the_same_flag_is_ignored() -> None:
    relay = Relay()
    alice, bob, eve = relay.open(ALICE), relay.open(BOB), relay.open(EVE)
    relay.ask(alice, True, ALICES)
    assert relay.ask(eve, True, 666) == []
    assert relay.ask(alice, True, 667) == []
    answers = relay.ask(bob, False, BOBS)
    assert [session for session, _ in answers] == [alice, bob]
    assert relay.passes(answers[1][1].id, BOB) == [(AT[ALICE][1], ALICES)]
    assert relay.server.stats.ignored == 2


def test_another_token_is_another_pair() -> None:
    relay = Relay()
    alice, eve = relay.open(ALICE), relay.open(EVE)
    relay.ask(alice, True, ALICES)
    assert relay.ask(eve, False, 666, bytes(32)) == []
    assert relay.counts == (2, 2, 2, 0)


def test_a_half_waits_for_a_while() -> None:
    relay = Relay()
    alice, bob = relay.open(ALICE), relay.open(BOB)
    relay.ask(alice, True, ALICES)
    relay.wait(1)
    relay.ask(alice, True, ALICES, bytes(32))
    relay.wait(PAIR_SECONDS - 1)
    assert relay.counts == (2, 2, 1, 0)
    assert relay.ask(bob, False, BOBS) == []
    relay.wait(PAIR_SECONDS)
    assert relay.counts == (2, 2, 0, 0)
    assert relay.server.stats.expired == 3


def test_an_unpair_takes_back_ones_own_half_only() -> None:
    relay = Relay()
    alice, bob, eve = relay.open(ALICE), relay.open(BOB), relay.open(EVE)
    relay.ask(alice, True, ALICES)
    relay.unpair(eve)
    assert relay.server.waiting == 1
    relay.unpair(alice)
    assert relay.server.waiting == 0
    legs = relay.pair(alice, bob)
    relay.unpair(eve)
    assert relay.server.pairs == 1
    relay.unpair(bob)
    assert relay.counts == (3, 3, 0, 0)
    assert [relay.passes(leg, ALICE) for leg in legs] == [[], []]
    assert relay.server.stats.cancelled == 1


def test_a_pair_outlives_one_session_for_a_while() -> None:
    relay = Relay()
    alice, bob = relay.open(ALICE), relay.open(BOB)
    leg = relay.pair(alice, bob)[1]
    relay.server.close(alice, relay.now)
    relay.server.close(alice, relay.now)
    # What is left of it still counts.
    assert relay.counts == (2, 1, 0, 1)
    relay.wait(LINGER - 0.1)
    assert relay.passes(leg, BOB) == [(AT[ALICE][1], ALICES)]
    relay.wait(0.1)
    assert relay.passes(leg, BOB) == []
    assert relay.counts == (1, 1, 0, 0)
    relay.server.close(bob, relay.now)
    relay.wait(LOOK)
    assert relay.counts == (0, 0, 0, 0)
    assert relay.server.deadline() is None


def test_a_pair_does_not_outlive_both_sessions() -> None:
    relay = Relay()
    alice, bob = relay.open(ALICE), relay.open(BOB)
    legs = relay.pair(alice, bob)
    for session in (alice, bob):
        relay.server.close(session, relay.now)
    assert [relay.passes(leg, BOB) for leg in legs] == [[], []]
    assert relay.counts == (0, 0, 0, 0)


def test_a_session_that_is_over_asks_for_nothing() -> None:
    relay = Relay()
    alice, bob = relay.open(ALICE), relay.open(BOB)
    relay.ask(alice, True, ALICES)
    relay.server.close(alice, relay.now)
    assert relay.ask(alice, True, ALICES) == []
    assert relay.ask(bob, False, BOBS) == []
    assert relay.counts == (1, 1, 1, 0)


def test_silence_ends_a_pair() -> None:
    relay = Relay()
    alice, bob = relay.open(ALICE), relay.open(BOB)
    legs = relay.pair(alice, bob)
    for _ in range(5):
        relay.wait(SILENCE - 1)
        assert relay.passes(legs[0], ALICE) != []
    relay.wait(SILENCE + LOOK)
    assert relay.counts == (2, 2, 0, 0)
    assert relay.server.stats.silent == 1


def test_an_idle_session_is_over_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_server, "CROWDED", 0)
    relay = Relay()
    idle, alice, bob = relay.open(EVE), relay.open(ALICE), relay.open(BOB)
    leg = relay.pair(alice, bob)[0]
    for _ in range(3):
        relay.wait(IDLE / 2)
        assert relay.passes(leg, ALICE) != []
    assert relay.over == [idle]
    assert relay.server.stats.idle == 1
    relay.unpair(alice)
    relay.wait(IDLE - LOOK)
    relay.ask(alice, True, ALICES)
    relay.wait(2 * LOOK)
    assert relay.over == [idle, bob]
    relay.wait(IDLE + LOOK)
    assert relay.over == [idle, bob, alice]
    relay.wait(LOOK)
    assert relay.server.deadline() is None


def test_the_oldest_idle_sessions_are_over_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_server, "CROWDED", 2)
    relay = Relay()
    sessions = [relay.open(key) for key in (ALICE, BOB, EVE, ALICE)]
    relay.wait(IDLE + 2 * LOOK)
    assert relay.over == sessions[:2]


def test_only_those_on_the_list() -> None:
    relay = Relay(allow=frozenset({ALICE}))
    relay.open(ALICE)
    assert relay.server.open(EVE, HOST, 0.0) is None
    assert (relay.server.stats.accepted, relay.server.stats.refused) == (1, 1)


def test_sessions_per_key() -> None:
    relay = Relay(RelayLimits(sessions_per_key=2))
    first = relay.open(ALICE)
    relay.open(ALICE)
    assert relay.server.open(ALICE, HOST, 0.0) is None
    relay.open(BOB)
    relay.server.close(first, 0.0)
    relay.open(ALICE)
    assert SESSIONS_PER_KEY > 2


def test_sessions_per_host_where_everybody_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_server, "SESSIONS_PER_HOST", 2)
    relay = Relay()
    first = relay.server.open(ALICE, HOST, 0.0)
    assert first is not None
    assert relay.server.open(BOB, HOST, 0.0) is not None
    assert relay.server.open(EVE, HOST, 0.0) is None
    assert relay.server.open(EVE, "10.0.0.8", 0.0) is not None
    relay.server.close(first, 0.0)
    assert relay.server.open(EVE, HOST, 0.0) is not None

    known = Relay(allow=frozenset({ALICE, BOB, EVE}))
    for key in (ALICE, BOB, EVE):
        assert known.server.open(key, HOST, 0.0) is not None


def test_hosts_without_sessions_are_forgotten() -> None:
    relay = Relay()
    for session in [relay.open(key) for key in (ALICE, BOB, EVE, ALICE)]:
        relay.server.close(session, 0.0)
    assert not relay.server._hosts


def test_sessions_and_keys_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_server, "MAX_SESSIONS", 2)
    monkeypatch.setattr(relay_server, "MAX_KEYS", 3)
    relay = Relay()
    opened = [relay.open(key) for key in (ALICE, BOB)]
    assert relay.server.open(EVE, HOST, 0.0) is None
    for session in opened:
        relay.server.close(session, 0.0)
    relay.server.close(relay.open(EVE), 0.0)
    # Known until the next look.
    assert relay.server.open(bytes(32), HOST, 0.0) is None
    relay.open(ALICE)
    relay.wait(LOOK)
    relay.open(bytes(32))


def test_pairs_per_session_and_key() -> None:
    relay = Relay(RelayLimits(pairs_per_session=5, pairs_per_key=7))
    alice, bob, again = relay.open(ALICE), relay.open(BOB), relay.open(ALICE)
    tokens = [bytes((number,)) * 32 for number in range(9)]
    for token in tokens[:3]:
        relay.pair(alice, bob, token)
    for token in tokens[3:6]:
        relay.ask(alice, True, ALICES, token)
    assert relay.counts == (2, 3, 2, 3)
    for token in tokens[6:]:
        relay.ask(again, True, ALICES, token)
    assert relay.counts == (2, 3, 4, 3)
    assert relay.server.stats.ignored == 2
    relay.unpair(alice, tokens[0])
    relay.unpair(alice, tokens[3])
    relay.ask(alice, True, ALICES, tokens[5])
    relay.ask(again, True, ALICES, tokens[8])
    relay.ask(again, True, ALICES, tokens[0])
    assert relay.counts == (2, 3, 5, 2)
    assert relay.server.stats.ignored == 3
    relay.server.close(alice, relay.now)
    relay.server.close(again, relay.now)
    relay.server.close(bob, relay.now)
    assert not any(user.pairs for user in relay.server._users.values())


def test_pairs_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_server, "MAX_PAIRS", 3)
    relay = Relay()
    alice, bob, eve = relay.open(ALICE), relay.open(BOB), relay.open(EVE)
    relay.pair(alice, bob)
    for number in range(5):
        relay.ask(eve, True, 666, bytes((number,)) * 32)
    assert relay.counts == (3, 3, 2, 1)


def test_a_key_has_one_allowance_for_all_its_sessions_even_new_ones() -> None:
    relay = Relay(RelayLimits(rate=1000.0))
    bob = relay.open(BOB)
    first = relay.open(ALICE)
    leg = relay.pair(first, bob)[0]
    packet = encode(Packet(DATA, leg, 1, 2, 3, bytes(1000)))
    for _ in range(MIN_BURST // len(packet)):
        relay.mux.receive(packet, *AT[ALICE], relay.now)
    assert relay.mux.forwarder.stats.dropped == 0
    relay.mux.receive(packet, *AT[ALICE], relay.now)
    assert relay.mux.forwarder.stats.dropped == 1
    relay.server.close(first, relay.now)
    relay.wait(LINGER + LOOK)
    again = relay.pair(relay.open(ALICE), bob, bytes(32))[0]
    relay.mux.transmits(relay.now)
    passed = 0
    while relay.passes(again, ALICE):
        passed += 21
    assert passed <= (LINGER + LOOK) * 1000 + len(packet)


def test_clear_ends_all_pairs() -> None:
    relay = Relay()
    leg = relay.pair(relay.open(ALICE), relay.open(BOB))[0]
    relay.server.clear()
    assert relay.passes(leg, ALICE) == []


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["open", "close", "pair", "unpair", "wait"]),
        st.integers(0, 2),
        st.integers(0, 3),
        st.booleans(),
    ),
    max_size=80,
)


@given(STEPS)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_the_books_always_balance(steps: list[tuple[str, int, int, bool]]) -> None:
    relay = Relay(RelayLimits(sessions_per_key=2, pairs_per_session=3, pairs_per_key=4))
    sessions: list[RelaySession] = []
    for action, who, number, flag in steps:
        if action == "open":
            opened = relay.server.open((ALICE, BOB, EVE)[who], HOST, relay.now)
            sessions += [] if opened is None else [opened]
        elif action == "wait":
            relay.wait(number * 7.0)
        elif sessions:
            session = sessions[number * 3 % len(sessions)]
            if action == "close":
                relay.server.close(session, relay.now)
                sessions.remove(session)
            elif action == "pair":
                relay.ask(session, flag, 5, bytes((who,)) * 32)
            else:
                relay.unpair(session, bytes((who,)) * 32)
        legs = relay.mux.forwarder.legs
        assert len(legs) == 2 * relay.server.pairs
        sessions = [session for session in sessions if session not in relay.over]
        assert relay.server.sessions == len(sessions)
    for session in sessions:
        relay.server.close(session, relay.now)
    relay.wait(LINGER + SILENCE + 2 * LOOK)
    assert relay.counts == (0, 0, 0, 0)
    assert not relay.mux.forwarder.legs
    assert relay.server.deadline() is None
    assert not relay.server._users


# The control session


def client(key: bytes = ALICE) -> tuple[RelayControl, Protomux, int]:
    """The relay's end of a session, and the peer's, opened by both."""
    control, mux = RelayControl(key, 0.0), Protomux()
    channel = mux.open(PROTOCOL, key)
    for message in control.messages():
        assert mux.receive(message) == [ChannelOpened(channel)]
    return control, mux, channel


def test_requests_and_answers() -> None:
    control, mux, channel = client()
    mux.send(channel, PAIR, Pair(True, TOKEN, 5).encode())
    mux.send(channel, UNPAIR, Unpair(TOKEN).encode())
    mux.send(channel, 7, b"of a later version")
    requests = [each for message in mux.messages() for each in control.receive(message, 0.0)]
    assert requests == [Pair(True, TOKEN, 5), Unpair(TOKEN)]
    control.answer(Pair(True, TOKEN, 6))
    (answer,) = control.messages()
    assert mux.receive(answer) == [ChannelMessage(channel, PAIR, Pair(True, TOKEN, 6).encode())]
    assert not control.over


def test_the_recorded_session() -> None:
    key = bytes.fromhex(RECORDED["channelId"])
    control = RelayControl(key, 0.0)
    frames = [bytes.fromhex(frame) for frame in RECORDED["frames"]]
    requests = [each for frame in frames for each in control.receive(frame, 0.0)]
    assert [type(each) for each in requests] == [Pair, Unpair]
    assert control.over
    assert control.error is None
    control.answer(Pair(True, TOKEN, 6))


def test_a_channel_of_another_key_is_rejected() -> None:
    control, mux = RelayControl(ALICE, 0.0), Protomux()
    channel = mux.open(PROTOCOL, BOB)
    mux.send(channel, PAIR, Pair(True, TOKEN, 5).encode())
    assert [control.receive(message, 0.0) for message in mux.messages()] == [[], []]


@pytest.mark.parametrize("frame", [b"\x00", b"\x01\x00short"])
def test_nonsense_ends_the_session(frame: bytes) -> None:
    control, mux, channel = client()
    for message in mux.messages():
        control.receive(message, 0.0)
    assert channel == 1
    assert control.receive(frame, 0.0) == []
    assert control.over
    assert control.error is not None
    mux.send(channel, PAIR, Pair(True, TOKEN, 5).encode())
    assert control.receive(mux.messages()[0], 0.0) == []


def test_too_many_requests_end_the_session() -> None:
    control, mux, channel = client()
    now, taken = 0.0, 0
    for message in mux.messages():
        control.receive(message, now)
    while not control.over:
        mux.send(channel, UNPAIR, Unpair(TOKEN).encode())
        taken += len(control.receive(mux.messages()[0], now))
        now += 0.5 / REQUESTS_PER_SECOND
    assert taken == pytest.approx(2 * MAX_REQUESTS, abs=2)
    assert control.error is not None


@given(st.lists(st.binary(max_size=60), max_size=20))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_survives_arbitrary_messages(messages: list[bytes]) -> None:
    control, mux, _ = client()
    for message in mux.messages():
        control.receive(message, 0.0)
    for message in messages:
        for data in (message, b"\x01\x00" + message):
            control.receive(data, 0.0)
            control.messages()
