"""What is measured, one function a case: it gets a contender and returns its figures.

A figure that could not be had is a text instead, and a case that fails altogether raises `Failure`.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import procfs
from contenders import (
    ALL,
    NODE,
    OURS,
    PEER_TO_PEER,
    REGISTRY_LINE,
    TRAFFIC,
    Chain,
    Contender,
    Failure,
    Lab,
    Network,
    last_line,
    line,
    until_listening,
    until_served,
)
from lossy import LEASH, NotPermitted
from support.ports import free_port
from support.process import Process

MB = 1e6
MIB = 2**20
KIB = 2**10

Figures: TypeAlias = dict[str, float | str]

#: Of the machine's path between the two namespaces, each way (seconds).
DELAY = 0.010
#: Connections that make a program ready for its memory to be measured.
WARM = 8


@dataclass(frozen=True, slots=True)
class Size:
    """How much of each case. Times in seconds."""

    rounds: int = 5
    #: Of cases that take long.
    long_rounds: int = 3
    one: int = 256 * MIB
    eight: int = 512 * MIB
    #: For one transfer, after which what has arrived counts.
    limit: float = 30.0
    iperf: int = 10
    redis: tuple[int, int] = (20_000, 200_000)
    connections: int = 200
    burst: int = 1024
    trips: int = 5000
    idle: tuple[int, ...] = (1000, 5000)
    idle_window: float = 10.0
    stall: float = 5.0
    share: float = 5.0
    loss: tuple[int, ...] = (0, 1, 2, 5)
    lossy: float = 10.0
    scale: tuple[int, ...] = (100, 1000, 10_000)


SHORT = Size(
    rounds=2,
    long_rounds=1,
    one=64 * MIB,
    eight=64 * MIB,
    limit=10.0,
    iperf=3,
    redis=(2_000, 20_000),
    connections=30,
    burst=256,
    trips=1000,
    idle=(200,),
    idle_window=4.0,
    share=2.0,
    lossy=4.0,
    scale=(100, 1000),
)


@dataclass(frozen=True, slots=True)
class Metric:
    """A column. `ratio`: shown against Node to Node as well."""

    key: str
    title: str
    digits: int = 1
    ratio: bool = True


@dataclass(frozen=True, slots=True)
class Case:
    """`tables`: titles and columns of what `measure` returns."""

    name: str
    contenders: Sequence[Contender]
    tables: Sequence[tuple[str, str, Sequence[Metric]]]
    measure: Callable[[Lab, Contender, Size], Figures]
    long: bool = False
    #: Names of rows, where they are not chains.
    labels: tuple[str, ...] = ()


def cases(size: Size) -> list[Case]:
    """All cases in the order in which they run: what is delicate comes before what is heavy."""
    memory = [Metric("service", "service MiB"), Metric("proxy", "proxy MiB")]
    cpu = [
        Metric(f"{kind}_{way}", f"{way}load, {kind}", 2)
        for way in ("down", "up")
        for kind in ("service", "proxy")
    ]
    ways = [Metric("down", "download MB/s"), Metric("up", "upload MB/s")]
    commands = ["seed", "dht", "registry", "service", "proxy", "serves"]
    return [
        Case("start", (OURS, NODE), [(
            "Start-up time of each command",
            "Seconds until the command has printed its line; of seed, until it has ended; of the "
            "proxy, until it is connected to the registry, and until a byte has come through it.",
            [Metric(name, "proxy serves" if name == "serves" else name, 2) for name in commands],
        )], _start, labels=("ours", "Node")),
        Case("roundtrip", ALL, [(
            "Round trip of 64 bytes",
            f"{size.trips:,} messages on one connection, one after the other; microseconds.",
            [Metric("median", "median µs", 0), Metric("p99", "99th percentile µs", 0)],
        )], _roundtrip),
        Case("connect", ALL, [(
            "New connections",
            f"Until the first byte of the backend has arrived: {size.connections} one by one, and "
            f"{size.burst:,} with 64 at any time.",
            [Metric("single", "one by one, median ms", 2), Metric("burst", "64 at once, per second",
             0), Metric("waiting", "64 at once, median ms", 0)],
        )], _connect),
        Case("one", ALL, [
            ("One stream", f"{size.one // MIB} MiB each way; download is service to proxy.", ways),
            ("CPU seconds per gigabyte", "Of each process while one stream moves.", cpu),
        ], _one),
        Case("eight", ALL, [
            ("Eight streams", f"{size.eight // MIB} MiB in sum, each way.", ways),
        ], _eight),
        Case("share", ALL, [(
            "Two streams share the path",
            f"Two downloads for {size.share:g} s: what the slower one gets of the sum (half is "
            "fair), and the sum.",
            [Metric("share", "share of the slower", 2, ratio=False), Metric("sum", "sum MB/s")],
        )], _share),
        Case("redis", ALL, [(
            "redis-benchmark",
            "Requests/s, values of 64 bytes, 50 connections, pipelines of 1 and 16 "
            f"({size.redis[0]:,} and {size.redis[1]:,} requests).",
            [Metric(f"{verb}{depth}", f"{verb}, pipeline {depth}", 0)
             for depth in (1, 16) for verb in ("GET", "SET")],
        )], _redis),
        Case("iperf", ALL, [(
            "iperf3",
            f"A sender that saturates, for {size.iperf} s, each way (download is iperf3 -R). What "
            "the receiver counted in that time, and how much memory each process took more.",
            [*ways, Metric("service_down", "download: service MiB"),
             Metric("proxy_down", "proxy MiB"), Metric("service_up", "upload: service MiB"),
             Metric("proxy_up", "proxy MiB")],
        )], _iperf, long=True),
        Case("stall", PEER_TO_PEER, [(
            "A stalled reader",
            f"Memory that each process takes more in {size.stall:g} s while a writer never ends "
            "and its reader never reads.",
            [Metric(f"{metric.key}_{way}", f"{way}load: {metric.title}", 2)
             for way in ("down", "up") for metric in memory],
        )], _stall, long=True),
        *[Case(f"idle{count}", PEER_TO_PEER, [(
            f"{count:,} idle connections",
            f"Memory of each connection, and CPU over {size.idle_window:g} s in which nothing is "
            "sent.",
            [Metric("service", "service KiB each"), Metric("proxy", "proxy KiB each"),
             Metric("service_cpu", "service CPU s/min", 2),
             Metric("proxy_cpu", "proxy CPU s/min", 2)],
        )], _idle(count), long=True) for count in size.idle],
        Case("loss", ALL, [(
            "Goodput under loss",
            f"One download of {size.one // MIB} MiB, or {size.lossy:g} s of it, across a link "
            f"of {DELAY * 1e3:.0f} ms and the given loss, each way, between two network namespaces "
            "(its relay shares the cores). MB/s, start included. Here the last row is the kernel's "
            "TCP.",
            [Metric(f"loss{loss}", f"{loss} %", 2) for loss in size.loss],
        )], _loss, long=True),
    ]  # fmt: skip


# Latency


def _start(lab: Lab, contender: Contender, size: Size) -> Figures:
    kind = contender.service
    figures: Figures = {}
    started: list[Process] = []

    def ready(key: str, process: Process, pattern: str) -> str:
        found: str = line(process, pattern)
        figures[key] = time.monotonic() - begin
        return found

    try:
        begin = time.monotonic()
        lab.seed(kind, into=started)
        figures["seed"] = time.monotonic() - begin
        begin = time.monotonic()
        dht = lab.dht(kind, into=started, host="127.0.0.1")
        network = Network(ready("dht", dht, r"^dht node listening on (\S+)$"), "")
        begin = time.monotonic()
        registry = lab.registry(kind, network, into=started)
        network.key = ready("registry", registry, REGISTRY_LINE[kind])
        port = free_port()
        backend = lab.run("backend", [*TRAFFIC, "backend", "127.0.0.1", str(port)], into=started)
        line(backend, "^listening")
        begin = time.monotonic()
        service = lab.service(kind, network, port=port, role="start@1.0.0", into=started)
        ready("service", service, r"^started p2p service on")
        begin = time.monotonic()
        front = free_port()
        proxy = lab.proxy(kind, network, port=front, role="start@1.x", into=started)
        ready("proxy", proxy, r"^connected to registry$")
        until_served(Chain(contender, front, 0, 0, port, backend, [], []))
        figures["serves"] = time.monotonic() - begin
    finally:
        for process in reversed(started):
            process.close()
    return figures


def _roundtrip(lab: Lab, contender: Contender, size: Size) -> Figures:
    result = lab.shared(contender).client("roundtrip", size.trips, 64, limit=60)
    return {key: result[key] * 1e6 for key in ("median", "p99")}


def _connect(lab: Lab, contender: Contender, size: Size) -> Figures:
    chain = lab.shared(contender)
    single = chain.client("connect", size.connections, 1)
    burst = chain.client("connect", size.burst, 64)
    return {
        "single": single["median"] * 1e3,
        "burst": burst["per_second"],
        "waiting": burst["median"] * 1e3,
    }


# Throughput


def _one(lab: Lab, contender: Contender, size: Size) -> Figures:
    return _shared_bulk(lab, contender, size.one, 1, size.limit)


def _eight(lab: Lab, contender: Contender, size: Size) -> Figures:
    return _shared_bulk(lab, contender, size.eight, 8, size.limit)


def _shared_bulk(lab: Lab, contender: Contender, total: int, streams: int, limit: float) -> Figures:
    figures = _bulk(lab.shared(contender), total, streams, limit)
    if "note" in figures:
        lab.drop(contender)
    return figures


def _bulk(chain: Chain, total: int, streams: int, limit: float) -> Figures:
    figures: Figures = {}
    for way in ("down", "up"):
        before = procfs.cpu_seconds(chain.service), procfs.cpu_seconds(chain.proxy)
        result = chain.client(f"{way}load", total, streams, limit, limit=limit + 40)
        after = procfs.cpu_seconds(chain.service), procfs.cpu_seconds(chain.proxy)
        if not result["bytes"]:
            raise Failure(f"no bytes in {limit:.0f} s")
        gigabytes = result["bytes"] / 1e9
        figures[way] = result["bytes"] / result["seconds"] / MB
        figures[f"service_{way}"] = (after[0] - before[0]) / gigabytes
        figures[f"proxy_{way}"] = (after[1] - before[1]) / gigabytes
        if not result["whole"]:
            figures["note"] = f"{result['bytes'] / MIB:.0f} MiB of the {way}load had arrived"
    return figures


def _share(lab: Lab, contender: Contender, size: Size) -> Figures:
    # Of its own: a Node proxy does not serve again after a client has left a transfer half-way.
    with lab.fresh(contender) as chain:
        result = chain.client("share", size.share, limit=size.share + 30)
    return {"share": result["share"], "sum": result["bytes"] / size.share / MB}


def _redis(lab: Lab, contender: Contender, size: Size) -> Figures:
    program = _program("redis-benchmark", "redis-tools")
    server = _program("redis-server", "redis-server")
    figures: Figures = {}
    with lab.fresh(contender) as chain:
        chain.backend.close()
        options = ["--port", str(chain.backend_port), "--bind", "127.0.0.1", "--save", ""]
        lab.run("redis", [server, *options], into=chain.processes)
        until_listening(chain.backend_port)
        for depth, count in zip((1, 16), size.redis, strict=True):
            options = ["-p", str(chain.port), "-d", "64", "-P", str(depth), "-n", str(count)]
            code, text = _output([program, *options, "-t", "get,set", "--csv"], limit=60)
            rates = re.findall(r'^"(GET|SET)","([\d.]+)"', text, re.MULTILINE)
            for verb in ("GET", "SET"):
                figures[f"{verb}{depth}"] = "no end in 60 s" if code is None else "failed"
            figures |= {f"{verb}{depth}": float(rate) for verb, rate in rates}
    return figures


_INTERVAL = re.compile(r"^\[ *\d+\] +([\d.]+)-([\d.]+) +sec .* ([\d.]+) Mbits/sec", re.MULTILINE)


def _iperf(lab: Lab, contender: Contender, size: Size) -> Figures:
    program = _program("iperf3", "iperf3")
    figures: Figures = {}
    for way in ("down", "up"):
        with lab.fresh(contender) as chain:
            chain.backend.close()
            common = ["-p", str(chain.backend_port), "-f", "m", "-i", "1", "--forceflush"]
            server = lab.run("iperf3", [program, "-s", *common], into=chain.processes)
            line(server, "^Server listening")
            common[1] = str(chain.port)
            options = ["-c", "127.0.0.1", *common, "-t", str(size.iperf)]
            if way == "down":
                options.append("-R")
            with procfs.Peak(chain.service, chain.proxy) as peak:
                code, text = _output([program, *options], limit=size.iperf + 8)
            received = text if way == "down" else server.text("stdout")
            spans = [tuple(map(float, found)) for found in _INTERVAL.findall(received)]
            # The last lines of the report sum up, and count from 0 what has several seconds.
            megabits = sum((end - begin) * rate for begin, end, rate in spans if end - begin < 1.5)
            figures[way] = megabits / 8 / size.iperf if spans else "nothing arrived"
            figures[f"service_{way}"] = peak.growth[0] / MIB
            figures[f"proxy_{way}"] = peak.growth[1] / MIB
            if code != 0:
                figures["note"] = f"iperf3 did not end {way}load in order"
    return figures


# Memory


def _stall(lab: Lab, contender: Contender, size: Size) -> Figures:
    figures: Figures = {}
    for way in ("down", "up"):
        with lab.fresh(contender) as chain:
            chain.client("connect", WARM, 1)
            time.sleep(0.5)
            with procfs.Peak(chain.service, chain.proxy) as peak:
                chain.client("stall", way, size.stall, limit=size.stall + 40)
            figures[f"service_{way}"] = peak.growth[0] / MIB
            figures[f"proxy_{way}"] = peak.growth[1] / MIB
    return figures


def _idle(count: int) -> Callable[[Lab, Contender, Size], Figures]:
    def measure(lab: Lab, contender: Contender, size: Size) -> Figures:
        with lab.fresh(contender) as chain:
            chain.client("connect", WARM, 1)
            time.sleep(1.0)
            programs = chain.service, chain.proxy
            memory = [procfs.resident(pid) for pid in programs]
            with _held(chain, count):
                time.sleep(1.0)
                grown = [
                    procfs.resident(pid) - before
                    for pid, before in zip(programs, memory, strict=True)
                ]
                cpu = [procfs.cpu_seconds(pid) for pid in programs]
                time.sleep(size.idle_window)
                used = [
                    procfs.cpu_seconds(pid) - before
                    for pid, before in zip(programs, cpu, strict=True)
                ]
        minutes = size.idle_window / 60
        return {
            "service": grown[0] / count / KIB,
            "proxy": grown[1] / count / KIB,
            "service_cpu": used[0] / minutes,
            "proxy_cpu": used[1] / minutes,
        }

    return measure


@contextlib.contextmanager
def _held(chain: Chain, count: int) -> Iterator[None]:
    """`count` connections while the block runs."""
    command = [*LEASH, *TRAFFIC, "idle", str(chain.port), str(count)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as client:
        try:
            assert client.stdout is not None
            assert client.stderr is not None
            if not client.stdout.readline():
                raise Failure(last_line(client.stderr.read()))
            yield
        finally:
            client.kill()


# Loss


def _loss(lab: Lab, contender: Contender, size: Size) -> Figures:
    figures: Figures = {}
    for loss in size.loss:
        try:
            # Made without loss: what is compared is goodput, not luck with handshakes.
            lab.link.impose(0.0, DELAY)
            with lab.fresh(contender, lossy=True) as chain:
                lab.link.impose(loss / 100, DELAY)
                limits = size.one, 1, size.lossy
                result = chain.client("download", *limits, limit=size.lossy + 40)
            figures[f"loss{loss}"] = result["bytes"] / result["seconds"] / MB
        except NotPermitted as error:
            raise Failure(str(error)) from None
        except Failure as failure:
            figures[f"loss{loss}"] = f"failed: {failure}"
    return figures


# Tools


def _program(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise Failure(f"{name} is missing: install the system package {package}")
    return path


def _output(command: Sequence[str], *, limit: float) -> tuple[int | None, str]:
    """Exit code (None: it was ended after `limit` seconds) and standard output."""
    pipe = subprocess.PIPE
    null = subprocess.DEVNULL
    with subprocess.Popen(
        [*LEASH, *command], stdin=null, stdout=pipe, stderr=null, text=True
    ) as process:
        try:
            text, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
            return None, text
        return process.returncode, text
