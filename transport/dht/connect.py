"""Connecting to a key (spec: hyperdht 5.1-5.3).

    route -> handshake: `lanes`
          -> decide:    server answered itself       connect to it from the same socket
                        server says it is OPEN       connect to its public address
                        else                         look for a path: `approach`; meanwhile through
                                                     a blind relay, if either side names one

The stream exists before the answer does, as its bytes often come first; UDX keeps them. One that
runs through a relay is a connection as any other; it leaves the relay when there is a path.
"""

from __future__ import annotations

from collections.abc import Callable

from .. import keys
from ..errors import ConnectError, DecodeError, PeerNotFound, PeerUnreachable
from ..keys import KeyPair
from ..noise import Handshake, Initiator
from ..transmit import Address
from ..udx.stream import Stream
from .addresses import is_private
from .approach import Approach, public
from .context import Connection, Context, Route, admit
from .lanes import Lanes
from .messages import VERSION, Firewall, NoisePayload, PeerError, RelayThrough, UdxInfo
from .relay_client import Pair
from .relayed import Relayed
from .timers import Timer
from .timings import How, Timings
from .wire import Reply

#: Seconds after which an attempt fails whatever it waits for. Each wait has its own limit; this one
#: is for what their sum may become in a network that is half dead.
CONNECT_TIMEOUT = 30.0
#: Seconds for which a stream that runs through a relay looks for a path: several searches through a
#: random NAT, with the pauses between them.
UPGRADE_WAIT = 120.0

_TOKEN_BYTES = 32


class Attempt:
    """One connect, from `HyperDHT.connect`. Exactly one of its callbacks is called, unless it is
    cancelled before."""

    __slots__ = (
        "_answered_at",
        "_asked_at",
        "_began_at",
        "_context",
        "_deadline",
        "_early",
        "_initiator",
        "_lanes",
        "_offered",
        "_on_error",
        "_on_open",
        "_pair",
        "_paired",
        "_peer",
        "_reason",
        "_relayed",
        "_stream",
        "_timer",
        "approach",
        "done",
        "public_key",
        "relayable",
    )

    def __init__(
        self,
        context: Context,
        public_key: bytes,
        key_pair: KeyPair,
        *,
        relayable: bool = True,
        on_open: Callable[[Connection, float], None],
        on_error: Callable[[Exception, float], None],
    ) -> None:
        """``relayable``: a blind relay may be named, by the server if not here."""
        self._context = context
        self.public_key = public_key
        self.relayable = relayable
        self._on_open = on_open
        self._on_error = on_error
        self._initiator = Initiator(
            key_pair,
            public_key,
            prologue=keys.NS_PEER_HANDSHAKE,
            ephemeral_seed=context.rng.randbytes(keys.SEED_BYTES),
        )
        self._stream = context.mux.create()
        self._stream.firewall = self._on_packet
        # When it began, when the node was asked that brought the answer, and when that came.
        self._began_at = self._asked_at = self._answered_at = 0.0
        # Where the server's first packet came from, if that was before its answer.
        self._early: Route | None = None
        self._lanes = Lanes(
            context,
            public_key,
            keys.target(public_key),
            self._initiator,
            on_answer=self._on_server,
            on_silence=self._on_silence,
        )
        # When it fails whatever it waits for; the timer begins with the answer.
        self._deadline = 0.0
        self._timer: Timer | None = None
        # The server, once it has answered: its handshake, stream and flag.
        self._peer: tuple[Handshake, UdxInfo] | None = None
        # The relay that we have named; the pair that is wanted there or at the server's, and where
        # it is if it came before the answer; the stream once it runs through it.
        self._offered: RelayThrough | None = None
        self._pair: Pair | None = None
        self._paired: tuple[int, Address, int] | None = None
        self._relayed: Relayed | None = None
        # Why there is no direct path, as long as a relay is hoped for.
        self._reason = ""
        #: The search for a direct path, once the server has answered.
        self.approach: Approach | None = None
        #: Opened directly, failed, cancelled, or with nothing left to be found.
        self.done = False

    def start(
        self,
        relay_addresses: tuple[Address, ...],
        now: float,
        *,
        relay_through: tuple[bytes, ...] = (),
    ) -> None:
        """Begin. Raises `InvalidInput` for a key that no peer can have, after which the attempt is
        over and no callback comes."""
        context = self._context
        self._began_at = now
        if relay_through and context.node.remote_address() is None:
            self._offer(relay_through, now)
        try:
            offer = context.offer(self._stream.local_id, through=self._offered)
            noise = self._initiator.message(offer)
        except BaseException:
            self.cancel(now)
            raise
        context.attempts.add(self)
        self._deadline = now + CONNECT_TIMEOUT
        self._lanes.start(noise, relay_addresses, self._deadline, now)
        if self._offered is not None and self._lanes.routed is None and not self.done:
            # The server does the same as soon as it has our message: when its answer is here, the
            # stream may begin.
            self._pair_at(self._offered, True, now)

    def cancel(self, now: float) -> None:
        """Give up, silently, what is not opened; what is opened through a relay stays there.
        Harmless when it is over."""
        if not self.done:
            self._finish(now)
            if self._relayed is None:
                self._stream.destroy(now)

    # The answer

    def _on_server(
        self,
        plain: bytes,
        handshake: Handshake,
        server: Address | None,
        reply: Reply,
        now: float,
    ) -> None:
        """The server has answered; through a relay of the DHT if that gives its address."""
        try:
            payload = NoisePayload.decode(plain)
        except DecodeError as error:
            self._fail(ConnectError(f"{self._name} sent a broken handshake: {error}"), now)
            return
        if payload.version != VERSION:
            text = f"{self._name} speaks version {payload.version}, not {VERSION}: update one side"
            self._fail(ConnectError(text), now)
            return
        if payload.error or payload.udx is None:
            refusal = _refusal(payload.error, handshake.public_key)
            self._fail(ConnectError(f"{self._name} {refusal}"), now)
            return
        self._peer = handshake, payload.udx
        self._asked_at, self._answered_at = now - reply.waited, now
        context = self._context
        context.remember_relays(self.public_key, payload.relay_addresses or (reply.source,))
        if self._early is not None:
            self._open(self._early.socket, self._early.address, False, now)
        elif server is None:
            self._open(reply.socket, reply.source, False, now)
        elif payload.firewall == Firewall.OPEN:
            address = public(payload.addresses4) or server
            self._open(context.node.current_socket, address, False, now)
        else:
            self._timer = context.node.timers.at(self._deadline, self._on_timeout)
            self._ask_relay(payload.relay_through, now)
            self.approach = Approach(
                context,
                self.public_key,
                keys.target(self.public_key),
                patient=self._pair is not None,
                on_path=self._open,
                on_fail=self._on_no_path,
            )
            self.approach.start(payload, handshake, server, reply, now)
            if self._paired is not None and not self.done:
                self._on_paired(*self._paired, now)

    def _on_packet(self, _stream: Stream, socket: int, source: Address, now: float) -> bool:
        """The server's first packet, from wherever. It is kept even before the answer is here."""
        if self._pair is not None and self._pair.carries(socket, source):
            # It was faster than the relay's word that we are paired.
            return True
        if self._peer is not None:
            self._open(socket, source, False, now)
        elif self._early is None:
            self._early = Route(socket, source)
        return True

    # Through a blind relay

    def _offer(self, relays: tuple[bytes, ...], now: float) -> None:
        relay = self._context.blind.choose(relays, now)
        if relay is not None and self.relayable:
            self._offered = RelayThrough(relay, self._context.rng.randbytes(_TOKEN_BYTES))

    def _ask_relay(self, named: RelayThrough | None, now: float) -> None:
        """The server has answered, and may have named a relay. Its choice wins."""
        if not self.relayable or self._context.node.remote_address() is not None:
            return
        if named is not None:
            if self._pair is not None:
                self._pair.release(now)
            self._paired = None
            self._pair_at(named, False, now)
        elif self._pair is None and self._offered is not None:
            self._pair_at(self._offered, True, now)

    def _pair_at(self, through: RelayThrough, ours: bool, now: float) -> None:
        """Have the relay pair our stream with the server's."""
        self._pair = self._context.blind.pair(
            through.public_key,
            through.token,
            now,
            initiator=ours,
            stream_id=self._stream.local_id,
            on_paired=self._on_paired,
            on_lost=self._on_unpaired,
        )

    def _on_paired(self, socket: int, address: Address, relay_id: int, now: float) -> None:
        if self._pair is None:
            return
        if self._peer is None:
            self._paired = socket, address, relay_id
            return
        if self._stream.closed:
            self._fail_closed(now)
            return
        handshake, udx = self._peer
        pair, self._pair = self._pair, None
        self._relayed = Relayed(
            self._context,
            self._stream,
            udx.id,
            pair,
            on_direct=self._on_direct,
            on_over=self._finish,
        )
        self._relayed.open(socket, address, relay_id, now)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        timings = self._timings("relayed", now)
        if self.approach is None or self.approach.done:
            self._finish(now)
        else:
            self._timer = self._context.node.timers.at(now + UPGRADE_WAIT, self._finish)
        self._on_open(Connection(self._stream, handshake, address, timings), now)

    def _on_unpaired(self, reason: str, now: float) -> None:
        self._pair = self._paired = self._offered = None
        if self._peer is None:
            return
        if self.approach is None or self.approach.done:
            direct = self._reason or "answers, but is not reached directly"
            self._fail(PeerUnreachable(f"{self._name} {direct}; and it {reason}"), now)

    def _on_direct(self, socket: int, now: float) -> None:
        """The stream has left the relay."""
        self._finish(now, socket)

    # The end

    def _open(self, socket: int, address: Address, punched: bool, now: float) -> None:
        sockets = self._context.punches.sockets
        if self.done or self._peer is None:
            sockets.close(socket)
            return
        handshake, udx = self._peer
        if self._relayed is not None:
            self._remember(udx, socket, address, punched)
            if not self._relayed.move(socket, address, now):
                sockets.close(socket)
                self._finish(now)
            return
        self._finish(now, socket)
        if self._stream.closed:
            sockets.close(socket)
            self._fail_closed(now)
            return
        self._remember(udx, socket, address, punched)
        sockets.hold(socket, self._stream, now)
        self._stream.firewall = admit
        self._stream.connect(socket, udx.id, address, now)
        timings = self._timings(self._how(address, punched), now)
        self._on_open(Connection(self._stream, handshake, address, timings), now)

    def _how(self, address: Address, punched: bool) -> How:
        known = self._lanes.routed
        if punched:
            return "punched"
        if known is not None and known.address == address:
            return "remembered"
        return "local" if is_private(address[0]) else "direct"

    def _timings(self, how: How, now: float) -> Timings:
        lookup = self._asked_at - self._began_at
        handshake = self._answered_at - self._asked_at
        return Timings(lookup, handshake, now - self._answered_at, how)

    def _remember(self, udx: UdxInfo, socket: int, address: Address, punched: bool) -> None:
        if udx.reusable_socket:
            known = self._lanes.routed
            punched = punched or (known is not None and known.punched and known.address == address)
            self._context.remember_route(self.public_key, Route(socket, address, punched))

    def _on_no_path(self, reason: str, now: float) -> None:
        """There is no direct one. A relay may still do."""
        self._reason = reason
        if self._relayed is not None:
            self._finish(now)
        elif self._pair is None:
            self._fail(PeerUnreachable(f"{self._name} {reason}"), now)

    def _on_silence(self, now: float) -> None:
        if self._lanes.announced:
            text = f"{self._name} is announced but does not answer: is its program running?"
            self._fail(PeerUnreachable(text), now)
        else:
            text = f"nobody announces {self._name}: check the key, and that its program runs"
            self._fail(PeerNotFound(text), now)

    def _on_timeout(self, now: float) -> None:
        reason = self._reason or "answers, but no path to it was found in time"
        self._fail(PeerUnreachable(f"{self._name} {reason}"), now)

    def _fail_closed(self, now: float) -> None:
        self._fail(PeerUnreachable(f"{self._name} closed the connection at once: try again"), now)

    def _fail(self, error: Exception, now: float) -> None:
        self._finish(now)
        self._stream.destroy(now)
        self._on_error(error, now)

    def _finish(self, now: float, keep: int | None = None) -> None:
        """Look for nothing more; ``keep`` is the socket that the stream goes on with."""
        self.done = True
        self._context.attempts.discard(self)
        self._lanes.cancel()
        if self._pair is not None:
            self._pair.release(now)
            self._pair = None
        if self.approach is not None:
            self.approach.cancel(now, keep)
            self.approach = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def _name(self) -> str:
        return self.public_key.hex()


def _refusal(error: int, public_key: bytes) -> str:
    """What it means that the server gives this `PeerError` instead of a stream."""
    if error == PeerError.ABORTED:
        return f"refuses this key, {public_key.hex()}: ask whoever runs it to allow that"
    return f"refused the handshake with error {error}"
