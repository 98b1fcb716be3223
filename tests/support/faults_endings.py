"""Connections through a proxy that end in every way that there is, and what both ends see."""

from __future__ import annotations

import asyncio
import gc
import random
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from hyperseaport.actors.messages import Measure

from .faults import HEALED, Counts, Program, World, ours, port_of, resident
from .faults_transfers import End, Transfer
from .ports import refusing_port

#: Bytes that each end sends before the connection ends.
SOME = 2000
#: Connections at a time, each of which ends in another way than the one before it.
AT_ONCE = 64
#: Seconds after which a client is told that nobody can be reached.
GIVES_UP = 0.3
#: Seconds within which a client that leaves while connecting leaves: some find no pipe yet, some
#: one that seeks, and some one that is joined.
LEAVES = 0.05
#: What an endpoint holds for connections, as its metrics say.
HELD = ("channels", "udx.streams", "punch.sockets", "punch.under_way")

Ending = Callable[[], Awaitable[None]]


class Left(NamedTuple):
    """What is there, exactly as long as somebody needs it."""

    counts: Counts
    #: By program, as `HELD`.
    held: dict[str, tuple[int, ...]]


class Footprint(NamedTuple):
    """What memory is used for."""

    #: Objects of this program's classes.
    objects: int
    #: Blocks of Python's allocator: all objects of at most 512 bytes, and parts of larger ones.
    blocks: int
    #: Bytes of the process, with what allocators keep.
    resident: int

    def since(self, before: Footprint) -> Footprint:
        return Footprint(*(now - then for now, then in zip(self, before, strict=True)))


class Endings:
    """A world with two more proxies: the service of one refuses, and that of the other is none."""

    def __init__(self) -> None:
        self.world = World()
        self._random = random.Random(10_000)
        self._refusing: Program
        self._lonely: Program
        self.all: dict[str, Ending] = {
            "the client ends first": self.client_ends_first,
            "the service ends first": self.service_ends_first,
            "the client resets": self.client_resets,
            "the service resets": self.service_resets,
            "the client ends and the service resets": self.service_resets_after_end,
            "the service ends and the client resets": self.client_resets_after_end,
            "the proxy's pipe is killed": self.proxy_pipe_is_killed,
            "the service's pipe is killed": self.service_pipe_is_killed,
            "the TCP service refuses": self.service_refuses,
            "the client leaves while connecting": self.client_leaves,
            "there is no instance": self.no_instance,
        }

    async def boot(self, stack: AsyncExitStack, home: Path) -> None:
        world = self.world
        await world.boot(stack, home)
        port = stack.enter_context(refusing_port())
        await world.run_service(stack, "refusing", "refusing@1.0.0", port)
        self._refusing = await world.run_proxy(
            stack, "to-refusing", "refusing@1.x", connect_timeout=GIVES_UP
        )
        self._lonely = await world.run_proxy(stack, "to-none", "none@1.x", connect_timeout=GIVES_UP)
        await world.healed()

    async def run(self, count: int) -> None:
        """So many connections, `AT_ONCE` at a time, that end in each way in turn."""
        endings = islice(cycle(self.all.items()), count)
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(_each(endings))
        await self.world.healed()
        # Only of interest to other tests.
        for program in self.world.programs:
            program.runtime.journal.clear()
            program.news.clear()

    async def left(self) -> Left:
        measured = [
            await program.runtime.call(
                program.runtime.cell("/root/node/endpoint").address, Measure(), HEALED
            )
            for program in self.world.programs
        ]
        held = {
            program.name: tuple(each.values[name] for name in HELD)
            for program, each in zip(self.world.programs, measured, strict=True)
        }
        return Left(self.world.counts(), held)

    def footprint(self) -> Footprint:
        gc.collect()
        return Footprint(ours().total(), sys.getallocatedblocks(), resident())

    # Both ends have got and sent something

    async def client_ends_first(self) -> None:
        transfer, server = await self._begun()
        await self._in_order(transfer, transfer.client, server)

    async def service_ends_first(self) -> None:
        transfer, server = await self._begun()
        await self._in_order(transfer, server, transfer.client)

    async def _in_order(self, transfer: Transfer, first: End, second: End) -> None:
        first.end()
        await self._until(transfer, lambda: second.ended, "the first end")
        second.end()
        await self._until(transfer, lambda: first.ended, "the second end")
        first.transport.close()
        second.transport.close()
        await self._over(transfer)
        assert transfer.level
        assert (first.error, second.error) == (None, None)

    async def client_resets(self) -> None:
        transfer, server = await self._begun()
        await self._reset_is_seen(transfer, transfer.client, server)

    async def service_resets(self) -> None:
        transfer, server = await self._begun()
        await self._reset_is_seen(transfer, server, transfer.client)

    async def service_resets_after_end(self) -> None:
        transfer, server = await self._begun()
        transfer.client.end()
        await self._until(transfer, lambda: server.ended, "the client's end")
        await self._reset_is_seen(transfer, server, transfer.client)

    async def client_resets_after_end(self) -> None:
        transfer, server = await self._begun()
        server.end()
        await self._until(transfer, lambda: transfer.client.ended, "the service's end")
        await self._reset_is_seen(transfer, transfer.client, server)

    async def _reset_is_seen(self, transfer: Transfer, by: End, other: End) -> None:
        _reset(by.transport)
        await self._over(transfer)
        assert isinstance(other.error, ConnectionResetError), repr(other.error)

    async def proxy_pipe_is_killed(self) -> None:
        transfer, _ = await self._begun()
        await self._killed(self.world.proxy, transfer, transfer.client)

    async def service_pipe_is_killed(self) -> None:
        transfer, server = await self._begun()
        await self._killed(self.world.service, transfer, server)

    async def _killed(self, program: Program, transfer: Transfer, end: End) -> None:
        program.runtime.kill(_pipe_of(program, end))
        await self._over(transfer)
        transfer.judge()
        assert transfer.client.error is not None
        assert transfer.servers[-1].error is not None

    # Nobody answers

    async def service_refuses(self) -> None:
        await self._fails(self._refusing)

    async def no_instance(self) -> None:
        await self._fails(self._lonely)

    async def _fails(self, proxy: Program) -> None:
        transfer = await self.world.transfers.connect(port_of(proxy))
        await self._over(transfer)
        assert isinstance(transfer.client.error, ConnectionResetError)
        assert not transfer.servers

    async def client_leaves(self) -> None:
        transfer = await self.world.transfers.connect(self.world.port)
        # A service that is reached all the same sees its client's end, and ends too.
        transfer.patient = False
        await asyncio.sleep(self._random.uniform(0, LEAVES))
        if self._random.getrandbits(1):
            _reset(transfer.client.transport)
        else:
            transfer.client.transport.close()
        await self._over(transfer)

    # Parts

    async def _begun(self) -> tuple[Transfer, End]:
        transfer = await self.world.transfers.connect(self.world.port)
        transfer.client.push(SOME)
        await self._until(transfer, lambda: transfer.server is not None, "the service was reached")
        server = transfer.servers[-1]
        server.push(SOME)
        await self._until(transfer, lambda: transfer.level, "the first bytes")
        return transfer, server

    async def _over(self, transfer: Transfer) -> None:
        await self._until(transfer, lambda: transfer.dead, "both ends are closed")
        self.world.transfers.forget(transfer)

    async def _until(self, transfer: Transfer, condition: Callable[[], bool], what: str) -> None:
        await transfer.until(condition, what, HEALED)


async def _each(endings: Iterator[tuple[str, Ending]]) -> None:
    for name, end in endings:
        try:
            await end()
        except Exception as error:
            error.add_note(f"when {name}")
            raise


def _pipe_of(program: Program, end: End) -> str:
    """The path of the pipe whose TCP connection has this other end."""
    wanted = _names(end.transport)[::-1]
    for cell in (program.runtime.cell("/root/node/pipes").children or {}).values():
        pipe: Any = cell.actor
        early = None if pipe is None else pipe._early
        tcp = early.transport if early is not None else pipe and pipe._tcp
        if tcp is not None and _names(tcp) == wanted:
            return cell.address.path
    raise AssertionError(f"no pipe of the {program.name} leads to {wanted[1]}")


def _names(tcp: asyncio.BaseTransport) -> tuple[object, object]:
    """Of our end and of the other."""
    return tcp.get_extra_info("sockname"), tcp.get_extra_info("peername")


def _reset(transport: asyncio.Transport) -> None:
    found: socket.socket = transport.get_extra_info("socket")
    found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
