"""The shell of a HyperDHT node: sockets, clock and randomness for the sans-IO core.

Whatever happens (datagrams, a deadline, a write on a channel) ends in one `_pump` for each turn of
the event loop, so that what belongs together leaves together.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from random import Random, SystemRandom
from typing import Any, TypeVar

from ..channel import Channel
from ..errors import Closed, InvalidInput, LocalError
from ..keys import KeyPair
from ..transmit import CLIENT_SOCKET, SERVER_SOCKET, Address, Buffer, Transmit
from ..udp import UdpSocket
from ..udx.stream import Stream
from .hyperdht import Attempt, Connection, HyperDHT, HyperDHTConfig
from .node import NodeConfig
from .records import Stored
from .server import Server

T = TypeVar("T")

#: Every interface: a node must be reached from wherever its peers are. What may be reached through
#: it is decided by keys.
ANY_HOST = "0.0.0.0"
DEFAULT_PORT = 49737
#: Seconds of write silence after which a channel proves that it lives.
KEEP_ALIVE = 5.0
#: Seconds by which keep-alives may be early, so that many leave in one go: however many channels
#: are idle, they cost ten wake-ups in five seconds.
KEEP_ALIVE_EARLY = 0.5
#: Datagrams of at most this many bytes are put together, at most so many to a run: what the kernel
#: takes in one call.
SMALL = 512
MAX_RUN = 64
#: Seconds that closing may take to tell the network, before it happens anyway.
CLOSE_TIMEOUT = 5.0

#: The public network (spec: hyperdht 2.13).
PUBLIC_BOOTSTRAP = (
    "88.99.3.86@node1.hyperdht.org:49737",
    "142.93.90.113@node2.hyperdht.org:49737",
    "138.68.147.8@node3.hyperdht.org:49737",
)


@dataclass(frozen=True, slots=True)
class EndpointConfig:
    """How a node stands in the network."""

    #: ``host:port`` or ``ip@name:port``; empty for a node that is itself the network's first.
    bootstrap: tuple[str, ...] = PUBLIC_BOOTSTRAP
    host: str = ANY_HOST
    #: UDP port of the server socket; 0 takes a free one.
    port: int = 0
    #: True for a node of a private network: its own address is known, it stores and routes at once.
    permanent: bool = False
    #: Seconds by which answers to newcomers are late (spec: hyperdht 2.13).
    find_node_delay: float = 0.0
    key_pair: KeyPair | None = None


class Endpoint:
    """A running node. `open` it, `close` it; everything else happens on the running event loop."""

    core: HyperDHT
    address: Address

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._sockets: dict[int, UdpSocket] = {}
        self._channels: dict[Stream, Channel] = {}
        # Channels by the time of their last write, oldest first: one timer serves all keep-alives.
        self._written: dict[Channel, float] = {}
        # Those who wait for the network: told when the endpoint closes, as no answer comes then.
        self._waiters: set[asyncio.Future[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._pumping = False
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
        for which, port in ((SERVER_SOCKET, config.port), (CLIENT_SOCKET, 0)):
            self._sockets[which] = UdpSocket(
                config.host, port, partial(self._received, which), self._pump_now
            )
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
                local_hosts=local_hosts(config.host),
                epoch=time.time() - self._loop.time(),
            ),
            self._rng,
        )
        self.core.start(
            self._loop.time(),
            server_port=server_port,
            client_port=self._sockets[CLIENT_SOCKET].address[1],
        )
        self.wake()

    @property
    def channels(self) -> int:
        """Channels that are open now."""
        return len(self._channels)

    def metrics(self) -> dict[str, int]:
        """What was counted since the start, and what is held now, by dotted names: ``udx.*`` and
        ``dht.*`` count datagrams (`udx.stream.Stats`, `dht.rpc.Stats`), ``*.dropped`` what a limit
        kept from being done."""
        core = self.core
        values = {
            "channels": len(self._channels),
            "udp.dropped": sum(udp.dropped for udp in self._sockets.values()),
            "router.dropped": core.router.dropped,
            "store.dropped": core.store.dropped,
            "udx.streams": len(core.mux),
        }
        for name, stats in (("udx", core.mux.stats), ("dht", core.node.stats)):
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

    async def connect(self, public_key: bytes, *, key_pair: KeyPair | None = None) -> Channel:
        """A channel to whoever listens under the 32-byte key. It has no protocol yet: whoever gets
        it sets one. Raises `ConnectError` when nobody can be reached, `InvalidInput` for a key that
        cannot be one, `Closed` if the endpoint closes. Cancelling abandons the attempt."""
        waiter: asyncio.Future[Channel] = self._waiter()

        def opened(channel: Channel) -> None:
            if waiter.done():
                channel.abort()
            else:
                waiter.set_result(channel)

        def failed(error: Exception) -> None:
            if not waiter.done():
                waiter.set_exception(error)

        attempt = self.dial(public_key, key_pair, opened, failed)
        try:
            return await self._answer(waiter)
        except asyncio.CancelledError:
            attempt.cancel(self._loop.time())
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                waiter.result().abort()
            self.wake()
            raise

    def dial(
        self,
        public_key: bytes,
        key_pair: KeyPair | None,
        on_open: Callable[[Channel], None],
        on_error: Callable[[Exception], None],
    ) -> Attempt:
        """`connect` without a task: one of the callbacks is called, never before this returns,
        unless the attempt is cancelled or the endpoint closes. Raises `InvalidInput` for a key that
        cannot be one, `Closed` once the endpoint closes."""
        if self._closed:
            raise _closed()

        def opened(connection: Connection, _now: float) -> None:
            # Here and not when somebody gets to it: the stream may change in between.
            on_open(self._channel(connection))

        def failed(error: Exception, _now: float) -> None:
            on_error(error)

        attempt = self.core.connect(
            public_key, self._loop.time(), key_pair=key_pair, on_open=opened, on_error=failed
        )
        self.wake()
        return attempt

    async def listen(
        self,
        key_pair: KeyPair,
        on_channel: Callable[[Channel], None],
        *,
        allow: frozenset[bytes] | None = None,
    ) -> Listener:
        """Announce the key and accept. ``allow`` is the set of client keys that get an answer at
        all; None admits everybody. Returns once the first announcements are out. Raises
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
            self._loop.time(),
            firewall=rejects,
            on_connection=connected,
            on_listening=listening,
        )
        self.wake()
        listener = Listener(self, server)
        try:
            await self._answer(waiter)
        except asyncio.CancelledError:
            server.close(self._loop.time(), lambda _now: None)
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

        query = self.core.records.announce(topic, key_pair, self._loop.time(), stored)
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

        self.core.close(self._loop.time(), closed)
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
                channel.abort()
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
        self.core.receive_run(data, segment, which, source, self._loop.time())

    def _pump_now(self) -> None:
        if not self._sockets:
            return
        # What the channels ask for while they are told leaves right below.
        self._pumping = True
        self._tell_channels()
        self._pumping = False
        sockets = self._sockets
        for transmit in _together(self.core.transmits(self._loop.time())):
            udp = sockets.get(transmit.socket)
            if udp is not None:
                udp.send(transmit)
        # What was waiting is on its way now: whoever paused for it may go on.
        self._tell_channels()
        self._arm()

    def _tell_channels(self) -> None:
        channels = self._channels
        for stream in self.core.mux.poll():
            channel = channels.get(stream)
            if channel is not None:
                channel.stream_changed()

    def _arm(self) -> None:
        deadline = self.core.deadline()
        if self._written:
            oldest = next(iter(self._written.values())) + KEEP_ALIVE
            deadline = oldest if deadline is None else min(deadline, oldest)
        timer = self._timer
        if deadline is None or not self._sockets:
            if timer is not None:
                timer.cancel()
                self._timer = None
            return
        if timer is not None:
            # A timer that rings too early costs one look; arming anew for each packet costs more.
            if timer.when() <= deadline and not timer.cancelled():
                return
            timer.cancel()
        self._timer = self._loop.call_at(deadline, self._ring)

    def _ring(self) -> None:
        self._timer = None
        now = self._loop.time()
        self.core.on_deadline(now)
        if self._written and next(iter(self._written.values())) + KEEP_ALIVE <= now:
            self._keep_alive(now)
        self._pump_now()

    def _keep_alive(self, now: float) -> None:
        latest = now + KEEP_ALIVE_EARLY - KEEP_ALIVE
        while self._written:
            channel, written = next(iter(self._written.items()))
            if written > latest:
                return
            channel.keep_alive()
            self._wrote(channel)

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
        return channel

    def _wrote(self, channel: Channel) -> None:
        self._written.pop(channel, None)
        self._written[channel] = self._loop.time()

    def _forget(self, channel: Channel) -> None:
        self._channels.pop(channel.stream, None)
        self._written.pop(channel, None)


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
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def closed(_now: float) -> None:
            if not done.done():
                done.set_result(None)

        self._server.close(loop.time(), closed)
        self._endpoint.wake()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(done, CLOSE_TIMEOUT)

    def kill(self) -> None:
        """As `close`, without waiting for the network."""
        self._server.close(asyncio.get_running_loop().time(), lambda _now: None)
        self._endpoint.wake()


async def resolve(bootstrap: Sequence[str]) -> tuple[Address, ...]:
    """IPv4 addresses of ``host:port`` or ``ip@name:port`` entries; a name that does not resolve is
    left out as long as another entry is left. Raises `InvalidInput` for a text of another form."""
    loop = asyncio.get_running_loop()
    addresses: list[Address] = []
    unresolved = ""
    for text in bootstrap:
        host, port = parse_address(text)
        try:
            found = await loop.getaddrinfo(host, port, family=socket.AF_INET)
        except (OSError, UnicodeError):  # of names that cannot be one
            unresolved = host
            continue
        addresses.append((str(found[0][4][0]), port))
    if unresolved and not addresses:
        raise LocalError(f"bootstrap node {unresolved} has no address: check the name and the DNS")
    return tuple(addresses)


def parse_address(text: str) -> Address:
    """Host and port of ``host:port`` or ``ip@name:port`` (then the ip). Raises `InvalidInput`."""
    host, separator, port = text.strip().rpartition(":")
    host = host.partition("@")[0]
    valid = separator and host and port.isdecimal() and len(port) <= 5
    if not valid or not 0 < int(port) < 65536:
        raise InvalidInput(f"{text!r} is not HOST:PORT with a port from 1 to 65535")
    return host, int(port)


def _together(transmits: list[Transmit]) -> Iterator[Transmit]:
    """The same datagrams in the same order, but those of one size for one address in a row (ACKs
    and keep-alives of many streams between two nodes) as one run."""
    start = 0
    while start < len(transmits):
        first = transmits[start]
        end = start + 1
        size = _alike(first)
        buffers: tuple[Buffer, ...] = first.buffers
        while end < len(transmits) and end - start < MAX_RUN and size:
            other = transmits[end]
            if other.address != first.address or other.socket != first.socket:
                break
            if _alike(other) != size:
                break
            buffers += other.buffers
            end += 1
        start = end
        if len(buffers) == len(first.buffers):
            yield first
        else:
            yield Transmit(first.socket, first.address, buffers, size)


def _alike(transmit: Transmit) -> int:
    """The bytes of a single small datagram; 0 for any other transmit."""
    if transmit.segment or len(transmit.buffers) > 4:
        return 0
    size = sum(map(len, transmit.buffers))
    return size if size <= SMALL else 0


def _closed() -> Closed:
    return Closed("the endpoint is closed: open another one")


def local_hosts(host: str) -> tuple[str, ...]:
    """The IPv4 addresses under which peers on the same host or LAN reach a socket bound to
    ``host``: itself, or those of all interfaces but the loopback (spec: hyperdht 4.4)."""
    if host != ANY_HOST:
        return (host,)
    return tuple(dict.fromkeys(_interface_hosts())) or ("127.0.0.1",)


def _interface_hosts() -> Sequence[str]:
    if sys.platform != "linux":
        try:
            hosts: Sequence[str] = socket.gethostbyname_ex(socket.gethostname())[2]
        except OSError:
            return ()
        return [host for host in hosts if not ipaddress.ip_address(host).is_loopback]
    import fcntl

    siocgifaddr = 0x8915
    hosts = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), siocgifaddr, request)
            except OSError:
                continue  # an interface without an IPv4 address
            found = socket.inet_ntoa(answer[20:24])
            if not ipaddress.ip_address(found).is_loopback:
                hosts.append(found)
    return hosts
