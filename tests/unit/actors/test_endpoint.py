"""The endpoint actor with real UDP on the loopback: what it owes to those who live and who die."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import pytest
from support.pipes import Peer, descriptors, soon
from support.registry import Recorder

from hyperseaport.actors import endpoint as endpoint_module
from hyperseaport.actors.actor import Address, Crashed, LocalError
from hyperseaport.actors.deployment import SEED_NODES, dht_tree
from hyperseaport.actors.endpoint import EndpointActor
from hyperseaport.actors.messages import (
    Accepted,
    Announced,
    AnnounceTopic,
    BorrowForwarder,
    Connect,
    Connected,
    ConnectFailed,
    Describe,
    EndpointReady,
    Listen,
    ListenFailed,
    Listening,
    Measure,
    Unlisten,
    Unlistened,
)
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.supervisor import Supervisor
from hyperseaport.transport.dht import endpoint as transport_endpoint
from hyperseaport.transport.dht.endpoint import Endpoint, EndpointConfig
from hyperseaport.transport.errors import InvalidInput, PeerNotFound
from hyperseaport.transport.keys import KeyPair
from hyperseaport.transport.transmit import SERVER_SOCKET
from hyperseaport.transport.udx import packet as wire
from hyperseaport.transport.udx.forward import Allowance, Leg
from hyperseaport.transport.udx.packet import Packet, decode, encode

PAIR = KeyPair.from_seed(b"\x11" * 32)
CLIENT = KeyPair.from_seed(b"\x12" * 32)
FIRST = EndpointConfig(bootstrap=(), host="127.0.0.1", permanent=True)


class Stage:
    def __init__(self, runtime: ActorRuntime) -> None:
        self.runtime = runtime
        #: What the owner of listeners was sent.
        self.got: list[Any] = []
        self.owner = runtime.spawn(Recorder, self.got, "owner")
        self.endpoints: list[Address] = []

    async def add(self, name: str, bootstrap: tuple[str, ...]) -> Address:
        address = self.runtime.spawn(EndpointActor, EndpointConfig(bootstrap), name)
        await self.runtime.ready(address)
        return address

    async def listen(self, endpoint: Address, **options: Any) -> Any:
        return await self.runtime.call(endpoint, Listen(PAIR, self.owner, **options), 20.0)

    async def connect(self, endpoint: Address, pair: KeyPair | None = CLIENT) -> Any:
        return await self.runtime.call(endpoint, Connect(PAIR.public_key, pair), 20.0)


@asynccontextmanager
async def network() -> AsyncIterator[tuple[Stage, Address, Address]]:
    """A private DHT, and on it two endpoints: a server's and a client's."""
    before, tasks = descriptors(), asyncio.all_tasks()
    async with ActorRuntime() as dht_runtime:
        seen: list[Any] = []
        tree = dht_tree((), host="127.0.0.1", port=0, nodes=SEED_NODES, show=seen.append)
        await dht_runtime.ready(dht_runtime.spawn(Supervisor, tree, name="root"))
        await soon(lambda: len(seen) == SEED_NODES)
        host, port = seen[0].address
        async with ActorRuntime() as runtime:
            stage = Stage(runtime)
            server = await stage.add("server", (f"{host}:{port}",))
            client = await stage.add("client", (f"{host}:{port}",))
            yield stage, server, client
    await soon(lambda: asyncio.all_tasks() == tasks)
    assert descriptors() == before


async def test_two_endpoints_connect_by_key() -> None:
    async with network() as (stage, server, client):
        assert await stage.listen(server) == Listening(PAIR.public_key)
        answer = await stage.connect(client)
        assert isinstance(answer, Connected)
        await soon(lambda: stage.got)
        (accepted,) = stage.got
        assert isinstance(accepted, Accepted)
        near, far = answer.channel, accepted.channel
        assert near.remote_public_key == PAIR.public_key
        assert far.remote_public_key == CLIENT.public_key
        one, two = Peer(near), Peer(far)  # type: ignore[arg-type]
        near.write(b"ping")
        await soon(lambda: two.received == b"ping")
        # When one of the nodes dies, its peers hear of it.
        stage.runtime.stop(server)
        await soon(lambda: one.lost)
        assert isinstance(one.error, ConnectionError)
        assert two.lost


async def test_it_can_be_looked_into() -> None:
    async with network() as (stage, server, _client):
        fields = (await stage.runtime.call(server, Describe())).fields
        host, _, port = fields["address"].rpartition(":")
        assert (host, int(port) > 0) == ("0.0.0.0", True)
        assert 0 < fields["nodes"] <= SEED_NODES
        assert isinstance(fields["firewalled"], bool)
        assert fields["traffic_age_s"] is None
        assert (await stage.runtime.call(server, Measure())).values["channels"] == 0


async def test_looking_into_it_before_its_sockets_are_open_is_harmless(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unresolved = asyncio.Event()

    async def never(_bootstrap: object) -> tuple[()]:
        await unresolved.wait()
        return ()

    monkeypatch.setattr(transport_endpoint, "resolve", never)
    async with ActorRuntime() as runtime:
        address = runtime.spawn(EndpointActor, FIRST, "endpoint")
        assert (await runtime.call(address, Measure())).values == {}
        assert (await runtime.call(address, Describe())).fields == {}
        unresolved.set()
        await runtime.ready(address)
        assert (await runtime.call(address, Describe())).fields["nodes"] == 0


async def test_it_passes_packets_on_for_who_borrows_its_forwarder() -> None:
    async with network() as (stage, server, _client):
        fields = (await stage.runtime.call(server, Describe())).fields
        here = ("127.0.0.1", int(fields["address"].rpartition(":")[2]))
        forwarder = (await stage.runtime.call(server, BorrowForwarder())).forwarder
        loop = asyncio.get_running_loop()
        with ExitStack() as sockets:
            peers = [sockets.enter_context(socket.socket(type=socket.SOCK_DGRAM)) for _ in range(2)]
            for peer in peers:
                peer.bind(("127.0.0.1", 0))
                peer.setblocking(False)
            legs = [
                Leg(number, SERVER_SOCKET, peer.getsockname(), Allowance(1e9), loop.time())
                for number, peer in enumerate(peers, 1)
            ]
            forwarder.link(*legs)
            for seq in range(3):
                packet = Packet(wire.DATA, legs[0].id, 5, seq, 0, bytes(1000))
                peers[0].sendto(encode(packet), here)
            async with asyncio.timeout(10):
                arrived = [decode(await loop.sock_recv(peers[1], 2000)) for _ in range(3)]
            assert arrived == [Packet(wire.DATA, 2, 5, seq, 0, bytes(1000)) for seq in range(3)]
            forwarder.unlink(legs[0])


async def test_nobody_listens() -> None:
    async with network() as (stage, _server, client):
        answer = await stage.connect(client)
        assert isinstance(answer, ConnectFailed)
        assert isinstance(answer.error, PeerNotFound)
        assert client.alive


async def test_unlisten_frees_the_key() -> None:
    async with network() as (stage, server, client):
        await stage.listen(server)
        again = await stage.listen(server)
        assert isinstance(again, ListenFailed)
        assert isinstance(again.error, InvalidInput)
        for _ in range(2):  # the second time there is nothing to do
            answer = await stage.runtime.call(server, Unlisten(PAIR.public_key), 20.0)
            assert answer == Unlistened()
        assert isinstance(await stage.connect(client), ConnectFailed)
        assert await stage.listen(server) == Listening(PAIR.public_key)
        # The owner's death is of no concern to a key that it gave back and another has.
        other: list[Any] = []
        heir = stage.runtime.spawn(Recorder, other, "heir")
        await stage.runtime.call(server, Unlisten(PAIR.public_key), 20.0)
        await stage.runtime.call(server, Listen(PAIR, heir), 20.0)
        stage.runtime.kill("/owner")
        assert isinstance(await stage.connect(client), Connected)
        await soon(lambda: other)


async def test_keys_go_with_their_owner() -> None:
    async with network() as (stage, server, client):
        await stage.listen(server)
        stage.runtime.kill("/owner")
        assert isinstance(await stage.connect(client), ConnectFailed)
        stage.owner = stage.runtime.spawn(Recorder, stage.got, "owner")
        assert await stage.listen(server) == Listening(PAIR.public_key)


async def test_an_owner_that_dies_while_its_key_is_announced() -> None:
    """Its successor must find the key free."""
    async with network() as (stage, server, client):
        asked = asyncio.create_task(stage.listen(server))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        stage.runtime.kill("/owner")
        stage.owner = stage.runtime.spawn(Recorder, stage.got, "owner")
        await asyncio.sleep(0.01)
        assert await stage.listen(server) == Listening(PAIR.public_key)
        asked.cancel()
        assert isinstance(await stage.connect(client), Connected)


async def test_a_channel_that_nobody_takes_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "HANDOVER", 0.1)
    async with network() as (stage, server, client):
        await stage.listen(server)
        first = await stage.connect(client)
        second = await stage.connect(client)
        taken = Peer(second.channel)
        await soon(lambda: len(stage.got) == 2)
        Peer(stage.got[1].channel)
        await soon(first.channel.is_closing)
        await soon(stage.got[0].channel.is_closing)
        assert not taken.lost
        assert not second.channel.is_closing()


async def test_topics_are_announced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "REANNOUNCE", 0.05)
    announced: list[bytes] = []

    async def announce(_self: Endpoint, topic: bytes, _key_pair: KeyPair) -> int:
        announced.append(topic)
        return 1

    monkeypatch.setattr(Endpoint, "announce", announce)
    async with network() as (stage, server, _client):
        for _ in range(2):
            topic = AnnounceTopic(b"\x01" * 32, PAIR)
            assert await stage.runtime.call(server, topic, 20.0) == Announced()
        await soon(lambda: len(announced) >= 4)
        assert set(announced) == {b"\x01" * 32}


async def test_topics_are_announced_again_when_the_network_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    announced: list[tuple[Endpoint, bytes]] = []

    async def announce(self: Endpoint, topic: bytes, _key_pair: KeyPair) -> int:
        announced.append((self, topic))
        return 1

    monkeypatch.setattr(Endpoint, "announce", announce)
    async with network() as (stage, server, _client):
        for number in range(2):
            topic = AnnounceTopic(bytes([number]) * 32, PAIR)
            assert await stage.runtime.call(server, topic, 20.0) == Announced()
        node = announced[0][0]
        assert len(announced) == 2
        node.core.woke_up(node.now())
        await soon(lambda: len(announced) == 4)
        assert announced[2:] == announced[:2]


async def test_the_console_is_told_once_it_serves() -> None:
    news: list[Any] = []
    async with ActorRuntime() as runtime:
        console = runtime.spawn(Recorder, news, "console")
        endpoint = runtime.spawn(EndpointActor, FIRST, "endpoint", {"console": console})
        await runtime.ready(endpoint)
        await soon(lambda: news)
        (ready,) = news
        assert isinstance(ready, EndpointReady)
        assert ready.address[0] == "127.0.0.1"
        assert ready.nodes == 0


async def test_a_port_in_use_is_the_callers_fault() -> None:
    before = descriptors()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        config = EndpointConfig((), "127.0.0.1", taken.getsockname()[1], permanent=True)
        async with ActorRuntime() as runtime:
            reason = await runtime.stopped(runtime.spawn(EndpointActor, config, "endpoint"))
    assert isinstance(reason, Crashed)
    assert isinstance(reason.exception, LocalError)
    assert len(str(reason.exception).splitlines()) == 1
    assert descriptors() == before


@pytest.mark.parametrize("turns", range(8))
async def test_killed_at_any_moment_it_leaves_no_socket(turns: int) -> None:
    before = descriptors()
    async with ActorRuntime() as runtime:
        endpoint = runtime.spawn(EndpointActor, FIRST, "endpoint")
        for _ in range(turns):
            await asyncio.sleep(0)
        runtime.kill(endpoint)
        assert descriptors() == before


async def test_stopped_it_leaves_no_socket() -> None:
    before = descriptors()
    async with ActorRuntime() as runtime:
        endpoint = runtime.spawn(EndpointActor, FIRST, "endpoint")
        await runtime.ready(endpoint)
        assert descriptors() == before + 2
        runtime.stop(endpoint)
        await runtime.stopped(endpoint)
        assert descriptors() == before
