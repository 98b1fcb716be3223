"""A stream that runs through a blind relay, until its two ends meet directly (spec: hyperdht 5.8).

through the relay --a path is found, or the peer has found one--> direct
                  <-- what is sent there is not acknowledged --'    |
                                  the relay is told to forget it <--'
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import StreamReset
from ..transmit import Address
from ..udx.stream import Stream
from .context import Context, admit
from .relay_client import Pair
from .timers import Timer

#: Seconds until what was sent through the relay is repeated, as long as nothing has come back, the
#: factor by which each wait is longer than the one before, and when the stream's own timeout has to
#: do. A relay loses what comes before the first packet of the other end (spec: hyperdht 5.8), which
#: may be there at the same moment or a round trip later.
REPEAT_FIRST = 0.004
REPEAT_GROWTH = 1.5
REPEAT_UNTIL = 1.5
#: Seconds after which a new path is shown to the peer again, until it comes back on it.
SHOWN = (0.05, 0.2, 0.6, 1.5)
#: Seconds for which the relay must have brought nothing before it is told to forget the stream:
#: what the peer sent through it before it had noticed is repeated through it (spec: udx 2.8).
QUIET = 5.0
#: Seconds without a sign of life on a new path, nor of what was sent there, until the stream goes
#: back to the relay.
PROVEN = 2.0
#: Seconds between two looks while the stream changes over.
_LOOK = 1.0


class Relayed:
    """Begins with `open`, ends by itself. ``on_direct(socket, now)`` is called when the stream has
    a direct path, ``on_over(now)`` when it needs the relay no more, or is closed."""

    __slots__ = (
        "_context",
        "_left",
        "_moved_at",
        "_on_direct",
        "_on_over",
        "_pair",
        "_peer_id",
        "_proven",
        "_relay",
        "_relay_heard_at",
        "_repeat",
        "_repeat_until",
        "_shown",
        "_stayed",
        "_stream",
        "_timer",
    )

    def __init__(
        self,
        context: Context,
        stream: Stream,
        peer_id: int,
        pair: Pair,
        *,
        on_direct: Callable[[int, float], None],
        on_over: Callable[[float], None],
    ) -> None:
        """``peer_id`` is the number of the peer's own stream."""
        self._context = context
        self._stream = stream
        self._peer_id = peer_id
        self._pair = pair
        self._on_direct = on_direct
        self._on_over = on_over
        # Socket, address and number at the relay.
        self._relay: tuple[int, Address, int] = (0, ("", 0), 0)
        self._relay_heard_at = 0.0
        self._repeat = REPEAT_FIRST
        self._repeat_until = 0.0
        # When it left the relay, what it had sent by then, and how often it has shown the new path
        # to the peer.
        self._moved_at = 0.0
        self._left = 0
        self._proven = False
        self._shown = 0
        # A path that led nowhere is not tried again.
        self._stayed = False
        self._timer: Timer | None = None

    def open(self, socket: int, address: Address, relay_id: int, now: float) -> None:
        """The relay has paired: connect."""
        stream = self._stream
        self._relay = socket, address, relay_id
        stream.relayed = True
        stream.origin = address
        stream.firewall = self._on_packet
        stream.on_close = self._on_close
        self._pair.on_lost = self._on_lost
        self._context.punches.sockets.hold(socket, stream, now)
        stream.connect(socket, relay_id, address, now)
        self._context.blind.stats.opened += 1
        self._repeat_until = now + REPEAT_UNTIL
        self._at(now + self._repeat, self._say_again)

    def move(self, socket: int, address: Address, now: float) -> bool:
        """A direct path has been found: take it. False if there is nothing to move."""
        stream = self._stream
        if stream.closed or not stream.relayed or self._stayed:
            return False
        self._relay_heard_at = stream.heard_at
        self._moved_at = now
        self._left = stream.departed
        stream.relayed = False
        stream.origin = address
        stream.change_remote(socket, self._peer_id, address, now)
        self._context.punches.sockets.hold(socket, stream, now)
        self._context.blind.stats.upgraded += 1
        # The peer sees the path by it, also when there is nothing else to say (spec: hyperdht 5.8).
        stream.send_message(b"", now)
        stream.repeat(now)
        self._shown = 0
        self._at(now + SHOWN[0], self._show)
        self._on_direct(socket, now)
        return True

    # Through the relay

    def _say_again(self, now: float) -> None:
        if self._stream.has_received or self._stream.closed or now >= self._repeat_until:
            self._timer = None
            return
        self._stream.repeat(now)
        self._repeat *= REPEAT_GROWTH
        self._at(now + self._repeat, self._say_again)

    def _on_packet(self, _stream: Stream, socket: int, source: Address, now: float) -> bool:
        """One that does not come the way that the stream takes."""
        if (socket, source) == self._relay[:2]:
            self._relay_heard_at = now
        elif self._stream.relayed and self.move(socket, source, now):
            self._proven = True
        return True

    # Changing over

    def _show(self, now: float) -> None:
        stream = self._stream
        if stream.closed or stream.relayed:
            return
        self._shown += 1
        stream.send_message(b"", now)
        if self._unanswered:
            stream.repeat(now)
        if self._shown < len(SHOWN) and (self._unanswered or not self._heard()):
            self._at(self._moved_at + SHOWN[self._shown], self._show)
        else:
            self._at(now + _LOOK, self._look)

    def _heard(self) -> bool:
        """The peer has come, or come back, on the direct path."""
        if self._stream.heard_at > max(self._moved_at, self._relay_heard_at):
            self._proven = True
        return self._proven

    @property
    def _unanswered(self) -> bool:
        """Something waits for an acknowledgement, and nothing got any that left directly."""
        stream = self._stream
        return stream.unacked > 0 and stream.acknowledged <= self._left

    def _look(self, now: float) -> None:
        stream = self._stream
        if stream.closed or stream.relayed:
            return
        if self._heard() and now - max(self._relay_heard_at, self._moved_at) >= QUIET:
            self._settle(now)
            return
        if self._unanswered and not self._heard() and now - self._moved_at >= PROVEN:
            self._return(now)
            return
        self._at(now + _LOOK, self._look)

    def _settle(self, now: float) -> None:
        """Nobody uses the relay any more."""
        stream = self._stream
        stream.origin = None
        stream.firewall = admit
        stream.on_close = None
        self._over(now)

    def _return(self, now: float) -> None:
        """The path leads nowhere, though something came from there."""
        stream = self._stream
        socket, address, relay_id = self._relay
        self._stayed = True
        self._timer = None
        stream.relayed = True
        stream.origin = address
        stream.change_remote(socket, relay_id, address, now)
        stream.repeat(now)
        self._context.blind.stats.upgraded -= 1

    # The end

    def _on_lost(self, _reason: str, now: float) -> None:
        """The relay is gone, and with it what it knew of the stream."""
        if self._stream.relayed:
            self._stream.fail(StreamReset("the blind relay has gone; connect again"), now)
        else:
            self._settle(now)

    def _on_close(self) -> None:
        self._context.blind.soon(self._over)

    def _over(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._pair.release(now)
        self._on_over(now)

    def _at(self, when: float, what: Callable[[float], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._context.node.timers.at(when, what)
