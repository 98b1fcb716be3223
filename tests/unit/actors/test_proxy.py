"""The listener, on real sockets of the loopback, between actors that only record."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
import structlog
from support.pipes import descriptors, outcome, soon
from support.registry import Recorder

from hyperseaport.actors import proxy as proxy_module
from hyperseaport.actors.actor import Actor, Crashed, LocalError
from hyperseaport.actors.attempts import ProxyPipe
from hyperseaport.actors.messages import (
    Describe,
    Follow,
    ProxyListening,
    ProxyRouted,
    ProxyUnrouted,
    Resolved,
    ServiceRecord,
)
from hyperseaport.actors.proxy import ProxyArgs, ProxyListener
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.supervisor import Backoff, ChildSpec, Supervisor, SupervisorSpec
from hyperseaport.transport.keys import KeyPair

PAIR = KeyPair.from_seed(b"\x01" * 32)
RECORD = ServiceRecord(b"\xaa" * 32, "a", "1.0.0", {})
OTHER = ServiceRecord(b"\xbb" * 32, "a", "1.0.0", {})


class Holder(Actor):
    """Instead of a pipe: holds the client's connection, and shows it to the test."""

    def on_start(self, args: ProxyPipe) -> None:
        held.append(args)
        self.own(args.socket.close)


held: list[ProxyPipe] = []


def clients_spec(limit: int | None = None) -> SupervisorSpec:
    template = ChildSpec("pipe", Holder, restart="temporary")
    return SupervisorSpec("simple_one_for_one", (template,), limit=limit)


class Stage:
    def __init__(self, runtime: ActorRuntime, port: int, limit: int | None) -> None:
        held.clear()
        self.runtime = runtime
        self.news: list[Any] = []
        self.to_resolver: list[Any] = []
        args = ProxyArgs("127.0.0.1", port, PAIR, connect_timeout=7.0)
        spec = SupervisorSpec(
            "rest_for_one",
            (
                ChildSpec("console", Recorder, self.news),
                ChildSpec("endpoint", Recorder, []),
                ChildSpec("pipes", Supervisor, clients_spec(limit)),
                ChildSpec("resolver", Recorder, self.to_resolver),
                ChildSpec("listener", ProxyListener, args, wait_ready=5.0),
            ),
            backoff=Backoff(initial=0.01, maximum=0.1),
        )
        self.root = runtime.spawn(Supervisor, spec, name="root")

    @property
    def listening(self) -> list[ProxyListening]:
        return [each for each in self.news if isinstance(each, ProxyListening)]

    @property
    def port(self) -> int:
        return self.listening[-1].port

    def tell(self, message: object) -> None:
        listener = self.runtime.find("/root/listener")
        assert listener is not None
        self.runtime.tell(listener, message)

    async def described(self) -> dict[str, Any]:
        listener = self.runtime.find("/root/listener")
        assert listener is not None
        return dict((await self.runtime.call(listener, Describe())).fields)

    def client(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port))
        client.setblocking(False)
        return client


@asynccontextmanager
async def staged(port: int = 0, limit: int | None = None) -> AsyncIterator[Stage]:
    before = descriptors()
    async with ActorRuntime() as runtime:
        stage = Stage(runtime, port, limit)
        await runtime.ready(stage.root)
        await soon(lambda: stage.listening)
        yield stage
    held.clear()
    assert descriptors() == before


@contextmanager
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def test_each_connection_becomes_a_pipe_at_once() -> None:
    async with staged() as stage:
        clients = [stage.client() for _ in range(100)]
        await soon(lambda: len(held) == 100)
        assert {pipe.key_pair for pipe in held} == {PAIR}
        assert {pipe.connect_timeout for pipe in held} == {7.0}
        assert {pipe.socket.getpeername() for pipe in held} == {
            client.getsockname() for client in clients
        }
        assert all(pipe.socket.getblocking() is False for pipe in held)
        assert held[0].resolver is stage.runtime.find("/root/resolver")
        assert held[0].endpoint is stage.runtime.find("/root/endpoint")
        assert len(stage.runtime.tree()) == 106
        for client in clients:
            client.close()


async def test_port_0_takes_a_free_one_and_says_which() -> None:
    async with staged(0) as stage:
        (news,) = stage.listening
        assert news.host == "127.0.0.1"
        assert news.port > 0
        stage.client().close()
    with taken() as port:
        pass
    async with staged(port) as stage:
        assert stage.listening == [ProxyListening("127.0.0.1", port)]


async def test_a_port_in_use_says_in_one_line_what_to_do() -> None:
    with taken() as port:
        async with ActorRuntime() as runtime:
            root = Stage(runtime, port, None).root
            reason = await runtime.stopped(root)
    assert isinstance(reason, Crashed)
    assert isinstance(reason.exception, LocalError)
    text = str(reason.exception)
    assert text == (
        f"cannot listen on 127.0.0.1:{port} (Address already in use): "
        "choose another port with -p, or -p 0"
    )


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.name.invalid"])
def test_an_address_that_is_not_ours_says_so(host: str) -> None:
    with pytest.raises(LocalError, match=f"cannot listen on {host}:0 .*: choose another"):
        proxy_module._bound(host, 0)


async def test_it_listens_where_it_was_told_only() -> None:
    async with staged() as stage:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", stage.port))


async def test_a_refused_connection_is_reset() -> None:
    with structlog.testing.capture_logs() as logs:
        async with staged(limit=1) as stage:
            first, second = stage.client(), stage.client()
            assert await outcome(second) is ConnectionResetError
            assert len(held) == 1
            described = await stage.described()
            assert (described["accepted"], described["refused"]) == (2, 1)
            first.close()
            second.close()
    refusals = [entry for entry in logs if entry["event"] == "connection refused"]
    assert [entry["log_level"] for entry in refusals] == ["warning"]
    assert "limit" in refusals[0]["reason"]


async def test_routes_are_told_to_people_once() -> None:
    async with staged() as stage:
        await soon(lambda: stage.to_resolver)
        assert stage.to_resolver == [Follow()]
        port, before = stage.port, len(stage.news)
        for services in ((), (), (RECORD, OTHER), (OTHER,), (), ()):
            stage.tell(Resolved(services))
        await soon(lambda: len(stage.news) == before + 4)
        assert stage.news[before:] == [
            ProxyUnrouted(port),
            ProxyRouted(port, RECORD),
            ProxyRouted(port, OTHER),
            ProxyUnrouted(port),
        ]


async def test_it_describes_itself() -> None:
    async with staged() as stage:
        expected = {
            "address": "127.0.0.1",
            "port": stage.port,
            "accepted": 0,
            "refused": 0,
            "routed_to": None,
            "connect_timeout": 7.0,
        }
        assert await stage.described() == expected
        stage.tell(Resolved((RECORD, OTHER)))
        assert await stage.described() == {**expected, "routed_to": RECORD.public_key.hex()}
        stage.tell(Resolved(()))
        assert await stage.described() == expected


async def test_out_of_descriptors_it_pauses_and_then_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proxy_module, "PAUSE", 0.05)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with structlog.testing.capture_logs() as logs:
        async with staged() as stage:
            client = stage.client()
            highest = max(map(int, os.listdir("/proc/self/fd")))
            fillers = [os.dup(0) for _ in range(highest)]
            full = max(*fillers, highest) + 1
            resource.setrlimit(resource.RLIMIT_NOFILE, (full, limits[1]))
            try:

                def pauses() -> int:
                    return sum(entry["event"] == "cannot accept" for entry in logs)

                await soon(lambda: pauses() >= 2)
                assert held == []
                # It slept in between, or there would be thousands.
                assert pauses() < 20
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                for filler in fillers:
                    os.close(filler)
            await soon(lambda: len(held) == 1)
            other = stage.client()
            await soon(lambda: len(held) == 2)
            client.close()
            other.close()


async def test_a_dead_listener_refuses_and_its_successor_takes_the_port() -> None:
    with taken() as port:
        pass
    async with staged(port) as stage:
        stage.runtime.kill("/root/listener")
        with pytest.raises(ConnectionRefusedError):
            stage.client()
        await soon(lambda: len(stage.listening) == 2)
        assert stage.port == port
        with stage.client():
            await soon(lambda: len(held) == 1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


async def test_asked_to_stop_it_closes_its_socket_before_the_pipes_end() -> None:
    async with staged() as stage:
        with stage.client():
            await soon(lambda: held)
            listener = stage.runtime.find("/root/listener")
            assert listener is not None
            port = stage.port
            stage.runtime.stop(listener)
            await stage.runtime.stopped(listener)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
            assert held[0].socket.fileno() >= 0
            await asyncio.sleep(0)
