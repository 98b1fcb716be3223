"""The shell of a HyperDHT node: sockets, clock and randomness for the sans-IO core.

Whatever happens (datagrams, a deadline, a write on a channel) ends in one `_pump` for each turn of
the event loop, so that what belongs together leaves together.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from math import inf
from random import Random, SystemRandom
from typing import Any, TypeVar

from msgspec import Struct

from ..channel import Channel
from ..errors import Closed, LocalError, PeerSilent, StreamTimeout
from ..keys import KeyPair
from ..liveness import INTERVAL, Liveness
from ..machine import ANY_HOST as ANY_HOST
from ..machine import Machine, clock_of, resolve
from ..reserved import ReservedPort
from ..transmit import CLIENT_SOCKET, SERVER_SOCKET, Address, Transmit
from ..udp import UdpSocket
from ..udx.mux import Mux
from ..udx.stream import Stream
from .examine import Examination, Findings
from .hyperdht import Attempt, Connection, HyperDHT, HyperDHTConfig
from .moves import Path
from .node import NodeConfig
from .records import Stored
from .runs import together
from .server import Server
from .timings import Timings

T = TypeVar("T")

DEFAULT_PORT = 49737
#: Seconds between two writes, on whatever channels, below which they leave together: in one call
#: many small datagrams cost little more than one.
TOGETHER = 0.0001
#: Seconds. uvloop rounds to this, and rings without end in the half before a time that is awaited.
TICK = 0.001
#: Seconds by which a timer must be late to tell that the machine slept, or the program was stopped.
ASLEEP = 5.0
#: Seconds between two looks at whether the machine has slept, at least: the timer rings a thousand
#: times a second where messages go to and fro.
GLANCE = 0.1
#: Seconds between two looks at the machine's addresses, at least: there is no timer for them.
LOOK = 3.0
#: Seconds without an answer to a heartbeat after which the NATs on the way are suspected.
ANSWERED = 1.5
#: Seconds that closing may take to tell the network, before it happens anyway.
CLOSE_TIMEOUT = 5.0

#: The public network (spec: hyperdht 2.13).
PUBLIC_BOOTSTRAP = (
    "88.99.3.86@node1.hyperdht.org:49737",
    "142.93.90.113@node2.hyperdht.org:49737",
    "138.68.147.8@node3.hyperdht.org:49737",
)


class EndpointConfig(Struct, frozen=True):
    """How a node stands in the network."""

    #: ``host:port`` or ``ip@name:port``; empty for a node that is itself the network's first.
    bootstrap: tuple[str, ...] = PUBLIC_BOOTSTRAP
    #: By default every interface: a node must be reached from wherever its peers are. What may be
    #: reached through it is decided by keys.
    host: str = ANY_HOST
    #: UDP port of the server socket; 0 takes a free one. A reserved one has been kept for it.
    port: int = 0
    reserved: ReservedPort | None = None
    #: True for a node of a private network: its own address is known, it stores and routes at once.
    permanent: bool = False
    #: Seconds by which answers to newcomers are late (spec: hyperdht 2.13).
    find_node_delay: float = 0.0
    key_pair: KeyPair | None = None
    #: Seconds between two heartbeats for a peer that is sent nothing else; three times as long
    #: without a word from it, and its channels end with `PeerSilent`.
    heartbeat: float = INTERVAL


class Endpoint:
    """A running node. `open` it, `close` it; everything else happens on the running event loop."""

    core: HyperDHT
    address: Address
    _mux: Mux
    _machine: Machine

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._clock = clock_of(self._loop)
        self._sockets: dict[int, UdpSocket] = {}
        # Datagrams that sockets dropped which are closed now.
        self._dropped = 0
        self._channels: dict[Stream, Channel] = {}
        # Plain bytes of the channels that have ended.
        self._bytes_read = self._bytes_written = 0
        # When bytes last moved through those that were piped.
        self._piped_at = -inf
        # The heartbeats of all channels, which one timer serves.
        self._liveness: Liveness[Channel] = Liveness()
        # Those who wait for the network: told when the endpoint closes, as no answer comes then.
        self._waiters: set[asyncio.Future[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = self._armed_at = 0.0
        # The least that timers are set for; loops whose time is not the clock's have coarse ones.
        self._tick = 0.0 if self._clock == self._loop.time else TICK
        # When the machine's calendar and its addresses are looked at again.
        self._glances_at = self._looks_at = 0.0
        self._pumping = False
        # When something was last written on any channel.
        self._wrote_at = 0.0
        self._closed = False

    @classmethod
    async def open(cls, config: EndpointConfig, *, rng: Random | None = None) -> Endpoint:
        """Bind both sockets and begin to bootstrap. Raises `LocalError` when an address cannot be
        had, `InvalidInput` for a bad bootstrap text."""
        bootstrap = await resolve(config.bootstrap)
        endpoint = cls(SystemRandom() if rng is None else rng)
        try:
            endpoint._start(config, bootstrap)
        except BaseException:
            endpoint.kill()
            raise
        return endpoint

    def _start(self, config: EndpointConfig, bootstrap: tuple[Address, ...]) -> None:
        reserved = config.reserved.take() if config.reserved is not None else None
        for which, port, bound in (
            (SERVER_SOCKET, config.port, reserved),
            (CLIENT_SOCKET, 0, None),
        ):
            self._sockets[which] = UdpSocket(
                config.host, port, partial(self._received, which), self._pump_now, bound=bound
            )
        self._machine = Machine(config.host, self._clock)
        self._liveness.interval = config.heartbeat
        #: Host and port of the server socket.
        self.address = self._sockets[SERVER_SOCKET].address
        server_port = self.address[1]
        self.core = HyperDHT(
            HyperDHTConfig(
                node=NodeConfig(
                    bootstrap=bootstrap,
                    public_address=(config.host, server_port) if config.permanent else None,
                    find_node_delay=config.find_node_delay,
                ),
                key_pair=config.key_pair or KeyPair.generate(),
                local_hosts=self._machine.hosts,
                epoch=time.time() - self._clock(),
            ),
            self._rng,
        )
        self._mux = self.core.mux
        self.core.on_moved.append(self._on_moved)
        self.core.start(
            self._clock(),
            server_port=server_port,
            client_port=self._sockets[CLIENT_SOCKET].address[1],
        )
        self.wake()

    @property
    def channels(self) -> int:
        """Channels that are open now."""
        return len(self._channels)

    @property
    def piped_at(self) -> float:
        """When bytes last moved through a channel that is `Channel.piped`, in seconds on the loop's
        clock; -inf for never."""
        living = (each.moved_at for each in self._channels.values() if each.piped)
        return max((self._piped_at, *living))

    def metrics(self) -> dict[str, int]:
        """What was counted since the start, and what is held now, by dotted names: ``udx.*`` and
        ``dht.*`` count datagrams (`udx.stream.Stats`, `dht.rpc.Stats`), ``punch.*`` what gets
        through NATs (`dht.punches.Stats`), ``relayed.*`` streams that began at a blind relay
        (`dht.relay_client.Stats`), ``peers.moved`` peers that were followed to another address,
        ``bytes.*`` plain bytes of all channels, ``*.dropped`` what a limit kept from being done."""
        core, living = self.core, self._channels.values()
        values = {
            "channels": len(living),
            "bytes.received": self._bytes_read + sum(each.bytes_read for each in living),
            "bytes.sent": self._bytes_written + sum(each.bytes_written for each in living),
            "udp.dropped": self._dropped + sum(udp.dropped for udp in self._sockets.values()),
            "punch.sockets": len(core.punches.sockets),
            "punch.under_way": len(core.punches),
            "relayed.relays": len(core.blind),
            "relayed.pairs": core.blind.pairs,
            "peers.moved": core.moves.moved,
            "router.dropped": core.router.dropped,
            "store.dropped": core.store.dropped,
            "udx.streams": len(core.mux),
        }
        counted = (
            ("udx", core.mux.stats),
            ("dht", core.node.stats),
            ("punch", core.punches.stats),
            ("relayed", core.blind.stats),
        )
        for name, stats in counted:
            for field in fields(stats):
                values[f"{name}.{field.name}"] = getattr(stats, field.name)
        return values

    async def ready(self) -> None:
        """Until the bootstrap is over, however it went. Raises `Closed` if the endpoint closes
        before."""
        waiter: asyncio.Future[None] = self._waiter()

        def tell(_now: float) -> None:
            if not waiter.done():
                waiter.set_result(None)

        if not self.core.node.ready:
            self.core.on_ready.append(tell)
            await self._answer(waiter)

    async def examine(self) -> Findings:
        """What this host looks like from outside, which takes some 4 seconds once it is `ready`.
        Raises `Closed` if the endpoint closes."""
        waiter: asyncio.Future[Findings] = self._waiter()

        def found(findings: Findings, _now: float) -> None:
            if not waiter.done():
                waiter.set_result(findings)

        Examination(self.core.node, self._machine.hosts, found).start(self._clock())
        self.wake()
        return await self._answer(waiter)

    async def connect(
        self,
        public_key: bytes,
        *,
        key_pair: KeyPair | None = None,
        relay_through: tuple[bytes, ...] = (),
    ) -> Channel:
        """A channel to whoever listens under the 32-byte key; if need be it begins at one of these
        blind relays (`HyperDHT.connect`). It has no protocol yet: whoever gets it sets one. Raises
        `ConnectError` when nobody can be reached, `InvalidInput` for a key that cannot be one,
        `Closed` if the endpoint closes. Cancelling abandons the attempt."""
        waiter: asyncio.Future[Channel] = self._waiter()

        def opened(channel: Channel, _timings: Timings | None) -> None:
            if waiter.done():
                channel.abort()
            else:
                waiter.set_result(channel)

        def failed(error: Exception) -> None:
            if not waiter.done():
                waiter.set_exception(error)

        attempt = self.dial(public_key, key_pair, opened, failed, relay_through)
        try:
            return await self._answer(waiter)
        except asyncio.CancelledError:
            attempt.cancel(self._clock())
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                waiter.result().abort()
            self.wake()
            raise

    def dial(
        self,
        public_key: bytes,
        key_pair: KeyPair | None,
        on_open: Callable[[Channel, Timings | None], None],
        on_error: Callable[[Exception], None],
        relay_through: tuple[bytes, ...] = (),
    ) -> Attempt:
        """`connect` without a task: one of the callbacks is called, never before this returns,
        unless the attempt is cancelled or the endpoint closes. Raises `InvalidInput` for a key that
        cannot be one, `Closed` once the endpoint closes."""
        if self._closed:
            raise _closed()

        def opened(connection: Connection, _now: float) -> None:
            # Here and not when somebody gets to it: the stream may change in between.
            on_open(self._channel(connection), connection.timings)

        def failed(error: Exception, _now: float) -> None:
            on_error(error)

        attempt = self.core.connect(
            public_key,
            self._clock(),
            key_pair=key_pair,
            relay_through=relay_through,
            on_open=opened,
            on_error=failed,
        )
        self._send_early(self._clock())
        self.wake()
        return attempt

    async def listen(
        self,
        key_pair: KeyPair,
        on_channel: Callable[[Channel], None],
        *,
        allow: frozenset[bytes] | None = None,
        relay_through: tuple[bytes, ...] = (),
        allow_relays: frozenset[bytes] | None = frozenset(),
    ) -> Listener:
        """Announce the key and accept. ``allow`` is the set of client keys that get an answer at
        all; None admits everybody. ``relay_through`` are the keys of blind relays at which channels
        may begin, ``allow_relays`` those that only clients name; None stands for all
        (`HyperDHT.listen`). Returns once the first announcements are out. Raises
        `InvalidInput` for a key that listens already, `Closed` if the endpoint closes."""
        waiter: asyncio.Future[None] = self._waiter()

        def rejects(remote_public_key: bytes, _address: Address) -> bool:
            return allow is not None and remote_public_key not in allow

        def listening(_now: float) -> None:
            if not waiter.done():
                waiter.set_result(None)

        def connected(connection: Connection, _now: float) -> None:
            on_channel(self._channel(connection))

        server = self.core.listen(
            key_pair,
            self._clock(),
            firewall=rejects,
            relay_through=relay_through,
            allow_relays=allow_relays,
            on_connection=connected,
            on_listening=listening,
        )
        self.wake()
        listener = Listener(self, server)
        try:
            await self._answer(waiter)
        except asyncio.CancelledError:
            server.close(self._clock(), lambda _now: None)
            self.wake()
            raise
        return listener

    async def announce(self, topic: bytes, key_pair: KeyPair) -> int:
        """Tell the DHT that the key is found under a topic of 32 bytes, for some 20 minutes. How
        many nodes took it. Raises `Closed` if the endpoint closes."""
        waiter: asyncio.Future[int] = self._waiter()

        def stored(result: Stored, _now: float) -> None:
            if not waiter.done():
                waiter.set_result(result.nodes)

        query = self.core.records.announce(topic, key_pair, self._clock(), stored)
        self.wake()
        try:
            return await self._answer(waiter)
        except asyncio.CancelledError:
            query.cancel()
            raise

    async def close(self) -> None:
        """Unannounce everything, destroy what is open, close the sockets. Harmless twice."""
        if self._closed:
            return
        self._closed = True
        for channel in list(self._channels.values()):
            channel.abort()
        done = self._loop.create_future()

        def closed(_now: float) -> None:
            if not done.done():
                done.set_result(None)

        self.core.close(self._clock(), closed)
        self.wake()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(done, CLOSE_TIMEOUT)
        self._pump_now()
        self.kill()

    def kill(self) -> None:
        """Close the sockets at once. Peers see a reset; nothing is unannounced. Harmless twice."""
        self._closed = True
        if self._channels:
            for channel in list(self._channels.values()):
                if channel.ended:
                    channel.abort()
                else:
                    # With an error: whoever has got a part must not take it for the whole.
                    channel.fail(_closed())
            self._pump_now()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for udp in self._sockets.values():
            udp.close()
        self._sockets.clear()
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(_closed())

    def _waiter(self) -> asyncio.Future[Any]:
        if self._closed:
            raise _closed()
        return self._loop.create_future()

    async def _answer(self, waiter: asyncio.Future[T]) -> T:
        self._waiters.add(waiter)
        try:
            return await waiter
        finally:
            self._waiters.discard(waiter)

    def now(self) -> float:
        """The time of the core, in seconds."""
        return self._clock()

    # The pump

    def wake(self) -> None:
        """Pump once, at the end of this turn of the loop."""
        if not self._pumping:
            self._pumping = True
            self._loop.call_soon(self._pump_woken)

    def _pump_woken(self) -> None:
        # Unless somebody has pumped in between: one is enough.
        if self._pumping:
            self._pump_now()

    def _received(self, which: int, data: memoryview, segment: int, source: Address) -> None:
        now = self._clock()
        # The core's `receive_run`, one step shorter.
        for datagram in self._mux.receive_run(data, segment, which, source, now):
            self.core.receive_other(datagram, which, source, now)
            self._send_early(now)

    def _pump_now(self) -> None:
        sockets = self._sockets
        if not sockets:
            return
        # What the channels ask for while they are told leaves right below.
        self._pumping = True
        self._tell_channels()
        self._pumping = False
        punch_sockets = self.core.punches.sockets
        if punch_sockets.changed:
            for which in punch_sockets.opened():
                self._open_socket(which)
        transmits = self.core.transmits(self._clock())
        if transmits:
            self._send(transmits)
            # What was waiting is on its way now: whoever paused for it may go on.
            self._tell_channels()
        if punch_sockets.changed:
            for which in punch_sockets.closed():
                udp = sockets.pop(which, None)
                if udp is not None:
                    self._dropped += udp.dropped
                    udp.close()
        self._arm()

    def _send_early(self, now: float) -> None:
        transmits = self.core.early_transmits(now)
        if transmits:
            self._send(transmits)

    def _send(self, transmits: list[Transmit]) -> None:
        for transmit in transmits if len(transmits) == 1 else together(transmits):
            udp = self._sockets.get(transmit.socket)
            if udp is not None:
                udp.send(transmit)

    def _open_socket(self, which: int) -> None:
        """One more socket for punching, on a random port."""
        host = self.address[0]
        try:
            self._sockets[which] = UdpSocket(
                host, 0, partial(self._received, which), self._pump_now
            )
        except (LocalError, OSError):
            # No descriptors are left, as a rule. Punching goes on with the sockets there are.
            self.core.socket_failed(which)

    def _tell_channels(self) -> None:
        channels = self._channels
        for stream in self._mux.poll():
            channel = channels.get(stream)
            if channel is not None:
                channel.stream_changed()

    def _arm(self) -> None:
        deadline, soonest = self.core.node.deadline(), self._mux.deadline()
        if deadline is None or (soonest is not None and soonest < deadline):
            deadline = soonest
        soonest = self._liveness.deadline()
        if deadline is None or (soonest is not None and soonest < deadline):
            deadline = soonest
        timer = self._timer
        if deadline is None or not self._sockets:
            if timer is not None:
                timer.cancel()
                self._timer = None
            return
        if timer is not None:
            # A timer that rings too early costs one look; arming anew for each packet costs more.
            if self._rings_at <= deadline:
                return
            timer.cancel()
        self._rings_at = deadline
        self._armed_at = self._clock()
        delay = max(deadline - self._armed_at, self._tick)
        self._timer = self._loop.call_later(delay, self._ring)

    def _ring(self) -> None:
        self._timer = None
        now = self._clock()
        self._look_around(now)
        self.core.on_deadline(now)
        self._look_at_peers(now)
        self._pump_now()

    def _look_around(self, now: float) -> None:
        """See whether the machine has slept, and whether it is where it was."""
        # What was overdue when the timer was set is our own delay.
        late = now - max(self._rings_at, self._armed_at)
        if now < self._glances_at and late < ASLEEP:
            return
        self._glances_at = now + GLANCE
        if late + self._machine.slept(now) > ASLEEP:
            self._liveness.woke(now)
            self.core.woke_up(now)
        if now < self._looks_at:
            return
        self._looks_at = now + LOOK
        elsewhere = self._machine.look()
        if elsewhere is not None:
            self.core.moved(self._machine.hosts, now, elsewhere=elsewhere)
            if elsewhere:
                # What they hear from us tells our peers where we are.
                self._liveness.woke(now)

    def _look_at_peers(self, now: float) -> None:
        deadline = self._liveness.deadline()
        if deadline is None or deadline > now:
            return
        beating, dead = self._liveness.look(now)
        for channel in beating:
            channel.keep_alive()
        if beating:
            self._loop.call_later(ANSWERED, self._look_at_answers, beating, now)
        for channel, silence in dead:
            channel.fail(PeerSilent(silence))

    def _look_at_answers(self, asked: list[Channel], since: float) -> None:
        """See who has not answered."""
        if self._closed:
            return
        now = self._clock()
        for channel in asked:
            if self._liveness.silence(channel, now) >= now - since:
                self.core.silent(channel.remote_public_key, now)
        self.wake()

    # Channels

    def _channel(self, connection: Connection) -> Channel:
        channel = Channel(
            connection.stream,
            connection.handshake,
            self._rng,
            wake=self.wake,
            wrote=self._wrote,
            closed=self._forget,
        )
        self._channels[connection.stream] = channel
        stream = connection.stream
        peer = stream.socket, stream.address, channel.remote_public_key
        self._liveness.add(channel, peer, self._clock())
        return channel

    def _on_moved(self, public_key: bytes, home: Path, path: Path, now: float) -> None:
        self._liveness.regroup((*home, public_key), (*path, public_key), now)

    def _wrote(self, channel: Channel) -> bool:
        """Send at once what is small and comes alone: the pump may do the rest later. Takes 50 us
        off each way of a message that somebody waits for."""
        now = self._clock()
        alone, self._wrote_at = now - self._wrote_at > TOGETHER, now
        udp = self._sockets.get(channel.stream.socket)
        done = (
            alone
            and not self._pumping
            and udp is not None
            and self._mux.transmit_next(channel.stream, now, udp.send)
        )
        self._liveness.wrote(channel, now)
        return done

    def _forget(self, channel: Channel) -> None:
        self._channels.pop(channel.stream, None)
        self._bytes_read += channel.bytes_read
        self._bytes_written += channel.bytes_written
        if channel.piped:
            self._piped_at = max(self._piped_at, channel.moved_at)
        if isinstance(channel.stream.error, StreamTimeout):
            for other in self._liveness.timed_out(channel, self._clock()):
                other.keep_alive()
        else:
            self._liveness.remove(channel)


class Listener:
    """A key that is announced and accepts connections, until it is closed."""

    def __init__(self, endpoint: Endpoint, server: Server) -> None:
        self._endpoint = endpoint
        self._server = server

    @property
    def public_key(self) -> bytes:
        """The 32 bytes that clients connect to."""
        return self._server.public_key

    async def close(self) -> None:
        """Accept nothing more and unannounce. Connections that are open stay open."""
        done = asyncio.get_running_loop().create_future()

        def closed(_now: float) -> None:
            if not done.done():
                done.set_result(None)

        self._server.close(self._endpoint.now(), closed)
        self._endpoint.wake()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(done, CLOSE_TIMEOUT)

    def kill(self) -> None:
        """As `close`, without waiting for the network."""
        self._server.close(self._endpoint.now(), lambda _now: None)
        self._endpoint.wake()


def _closed() -> Closed:
    return Closed("the endpoint is closed: open another one")
