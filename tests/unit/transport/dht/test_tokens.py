"""Round-trip tokens."""

from __future__ import annotations

from random import Random

from vectors import load

from hyperseaport.transport.dht.tokens import ROTATION, Tokens

VECTOR = load("hyperdht")["tokens"]
HOST = VECTOR["host"]


class Secrets(Random):
    """Hands out the vectors' first two secrets."""

    def __init__(self) -> None:
        super().__init__(0)
        first = VECTOR["steps"][0]
        self.left = [bytes.fromhex(first["secret0"]), bytes.fromhex(first["secret1"])]

    def randbytes(self, n: int) -> bytes:
        return self.left.pop(0)


def test_issue_accept_and_rotate_as_recorded() -> None:
    tokens = Tokens(Secrets())
    start = 100.0
    for turn, step in enumerate(VECTOR["steps"]):
        now = start + turn * ROTATION
        issued = bytes.fromhex(step["issuedToken"])
        assert tokens.issue(HOST, now) == issued
        assert tokens.accepts(issued, HOST, now)
        assert tokens.accepts(bytes.fromhex(step["olderAcceptedToken"]), HOST, now)
        if turn >= 2:
            dead = bytes.fromhex(VECTOR["steps"][turn - 2]["issuedToken"])
            assert not tokens.accepts(dead, HOST, now)


def test_a_token_is_bound_to_the_host() -> None:
    tokens = Tokens(Secrets())
    other = VECTOR["otherHost"]
    assert tokens.issue(other["host"], 0.0).hex() == other["token"]
    assert not tokens.accepts(bytes.fromhex(other["token"]), HOST, 0.0)


def test_a_token_lives_for_one_to_two_rotations() -> None:
    tokens = Tokens(Random(1))
    tokens.issue(HOST, 0.0)
    late = tokens.issue(HOST, ROTATION - 0.01)
    assert tokens.accepts(late, HOST, 2 * ROTATION - 0.01)
    assert not tokens.accepts(late, HOST, 2 * ROTATION)


def test_long_idleness_costs_nothing_and_kills_old_tokens() -> None:
    tokens = Tokens(Random(1))
    old = tokens.issue(HOST, 0.0)
    assert not tokens.accepts(old, HOST, 1e9)
    assert tokens.accepts(tokens.issue(HOST, 1e9), HOST, 1e9)
