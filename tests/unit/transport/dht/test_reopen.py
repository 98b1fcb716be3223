from __future__ import annotations

from random import Random
from typing import Any

import pytest
from support.dht_fakes import MINE, FakeNode, context

from hyperseaport.transport.dht import reopen as module
from hyperseaport.transport.dht.connect import Attempt
from hyperseaport.transport.dht.context import MAX_REMEMBERED, Route
from hyperseaport.transport.dht.moves import Moves
from hyperseaport.transport.dht.reopen import PAUSE, Reopener
from hyperseaport.transport.keys import KeyPair
from hyperseaport.transport.noise import Handshake
from hyperseaport.transport.transmit import Address
from hyperseaport.transport.udx.stream import Stream

OURS = KeyPair.from_seed(bytes([1]) * 32)
HOME: Address = ("6.0.0.1", 1000)


def nothing(*_: Any) -> None:
    """Nobody waits for it."""


def peer(number: int) -> bytes:
    return KeyPair.from_seed(bytes([number]) * 32).public_key


KEY = peer(2)


class Fixture:
    def __init__(self) -> None:
        self.node = FakeNode()
        self.context = context(self.node)
        self.moves = Moves(self.node.timers, Random(1), lambda *_: None)
        self.reopener = Reopener(self.context, self.moves)
        self.reopener.remember(KEY, OURS)

    def stream(self, key: bytes = KEY) -> Stream:
        stream = self.context.mux.create()
        stream.connect(0, 99, HOME, self.node.now)
        secret = bytes(32)
        self.moves.watch(stream, Handshake(True, secret, secret, bytes(64), secret, key))
        return stream

    def silent(self, key: bytes = KEY) -> None:
        self.reopener.silent(key, self.node.now)

    @property
    def attempts(self) -> list[Attempt]:
        return list(self.context.attempts)


@pytest.fixture
def fixture() -> Fixture:
    return Fixture()


def test_a_silent_peer_is_tried_once_in_a_while(fixture: Fixture) -> None:
    fixture.stream()
    fixture.context.remember_route(KEY, Route(0, HOME, punched=True))
    fixture.silent()
    fixture.silent()
    (attempt,) = fixture.attempts
    assert attempt.public_key == KEY
    assert len(fixture.reopener) == 1
    # It led to where the peer was.
    assert KEY not in fixture.context.routes
    attempt.cancel(fixture.node.now)
    fixture.node.wait(PAUSE - 0.1)
    fixture.silent()
    assert not fixture.attempts
    fixture.node.wait(0.2)
    fixture.silent()
    assert len(fixture.attempts) == 1


def test_an_attempt_that_fails_leaves_nothing_behind(fixture: Fixture) -> None:
    stream = fixture.stream()
    fixture.silent()
    fixture.node.wait(60)
    assert not fixture.attempts
    assert len(fixture.reopener) == 0
    assert len(fixture.context.mux) == 1
    assert stream.address == HOME


@pytest.mark.parametrize(
    "case", ["we are open", "they have called us", "no connection", "through a relay", "connecting"]
)
def test_when_there_is_nothing_to_be_done(fixture: Fixture, case: str) -> None:
    key = KEY
    if case == "no connection":
        fixture.silent(KEY)
        assert not fixture.attempts
        return
    if case == "they have called us":
        key = peer(3)
    stream = fixture.stream(key)
    if case == "we are open":
        fixture.node.public = MINE
    if case == "through a relay":
        stream.origin = HOME
    if case == "connecting":
        attempt = Attempt(fixture.context, KEY, OURS, on_open=nothing, on_error=nothing)
        attempt.start((), fixture.node.now)
    fixture.silent(key)
    assert len(fixture.attempts) == (case == "connecting")
    assert len(fixture.reopener) == 0


def test_what_is_remembered_and_done_at_once_is_bounded(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2 * MAX_REMEMBERED):
        fixture.reopener.remember(number.to_bytes(32, "big"), OURS)
    assert len(fixture.reopener._identities) == MAX_REMEMBERED
    monkeypatch.setattr(module, "MAX_REOPENING", 3)
    for number in range(10, 15):
        fixture.reopener.remember(peer(number), OURS)
        fixture.stream(peer(number))
        fixture.silent(peer(number))
    assert len(fixture.attempts) == 3
