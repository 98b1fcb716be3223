"""A pipe's life: how it begins, what ends it, and what it leaves behind."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import structlog
from support.pipes import (
    Peer,
    PipeChannel,
    descriptors,
    outcome,
    pipe_channels,
    reset_by_client,
    soon,
)

from hyperseaport.actors import endpoint as endpoint_module
from hyperseaport.actors import pipe as pipe_module
from hyperseaport.actors.actor import NORMAL, SHUTDOWN, Actor, Address, handles
from hyperseaport.actors.attempts import ProxyPipe
from hyperseaport.actors.messages import (
    Connect,
    Connected,
    ConnectFailed,
    Describe,
    Resolve,
    Resolved,
    ServiceFailed,
    ServiceRecord,
)
from hyperseaport.actors.pipe import Pipe, ServicePipe
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.transport.channel import Channel
from hyperseaport.transport.errors import PeerNotFound, StreamTimeout
from hyperseaport.transport.keys import KeyPair

PAIR = KeyPair.from_seed(b"\x01" * 32)
SERVICES = tuple(ServiceRecord(name * 32, "a", "1.0.0", {}) for name in (b"a", b"b", b"c"))


class World(Actor):
    """Resolver and endpoint in one; answers when the test has put an answer into its args."""

    def on_start(self, args: Answers) -> None:
        self._answers = args

    @handles(Resolve)
    def _resolve(self, _message: Resolve, sender: Address) -> None:
        self.run(self._answer(self._answers.services, sender))

    @handles(Connect)
    def _connect(self, message: Connect, sender: Address) -> None:
        self._answers.asked.append(message)
        self.run(self._answer(self._answers.channels, sender))

    @handles(ServiceFailed)
    def _failed(self, message: ServiceFailed, _sender: Address) -> None:
        self._answers.failed.append(message.public_key)

    async def _answer(self, answers: asyncio.Queue[Any], sender: Address) -> None:
        self.send(sender, await answers.get())


class Answers:
    def __init__(self) -> None:
        self.services: asyncio.Queue[Any] = asyncio.Queue()
        self.channels: asyncio.Queue[Any] = asyncio.Queue()
        self.asked: list[Connect] = []
        self.failed: list[bytes] = []


class Stage:
    """One pipe, its local TCP end (`local`) and the far end of its channel (`peer`)."""

    def __init__(self, runtime: ActorRuntime) -> None:
        self.runtime = runtime
        self.channel, self.far = pipe_channels()
        self.peer: Peer
        self.local: socket.socket
        self.pipe: Address
        self.answers = Answers()

    def gone(self) -> bool:
        return not self.pipe.alive

    async def exchange(self) -> None:
        """A word in each direction."""
        loop = asyncio.get_running_loop()
        self.peer.channel.write(b"ping")
        assert await asyncio.wait_for(loop.sock_recv(self.local, 4), 20) == b"ping"
        before = len(self.peer.received)
        await loop.sock_sendall(self.local, b"pong")
        await soon(lambda: self.peer.received[before:] == b"pong")

    def serve(self, port: int, host: str = "127.0.0.1") -> None:
        args = ServicePipe(cast(Channel, self.channel), host, port)
        self.pipe = self.runtime.spawn(Pipe, args, "pipe")

    def proxy(self) -> None:
        """A local client's connection to the pipe."""
        world = self.runtime.spawn(World, self.answers, "world")
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.local = socket.create_connection(server.getsockname())
            accepted, _ = server.accept()
        self.local.setblocking(False)
        accepted.setblocking(False)
        args = ProxyPipe(accepted, world, world, PAIR)
        self.pipe = self.runtime.spawn(Pipe, args, "pipe")

    def found(self, *services: ServiceRecord) -> None:
        self.answers.services.put_nowait(Resolved(services))

    def reached(self) -> None:
        self.answers.channels.put_nowait(Connected(cast(Channel, self.channel)))

    def unreachable(self) -> None:
        self.answers.channels.put_nowait(ConnectFailed(PeerNotFound("nobody announces it")))


@asynccontextmanager
async def staged() -> AsyncIterator[Stage]:
    """Afterwards there must be no task, no descriptor and no actor more than before."""
    before = descriptors()
    tasks = asyncio.all_tasks()
    async with ActorRuntime() as runtime:
        stage = Stage(runtime)
        yield stage
        if hasattr(stage, "local"):
            stage.local.close()
    assert runtime.actor_count == 0
    await soon(lambda: asyncio.all_tasks() == tasks)
    await soon(lambda: descriptors() == before)


@asynccontextmanager
async def serving() -> AsyncIterator[Stage]:
    """A service pipe whose TCP service is the test."""
    async with staged() as stage:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.setblocking(False)
            stage.serve(server.getsockname()[1])
            loop = asyncio.get_running_loop()
            stage.local, _ = await asyncio.wait_for(loop.sock_accept(server), 20)
            stage.local.setblocking(False)
            stage.peer = Peer(stage.far)
            await soon(lambda: stage.channel.has_protocol)
            yield stage


@asynccontextmanager
async def proxying() -> AsyncIterator[Stage]:
    """A proxy pipe that has found its service, which is the test."""
    async with staged() as stage:
        stage.proxy()
        stage.found(SERVICES[0])
        stage.reached()
        stage.peer = Peer(stage.far)
        await soon(lambda: stage.channel.has_protocol)
        yield stage


BOTH = pytest.mark.parametrize("kind", [serving, proxying])


@BOTH
async def test_both_ends_close_in_order(kind: Any) -> None:
    async with kind() as stage:
        await stage.exchange()
        stage.local.shutdown(socket.SHUT_WR)
        await soon(lambda: stage.peer.ended)
        stage.peer.channel.write(b"bye")
        stage.peer.channel.close()
        assert await outcome(stage.local) == b"bye"
        await soon(stage.gone)
        assert stage.pipe.reason == NORMAL
        assert (stage.peer.lost, stage.peer.error) == (True, None)


@BOTH
async def test_a_local_reset_ends_it(kind: Any) -> None:
    async with kind() as stage:
        await stage.exchange()
        reset_by_client(stage.local)
        await soon(stage.gone)
        assert stage.pipe.reason == NORMAL
        await soon(lambda: stage.peer.lost)
        assert isinstance(stage.peer.error, ConnectionResetError)


@BOTH
@pytest.mark.parametrize("how", ["reset", "timeout"])
async def test_a_lost_channel_ends_it(kind: Any, how: str) -> None:
    async with kind() as stage:
        await stage.exchange()
        if how == "reset":
            stage.far.abort()
        else:
            stage.channel.fail(StreamTimeout("nothing heard"))
        assert await outcome(stage.local) is ConnectionResetError
        await soon(stage.gone)
        assert stage.pipe.reason == NORMAL
        stage.far.abort()


@BOTH
async def test_killed_it_resets_both_sides(kind: Any) -> None:
    async with kind() as stage:
        await stage.exchange()
        stage.runtime.kill("/pipe")
        assert await outcome(stage.local) is ConnectionResetError
        await soon(lambda: stage.peer.lost)
        assert isinstance(stage.peer.error, ConnectionResetError)


# The service's side


async def test_a_service_that_refuses_resets_the_channel_at_once_and_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with structlog.testing.capture_logs() as logs:
        async with staged() as stage:
            stage.peer = Peer(stage.far)
            stage.serve(port)
            await soon(stage.gone)
            await soon(lambda: stage.peer.lost)
            assert isinstance(stage.peer.error, ConnectionResetError)
    (entry,) = [entry for entry in logs if entry["event"] == "service refused"]
    assert entry["log_level"] == "warning"
    assert (entry["host"], entry["port"]) == ("127.0.0.1", port)
    assert entry["client"] == stage.channel.remote_public_key.hex()
    assert "Errno 111" in entry["reason"]


async def test_a_service_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe_module, "CONNECT_TIMEOUT", 0.05)
    with (
        structlog.testing.capture_logs() as logs,
        socket.create_server(("127.0.0.1", 0), backlog=0) as server,
    ):
        # Its backlog is full, so the kernel leaves newcomers without an answer.
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        async with staged() as stage:
            stage.peer = Peer(stage.far)
            stage.serve(server.getsockname()[1])
            await soon(stage.gone)
            await soon(lambda: stage.peer.lost)
        for filler in fillers:
            filler.close()
    (entry,) = [entry for entry in logs if entry["event"] == "service refused"]
    assert entry["reason"] == "timed out"


def test_the_endpoint_waits_longer_for_a_pipe_than_the_pipe_for_its_service() -> None:
    assert endpoint_module.HANDOVER > pipe_module.CONNECT_TIMEOUT


async def test_what_a_client_sent_early_is_not_lost() -> None:
    async with staged() as stage:
        stage.peer = Peer(stage.far)
        stage.far.write(b"early")
        stage.far.write_eof()
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.setblocking(False)
            stage.serve(server.getsockname()[1])
            loop = asyncio.get_running_loop()
            stage.local, _ = await asyncio.wait_for(loop.sock_accept(server), 20)
        assert await outcome(stage.local) == b"early"
        stage.local.close()
        await soon(stage.gone)
        assert (stage.peer.lost, stage.peer.error) == (True, None)


async def test_killed_while_it_connects() -> None:
    async with staged() as stage:
        stage.peer = Peer(stage.far)
        with socket.create_server(("127.0.0.1", 0)) as server:
            stage.serve(server.getsockname()[1])
            # Once in each state that it passes through.
            await asyncio.sleep(0)
            stage.runtime.kill("/pipe")
            await soon(lambda: stage.peer.lost)
        assert isinstance(stage.peer.error, ConnectionResetError)


async def test_it_describes_itself() -> None:
    async with serving() as stage:
        await stage.exchange()
        described = dict((await stage.runtime.call(stage.pipe, Describe())).fields)
        assert 0 <= described.pop("age") < 20
        target = stage.local.getsockname()
        assert described == {
            "kind": "service",
            "state": "open",
            "bytes_read": 4,
            "bytes_written": 4,
            "target": f"{target[0]}:{target[1]}",
            "peer_key": (b"\x02" * 32).hex(),
            "service_key": (b"\x01" * 32).hex(),
            "path": "direct",
        }


# The proxy's side


async def test_the_next_service_is_tried_and_failures_are_reported() -> None:
    async with staged() as stage:
        stage.peer = Peer(stage.far)
        stage.proxy()
        stage.found(*SERVICES)
        stage.unreachable()
        stage.unreachable()
        stage.reached()
        await stage.exchange()
        keys = [service.public_key for service in SERVICES]
        assert stage.answers.asked == [Connect(key, PAIR) for key in keys]
        assert stage.answers.failed == keys[:2]
        stage.far.abort()
        await soon(stage.gone)


@pytest.mark.parametrize("services", [(), SERVICES[:2]])
async def test_no_service_resets_the_client(services: tuple[ServiceRecord, ...]) -> None:
    with structlog.testing.capture_logs() as logs:
        async with staged() as stage:
            stage.proxy()
            stage.found(*services)
            for _ in services:
                stage.unreachable()
            assert await outcome(stage.local) is ConnectionResetError
            await soon(stage.gone)
            assert stage.pipe.reason == NORMAL
    (entry,) = [entry for entry in logs if entry["event"] == "no service reached"]
    assert entry["tried"] == len(services)


@pytest.mark.parametrize("asked", ["services", "channels"])
async def test_killed_before_there_is_a_channel_it_resets_the_client(asked: str) -> None:
    async with staged() as stage:
        stage.proxy()
        if asked == "channels":
            stage.found(SERVICES[0])
            await soon(lambda: stage.answers.asked)
        else:
            await asyncio.sleep(0)
        stage.runtime.kill("/pipe")
        assert await outcome(stage.local) is ConnectionResetError


async def test_a_client_that_is_gone_before_there_is_a_channel() -> None:
    async with staged() as stage:
        stage.proxy()
        stage.peer = Peer(stage.far)
        reset_by_client(stage.local)
        stage.found(SERVICES[0])
        stage.reached()
        await soon(stage.gone)
        await soon(lambda: stage.peer.lost)
        assert isinstance(stage.peer.error, ConnectionResetError)
        assert stage.pipe.reason == NORMAL
        # It is not the service's fault.
        assert stage.answers.failed == []


async def test_a_client_that_ended_before_there_is_a_channel_gets_its_answer() -> None:
    async with staged() as stage:
        stage.proxy()
        stage.local.send(b"question")
        stage.local.shutdown(socket.SHUT_WR)
        stage.peer = Peer(stage.far)
        stage.found(SERVICES[0])
        stage.reached()
        await soon(lambda: stage.peer.ended)
        assert stage.peer.received == b"question"
        stage.far.write(b"answer")
        stage.far.close()
        assert await outcome(stage.local) == b"answer"
        await soon(stage.gone)


@pytest.mark.parametrize("victim", ["/world", "/pipe"])
async def test_whoever_dies_meanwhile_the_client_hears_of_it(victim: str) -> None:
    async with staged() as stage:
        stage.proxy()
        await asyncio.sleep(0)
        stage.runtime.kill(victim)
        assert await outcome(stage.local) is ConnectionResetError
        await soon(stage.gone)


# Asked to stop


@BOTH
async def test_a_quiet_pipe_is_closed_in_order(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe_module, "QUIET", 0.01)
    async with kind() as stage:
        await stage.exchange()
        stage.runtime.stop(stage.pipe)
        assert await outcome(stage.local) == b""
        await soon(lambda: stage.peer.ended)
        assert not stage.peer.lost or stage.peer.error is None
        stage.far.close()
        await soon(stage.gone)
        assert stage.pipe.reason in (NORMAL, SHUTDOWN)
        await soon(lambda: stage.peer.lost)
        assert stage.peer.error is None


@BOTH
@pytest.mark.parametrize("busy", ["moving", "unacked"])
async def test_a_busy_pipe_is_reset_when_its_time_is_over(
    kind: Any, busy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe_module, "QUIET", 0.02)
    monkeypatch.setattr(pipe_module, "DRAIN", 0.2)
    async with kind() as stage:
        await stage.exchange()
        loop = asyncio.get_running_loop()
        if busy == "unacked":
            stage.channel.unacked = 1
        else:
            looks = itertools.count()
            monkeypatch.setattr(PipeChannel, "bytes_moved", property(lambda _: next(looks)))
        began = loop.time()
        stage.runtime.stop(stage.pipe)
        await soon(stage.gone)
        assert 0.2 <= loop.time() - began < 5
        assert stage.pipe.reason == SHUTDOWN
        assert await outcome(stage.local) is ConnectionResetError
        await soon(lambda: stage.peer.lost)
        assert isinstance(stage.peer.error, ConnectionResetError)


async def test_asked_to_stop_before_there_is_a_channel() -> None:
    async with staged() as stage:
        stage.proxy()
        await asyncio.sleep(0)
        stage.runtime.stop(stage.pipe)
        assert await outcome(stage.local) is ConnectionResetError
        await soon(stage.gone)
        assert stage.pipe.reason == SHUTDOWN


async def test_a_pipe_that_finishes_while_it_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe_module, "QUIET", 0.01)
    async with proxying() as stage:
        await stage.exchange()
        stage.channel.unacked = 1  # so that it does not look quiet
        stage.runtime.stop(stage.pipe)
        await asyncio.sleep(0)
        stage.local.shutdown(socket.SHUT_WR)
        await soon(lambda: stage.peer.ended)
        stage.far.write(b"the rest")
        stage.far.close()
        assert await outcome(stage.local) == b"the rest"
        await soon(stage.gone)
        assert stage.peer.error is None
