"""Opening the NATs again between us and a peer that has fallen silent: one of them may have
forgotten us, and lets nobody in whom its own side has not sent anything since.

The way is that of a new connect, through the DHT to the peer, which punches. The stream that comes
of it is dropped without a word, so that no connection comes about at the other end; those that are
open go on where the NATs are open now (`moves`).
"""

from __future__ import annotations

from functools import partial

from ..errors import HyperseaportError
from ..keys import KeyPair
from ..udx.stream import Stream
from .connect import Attempt
from .context import MAX_REMEMBERED, Connection, Context
from .moves import Moves, Path

#: Seconds between two attempts for one peer. Its connections end after some 15 s of silence.
PAUSE = 4.0
#: Attempts at once: many peers fall silent together when it is our own NAT.
MAX_REOPENING = 64


class Reopener:
    """Only whoever has connected can do it: servers cannot call their clients."""

    __slots__ = ("_context", "_identities", "_moves", "_tried_at", "_trying")

    def __init__(self, context: Context, moves: Moves) -> None:
        self._context = context
        self._moves = moves
        # Who we are for the peers that we have connected to, the latest last.
        self._identities: dict[bytes, KeyPair] = {}
        self._tried_at: dict[bytes, float] = {}
        self._trying: dict[bytes, Attempt] = {}

    def __len__(self) -> int:
        """Attempts under way."""
        return len(self._trying)

    def remember(self, public_key: bytes, key_pair: KeyPair) -> None:
        """A connection was opened to this key, as that identity."""
        self._identities.pop(public_key, None)
        if len(self._identities) >= MAX_REMEMBERED:
            oldest = next(iter(self._identities))
            del self._identities[oldest]
            self._tried_at.pop(oldest, None)
        self._identities[public_key] = key_pair

    def silent(self, public_key: bytes, now: float) -> None:
        """Nothing was heard of a peer for longer than it is used to."""
        context, key_pair = self._context, self._identities.get(public_key)
        streams = self._moves.streams(public_key)
        if key_pair is None or not any(stream.origin is None for stream in streams):
            return
        if context.node.remote_address() is not None or len(self._trying) >= MAX_REOPENING:
            # What we are sent arrives, and what we send opens the other's NAT.
            return
        if any(attempt.public_key == public_key for attempt in context.attempts):
            return
        tried_at = self._tried_at.get(public_key)
        if tried_at is not None and now < tried_at + PAUSE:
            return
        self._tried_at[public_key] = now
        # It leads to where the peer was: what comes that way would be a connection at once.
        context.remember_route(public_key, None)
        attempt = self._trying[public_key] = Attempt(
            context,
            public_key,
            key_pair,
            relayable=False,
            on_open=self._opened,
            on_error=partial(self._failed, public_key),
        )
        try:
            attempt.start((), now)
        except HyperseaportError:
            self._trying.pop(public_key, None)

    def _opened(self, connection: Connection, now: float) -> None:
        public_key, there = connection.handshake.remote_public_key, connection.stream
        self._trying.pop(public_key, None)
        path = there.socket, there.address
        there.forget()
        # It does not lead where the streams are.
        self._context.remember_route(public_key, None)
        for stream in self._moves.streams(public_key):
            self._go_on(stream, path, now)

    def _failed(self, public_key: bytes, _error: Exception, _now: float) -> None:
        self._trying.pop(public_key, None)

    def _go_on(self, stream: Stream, path: Path, now: float) -> None:
        if stream.origin is not None:
            return
        if (stream.socket, stream.address) == path:
            # The peer learns from it where we are.
            stream.heartbeat(now)
        else:
            self._moves.consider(stream, path, now)
