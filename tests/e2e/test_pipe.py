"""What a TCP connection through a service and a proxy keeps of TCP: ends, resets, and patience.

Everything runs in this process, so that a test can look at the live buffers and kill any actor.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import signal
import socket
import struct
import termios
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from random import Random
from typing import Any, cast

import pytest
import structlog
from support.stage import NOTICED, SETTLED, Stage
from support.waiting import until

import hyperseaport
from hyperseaport.actors.api import Deployment
from hyperseaport.actors.pipe import Pipe
from hyperseaport.actors.splice import TCP_HIGH
from hyperseaport.transport.udx.receive import RECEIVE_WINDOW

HOST = "127.0.0.1"
SIZE = 16 * 1024 * 1024
CHUNK = 256 * 1024
#: What a process may hold of what it sends on one connection.
SENDING = 256 * 1024
#: Bytes asked of the kernel for each buffer of the tests' own sockets.
SMALL = 32 * 1024
#: Seconds for what takes milliseconds on a machine that is not busy.
SOON = 20.0


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Actors that are killed on purpose say so at length."""
    before = structlog.get_config()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.configure(**before)


class World:
    """A private network with a service in front of `listener`, and a proxy that found it."""

    dht: hyperseaport.DHT
    registry: hyperseaport.Registry
    service: hyperseaport.Service
    proxy: hyperseaport.Proxy

    def __init__(self) -> None:
        self.listener = socket.create_server((HOST, 0), backlog=64)
        self.listener.setblocking(False)
        # Both ends of every connection.
        self._ends: list[socket.socket] = []

    @property
    def deployments(self) -> tuple[Deployment, ...]:
        return self.dht, self.registry, self.service, self.proxy

    async def start(self, stack: AsyncExitStack) -> None:
        stack.callback(self.listener.close)
        self.dht = await stack.enter_async_context(hyperseaport.DHT())
        bootstrap = self.dht.bootstrap
        self.registry = await stack.enter_async_context(hyperseaport.Registry(bootstrap=bootstrap))
        key = self.registry.public_key
        self.service = await stack.enter_async_context(
            hyperseaport.Service(
                "pipe@1.0.0",
                registry=key,
                port=self.listener.getsockname()[1],
                bootstrap=bootstrap,
            )
        )
        await self.service.registered()
        self.proxy = await stack.enter_async_context(
            hyperseaport.Proxy("pipe@1.x", registry=key, bootstrap=bootstrap)
        )
        await self.proxy.routed()

    async def connect(self, *, buffers: int = 0) -> tuple[socket.socket, socket.socket]:
        """Both ends of a new connection: the client's at the proxy, the server's at the service.
        With `buffers`, the kernel is asked for that many bytes each."""
        client = self.client()
        if buffers:
            shrink(self.listener, buffers)
            shrink(client, buffers)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(SOON):
            await loop.sock_connect(client, (HOST, self.proxy.port))
            server, _ = await loop.sock_accept(self.listener)
        self._ends.append(server)
        return client, server

    def client(self) -> socket.socket:
        client = socket.socket()
        client.setblocking(False)
        self._ends.append(client)
        return client

    def hang_up(self) -> None:
        """Close all connections."""
        for end in self._ends:
            end.close()

    def pipes(self, deployment: Deployment) -> dict[str, Pipe]:
        """The live pipe actors of a service or a proxy, by their paths."""
        return {
            path: cast(Pipe, actor(deployment, path))
            for path in deployment.runtime.tree()
            if "/pipes/" in path
        }


def actor(deployment: Deployment, path: str) -> Any:
    address = deployment.runtime.find(path)
    assert address is not None
    cell: Any = address.target
    return cell.actor


def shrink(which: socket.socket, size: int) -> None:
    which.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
    which.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[World]:
    """A world; at the end of the block everything in it must be as it was at its beginning, and
    nothing of it may be left after it."""
    await asyncio.get_running_loop().getaddrinfo(HOST, 1)  # the executor's thread stays
    outside = descriptors(), len(asyncio.all_tasks())
    world = World()
    async with AsyncExitStack() as stack:
        await world.start(stack)
        stack.callback(world.hang_up)
        await world.connect()
        world.hang_up()

        async def quiet() -> bool:
            return not (world.pipes(world.service) or world.pipes(world.proxy))

        await until(quiet, "the first connection is over", deadline=SOON)
        before = levels(world)
        yield world
        world.hang_up()

        async def at_baseline() -> Any:
            return levels(world) == before

        try:
            await until(at_baseline, "baseline", deadline=SETTLED)
        except AssertionError as error:
            raise AssertionError(f"{error}: {before} before, now {levels(world)}") from None
    assert (descriptors(), len(asyncio.all_tasks())) == outside


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def levels(world: World) -> dict[str, Any]:
    return {
        "descriptors": descriptors(),
        "tasks": len(asyncio.all_tasks()),
        "actors": [
            # Sessions have a number that grows.
            sorted(path for path in each.runtime.tree() if "/sessions/" not in path)
            for each in world.deployments
        ],
        "sessions": sum("/sessions/" in path for path in world.registry.runtime.tree()),
    }


# Bytes


async def send(to: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(to, data)


async def upload(to: socket.socket, data: bytes) -> None:
    """Send the bytes and then the end."""
    await send(to, data)
    to.shutdown(socket.SHUT_WR)


async def digest(source: socket.socket, *, limit: int = 1 << 62) -> tuple[int, bytes]:
    """How many bytes came until the end (or the limit), and their hash. Raises what a reset is."""
    loop = asyncio.get_running_loop()
    count, found = 0, hashlib.sha256()
    while count < limit:
        data = await loop.sock_recv(source, min(CHUNK, limit - count))
        if not data:
            break
        count += len(data)
        found.update(data)
    return count, found.digest()


def expected(data: bytes) -> tuple[int, bytes]:
    return len(data), hashlib.sha256(data).digest()


def reset(which: socket.socket) -> None:
    which.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    which.close()


async def expect_reset(which: socket.socket) -> None:
    async with asyncio.timeout(SOON):
        with pytest.raises(ConnectionResetError):
            await digest(which)


DATA = Random(1).randbytes(SIZE)


# Ends


@pytest.mark.parametrize("first", ["client", "server"])
async def test_an_end_leaves_the_other_direction_whole(first: str) -> None:
    """The side that ends first gets 16 MiB afterwards, every byte of it and the end."""
    async with running() as world:
        client, server = await world.connect()
        begins, follows = (client, server) if first == "client" else (server, client)
        await upload(begins, b"that is all")
        async with asyncio.timeout(SOON):
            assert await digest(follows) == expected(b"that is all")
            sending = asyncio.create_task(upload(follows, DATA))
            assert await digest(begins) == expected(DATA)
            await sending


async def test_both_directions_at_once() -> None:
    async with running() as world:
        client, server = await world.connect()
        back = DATA[::-1]
        async with asyncio.timeout(SOON):
            _, _, there, here = await asyncio.gather(
                upload(client, DATA), upload(server, back), digest(server), digest(client)
            )
        assert there == expected(DATA)
        assert here == expected(back)


@pytest.mark.parametrize("who", ["client", "server"])
async def test_a_reset_is_a_reset_at_the_other_end(who: str) -> None:
    async with running() as world:
        client, server = await world.connect()
        breaks, sees = (client, server) if who == "client" else (server, client)
        await send(breaks, b"hello")
        async with asyncio.timeout(SOON):
            assert await digest(sees, limit=5) == expected(b"hello")
        reset(breaks)
        await expect_reset(sees)


@pytest.mark.parametrize("who", ["client", "server"])
async def test_a_reset_after_the_others_end_is_a_reset(who: str) -> None:
    """The side that has ended still waits for an answer, and must not take silence for one."""
    async with running() as world:
        client, server = await world.connect()
        breaks, waits = (client, server) if who == "client" else (server, client)
        await upload(waits, b"question")
        async with asyncio.timeout(SOON):
            assert await digest(breaks) == expected(b"question")
        await send(breaks, b"half an ans")
        reset(breaks)
        await expect_reset(waits)


async def test_a_service_that_is_not_there_is_a_reset() -> None:
    async with running() as world:
        world.listener.shutdown(socket.SHUT_RDWR)
        client = world.client()
        await asyncio.get_running_loop().sock_connect(client, (HOST, world.proxy.port))
        await expect_reset(client)


# Patience


def kernel_holds(which: socket.socket | Any, request: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(which.fileno(), request, bytes(4)))[0])


def tcp_of(pipe: Pipe) -> Any:
    """Its TCP transport; None while it is not connected."""
    return pipe._tcp if pipe._early is None else pipe._early.transport


def held_towards_tcp(pipe: Pipe) -> int:
    """Bytes that came from the channel and that the kernel has not got."""
    channel = pipe._channel
    assert channel is not None
    stream = channel.stream
    return (
        stream._receiver._stored
        + stream.readable
        + channel._secret.buffered
        + sum(map(len, channel._pending))
        + int(tcp_of(pipe).get_write_buffer_size())
    )


def held_towards_peer(pipe: Pipe) -> int:
    """Bytes that came from TCP and that the peer has not got."""
    channel = pipe._channel
    assert channel is not None
    return channel.stream.unsent + channel.stream.unacked


@pytest.mark.parametrize("reader", ["client", "server"])
async def test_a_reader_that_stalls_stalls_the_writer(reader: str) -> None:
    async with running() as world:
        client, server = await world.connect(buffers=SMALL)
        reads, writes = (client, server) if reader == "client" else (server, client)
        near, far = (
            (world.proxy, world.service) if reader == "client" else (world.service, world.proxy)
        )

        async def joined() -> bool:
            pipes = [*world.pipes(near).values(), *world.pipes(far).values()]
            return len(pipes) == 2 and all(tcp_of(pipe) is not None for pipe in pipes)

        await until(joined, "both pipes run", deadline=SOON)
        [receiving], [sending] = world.pipes(near).values(), world.pipes(far).values()
        # The kernel's own buffers in between are as small as those of the ends.
        for pipe in (receiving, sending):
            shrink(tcp_of(pipe).get_extra_info("socket")._sock, SMALL)
        pushed = 0
        largest = {"receiving": 0, "sending": 0}
        idle = 0
        while idle < 50:
            try:
                pushed += writes.send(DATA[pushed : pushed + 50_000])
                idle = 0
            except BlockingIOError:
                idle += 1
                await asyncio.sleep(0.01)
            largest["receiving"] = max(largest["receiving"], held_towards_tcp(receiving))
            largest["sending"] = max(largest["sending"], held_towards_peer(sending))
            assert pushed < SIZE, "nothing stalls the writer"
            await asyncio.sleep(0)
        in_kernel = (
            kernel_holds(writes, termios.TIOCOUTQ)
            + kernel_holds(tcp_of(sending).get_extra_info("socket"), termios.FIONREAD)
            + kernel_holds(tcp_of(receiving).get_extra_info("socket"), termios.TIOCOUTQ)
            + kernel_holds(reads, termios.FIONREAD)
        )
        assert largest["sending"] <= SENDING
        # A full window, and what was written to TCP just before that stopped taking it.
        assert largest["receiving"] <= RECEIVE_WINDOW + TCP_HIGH
        # Nothing hides anywhere else.
        assert pushed - in_kernel <= SENDING + RECEIVE_WINDOW + TCP_HIGH
        # Then the reader goes on, and gets everything.
        async with asyncio.timeout(SOON):
            rest = asyncio.create_task(upload(writes, DATA[pushed:]))
            assert await digest(reads) == expected(DATA)
            await rest


# Deaths


async def steady(client: socket.socket, server: socket.socket, data: bytes) -> None:
    """The bytes come back whole. Raises what a reset is."""

    async def echo() -> None:
        loop = asyncio.get_running_loop()
        while chunk := await loop.sock_recv(server, CHUNK):
            await loop.sock_sendall(server, chunk)
        server.shutdown(socket.SHUT_WR)

    async with asyncio.TaskGroup() as group:
        group.create_task(echo())
        group.create_task(upload(client, data))
        answer = group.create_task(digest(client))
    assert answer.result() == expected(data)


@pytest.mark.parametrize("where", ["proxy", "service"])
@pytest.mark.parametrize("reader", ["client", "server"])
async def test_a_pipe_that_is_killed_takes_its_connection_alone(where: str, reader: str) -> None:
    async with running() as world:
        deployment: Deployment = getattr(world, where)
        client, server = await world.connect()
        [victim] = world.pipes(deployment)
        reads, writes = (client, server) if reader == "client" else (server, client)
        flows = [
            asyncio.create_task(steady(*await world.connect(), Random(number).randbytes(1_000_000)))
            for number in range(10)
        ]
        flood = asyncio.create_task(send(writes, DATA))
        await digest(reads, limit=1_000_000)
        deployment.runtime.kill(victim)
        # The end that does not write sees the reset by reading: the kernel says it once.
        await expect_reset(reads)
        async with asyncio.timeout(SOON):
            with pytest.raises(ConnectionError):
                await flood
            await asyncio.gather(*flows)


async def flowing(world: World) -> bool:
    """Whether a new connection carries bytes there and back."""
    try:
        async with asyncio.timeout(3):
            client, server = await world.connect()
    except OSError:
        return False
    try:
        async with asyncio.timeout(5):
            await steady(client, server, DATA[:100_000])
    except (OSError, BaseExceptionGroup) as error:
        if not resets(error):
            raise
        return False
    finally:
        client.close()
        server.close()
    return True


def shape(deployment: Deployment) -> list[str]:
    """The actors that live as long as the deployment."""
    return sorted(
        path
        for path in deployment.runtime.tree()
        if "/pipes/" not in path and "/sessions/" not in path
    )


@pytest.mark.parametrize(
    ("where", "paths"),
    [
        ("proxy", ("endpoint", "pipes", "links")),
        ("proxy", ("link", "proxy:PORT", "proxy:PORT/resolver", "proxy:PORT/listener")),
        ("service", ("endpoint", "pipes", "links", "link", "service:pipe@1.0.0")),
        ("service", ("service:pipe@1.0.0/listener", "service:pipe@1.0.0/announcement")),
        ("registry", ("endpoint", "registry")),
        ("registry", ("registry/table", "registry/server", "registry/replica")),
        ("registry", ("registry/sessions",)),
    ],
)
async def test_any_other_actor_may_die_under_traffic(where: str, paths: tuple[str, ...]) -> None:
    """The tree grows back as it was, nobody takes a part for the whole, new connections work. What
    does not carry the transfers takes none of them with it."""
    async with running() as world:
        deployment: Deployment = getattr(world, where)
        before = shape(deployment)
        for template in paths:
            path = template.replace("PORT", str(world.proxy.port))
            flows = [
                asyncio.create_task(steady(*await world.connect(), DATA[:4_000_000]))
                for _ in range(4)
            ]

            async def moving() -> bool:
                """Not before all have had an answer: until then they would be moved."""
                pipes = [*world.pipes(world.proxy).values()]
                moved = [pipe._channel.bytes_moved for pipe in pipes if pipe._channel]
                return len(moved) == sum(pipe._answered for pipe in pipes) == 4 and any(
                    count > 100_000 for count in moved
                )

            await until(moving, "bytes flow", deadline=SOON, every=0.005)
            old = deployment.runtime.find(f"/root/node/{path}")
            deployment.runtime.kill(f"/root/node/{path}")

            async def grown(path: str = path, old: object = old) -> bool:
                return (
                    shape(deployment) == before
                    and deployment.runtime.find(f"/root/node/{path}") is not old
                )

            await until(grown, f"{path} lives again", deadline=SOON)
            await until(lambda: flowing(world), "new connections work", deadline=SOON, every=0.1)
            async with asyncio.timeout(SOON):
                outcomes = await asyncio.gather(*flows, return_exceptions=True)
            carries = where != "registry" and path in ("endpoint", "pipes")
            for outcome in outcomes:
                assert outcome is None or (carries and resets(outcome)), repr(outcome)


async def test_a_service_process_that_is_killed_is_a_reset(stage: Stage) -> None:
    """It says nothing more to anybody: the proxy finds out, and tells the client the truth."""
    with socket.create_server((HOST, 0)) as listener:
        listener.setblocking(False)
        service, proxy = await stage.chain(listener.getsockname()[1], "killed")
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setblocking(False)
            await loop.sock_connect(client, (HOST, proxy.port))
            server, _ = await loop.sock_accept(listener)
            with server:
                server.setblocking(False)
                flood = asyncio.create_task(send(server, DATA))
                await digest(client, limit=1_000_000)
                service.process.signal(signal.SIGKILL)
                async with asyncio.timeout(NOTICED):
                    with pytest.raises(ConnectionResetError):
                        await digest(client)
                    with pytest.raises(ConnectionError):
                        await flood


def resets(outcome: BaseException) -> bool:
    """Whether the kernel said that the connection is broken, and nothing else went wrong."""
    if not isinstance(outcome, BaseExceptionGroup):
        return isinstance(outcome, OSError)
    return all(map(resets, outcome.exceptions))
