"""A dht-rpc node: answers the network, asks it, and keeps its place in it (spec: hyperdht 2).

`Node` is a protocol core: it follows `hyperseaport.transport.transmit.Core`. It has two main
sockets, `SERVER_SOCKET` and `CLIENT_SOCKET`; DHT datagrams are accepted on any other as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from ..encoding import encode_address
from ..errors import DecodeError
from ..transmit import CLIENT_SOCKET, SERVER_SOCKET, Address, Transmit
from .addresses import node_id
from .bookkeeping import TICK, Bookkeeping
from .internal import InternalCommands
from .network_state import Health, NetworkState
from .presence import Presence
from .query import CONCURRENCY, Commit, Query
from .rpc import QUERY_RETRIES, RETRIES, TIMEOUT, Engine, Pending, Stats
from .sampler import Sampler
from .table import K, Table
from .timers import Timers
from .tokens import Tokens
from .wire import (
    DOWN_HINT,
    ERROR_INVALID_TOKEN,
    ERROR_UNKNOWN_COMMAND,
    FIND_NODE,
    PING,
    REQUEST,
    RESPONSE,
    Reply,
    Request,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)


@dataclass(slots=True)
class NodeConfig:
    """How a node takes part. Times in seconds."""

    #: Where to ask first. Empty for the first node of a network.
    bootstrap: tuple[Address, ...] = ()
    #: None: become persistent after 20 minutes of being reachable. False: try it at once.
    #: True: never appear in anyone's table.
    ephemeral: bool | None = None
    #: False skips the firewall test and takes the node for reachable.
    firewalled: bool = True
    #: Known public address (port 0: that of the server socket), for a bootstrap node or one of a
    #: private network: the node is persistent and reachable from the first moment.
    public_address: Address | None = None
    #: Whether to find out during the bootstrap if the server socket is reachable.
    quick_check: bool = True
    #: How long the bootstrap waits for that check's answer.
    quick_check_wait: float = 0.3
    #: For how long after its start a node with ``public_address`` leaves PINGs without id
    #: unanswered: servers that still believe in it after a restart then announce again
    #: (spec: hyperdht 4.1).
    ignore_idless_pings: float = 9.0
    #: How late FIND_NODE of askers without id is answered: 0.02 in a private network, for all but
    #: the bootstrap node, lets other programs finish their own check (spec: hyperdht 2.13).
    find_node_delay: float = 0.0


class Node:
    """One node. All callbacks run inside `start`, `receive` and `on_deadline`."""

    __slots__ = (
        "_engine",
        "_health",
        "_internal",
        "_keeper",
        "_known_host",
        "_presence",
        "_rng",
        "_state",
        "_tokens",
        "client_port",
        "config",
        "ephemeral",
        "firewalled",
        "on_network_change",
        "on_ready",
        "on_request",
        "ready",
        "sampler",
        "server_port",
        "timers",
    )

    def __init__(self, config: NodeConfig, rng: Random) -> None:
        self.config = config
        self._rng = rng
        known = config.public_address is not None
        #: Not in anyone's table, and without id in messages.
        self.ephemeral = config.ephemeral is True or not known
        #: Not reachable on the server socket, as far as known.
        self.firewalled = config.firewalled and not known
        #: Whether the bootstrap is over.
        self.ready = False
        #: Requests of the application's commands; without it they are answered with error 1.
        self.on_request: Callable[[Request, float], None] | None = None
        self.on_ready: Callable[[float], None] | None = None
        #: Something that others have to know has changed: reachability, identity, public host; or
        #: the network is back.
        self.on_network_change: Callable[[float], None] | None = None
        self.server_port = 0
        self.client_port = 0
        #: For everything of this node that has to happen later.
        self.timers = Timers()
        #: What others say about our address.
        self.sampler = Sampler()
        self._engine = Engine(self.timers, rng, self._request_timed_out)
        self._tokens = Tokens(rng)
        self._keeper = Bookkeeping(self, rng.randbytes(32), rng)
        self._state = NetworkState(self)
        self._health = Health()
        self._presence = Presence(self, rng)
        self._internal = InternalCommands(self, self._keeper)
        self._known_host: str | None = None

    def start(self, now: float, *, server_port: int, client_port: int) -> None:
        """Both sockets are bound to these local ports: join the network, then `on_ready`."""
        self.server_port = server_port
        self.client_port = client_port
        self._internal.started = now
        if self.config.public_address is not None:
            host, port = self.config.public_address
            public = (host, port or server_port)
            self.sampler.add(public)
            self._known_host = host
            self._keeper.rebuild(node_id(public))
        self._state.bootstrap(now)

    # What it is

    @property
    def id(self) -> bytes:
        """32 bytes: the hash of the public address once that is known to be reachable, random
        before."""
        return self._keeper.table.id

    @property
    def table(self) -> Table:
        """The routing table."""
        return self._keeper.table

    @property
    def bootstrap(self) -> tuple[Address, ...]:
        """Where it asks when the table does not suffice. When that is empty, also whoever was in it
        last: an outage of ours looks as if all of them had died."""
        if len(self.table):
            return self.config.bootstrap
        return (*self.config.bootstrap, *self._presence.last_resort)

    @property
    def adaptive(self) -> bool:
        """Whether it becomes persistent when it has been reachable for long enough."""
        return self.config.ephemeral is None and self.config.public_address is None

    @property
    def current_socket(self) -> int:
        """The socket that requests leave from."""
        return CLIENT_SOCKET if self.firewalled else SERVER_SOCKET

    @property
    def online(self) -> bool:
        """False after two ticks in which nobody answered."""
        return self._health.online

    @property
    def silent(self) -> bool:
        """Nobody answers; who keeps trying may wait for `on_network_change`."""
        return self._presence.silent

    @property
    def degraded(self) -> bool:
        """Whether most requests of the last ticks went unanswered."""
        return self._health.degraded

    @property
    def stats(self) -> Stats:
        """Counters since the start."""
        return self._engine.stats

    @property
    def in_flight(self) -> int:
        """Requests without an answer yet."""
        return len(self._engine)

    @property
    def public_host(self) -> str | None:
        """The host that others see; None while they do not agree."""
        return self.sampler.host

    @property
    def public_port(self) -> int:
        """The port that others see; 0 when unknown or never the same."""
        return self.sampler.port

    def remote_address(self) -> Address | None:
        """Where anybody can reach the server socket; None when that is not known for sure."""
        host, port = self.sampler.host, self.sampler.port
        if self.firewalled or host is None or port != self.server_port:
            return None
        return host, port

    def closest(self, target: bytes, n: int = K) -> list[Address]:
        """Up to ``n`` nodes of the table near a 32-byte target, not sorted by distance."""
        return [contact.address for contact in self.table.closest(target, n)]

    # Core

    def receive(self, datagram: bytes, socket: int, source: Address, now: float) -> None:
        """Take a datagram that is not UDX's (spec: hyperdht 2.1, steps 2 and 3)."""
        stats = self._engine.stats
        stats.received += 1
        kind = datagram[0] if len(datagram) >= 2 else -1
        if source[1] == 0 or kind not in (REQUEST, RESPONSE):
            stats.ignored += 1
            return
        try:
            if kind == REQUEST:
                request, reply = decode_request(datagram, socket, source), None
            else:
                request, reply = None, decode_response(datagram, socket, source)
        except DecodeError:
            stats.malformed += 1
            return
        if request is not None:
            self._on_request(request, now)
        elif reply is not None:
            self._on_reply(reply, now)

    @property
    def queued(self) -> int:
        """Datagrams that wait for `transmits`."""
        return len(self._engine.outbox)

    def transmits(self, now: float) -> list[Transmit]:
        """What is to be sent now."""
        outbox, self._engine.outbox = self._engine.outbox, []
        return outbox

    def deadline(self) -> float | None:
        """When `on_deadline` must be called."""
        return self.timers.deadline()

    def on_deadline(self, now: float) -> None:
        """Do what is due."""
        self.timers.run(now)

    # Asking

    def request(
        self,
        to: Address,
        command: int,
        now: float,
        *,
        internal: bool = False,
        target: bytes | None = None,
        value: bytes | None = None,
        token: bytes | None = None,
        socket: int | None = None,
        retries: int = RETRIES,
        node_id: bytes | None = None,
        force: bool = False,
        timeout: float = TIMEOUT,
        on_done: Callable[[Reply | None, float], None],
    ) -> Pending:
        """Ask ``to``, ``retries`` + 1 times at most, each ``timeout`` seconds after the other.

        ``on_done(reply, now)`` is called once, with None when nobody answered; errors are replies.
        With ``node_id`` (32 bytes) that node leaves the table when it does not answer. ``force``
        passes the congestion window. Without ``socket`` the current one is taken.
        """
        engine = self._engine
        if socket is None:
            socket = self.current_socket
        tid = engine.next_tid()
        datagram = encode_request(
            tid,
            to,
            command,
            internal=internal,
            id=self._id_on(socket),
            token=token,
            target=target,
            value=value,
        )
        pending = Pending(
            engine,
            tid,
            to,
            socket,
            datagram,
            on_done,
            retries=retries,
            timeout=timeout,
            node_id=node_id,
            force=force,
        )
        engine.start(pending, now)
        return pending

    def ping(
        self,
        to: Address,
        now: float,
        *,
        value: bytes | None = None,
        socket: int | None = None,
        retries: int = RETRIES,
        node_id: bytes | None = None,
        on_done: Callable[[Reply | None, float], None],
    ) -> Pending:
        """PING; ``value`` is padding, for tests of what size gets through."""
        return self.request(
            to,
            PING,
            now,
            internal=True,
            value=value,
            socket=socket,
            retries=retries,
            node_id=node_id,
            on_done=on_done,
        )

    def query(
        self,
        target: bytes,
        command: int,
        now: float,
        *,
        internal: bool = False,
        value: bytes | None = None,
        nodes: Sequence[Address] = (),
        retries: int = QUERY_RETRIES,
        concurrency: int = CONCURRENCY,
        on_reply: Callable[[Reply, float], None] | None = None,
        on_done: Callable[[Query, float], None] | None = None,
        commit: Commit | None = None,
    ) -> Query:
        """Ask the nodes closest to a 32-byte target, beginning with ``nodes``.

        ``on_reply`` gets each answer without error. When the closest (20 at most) have answered,
        ``commit(reply, done, now)`` is called for each of them and must lead to a call
        ``done(reply or None, now)``. ``on_done`` comes after all.
        """
        self._keeper.queried()
        query = Query(
            self,
            target,
            command,
            internal=internal,
            value=value,
            retries=retries,
            concurrency=concurrency,
            on_reply=on_reply,
            on_done=on_done,
            commit=commit,
        )
        query.start(nodes, now)
        return query

    # Answering

    def reply(
        self,
        request: Request,
        now: float,
        *,
        value: bytes | None = None,
        error: int = 0,
        token: bool = True,
        closer_nodes: bool = True,
        socket: int | None = None,
        to: Address | None = None,
    ) -> None:
        """Answer a request, with a fresh token and closer nodes (when it has a target) unless told
        otherwise. ``to`` sends the answer to somebody else: that is how relaying works
        (spec: hyperdht 3.7). Without ``socket`` it leaves from where the request arrived."""
        to = request.source if to is None else to
        socket = request.socket if socket is None else socket
        nodes: list[Address] = []
        if closer_nodes and request.target is not None:
            nodes = self.closest(request.target)
        datagram = encode_response(
            request.tid,
            to,
            id=self._id_on(socket),
            token=self._tokens.issue(to[0], now) if token else None,
            closer_nodes=nodes,
            error=error,
            value=value,
        )
        self._engine.send(datagram, socket, to)

    def forward(
        self,
        request: Request,
        to: Address,
        value: bytes,
        now: float,
        *,
        socket: int | None = None,
    ) -> None:
        """Send a request datagram with the transaction id, command and target of another: nobody
        here waits for an answer (spec: hyperdht 3.7)."""
        socket = request.socket if socket is None else socket
        datagram = encode_request(
            request.tid,
            to,
            request.command,
            internal=request.internal,
            id=self._id_on(socket),
            target=request.target,
            value=value,
        )
        self._engine.send(datagram, socket, to)

    def issue_token(self, host: str, now: float) -> bytes:
        """The 32-byte token that a dotted host gets now."""
        return self._tokens.issue(host, now)

    def accepts_token(self, token: bytes, host: str, now: float) -> bool:
        """Whether the token is one of ours for this host. Requests that arrive at `on_request` with
        a token have passed this."""
        return self._tokens.accepts(token, host, now)

    def _id_on(self, socket: int) -> bytes | None:
        """The id is only shown from where others can reach it (spec: hyperdht 2.2)."""
        return self.id if socket == SERVER_SOCKET and not self.ephemeral else None

    def _on_reply(self, reply: Reply, now: float) -> None:
        pending = self._engine.match(reply, now)
        if pending is None:
            return
        self._keeper.learn(reply.id, reply.source, reply.to, reply.socket, True, now)
        pending.on_done(reply, now)
        self._presence.heard(reply, now)

    def _on_request(self, request: Request, now: float) -> None:
        self._keeper.learn(request.id, request.source, request.to, request.socket, False, now)
        token = request.token
        if token is not None and not self._tokens.accepts(token, request.source[0], now):
            self.reply(request, now, error=ERROR_INVALID_TOKEN)
        elif request.internal:
            self._internal.on_request(request, now)
        elif self.on_request is not None:
            self.on_request(request, now)
        else:
            self.reply(request, now, error=ERROR_UNKNOWN_COMMAND, token=False)

    def _request_timed_out(self, pending: Pending, now: float) -> None:
        self._presence.unanswered(now)
        if pending.node_id is not None and self.table.remove(pending.node_id):
            self._presence.gone(pending.to)

    # For its own parts

    def background_query(
        self,
        target: bytes,
        command: int,
        now: float,
        *,
        on_reply: Callable[[Reply, float], None] | None = None,
        on_done: Callable[[Query, float], None] | None = None,
    ) -> None:
        """An internal query that leaves room for others."""
        self._keeper.queried()
        query = Query(
            self,
            target,
            command,
            internal=True,
            background=True,
            on_reply=on_reply,
            on_done=on_done,
        )
        query.start((), now)

    def refresh(self, now: float) -> None:
        """Look for some node of the table, so as to meet new ones."""
        contacts = list(self.table)
        target = self._rng.choice(contacts).id if contacts else self.id
        self.background_query(target, FIND_NODE, now)

    def hint_down(self, referrer: Address, dead: Address, now: float) -> None:
        """Tell ``referrer`` that a node it named does not answer."""
        if not self._keeper.spend_hint():
            return
        self.request(
            referrer,
            DOWN_HINT,
            now,
            internal=True,
            value=encode_address(dead),
            node_id=node_id(referrer),
            on_done=lambda reply, now: None,
        )

    def sample(self, to: Address, now: float) -> None:
        """Take note of our address as somebody saw it."""
        if self.config.public_address is not None:
            return
        self.sampler.add(to)
        host = self.sampler.host
        if host is None or host == self._known_host:
            return
        first, self._known_host = self._known_host is None, host
        if first:
            return
        if self._presence.moves(now):
            self.moved(now)
        else:
            self._notify(now)

    def rename(self, id: bytes, now: float) -> None:  # noqa: A002
        """Take the 32-byte id that belongs to the public address; reachability has changed."""
        self._keeper.rebuild(id)
        if self.ready:
            self.refresh(now)
        self._notify(now)

    def joined(self, now: float) -> None:
        """The bootstrap is over: ticks begin, if it was the first."""
        if self.ready:
            return
        self.ready = True
        self.timers.at(now + TICK, self._tick)
        if self.on_ready is not None:
            self.on_ready(now)

    def woke_up(self, now: float) -> None:
        """The machine slept, and may be in another network now."""
        self._keeper.slept(now)
        self._state.on_wake_up()
        if self.adaptive:
            self.ephemeral = True
        self.came_back(now)

    def moved(self, now: float) -> None:
        """Our address has changed, and so has whatever is between us and the others: whether the
        server socket is reachable has to be found out again."""
        self._state.on_wake_up()
        if self.config.public_address is None:
            if not self.firewalled:
                self._state.retest(now)
            self.ephemeral = True
            self.firewalled = self.config.firewalled
        self.came_back(now)

    def came_back(self, now: float) -> None:
        """The network is there, maybe again and maybe another one."""
        self._health.reset()
        if self.ready:
            self._forget_samples()
            self._state.rejoin(now)
        self._notify(now)

    def sample_again(self, now: float) -> None:
        """Forget what others said of our address, and ask some."""
        self._forget_samples()
        self.refresh(now)

    def _forget_samples(self) -> None:
        if self.config.public_address is None:
            self.sampler = Sampler()
            self._keeper.sample_again()

    def _tick(self, now: float) -> None:
        self.timers.at(now + TICK, self._tick)
        self._keeper.on_tick(now)
        self._state.on_tick(now)
        stats = self._engine.stats
        if self._health.update(stats.responses, stats.timeouts):
            self._notify(now)

    def _notify(self, now: float) -> None:
        if self.on_network_change is not None:
            self.on_network_change(now)
