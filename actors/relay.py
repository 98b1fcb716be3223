"""A blind relay: peers that cannot reach each other meet here.

The bytes that they exchange pass inside the endpoint (`transport.udx.forward`); the actors decide
who may meet, and keep the books of it (`transport.dht.relay_server`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass

from msgspec import Struct
from thespian.actors import ActorAddress

from ..transport.channel import Channel
from ..transport.dht.blind_relay import Pair, Unpair
from ..transport.dht.relay_server import RelayControl, RelayLimits, RelayServer, RelaySession
from ..transport.keys import KeyPair
from .actor import Actor, Down, ExitReason, handles
from .listener import Listener
from .messages import (
    BorrowForwarder,
    Describe,
    Described,
    ForwarderBorrowed,
    Listen,
    RelayAnswer,
    RelayAsk,
    RelayEnter,
    RelayListening,
    RelayRefused,
    RelayTaken,
)

#: Requests of one session that wait for the books, above which nothing more is read from its peer.
MAX_WAITING = 32
#: Bytes that a peer has not taken of what is said to it, above which its session is over: it gets
#: a hundred bytes for each of its requests.
MAX_UNWRITTEN = 64 * 1024


class BooksArgs(Struct, frozen=True):
    limits: RelayLimits
    #: Keys that may use the relay; None for everybody.
    allow: frozenset[bytes] | None


class _Due(Struct, frozen=True):
    at: float


class RelayBooks(Actor):
    """Who has a session, who waits for whom, and which pairs there are. Args: `BooksArgs`. Context:
    ``endpoint``. Ready when the endpoint passes packets on for it."""

    def on_start(self, args: BooksArgs) -> None:
        self._args = args
        self._server: RelayServer | None = None
        self._sessions: dict[ActorAddress, RelaySession] = {}
        self._addresses: dict[RelaySession, ActorAddress] = {}
        self._rings_at: float | None = None
        self.run(self.call(self.context["endpoint"], BorrowForwarder()), lambda answer: answer)

    @handles(ForwarderBorrowed)
    def _borrowed(self, message: ForwarderBorrowed, _sender: ActorAddress) -> None:
        self._forwarder = message.forwarder
        self._server = RelayServer(message.forwarder, self._args.limits, self._args.allow)
        self.own(self._server.clear)
        self.ready()

    @property
    def _books(self) -> RelayServer:
        if self._server is None:
            raise RuntimeError("the relay was asked before it was ready")
        return self._server

    @handles(RelayEnter)
    def _enter(self, message: RelayEnter, sender: ActorAddress) -> None:
        session = self._books.open(message.public_key, message.host, self.now)
        if session is None:
            self.send(sender, RelayRefused())
            return
        self._sessions[sender] = session
        self._addresses[session] = sender
        self.monitor(sender)
        self._arm()

    @handles(RelayAsk)
    def _ask(self, message: RelayAsk, sender: ActorAddress) -> None:
        session = self._sessions.get(sender)
        if session is None:
            # It was refused, and does not know yet.
            return
        answers = self._books.receive(
            session, message.request, message.socket, message.address, self.now
        )
        for who, pair in answers:
            self.send(self._addresses[who], RelayAnswer(pair))
        self.send(sender, RelayTaken())
        self._arm()

    @handles(Down)
    def _session_ended(self, message: Down, _sender: ActorAddress) -> None:
        session = self._sessions.pop(message.address)
        del self._addresses[session]
        self._books.close(session, self.now)
        self._arm()

    def _arm(self) -> None:
        due = self._books.deadline()
        if due is not None and (self._rings_at is None or due < self._rings_at):
            self._rings_at = due
            self.after(max(due - self.now, 0.0), _Due(due))

    @handles(_Due)
    def _due(self, message: _Due, _sender: ActorAddress) -> None:
        # Another one that is earlier may have been set after it.
        if message.at == self._rings_at:
            self._rings_at = None
            for session in self._books.on_deadline(self.now):
                self.send(self._addresses[session], RelayRefused())
            self._arm()

    @handles(Describe)
    def _describe(self, _message: Describe, sender: ActorAddress) -> None:
        fields: dict[str, object] = {}
        if self._server is not None:
            books, forwarded = self._server, self._forwarder.stats
            fields = {
                "sessions": books.sessions,
                "keys": books.keys,
                "waiting": books.waiting,
                "pairs": books.pairs,
                "bytes": forwarded.bytes,
                "dropped": forwarded.dropped,
                "strangers": forwarded.strangers,
                "counters": asdict(books.stats),
            }
        self.send(sender, Described(fields))


@dataclass(frozen=True, slots=True)
class ListenerArgs:
    key_pair: KeyPair
    #: Keys that may connect; None for everybody.
    allow: frozenset[bytes] | None


class RelayListener(Listener):
    """Listens under the relay's key, and makes each connection a session. Args: `ListenerArgs`.
    Context as of a `Listener`, with ``sessions``."""

    servers = "sessions"

    def on_start(self, args: ListenerArgs) -> None:
        self._args = args
        public_key = args.key_pair.public_key
        self.listen(
            Listen(args.key_pair, self.myAddress, args.allow),
            RelayListening(public_key, anybody=args.allow is None),
            SessionArgs,
        )

    @handles(Describe)
    def _describe(self, _message: Describe, sender: ActorAddress) -> None:
        args = self._args
        fields = {
            "public_key": args.key_pair.public_key.hex(),
            "allowed": None if args.allow is None else len(args.allow),
            **self._counts,
        }
        self.send(sender, Described(fields))


class SessionArgs(Struct, frozen=True):
    channel: Channel


class _Over(Struct, frozen=True):
    """Nothing more will come from the peer; why, unless it ended in order."""

    error: Exception | None


class RelaySessionActor(Actor):
    """The control session of one peer. Args: `SessionArgs`. Context: ``books``."""

    def on_start(self, args: SessionArgs) -> None:
        channel = args.channel
        self._stream = _ControlStream(channel, lambda event: self.send(self.myAddress, event))
        self._owned = self.own(self._stream.abort)
        _socket, (host, _port) = self._stream.peer
        self.send(self.context["books"], RelayEnter(channel.remote_public_key, host))
        self._stream.start()
        self.ready()

    def on_exit(self, reason: ExitReason) -> None:
        if reason.normal:
            self._owned.release()
            self._stream.close()

    @handles(Pair, Unpair)
    def _asked(self, request: Pair | Unpair, _sender: ActorAddress) -> None:
        socket, address = self._stream.peer
        self.send(self.context["books"], RelayAsk(request, socket, address))

    @handles(RelayTaken)
    def _taken(self, _message: RelayTaken, _sender: ActorAddress) -> None:
        self._stream.settled()

    @handles(RelayAnswer)
    def _answered(self, message: RelayAnswer, _sender: ActorAddress) -> None:
        self._stream.answer(message.pair)

    @handles(RelayRefused)
    def _refused(self, _message: RelayRefused, _sender: ActorAddress) -> None:
        # A reset, so that the peer need not wait for its pair in vain.
        self._owned.close()
        self.stop()

    @handles(_Over)
    def _over(self, message: _Over, _sender: ActorAddress) -> None:
        if message.error is not None:
            self.log.info("session.broken", error=str(message.error))
        self.stop()


class _ControlStream(asyncio.Protocol):
    """Hands to ``deliver`` what the peer asks for, and `_Over`."""

    def __init__(self, channel: Channel, deliver: Callable[[object], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._channel = channel
        self._control = RelayControl(channel.remote_public_key, self._loop.time())
        self._deliver: Callable[[object], None] | None = deliver
        self._waiting = 0

    @property
    def peer(self) -> tuple[int, tuple[str, int]]:
        """Our socket, and where the peer's packets come from."""
        stream = self._channel.stream
        return stream.socket, stream.address

    def start(self) -> None:
        """Take the channel over, say hello and begin to read."""
        self._channel.set_protocol(self)
        self._flush()
        # A channel that was lost before anybody had it does not say so a second time.
        if self._channel.is_closing():
            self.connection_lost(None)

    def answer(self, pair: Pair) -> None:
        self._control.answer(pair)
        self._flush()

    def settled(self) -> None:
        """One request was taken."""
        self._waiting -= 1
        if self._waiting == MAX_WAITING and self._deliver is not None:
            self._channel.resume_reading()

    def close(self) -> None:
        """End the connection in order, and deliver nothing more."""
        self._deliver = None
        self._channel.close()

    def abort(self) -> None:
        """Destroy the connection, and deliver nothing more."""
        self._deliver = None
        self._channel.abort()

    # What the channel calls. Nothing may be raised here: these are turns of its owner.

    def data_received(self, data: bytes) -> None:
        for request in self._control.receive(data, self._loop.time()):
            self._waiting += 1
            self._tell(request)
        if self._waiting > MAX_WAITING:
            self._channel.pause_reading()
        self._flush()
        if self._control.over:
            self._end(self._control.error)

    def eof_received(self) -> bool:
        self._end(None)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc)

    def _flush(self) -> None:
        for message in self._control.messages():
            self._channel.write(message)
        unwritten = self._channel.get_write_buffer_size()
        if unwritten > MAX_UNWRITTEN:
            self._channel.abort()

    def _end(self, error: Exception | None) -> None:
        self._tell(_Over(error))
        self._deliver = None

    def _tell(self, event: object) -> None:
        if self._deliver is not None:
            self._deliver(event)
