#!/usr/bin/env python3
"""How fast connections find another way, and registries come back: figures as Markdown.

    benchmarks/healing.py [--rounds N] [--output FILE]

Every program is a process of its own on this machine. A client asks for a page through the proxy
again and again; what is measured begins with the signal that does the damage.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import http.server
import itertools
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]

import structlog  # noqa: E402
from contenders import REGISTRY_LINE, Lab, Network, line  # noqa: E402
from procfs import machine  # noqa: E402
from support.process import Process, environment  # noqa: E402

import hyperseaport  # noqa: E402

#: Services that must be back after the registry's restart.
SERVICES = 10
#: Connections tried while the registry is away.
TRIES = 200
#: Seconds for what should take less than one.
PATIENCE = 60.0


@dataclass(slots=True)
class Figures:
    """Seconds of each round, by what was measured; counts likewise."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, what: str, value: float) -> None:
        self.values.setdefault(what, []).append(value)
        print(f"{what}: {value:.3f}", flush=True)


class Page(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    server: http.server.ThreadingHTTPServer

    def do_GET(self) -> None:
        body = self.server.server_name.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


class Backend:
    """An HTTP server that says its own name."""

    def __init__(self, name: str) -> None:
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
        self._server.server_name = name
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()


def page(port: int, timeout: float = 15.0) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", "/")
        return connection.getresponse().read()
    finally:
        connection.close()


def seconds_until(condition: Callable[[], bool]) -> float:
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > PATIENCE:
            raise TimeoutError("that took too long")
        time.sleep(0.001)
    return time.monotonic() - start


def answers(port: int, name: str) -> Callable[[], bool]:
    def check() -> bool:
        try:
            return page(port) == name.encode()
        except (OSError, http.client.HTTPException):
            return False

    return check


def proxy_port(process: Process) -> int:
    return int(line(process, r"^proxy from  (\d+) to p2p service"))


def failover(lab: Lab, network: Network, figures: Figures, what: str, number: int) -> None:
    """The instance in use gets the signal; until the other one answers a new connection."""
    role = f"falls{next(_serial)}"
    processes: list[Process] = []
    for version in ("1.1.0", "1.2.0"):
        service = lab.service(
            "ours", network, port=Backend(version).port, role=f"{role}@{version}", into=processes
        )
        line(service, r"^registered service (\{)")
    proxy = lab.proxy("ours", network, port=0, role=f"{role}@1.x", into=processes)
    port = proxy_port(proxy)
    try:
        seconds_until(answers(port, "1.2.0"))
        idle = socket.create_connection(("127.0.0.1", port))
        idle.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        said = b""
        while not said.endswith(b"1.2.0"):
            said += idle.recv(65536)
        processes[1].signal(signal.Signals(number))
        figures.add(what, seconds_until(answers(port, "1.1.0")))
        idle.settimeout(PATIENCE)
        start = time.monotonic()
        with contextlib.suppress(OSError):
            idle.recv(1)
        figures.add(f"{what}: a connection that ran", time.monotonic() - start)
        idle.close()
    finally:
        for process in processes:
            process.close()


async def _listed(network: Network) -> int:
    """Verified services of the role."""
    async for records in hyperseaport.services(
        "stays", registry=network.key, bootstrap=(network.bootstrap,)
    ):
        return sum(record.verified for record in records)
    return 0


def restart(lab: Lab, network: Network, figures: Figures) -> None:
    """The registry gets SIGKILL and is started again, until it lists every service."""
    processes: list[Process] = []
    registry = lab.registry("ours", network, into=processes)
    network = Network(network.bootstrap, line(registry, REGISTRY_LINE["ours"]))
    try:
        for number in range(SERVICES):
            service = lab.service(
                "ours",
                network,
                port=Backend("here").port,
                role=f"stays@1.{number}.0",
                into=processes,
            )
            line(service, r"^registered service (\{)")
        port = proxy_port(lab.proxy("ours", network, port=0, role="stays@1.x", into=processes))
        seconds_until(answers(port, "here"))
        registry.signal(signal.SIGKILL)
        asyncio.run(registry.exit())
        check = answers(port, "here")
        failed = sum(not check() for _ in range(TRIES))
        figures.add(f"connections of {TRIES} that failed while the registry was away", failed)
        start = time.monotonic()
        home = registry.cwd
        env = environment(
            home, PYTHONPATH=str(lab.source), HYPERSEAPORT_BOOTSTRAP=network.bootstrap
        )
        processes.append(Process("our registry", registry.command, cwd=home, env=env))
        while asyncio.run(_listed(network)) < SERVICES:
            if time.monotonic() - start > PATIENCE:
                raise TimeoutError("the services did not come back")
        figures.add(
            "registry: kill -9, until all are listed and verified", time.monotonic() - start
        )
    finally:
        for process in reversed(processes):
            process.close()


_serial = itertools.count(1)

#: What is measured, what must be reached and aimed at, in seconds or counts.
GOALS = {
    "kill -9 of the instance in use": (1.0, 0.2),
    "its host vanishes": (15.0, 15.0),
    "its host vanishes: a connection that ran": (15.0, 15.0),
    "registry: kill -9, until all are listed and verified": (5.0, 2.0),
    f"connections of {TRIES} that failed while the registry was away": (0.0, 0.0),
}

HEAD = """# Healing

Written by `benchmarks/healing.py`. Seconds from the signal that does the damage; the median of all
rounds, the least and the greatest in parentheses. A vanished host is a process that is stopped
(SIGSTOP): it neither answers nor refuses. What survives which fault is in
[fault-matrix.md](fault-matrix.md).
"""


def markdown(figures: Figures, facts: dict[str, str]) -> str:
    lines = [HEAD, *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += ["| what | measured | at most | aim |", "| --- | ---: | ---: | ---: |"]
    for what, values in figures.values.items():
        middle = statistics.median(values)
        shown = f"{middle:.2f} ({min(values):.2f}-{max(values):.2f})"
        if "connections of" in what:
            shown = f"{max(values):.0f}"
        limits = GOALS.get(what)
        most, aim = ("", "") if limits is None else (f"{limit:g}" for limit in limits)
        lines.append(f"| {what} | {shown} | {most} | {aim} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, metavar="N")
    parser.add_argument("--output", metavar="FILE", help="where to write the page")
    arguments = parser.parse_args()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    figures, lab = Figures(), Lab()
    processes: list[Process] = []
    try:
        network = Network("", "")
        dht = lab.dht("ours", into=processes, host="127.0.0.1")
        network.bootstrap = line(dht, r"^dht node listening on (\S+)$")
        registry = lab.registry("ours", network, into=processes)
        network.key = line(registry, REGISTRY_LINE["ours"])
        for _ in range(arguments.rounds):
            failover(lab, network, figures, "kill -9 of the instance in use", signal.SIGKILL)
            failover(lab, network, figures, "its host vanishes", signal.SIGSTOP)
        registry.close()
        for _ in range(arguments.rounds):
            restart(lab, network, figures)
    finally:
        for process in reversed(processes):
            process.close()
        lab.close()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    facts = machine() | {
        "commit": commit,
        "command": f"benchmarks/healing.py --rounds {arguments.rounds}",
    }
    text = markdown(figures, facts)
    if arguments.output:
        Path(arguments.output).write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
