"""The client's side of a punch (spec: hyperdht 5.4, 5.5).

probe   open our NAT toward the server, and tell it so through its relay
          -> a server whose NAT is consistent punches at once: that is nearly always the end
settle  both classes have to be known, and not both random
punch   tell the server, through the relay of the handshake, that we punch, and do
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..errors import DecodeError
from ..noise import host_token, seal, unseal
from ..transmit import Address
from .context import Context
from .messages import (
    PEER_HOLEPUNCH,
    Firewall,
    HolepunchInfo,
    HolepunchMessage,
    HolepunchPayload,
    Mode,
    PeerError,
    Relay,
)
from .nat import UNKNOWN
from .punch import Puncher, Started
from .rpc import Pending
from .timers import Timer
from .wire import Reply

#: Seconds after which a message to the server is repeated, and how often: two seconds through one
#: relay, and two through another, are the four of the reference (spec: hyperdht 5.7), with shorter
#: steps as somebody waits.
REQUEST_TIMEOUT = 0.33
REQUEST_RETRIES = 5
#: Seconds that a server gets to find out about its NAT before it is asked again, if it did not know
#: the first time. The reference gives it one.
UNKNOWN_WAIT = 0.25
#: Seconds, at least and at most, until a search is tried again for which there was no turn, while a
#: stream through a blind relay needs it less (spec: hyperdht 5.5).
TURN_WAIT = (10.0, 20.0)
#: Answers that nobody could read, after which a message is not repeated any more.
MAX_UNREADABLE = 3

_NONCE_BYTES = 24
_SECRET_BYTES = 32


class ClientPunch:
    """Looks for a path to a server that has answered a handshake.

    One of ``on_path(socket, address, now)`` and ``on_fail(reason, now)`` is called once, unless it
    is cancelled; the reason continues a sentence that begins with the server's key. ``on_busy`` is
    called before ``on_fail`` when nothing but another search keeps it from searching: whoever
    returns True waits for that one's path and cancels this in the end. One that is ``patient`` does
    not ask: it waits for its turn.
    """

    __slots__ = (
        "_context",
        "_delayed",
        "_on_busy",
        "_on_fail",
        "_on_path",
        "_patient",
        "_pending",
        "_probes",
        "_puncher",
        "_relay",
        "_relays",
        "_rerouted",
        "_round",
        "_secret",
        "_server_relay",
        "_session",
        "_target",
        "_timer",
        "_token",
        "_token_secret",
        "_unreadable",
        "done",
        "server",
    )

    def __init__(
        self,
        context: Context,
        target: bytes,
        secret: bytes,
        info: HolepunchInfo,
        *,
        relay: Address,
        server: Address,
        patient: bool = False,
        on_path: Callable[[int, Address, float], None],
        on_fail: Callable[[str, float], None],
        on_busy: Callable[[str, float], bool],
    ) -> None:
        """``secret`` is the handshake's for punching (32 bytes). ``relay`` passed the handshake on;
        ``server`` is what it sees of the socket that the server punches from."""
        self._context = context
        self._target = target
        self._secret = secret
        self._session = info.id
        self._relay = relay
        self._relays = info.relays
        #: The server's punching socket, as the relay sees it.
        self.server = server
        self._server_relay = next(
            (each for each in info.relays if each.relay_address == relay), info.relays[0]
        )
        self._patient = patient
        self._on_path = on_path
        self._on_fail = on_fail
        self._on_busy = on_busy
        self._token_secret = context.rng.randbytes(_SECRET_BYTES)
        self._puncher: Puncher | None = None
        # What the server wants to have echoed.
        self._token: bytes | None = None
        self._round = 0
        self._probes = 0
        self._unreadable = 0
        # A relay has not answered: the current message goes through another one.
        self._rerouted = False
        # There was no turn for its search when the server was to be told of it.
        self._delayed = False
        self._pending: Pending | None = None
        self._timer: Timer | None = None
        #: Found, failed or cancelled.
        self.done = False

    def start(self, key: bytes, now: float) -> None:
        """Begin. Callbacks may come before this returns."""
        self._puncher = self._context.punches.create(
            key, on_path=self._found, on_exhausted=self._exhausted
        )
        if self._puncher is None:
            self._fail("is not connected to: too many connects look for a path, try later", now)
            return
        self._puncher.expect(self.server)
        self._probe(now)

    def cancel(self, now: float, keep: int | None = None) -> None:
        """Stop, silently; ``keep`` is a socket that is needed all the same. Harmless when it is
        over."""
        self._finish(now, keep)

    @property
    def searching(self) -> bool:
        """Whether it has the node's search through random NATs."""
        return self._puncher is not None and self._puncher.reserved

    # Probe

    def _probe(self, now: float) -> None:
        puncher = self._puncher
        if puncher is None:
            return
        self._probes += 1
        # What is known by now; the server does not need more to punch at once. Meanwhile the rest
        # is found out.
        puncher.analyse(now, lambda now: None)
        puncher.open(self.server, now)
        payload = self._payload(remote_address=self.server)
        self._tell(self._server_relay, payload, self._probed, now)

    def _probed(self, payload: HolepunchPayload, server: Address | None, now: float) -> None:
        puncher = self._puncher
        if puncher is None:
            return
        if payload.error:
            self._refused(payload.error, now)
            return
        puncher.learn(payload.firewall, payload.addresses or (), None)
        if payload.token is not None:
            self._token = payload.token
        moved = server is not None and server != self.server
        if moved and server is not None and self._server_relay.relay_address == self._relay:
            self.server = server
            puncher.expect(server)
            puncher.open(server, now)
        elif self.server in (payload.addresses or ()):
            # It has punched toward us, so its NAT is open; ours may have been too late for that.
            puncher.knock(self.server, now)
        puncher.analyse(now, self._analysed)

    def _analysed(self, now: float) -> None:
        puncher = self._puncher
        if puncher is None:
            return
        if not puncher.unstable:
            self._decide(now)
            return
        socket = puncher.socket

        def stabilised(now: float) -> None:
            if puncher.local.consistent and puncher.socket != socket and self._probes < 2:
                self._probe(now)
            else:
                self._decide(now)

        puncher.stabilise(now, stabilised)

    def _decide(self, now: float) -> None:
        puncher = self._puncher
        if puncher is None:
            return
        if puncher.both_random:
            self._give_up(
                "cannot be reached directly: both sides are behind NATs that use another port for "
                "every peer (open a UDP port on one side, or name a blind relay: --relay-through)",
                now,
            )
        elif puncher.local.firewall == Firewall.UNKNOWN:
            self._give_up(
                "cannot be reached: too few DHT nodes answered to find out about our own NAT "
                "(a private DHT needs at least 3)",
                now,
            )
        elif puncher.remote_firewall == Firewall.UNKNOWN or self._token is None:
            if self._probes < 2:
                self._timer = self._context.node.timers.at(now + UNKNOWN_WAIT, self._probe)
            elif puncher.remote_firewall == Firewall.UNKNOWN:
                self._give_up("cannot be reached: it does not know what its own NAT does", now)
            else:
                self._punch(now)
        else:
            self._punch(now)

    # Punch

    def _punch(self, now: float) -> None:
        puncher = self._puncher
        if puncher is None:
            return
        if puncher.searching and not puncher.reserve(now):
            if self._patient:
                self._wait_for_turn(now)
                return
            pause = self._context.punches.random_pause(now)
            reason = (
                "is behind a random NAT, or we are, and only one path at a time is searched "
                f"through those: try again in {max(1, round(pause))} s"
            )
            if not self._on_busy(reason, now):
                self._give_up(reason, now)
            return
        # The server's punching socket has a mapping toward this relay since the handshake; its NAT
        # may have forgotten it when that was a while ago.
        relay = self._server_relay if self._delayed else Relay(self._relay, self.server)
        token = None if self._delayed else self._own_token()
        payload = self._payload(punching=True, token=token, remote_token=self._token)
        self._tell(relay, payload, self._punched, now)

    def _wait_for_turn(self, now: float) -> None:
        """Try again in a while; the server proves where it is now, as it cannot do that later."""
        if self._puncher is not None:
            self._puncher.pass_on()
        rng, timers = self._context.rng, self._context.node.timers
        self._timer = timers.at(now + rng.uniform(*TURN_WAIT), self._punch)
        if not self._delayed:
            self._delayed = True
            payload = self._payload(settled=True, token=self._own_token(), remote_token=self._token)
            self._tell(Relay(self._relay, self.server), payload, self._updated, now)

    def _updated(self, payload: HolepunchPayload, _server: Address | None, now: float) -> None:
        if payload.error:
            self._refused(payload.error, now)
        else:
            self._learn(payload)

    def _learn(self, payload: HolepunchPayload) -> None:
        proven = payload.remote_token == self._own_token()
        if self._puncher is not None:
            self._puncher.learn(
                payload.firewall, payload.addresses or (), self.server[0] if proven else None
            )

    def _punched(self, payload: HolepunchPayload, _server: Address | None, now: float) -> None:
        puncher = self._puncher
        if puncher is None:
            return
        if payload.error:
            self._refused(payload.error, now)
            return
        if not payload.punching:
            self._give_up("answers, but does not punch", now)
            return
        self._learn(payload)
        match puncher.start(now):
            case Started.IMPOSSIBLE:
                self._give_up("answers, but did not prove where it is: try again", now)
            case Started.BUSY if self._patient:
                self._wait_for_turn(now)
            case Started.BUSY:
                self._give_up("has to wait for another search through a NAT: try again", now)

    def _exhausted(self, now: float) -> None:
        puncher = self._puncher
        if puncher is not None and puncher.searching:
            self._fail("answers, but no path was found through the random NAT: try again", now)
        else:
            self._fail("answers, but no packet gets through the NATs or firewalls between", now)

    # Messages

    def _payload(
        self,
        *,
        punching: bool = False,
        settled: bool = False,
        remote_address: Address | None = None,
        token: bytes | None = None,
        remote_token: bytes | None = None,
        error: PeerError = PeerError.NONE,
    ) -> HolepunchPayload:
        puncher = self._puncher
        local = UNKNOWN if puncher is None or error else puncher.local
        if local.firewall == Firewall.RANDOM and not (punching or settled):
            # A server that is random as well would give up, and not say that this is why.
            local = UNKNOWN
        counter = self._round
        self._round += 1
        return HolepunchPayload(
            error=error,
            firewall=local.firewall,
            round=counter,
            punching=punching,
            addresses=local.addresses or None,
            remote_address=remote_address,
            token=token,
            remote_token=remote_token,
        )

    def _tell(
        self,
        relay: Relay,
        payload: HolepunchPayload,
        on_answer: Callable[[HolepunchPayload, Address | None, float], None],
        now: float,
    ) -> None:
        puncher = self._puncher
        if puncher is None:
            return
        nonce = self._context.rng.randbytes(_NONCE_BYTES)
        message = HolepunchMessage(
            Mode.FROM_CLIENT,
            self._session,
            seal(payload.encode(), self._secret, nonce),
            relay.peer_address,
        )
        self._pending = self._context.node.request(
            relay.relay_address,
            PEER_HOLEPUNCH,
            now,
            target=self._target,
            value=message.encode(),
            socket=puncher.socket,
            retries=REQUEST_RETRIES,
            timeout=REQUEST_TIMEOUT,
            force=True,
            on_done=partial(self._answered, relay, payload, on_answer),
        )

    def _answered(
        self,
        relay: Relay,
        asked: HolepunchPayload,
        on_answer: Callable[[HolepunchPayload, Address | None, float], None],
        reply: Reply | None,
        now: float,
    ) -> None:
        self._pending = None
        if reply is None:
            other = next((r for r in self._relays if r.relay_address != relay.relay_address), None)
            if other is None or self._rerouted:
                self._fail("has answered once, but not about a path to it: did it stop?", now)
            else:
                self._rerouted = True
                self._tell(other, asked, on_answer, now)
            return
        self._context.punches.survey.note(reply, now)
        self._rerouted = False
        opened = self._open(reply)
        if opened is None or opened[0].round < asked.round:
            # Forged, or of an earlier round: the genuine answer may still be on its way, but this
            # request is used up.
            self._unreadable += 1
            if self._unreadable > MAX_UNREADABLE:
                self._fail("is out of reach: its relay answers in its place", now)
            else:
                self._tell(relay, asked, on_answer, now)
            return
        on_answer(*opened, now)

    def _open(self, reply: Reply) -> tuple[HolepunchPayload, Address | None] | None:
        if reply.error or not reply.value:
            return None
        try:
            message = HolepunchMessage.decode(reply.value)
            plain = unseal(message.payload, self._secret)
            if message.mode != Mode.REPLY or plain is None:
                return None
            return HolepunchPayload.decode(plain), message.peer_address
        except DecodeError:
            return None

    def _own_token(self) -> bytes:
        return host_token(self.server[0], self._token_secret)

    # The end

    def _refused(self, error: int, now: float) -> None:
        if error == PeerError.TRY_LATER and self._patient and self._token is not None:
            self._wait_for_turn(now)
        elif error == PeerError.TRY_LATER:
            self._fail("is busy with another search through a NAT: try again in 20 s", now)
        else:
            self._fail("has given up looking for a path: its NAT or its limits forbid it", now)

    def _give_up(self, reason: str, now: float) -> None:
        """Fail, and tell the server, so that it need not wait."""
        if self._puncher is not None and not self.done:
            payload = self._payload(error=PeerError.ABORTED)
            self._tell(self._server_relay, payload, lambda payload, server, now: None, now)
            if self._pending is not None:
                # Its answer says nothing new. What is in the outbox leaves all the same.
                self._pending.cancel()
                self._pending = None
        self._fail(reason, now)

    def _found(self, socket: int, address: Address, now: float) -> None:
        self._puncher = None
        self._finish(now)
        self._on_path(socket, address, now)

    def _fail(self, reason: str, now: float) -> None:
        if self.done:
            return
        self._finish(now)
        self._on_fail(reason, now)

    def _finish(self, now: float, keep: int | None = None) -> None:
        self.done = True
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        if self._timer is not None:
            self._timer.cancel()
        if self._puncher is not None:
            self._puncher.close(now, keep)
            self._puncher = None
