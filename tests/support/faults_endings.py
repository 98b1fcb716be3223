"""Connections through a proxy that end in every way that there is, and what both ends see."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from .faults import Memory, Program, World, port_of
from .faults_transfers import Transfer
from .ports import free_port

#: Bytes that each end sends before the connection ends.
SOME = 2000
#: Connections at a time.
BATCH = 50
#: Seconds after which a client is told that nobody can be reached.
GIVES_UP = 0.3


class Endings:
    """A world with two more proxies: the service of one refuses, and that of the other is none."""

    def __init__(self) -> None:
        self.world = World()
        self._refusing: Program
        self._lonely: Program
        self.all: dict[str, Callable[[int], Awaitable[None]]] = {
            "the client ends first": self.client_ends_first,
            "the service ends first": self.service_ends_first,
            "the client resets": self.client_resets,
            "the service resets": self.service_resets,
            "the proxy's pipe is killed": self.proxy_pipe_is_killed,
            "the service's pipe is killed": self.service_pipe_is_killed,
            "the TCP service refuses": self.service_refuses,
            "the client leaves while connecting": self.client_leaves,
            "there is no instance": self.no_instance,
        }

    async def boot(self, stack: AsyncExitStack, home: Path, memory: Memory | None = None) -> None:
        world = self.world
        await world.boot(stack, home, memory)
        await world.run_service(stack, "refusing", "refusing@1.0.0", free_port())
        self._refusing = await world.run_proxy(
            stack, "to-refusing", "refusing@1.x", connect_timeout=GIVES_UP
        )
        self._lonely = await world.run_proxy(stack, "to-none", "none@1.x", connect_timeout=GIVES_UP)
        await world.healed()

    # Both ends have got and sent something

    async def client_ends_first(self, count: int) -> None:
        await self.world.open(count, SOME)
        await self.world.finish()

    async def service_ends_first(self, count: int) -> None:
        transfers = await self._begun(count)
        for each in transfers:
            each.server.end()
        await self._until(lambda: all(each.client.ended for each in transfers), "the ends")
        for each in transfers:
            each.client.end()
            each.client.transport.close()
        await self._until(lambda: all(each.server.ended for each in transfers), "the clients' ends")
        for each in transfers:
            each.server.transport.close()
        await self._over(transfers)
        for each in transfers:
            assert each.level
            assert (each.client.error, each.server.error) == (None, None)

    async def client_resets(self, count: int) -> None:
        transfers = await self._begun(count)
        for each in transfers:
            _reset(each.client.transport)
        await self._over(transfers)
        assert all(isinstance(each.server.error, ConnectionResetError) for each in transfers)

    async def service_resets(self, count: int) -> None:
        transfers = await self._begun(count)
        for each in transfers:
            _reset(each.server.transport)
        await self._over(transfers)
        assert all(isinstance(each.client.error, ConnectionResetError) for each in transfers)

    async def proxy_pipe_is_killed(self, count: int) -> None:
        await self._killed(self.world.proxy, count)

    async def service_pipe_is_killed(self, count: int) -> None:
        await self._killed(self.world.service, count)

    async def _killed(self, program: Program, count: int) -> None:
        transfers = await self._begun(count)
        pipes = [path for path in program.runtime.tree() if "/pipes/" in path]
        assert len(pipes) == count
        for path in pipes:
            program.runtime.kill(path)
        await self._over(transfers)
        for each in transfers:
            each.judge()
            assert each.client.error is not None
            assert each.server.error is not None

    # Nobody answers

    async def service_refuses(self, count: int) -> None:
        await self._fails(self._refusing, count)

    async def no_instance(self, count: int) -> None:
        await self._fails(self._lonely, count)

    async def _fails(self, proxy: Program, count: int) -> None:
        transfers = await self._connected(port_of(proxy), count)
        await self._over(transfers)
        for each in transfers:
            assert isinstance(each.client.error, ConnectionResetError)
            assert not each.servers

    async def client_leaves(self, count: int) -> None:
        transfers = await self._connected(self.world.port, count)
        # A service that is reached all the same sees its client's end, and ends too.
        self.world.transfers.patient = False
        for index, each in enumerate(transfers):
            if index % 2:
                _reset(each.client.transport)
            else:
                each.client.transport.close()
        await self.world.healed()
        await self._over(transfers)
        self.world.transfers.patient = True

    # Parts

    async def _connected(self, port: int, count: int) -> list[Transfer]:
        return [await self.world.transfers.connect(port) for _ in range(count)]

    async def _begun(self, count: int) -> list[Transfer]:
        await self.world.open(count, SOME)
        transfers = list(self.world.transfers.open)
        self.world.transfers.open.clear()
        return transfers

    async def _over(self, transfers: list[Transfer]) -> None:
        await self._until(lambda: all(each.dead for each in transfers), "both ends are closed")
        for each in transfers:
            self.world.transfers.forget(each)

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        await self.world.until(condition, what)


def _reset(transport: asyncio.Transport) -> None:
    found: socket.socket = transport.get_extra_info("socket")
    found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
