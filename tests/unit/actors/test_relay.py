from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.endpoint import MemoryEndpoint, MemoryNetwork
from support.registry import Recorder, virtual

from hyperseaport.actors import relay as module
from hyperseaport.actors.actor import ActorAddress, Address, handles
from hyperseaport.actors.messages import (
    Accepted,
    BorrowForwarder,
    Describe,
    Described,
    ForwarderBorrowed,
    RelayListening,
)
from hyperseaport.actors.relay import (
    MAX_WAITING,
    BooksArgs,
    ListenerArgs,
    RelayBooks,
    RelayListener,
    RelaySessionActor,
)
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.supervisor import Backoff, ChildSpec, Supervisor, SupervisorSpec
from hyperseaport.transport.channel import Channel
from hyperseaport.transport.dht import relay_server
from hyperseaport.transport.dht.blind_relay import (
    PAIR,
    PAIR_SECONDS,
    PROTOCOL,
    UNPAIR,
    Pair,
    Unpair,
)
from hyperseaport.transport.dht.relay_server import IDLE, LINGER, MAX_REQUESTS, SILENCE, RelayLimits
from hyperseaport.transport.errors import PeerUnreachable
from hyperseaport.transport.keys import KeyPair
from hyperseaport.transport.protomux import ChannelClosed, ChannelMessage, Protomux
from hyperseaport.transport.udx import packet as wire
from hyperseaport.transport.udx.mux import Mux
from hyperseaport.transport.udx.packet import Packet, decode, encode

KEYS = KeyPair.from_seed(b"\x09" * 32)
TOKEN = bytes(range(32))

MUX = Mux(Random(1))


class Endpoint(MemoryEndpoint):
    @handles(BorrowForwarder)
    def _lend(self, _message: BorrowForwarder, sender: ActorAddress) -> None:
        self.send(sender, ForwarderBorrowed(MUX.forwarder))


@asynccontextmanager
async def running(
    network: MemoryNetwork,
    *,
    news: list[Any] | None = None,
    limits: RelayLimits | None = None,
    allow: frozenset[bytes] | None = None,
) -> AsyncIterator[ActorRuntime]:
    sessions = SupervisorSpec(
        "simple_one_for_one", (ChildSpec("session", RelaySessionActor, restart="temporary"),)
    )
    spec = SupervisorSpec(
        "rest_for_one",
        (
            ChildSpec("console", Recorder, [] if news is None else news),
            ChildSpec("endpoint", Endpoint, network, wait_ready=10.0),
            ChildSpec("books", RelayBooks, BooksArgs(limits or RelayLimits(), allow), wait_ready=5),
            ChildSpec("sessions", Supervisor, sessions),
            ChildSpec("listener", RelayListener, ListenerArgs(KEYS, allow), wait_ready=10.0),
        ),
        intensity=1000,
        backoff=Backoff(initial=0.01, maximum=0.1),
    )
    async with ActorRuntime() as runtime:
        await runtime.ready(runtime.spawn(Supervisor, spec, name="relay"))
        yield runtime
    assert not MUX.forwarder.legs


class Client(asyncio.Protocol):
    """A peer's control session with the relay."""

    def __init__(self, network: MemoryNetwork, number: int) -> None:
        self.keys = KeyPair.from_seed(bytes((number,)) * 32)
        self.address = (f"10.0.0.{number}", 1000 + number)
        self.answers: list[Pair] = []
        self.closed = False
        self.lost = False
        self._mux = Protomux()
        self._name = self._mux.open(PROTOCOL, self.keys.public_key)
        self.channel, acceptor = network.connect(KEYS.public_key, self.keys)
        # What a channel has that is more than memory.
        cast(Any, self.channel.peer).stream = SimpleNamespace(socket=0, address=self.address)
        target = cast(Address, acceptor).target
        assert target is not None
        target.receive(Accepted(cast(Channel, self.channel.peer)), acceptor)
        self.channel.set_protocol(self)
        self._flush()

    def data_received(self, data: bytes) -> None:
        for event in self._mux.receive(data):
            if isinstance(event, ChannelMessage):
                assert event.type == PAIR
                self.answers.append(Pair.decode(event.payload))
            self.closed |= isinstance(event, ChannelClosed)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True

    def pair(self, flag: bool, token: bytes = TOKEN) -> None:
        self.say(PAIR, Pair(flag, token, self.address[1]).encode())

    def say(self, kind: int, payload: bytes) -> None:
        self._mux.send(self._name, kind, payload)
        self._flush()

    def hang_up(self) -> None:
        """Close the protomux channel, and leave the stream open."""
        self._mux.close(self._name)
        self._flush()

    def _flush(self) -> None:
        for message in self._mux.messages():
            self.channel.write(message)

    def passes(self, to: Client) -> bool:
        """Whether the relay passes on a packet."""
        leg = self.answers[-1].id
        packet = encode(Packet(wire.DATA, leg, 0, 0, 0, b"x"))
        MUX.receive(packet, 0, self.address, asyncio.get_running_loop().time())
        transmits = MUX.transmits(0.0)
        return [(each.address, decode(b"".join(each.buffers)).id) for each in transmits] == [
            (to.address, to.address[1])
        ]


async def shown(runtime: ActorRuntime, name: str = "books") -> dict[str, Any]:
    address = runtime.find(f"/relay/{name}")
    assert address is not None
    described = await runtime.call(address, Describe())
    assert isinstance(described, Described)
    return dict(described.fields)


async def settle() -> None:
    """Let everything happen that needs no time."""
    await asyncio.sleep(0.01)


@virtual
async def test_two_peers_meet() -> None:
    network = MemoryNetwork()
    news: list[Any] = []
    async with running(network, news=news) as runtime:
        assert RelayListening(KEYS.public_key, anybody=True) in news
        alice, bob = Client(network, 1), Client(network, 2)
        alice.pair(True)
        await settle()
        fields = await shown(runtime)
        assert (fields["sessions"], fields["waiting"], fields["pairs"]) == (2, 1, 0)
        bob.pair(False)
        await settle()
        assert [pair.is_initiator for pair in (*alice.answers, *bob.answers)] == [True, False]
        assert {pair.token for pair in (*alice.answers, *bob.answers)} == {TOKEN}
        assert alice.passes(bob)
        assert bob.passes(alice)
        fields = await shown(runtime)
        assert (fields["keys"], fields["waiting"], fields["pairs"]) == (2, 0, 1)
        assert (fields["bytes"], fields["dropped"], fields["strangers"]) == (42, 0, 0)
        assert fields["counters"]["paired"] == 1
        assert await shown(runtime, "listener") == {
            "public_key": KEYS.public_key.hex(),
            "allowed": None,
            "accepted": 2,
            "refused": 0,
        }


@pytest.mark.parametrize("how", ["abort", "close", "write_eof", "hang_up"])
def test_a_session_ends_however_its_peer_ends_it(how: str) -> None:
    @virtual
    async def run() -> None:
        network = MemoryNetwork()
        async with running(network) as runtime:
            alice, bob = Client(network, 1), Client(network, 2)
            alice.pair(True)
            bob.pair(False)
            await settle()
            getattr(alice if how == "hang_up" else alice.channel, how)()
            await settle()
            assert (await shown(runtime))["sessions"] == 1
            assert bob.passes(alice)
            bob.channel.abort()
            await settle()
            fields = await shown(runtime)
            assert (fields["sessions"], fields["pairs"], fields["keys"]) == (0, 0, 0)
            assert not any("/sessions/" in path for path in runtime.tree())

    run()


@virtual
async def test_what_is_over_is_over_in_time() -> None:
    network = MemoryNetwork()
    async with running(network) as runtime:
        alice, bob, carol = (Client(network, number) for number in (1, 2, 3))
        carol.pair(True, bytes(32))
        alice.pair(True)
        bob.pair(False)
        await settle()
        alice.channel.abort()
        await asyncio.sleep(LINGER - 1)
        assert (await shown(runtime))["pairs"] == 1
        await asyncio.sleep(1.1)
        assert (await shown(runtime))["pairs"] == 0
        await asyncio.sleep(PAIR_SECONDS - LINGER)
        fields = await shown(runtime)
        assert (fields["waiting"], fields["counters"]["expired"]) == (0, 1)
        carol.pair(True)
        bob.pair(False)
        await settle()
        assert (await shown(runtime))["pairs"] == 1
        await asyncio.sleep(2 * SILENCE)
        assert (await shown(runtime))["counters"]["silent"] == 1


def test_an_idle_session_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_server, "CROWDED", 0)

    @virtual
    async def run() -> None:
        network = MemoryNetwork()
        async with running(network) as runtime:
            alice = Client(network, 1)
            lost = []
            for _ in range(2):
                await asyncio.sleep(IDLE)
                lost.append(alice.lost)
            assert lost == [False, True]
            assert (await shown(runtime))["counters"]["idle"] == 1

    run()


@virtual
async def test_a_pair_is_taken_back() -> None:
    network = MemoryNetwork()
    async with running(network) as runtime:
        alice = Client(network, 1)
        alice.pair(True)
        alice.say(UNPAIR, Unpair(TOKEN).encode())
        await settle()
        assert (await shown(runtime))["waiting"] == 0


@virtual
async def test_who_is_not_on_the_list_is_not_heard() -> None:
    network = MemoryNetwork()
    alice = KeyPair.from_seed(b"\x01" * 32).public_key
    news: list[Any] = []
    async with running(network, allow=frozenset({alice}), news=news) as runtime:
        assert RelayListening(KEYS.public_key, anybody=False) in news
        Client(network, 1)
        with pytest.raises(PeerUnreachable):
            Client(network, 2)
        assert (await shown(runtime, "listener"))["allowed"] == 1


@virtual
async def test_too_many_sessions_of_one_key_are_reset() -> None:
    network = MemoryNetwork()
    async with running(network, limits=RelayLimits(sessions_per_key=2)) as runtime:
        clients = [Client(network, 1) for _ in range(3)]
        clients[2].pair(True)
        await settle()
        assert [client.lost for client in clients] == [False, False, True]
        fields = await shown(runtime)
        assert (fields["sessions"], fields["waiting"]) == (2, 0)
        assert fields["counters"]["refused"] == 1


@virtual
async def test_many_requests_at_once_are_all_answered() -> None:
    network = MemoryNetwork()
    async with running(network) as runtime:
        alice, bob = Client(network, 1), Client(network, 2)
        tokens = [bytes((number,)) * 32 for number in range(5 * MAX_WAITING)]
        for token in tokens:
            alice.pair(True, token)
            bob.pair(False, token)
        await settle()
        assert [pair.token for pair in alice.answers] == tokens
        for token in tokens:
            alice.say(UNPAIR, Unpair(token).encode())
        await settle()
        assert (await shown(runtime))["pairs"] == 0


@pytest.mark.parametrize("what", ["nonsense", "flood"])
def test_a_peer_that_misbehaves_loses_its_session(what: str) -> None:
    @virtual
    async def run() -> None:
        network = MemoryNetwork()
        async with running(network) as runtime:
            alice, bob = Client(network, 1), Client(network, 2)
            if what == "nonsense":
                alice.channel.write(b"\x00")
            else:
                for _ in range(2 * MAX_REQUESTS):
                    alice.say(UNPAIR, Unpair(TOKEN).encode())
            await settle()
            assert (await shown(runtime))["sessions"] == 1
            assert not bob.lost

    run()


@virtual
async def test_a_peer_that_does_not_read_loses_its_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_UNWRITTEN", 4096)
    network = MemoryNetwork()
    async with running(network) as runtime:
        alice = Client(network, 1)
        await settle()
        alice.channel.pause_reading()
        # Each is rejected with a message of its own.
        frame = b"\x00\x01\x02\x05other\x00"
        batch = b"\x00\x00\x00" + (b"\x09" + frame[1:]) * 1000
        for _ in range(3):
            alice.channel.write(batch)
            await settle()
        assert (await shown(runtime))["sessions"] == 0


@pytest.mark.parametrize("who", ["endpoint", "books", "sessions", "listener"])
def test_it_serves_again_after_a_failure(who: str) -> None:
    @virtual
    async def run() -> None:
        network = MemoryNetwork()
        async with running(network) as runtime:
            old = [Client(network, 1), Client(network, 2)]
            old[0].pair(True)
            old[1].pair(False)
            await settle()
            runtime.kill(f"/relay/{who}")
            await asyncio.sleep(1)
            assert (await shown(runtime))["sessions"] == (2 if who == "listener" else 0)
            alice, bob = Client(network, 3), Client(network, 4)
            alice.pair(True)
            bob.pair(False)
            await settle()
            assert alice.passes(bob)

    run()
