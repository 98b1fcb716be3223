"""From a server's answer to a direct path to it (spec: hyperdht 5.3).

The server has answered through a relay of the DHT, so it may be behind a NAT:

    we are OPEN            wait for its packets
    it can be punched      punch, and PING its local addresses if it is behind our own NAT
    else                   PING its addresses, connect where one answers
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..noise import Handshake
from ..transmit import Address
from .addresses import is_bogon, is_reserved, match
from .client_punch import ClientPunch
from .context import Context
from .messages import NoisePayload
from .rpc import Pending
from .timers import Timer
from .wire import Reply

#: Seconds after a server's answer in which the path of another connect to it is of use: it waits
#: 10 s for our first packet (spec: hyperdht 4.2).
SHARED_WAIT = 8.0
#: Seconds that an OPEN client waits for the server's first packet.
PASSIVE_WAIT = 10.0
#: Addresses of a server that are tried at once.
MAX_PROBES = 4


class Approach:
    """Tries all that may lead to the server.

    One of ``on_path(socket, address, punched, now)`` and ``on_fail(reason, now)`` is called once,
    unless it is cancelled; the reason continues a sentence that begins with the server's key.
    """

    __slots__ = (
        "_context",
        "_on_fail",
        "_on_path",
        "_passive",
        "_probes",
        "_public_key",
        "_reason",
        "_target",
        "_useful_until",
        "done",
        "patient",
        "punch",
    )

    def __init__(
        self,
        context: Context,
        public_key: bytes,
        target: bytes,
        *,
        patient: bool,
        on_path: Callable[[int, Address, bool, float], None],
        on_fail: Callable[[str, float], None],
    ) -> None:
        """``patient``: a stream through a blind relay goes on, or may begin, meanwhile."""
        self._context = context
        self._public_key = public_key
        self._target = target
        self._on_path = on_path
        self._on_fail = on_fail
        self._useful_until = 0.0
        self._probes: set[Pending] = set()
        self._passive: Timer | None = None
        # Why there is no way to a server that has answered.
        self._reason = "answers, but no packet gets through: both sides are behind firewalls"
        self.patient = patient
        self.punch: ClientPunch | None = None
        #: Found, failed or cancelled.
        self.done = False

    def start(
        self,
        payload: NoisePayload,
        handshake: Handshake,
        server: Address,
        reply: Reply,
        now: float,
    ) -> None:
        """Begin. ``server`` is what the relay that has sent ``reply`` sees of it. Callbacks may
        come before this returns."""
        context, node, client = self._context, self._context.node, reply.to
        self._useful_until = now + SHARED_WAIT
        punchable = payload.holepunch is not None and bool(payload.holepunch.relays)
        if node.remote_address() is not None:
            # We told that we are OPEN, so the server connects to us.
            self._passive = node.timers.at(now + PASSIVE_WAIT, self._on_passive)
            if punchable:
                return
        # A PING that arrives at a closed NAT may spoil the mapping that punching is about to make.
        addresses = [] if punchable else [public(payload.addresses4), server]
        if client[0] == server[0]:
            # Same host or same NAT: the way inside is short.
            own = context.addresses()
            nearby = [a for a in payload.addresses4 if not is_reserved(a[0]) and a not in own]
            addresses.append(match(context.local_hosts, nearby))
            addresses += nearby[:1]
        # The reference connects to the address without asking (spec: hyperdht 5.3). A PING first
        # costs a round trip and tells a way from a hope.
        for address in list(dict.fromkeys(a for a in addresses if a and a[1]))[:MAX_PROBES]:
            self._probe(address, now)
        if punchable and payload.holepunch is not None:
            self.punch = ClientPunch(
                context,
                self._target,
                handshake.holepunch_secret,
                payload.holepunch,
                relay=reply.source,
                server=server,
                patient=self.patient,
                on_path=self._on_punched,
                on_fail=self._on_no_path,
                on_busy=self._on_busy,
            )
            self.punch.start(self._public_key, now)
            return
        self._fail_if_last(now)

    def cancel(self, now: float, keep: int | None = None) -> None:
        """Stop, silently; ``keep`` is a socket that is needed all the same. Harmless when it is
        over."""
        self.done = True
        for pending in self._probes:
            pending.cancel()
        self._probes.clear()
        if self.punch is not None:
            self.punch.cancel(now, keep)
            self.punch = None
        if self._passive is not None:
            self._passive.cancel()
            self._passive = None

    def _found(self, socket: int, address: Address, punched: bool, now: float) -> None:
        on_path = self._on_path
        self.cancel(now, socket)
        on_path(socket, address, punched, now)

    def _fail_if_last(self, now: float) -> None:
        """A way was the wrong one: is there another?"""
        if self.done or self._probes or self._passive is not None or self.punch is not None:
            return
        self.cancel(now)
        self._on_fail(self._reason, now)

    # Ways

    def _probe(self, address: Address, now: float) -> None:
        def on_done(reply: Reply | None, now: float) -> None:
            self._probes.discard(pending)
            if reply is not None:
                # From the socket that the PING went through: a NAT or filter of ours lets the
                # stream through there too.
                self._found(reply.socket, address, False, now)
            else:
                self._fail_if_last(now)

        pending = self._context.node.ping(address, now, on_done=on_done)
        self._probes.add(pending)

    def _on_passive(self, now: float) -> None:
        self._passive = None
        self._fail_if_last(now)

    def _on_punched(self, socket: int, address: Address, now: float) -> None:
        # What leads to the server leads there for all who have its answer.
        others = [
            attempt.approach
            for attempt in self._context.attempts
            if attempt.public_key == self._public_key and attempt.approach is not self
        ]
        self._found(socket, address, True, now)
        for other in others:
            if other is not None and other.leads_to(address, now):
                other._found(socket, address, True, now)

    def leads_to(self, address: Address, now: float) -> bool:
        """Whether somebody else's path to an address is of use here."""
        useful = self.patient or now < self._useful_until
        return useful and self.punch is not None and self.punch.server[0] == address[0]

    def _on_no_path(self, reason: str, now: float) -> None:
        if self.punch is not None:
            self.punch.cancel(now)
            self.punch = None
        self._reason = reason
        self._fail_if_last(now)

    # Searches through random NATs, of which there is one at a time

    def _on_busy(self, reason: str, now: float) -> bool:
        """Another search goes on: wait for it if it is for the same server."""
        self._reason = reason
        searching = any(
            other.approach is not None and other.approach is not self and other.approach.searching
            for other in self._context.attempts
            if other.public_key == self._public_key
        )
        if searching:
            timers = self._context.node.timers
            shared = partial(self._on_no_path, reason)
            self._passive = timers.at(self._useful_until, lambda now: self._on_waited(shared, now))
        return searching

    @property
    def searching(self) -> bool:
        """Whether it has the node's search."""
        return self.punch is not None and self.punch.searching

    def _on_waited(self, fail: Callable[[float], None], now: float) -> None:
        self._passive = None
        fail(now)


def public(addresses: tuple[Address, ...]) -> Address | None:
    """The first address that packets from anywhere reach."""
    return next((address for address in addresses if not is_bogon(address[0])), None)
