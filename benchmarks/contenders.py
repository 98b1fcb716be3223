"""The programs that are compared, started on private networks of this machine.

A chain is proxy -> service -> backend. Contenders differ in whose the service and the proxy are;
the last is plain TCP through two socat processes: what two hops cost without any protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import traffic  # noqa: E402
from lossy import LEASH, NEAR, LossyLink  # noqa: E402
from support import npm  # noqa: E402
from support.peers import seed  # noqa: E402
from support.ports import free_port  # noqa: E402
from support.process import Process, environment  # noqa: E402

Kind = Literal["ours", "node", "socat"]
TRAFFIC = [sys.executable, traffic.__file__]
PEERS = Path(__file__).parent / "peers"

#: Seconds a program may take until it serves.
START = 45.0
#: The backend keeps to the first core, the client to the last: what moves between them is free.
BACKEND_CPU = 0
CLIENT_CPU = (os.cpu_count() or 1) - 1


class Failure(Exception):
    """A contender could not be measured. The text stands in the table."""


@dataclass(frozen=True, slots=True)
class Contender:
    """Whose the service and the proxy are."""

    service: Kind
    proxy: Kind

    @property
    def name(self) -> str:
        if self.service == "socat":
            return "socat, two hops"
        names = {"ours": "ours", "node": "Node"}
        return f"{names[self.service]} → {names[self.proxy]}"

    @property
    def network(self) -> Kind:
        """Whose the DHT and the registry are."""
        return "node" if self.service == self.proxy == "node" else "ours"


OURS = Contender("ours", "ours")
OURS_NODE = Contender("ours", "node")
NODE_OURS = Contender("node", "ours")
NODE = Contender("node", "node")
SOCAT = Contender("socat", "socat")
PEER_TO_PEER = (OURS, OURS_NODE, NODE_OURS, NODE)
ALL = (*PEER_TO_PEER, SOCAT)


@dataclass(slots=True)
class Chain:
    """`port` of the proxy; process ids of both programs; the backend's port and process."""

    contender: Contender
    port: int
    service: int
    proxy: int
    backend_port: int
    backend: Process
    prefix: list[str]
    processes: list[Process]

    def client(self, mode: str, *arguments: object, limit: float = 120.0) -> dict[str, Any]:
        """Run a client of `traffic.py` at the proxy; Failure when it fails or takes too long."""
        command = [*LEASH, *self.prefix, *TRAFFIC, "--cpu", str(CLIENT_CPU), mode, str(self.port)]
        try:
            done = subprocess.run(
                [*command, *map(str, arguments)],
                capture_output=True,
                text=True,
                timeout=limit,
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Failure(f"no end after {limit:.0f} s") from None
        if done.returncode:
            raise Failure(last_line(done.stderr) or f"exit code {done.returncode}")
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def close(self) -> None:
        for process in reversed(self.processes):
            process.close()


@dataclass(slots=True)
class Network:
    """A DHT (HOST:PORT) and a registry's key."""

    bootstrap: str
    key: str


@dataclass(slots=True)
class Lab:
    """Starts networks and chains, and kills all of them in `close`."""

    home: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="benchmark-")))
    _processes: list[Process] = field(default_factory=list)
    _networks: dict[tuple[Kind, bool], Network | Failure] = field(default_factory=dict)
    _chains: dict[Contender, Chain] = field(default_factory=dict)
    _count: Iterator[int] = field(default_factory=itertools.count)
    _link: LossyLink | None = None

    def __post_init__(self) -> None:
        # A copy, so that a run measures one state of the work tree from its beginning to its end.
        package = self.source / "hyperseaport"
        left_out = shutil.ignore_patterns(".*", "tests", "benchmarks", "build", "__pycache__")
        shutil.copytree(ROOT, package, ignore=left_out)

    @property
    def source(self) -> Path:
        """The folder that our programs are imported from."""
        return self.home / "source"

    # Chains

    def shared(self, contender: Contender) -> Chain:
        """The chain that cases share; made anew after `drop`."""
        if contender not in self._chains:
            self._chains[contender] = self._chain(contender, lossy=False)
        return self._chains[contender]

    def drop(self, contender: Contender) -> None:
        """Its chain may have suffered."""
        chain = self._chains.pop(contender, None)
        if chain is not None:
            chain.close()

    @contextlib.contextmanager
    def fresh(self, contender: Contender, *, lossy: bool = False) -> Iterator[Chain]:
        """A chain of its own; `lossy` puts it across the link."""
        chain = self._chain(contender, lossy=lossy)
        try:
            yield chain
        finally:
            chain.close()

    @property
    def link(self) -> LossyLink:
        """The link between the two namespaces. `lossy.NotPermitted` where there can be none."""
        if self._link is None:
            self._link = LossyLink(seed=3)
        return self._link

    def close(self) -> None:
        for chain in self._chains.values():
            chain.close()
        for process in reversed(self._processes):
            process.close()
        if self._link is not None:
            self._link.close()
        shutil.rmtree(self.home, ignore_errors=True)

    def _chain(self, contender: Contender, *, lossy: bool) -> Chain:
        near = self.link.near if lossy else []
        far = self.link.far if lossy else []
        started: list[Process] = []
        try:
            backend_port = free_port()
            command = ["--cpu", str(BACKEND_CPU), "backend", "127.0.0.1", str(backend_port)]
            backend = self.run("backend", [*near, *TRAFFIC, *command], into=started)
            line(backend, r"^listening (\d+)$")
            port = free_port()
            if contender.service == "socat":
                middle = free_port()
                host = NEAR if lossy else "127.0.0.1"
                service = self._socat(near, host, middle, "127.0.0.1", backend_port, started)
                proxy = self._socat(far, "127.0.0.1", port, host, middle, started)
            else:
                network = self._network(contender.network, lossy)
                role = f"files{next(self._count)}"
                service = self.service(
                    contender.service, network, port=backend_port, role=f"{role}@1.2.3",
                    into=started, prefix=near,
                )  # fmt: skip
                line(service, r"^started p2p service on [0-9a-f]{64}$")
                proxy = self.proxy(
                    contender.proxy, network, port=port, role=f"{role}@1.x",
                    into=started, prefix=far,
                )  # fmt: skip
                line(proxy, r"^connected to registry$")
            chain = Chain(
                contender, port, service.pid, proxy.pid, backend_port, backend, far, started
            )
            until_served(chain)
        except BaseException:
            for process in reversed(started):
                process.close()
            raise
        return chain

    def _socat(
        self, prefix: list[str], host: str, port: int, to: str, to_port: int, into: list[Process]
    ) -> Process:
        listen = f"TCP-LISTEN:{port},bind={host},fork,reuseaddr,nodelay,backlog=1024"
        command = ["socat", "-b", "65536", listen, f"TCP:{to}:{to_port},nodelay"]
        return self.run("socat", [*prefix, *command], into=into)

    # Programs

    def _network(self, kind: Kind, lossy: bool) -> Network:
        if (kind, lossy) not in self._networks:
            prefix = self.link.near if lossy else []
            host = NEAR if lossy else "127.0.0.1"
            try:
                dht = self.dht(kind, into=self._processes, prefix=prefix, host=host)
                bootstrap = line(dht, r"^dht node listening on (\S+)$")
                network = Network(bootstrap, "")
                registry = self.registry(kind, network, into=self._processes, prefix=prefix)
                network.key = line(registry, REGISTRY_LINE[kind])
                self._networks[kind, lossy] = network
            except Failure as failure:
                self._networks[kind, lossy] = failure
        network_or_failure = self._networks[kind, lossy]
        if isinstance(network_or_failure, Failure):
            raise network_or_failure
        return network_or_failure

    def seed(self, kind: Kind, *, into: list[Process]) -> None:
        """Run the command that makes a seed, to its end."""
        if kind == "ours":
            process = self._ours("seed", [], None, into, [])
        else:
            process = self._node("seed", [CLI(), "seed"], "none", into, [])
        if asyncio.run(process.exit()) != 0:
            raise Failure(last_line(process.text()))

    def dht(
        self, kind: Kind, *, into: list[Process], prefix: Sequence[str] = (), host: str
    ) -> Process:
        if kind == "ours":
            return self._ours("dht", ["--host", host, "--port", "0"], None, into, prefix)
        return self._node("dht", [PEERS / "dht.js", host], "none", into, prefix)

    def registry(
        self, kind: Kind, network: Network, *, into: list[Process], prefix: Sequence[str] = ()
    ) -> Process:
        if kind == "ours":
            options = ["--seed", seed("benchmark")]
            return self._ours("registry", options, network.bootstrap, into, prefix)
        options = ["--registrySeed", seed("benchmark"), "--registryDir", f"{self._folder()}"]
        return self._node(
            "registry", [CLI(), "registry", *options], network.bootstrap, into, prefix
        )

    def service(
        self, kind: Kind, network: Network, *, port: int, role: str, into: list[Process],
        prefix: Sequence[str] = (),
    ) -> Process:  # fmt: skip
        if kind == "ours":
            options = [network.key, "-p", str(port), "-r", role]
            return self._ours("service", options, network.bootstrap, into, prefix)
        options = ["--registryPublicKey", network.key, "--port", str(port), "--role", role]
        return self._node("service", [CLI(), "service", *options], network.bootstrap, into, prefix)

    def proxy(
        self, kind: Kind, network: Network, *, port: int, role: str, into: list[Process],
        prefix: Sequence[str] = (),
    ) -> Process:  # fmt: skip
        if kind == "ours":
            options = [network.key, "-p", str(port), "-r", role]
            return self._ours("proxy", options, network.bootstrap, into, prefix)
        options = ["--registryPublicKey", network.key, "--port", str(port), "--role", role]
        # Without a copy of the registry's store, as that is not what is measured.
        options.append("--skipReaderRegistry")
        return self._node("proxy", [CLI(), "proxy", *options], network.bootstrap, into, prefix)

    def run(
        self, name: str, command: Sequence[str | Path], *, into: list[Process], **env: str
    ) -> Process:
        """Any program, in a session of its own."""
        home = self._folder()
        process = Process(name, [*LEASH, *command], cwd=home, env=environment(home, **env))
        into.append(process)
        return process

    def _ours(
        self, command: str, options: Sequence[str], bootstrap: str | None, into: list[Process],
        prefix: Sequence[str],
    ) -> Process:  # fmt: skip
        env = {"PYTHONPATH": str(self.source)}
        if bootstrap is not None:
            env["HYPERSEAPORT_BOOTSTRAP"] = bootstrap
        program = [sys.executable, "-m", "hyperseaport.cli", command, *options]
        return self.run(f"our {command}", [*prefix, *program], into=into, **env)

    def _node(
        self, name: str, arguments: Sequence[str | Path], bootstrap: str, into: list[Process],
        prefix: Sequence[str],
    ) -> Process:  # fmt: skip
        preload, variable = npm.PEERS / "preload.js", "HYPERSEAPORT_TEST_BOOTSTRAP"
        if prefix:
            preload, variable = PEERS / "preload.js", "HYPERSEAPORT_BENCH_BOOTSTRAP"
        env = {"NODE_PATH": str(npm.node_modules()), variable: bootstrap}
        program = [npm.node(), "-r", preload, *arguments]
        return self.run(f"node {name}", [*prefix, *program], into=into, **env)

    def _folder(self) -> Path:
        folder = self.home / str(next(self._count))
        folder.mkdir()
        return folder


REGISTRY_LINE: dict[Kind, str] = {
    "ours": r"^Registry listening. Connect with pubkey  ([0-9a-f]{64})$",
    "node": r"^registryPublicKey=([0-9a-f]{64})$",
}


def CLI() -> Path:  # noqa: N802
    """The Node program."""
    return npm.node_modules() / "hyperseaport" / "cli.js"


def line(process: Process, pattern: str, deadline: float = START) -> str:
    """The first group of (or all of) the first line that matches; Failure when none comes."""
    try:
        match: re.Match[str] = asyncio.run(process.line(pattern, deadline=deadline))
    except AssertionError as error:
        said = last_line(process.text("stderr"))
        raise Failure(f"{error}" + (f": {said}" if said else "")) from None
    return match[match.lastindex or 0]


def until_served(chain: Chain, deadline: float = START) -> None:
    """Return once a byte from the backend has come through; Failure after `deadline` seconds.

    A Node proxy that knows no service yet closes connections at once; they are tried again.
    """
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        if chain.prefix:
            with contextlib.suppress(Failure):
                chain.client("connect", 1, 1, limit=10)
                return
        else:
            with contextlib.suppress(OSError):
                traffic.opened(chain.port, b"E", limit=5).close()
                return
        time.sleep(0.02)
    raise Failure(f"does not serve after {deadline:.0f} s")


def until_listening(port: int, deadline: float = 10.0) -> None:
    """Return once something accepts connections on a port of 127.0.0.1."""
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.05)
    raise Failure(f"nothing listens on port {port}")


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2][:120]
