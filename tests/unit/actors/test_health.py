"""Is the TCP target of a service healthy, and who hears of it."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.registry import virtual

from hyperseaport.actors import health
from hyperseaport.actors.actor import Actor, Address, handles
from hyperseaport.actors.health import (
    JITTER,
    MAX_ANSWER,
    MAX_STATUS,
    Check,
    Health,
    HealthArgs,
    HttpCheck,
    TcpCheck,
    Verdict,
    parse,
    probe,
)
from hyperseaport.actors.messages import Describe, Follow, HealthChanged
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.transport.errors import InvalidInput

HOST = "127.0.0.1"


# The words for a check.


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("tcp", TcpCheck()),
        ("http:/", HttpCheck("/")),
        ("http:/health?deep=1&x=a:b", HttpCheck("/health?deep=1&x=a:b")),
    ],
)
def test_parse(text: str, check: Check) -> None:
    assert parse(text) == check
    assert str(check) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "TCP",
        "tcp:",
        "tcp:/",
        "http",
        "http:",
        "http:health",
        "https:/",
        "http:/a b",
        "http:/a\r\nX: y",
        "http:/a\n",
        "http:/ä",
        "http://127.0.0.1/ ",
        "/health",
    ],
)
def test_parse_says_what_to_write(text: str) -> None:
    with pytest.raises(InvalidInput, match="http:/health"):
        parse(text)


@settings(deadline=None, derandomize=True)
@given(st.text())
def test_parse_survives_any_text(text: str) -> None:
    try:
        check = parse(text)
    except InvalidInput:
        return
    assert str(check) == text


@pytest.mark.parametrize(
    "numbers",
    [
        {"interval": 0},
        {"interval": float("nan")},
        {"interval": float("inf")},
        {"timeout": 0},
        {"timeout": -1.0},
        {"threshold": 0},
        {"port": 0},
        {"port": 65536},
    ],
)
def test_numbers_that_cannot_work(numbers: dict[str, Any]) -> None:
    possible: dict[str, Any] = {"host": HOST, "port": 1, "check": TcpCheck()}
    HealthArgs(**possible)
    with pytest.raises(InvalidInput):
        HealthArgs(**possible | numbers)


# One probe of a real server.

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def target(serve: Serve, host: str = HOST) -> AsyncIterator[int]:
    """The port of a server; when the block ends, every connection to it has been served."""
    served: list[asyncio.Task[None]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        served.append(task)
        try:
            await serve(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(handle, host, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.gather(*served)


def answering(answer: bytes, requests: list[bytes] | None = None) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        if requests is not None:
            requests.append(request)
        writer.write(answer)
        await writer.drain()
        writer.write_eof()
        await reader.read()

    return serve


async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """Answers nothing until the client goes."""
    await reader.read()


async def ask(port: int, check: str, timeout: float = 20.0, host: str = HOST) -> Verdict:
    return await probe(HealthArgs(host, port, parse(check), timeout=timeout))


def closed_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        port: int = server.getsockname()[1]
    return port


async def test_tcp_is_healthy_when_it_accepts() -> None:
    async with target(silent) as port:
        assert await ask(port, "tcp") == Verdict(True, "accepts connections")


@pytest.mark.parametrize("check", ["tcp", "http:/"])
async def test_nobody_listens(check: str) -> None:
    assert await ask(closed_port(), check) == Verdict(False, "connection refused")


@pytest.mark.parametrize(
    ("status", "healthy"),
    [(200, True), (204, True), (301, True), (399, True)]
    + [(status, False) for status in (100, 199, 400, 404, 500, 503, 599)],
)
async def test_http_is_judged_by_its_status(status: int, healthy: bool) -> None:
    async with target(answering(b"HTTP/1.1 %d Some Words\r\n\r\nbody" % status)) as port:
        assert await ask(port, "http:/") == Verdict(healthy, f"answered {status}")


async def test_the_request() -> None:
    requests: list[bytes] = []
    async with target(answering(b"HTTP/1.0 200\n\n", requests)) as port:
        assert (await ask(port, "http:/health?a=1")).healthy
    head, *lines = requests[0].split(b"\r\n")
    assert head == b"GET /health?a=1 HTTP/1.1"
    assert b"Host: 127.0.0.1:%d" % port in lines
    assert b"Connection: close" in lines
    assert lines[-2:] == [b"", b""]


async def test_an_ipv6_target() -> None:
    requests: list[bytes] = []
    async with target(answering(b"HTTP/1.1 200 OK\r\n\r\n", requests), "::1") as port:
        assert (await ask(port, "http:/", host="::1")).healthy
    assert b"\r\nHost: [::1]:%d\r\n" % port in requests[0]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "closed the connection without an answer"),
        (b"HTTP/1.1 200", "the answer is no HTTP"),
        (b"HTTP/1.1 20\r\n", "the answer is no HTTP"),
        (b"HTTP/1.1 2000\r\n", "the answer is no HTTP"),
        (b"HTTP/2 200\r\n", "the answer is no HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "the answer is no HTTP"),
        (b"\0\xff\r\n" * 50, "the answer is no HTTP"),
        (b"x" * (4 * MAX_STATUS), "the answer is no HTTP"),
    ],
)
async def test_answers_that_are_no_http(answer: bytes, reason: str) -> None:
    async with target(answering(answer)) as port:
        assert await ask(port, "http:/") == Verdict(False, reason)


async def test_no_answer_in_time() -> None:
    async with target(silent) as port:
        verdict = await ask(port, "http:/", timeout=0.05)
    assert verdict == Verdict(False, "no answer within 0.05 s")


async def test_a_body_without_end_is_healthy_and_not_read_for_ever() -> None:
    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(MAX_ANSWER))
            await writer.drain()

    async with target(stream) as port:
        assert await ask(port, "http:/") == Verdict(True, "answered 200")


async def test_a_body_that_stops_half_way_is_healthy() -> None:
    async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab")
        await reader.read()

    async with target(stall) as port:
        assert await ask(port, "http:/", timeout=0.2) == Verdict(True, "answered 200")


async def test_a_reset_instead_of_an_answer() -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        linger = b"\1\0\0\0\0\0\0\0"
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    async with target(reset) as port:
        assert await ask(port, "http:/") == Verdict(False, "connection reset by peer")


@pytest.mark.parametrize("host", ["a" * 70 + ".invalid", "no\0name", ""])
async def test_hosts_that_can_be_none(host: str) -> None:
    verdict = await ask(closed_port(), "tcp", host=host)
    assert not verdict.healthy
    assert verdict.reason
    assert "\n" not in verdict.reason


async def test_a_probe_leaves_no_connection() -> None:
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b""
        gone.set()

    async with target(serve) as port:
        assert (await ask(port, "tcp")).healthy
        async with asyncio.timeout(20):
            await gone.wait()


# The actor, in virtual time, with a target that does as it is told.

Heard = list[tuple[bool, str]]

UP = Verdict(True, "up")
INTERVAL = 10.0


class Follower(Actor):
    """Follows, and appends what it hears to its args."""

    def on_start(self, args: Heard) -> None:
        self._heard = args
        self.send(self.context["health"], Follow())

    @handles(HealthChanged)
    def _changed(self, message: HealthChanged, _sender: object) -> None:
        self._heard.append((message.healthy, message.reason))


class Target:
    """What the next probes find, in order; the last goes on for ever."""

    def __init__(self, *verdicts: Verdict, takes: float = 0.0) -> None:
        self.verdicts = list(verdicts)
        self.takes = takes
        #: When each probe began.
        self.probed: list[float] = []
        self.running = 0
        self.most = 0
        self._begun = asyncio.Event()

    async def judged(self, probes: int) -> None:
        """Wait until so many probes are over."""
        while len(self.probed) < probes:
            self._begun.clear()
            await self._begun.wait()
        await asyncio.sleep(self.takes + 0.1)

    async def probe(self, _args: HealthArgs) -> Verdict:
        self.probed.append(asyncio.get_running_loop().time())
        self._begun.set()
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.takes)
        self.running -= 1
        return self.verdicts.pop(0) if len(self.verdicts) > 1 else self.verdicts[0]


def down(number: int) -> Verdict:
    return Verdict(False, f"down {number}")


@dataclass
class Stage:
    runtime: ActorRuntime
    health: Address
    #: What the first follower hears.
    heard: Heard

    def follower(self, name: str, kind: type[Follower] = Follower) -> Heard:
        heard: Heard = []
        self.runtime.spawn(kind, heard, name, {"health": self.health})
        return heard


@asynccontextmanager
async def watched(
    monkeypatch: pytest.MonkeyPatch, target: Target, **numbers: Any
) -> AsyncIterator[Stage]:
    """The health of the target, and one follower."""
    monkeypatch.setattr(health, "probe", target.probe)
    options: dict[str, Any] = {"interval": INTERVAL, "rng": Random(1), **numbers}
    args = HealthArgs(HOST, 1, HttpCheck("/up"), **options)
    async with ActorRuntime() as runtime:
        actor = runtime.spawn(Health, args, "health")
        await runtime.ready(actor)
        stage = Stage(runtime, actor, [])
        stage.heard = stage.follower("follower")
        yield stage
        assert actor.alive
        assert runtime.unhandled == 0
        assert runtime.dead_letters == 0


@virtual
async def test_the_first_probe_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for first, heard_first in ((UP, (True, "up")), (down(1), (False, "down 1"))):
        target = Target(first, takes=1.0)
        async with watched(monkeypatch, target) as stage:
            await asyncio.sleep(0.9)
            assert stage.heard == []
            await target.judged(1)
            assert stage.heard == [heard_first]


@virtual
async def test_failures_in_a_row_make_it_unhealthy_and_one_success_healthy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verdicts = [UP, down(1), down(2), UP, down(3), down(4), down(5), down(6), UP, UP]
    target = Target(*verdicts)
    async with watched(monkeypatch, target, threshold=3) as stage:
        for probes, expected in (
            (6, [(True, "up")]),
            (7, [(True, "up"), (False, "down 5")]),
            (8, [(True, "up"), (False, "down 5")]),
            (9, [(True, "up"), (False, "down 5"), (True, "up")]),
            (10, [(True, "up"), (False, "down 5"), (True, "up")]),
        ):
            await target.judged(probes)
            assert stage.heard == expected


@virtual
async def test_a_threshold_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(UP, down(1), UP)
    async with watched(monkeypatch, target, threshold=1) as stage:
        await target.judged(3)
        assert stage.heard == [(True, "up"), (False, "down 1"), (True, "up")]


@virtual
async def test_probes_come_at_jittered_intervals_and_never_overlap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = Target(UP, takes=2.5 * INTERVAL)
    async with watched(monkeypatch, target):
        await target.judged(40)
    assert target.most == 1
    times = zip(target.probed, target.probed[1:], strict=False)
    pauses = [later - earlier - target.takes for earlier, later in times]
    assert all(abs(pause - INTERVAL) <= INTERVAL * JITTER * 1.001 for pause in pauses)
    assert max(pauses) - min(pauses) > INTERVAL * JITTER


@virtual
async def test_late_followers_hear_the_state_at_once_and_dead_ones_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = Target(UP, UP, down(1))
    async with watched(monkeypatch, target, threshold=1) as stage:
        await target.judged(1)
        late = stage.follower("late")
        await asyncio.sleep(0.1)
        assert late == [(True, "up")]
        stage.runtime.kill("/follower")
        await target.judged(3)
        assert stage.heard == [(True, "up")]
        assert late == [(True, "up"), (False, "down 1")]


@virtual
async def test_to_follow_twice_is_to_follow_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(Follower):
        def on_start(self, args: Heard) -> None:
            super().on_start(args)
            self.send(self.context["health"], Follow())

    target = Target(UP, takes=1.0)
    async with watched(monkeypatch, target) as stage:
        heard = stage.follower("twice", Twice)
        await target.judged(2)
        assert heard == [(True, "up")]


@virtual
async def test_what_it_tells_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(UP, down(1), down(2), takes=1.0)
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.04)
    async with watched(monkeypatch, target, threshold=5) as stage:

        async def fields() -> Any:
            return dict((await stage.runtime.call(stage.health, Describe())).fields)

        assert await fields() == {
            "check": "http:/up",
            "healthy": None,
            "since": None,
            "last_probe_age": None,
            "last_reason": "",
            "failures": 0,
        }
        await target.judged(3)
        await asyncio.sleep(4)
        told = await fields()
        assert 4.0 <= told.pop("last_probe_age") <= 4.5
        assert told == {
            "check": "http:/up",
            "healthy": True,
            "since": 1_700_000_000.0,
            "last_reason": "down 2",
            "failures": 2,
        }


async def test_a_real_target_that_goes_and_comes() -> None:
    with socket.create_server((HOST, 0)) as reserved:
        port = reserved.getsockname()[1]
    changes: asyncio.Queue[tuple[bool, str]] = asyncio.Queue()

    class Queueing(Follower):
        @handles(HealthChanged)
        def _changed(self, message: HealthChanged, sender: object) -> None:
            changes.put_nowait((message.healthy, message.reason))

    args = HealthArgs(HOST, port, TcpCheck(), interval=0.01, threshold=2)
    async with ActorRuntime() as runtime, asyncio.timeout(30):
        actor = runtime.spawn(Health, args, "health")
        runtime.spawn(Queueing, [], "follower", {"health": actor})
        assert await changes.get() == (False, "connection refused")
        server = await asyncio.start_server(lambda _r, writer: writer.transport.abort(), HOST, port)
        assert await changes.get() == (True, "accepts connections")
        server.close()
        await server.wait_closed()
        assert await changes.get() == (False, "connection refused")
