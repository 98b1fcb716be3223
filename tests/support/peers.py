"""The programs under test, Node's and ours, behind one interface for each of the four roles.

All run on a private DHT of 127.0.0.1. No Node program can reach a public bootstrap node
(``tests/peers/preload.js``), and ours are always told theirs.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from . import npm
from .ports import free_port
from .process import Process, environment

Kind = Literal["node", "ours"]
KINDS: tuple[Kind, ...] = ("node", "ours")

HEX = "[0-9a-f]{64}"

#: Seconds a program may take to start and to reach its first peer, on a busy machine.
START = 30.0


def seed(label: str) -> str:
    """A seed (64 hex digits) that is always the same for one label."""
    return hashlib.sha256(label.encode()).hexdigest()


def ours(
    name: str, arguments: Sequence[str | Path], home: Path, *, bootstrap: str | None
) -> Process:
    """Our command line with `arguments`; `bootstrap` (HOST:PORT) goes into its environment."""
    extra = {} if bootstrap is None else {"HYPERSEAPORT_BOOTSTRAP": bootstrap}
    command = [sys.executable, "-m", "hyperseaport.cli", *arguments]
    return Process(name, command, cwd=home, env=environment(home, **extra))


def node(name: str, arguments: Sequence[str | Path], home: Path, *, bootstrap: str) -> Process:
    """A Node program with `arguments` (the first is its script), kept on this machine."""
    env = environment(
        home, NODE_PATH=str(npm.node_modules()), HYPERSEAPORT_TEST_BOOTSTRAP=bootstrap
    )
    command = [npm.node(), "-r", npm.PEERS / "preload.js", *arguments]
    return Process(name, command, cwd=home, env=env)


def _node_cli(name: str, arguments: Sequence[str], home: Path, *, bootstrap: str) -> Process:
    script = npm.node_modules() / "hyperseaport" / "cli.js"
    return node(name, [script, *arguments], home, bootstrap=bootstrap)


class Peer:
    """A program in one role. `ready` returns once it serves; `close` kills it."""

    kind: Kind
    process: Process

    async def ready(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.process.close()


class DHT(Peer):
    """A private DHT; `bootstrap` (HOST:PORT) is known once it is ready."""

    bootstrap: str

    async def ready(self) -> None:
        match = await self.process.line(
            r"^dht node listening on (127\.0\.0\.1:\d+)$", deadline=START
        )
        self.bootstrap = match[1]


class NodeDHT(DHT):
    kind = "node"

    def __init__(self, home: Path) -> None:
        self.process = node("node dht", [npm.PEERS / "dht.js"], home, bootstrap="none")


class OurDHT(DHT):
    kind = "ours"

    def __init__(self, home: Path, *, port: int = 0) -> None:
        options = ["--host", "127.0.0.1", "--port", str(port), "--nodes", "4"]
        self.process = ours("our dht", ["dht", *options], home, bootstrap=None)


class Registry(Peer):
    """A registry; `key` (64 hex digits) is known once it is ready."""

    key: str


class NodeRegistry(Registry):
    kind = "node"

    def __init__(self, home: Path, bootstrap: str, *, seed: str) -> None:
        options = ["--registrySeed", seed, "--registryDir", str(home / "registry")]
        self.process = _node_cli("node registry", ["registry", *options], home, bootstrap=bootstrap)

    async def ready(self) -> None:
        self.key = (await self.process.line(f"^registryPublicKey=({HEX})$", deadline=START))[1]


class OurRegistry(Registry):
    kind = "ours"

    def __init__(
        self, home: Path, bootstrap: str, *, seed: str, options: Sequence[str] = ()
    ) -> None:
        arguments = ["registry", "--seed", seed, "--bootstrap", bootstrap, *options]
        self.process = ours("our registry", arguments, home, bootstrap=bootstrap)

    async def ready(self) -> None:
        pattern = f"^Registry listening. Connect with pubkey  ({HEX})$"
        self.key = (await self.process.line(pattern, deadline=START))[1]


class Service(Peer):
    """A service in front of a TCP port; `key` (64 hex digits) is known once it is ready."""

    key: str

    async def ready(self) -> None:
        pattern = f"^started p2p service on ({HEX})$"
        self.key = (await self.process.line(pattern, deadline=START))[1]


class NodeService(Service):
    """Ready means started: 3.2.0 prints nothing more that could be relied on."""

    kind = "node"

    def __init__(self, home: Path, bootstrap: str, registry: str, *, port: int, role: str) -> None:
        options = ["--registryPublicKey", registry, "--port", str(port), "--role", role]
        self.process = _node_cli("node service", ["service", *options], home, bootstrap=bootstrap)


class OurService(Service):
    kind = "ours"

    def __init__(
        self,
        home: Path,
        bootstrap: str,
        registry: str,
        *,
        port: int,
        role: str,
        options: Sequence[str] = (),
    ) -> None:
        arguments = ["service", registry, "-p", str(port), "-r", role, "--bootstrap", bootstrap]
        self.process = ours("our service", [*arguments, *options], home, bootstrap=bootstrap)

    async def ready(self) -> None:
        await super().ready()
        await self.process.line(r"^registered service \{", deadline=START)


class Proxy(Peer):
    """A proxy; `port` of 127.0.0.1 is known once it is ready."""

    port: int


class NodeProxy(Proxy):
    """Ready means connected to the registry. It asks for services by polling, twice a second here
    instead of every 5 s; until it has found one it closes each connection at once.
    """

    kind = "node"

    def __init__(
        self, home: Path, bootstrap: str, registry: str, *, role: str, reader_registry: bool = False
    ) -> None:
        self.port = free_port()
        options = ["--registryPublicKey", registry, "--port", str(self.port), "--role", role]
        options += ["--loadBalanceOptions.updateIntervalMS", "500"]
        if not reader_registry:
            options.append("--skipReaderRegistry")
        self.process = _node_cli("node proxy", ["proxy", *options], home, bootstrap=bootstrap)

    async def ready(self) -> None:
        await self.process.line(r"^connected to registry$", deadline=START)


class OurProxy(Proxy):
    """Ready means that it found a service."""

    kind = "ours"

    def __init__(
        self,
        home: Path,
        bootstrap: str,
        registry: str,
        *,
        role: str,
        port: int = 0,
        options: Sequence[str] = (),
    ) -> None:
        arguments = ["proxy", registry, "-p", str(port), "-r", role, "--bootstrap", bootstrap]
        self.process = ours("our proxy", [*arguments, *options], home, bootstrap=bootstrap)

    async def ready(self) -> None:
        pattern = rf"^proxy from  (\d+) to p2p service ({HEX})$"
        self.port = int((await self.process.line(pattern, deadline=START))[1])


DHTS: dict[Kind, type[NodeDHT | OurDHT]] = {"node": NodeDHT, "ours": OurDHT}
REGISTRIES: dict[Kind, type[NodeRegistry | OurRegistry]] = {
    "node": NodeRegistry,
    "ours": OurRegistry,
}
SERVICES: dict[Kind, type[NodeService | OurService]] = {"node": NodeService, "ours": OurService}
PROXIES: dict[Kind, type[NodeProxy | OurProxy]] = {"node": NodeProxy, "ours": OurProxy}
