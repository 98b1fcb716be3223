"""The Python API with real UDP on the loopback; one private DHT for each test."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.pipes import descriptors, soon

from hyperseaport.actors import api
from hyperseaport.actors.api import DHT, Deployment, Proxy, Registry, Service, connect
from hyperseaport.actors.messages import EndpointReady, RegistryListening, ServiceListening
from hyperseaport.supervisor import SupervisorSpec
from hyperseaport.transport.errors import (
    Closed,
    ConnectError,
    HyperseaportError,
    InvalidInput,
    LocalError,
    PeerNotFound,
)
from hyperseaport.transport.keys import KeyPair

NOWHERE = ("127.0.0.1:9",)
KEY = KeyPair.from_seed(b"\x09" * 32).public_key
NO_TIME = 0.5


@asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """Neither descriptors nor tasks."""
    before, tasks = descriptors(), asyncio.all_tasks()
    yield
    await soon(lambda: asyncio.all_tasks() == tasks)
    await soon(lambda: descriptors() == before)


@asynccontextmanager
async def echoing() -> AsyncIterator[int]:
    """The port of a TCP server that sends everything back, and its end after the client's."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def echoed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int) -> None:
    """Send random bytes, end, and get the same ones back."""
    sent = random.Random(size).randbytes(size)

    async def send() -> None:
        writer.write(sent)
        await writer.drain()
        writer.write_eof()

    sending = asyncio.create_task(send())
    received = await asyncio.wait_for(reader.read(), 20)
    await sending
    assert hashlib.sha256(received).digest() == hashlib.sha256(sent).digest()
    writer.close()
    await writer.wait_closed()


async def test_from_one_end_to_the_other() -> None:
    async with nothing_left(), echoing() as port, DHT() as dht:
        assert dht.bootstrap[0].startswith("127.0.0.1:")
        seed = b"\x07" * 32
        async with Registry(seed=seed, bootstrap=dht.bootstrap) as registry:
            assert registry.public_key == KeyPair.from_seed(seed).public_key
            key = registry.public_key.hex().upper()
            service = Service("echo@1.2.3", registry=key, port=port, bootstrap=dht.bootstrap)
            news: list[object] = []
            service.on_news = news.append
            async with service:
                assert ServiceListening(service.public_key) in news
                await asyncio.wait_for(service.registered(), 20)
                await service.registered()  # and again, at once

                async with Proxy("echo@1.x", registry=key, bootstrap=dht.bootstrap) as proxy:
                    found = await asyncio.wait_for(proxy.routed(), 20)
                    assert found.public_key == service.public_key
                    assert found.version == "1.2.3"
                    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
                    await echoed(reader, writer, 1_000_000)

                # Two at once, each with a node of its own.
                async def client(size: int) -> None:
                    ends = await connect("echo@^1", registry=key, bootstrap=dht.bootstrap)
                    assert ends[1].get_extra_info("remote_public_key") == service.public_key
                    await echoed(*ends, size)

                async with nothing_left():
                    await asyncio.gather(client(100_000), client(200_000))


async def test_connect_keeps_its_identity_and_only_those_allowed_get_through() -> None:
    friend = b"\x0a" * 32
    async with (
        nothing_left(),
        echoing() as port,
        DHT() as dht,
        Registry(bootstrap=dht.bootstrap) as registry,
    ):
        key, friends = registry.public_key, [KeyPair.from_seed(friend).public_key]
        service = Service(
            "echo@1.2.3", registry=key, port=port, allow=friends, bootstrap=dht.bootstrap
        )
        async with service:
            await asyncio.wait_for(service.registered(), 20)
            ends = await connect("echo", registry=key, seed=friend, bootstrap=dht.bootstrap)
            assert ends[1].get_extra_info("public_key") == friends[0]
            await echoed(*ends, 10)
            # A stranger gets no answer at all, so it is the time that ends it.
            with pytest.raises((PeerNotFound, ConnectError)):
                await connect("echo", registry=key, bootstrap=dht.bootstrap, timeout=1.0)


# connect


async def test_metrics_tell_what_was_counted() -> None:
    async with DHT() as dht, Registry(bootstrap=dht.bootstrap) as registry:
        before = await registry.metrics()
        service = Service("a@1.0.0", registry=registry.public_key, port=9, bootstrap=dht.bootstrap)
        async with service:
            await service.registered()
            after = await registry.metrics()
        seed = await dht.metrics()
    assert after.keys() == before.keys() == seed.keys()
    assert (before["channels"], after["channels"]) == (0, 1)
    assert after["udx.streams"] == 1
    assert after["udx.received"] > before["udx.received"]
    assert before["bytes.received"] == before["bytes.sent"] == 0
    assert after["bytes.received"] > 0
    assert after["bytes.sent"] > 0
    assert seed["dht.received"] > 0
    assert not any(after[name] for name in after if name.endswith("dropped"))
    with pytest.raises(RuntimeError, match="does not run"):
        await registry.metrics()


async def test_nobody_matches_in_time() -> None:
    async with nothing_left(), DHT() as dht, Registry(bootstrap=dht.bootstrap) as registry:
        with pytest.raises(PeerNotFound, match=r"no service matches a@1\.x within 0\.5 s"):
            await connect(
                "a@1.x",
                registry=registry.public_key,
                bootstrap=dht.bootstrap,
                timeout=NO_TIME,
            )


async def test_no_network_at_all() -> None:
    async with nothing_left():
        with pytest.raises(PeerNotFound, match="is it running"):
            await connect("a@1.x", registry=KEY, bootstrap=NOWHERE, timeout=NO_TIME)


@pytest.mark.parametrize("moment", [0.0, 0.02, 0.3])
async def test_cancelled_it_leaves_nothing(moment: float) -> None:
    async with DHT() as dht, nothing_left():
        task = asyncio.create_task(connect("a@1.x", registry=KEY, bootstrap=dht.bootstrap))
        await asyncio.sleep(moment)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize(
    ("role", "registry", "bootstrap"),
    [
        ("", KEY, NOWHERE),
        ("a@b c d", KEY, NOWHERE),
        ("a", b"short", NOWHERE),
        ("a", "no hex", NOWHERE),
        ("a", KEY, ("nowhere",)),
    ],
)
async def test_connect_with_wrong_words(
    role: str, registry: bytes | str, bootstrap: tuple[str, ...]
) -> None:
    async with nothing_left():
        with pytest.raises(InvalidInput):
            await connect(role, registry=registry, bootstrap=bootstrap)


async def test_wait_closed_waits_for_the_node() -> None:
    async with echoing() as port, DHT() as dht, Registry(bootstrap=dht.bootstrap) as registry:
        service = Service(
            "echo@1.0.0", registry=registry.public_key, port=port, bootstrap=dht.bootstrap
        )
        async with service:
            await asyncio.wait_for(service.registered(), 20)
            before, tasks = descriptors(), asyncio.all_tasks()
            _, writer = await connect("echo", registry=registry.public_key, bootstrap=dht.bootstrap)
            assert descriptors() > before
            writer.transport.abort()
            waiting = asyncio.create_task(writer.wait_closed())
            await asyncio.sleep(0)
            # Who gives up waiting does not stop the stopping.
            waiting.cancel()
            await writer.wait_closed()
            await soon(lambda: waiting.done())
            # Not a moment later: the service's end of the connection has gone on its own.
            await soon(lambda: descriptors() <= before)
            assert asyncio.all_tasks() <= tasks


# Deployments


async def test_an_exception_inside_still_stops_the_tree() -> None:
    runtimes = []

    async def fails() -> None:
        async with DHT() as dht, Registry(bootstrap=dht.bootstrap) as registry:
            runtimes.append(registry.runtime)
            raise ZeroDivisionError

    async with nothing_left():
        with pytest.raises(ZeroDivisionError):
            await fails()
        assert [runtime.actor_count for runtime in runtimes] == [0]


async def test_cancelled_inside_or_at_the_door_it_still_stops() -> None:
    async with DHT() as dht, nothing_left():
        entered = asyncio.Event()

        async def inside() -> None:
            async with Registry(bootstrap=dht.bootstrap):
                entered.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(inside())
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        task = asyncio.create_task(inside())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_port_in_use() -> None:
    async with DHT() as dht, nothing_left():
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(LocalError, match="choose another port"):
                async with Proxy("a", registry=KEY, port=port, bootstrap=dht.bootstrap):
                    pytest.fail("the port is another's")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.bind(("127.0.0.1", 0))
            with pytest.raises(LocalError, match="cannot"):
                async with DHT(port=udp.getsockname()[1], nodes=1):
                    pytest.fail("the port is another's")


async def test_a_bad_bootstrap_text_is_the_callers_fault() -> None:
    async with nothing_left():
        with pytest.raises(InvalidInput, match="is not HOST:PORT"):
            async with Registry(bootstrap=["nowhere"]):
                pytest.fail("it has no network")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Service("a", registry=KEY, port=1),
        lambda: Service("a@1.x", registry=KEY, port=1),
        lambda: Service("a@1.0.0", registry="x", port=1),
        lambda: Service("a@1.0.0", registry=KEY, port=1, allow=["x"]),
        lambda: Service("a@1.0.0", registry=KEY, port=1, seed=b"short"),
        lambda: Service("a@1.0.0", registry=KEY, port=1, allow_relays=["x"]),
        lambda: Proxy("a", registry=KEY, relay_through=["x"]),
        lambda: Proxy("", registry=KEY),
        lambda: Proxy("a", registry=b"short"),
        lambda: Proxy("a", registry=KEY, seed="x" * 64),
        lambda: Registry(seed="1234"),
    ],
)
def test_wrong_words(make: type[Deployment]) -> None:
    with pytest.raises(InvalidInput):
        make()


async def test_waiting_ends_with_the_deployment() -> None:
    async with DHT() as dht, nothing_left():
        async with Proxy("a@1.x", registry=KEY, bootstrap=dht.bootstrap) as proxy:
            waiting = asyncio.create_task(proxy.routed())
            gives_up = asyncio.create_task(proxy.routed())
            await asyncio.sleep(0)
            gives_up.cancel()
        with pytest.raises(Closed, match="the deployment has ended"):
            await asyncio.wait_for(waiting, 20)
        with pytest.raises(RuntimeError, match="enter it with"):
            await proxy.routed()


async def test_waiting_ends_when_the_tree_dies() -> None:
    async with (
        DHT() as dht,
        nothing_left(),
        Proxy("a@1.x", registry=KEY, bootstrap=dht.bootstrap) as proxy,
    ):
        waiting = asyncio.create_task(proxy.routed())
        await asyncio.sleep(0)
        proxy.runtime.kill("/root", "killed by the test")
        with pytest.raises(HyperseaportError, match="killed by the test"):
            await asyncio.wait_for(waiting, 20)


async def test_entered_again_it_knows_nothing_of_the_first_time() -> None:
    async with nothing_left():
        dht = DHT(nodes=1)
        async with dht:
            dht._show(EndpointReady(("192.0.2.1", 1), 0))
            with pytest.raises(RuntimeError, match="runs already"):
                await dht.__aenter__()
        async with dht:
            assert len(dht._addresses) == 1
            assert dht.bootstrap[0].startswith("127.0.0.1:")
        await dht.__aexit__()  # harmless


async def test_outside_of_its_context_there_is_no_runtime() -> None:
    with pytest.raises(RuntimeError, match="enter it with"):
        _ = Registry().runtime


async def test_news_go_to_whoever_wants_them() -> None:
    async with DHT(nodes=1) as dht:
        registry = Registry(bootstrap=dht.bootstrap)
        news: list[object] = []
        registry.on_news = news.append
        async with registry:
            assert RegistryListening in map(type, news)


async def test_a_tree_that_stops_while_it_starts() -> None:
    class Empty(Deployment):
        def _tree(self) -> SupervisorSpec:
            spec = DHT(nodes=1)._tree()
            asyncio.get_running_loop().call_soon(self._stop)
            return spec

        def _stop(self) -> None:
            self.runtime.kill("/root", "no reason")

    async with nothing_left():
        with pytest.raises(ConnectError, match="no reason"):
            await Empty().__aenter__()


def test_keys_are_bytes_or_hex() -> None:
    assert api._bytes(KEY, "key") == api._bytes(KEY.hex().upper(), "key") == KEY
