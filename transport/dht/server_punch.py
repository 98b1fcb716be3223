"""The server's side of a punch (spec: hyperdht 4.3).

A message of the client comes through a relay, is answered the same way, and leads to one punch or
to many. The class of our own NAT has to be known before the answer, which may take a round trip.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..errors import DecodeError
from ..noise import host_token, seal, unseal
from ..transmit import Address
from .context import Context
from .messages import Firewall, HolepunchPayload, PeerError
from .punch import Puncher, Started
from .router import IncomingPunch, PunchAnswer

#: Messages of one client that wait for the class of our NAT at once; copies are dropped.
MAX_UNANSWERED = 4

_NONCE_BYTES = 24
_SECRET_BYTES = 32


class ServerPunch:
    """Punches for one handshake. It costs a secret until its client sends a message."""

    __slots__ = (
        "_context",
        "_key",
        "_on_start",
        "_own_relays",
        "_puncher",
        "_round",
        "_secret",
        "_token_secret",
        "_unanswered",
        "_wants_punching",
        "closed",
        "patient",
    )

    def __init__(
        self,
        context: Context,
        key: bytes,
        secret: bytes,
        own_relays: Callable[[], frozenset[Address]],
        on_start: Callable[[bool, float], None],
    ) -> None:
        """``key`` is the client's; ``secret`` the handshake's for punching (32 bytes).
        ``on_start(searching, now)`` is called when punching starts, which may take long then."""
        self._context = context
        self._key = key
        self._secret = secret
        self._own_relays = own_relays
        self._on_start = on_start
        self._token_secret = context.rng.randbytes(_SECRET_BYTES)
        self._puncher: Puncher | None = None
        self._round = 0
        # The client's word in its latest message.
        self._wants_punching = False
        self._unanswered = 0
        #: A stream through a blind relay goes on, or may begin, meanwhile.
        self.patient = False
        self.closed = False

    def close(self, now: float, keep: int | None = None) -> None:
        """Stop punching; ``keep`` is the socket that the connection goes on with."""
        self.closed = True
        if self._puncher is not None:
            self._puncher.close(now, keep)
            self._puncher = None

    def receive(self, incoming: IncomingPunch, answer: PunchAnswer, now: float) -> bool:
        """Take a message; False if it was not made by the client."""
        plain = unseal(incoming.message.payload, self._secret)
        if plain is None or self.closed:
            return False
        try:
            payload = HolepunchPayload.decode(plain)
        except DecodeError:
            return False
        if payload.error:
            self._refuse(PeerError.ABORTED, answer, now)
            return True
        if self._puncher is None:
            self._puncher = self._context.punches.create(self._key)
        puncher = self._puncher
        if puncher is None:
            self._refuse(PeerError.TRY_LATER, answer, now)
            return True
        if self._unanswered >= MAX_UNANSWERED:
            return True
        self._take_over(puncher, incoming, payload)
        self._unanswered += 1
        puncher.analyse(now, partial(self._analysed, puncher, incoming, payload, answer))
        return True

    def _take_over(
        self, puncher: Puncher, incoming: IncomingPunch, payload: HolepunchPayload
    ) -> None:
        client = incoming.client_address
        puncher.expect(client)
        if payload.round < self._round:
            return
        self._round = payload.round
        self._wants_punching = payload.punching
        # Only our own relays are known to tell the truth about the client's host.
        echoed = incoming.sender in self._own_relays() and payload.remote_token == host_token(
            client[0], self._token_secret
        )
        puncher.learn(payload.firewall, payload.addresses or (), client[0] if echoed else None)

    def _analysed(
        self,
        puncher: Puncher,
        incoming: IncomingPunch,
        payload: HolepunchPayload,
        answer: PunchAnswer,
        now: float,
    ) -> None:
        goes_on = partial(self._respond, puncher, incoming, payload, answer)
        if puncher.unstable and not self._wants_punching:
            puncher.stabilise(now, goes_on)
        else:
            goes_on(now)

    def _respond(
        self,
        puncher: Puncher,
        incoming: IncomingPunch,
        payload: HolepunchPayload,
        answer: PunchAnswer,
        now: float,
    ) -> None:
        self._unanswered -= 1
        if puncher.closed:
            return
        if puncher.unstable:
            self._refuse(PeerError.ABORTED, answer, now)
            return
        if puncher.local.consistent and payload.remote_address in puncher.local.addresses:
            # The client has opened its NAT toward us: one punch, and it can begin.
            puncher.knock(incoming.client_address, now)
        error = PeerError.NONE
        if self._wants_punching and not puncher.punching:
            started = puncher.start(now)
            if started is Started.BUSY and self.patient:
                error = PeerError.TRY_LATER
            elif started is not Started.YES:
                busy = started is Started.BUSY
                self._refuse(PeerError.TRY_LATER if busy else PeerError.ABORTED, answer, now)
                return
            self._on_start(puncher.searching, now)
        own_relay = incoming.sender in self._own_relays()
        token = host_token(incoming.client_address[0], self._token_secret) if own_relay else None
        reply = HolepunchPayload(
            error=error,
            firewall=puncher.local.firewall,
            round=self._round,
            punching=puncher.punching,
            addresses=puncher.local.addresses or None,
            token=token,
            remote_token=payload.token,
        )
        answer(self._seal(reply), puncher.socket, now)

    def _refuse(self, error: PeerError, answer: PunchAnswer, now: float) -> None:
        if self._puncher is not None:
            self._puncher.close(now)
            self._puncher = None
        self._unanswered = 0
        refusal = HolepunchPayload(error=error, firewall=Firewall.UNKNOWN, round=self._round)
        answer(self._seal(refusal), self._context.node.current_socket, now)

    def _seal(self, payload: HolepunchPayload) -> bytes:
        return seal(payload.encode(), self._secret, self._context.rng.randbytes(_NONCE_BYTES))
