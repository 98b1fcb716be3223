"""A HyperDHT node: finds and connects peers by public key (spec: hyperdht 3-5, 8).

`HyperDHT` puts together what belongs to one node, and decides whose a datagram or request is:

    datagram -> UDX stream of ours -> Mux          request -> handshake, holepunch -> Router
             -> one byte at most   -> Punches              -> records, persistent  -> Store
             -> anything else      -> Node
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

from msgspec import Struct, field

from ..errors import Closed, InvalidInput, LocalError
from ..keys import KeyPair
from ..transmit import Address, Transmit
from ..udx.mux import Mux
from .connect import Attempt
from .context import Connection, Context, Route
from .messages import PLUGIN, UNKNOWN_COMMAND
from .moves import Moves, Path
from .node import Node, NodeConfig
from .punches import PUNCH
from .records import Records
from .reopen import Reopener
from .router import Router
from .server import Server
from .store import Forwards, Store
from .wire import Request

__all__ = ["Attempt", "Connection", "HyperDHT", "HyperDHTConfig", "Server"]

#: Connects under way at once; each has a stream and waits for the network.
MAX_ATTEMPTS = 4096
#: Datagrams that leave before the rest of what has arrived is taken: handshakes take long, and the
#: peers have their own share to do meanwhile.
EARLY = 8
#: Servers of one node; each asks three nodes something every three seconds.
MAX_SERVERS = 4096


class HyperDHTConfig(Struct, frozen=True):
    """How a node stands in the network."""

    node: NodeConfig = field(default_factory=NodeConfig)
    #: Who connects, where a connect says nothing else. None: a new identity.
    key_pair: KeyPair | None = None
    #: The addresses of this host's interfaces, for peers on the same host or LAN.
    local_hosts: tuple[str, ...] = ()
    #: What added to ``now`` gives the seconds since 1970.
    epoch: float = 0.0


class HyperDHT:
    """Follows `hyperseaport.transport.transmit.Core`. Call `transmits` after every call from
    outside, too. Callbacks may call back in."""

    __slots__ = (
        "_closing",
        "_context",
        "_reopener",
        "_servers",
        "blind",
        "key_pair",
        "moves",
        "mux",
        "node",
        "on_moved",
        "on_network_change",
        "on_ready",
        "punches",
        "records",
        "router",
        "store",
    )

    def __init__(self, config: HyperDHTConfig, rng: Random) -> None:
        self.node = Node(config.node, rng)
        self.mux = Mux(rng)
        #: The default identity.
        self.key_pair = config.key_pair or KeyPair.from_seed(rng.randbytes(32))
        forwards = Forwards()
        self.router = Router(self.node, forwards)
        self.store = Store(self.node, forwards, rng, config.epoch)
        self.records = Records(self.node)
        #: Each is called with the time: once when the bootstrap is over, however it went.
        self.on_ready: list[Callable[[float], None]] = []
        #: Each is called with the time: reachability or identity of this node has changed.
        self.on_network_change: list[Callable[[float], None]] = []
        self._context = Context(self.node, self.mux, rng, self.router, forwards, config.local_hosts)
        #: Blind relays that streams run through.
        self.blind = self._context.blind
        self.blind.dial = self._dial_relay
        #: What goes on to get through NATs.
        self.punches = self._context.punches
        #: Where the peers of open connections are.
        self.moves = Moves(self.node.timers, rng, self._on_moved)
        #: Each is called with the peer's key, where it was, where it is, and the time: connections
        #: with it go on there.
        self.on_moved: list[Callable[[bytes, Path, Path, float], None]] = []
        self._reopener = Reopener(self._context, self.moves)
        self._servers: dict[bytes, Server] = {}
        self._closing = False
        self.node.on_request = self._on_request
        self.node.on_ready = self._on_ready
        self.node.on_network_change = self._on_network_change

    def start(self, now: float, *, server_port: int, client_port: int) -> None:
        """Both sockets are bound to these local ports: join the network, then call `on_ready`."""
        self.node.start(now, server_port=server_port, client_port=client_port)

    def connect(
        self,
        public_key: bytes,
        now: float,
        *,
        key_pair: KeyPair | None = None,
        relay_addresses: tuple[Address, ...] = (),
        relay_through: tuple[bytes, ...] = (),
        on_open: Callable[[Connection, float], None],
        on_error: Callable[[Exception, float], None],
    ) -> Attempt:
        """Connect to whoever listens under the 32-byte key; the nodes at ``relay_addresses`` are
        asked first. Where there is no direct path at once, the stream begins at one of the blind
        relays with the keys ``relay_through``, or at one that the server names.

        One of the callbacks is called, never before this returns: ``on_open`` when a path is
        decided on, which only received data proves, or ``on_error`` with a `ConnectError`. Raises
        `InvalidInput` for bytes that cannot be a key, `LocalError` beyond `MAX_ATTEMPTS`, `Closed`
        after `close`.
        """
        self._check_open()
        if len(self._context.attempts) >= MAX_ATTEMPTS:
            raise LocalError(f"{MAX_ATTEMPTS} connects are under way: wait for some to end")
        identity = key_pair or self.key_pair
        attempt = Attempt(
            self._context,
            public_key,
            identity,
            on_open=partial(self._on_opened, identity, on_open),
            on_error=on_error,
        )
        attempt.start(relay_addresses, now, relay_through=relay_through)
        return attempt

    def _dial_relay(
        self,
        public_key: bytes,
        now: float,
        *,
        on_open: Callable[[Connection, float], None],
        on_error: Callable[[Exception, float], None],
    ) -> Attempt:
        """As `connect`, to a blind relay, and through none."""
        self._check_open()
        attempt = Attempt(
            self._context,
            public_key,
            self.key_pair,
            relayable=False,
            on_open=on_open,
            on_error=on_error,
        )
        attempt.start((), now)
        return attempt

    def listen(
        self,
        key_pair: KeyPair,
        now: float,
        *,
        firewall: Callable[[bytes, Address], bool] | None = None,
        relay_through: tuple[bytes, ...] = (),
        allow_relays: frozenset[bytes] | None = frozenset(),
        on_connection: Callable[[Connection, float], None],
        on_listening: Callable[[float], None] | None = None,
    ) -> Server:
        """Accept connections for a key pair, and announce it until the server is closed.

        ``firewall(remote public key, client address)`` returns True to REJECT: such a client is
        told that, and nothing else. Streams for which there is no direct path at once begin at
        one of the blind relays with the keys ``relay_through``. A relay that a client names is used
        only if it is among those or ``allow_relays``, where None stands for every relay: we connect
        to it as to any server, and a stranger shall not choose whom we connect to.

        ``on_listening`` is called once, as soon as somebody can find the server. Raises
        `InvalidInput` if the key listens already, `LocalError` beyond `MAX_SERVERS`, `Closed` after
        `close`.
        """
        self._check_open()
        if key_pair.public_key in self._servers:
            raise InvalidInput(f"{key_pair} listens already: close that server first")
        if len(self._servers) >= MAX_SERVERS:
            raise LocalError(f"a node has at most {MAX_SERVERS} servers: use another node")
        server = Server(
            self._context,
            key_pair,
            firewall=firewall,
            relay_through=relay_through,
            allow_relays=allow_relays,
            on_connection=partial(self._on_connection, on_connection),
            on_listening=on_listening,
            on_close=self._forget,
        )
        self._servers[key_pair.public_key] = server
        self.router.serve(server.target, server)
        self._context.forwards.serve(server.target, server.record)
        server.refresh(now)
        return server

    @property
    def local_hosts(self) -> tuple[str, ...]:
        """The addresses of this host's interfaces."""
        return self._context.local_hosts

    def woke_up(self, now: float) -> None:
        """The machine slept, or the program was stopped: announce again, and see who is still there
        and where we are."""
        self.blind.woke_up(now)
        self.node.woke_up(now)

    def moved(self, local_hosts: tuple[str, ...], now: float, *, elsewhere: bool) -> None:
        """The interfaces of this host have other addresses: these. ``elsewhere``: we are in another
        network by that."""
        self._context.settle(local_hosts)
        if elsewhere:
            self.punches.survey.forget(now)
            self.node.moved(now)
        else:
            self._on_network_change(now)

    def silent(self, public_key: bytes, now: float) -> None:
        """Nothing was heard for a while on the open connections with this peer: if we have opened
        them, NATs that have forgotten us are opened again."""
        if not self._closing:
            self._reopener.silent(public_key, now)

    def close(self, now: float, on_closed: Callable[[float], None]) -> None:
        """Give up all connects and unannounce all servers; ``on_closed`` is called when the relays
        have been told, at once if there are none. Streams stay: their owners close them."""
        self._closing = True
        for attempt in list(self._context.attempts):
            attempt.cancel(now)
        self.punches.close()
        self.blind.close(now)
        servers = list(self._servers.values())
        left = len(servers)

        def closed(now: float) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                on_closed(now)

        for server in servers:
            server.close(now, closed)
        if not servers:
            on_closed(now)

    # Core

    def receive(self, datagram: bytes, socket: int, source: Address, now: float) -> None:
        """Take one datagram. Never raises for what the network sent."""
        if not self.mux.receive(datagram, socket, source, now):
            self.receive_other(datagram, socket, source, now)

    def receive_other(self, datagram: bytes, socket: int, source: Address, now: float) -> None:
        """Take a datagram that is no UDX stream's."""
        if len(datagram) <= len(PUNCH):
            self.punches.receive(socket, source, now)
        else:
            self.node.receive(datagram, socket, source, now)

    def receive_run(
        self, data: memoryview, segment: int, socket: int, source: Address, now: float
    ) -> None:
        """Take a run of datagrams of ``segment`` bytes each, the last of which may be shorter;
        ``data`` is not kept. As many calls of `receive`, for less."""
        for datagram in self.mux.receive_run(data, segment, socket, source, now):
            self.receive_other(datagram, socket, source, now)

    def transmits(self, now: float) -> list[Transmit]:
        """What is to be sent now; the answer to a handshake before the stream's first bytes, and a
        punch before the answer that tells of it."""
        self.blind.pump(now)
        punches = self.punches
        if not punches.outbox:
            return self.node.transmits(now) + self.mux.transmits(now)
        outbox, punches.outbox = punches.outbox, []
        return outbox + self.node.transmits(now) + self.mux.transmits(now)

    def early_transmits(self, now: float) -> list[Transmit]:
        """What `transmits` has first, if that is `EARLY` datagrams or more, for a shell that is
        about to call in again before it sends."""
        punches = self.punches
        if self.node.queued < EARLY or punches.outbox or punches.sockets.changed:
            return []
        return self.node.transmits(now)

    def sockets_to_open(self) -> list[int]:
        """Sockets on random ports that the shell opens before it sends `transmits`; if one cannot
        be had, it calls `socket_failed`."""
        return self.punches.sockets.opened()

    def sockets_to_close(self) -> list[int]:
        """Sockets that the shell closes after it has sent `transmits`."""
        return self.punches.sockets.closed()

    def socket_failed(self, socket: int) -> None:
        """The shell could not open a socket."""
        self.punches.sockets.failed(socket)

    def deadline(self) -> float | None:
        """When `on_deadline` must be called at the latest, or None for never."""
        node, mux = self.node.deadline(), self.mux.deadline()
        if node is None or mux is None:
            return mux if node is None else node
        return min(node, mux)

    def on_deadline(self, now: float) -> None:
        """Do what has become due."""
        self.node.on_deadline(now)
        self.mux.on_deadline(now)

    # Inside

    def _on_request(self, request: Request, now: float) -> None:
        if self.router.on_request(request, now):
            return
        if not self.node.ephemeral:
            if self.store.on_request(request, now):
                return
            if request.command == PLUGIN:
                # A plugin that is not there does not answer (spec: hyperdht 3.2).
                return
        self.node.reply(request, now, error=UNKNOWN_COMMAND, token=False)

    def _on_opened(
        self,
        identity: KeyPair,
        on_open: Callable[[Connection, float], None],
        connection: Connection,
        now: float,
    ) -> None:
        self._reopener.remember(connection.handshake.remote_public_key, identity)
        self._on_connection(on_open, connection, now)

    def _on_connection(
        self, on_open: Callable[[Connection, float], None], connection: Connection, now: float
    ) -> None:
        self.moves.watch(connection.stream, connection.handshake)
        on_open(connection, now)

    def _on_moved(self, public_key: bytes, home: Path, path: Path, now: float) -> None:
        context = self._context
        route = context.routes.get(public_key)
        if route is not None and (route.socket, route.address) == home:
            context.remember_route(public_key, Route(*path, route.punched))
        for stream in self.moves.streams(public_key):
            if (stream.socket, stream.address) == path:
                self.punches.sockets.hold(stream.socket, stream, now)
        for listener in list(self.on_moved):
            listener(public_key, home, path, now)

    def _on_ready(self, now: float) -> None:
        for server in list(self._servers.values()):
            server.refresh(now)
        listeners, self.on_ready = self.on_ready, []
        for listener in listeners:
            listener(now)

    def _on_network_change(self, now: float) -> None:
        for server in list(self._servers.values()):
            server.refresh(now)
        for listener in list(self.on_network_change):
            listener(now)

    def _forget(self, server: Server) -> None:
        self._servers.pop(server.public_key, None)

    def _check_open(self) -> None:
        if self._closing:
            raise Closed("the node is closed: make another one")
