"""Cells of the NAT matrix: a service at one site, a proxy at another, and whether they meet.

All cells share one laboratory with public DHT nodes and a public registry. A service is started for
the first cell that needs it; each cell has a proxy of its own, so that it knows nothing at first.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from . import npm
from .blind_relays import OurRelay
from .laboratory import Host, Kind, Laboratory, Site
from .peers import (
    HEX,
    PROXIES,
    REGISTRIES,
    SERVICES,
    OurProxy,
    OurService,
    Peer,
    Proxy,
    Service,
    node,
    ours,
    seed,
)
from .peers import Kind as Program
from .ports import free_port
from .process import Process
from .servers import DIGEST, Backend
from .waiting import until

#: Public DHT nodes, beside the bootstrap node. Four tell a peer what its NAT does (spec:
#: hyperdht 7.1); one more, so that the one whose relaying is used need not be among them.
NODES = 5
DHT_PORT = 49737
#: Seconds for a program until it serves. One that cannot is not waited for longer.
START = 25.0
BLOCKED_START = 8.0
#: Seconds until the first byte: for one random NAT, as long as it is searched for (spec: hyperdht
#: 5.6, 5.7), else what punching between two others takes, and the passive wait.
RANDOM_LIMIT = 38.0
LIMIT = 12.0
#: Seconds that a Node proxy is given to find the service. One that has not yet closes a connection
#: and prints nothing; one that has failed to connect prints a line with this.
FINDING = 10.0
NODE_FAILED = "reported on"
#: Bytes that go through each connection and back, hashed.
PAYLOAD = 64 * 1024
#: Bytes of a frame where many follow each other.
FRAME = 16 * 1024
#: A request with an internal command and the number 1, up to its address (spec: hyperdht 2.3).
PING = bytes([0x03, 0x04, 1, 0])
#: Seconds after which the socket of the last connection has been let go of (spec: hyperdht 4.4), so
#: that the next one knows the relays and nothing else.
LET_GO = 4.0
#: The same after a search for a port: the next one within 20 s is refused (spec: hyperdht 5.5).
SEARCH_AGAIN = 22.0


class NotOpened(AssertionError):
    """The two cannot reach each other; the text says what was seen instead."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Where and whose the service and the proxy are. The same LAN is one site with two hosts."""

    service_site: Kind
    proxy_site: Kind
    service: Program = "ours"
    proxy: Program = "ours"
    #: The service, one of ours, names a blind relay of ours at a public address.
    relayed: bool = False

    @property
    def name(self) -> str:
        how = "-relayed" if self.relayed else ""
        return f"{self.service_site}-{self.service}-to-{self.proxy_site}-{self.proxy}{how}"

    @property
    def sites(self) -> set[Kind]:
        return {self.service_site, self.proxy_site}

    @property
    def limit(self) -> float:
        return RANDOM_LIMIT if "random" in self.sites else LIMIT

    @property
    def start(self) -> float:
        return BLOCKED_START if "udp-blocked" in self.sites else START

    @property
    def searched(self) -> bool:
        """Whether one side searches for the port of the other."""
        return "random" in self.sites and "open" not in self.sites and len(self.sites) == 2

    @property
    def alone(self) -> bool:
        """Whether no other cell can have the same service: a peer searches for the port of a
        random NAT once in 20 seconds (spec: hyperdht 5.5), and refuses others meanwhile."""
        return "random" in self.sites


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds from the client's connect to the first byte of the server's answer: for the
    first connection of a proxy, for the next one at once, and for one that finds the relays
    remembered but no socket (None if it was not asked for)."""

    first: float
    next: float
    remembered: float | None = None


class World:
    """A laboratory with a DHT and a registry, all of one kind, and what its cells have started."""

    def __init__(self, home: Path, *, programs: Program = "ours", nodes: int = NODES) -> None:
        self.laboratory = Laboratory()
        self._nodes = nodes
        self.bootstrap = ""
        self._programs = programs
        self._home = home
        self._folders = itertools.count()
        self._peers: list[Peer | Process] = []
        self._backends: list[Backend] = []
        self._sites: dict[tuple[Kind, bool], Site] = {}
        self._services: dict[str, asyncio.Task[None]] = {}
        self._relay: asyncio.Task[str] | None = None
        self._serving = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Return once the DHT and the registry serve."""
        try:
            # Were it as far as the rest, a Node program that is open would find that out in half of
            # its starts: the test of its port ends together with the bootstrap (spec: hyperdht
            # 2.13). It has no identity, so that no connection comes by the shortcut.
            first = self.laboratory.host(near=True)
            self.bootstrap = await self._dht_node(first, "node", bootstrap=None)
            hosts = [self.laboratory.host() for _ in range(self._nodes)]
            starting = (self._dht_node(each, self._programs, self.bootstrap) for each in hosts)
            await asyncio.gather(*starting)
            for host in hosts:
                await until(
                    partial(_answers, host), "a DHT node answers", deadline=START, every=0.2
                )
            place = self.folder("registry")
            with self.laboratory.host().entered():
                registry = REGISTRIES[self._programs](place, self.bootstrap, seed=seed("nat"))
            self._peers.append(registry)
            await registry.ready()
            self.key = registry.key
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """End every program, and with them the connections of the backends."""
        for task in self._services.values():
            task.cancel()
        if self._relay is not None:
            self._relay.cancel()
        for peer in reversed(self._peers):
            peer.close()
        self.laboratory.close()

        async def served() -> bool:
            return not any(backend.open for backend in self._backends)

        await until(served, "the backends have lost their clients", deadline=LIMIT)
        await self._serving.aclose()
        for backend in self._backends:
            backend.close()

    async def measure_relayed(self, cell: Cell) -> Times:
        """As `measure`, for a pair of Node scripts that name a blind relay at a public address.
        Neither of the two command lines can."""
        relay = self._script(self.laboratory.host(), "relay")
        with relay:
            key = (await relay.line(f"^relay ({HEX})$", deadline=START))[1]
            home = self.site(cell.service_site, of_service=True).hosts[0]
            with home.entered():
                backend = Backend()
            self._backends.append(backend)
            await self._serving.enter_async_context(backend.serving())
            service = self._script(home, "service", str(backend.port))
            with service:
                started = await service.line(f"^started p2p service on ({HEX})$", deadline=START)
                host = self.site(cell.proxy_site, of_service=False).hosts[-1]
                with host.entered():
                    port = free_port()
                proxy = self._script(host, "proxy", str(port), started[1], key)
                with proxy:
                    await proxy.line("^ready$", deadline=START)
                    first = await exchange(host, port, cell.limit)
                    following = await exchange(host, port, cell.limit)
                    await asyncio.sleep(LET_GO)
                    remembered = await exchange(host, port, cell.limit)
                    return Times(first, following, remembered)

    def _script(self, host: Host, role: str, *arguments: str) -> Process:
        words: list[str | Path] = [npm.PEERS / "blind_relay.js", role, *arguments]
        with host.entered():
            return node(f"node {role}", words, self.folder(role), bootstrap=self.bootstrap)

    def site(self, kind: Kind, *, of_service: bool) -> Site:
        """The one site of that kind for services, or for proxies; a LAN has both."""
        which = (kind, of_service or kind.startswith("lan"))
        if which not in self._sites:
            self._sites[which] = self.laboratory.site(kind)
        return self._sites[which]

    async def measure(self, cell: Cell, *, remembered: bool = False) -> Times:
        """Open connections and send bytes both ways. NotOpened when that fails."""
        role = await self.service(cell)
        async with self.proxy(cell, role) as (host, proxy), _explained(proxy):
            first = await first_exchange(host, proxy, cell.limit)
            following = await exchange(host, proxy.port, cell.limit)
            if not remembered:
                return Times(first, following)
            await asyncio.sleep(SEARCH_AGAIN if cell.searched else LET_GO)
            return Times(first, following, await exchange(host, proxy.port, cell.limit))

    async def service(self, cell: Cell, *, site: Site | None = None) -> str:
        """The role of a service that serves: one for all cells with the same one, or one of its
        own for a cell that is alone and for a `site` of its own."""
        role = f"{cell.service_site}-{cell.service}"
        if site or cell.alone or cell.relayed:
            role = f"{cell.name}-{next(self._folders)}"
        if role not in self._services:
            host = (site or self.site(cell.service_site, of_service=True)).hosts[0]
            self._services[role] = asyncio.create_task(self._start_service(cell, host, role))
        await asyncio.shield(self._services[role])
        return role

    async def _start_service(self, cell: Cell, host: Host, role: str) -> None:
        place = self.folder(f"service-{cell.service}"), self.bootstrap, self.key
        options = ["--relay-through", await self.relay()] if cell.relayed else []
        with host.entered():
            backend = Backend()
            self._backends.append(backend)
            service: Service
            if cell.service == "ours":
                service = OurService(
                    *place, port=backend.port, role=f"{role}@1.2.3", options=options
                )
            else:
                service = SERVICES[cell.service](*place, port=backend.port, role=f"{role}@1.2.3")
        self._peers.append(service)
        await self._serving.enter_async_context(backend.serving())
        await _ready(service, f"the {cell.service} service", cell.start)

    async def relay(self) -> str:
        """The key of a blind relay of ours, one for all."""
        if self._relay is None:
            self._relay = asyncio.create_task(self._start_relay())
        return await asyncio.shield(self._relay)

    async def _start_relay(self) -> str:
        with self.laboratory.host().entered():
            relay = OurRelay(self.folder("relay"), self.bootstrap)
        self._peers.append(relay)
        await relay.ready()
        return relay.key

    @contextlib.asynccontextmanager
    async def proxy(
        self, cell: Cell, role: str, *, site: Site | None = None, patience: float | None = None
    ) -> AsyncIterator[tuple[Host, Proxy]]:
        """A new proxy for a role, which has not connected to its service yet, and its host. Ours
        tries for `patience` seconds, by default as long as the cell's clients wait."""
        host = (site or self.site(cell.proxy_site, of_service=False)).hosts[-1]
        place = self.folder(f"proxy-{cell.proxy}"), self.bootstrap, self.key
        wanted = f"{role}@1.x"
        with host.entered():
            proxy: Proxy
            if cell.proxy == "ours":
                options = ["--connect-timeout", f"{patience or cell.limit:g}"]
                proxy = OurProxy(*place, role=wanted, options=options)
            else:
                proxy = PROXIES[cell.proxy](*place, role=wanted)
        with proxy.process:
            await _ready(proxy, f"the {cell.proxy} proxy", cell.start)
            yield host, proxy

    async def _dht_node(self, host: Host, kind: Program, bootstrap: str | None) -> str:
        place, port = self.folder("dht"), str(DHT_PORT)
        with host.entered():
            if kind == "node":
                words: list[str | Path] = [npm.PEERS / "public_node.js", host.address, port]
                process = node("node dht", words, place, bootstrap=bootstrap or "none")
            else:
                options = ["--host", host.address, "--port", port, "--nodes", "1"]
                process = ours("our dht", ["dht", *options], place, bootstrap=bootstrap)
        self._peers.append(process)
        await process.line(r"^dht node listening on ", deadline=START)
        return f"{host.address}:{port}"

    def folder(self, name: str) -> Path:
        folder = self._home / f"{next(self._folders)}-{name}"
        folder.mkdir(parents=True)
        return folder


class Connection:
    """One through a proxy to the backend. Made by `connected`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, payload: bytes) -> None:
        """One frame there and back (see `servers`)."""
        self._writer.write(len(payload).to_bytes(8, "big") + payload)
        try:
            answer = await self._reader.readexactly(DIGEST + 8 + len(payload))
        except asyncio.IncompleteReadError as error:
            raise ConnectionError(f"closed, {len(error.partial)} bytes came") from None
        assert answer[:DIGEST] == hashlib.sha256(payload).digest(), "the server got other bytes"
        assert answer[DIGEST + 8 :] == payload, "other bytes came back"

    async def pour(self, size: int, arrived: Callable[[int], None]) -> None:
        """So many bytes there and back, both ways at once. ``arrived`` is told how many have come
        back, whenever there are more."""
        payload = random.Random(size).randbytes(FRAME)
        frame = FRAME.to_bytes(8, "big") + payload
        answer = hashlib.sha256(payload).digest() + frame
        count = size // FRAME
        sending = asyncio.create_task(self._send_all([frame] * count))
        try:
            for index in range(count):
                try:
                    came = await self._reader.readexactly(len(answer))
                except asyncio.IncompleteReadError as error:
                    raise ConnectionError(f"closed, {len(error.partial)} bytes came") from None
                assert came == answer, "other bytes came back, or the server got others"
                arrived((index + 1) * FRAME)
        finally:
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await sending

    async def _send_all(self, frames: Iterable[bytes]) -> None:
        for frame in frames:
            self._writer.write(frame)
            await self._writer.drain()


@contextlib.asynccontextmanager
async def connected(host: Host, port: int, limit: float) -> AsyncIterator[tuple[Connection, float]]:
    """A connection to a port of the host that has proven itself, and the milliseconds from the
    connect to the first byte of the answer. NotOpened when none came in `limit` seconds."""
    with host.entered():
        client = socket.socket()
    client.setblocking(False)
    begin = time.perf_counter()
    try:
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=client)
    except OSError as error:  # it does not listen
        client.close()
        raise NotOpened(str(error)) from None
    connection = Connection(reader, writer)
    try:
        try:
            async with asyncio.timeout(limit):
                writer.write(b"F")
                await connection.send(b"first byte")
                milliseconds = (time.perf_counter() - begin) * 1000
        except TimeoutError:
            raise NotOpened(f"nothing came for {limit:g} s") from None
        except ConnectionError as error:
            seconds = time.perf_counter() - begin
            raise NotOpened(f"{error} after {seconds:.2f} s") from None
        yield connection, milliseconds
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def exchange(host: Host, port: int, limit: float) -> float:
    """Connect, send PAYLOAD bytes there and back, close. Returns and raises as `connected`."""
    async with connected(host, port, limit) as (connection, milliseconds):
        async with asyncio.timeout(LIMIT):
            await connection.send(random.Random(1).randbytes(PAYLOAD))
    return milliseconds


async def _answers(host: Host) -> bool:
    """Whether a DHT node answers a PING. One of ours does not for 9 seconds after its start, so
    that servers announce anew, and without such answers nobody learns what its NAT does."""
    with host.entered():
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with contextlib.closing(client):
        client.setblocking(False)
        address = socket.inet_aton(host.address) + DHT_PORT.to_bytes(2, "little")
        client.sendto(PING + address + b"\0", (host.address, DHT_PORT))
        try:
            async with asyncio.timeout(0.3):
                return bool(await asyncio.get_running_loop().sock_recv(client, 100))
        except TimeoutError:
            return False


@contextlib.asynccontextmanager
async def _explained(proxy: Proxy) -> AsyncIterator[None]:
    try:
        yield
    except NotOpened as error:
        error.add_note(proxy.process.transcript())
        raise


async def first_exchange(host: Host, proxy: Proxy, limit: float) -> float:
    """As `exchange`, for a proxy that may not have found the service yet."""
    end = time.monotonic() + FINDING
    while True:
        try:
            return await exchange(host, proxy.port, limit)
        except NotOpened:
            await asyncio.sleep(0.1)
            if proxy.kind == "ours" or NODE_FAILED in proxy.process.text():
                raise
            if time.monotonic() > end:
                raise NotOpened("the proxy never found the service") from None


async def _ready(peer: Peer, name: str, limit: float) -> None:
    try:
        async with asyncio.timeout(limit):
            await peer.ready()
    except (TimeoutError, AssertionError):
        said = (peer.process.text().strip() or "nothing").rpartition("\n")[2]
        raise NotOpened(f"{name} is not ready after {limit:g} s; it says: {said}") from None
