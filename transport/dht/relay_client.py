"""What a node has to do with blind relays: connections to them, and the pairs that they make
(spec: hyperdht 5.8).

Whoever wants a pair names a relay by its key. All pairs at one relay share one connection, which is
kept for a while after the last of them: the next one then costs one round trip.

    connecting -> connected --idle, or nobody wants it--> closed
         `--------- lost: all its pairs end; one that is held is connected to again
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import inf
from random import Random
from typing import TYPE_CHECKING, Protocol

from ..errors import DecodeError, HyperseaportError, ProtocolError
from ..protomux import MAX_FRAME, ChannelClosed, ChannelMessage, Protomux, ProtomuxFailure
from ..secret_stream import KEEP_ALIVE_INTERVAL, SecretStream
from ..transmit import Address
from ..udx.stream import Stream
from . import blind_relay
from .blind_relay import PAIR_SECONDS, PROTOCOL
from .timers import Timer, Timers

if TYPE_CHECKING:
    from .context import Connection

#: Seconds without a word from a relay after which it is gone: three keep-alives.
SILENCE = 3 * KEEP_ALIVE_INTERVAL
#: Seconds that a connection is kept after its last pair.
LINGER = 60.0
#: Seconds that a relay has for ending a connection that we have ended.
FAREWELL = 5.0
#: Seconds until a relay that is held is connected to again, at first and at last.
RETRY_FIRST = 1.0
RETRY_LAST = 60.0
#: Seconds for which a relay that could not be reached is not chosen, if there is another one.
AVOID = 30.0
#: Relays that a node is connected with at once. Peers name them, and each takes a connect.
MAX_RELAYS = 64
#: Pairs at one relay, those that wait for the other end included.
MAX_PAIRS = 4096
#: Bytes taken from a connection at a time.
_READ = MAX_FRAME


class Dial(Protocol):
    """Connects to a relay as to any server, and through no other relay."""

    def __call__(
        self,
        public_key: bytes,
        now: float,
        *,
        on_open: Callable[[Connection, float], None],
        on_error: Callable[[Exception, float], None],
    ) -> Cancellable: ...


class Cancellable(Protocol):
    def cancel(self, now: float) -> None: ...


@dataclass(slots=True)
class Stats:
    """Counted since the start."""

    #: Streams that began through a relay, and those of them that went on without.
    opened: int = 0
    upgraded: int = 0
    #: Pairs that did not come about, and those that a limit of ours forbade.
    failed: int = 0
    dropped: int = 0


class Pair:
    """Two streams that a relay joins: ours, and that of whoever knows the same token.

    ``on_paired(socket, relay's address, remote id, now)`` is called once, and then, or instead of
    it, ``on_lost(reason, now)`` at most once. After `release` neither is.
    """

    __slots__ = (
        "_link",
        "initiator",
        "on_lost",
        "on_paired",
        "paired",
        "stream_id",
        "timer",
        "token",
    )

    def __init__(
        self,
        link: _Link,
        token: bytes,
        *,
        initiator: bool,
        stream_id: int,
        on_paired: Callable[[int, Address, int, float], None],
        on_lost: Callable[[str, float], None],
    ) -> None:
        self._link = link
        self.token = token
        self.initiator = initiator
        self.stream_id = stream_id
        self.on_paired = on_paired
        self.on_lost = on_lost
        #: The relay has both ends.
        self.paired = False
        self.timer: Timer | None = None

    def carries(self, socket: int, source: Address) -> bool:
        """Whether a packet on a socket of ours comes from the relay."""
        stream = self._link.stream
        return stream is not None and (stream.socket, stream.address) == (socket, source)

    def release(self, now: float) -> None:
        """The relay shall forget it. Harmless twice."""
        self._link.release(self, now)


class Relays:
    """All of a node's connections to blind relays."""

    __slots__ = ("_failed_at", "_held", "_links", "_over", "dial", "rng", "stats", "timers")

    def __init__(self, timers: Timers, rng: Random) -> None:
        self.timers = timers
        self.rng = rng
        #: How a relay is connected to; None for not at all.
        self.dial: Dial | None = None
        self.stats = Stats()
        self._links: dict[bytes, _Link] = {}
        # Keys that shall stay connected, and for how many.
        self._held: dict[bytes, int] = {}
        self._failed_at: dict[bytes, float] = {}
        # What is to be done as soon as the time is known.
        self._over: list[Callable[[float], None]] = []

    def __len__(self) -> int:
        """Relays that are connected, or being connected to."""
        return len(self._links)

    @property
    def pairs(self) -> int:
        """Pairs that there are or will be."""
        return sum(len(link.pairs) for link in self._links.values())

    def choose(self, keys: Iterable[bytes], now: float) -> bytes | None:
        """One of several relays: at random among those that are connected, else among those that
        did not fail of late, else among all. None if there is none."""
        keys = tuple(keys)
        live = [key for key in keys if key in self._links and self._links[key].stream is not None]
        well = [key for key in keys if now - self._failed_at.get(key, -inf) >= AVOID]
        candidates = live or well or keys
        return self.rng.choice(candidates) if candidates else None

    def hold(self, key: bytes, now: float) -> None:
        """Stay connected with a relay, and come back to it when it was gone."""
        self._held[key] = self._held.get(key, 0) + 1
        self._link(key, now)

    def let_go(self, key: bytes) -> None:
        """The opposite of one `hold`."""
        left = self._held.get(key, 0) - 1
        if left > 0:
            self._held[key] = left
        else:
            self._held.pop(key, None)

    def held(self, key: bytes) -> bool:
        return key in self._held

    def pair(
        self,
        key: bytes,
        token: bytes,
        now: float,
        *,
        initiator: bool,
        stream_id: int,
        on_paired: Callable[[int, Address, int, float], None],
        on_lost: Callable[[str, float], None],
    ) -> Pair | None:
        """Have the relay with this key join our stream with that of whoever has the same 32-byte
        token and the other flag; see `Pair`. No callback comes before this returns. None beyond the
        limits."""
        link = self._link(key, now)
        if link is None or token in link.pairs or len(link.pairs) >= MAX_PAIRS:
            self.stats.dropped += 1
            return None
        pair = Pair(
            link,
            token,
            initiator=initiator,
            stream_id=stream_id,
            on_paired=on_paired,
            on_lost=on_lost,
        )
        link.add(pair, now)
        return pair

    def pump(self, now: float) -> None:
        """Take what relays have sent. To be called before anything is sent."""
        if self._over:
            over, self._over = self._over, []
            for each in over:
                each(now)
        if self._links:
            for link in list(self._links.values()):
                stream = link.stream
                if stream and (stream.readable or stream.remote_ended or stream.closed):
                    link.read(stream, now)

    def soon(self, what: Callable[[float], None]) -> None:
        """Call ``what(now)`` at the next `pump`."""
        self._over.append(what)

    def woke_up(self, now: float) -> None:
        """Time has passed in which nobody could hear."""
        for link in self._links.values():
            link.heard_at = now

    def close(self, now: float) -> None:
        """End all connections; the pairs end with them, silently."""
        self._held.clear()
        for link in list(self._links.values()):
            link.close(now)

    def _link(self, key: bytes, now: float) -> _Link | None:
        link = self._links.get(key)
        if link is None and self.dial is not None and len(self._links) < MAX_RELAYS:
            link = self._links[key] = _Link(self, key, now)
            link.connect(self.dial, now)
        return link

    def forget(self, link: _Link, now: float, *, failed: bool) -> None:
        """A connection is over."""
        self._links.pop(link.key, None)
        if not failed:
            return
        if len(self._failed_at) >= MAX_RELAYS:
            del self._failed_at[next(iter(self._failed_at))]
        self._failed_at.pop(link.key, None)
        self._failed_at[link.key] = now
        if link.key in self._held:
            wait = min(RETRY_FIRST * 2**link.failures, RETRY_LAST)
            self.timers.at(now + wait, partial(self._retry, link.key, link.failures + 1))

    def _retry(self, key: bytes, failures: int, now: float) -> None:
        if key in self._held and key not in self._links:
            link = self._link(key, now)
            if link is not None:
                link.failures = failures


class _Link:
    """The connection to one relay."""

    __slots__ = (
        "_attempt",
        "_channel",
        "_mux",
        "_relays",
        "_secret",
        "_timer",
        "_written_at",
        "failures",
        "heard_at",
        "key",
        "pairs",
        "stream",
        "used_at",
    )

    def __init__(self, relays: Relays, key: bytes, now: float) -> None:
        self._relays = relays
        self.key = key
        self.pairs: dict[bytes, Pair] = {}
        #: Connects in a row that have led nowhere.
        self.failures = 0
        #: None until it is connected.
        self.stream: Stream | None = None
        #: Silence counts from here at the earliest.
        self.heard_at = now
        #: When it last had a pair.
        self.used_at = now
        self._attempt: Cancellable | None = None
        self._secret: SecretStream | None = None
        self._mux = Protomux()
        self._channel = 0
        self._written_at = now
        self._timer: Timer | None = None

    def connect(self, dial: Dial, now: float) -> None:
        try:
            self._attempt = dial(self.key, now, on_open=self._opened, on_error=self._unreachable)
        except HyperseaportError as error:
            # A key that cannot be one, or a limit of the node.
            self._relays.soon(partial(self._unreachable, error))

    def _opened(self, connection: Connection, now: float) -> None:
        self._attempt = None
        self.failures = 0
        self.heard_at = now
        self.stream = connection.stream
        self._secret = SecretStream(connection.handshake, self._relays.rng, max_message=MAX_FRAME)
        self.stream.write(self._secret.start(), now)
        self._channel = self._mux.open(PROTOCOL, connection.handshake.public_key)
        for pair in self.pairs.values():
            self._ask(pair)
        self._flush(now)
        self._timer = self._relays.timers.at(now + KEEP_ALIVE_INTERVAL, self._look)

    def _unreachable(self, error: Exception, now: float) -> None:
        self._attempt = None
        self._fail(f"cannot be met at its relay: {error}", now)

    # Pairs

    def add(self, pair: Pair, now: float) -> None:
        self.pairs[pair.token] = pair
        pair.timer = self._relays.timers.at(now + PAIR_SECONDS, partial(self._expire, pair))
        if self.stream is not None:
            self._ask(pair)
            self._flush(now)

    def release(self, pair: Pair, now: float) -> None:
        if self.pairs.get(pair.token) is not pair:
            return
        self._drop(pair, now)
        if self.stream is not None:
            self._mux.send(
                self._channel, blind_relay.UNPAIR, blind_relay.Unpair(pair.token).encode()
            )
            self._flush(now)

    def _ask(self, pair: Pair) -> None:
        message = blind_relay.Pair(pair.initiator, pair.token, pair.stream_id)
        self._mux.send(self._channel, blind_relay.PAIR, message.encode())

    def _drop(self, pair: Pair, now: float) -> None:
        del self.pairs[pair.token]
        self.used_at = now
        if pair.timer is not None:
            pair.timer.cancel()
            pair.timer = None

    def _expire(self, pair: Pair, now: float) -> None:
        pair.timer = None
        self.release(pair, now)
        self._relays.stats.failed += 1
        pair.on_lost("does not come to the relay", now)

    # What the relay says

    def read(self, stream: Stream, now: float) -> None:
        """Take what has arrived."""
        secret = self._secret
        if secret is None:
            return
        try:
            for chunk in stream.read(_READ):
                stream.credit(len(chunk), now)
                for message in secret.receive(chunk):
                    self._on_message(message, now)
        except ProtocolError as error:
            self._fail(f"is out of reach: its relay sent what nobody understands: {error}", now)
            return
        if stream.closed or stream.remote_ended:
            self._fail("is out of reach: its relay has gone", now)
        elif self.stream is not None:
            self._flush(now)

    def _on_message(self, message: bytes, now: float) -> None:
        for event in self._mux.receive(message):
            if isinstance(event, ProtomuxFailure):
                raise event.error
            if isinstance(event, ChannelClosed):
                raise ProtocolError("it relays nothing" if event.rejected else "it has stopped")
            if isinstance(event, ChannelMessage):
                self._on_told(event, now)

    def _on_told(self, event: ChannelMessage, now: float) -> None:
        try:
            told = blind_relay.decode(event.type, event.payload)
        except DecodeError as error:
            raise ProtocolError(str(error)) from error
        if not isinstance(told, blind_relay.Pair) or self.stream is None:
            return
        pair = self.pairs.get(told.token)
        if pair is None or pair.paired or pair.initiator != told.is_initiator:
            return
        pair.paired = True
        if pair.timer is not None:
            pair.timer.cancel()
            pair.timer = None
        pair.on_paired(self.stream.socket, self.stream.address, told.id, now)

    # Life

    def close(self, now: float) -> None:
        """End it in good order; nobody is told."""
        self._abandon(now)
        self._relays.forget(self, now, failed=False)
        stream, self.stream = self.stream, None
        if stream is None or stream.closed:
            return
        self._mux.close(self._channel)
        self._send(stream, now)
        stream.end(now)
        # Whatever it sends meanwhile is nobody's.
        self._relays.timers.at(now + FAREWELL, stream.destroy)

    def _fail(self, reason: str, now: float) -> None:
        self._abandon(now)
        self._relays.forget(self, now, failed=True)
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.destroy(now)
        for pair in list(self.pairs.values()):
            self._drop(pair, now)
            self._relays.stats.failed += not pair.paired
            pair.on_lost(reason, now)

    def _abandon(self, now: float) -> None:
        if self._attempt is not None:
            self._attempt.cancel(now)
            self._attempt = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, now: float) -> None:
        """Once an interval: whether anybody needs it, and whether the relay lives."""
        stream, secret = self.stream, self._secret
        if stream is None or secret is None:
            return
        if now - max(self.heard_at, stream.heard_at) >= SILENCE:
            self._fail("is out of reach: its relay does not answer any more", now)
            return
        held = bool(self.pairs) or self._relays.held(self.key)
        if not held and now - self.used_at >= LINGER:
            self.close(now)
            return
        if now - self._written_at >= KEEP_ALIVE_INTERVAL and not stream.closed:
            for frame in secret.keep_alive():
                stream.write(frame, now)
            self._written_at = now
        self._timer = self._relays.timers.at(now + KEEP_ALIVE_INTERVAL, self._look)

    def _flush(self, now: float) -> None:
        if self.stream is not None:
            self._send(self.stream, now)

    def _send(self, stream: Stream, now: float) -> None:
        secret = self._secret
        if secret is None or stream.closed:
            return
        for message in self._mux.messages():
            for frame in secret.encrypt(message):
                stream.write(frame, now)
            self._written_at = now
