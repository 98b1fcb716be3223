"""A server's dealings with blind relays: which one, and how much (spec: hyperdht 4.2, 5.8)."""

from __future__ import annotations

from collections.abc import Callable

from ..transmit import Address
from ..udx.stream import Stream
from .context import Context
from .messages import RelayThrough
from .relay_client import Pair

#: Pairs that wait for their client, or carry its stream.
MAX_PAIRS = 2048

_TOKEN_BYTES = 32


class Relaying:
    """For one server. ``own`` are the keys of its relays, ``allowed`` those that it agrees to when
    a client names them; None agrees to all."""

    __slots__ = ("_allowed", "_context", "_held", "_own", "_pairs")

    def __init__(
        self, context: Context, own: tuple[bytes, ...], allowed: frozenset[bytes] | None
    ) -> None:
        self._context = context
        self._own = own
        self._allowed = allowed
        # We stay connected with our relays.
        self._held = False
        self._pairs: set[Pair] = set()

    def __len__(self) -> int:
        """Pairs that there are or will be."""
        return len(self._pairs)

    def hold(self, now: float) -> None:
        """The server is found from now on: clients shall not wait until we have found our relays.
        Twice is once; one that everybody reaches needs none."""
        if self._held or self._context.node.remote_address() is not None:
            return
        self._held = True
        for relay in self._own:
            self._context.blind.hold(relay, now)

    def let_go(self) -> None:
        """The server closes."""
        if self._held:
            for relay in self._own:
                self._context.blind.let_go(relay)
        self._held = False

    def choose(self, wanted: RelayThrough | None, now: float) -> tuple[RelayThrough | None, bool]:
        """The relay for a client that wants that one, and whether it is our choice, which wins."""
        own, allowed = self._own, self._allowed
        if self._context.node.remote_address() is not None:
            return None, False
        if wanted is not None and (
            allowed is None or wanted.public_key in allowed or wanted.public_key in own
        ):
            # It asks there already: to name another would cost it a round trip.
            return wanted, False
        key = self._context.blind.choose(own, now)
        if key is None:
            return None, False
        return RelayThrough(key, self._context.rng.randbytes(_TOKEN_BYTES)), True

    def pair(
        self,
        through: RelayThrough,
        ours: bool,
        stream: Stream,
        now: float,
        *,
        on_paired: Callable[[int, Address, int, float], None],
        on_lost: Callable[[str, float], None],
    ) -> Pair | None:
        """Have the relay join a stream with the client's (`Relays.pair`); None beyond the
        limits."""
        if len(self._pairs) >= MAX_PAIRS:
            return None
        pair = self._context.blind.pair(
            through.public_key,
            through.token,
            now,
            initiator=ours,
            stream_id=stream.local_id,
            on_paired=on_paired,
            on_lost=on_lost,
        )
        if pair is not None:
            self._pairs.add(pair)
        return pair

    def release(self, pair: Pair, now: float) -> None:
        """It is not needed any more, or lost. Harmless twice."""
        self._pairs.discard(pair)
        pair.release(now)
