"""Round-trip tokens: proof that a requester receives at its host (spec: hyperdht 2.5)."""

from __future__ import annotations

from random import Random

from ..keys import blake2b

#: Seconds between two rotations, so that a token is valid for once to twice as long.
ROTATION = 7.5


class Tokens:
    """Two secrets that take turns. Rotations are made up for when a token is next needed: nothing
    ticks while nobody asks."""

    __slots__ = ("_rng", "_rotated", "_secrets")

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._secrets: tuple[bytes, bytes] | None = None
        self._rotated = 0.0

    def issue(self, host: str, now: float) -> bytes:
        """The 32-byte token for a dotted host."""
        return _token(self._current(now)[1], host)

    def accepts(self, token: bytes, host: str, now: float) -> bool:
        """Whether the token was issued to this host under one of the last two secrets."""
        older, newer = self._current(now)
        return token in (_token(newer, host), _token(older, host))

    def _current(self, now: float) -> tuple[bytes, bytes]:
        if self._secrets is None:
            self._secrets = self._rng.randbytes(32), self._rng.randbytes(32)
            self._rotated = now
        due = int((now - self._rotated) / ROTATION)
        if due > 0:
            self._rotated += due * ROTATION
            # Beyond a few rotations every older token is dead; the exact secrets do not matter.
            for _ in range(min(due, 4)):
                self._secrets = rotate(*self._secrets)
        return self._secrets


def rotate(older: bytes, newer: bytes) -> tuple[bytes, bytes]:
    """The pair of secrets that follows."""
    return newer, blake2b(older)


def _token(secret: bytes, host: str) -> bytes:
    return blake2b(host.encode(), key=secret)
