"""The shell of a node: real UDP on 127.0.0.1, and virtual time where time is the point."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from math import inf
from random import Random
from typing import Any

import pytest

from hyperseaport.testing.clock import run_virtual
from hyperseaport.testing.network import datagrams
from hyperseaport.transport import keys
from hyperseaport.transport.channel import Channel
from hyperseaport.transport.dht import endpoint as module
from hyperseaport.transport.dht.endpoint import (
    ANSWERED,
    LOOK,
    Endpoint,
    EndpointConfig,
    Listener,
)
from hyperseaport.transport.dht.hyperdht import HyperDHT
from hyperseaport.transport.dht.messages import ANNOUNCE
from hyperseaport.transport.dht.runs import MAX_RUN, SMALL, together
from hyperseaport.transport.dht.wire import FIND_NODE, REQUEST, decode_request
from hyperseaport.transport.errors import (
    Closed,
    ConnectError,
    InvalidInput,
    LocalError,
    PeerNotFound,
    PeerSilent,
    StreamReset,
    StreamTimeout,
)
from hyperseaport.transport.keys import KeyPair
from hyperseaport.transport.liveness import EARLY, INTERVAL
from hyperseaport.transport.machine import Machine, parse_address, resolve
from hyperseaport.transport.transmit import Address, Transmit

HOST = "127.0.0.1"
SERVER_KEYS = KeyPair.from_seed(bytes([1]) * 32)
CLIENT_KEYS = KeyPair.from_seed(bytes([2]) * 32)


class Recorder(asyncio.Protocol):
    def __init__(self) -> None:
        self.data = b""
        self.ended = asyncio.Event()
        self.lost: list[Exception | None] = []
        self.arrived = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.arrived.set()

    def eof_received(self) -> bool:
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)
        self.ended.set()


class Echo(Recorder):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, Channel)
        self.channel = transport

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.channel.write(data)

    def eof_received(self) -> bool:
        self.channel.write_eof()
        return True


@contextlib.asynccontextmanager
async def network(nodes: int = 3, *, members: int = 2) -> AsyncIterator[list[Endpoint]]:
    """Members of a private network, ready; all of it is closed at the end."""
    opened: list[Endpoint] = []
    bootstrap: tuple[str, ...] = ()
    try:
        for number in range(nodes + members):
            permanent = number < nodes
            config = EndpointConfig(
                bootstrap=bootstrap,
                host=HOST,
                permanent=permanent,
                find_node_delay=0.02 if permanent and number else 0.0,
            )
            endpoint = await Endpoint.open(config, rng=Random(number))
            opened.append(endpoint)
            await endpoint.ready()
            if not bootstrap:
                bootstrap = (f"{HOST}:{endpoint.address[1]}",)
        yield opened[nodes:]
    finally:
        for endpoint in reversed(opened):
            await endpoint.close()


async def echoing(
    endpoint: Endpoint, accepted: list[Channel], allow: frozenset[bytes] | None = None
) -> Listener:
    def accept(channel: Channel) -> None:
        accepted.append(channel)
        channel.set_protocol(Echo())

    return await endpoint.listen(SERVER_KEYS, accept, allow=allow)


def descriptors() -> list[str]:
    """What this process has open, the sockets by their numbers."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(found)


def callback(timer: asyncio.TimerHandle) -> Any:
    handle: Any = timer
    return handle._callback


def timers() -> list[asyncio.TimerHandle]:
    loop: Any = asyncio.get_running_loop()
    return [timer for timer in loop._scheduled if not timer.cancelled()]


# Real sockets


async def test_a_life_with_real_sockets_leaves_nothing() -> None:
    await asyncio.get_running_loop().getaddrinfo(HOST, 1)  # the executor's thread stays
    before, rings = descriptors(), timers()
    accepted: list[Channel] = []
    async with network() as (server, client):
        assert len(descriptors()) == len(before) + 2 * 5
        assert server.address[0] == HOST
        listener = await echoing(server, accepted)
        assert listener.public_key == SERVER_KEYS.public_key
        channel = await client.connect(SERVER_KEYS.public_key, key_pair=CLIENT_KEYS)
        assert not channel.has_protocol
        mine = Recorder()
        channel.set_protocol(mine)
        channel.write(b"hello")
        await mine.arrived.wait()
        assert mine.data == b"hello"
        [peer] = accepted
        assert peer.remote_public_key == CLIENT_KEYS.public_key
        assert channel.remote_public_key == SERVER_KEYS.public_key
        assert client.channels == server.channels == 1
        channel.write_eof()
        await mine.ended.wait()
        assert mine.lost == [None]
        assert client.channels == 0
        # Two that nobody ends.
        for _ in range(2):
            left = await client.connect(SERVER_KEYS.public_key)
        left_over = Recorder()
        left.set_protocol(left_over)
    assert left_over.lost or await left_over.ended.wait()
    assert server.channels == client.channels == 0
    assert descriptors() == before
    assert timers() == rings
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await server.close()
    server.kill()
    listener.kill()
    await listener.close()
    await asyncio.sleep(0)
    assert timers() == rings
    for call in (
        client.connect(SERVER_KEYS.public_key),
        client.listen(CLIENT_KEYS, lambda _channel: None),
        client.announce(bytes(32), CLIENT_KEYS),
    ):
        with pytest.raises(Closed):
            await call


async def test_a_closed_listener_is_found_no_more() -> None:
    accepted: list[Channel] = []
    async with network() as (server, client):
        listener = await echoing(server, accepted)
        with pytest.raises(InvalidInput, match="listens already"):
            await echoing(server, accepted)
        channel = await client.connect(SERVER_KEYS.public_key)
        mine = Recorder()
        channel.set_protocol(mine)
        await listener.close()
        await listener.close()
        with pytest.raises(ConnectError):
            await client.connect(SERVER_KEYS.public_key)
        # What is open stays open.
        channel.write(b"still here")
        await mine.arrived.wait()
        assert mine.data == b"still here"
        again = await echoing(server, accepted)
        await client.connect(SERVER_KEYS.public_key)
        again.kill()
        assert len(accepted) == 2


async def test_nobody_has_the_key() -> None:
    async with network() as (_, client):
        with pytest.raises(PeerNotFound):
            await client.connect(CLIENT_KEYS.public_key)
        with pytest.raises(InvalidInput):
            await client.connect(bytes(31))
        assert client.channels == 0
        assert len(client.core.mux) == 0


async def test_a_topic_is_announced() -> None:
    async with network() as (server, _):
        assert await server.announce(keys.blake2b(b"topic"), SERVER_KEYS) == 3


async def test_a_port_in_use_is_one_line_and_leaves_no_socket() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind((HOST, 0))
        before = descriptors()
        port = taken.getsockname()[1]
        with pytest.raises(LocalError, match=f"127.0.0.1:{port}") as caught:
            await Endpoint.open(EndpointConfig(bootstrap=(), host=HOST, port=port))
        assert "\n" not in str(caught.value)
        assert descriptors() == before


# Texts


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:49737", ("127.0.0.1", 49737)),
        (" node.example:1\n", ("node.example", 1)),
        ("88.99.3.86@node1.hyperdht.org:65535", ("88.99.3.86", 65535)),
    ],
)
def test_addresses_as_text(text: str, address: Address) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "host", "host:", ":1", "@name:1", "host:0", "host:65536", "host:-1", "host:1.5"),
        *("host:" + "9" * 5000, "host:\u00b2"),
    ],
)
def test_texts_that_are_no_address(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_address(text)
    assert "HOST:PORT" in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_names_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    async def lookup(host: str, port: int, *, family: int) -> list[Any]:
        asked.append((host, family))
        if host == "weird":
            host.encode("idna").decode("utf-16")
        if not host.endswith(("1", "2")):
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(family, socket.SOCK_DGRAM, 17, "", (f"10.0.0.{host[-1]}", port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", lookup)
    found = await resolve(("name1:5", "unknown:6", "8.8.8.1@name:7", "name2:8"))
    assert found == (("10.0.0.1", 5), ("10.0.0.1", 7), ("10.0.0.2", 8))
    assert asked[2] == ("8.8.8.1", socket.AF_INET)
    assert await resolve(()) == ()
    with pytest.raises(LocalError, match="unknown has no address"):
        await resolve(("unknown:6",))
    with pytest.raises(InvalidInput):
        await resolve(("name1:5", "no port"))


@pytest.mark.parametrize("name", ["a..b", "x" * 64, ".example"])
async def test_names_that_cannot_be_one(name: str) -> None:
    """They fail before the resolver is asked, with another error than its own."""
    with pytest.raises(LocalError, match="has no address"):
        await resolve((f"{name}:1",))
    assert await resolve((f"{name}:1", "127.0.0.1:2")) == (("127.0.0.1", 2),)


# Virtual time


class MemoryUdp:
    """What an endpoint sees of a UDP socket, on a wire inside this process."""

    delay = 0.002
    bound: dict[Address, MemoryUdp]
    #: (time, datagram) of all that was sent.
    sent: list[tuple[float, bytes]]

    def __init__(
        self,
        host: str,
        port: int,
        on_run: Callable[[memoryview, int, Address], None],
        on_batch: Callable[[], None],
        *,
        bound: socket.socket | None = None,
    ) -> None:
        assert bound is None, "ports are not reserved on this wire"
        self.address = (host, port or 10_000 + len(self.bound))
        assert self.address not in self.bound
        self.bound[self.address] = self
        self.dropped = 0
        self._loop = asyncio.get_running_loop()
        self._on_run = on_run
        self._on_batch = on_batch
        self._inbox: deque[tuple[bytes, Address]] = deque()
        self.closed = False

    def send(self, transmit: Transmit) -> None:
        assert not self.closed
        to = self.bound.get(transmit.address)
        for datagram in datagrams(transmit):
            self.sent.append((self._loop.time(), datagram))
            if to is not None:
                to._inbox.append((datagram, self.address))
                self._loop.call_later(self.delay, to._arrive)

    def close(self) -> None:
        self.closed = True

    def _arrive(self) -> None:
        datagram, source = self._inbox.popleft()
        if not self.closed:
            memory = bytearray(datagram)
            self._on_run(memoryview(memory), max(len(memory), 1), source)
            # The memory is used again at once: whoever kept it would see.
            memory[:] = bytes(len(memory))
            self._on_batch()


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> type[MemoryUdp]:
    """Endpoints of this test have sockets in memory, and resolve without threads."""

    class Wire(MemoryUdp):
        """With a network of its own."""

    Wire.bound = {}
    Wire.sent = []

    async def addresses(texts: Sequence[str]) -> tuple[Address, ...]:
        return tuple(map(parse_address, texts))

    monkeypatch.setattr(module, "UdpSocket", Wire)
    monkeypatch.setattr(module, "resolve", addresses)
    return Wire


async def virtual_pair(
    accepted: list[Channel], allow: frozenset[bytes] | None = None
) -> tuple[Endpoint, Endpoint]:
    """A permanent node that listens, and a member beside it."""
    config = EndpointConfig(bootstrap=(), host="10.0.0.1", port=49737, permanent=True)
    server = await Endpoint.open(config, rng=Random(1))
    config = EndpointConfig(bootstrap=("10.0.0.1:49737",), host="10.0.0.2")
    client = await Endpoint.open(config, rng=Random(2))
    await server.ready()
    await client.ready()
    await echoing(server, accepted, allow)
    return server, client


def test_a_client_that_is_not_allowed_is_refused(wire: type[MemoryUdp]) -> None:
    async def scenario() -> None:
        accepted: list[Channel] = []
        server, client = await virtual_pair(accepted, frozenset((CLIENT_KEYS.public_key,)))
        with pytest.raises(ConnectError, match="refuses this key"):
            await client.connect(SERVER_KEYS.public_key, key_pair=KeyPair.from_seed(bytes(32)))
        assert accepted == []
        assert client.channels == server.channels == 0
        assert len(client.core.mux) == len(server.core.mux) == 0
        await client.connect(SERVER_KEYS.public_key, key_pair=CLIENT_KEYS)
        assert len(accepted) == 1
        await client.close()
        await server.close()

    run_virtual(scenario())


def beats(channels: Sequence[Channel]) -> list[tuple[float, Channel]]:
    """(time, channel) of every heartbeat from now on."""
    loop = asyncio.get_running_loop()
    sent: list[tuple[float, Channel]] = []
    for channel in channels:

        def beat(channel: Channel = channel, real: Any = channel.keep_alive) -> None:
            sent.append((loop.time(), channel))
            real()

        channel.keep_alive = beat  # type: ignore[method-assign]
    return sent


async def idle_channels(client: Endpoint, count: int) -> list[Channel]:
    channels = []
    for _ in range(count):
        channel = await client.connect(SERVER_KEYS.public_key)
        channel.set_protocol(Recorder())
        channels.append(channel)
    return channels


def test_idle_channels_of_one_peer_share_a_heartbeat(wire: type[MemoryUdp]) -> None:
    async def scenario() -> None:
        accepted: list[Channel] = []
        server, client = await virtual_pair(accepted)
        channels = await idle_channels(client, 10)
        sent = beats(channels)
        await asyncio.sleep(10 * INTERVAL + 1)
        # Each one in its turn, one an interval.
        assert [channel for _, channel in sent] == channels
        assert all(
            INTERVAL - EARLY <= after[0] - before[0] <= INTERVAL + 0.05
            for before, after in itertools.pairwise(sent)
        )
        rings = [timer for timer in timers() if callback(timer) == client._ring]
        assert rings == [client._timer]
        # They reach the peer and are not delivered.
        assert sum(peer.bytes_moved for peer in accepted) == 0
        # What one channel writes proves the peer for all.
        sent.clear()
        for _ in range(20):
            channels[3].write(b"busy")
            await asyncio.sleep(1.0)
        assert sent == []
        for channel in channels:
            channel.abort()
        sent.clear()
        await asyncio.sleep(60)
        assert sent == []
        assert len(client._liveness) == 0
        await client.close()
        await server.close()

    run_virtual(scenario())


def test_many_idle_channels_cost_a_handful_of_datagrams(wire: type[MemoryUdp]) -> None:
    async def scenario() -> None:
        accepted: list[Channel] = []
        server, client = await virtual_pair(accepted)
        await idle_channels(client, 500)
        await asyncio.sleep(60)
        wire.sent.clear()
        await asyncio.sleep(10 * INTERVAL)
        udx = [datagram for _, datagram in wire.sent if datagram[0] == 0xFF]
        # A message and its ACK, each way.
        assert 0 < len(udx) <= 10 * 4 + 4
        assert len(accepted) == server.channels == client.channels == 500
        await client.close()
        await server.close()

    run_virtual(scenario())


def test_bytes_are_counted_over_its_whole_life(wire: type[MemoryUdp]) -> None:
    async def scenario() -> None:
        accepted: list[Channel] = []
        server, client = await virtual_pair(accepted)
        one, two = await idle_channels(client, 2)
        # Everything is echoed, but not everything is taken.
        one.pause_reading()
        one.write(b"x" * 1000)
        two.write(b"x" * 234)
        await asyncio.sleep(1.0)
        # Those that live, those that have ended, and some of each.
        for ended in (0, 1, 2):
            for channel in (one, two)[:ended]:
                channel.abort()
            await asyncio.sleep(1.0)
            assert client.channels == server.channels == 2 - ended
            ours, theirs = client.metrics(), server.metrics()
            assert (ours["bytes.sent"], ours["bytes.received"]) == (1234, 234)
            assert (theirs["bytes.sent"], theirs["bytes.received"]) == (1234, 1234)
        await client.close()
        await server.close()

    run_virtual(scenario())


def test_when_bytes_last_moved_through_pipes(wire: type[MemoryUdp]) -> None:
    async def scenario() -> None:
        accepted: list[Channel] = []
        server, client = await virtual_pair(accepted)
        own, piped = await idle_channels(client, 2)
        assert own.moved_at == piped.moved_at == -inf
        piped.piped = True
        own.write(b"of the program itself")
        await asyncio.sleep(1.0)
        assert client.piped_at == -inf
        piped.write(b"x")
        wrote = client.now()
        await asyncio.sleep(1.0)
        # The echo is the last that moved.
        echoed = client.piped_at
        assert wrote < echoed < wrote + 0.5
        # Heartbeats are nobody's bytes, and the channel's end forgets nothing.
        await asyncio.sleep(60.0)
        piped.abort()
        own.write(b"y")
        await asyncio.sleep(1.0)
        assert (client.channels, client.piped_at) == (1, echoed)
        await client.close()
        await server.close()

    run_virtual(scenario())


async def losses(channel: Channel) -> list[Exception | None]:
    """What its protocol was told, once that has been told."""
    protocol = channel.get_protocol()
    assert isinstance(protocol, Recorder)
    await protocol.ended.wait()
    return protocol.lost


def vanish(endpoint: Endpoint) -> None:
    """As if its host had lost its power."""
    for udp in endpoint._sockets.values():
        udp.closed = True  # type: ignore[attr-defined]
        udp.send = lambda _transmit: None  # type: ignore[assignment]


@pytest.mark.parametrize("traffic", ["none", "ours", "theirs"])
def test_all_channels_to_a_vanished_peer_end_soon(wire: type[MemoryUdp], traffic: str) -> None:
    """Whether anything was under way or not, and half-closed ones too."""

    async def scenario() -> None:
        accepted: list[Channel] = []
        server, client = await virtual_pair(accepted)
        loop = asyncio.get_running_loop()
        channels = await idle_channels(client, 50)
        for channel in accepted:
            channel.set_protocol(Recorder())  # who does not end when we do
        for channel in channels[40:]:
            channel.write_eof()
        await asyncio.sleep(7.3)
        for channel in {"none": [], "ours": channels[:5], "theirs": accepted[:5]}[traffic]:
            channel.write(b"under way" * 50_000)
        await asyncio.sleep(0.004)
        before = loop.time()
        vanish(server)
        for channel in channels:
            [error] = await losses(channel)
            assert isinstance(error, StreamTimeout)
        assert 10.0 <= loop.time() - before <= 15.5
        assert isinstance(error, PeerSilent)
        assert str(error) == "the peer was silent for 15 s; check the network and connect again"
        assert len(client.core.mux) == 0
        client.kill()
        server.kill()

    run_virtual(scenario())


def test_one_half_closed_channel_finds_that_its_peer_vanished(wire: type[MemoryUdp]) -> None:
    async def scenario() -> None:
        accepted: list[Channel] = []
        server, client = await virtual_pair(accepted)
        loop = asyncio.get_running_loop()
        [channel] = await idle_channels(client, 1)
        accepted[0].set_protocol(Recorder())
        channel.write_eof()
        await asyncio.sleep(3600)
        assert client.channels == server.channels == 1
        before = loop.time()
        vanish(server)
        await losses(channel)
        assert 10.0 <= loop.time() - before <= 15.5
        client.kill()
        server.kill()

    run_virtual(scenario())


def test_a_peer_that_forgot_its_channels_is_found_out(wire: type[MemoryUdp]) -> None:
    """One channel is heard, the others are forgotten, as when a program starts again where it was:
    the first to time out has all the others ask."""

    async def scenario() -> None:
        accepted: list[Channel] = []
        server, client = await virtual_pair(accepted)
        loop = asyncio.get_running_loop()
        channels = await idle_channels(client, 20)
        channels[1].write_eof()
        accepted[1].set_protocol(Recorder())
        await asyncio.sleep(1)

        async def talk() -> None:
            while True:
                accepted[-1].write(b"still here")
                await asyncio.sleep(0.5)

        talking = asyncio.create_task(talk())
        for channel in accepted[:-1]:
            channel.stream._close(None, None, lingering=False)  # without a word
        before = loop.time()
        for channel in channels[:-1]:
            await losses(channel)
        # Each peer's turn would come only every 100 s.
        assert loop.time() - before < INTERVAL + 13.5 + 15.5
        await asyncio.sleep(60)
        assert client.channels == 1
        assert not channels[-1].is_closing()
        talking.cancel()
        client.kill()
        server.kill()

    run_virtual(scenario())


class Places:
    """Machines of this test: what they are told by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asleep: dict[str, float] = {}
        self.hosts: dict[str, tuple[str, ...]] = {}
        self.looks = 0
        places = self

        class Told(Machine):
            def slept(self, now: float) -> float:
                return places.asleep.pop(self._host, 0.0)

            def look(self) -> bool | None:
                places.looks += 1
                hosts = places.hosts.get(self._host, self.hosts)
                if hosts == self.hosts:
                    return None
                self.hosts = hosts
                return True

        monkeypatch.setattr(module, "Machine", Told)


def asked(wire: type[MemoryUdp], since: float) -> list[tuple[float, int]]:
    """(time, command) of the DHT requests that were sent."""
    found = []
    for when, datagram in wire.sent:
        if when >= since and datagram[0] == REQUEST:
            command = decode_request(datagram, 0, ("10.0.0.1", 1)).command
            found.append((when, command))
    return found


@pytest.mark.parametrize("stopped", [False, True], ids=["slept", "stopped"])
def test_after_a_sleep_everything_is_looked_at_at_once(
    wire: type[MemoryUdp], monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """A clock that stood still while the machine slept, and one that went on while the program was
    stopped. Nobody is dead by that alone."""

    async def scenario() -> None:
        places = Places(monkeypatch)
        accepted: list[Channel] = []
        server, client = await virtual_pair(accepted)
        await client.listen(CLIENT_KEYS, lambda _channel: None)
        loop: Any = asyncio.get_running_loop()
        channels = await idle_channels(client, 5)
        await asyncio.sleep(100)
        if stopped:
            loop._clock.now += 3600
        else:
            places.asleep = {"10.0.0.1": 3600.0, "10.0.0.2": 3600.0}
        woke = loop.time()
        sent = beats(channels)
        await asyncio.sleep(0.0 if stopped else 3.0)
        await asyncio.sleep(0.1)
        assert len(sent) == 1
        commands = [command for _, command in asked(wire, woke)]
        assert ANNOUNCE in commands
        assert FIND_NODE in commands
        await asyncio.sleep(60)
        assert client.channels == server.channels == 5
        client.kill()
        server.kill()

    run_virtual(scenario())


def test_a_new_address_is_announced_at_once(
    wire: type[MemoryUdp], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        places = Places(monkeypatch)
        accepted: list[Channel] = []
        server, client = await virtual_pair(accepted)
        await client.listen(CLIENT_KEYS, lambda _channel: None)
        loop = asyncio.get_running_loop()
        await asyncio.sleep(100)
        looks = places.looks
        await asyncio.sleep(60)
        assert 2 * 60 / 5 - 2 <= places.looks - looks <= 2 * 60 / LOOK
        places.hosts["10.0.0.2"] = ("10.0.0.3",)
        moved = loop.time()
        await asyncio.sleep(5.1)
        assert ANNOUNCE in [command for _, command in asked(wire, moved)]
        assert client.core._context.local_hosts == ("10.0.0.3",)
        assert ("10.0.0.3", client.address[1]) in client.core._context.addresses()
        client.kill()
        server.kill()

    run_virtual(scenario())


def test_channels_go_on_from_a_new_address(
    wire: type[MemoryUdp], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        places = Places(monkeypatch)
        accepted: list[Channel] = []
        server, client = await virtual_pair(accepted)
        channels = await idle_channels(client, 3)
        await asyncio.sleep(101)
        for udp in client._sockets.values():
            wire.bound[("10.0.0.3", udp.address[1])] = wire.bound.pop(udp.address)
            udp.address = ("10.0.0.3", udp.address[1])
        places.hosts["10.0.0.2"] = ("10.0.0.3",)
        # The looks are LOOK apart at least, when a timer rings.
        await asyncio.sleep(INTERVAL)
        assert {channel.stream.address[0] for channel in accepted} == {"10.0.0.3"}
        assert server.metrics()["peers.moved"] == 1
        for channel in (*channels, *accepted):
            channel.write(b"still here")
        channels.append(await client.connect(SERVER_KEYS.public_key))
        await asyncio.sleep(60)
        assert client.channels == server.channels == 4
        assert len(server._liveness) == 1
        client.kill()
        server.kill()

    run_virtual(scenario())


def test_who_does_not_answer_a_heartbeat_is_suspected(
    wire: type[MemoryUdp], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        suspects: list[tuple[float, bytes]] = []
        monkeypatch.setattr(HyperDHT, "silent", lambda _core, key, now: suspects.append((now, key)))
        accepted: list[Channel] = []
        server, client = await virtual_pair(accepted)
        (channel,) = await idle_channels(client, 1)
        await asyncio.sleep(100)
        assert not suspects
        wire.bound.clear()  # the network is gone
        gone = loop.time()
        await asyncio.sleep(INTERVAL + ANSWERED + 0.1)
        assert SERVER_KEYS.public_key in [key for _, key in suspects]
        assert min(when for when, _ in suspects) >= gone + ANSWERED
        await losses(channel)
        client.kill()
        server.kill()
        suspects.clear()
        await asyncio.sleep(60)
        assert not suspects

    run_virtual(scenario())


def test_small_datagrams_of_one_size_for_one_address_become_a_run() -> None:
    here, there = ("10.0.0.1", 1), ("10.0.0.2", 2)
    sent = [
        Transmit(0, here, (b"aa", b"a")),
        Transmit(0, here, (b"bbb",)),
        Transmit(0, here, (b"cc",)),
        Transmit(1, here, (b"dd",)),
        Transmit(1, there, (b"ee",)),
        Transmit(1, there, (b"f" * 4, b"f" * 4), 4),
        Transmit(1, there, (b"g" * 4,)),
    ]
    runs = list(together(sent))
    assert runs == [Transmit(0, here, (b"aa", b"a", b"bbb"), 3), *sent[2:]]
    assert [each for run in runs for each in datagrams(run)] == [
        each for transmit in sent for each in datagrams(transmit)
    ]


@pytest.mark.parametrize("count", [1, MAX_RUN, MAX_RUN + 1, 3 * MAX_RUN])
def test_a_run_is_no_longer_than_the_kernel_takes(count: int) -> None:
    sent = [Transmit(0, ("10.0.0.1", 1), (bytes([n % 256]),)) for n in range(count)]
    runs = list(together(sent))
    assert max(len(run.buffers) for run in runs) <= MAX_RUN
    assert len(runs) == -(-count // MAX_RUN)
    assert [each for run in runs for each in datagrams(run)] == [t.buffers[0] for t in sent]
    large = [Transmit(0, ("10.0.0.1", 1), (bytes(SMALL + 1),)) for _ in range(3)]
    assert list(together(large)) == large


def test_channels_live_as_long_as_both_sides_do(wire: type[MemoryUdp]) -> None:
    async def scenario() -> None:
        accepted: list[Channel] = []
        server, client = await virtual_pair(accepted)
        channel = await client.connect(SERVER_KEYS.public_key)
        protocol = Recorder()
        channel.set_protocol(protocol)
        await asyncio.sleep(3600)
        assert protocol.lost == []
        wire.bound.clear()  # the network is gone
        await asyncio.sleep(60)
        assert len(protocol.lost) == 1
        assert isinstance(protocol.lost[0], TimeoutError)
        assert client.channels == server.channels == 0
        client.kill()
        server.kill()

    run_virtual(scenario())


def test_a_connect_may_be_cancelled_at_any_moment(wire: type[MemoryUdp]) -> None:
    """Whenever that is, no channel and no stream stays on either side."""

    async def scenario() -> None:
        accepted: list[Channel] = []
        server, client = await virtual_pair(accepted)
        completed = 0
        for step in range(60):
            accepted.clear()
            # An identity of its own each time: nothing is remembered from the last connect.
            connecting = asyncio.ensure_future(
                client.connect(
                    SERVER_KEYS.public_key, key_pair=KeyPair.from_seed(bytes([step]) * 32)
                )
            )
            await asyncio.sleep(step * 0.00025)
            for _ in range(step % 5):
                await asyncio.sleep(0)
            if connecting.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await connecting
            else:
                completed += 1
                connecting.result().abort()
            assert client.channels == 0
            assert len(client.core.mux) == 0
            assert client._waiters == set()
            for channel in accepted:
                protocol = channel.get_protocol()
                assert isinstance(protocol, Recorder)
                async with asyncio.timeout(120):
                    await protocol.ended.wait()
            await asyncio.sleep(30)
            assert server.channels == 0
            assert len(server.core.mux) == 0
        assert 0 < completed < 60
        await client.close()
        await server.close()

    run_virtual(scenario())


def test_closing_tells_everybody_who_waits(wire: type[MemoryUdp]) -> None:
    async def scenario() -> None:
        config = EndpointConfig(bootstrap=("10.9.9.9:9",), host="10.0.0.2")
        endpoint = await Endpoint.open(config, rng=Random(2))
        waiting = [
            asyncio.ensure_future(each)
            for each in (
                endpoint.ready(),
                endpoint.connect(SERVER_KEYS.public_key),
                endpoint.listen(CLIENT_KEYS, lambda _channel: None),
                endpoint.announce(bytes(32), CLIENT_KEYS),
            )
        ]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in waiting)
        await endpoint.close()
        for task in waiting:
            with pytest.raises(Closed):
                await task
        assert timers() == []
        assert len(endpoint.core.mux) == 0

    run_virtual(scenario())


@pytest.mark.parametrize("leave", ["close", "kill"])
def test_nothing_moves_after_the_end(wire: type[MemoryUdp], leave: str) -> None:
    async def scenario() -> None:
        accepted: list[Channel] = []
        server, client = await virtual_pair(accepted)
        channel = await client.connect(SERVER_KEYS.public_key)
        protocol = Recorder()
        channel.set_protocol(protocol)
        channel.write(b"under way")
        for endpoint in (client, server):
            if leave == "close":
                await endpoint.close()
            else:
                endpoint.kill()
            endpoint.wake()
        await asyncio.sleep(1)
        # What is cut short says so: nobody takes a part for the whole.
        (error,) = protocol.lost
        assert isinstance(error, Closed) if leave == "kill" else error is None
        sent = len(wire.sent)
        assert timers() == []
        channel.write(b"ignored")
        channel.close()
        await asyncio.sleep(600)
        assert timers() == []
        assert len(wire.sent) == sent
        assert all(udp.closed for udp in wire.bound.values())

    run_virtual(scenario())


@pytest.mark.parametrize("leave", ["close", "kill"])
def test_the_end_resets_the_peers_at_once(wire: type[MemoryUdp], leave: str) -> None:
    async def scenario() -> None:
        accepted: list[Channel] = []
        server, client = await virtual_pair(accepted)
        channel = await client.connect(SERVER_KEYS.public_key)
        protocol = Recorder()
        channel.set_protocol(protocol)
        await asyncio.sleep(1)
        before = asyncio.get_running_loop().time()
        if leave == "close":
            await server.close()
        else:
            server.kill()
        await protocol.ended.wait()
        assert isinstance(protocol.lost[0], StreamReset)
        assert asyncio.get_running_loop().time() - before < 1
        await client.close()

    run_virtual(scenario())


def test_a_small_message_leaves_at_once_and_many_leave_together(wire: type[MemoryUdp]) -> None:
    async def scenario() -> None:
        accepted: list[Channel] = []
        server, client = await virtual_pair(accepted)
        one, two = await idle_channels(client, 2)
        await asyncio.sleep(1.0)
        wire.sent.clear()
        one.write(b"alone")
        assert len(wire.sent) == 1
        two.write(b"so soon")
        one.write(b"after it")
        assert len(wire.sent) == 1
        await asyncio.sleep(0)
        assert len(wire.sent) == 3
        await asyncio.sleep(1.0)
        two.write(b"x" * 5000)
        assert one.bytes_read == len(b"aloneafter it")
        await asyncio.sleep(1.0)
        assert two.bytes_read == len(b"so soon") + 5000
        await client.close()
        await server.close()

    run_virtual(scenario())
