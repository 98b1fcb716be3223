"""How a local client gets to a service that answers: a pipe, its resolver, and hosts that connect,
refuse, keep silent or break when the test says so. In virtual time, on sockets of the loopback."""

from __future__ import annotations

import asyncio
import selectors
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pipes import Peer, PipeChannel, descriptors, outcome, pipe_channels, reset_by_client
from support.registry import Recorder
from thespian.actors import ActorAddress

from hyperseaport.actors import attempts as attempts_module
from hyperseaport.actors.actor import NORMAL, Actor, Address, Crashed, handles
from hyperseaport.actors.attempts import MAX_ATTEMPTS, MAX_RIVALS, Attempts, ProxyPipe
from hyperseaport.actors.early import REPLAY
from hyperseaport.actors.instances import HEDGE_FIRST, HEDGE_MIN
from hyperseaport.actors.messages import (
    Connect,
    Connected,
    ConnectFailed,
    Describe,
    Explain,
    ServiceRecord,
    Services,
)
from hyperseaport.actors.pipe import Pipe
from hyperseaport.actors.resolver import Resolver, ResolverArgs
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.testing.clock import VirtualLoop
from hyperseaport.transport.channel import Channel
from hyperseaport.transport.dht.timings import Timings
from hyperseaport.transport.errors import PeerNotFound, StreamTimeout
from hyperseaport.transport.keys import KeyPair

#: Real seconds that the kernel gets to deliver what was sent over the loopback, before a small jump
#: of time and before one that might jump over what the test is about.
MOMENT = 0.0005
LONG_MOMENT = 0.02
PAIR = KeyPair.from_seed(b"\x01" * 32)
META = {"role": "a", "version": "*"}


def record(name: str) -> ServiceRecord:
    # The earlier the letter, the newer the version.
    return ServiceRecord(name.encode() * 32, "a", f"1.{100 - ord(name) + 97}.0", META)


A, B, C, D, E = map(record, "abcde")


@dataclass
class Host:
    """What becomes of attempts to connect to one service."""

    #: Seconds until it answers; None for never.
    delay: float | None = 0.01
    #: It then refuses.
    refuses: bool = False
    #: What it says of where the time went.
    timings: Timings | None = None
    #: Bytes that it reads before it breaks, without having said anything; None for never.
    breaks_after: int | None = None
    #: Attempts under way, and how many there were.
    under_way: int = 0
    attempts: int = 0
    #: Far ends of the channels, in order, and our ends.
    peers: list[Peer] = field(default_factory=list)
    channels: list[PipeChannel] = field(default_factory=list)

    def connect(self, public_key: bytes) -> Connected | ConnectFailed:
        if self.refuses:
            return ConnectFailed(PeerNotFound("nobody announces it"))
        near, far = pipe_channels(PAIR.public_key, public_key)
        self.channels.append(near)
        self.peers.append(Peer(far) if self.breaks_after is None else Breaking(far, self))
        return Connected(cast(Channel, near), self.timings)


class Breaking(Peer):
    def __init__(self, channel: PipeChannel, host: Host) -> None:
        self._limit = cast(int, host.breaks_after)
        super().__init__(channel)
        if not self._limit:
            # As soon as it is in use.
            asyncio.get_running_loop().call_later(0.001, channel.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if len(self.received) >= self._limit:
            self.channel.abort()


class Hosts(Actor):
    """An endpoint; its args are hosts by name."""

    def on_start(self, args: dict[str, Host]) -> None:
        self._hosts = args

    @handles(Connect)
    def _connect(self, message: Connect, sender: ActorAddress) -> None:
        self.run(self._answer(message.public_key, sender))

    async def _answer(self, public_key: bytes, sender: ActorAddress) -> None:
        host = self._hosts[public_key[:1].decode()]
        host.attempts += 1
        host.under_way += 1
        try:
            await asyncio.sleep(1e6 if host.delay is None else host.delay)
        finally:
            host.under_way -= 1
        self.send(sender, host.connect(public_key))


class PatientLoop(VirtualLoop):
    """Virtual time that gives the kernel a moment to deliver, before it jumps."""

    def __init__(self) -> None:
        super().__init__()
        clock: Any = self._selector  # type: ignore[attr-defined]
        jump = clock.select

        def select(timeout: float | None = None) -> Any:
            if timeout is None or timeout > 0:
                is_small = timeout is not None and timeout < 0.1
                moment = MOMENT if is_small else LONG_MOMENT
                events = selectors.DefaultSelector.select(clock, moment)
                if events:
                    return events
            return jump(timeout)

        clock.select = select


def patient(test: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=PatientLoop) as runner:
        runner.run(test)


def virtual(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        patient(test())

    run.__name__ = test.__name__
    return run


class Stage:
    def __init__(self, runtime: ActorRuntime, **args: Any) -> None:
        self.runtime = runtime
        self.hosts = {name: Host() for name in "abcde"}
        self.endpoint = runtime.spawn(Hosts, self.hosts, "endpoint")
        self.link = runtime.spawn(Recorder, [], "link")
        self._args = ResolverArgs(META, rng=Random(1), **args)
        self.start_resolver()
        self.logs: list[Any] = []
        self.clients: list[socket.socket] = []
        self.pipes: list[Address] = []

    def start_resolver(self) -> None:
        context = {"link": self.link}
        self.resolver = self.runtime.spawn(Resolver, self._args, "resolver", context)

    def services(self, *records: ServiceRecord) -> None:
        self.runtime.tell(self.resolver, Services(META, records))

    def client(self, sends: bytes = b"", **args: Any) -> socket.socket:
        """A local client's connection, and a pipe for it."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = socket.create_connection(server.getsockname())
            accepted, _ = server.accept()
        if sends:
            client.sendall(sends)
        client.setblocking(False)
        accepted.setblocking(False)
        made = ProxyPipe(accepted, self.resolver, self.endpoint, PAIR, **args)
        self.pipes.append(self.runtime.spawn(Pipe, made, f"pipe-{len(self.pipes)}"))
        self.clients.append(client)
        return client

    @property
    def pipe(self) -> Address:
        return self.pipes[-1]

    def host(self, of: ServiceRecord) -> Host:
        return self.hosts[of.public_key[:1].decode()]

    async def joined(self, of: ServiceRecord, number: int = 0) -> Peer:
        """The far end of a service's channel once a client is joined with it."""
        host = self.host(of)
        await soon(lambda: len(host.channels) > number and host.channels[number].has_protocol)
        return host.peers[number]

    async def states(self) -> dict[str, str]:
        rows = (await self.runtime.call(self.resolver, Explain())).rows
        return {bytes.fromhex(row["key"])[:1].decode(): row["state"] for row in rows}

    async def described(self) -> dict[str, Any]:
        return dict((await self.runtime.call(self.pipe, Describe())).fields)

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [entry for entry in self.logs if entry["event"] == event]


@asynccontextmanager
async def staged(*services: ServiceRecord, **args: Any) -> AsyncIterator[Stage]:
    before = descriptors()
    with structlog.testing.capture_logs() as logs:
        async with ActorRuntime() as runtime:
            stage = Stage(runtime, **args)
            stage.logs = logs
            stage.services(*services)
            await asyncio.sleep(0.001)
            try:
                yield stage
            finally:
                for client in stage.clients:
                    client.close()
            for pipe in stage.pipes:
                runtime.kill(pipe, missing_ok=True)
            await asyncio.sleep(0.01)
        assert runtime.unhandled == 0
    assert descriptors() == before


async def soon(condition: Any, seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def now() -> float:
    return asyncio.get_running_loop().time()


async def received(peer: Peer, expected: bytes) -> None:
    await soon(lambda: len(peer.received) >= len(expected))
    assert peer.received == expected


async def answers(peer: Peer, client: socket.socket, answer: bytes = b"answer") -> None:
    peer.channel.write(answer)
    loop = asyncio.get_running_loop()
    assert await asyncio.wait_for(loop.sock_recv(client, len(answer)), 20) == answer


# Rivals


@virtual
async def test_a_silent_instance_gets_a_rival_and_nobody_notices() -> None:
    async with staged(A, B) as stage:
        stage.host(A).delay = None
        began = now()
        client = stage.client(b"question")
        peer = await stage.joined(B)
        assert now() - began == pytest.approx(HEDGE_FIRST + 0.01, abs=0.01)
        await received(peer, b"question")
        await answers(peer, client)
        # It lost a race, which is no failure.
        assert (await stage.states())["a"] == "taken"


@virtual
async def test_once_connecting_is_known_to_be_quick_rivals_come_sooner() -> None:
    async with staged(A, B) as stage:
        for number in range(3):
            client = stage.client()
            await answers(await stage.joined(A, number), client)
        stage.host(A).delay = None
        began = now()
        stage.client()
        await stage.joined(B)
        assert now() - began == pytest.approx(HEDGE_MIN + 0.01, abs=0.01)


@virtual
async def test_an_instance_that_dies_costs_few_connections_any_time() -> None:
    async with staged(A, B) as stage:
        client = stage.client()
        await answers(await stage.joined(A), client)
        stage.host(A).delay = None
        seconds = []
        for number in range(8):
            began = now()
            client = stage.client()
            await answers(await stage.joined(B, number), client)
            client.close()
            seconds.append(now() - began)
        assert max(seconds) < 0.2
        assert [each for each in seconds if each > HEDGE_MIN] == seconds[:3]
        assert (await stage.states())["a"] == "set aside"


@virtual
async def test_a_loser_that_connects_after_all_is_let_go_and_one_that_fails_is_reported() -> None:
    async with staged(A, B, C) as stage:
        stage.host(A).delay = 3.0
        stage.host(B).delay, stage.host(B).refuses = 4.0, True
        client = stage.client()
        peer = await stage.joined(C)
        await answers(peer, client)
        await asyncio.sleep(2.9)
        (loser,) = stage.host(A).peers
        assert isinstance(loser.error, ConnectionResetError)
        assert await stage.states() == {"a": "taken", "b": "candidate", "c": "candidate"}
        await asyncio.sleep(1.5)
        assert (await stage.states())["b"] == "set aside"
        assert stage.pipe.alive


@virtual
async def test_who_is_slow_but_first_wins() -> None:
    async with staged(A, B) as stage:
        stage.host(A).delay = HEDGE_FIRST + 0.05
        stage.host(B).delay = 0.2
        client = stage.client(b"question")
        peer = await stage.joined(A)
        await answers(peer, client)
        await asyncio.sleep(1.0)
        assert isinstance(stage.host(B).peers[0].error, ConnectionResetError)
        assert stage.host(B).peers[0].received == b""


@virtual
async def test_rivals_are_few() -> None:
    async with staged(A, B, C, D, E) as stage:
        for host in stage.hosts.values():
            host.delay = None
        client = stage.client()
        await asyncio.sleep(5.0)
        assert sum(host.under_way for host in stage.hosts.values()) == MAX_RIVALS
        assert await outcome(client) is ConnectionResetError


@virtual
async def test_a_rival_that_appears_later_is_tried_too() -> None:
    async with staged(A) as stage:
        stage.host(A).delay = None
        client = stage.client(b"question")
        await asyncio.sleep(2.0)
        stage.services(A, B)
        peer = await stage.joined(B)
        await received(peer, b"question")
        await answers(peer, client)
        # What the resolver may still have to say is for nobody.
        await asyncio.sleep(20.0)
        assert stage.pipe.alive


# Refusals


@virtual
async def test_after_a_refusal_the_next_one_is_tried_at_once() -> None:
    async with staged(A, B) as stage:
        stage.host(A).refuses = True
        began = now()
        client = stage.client(b"question")
        peer = await stage.joined(B)
        assert now() - began < 0.05
        await answers(peer, client)
        assert await stage.states() == {"b": "taken", "a": "set aside"}


@virtual
async def test_an_only_instance_that_refuses_is_tried_again_until_it_works() -> None:
    async with staged(A) as stage:
        stage.host(A).refuses = True
        clients = [stage.client(b"question") for _ in range(3)]
        await asyncio.sleep(2.0)
        stage.host(A).refuses = False
        began = now()
        for number in range(3):
            (await stage.joined(A, number)).channel.write(b"answer")
        assert now() - began < 2.1
        loop = asyncio.get_running_loop()
        for client in clients:
            assert await asyncio.wait_for(loop.sock_recv(client, 6), 20) == b"answer"
        # One at a time, while it was down.
        assert stage.host(A).attempts < 12


@virtual
async def test_when_the_time_is_over_the_client_is_reset() -> None:
    async with staged(A) as stage:
        stage.host(A).delay = None
        began = now()
        client = stage.client(connect_timeout=2.0)
        assert await outcome(client) is ConnectionResetError
        assert now() - began == pytest.approx(2.0, abs=0.01)
        assert stage.pipe.reason == NORMAL
    (entry,) = stage.logged("no service reached")
    assert (entry["reason"], entry["tried"]) == ("none in 2 s", 1)
    assert "last_failure" not in entry


@virtual
async def test_told_not_to_wait_the_client_is_reset_at_once() -> None:
    async with staged(wait=False) as stage:
        began = now()
        assert await outcome(stage.client()) is ConnectionResetError
        assert now() - began < 0.05
        stage.services(A)
        stage.host(A).refuses = True
        assert await outcome(stage.client()) is ConnectionResetError
        assert now() - began < 0.1
    reasons = [entry["reason"] for entry in stage.logged("no service reached")]
    assert reasons == ["there is none", "there is none"]


def test_attempts_end_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts_module, "MAX_ATTEMPTS", 2)

    async def test() -> None:
        async with staged(A, B, C) as stage:
            for host in stage.hosts.values():
                host.refuses = True
            assert await outcome(stage.client()) is ConnectionResetError
            assert sum(host.attempts for host in stage.hosts.values()) == 2
        (entry,) = stage.logged("no service reached")
        assert entry["reason"] == "tried too often"

    patient(test())


# Moving


@virtual
async def test_a_service_that_breaks_before_its_first_byte_is_left_for_another() -> None:
    async with staged(A, B) as stage:
        client = stage.client(b"ques")
        first = await stage.joined(A)
        await received(first, b"ques")
        client.send(b"tion")
        await received(first, b"question")
        first.channel.abort()
        second = await stage.joined(B)
        await received(second, b"question")
        client.send(b", and more")
        await received(second, b"question, and more")
        await answers(second, client)
        assert await stage.states() == {"b": "taken", "a": "set aside"}
        rows = (await stage.runtime.call(stage.resolver, Explain())).rows
        assert [row["connections"] for row in rows] == [1, 0]
    (entry,) = stage.logged("connection moved")
    assert (entry["answered"], entry["sent_again"]) == (False, 8)
    assert entry["key"] == A.public_key.hex()
    assert stage.logged("connection lost") == []


@virtual
async def test_a_client_that_only_listens_is_moved_for_nothing() -> None:
    async with staged(A, B) as stage:
        client = stage.client()
        first = await stage.joined(A)
        # Far beyond the time that connecting may take.
        await asyncio.sleep(100.0)
        stage.host(A).channels[0].fail(StreamTimeout("nothing heard"))
        second = await stage.joined(B)
        await answers(second, client, b"220 hello")
        first.channel.abort()


@virtual
async def test_after_the_first_byte_the_client_is_reset_and_the_log_says_so() -> None:
    async with staged(A, B) as stage:
        client = stage.client(b"question")
        peer = await stage.joined(A)
        await answers(peer, client)
        peer.channel.abort()
        assert await outcome(client) is ConnectionResetError
        await soon(lambda: not stage.pipe.alive)
        assert stage.host(B).attempts == 0
        assert (await stage.states())["a"] == "taken"
    (entry,) = stage.logged("connection lost")
    assert (entry["answered"], entry["key"]) == (True, A.public_key.hex())


@virtual
async def test_a_client_that_sent_too_much_stays_and_the_log_says_so() -> None:
    async with staged(A, B) as stage:
        client = stage.client()
        peer = await stage.joined(A)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, bytes(REPLAY + 1))
        await received(peer, bytes(REPLAY + 1))
        peer.channel.abort()
        assert await outcome(client) is ConnectionResetError
        await soon(lambda: not stage.pipe.alive)
        assert stage.host(B).attempts == 0
        # It is a failure of the instance all the same.
        assert (await stage.states())["a"] == "set aside"
    (entry,) = stage.logged("connection lost")
    assert entry["answered"] is False


@virtual
async def test_an_empty_answer_is_an_answer() -> None:
    async with staged(A, B) as stage:
        client = stage.client(b"question")
        peer = await stage.joined(A)
        peer.channel.close()
        assert await outcome(client) == b""
        client.shutdown(socket.SHUT_WR)
        await soon(lambda: not stage.pipe.alive)
        assert stage.host(B).attempts == 0
        rows = (await stage.runtime.call(stage.resolver, Explain())).rows
        assert rows[0]["worked_ago"] is not None


@virtual
async def test_one_that_breaks_again_and_again_ends_with_the_clients_time() -> None:
    async with staged(A) as stage:
        stage.host(A).breaks_after = 0
        began = now()
        assert await outcome(stage.client(connect_timeout=5.0)) is ConnectionResetError
        assert 5.0 <= now() - began < 5.5
        assert 2 <= stage.host(A).attempts <= 6
    (entry,) = stage.logged("no service reached")
    assert entry["reason"] == "none in 5 s"
    assert entry["last_failure"] == "the peer destroyed the connection"


@virtual
async def test_a_half_closed_client_is_moved_with_its_end() -> None:
    async with staged(A, B) as stage:
        client = stage.client(b"question")
        client.shutdown(socket.SHUT_WR)
        first = await stage.joined(A)
        await soon(lambda: first.ended)
        first.channel.abort()
        second = await stage.joined(B)
        await soon(lambda: second.ended)
        assert second.received == b"question"
        second.channel.write(b"answer")
        second.channel.close()
        assert await outcome(client) == b"answer"
        await soon(lambda: not stage.pipe.alive)
        assert stage.pipe.reason == NORMAL


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    writes=st.lists(st.integers(1, 3000), max_size=6),
    breaks=st.lists(st.integers(0, 9000), min_size=1, max_size=4),
    ends=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_whenever_services_break_the_last_one_gets_everything_once(
    writes: list[int], breaks: list[int], ends: bool, seed: int
) -> None:
    async def test() -> None:
        rng = Random(seed)
        services = [A, B, C, D, E][: len(breaks) + 1]
        async with staged(*services) as stage:
            for service, after in zip(services, breaks, strict=False):
                stage.host(service).breaks_after = after
            client = stage.client()
            sent = b""
            for size in writes:
                data = rng.randbytes(size)
                client.send(data)
                sent += data
                await asyncio.sleep(rng.choice([0, 0.001, 0.05]))
            if ends:
                client.shutdown(socket.SHUT_WR)
            await asyncio.sleep(1.0)
            peers = [peer for service in services for peer in stage.host(service).peers]
            (alive,) = [peer for peer in peers if not peer.lost]
            assert alive.received == sent
            assert alive.ended == ends
            assert all(sent.startswith(peer.received) for peer in peers)
            await answers(alive, client)

    patient(test())


# Who else may die


@virtual
async def test_a_client_that_is_gone_ends_its_pipe_at_once() -> None:
    async with staged(A, B) as stage:
        stage.host(A).delay = 3.0
        client = stage.client(b"question")
        await asyncio.sleep(0.1)
        reset_by_client(client)
        await asyncio.sleep(0.01)
        assert not stage.pipe.alive
        assert stage.pipe.reason == NORMAL
        assert stage.host(B).attempts == 0


@virtual
async def test_a_client_that_is_gone_while_no_answer_came_resets_the_channel() -> None:
    async with staged(A) as stage:
        client = stage.client(b"question")
        peer = await stage.joined(A)
        await received(peer, b"question")
        reset_by_client(client)
        await soon(lambda: peer.lost)
        assert isinstance(peer.error, ConnectionResetError)
        await soon(lambda: not stage.pipe.alive)
        assert (await stage.states())["a"] == "taken"


@virtual
async def test_a_resolver_that_dies_while_it_is_asked_is_looked_up_again() -> None:
    async with staged() as stage:
        client = stage.client(b"question")
        await asyncio.sleep(0.5)
        stage.runtime.kill(stage.resolver)
        await asyncio.sleep(0.5)
        stage.start_resolver()
        stage.services(A)
        peer = await stage.joined(A)
        await received(peer, b"question")
        # Also by pipes that need it later.
        stage.runtime.kill(stage.resolver)
        await asyncio.sleep(0.01)
        peer.channel.abort()
        await asyncio.sleep(0.2)
        stage.start_resolver()
        stage.services(B)
        await answers(await stage.joined(B), client)


@virtual
async def test_without_any_resolver_the_time_ends_as_well() -> None:
    async with staged() as stage:
        client = stage.client(connect_timeout=3.0)
        await asyncio.sleep(0.5)
        stage.runtime.kill(stage.resolver)
        began = now()
        assert await outcome(client) is ConnectionResetError
        assert now() - began == pytest.approx(2.5, abs=0.1)


@virtual
async def test_the_endpoints_death_is_the_pipes() -> None:
    async with staged(A) as stage:
        stage.host(A).delay = None
        client = stage.client()
        await asyncio.sleep(0.1)
        stage.runtime.kill(stage.endpoint)
        assert await outcome(client) is ConnectionResetError
        await soon(lambda: not stage.pipe.alive)
        assert isinstance(stage.pipe.reason, Crashed)


# Looking in


@virtual
async def test_it_describes_itself() -> None:
    async with staged(A) as stage:
        client = stage.client(b"question")
        await asyncio.sleep(0.005)
        described = await stage.described()
        assert (described["state"], described["kind"]) == ("connecting", "proxy")
        assert "peer_key" not in described
        peer = await stage.joined(A)
        await received(peer, b"question")
        assert (await stage.described())["state"] == "unanswered"
        await answers(peer, client)
        await asyncio.sleep(2.0)
        described = await stage.described()
        assert described.pop("age") == pytest.approx(2.0, abs=0.1)
        assert described == {
            "kind": "proxy",
            "state": "open",
            "bytes_read": 6,
            "bytes_written": 8,
            "attempts": 1,
            "peer_key": A.public_key.hex(),
            "path": "direct",
            "service_key": A.public_key.hex(),
        }


def test_nobody_is_tried_twice_at_a_time() -> None:
    attempts = Attempts()
    attempts.offer([A, B])
    assert attempts.begin(1.0) == A.public_key
    attempts.offer([A, B, C, D])
    assert [attempts.begin(2.0) for _ in range(3)] == [B.public_key, C.public_key, None]
    assert attempts.tried == {each.public_key for each in (A, B, C)}
    del attempts.under_way[A.public_key]
    attempts.failed.add(A.public_key)
    assert attempts.begin(3.0) == D.public_key
    attempts.under_way.clear()
    for _ in range(MAX_ATTEMPTS - 4):
        # One that failed may be offered again.
        attempts.offer([A])
        assert attempts.begin(4.0) == A.public_key
        attempts.under_way.clear()
    attempts.offer([A])
    assert attempts.exhausted
    assert attempts.begin(5.0) is None


@virtual
async def test_where_the_time_of_a_connection_went() -> None:
    async with staged(A) as stage:
        host = stage.host(A)
        host.delay, host.timings = 0.2, Timings(0.08, 0.05, 0.07, "punched")
        client = stage.client(b"question")
        peer = await stage.joined(A)
        await asyncio.sleep(0.05)
        peer.channel.write(b"answer")
        loop = asyncio.get_running_loop()
        assert await loop.sock_recv(client, 6) == b"answer"
        (row,) = (await stage.runtime.call(stage.resolver, Explain())).rows
    last = row["last"]
    assert last["path"] == "punched"
    assert (last["lookup_ms"], last["handshake_ms"], last["path_ms"]) == (80, 50, 70)
    assert last["first_byte_ms"] == pytest.approx(50, abs=15)
    assert last["wait_ms"] == pytest.approx(0, abs=15)
    parts = ("wait_ms", "lookup_ms", "handshake_ms", "path_ms", "first_byte_ms")
    assert last["total_ms"] == pytest.approx(sum(last[part] for part in parts), abs=0.3)
    assert stage.logged("slow connection") == []


@virtual
async def test_the_time_before_the_attempt_counts_as_waiting() -> None:
    """For the first instance, which breaks."""
    async with staged(A, B) as stage:
        stage.host(B).timings = Timings(0.005, 0.005, 0.0, "direct")
        client = stage.client(b"question")
        first = await stage.joined(A)
        await asyncio.sleep(0.3)
        first.channel.abort()
        peer = await stage.joined(B)
        peer.channel.write(b"answer")
        loop = asyncio.get_running_loop()
        assert await loop.sock_recv(client, 6) == b"answer"
        rows = (await stage.runtime.call(stage.resolver, Explain())).rows
    last = {row["key"]: row["last"] for row in rows}
    assert last[A.public_key.hex()] is None
    assert last[B.public_key.hex()]["wait_ms"] == pytest.approx(310, abs=40)


@virtual
async def test_a_slow_connection_is_logged() -> None:
    async with staged(A) as stage:
        host = stage.host(A)
        host.delay, host.timings = 1.25, Timings(0.25, 0.5, 0.5, "relayed")
        stage.client(b"question")
        await stage.joined(A)
    (entry,) = stage.logged("slow connection")
    assert entry["key"] == A.public_key.hex()
    assert entry["seconds"] == pytest.approx(1.25, abs=0.1)
    assert entry["waited"] == pytest.approx(0, abs=0.1)
    said = {name: entry[name] for name in ("lookup", "handshake", "path", "how")}
    assert said == {"lookup": 0.25, "handshake": 0.5, "path": 0.5, "how": "relayed"}


@virtual
async def test_a_slow_connection_of_which_nothing_more_is_known() -> None:
    async with staged(A) as stage:
        stage.host(A).delay = 1.25
        stage.client(b"question")
        await stage.joined(A)
    (entry,) = stage.logged("slow connection")
    assert "how" not in entry
