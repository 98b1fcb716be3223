"""What an end-to-end test starts: our registry, services and proxies, and real programs around."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from nacl.signing import SigningKey

from .peers import OurDHT, OurProxy, OurRegistry, OurService, Peer, ours, seed
from .process import Process, environment
from .waiting import until

P = TypeVar("P", bound=Peer)

#: Seconds until a peer that died without a word has been noticed: 13-18 (spec: registry 7.2), and
#: as much again on a busy machine.
NOTICED = 40.0

#: Seconds for descriptors to return to their baseline: the streams' ends are acknowledged, and
#: punch sockets answer for a while after their last stream.
SETTLED = 30.0


def public_key(seed: str) -> str:
    """The public key (64 hex digits) that belongs to a seed (64 hex digits)."""
    return SigningKey(bytes.fromhex(seed)).verify_key.encode().hex()


class Network:
    """Our DHT and our registry, for every test of a module."""

    def __init__(self, home: Path) -> None:
        self.dht = OurDHT(_folder(home, "dht"))
        self._home = home
        self._peers: list[Peer] = [self.dht]

    async def start(self) -> None:
        await self.dht.ready()
        home = _folder(self._home, "registry")
        self.registry = OurRegistry(home, self.dht.bootstrap, seed=seed("e2e"))
        self._peers.append(self.registry)
        await self.registry.ready()

    @property
    def peers(self) -> list[Peer]:
        return list(self._peers)

    def close(self) -> None:
        for peer in reversed(self._peers):
            peer.close()


class Stage:
    """Starts programs for one test, with homes of their own, and kills them all in `close`."""

    def __init__(self, network: Network, home: Path) -> None:
        self.network = network
        self.home = home
        self.bootstrap = network.dht.bootstrap
        self.key = network.registry.key
        self._processes: list[Process] = []

    @property
    def processes(self) -> list[Process]:
        """All that were started, the oldest first."""
        return list(self._processes)

    def registry(
        self, seed: str, *, home: Path | None = None, options: Sequence[str] = ()
    ) -> OurRegistry:
        """With a `home` that another one had, it finds what that one kept."""
        place = home or self._place("registry")
        return self._own(OurRegistry(place, self.bootstrap, seed=seed, options=options))

    def service(
        self, port: int, role: str, *, key: str | None = None, options: Sequence[str] = ()
    ) -> OurService:
        place = self._place("service"), self.bootstrap, key or self.key
        return self._own(OurService(*place, port=port, role=role, options=options))

    def proxy(
        self, role: str, *, port: int = 0, key: str | None = None, options: Sequence[str] = ()
    ) -> OurProxy:
        place = self._place("proxy"), self.bootstrap, key or self.key
        return self._own(OurProxy(*place, port=port, role=role, options=options))

    async def chain(self, port: int, name: str) -> tuple[OurService, OurProxy]:
        """A service named `name` in front of 127.0.0.1:`port` and a proxy that found it."""
        service = self.service(port, f"{name}@1.2.3")
        await service.ready()
        proxy = self.proxy(f"{name}@1.x")
        await proxy.ready()
        return service, proxy

    async def command(self, *words: str | Path, deadline: float = 30.0) -> str:
        """What a command of ours prints; it must exit with 0."""
        done = ours("our command", words, self.home, bootstrap=self.bootstrap)
        self._processes.append(done)
        assert await done.exit(deadline=deadline) == 0, done.transcript()
        return done.text("stdout")

    def run(
        self, name: str, command: Sequence[str | Path], *, env: Mapping[str, str] | None = None
    ) -> Process:
        """Any other program."""
        process = Process(name, command, cwd=self.home, env=env or environment(self.home))
        self._processes.append(process)
        return process

    async def web_server(self, *, port: int = 0, **files: bytes) -> int:
        """The port of a ``python -m http.server`` that has these files; `port` 0 is any."""
        folder = self._place("files")
        for name, content in files.items():
            (folder / name).write_bytes(content)
        options = ["--bind", "127.0.0.1", "--directory", str(folder), str(port)]
        server = self.run("web server", [sys.executable, "-u", "-m", "http.server", *options])
        return int((await server.line(r"Serving HTTP on 127\.0\.0\.1 port (\d+)"))[1])

    @contextlib.asynccontextmanager
    async def undisturbed(self, *peers: Peer) -> AsyncIterator[None]:
        """Around traffic: afterwards the peers and the network must be alive, the same processes
        as before, with no more descriptors than before.
        """
        watched = [*self.network.peers, *peers]
        before = {peer.process: peer.process.descriptors() for peer in watched}
        yield
        for process in before:
            assert process.returncode is None, f"{process.name} ended: {process.returncode}"

        async def at_baseline() -> bool:
            return all(process.descriptors() <= count for process, count in before.items())

        try:
            await until(at_baseline, "descriptors at their baseline", deadline=SETTLED, every=0.2)
        except AssertionError as error:
            counts = [
                f"{process.name}: {count} before, now {_open_files(process)}"
                for process, count in before.items()
                if process.descriptors() > count
            ]
            raise AssertionError(f"{error}; {'; '.join(counts)}") from None

    def close(self) -> None:
        for process in reversed(self._processes):
            process.close()

    def _own(self, peer: P) -> P:
        self._processes.append(peer.process)
        return peer

    def _place(self, name: str) -> Path:
        return _folder(self.home, f"{len(list(self.home.iterdir()))}-{name}")


def program(name: str, package: str) -> str:
    """The path of a program; AssertionError that names the system package when it is missing."""
    path = shutil.which(name)
    assert path is not None, f"{name} is missing: install the system package {package}"
    return path


async def output(command: Sequence[str], *, given: bytes = b"", deadline: float = 30.0) -> bytes:
    """What a command prints when it gets `given` on standard input; it must exit with 0."""

    def run() -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            command, input=given, capture_output=True, timeout=deadline, check=False
        )

    done = await asyncio.to_thread(run)
    assert done.returncode == 0, f"{command} exit code {done.returncode}: {done.stderr.decode()}"
    return done.stdout


async def http_get(port: int, path: str, *, deadline: float = 20.0) -> tuple[int, bytes]:
    """Status and body of ``GET http://127.0.0.1:PORT/PATH``."""

    def get() -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=deadline)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

    return await asyncio.to_thread(get)


async def http_answer(port: int, path: str, body: bytes, *, deadline: float = NOTICED) -> None:
    """Return once GET answers 200 with `body`; what fails meanwhile is tried again."""

    async def answered() -> bool:
        try:
            return await http_get(port, path, deadline=15) == (200, body)
        except (OSError, http.client.HTTPException):
            return False

    await until(answered, f"GET {path} on port {port} is {body!r}", deadline=deadline, every=0.2)


def _folder(home: Path, name: str) -> Path:
    folder = home / name
    folder.mkdir()
    return folder


def _open_files(process: Process) -> list[str]:
    folder = f"/proc/{process.pid}/fd"
    found = []
    for descriptor in sorted(os.listdir(folder), key=int):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"{folder}/{descriptor}"))
    return found
