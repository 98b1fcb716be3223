"""`status`, `tree`, `why` and `kill`, on programs that run in this process."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.control import Program, program, proxy_node, resolver, rest

from hyperseaport.commands import looking
from hyperseaport.supervisor import StartChild
from hyperseaport.transport.errors import InvalidInput, LocalError, RemoteError

EVIL = "\x1b[31mred\r\n\x07\x9b\u202e\u2028"


@pytest.fixture(autouse=True)
def _without_logs() -> Iterator[None]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the programs of a test have their sockets."""
    found = tmp_path / "run"
    monkeypatch.setattr(looking, "runtime_directory", lambda: found)
    return found


class Screen:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    async def shows(self, command: Callable[..., int], *args: Any, code: int = 0, **kw: Any) -> str:
        """What a command prints, run beside the programs that it asks."""
        self._capsys.readouterr()
        assert await asyncio.to_thread(command, *args, **kw) == code
        out, err = self._capsys.readouterr()
        assert err == ""
        return out

    async def document(self, command: Callable[..., int], *args: Any, **kw: Any) -> Any:
        return json.loads(await self.shows(command, *args, as_json=True, **kw))


@pytest.fixture
def screen(capsys: pytest.CaptureFixture[str]) -> Screen:
    return Screen(capsys)


@asynccontextmanager
async def two_programs(directory: Path) -> AsyncIterator[tuple[Program, Program]]:
    async with (
        program(directory / "dht-1.sock", command="dht") as dht,
        program(directory / "proxy-2.sock", proxy_node(), role="couchdb@3.x") as proxy,
    ):
        yield dht, proxy


# status


async def test_status(screen: Screen, directory: Path) -> None:
    async with program(directory / "proxy-1.sock", proxy_node(), role="couchdb@3.x", port=5985):
        brief = await screen.shows(looking.status)
        out = await screen.shows(looking.status, verbose=True)
    title, *lines = out.splitlines()
    assert title.startswith(f"proxy couchdb@3.x (process {os.getpid()}), up 0.")
    facts = [
        "  listening    not yet",
        "  instances    1 known, 1 usable, 0 set aside",
        "  uses         couchdb@3.2.2 abababab: newest version",
        "  connections  0 now, 0 since start",
        "  bytes        0 B received, 0 B sent",
        "  restarts     none",
    ]
    assert brief.splitlines()[1:] == facts
    assert lines == [
        *facts,
        "",
        "ACTOR                   WHAT              VALUE",
        "                        role              couchdb@3.x",
        "                        port              5985",
        "/node/endpoint          address           127.0.0.1:49737",
        "                        metrics.channels  3",
        "/node/proxy:1/resolver  role              couchdb",
        "                        range             3.x",
        "/node/pipes             children          0",
    ]


async def test_every_program_has_its_heading(screen: Screen, directory: Path) -> None:
    async with two_programs(directory):
        out = await screen.shows(looking.status)
        first, _, second = out.partition("\n\n")
        assert first.startswith("dht (process ")
        assert second.startswith("proxy couchdb@3.x (process ")
        one = await screen.shows(looking.status, target=str(directory / "dht-1.sock"))
        assert len(one.splitlines()) == len(first.splitlines())


async def test_status_as_json(screen: Screen, directory: Path) -> None:
    async with two_programs(directory):
        document = await screen.document(looking.status)
    dht, proxy = document["programs"]
    assert (dht["control"], dht["command"]) == (str(directory / "dht-1.sock"), "dht")
    assert proxy["summary"] == {"role": "couchdb@3.x"}
    assert proxy["actors"]["/node/endpoint"]["metrics"] == {"channels": 3}


# tree


async def test_tree(screen: Screen, directory: Path) -> None:
    async with program(directory / "proxy-1.sock", proxy_node()) as running:
        pipes = running.runtime.find("/node/pipes")
        assert pipes is not None
        for _ in range(7):
            await running.runtime.call(pipes, StartChild())
        running.runtime.kill("/node/proxy:1/resolver", "it was tired")
        out = await screen.shows(looking.tree)
        document = await screen.document(looking.tree)
    title, header, *lines = out.splitlines()
    assert title == f"proxy (process {os.getpid()})"
    assert header.split() == ["ACTOR", "CLASS", "STATE", "RESTARTS", "AGE", "LAST", "FAILURE"]
    names = "root control node endpoint pipes 1 2 3 4 5 and proxy:1 resolver"
    assert " ".join(line.split()[0] for line in lines) == names
    assert lines[1].startswith("  control  ")
    assert lines[1].split()[1:3] == ["Control", "serving"]
    assert lines[10].strip() == "and 2 more"
    assert lines[12].startswith("      resolver  ")
    assert lines[12].split()[1:4] == ["Resolver", "serving", "1"]
    assert lines[12].endswith("it was tired")
    assert document["programs"][0]["tree"]["children"][0]["id"] == "control"


async def test_tree_on_a_terminal(
    screen: Screen, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    async with program(directory / "proxy-1.sock", proxy_node()) as running:
        running.runtime.kill("/node/proxy:1/resolver", f"[bold]{EVIL}")
        out = await screen.shows(looking.tree)
    (line,) = (line for line in out.splitlines() if "resolver" in line)
    assert r"[bold]\x1b[31mred\x0d\x0a\x07\x9b\u202e\u2028" in line
    # What is left of control characters is the heading, and how rich draws.
    assert set(EVIL) & set(out) <= set("\x1b[31mred\n")
    assert "─" in out


# why


async def test_why(screen: Screen, directory: Path) -> None:
    rows = (
        {
            "key": "5b64a8956d8f2404" * 4,
            "role": "couchdb",
            "version": "3.2.2",
            "verified": True,
            "state": "taken",
            "reason": "the highest version",
            "failures": 0,
            "retry_in": None,
            "connections": 2,
        },
        {"key": "ab" * 32, "state": "set aside", "failures": 3, "retry_in": 4.2, "reason": EVIL},
    )
    async with program(directory / "proxy-1.sock", rest(resolver("couchdb", "3.x", rows))):
        out = await screen.shows(looking.why)
        document = await screen.document(looking.why, "couchdb@3.x")
    title, header, taken, aside = out.splitlines()
    assert title == f"proxy (process {os.getpid()}): couchdb@3.x"
    assert header == ("STATE      SERVICE        KEY       VERIFIED  IN USE  FAILED  RETRY IN  WHY")
    assert taken == (
        "taken      couchdb@3.2.2  5b64a895  yes       2       0       -         "
        "the highest version"
    )
    assert aside.split()[:2] == ["set", "aside"]
    assert aside.endswith(r"3       4.2 s     \x1b[31mred\x0d\x0a\x07\x9b\u202e\u2028")
    (proxy,) = document["programs"][0]["proxies"]
    assert proxy["rows"] == list(rows)


PUNCHED = {
    "path": "punched",
    "total_ms": 246.4,
    "wait_ms": 10.2,
    "lookup_ms": 80.0,
    "handshake_ms": 46.3,
    "path_ms": 90.0,
    "first_byte_ms": 20.1,
}
NOTHING = dict.fromkeys(("wait_ms", "lookup_ms", "path_ms", "handshake_ms", "first_byte_ms"), 0.2)


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (
            PUNCHED,
            "246 ms: waiting 10, lookup 80, handshake 46, punch 90, first byte 20 (punched)",
        ),
        (
            PUNCHED | {"path": "relayed", "lookup_ms": 0.0},
            "246 ms: waiting 10, handshake 46, relay 90, first byte 20 (relayed)",
        ),
        (
            PUNCHED | {"path": "remembered", "lookup_ms": 0.0, "wait_ms": 0.4, "path_ms": 0.0},
            "246 ms: handshake 46, first byte 20 (remembered)",
        ),
        (
            PUNCHED | {"path": "local"},
            "246 ms: waiting 10, lookup 80, handshake 46, path 90, first byte 20 (local)",
        ),
        (
            NOTHING | {"path": "direct", "total_ms": 1.0},
            "1 ms: no part took long (direct)",
        ),
    ],
)
async def test_why_tells_where_the_milliseconds_went(
    screen: Screen, directory: Path, last: dict[str, Any], said: str
) -> None:
    row = {"key": "5b64a8956d8f2404" * 4, "state": "taken", "worked_ago": 3.04, "last": last}
    rows = (row, {"key": "ab" * 32, "state": "candidate", "last": None})
    async with program(directory / "proxy-1.sock", rest(resolver("couchdb", "3.x", rows))):
        out = await screen.shows(looking.why)
        document = await screen.document(looking.why)
    assert out.splitlines()[4:] == [f"5b64a895: opened 3.0 s ago in {said}"]
    assert document["programs"][0]["proxies"][0]["rows"][0]["last"] == last


async def test_why_asks_all_proxies_that_match(screen: Screen, directory: Path) -> None:
    async with (
        program(directory / "proxy-1.sock", rest(resolver("couchdb", "3.x"))),
        program(directory / "proxy-2.sock", rest(resolver("couchdb", "4.x", ()))),
        program(directory / "dht-3.sock", command="dht"),
    ):
        both = await screen.shows(looking.why, "couchdb")
        assert "couchdb@3.x" in both
        assert both.endswith("couchdb@4.x\nno instance is known\n")
        one = await screen.shows(looking.why, "couchdb@4.x")
        assert "couchdb@3.x" not in one
        assert "dht" not in await screen.shows(looking.why)
        with pytest.raises(LocalError, match="no proxy for redis runs here"):
            await asyncio.to_thread(looking.why, "redis")


async def test_why_without_a_proxy(directory: Path) -> None:
    async with program(directory / "dht-3.sock", command="dht"):
        with pytest.raises(LocalError, match="no proxy runs here"):
            await asyncio.to_thread(looking.why)


# kill


@pytest.mark.parametrize("path", ["/node/endpoint", "node/endpoint", "/root/node/endpoint"])
@pytest.mark.parametrize("as_json", [False, True])
async def test_kill(screen: Screen, directory: Path, path: str, as_json: bool) -> None:
    async with program(directory / "proxy-1.sock", proxy_node()) as running:
        victim = running.runtime.find("/root/node/endpoint")
        assert victim is not None
        if as_json:
            answer = await screen.document(looking.kill, path)
            assert answer["killed"] == "/root/node/endpoint"
            assert answer["control"] == str(directory / "proxy-1.sock")
        else:
            assert await screen.shows(looking.kill, path) == "killed /root/node/endpoint\n"
        assert (await running.runtime.stopped(victim)).text == "killed"


async def test_kill_wants_to_know_in_which_program(screen: Screen, directory: Path) -> None:
    async with two_programs(directory) as (_, proxy):
        with pytest.raises(InvalidInput, match="2 programs run, choose one with --con") as info:
            await asyncio.to_thread(looking.kill, "/node/endpoint")
        assert str(directory / "proxy-2.sock") in str(info.value)
        endpoint = proxy.runtime.find("/node/endpoint")
        assert endpoint is not None
        target = str(directory / "proxy-2.sock")
        await screen.shows(looking.kill, "/node/endpoint", target=target)
        assert (await proxy.runtime.stopped(endpoint)).text == "killed"
        with pytest.raises(LocalError, match="no actor lives at"):
            await asyncio.to_thread(looking.kill, "/nobody", target=target)


# Nobody, or somebody else


COMMANDS = [
    looking.status,
    looking.tree,
    looking.why,
    lambda **options: looking.kill("/node/link", **options),
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("as_json", [False, True])
def test_no_program_runs(command: Any, as_json: bool, directory: Path) -> None:
    with pytest.raises(LocalError, match="no hyperseaport of yours runs here"):
        command(as_json=as_json)
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(directory / "proxy-1.sock"))
    (directory / "proxy-2.sock").write_text("no socket")
    with pytest.raises(LocalError, match="no hyperseaport of yours runs here"):
        command(as_json=as_json)


@pytest.mark.parametrize("command", COMMANDS)
def test_nobody_at_the_given_path(command: Any, tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="No such file or directory"):
        command(target=str(tmp_path / "nothing.sock"))
    with pytest.raises(LocalError, match="too long"):
        command(target=str(tmp_path / ("x" * 200)))


@contextmanager
def stranger(path: Path, answer: bytes, *, drips: bool = False) -> Iterator[None]:
    """A program that says this to everybody, whatever it is asked; drip by drip, without an end."""
    over = threading.Event()
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    with socket.create_server(str(path), family=socket.AF_UNIX) as server:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    # Who only looks whether somebody listens says nothing.
                    if not client.recv(1 << 16):
                        continue
                    with suppress(OSError):
                        client.sendall(answer)
                        while drips and not over.wait(0.01):
                            client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            over.set()
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"[]\n",
        b"{}\n",
        b'{"ok":[]}\n',
        b'{"error":{}}\n',
        b"[" * 100_000 + b"\n",
        b"\xff\xfe\n",
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_strangers_are_not_understood(command: Any, directory: Path, answer: bytes) -> None:
    path = directory / "proxy-1.sock"
    with (
        stranger(path, answer),
        pytest.raises(RemoteError, match="answers is not understood"),
    ):
        command(target=str(path))


def test_one_that_cannot_answer_does_not_hide_the_others(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"v": 1, "id": 1, "ok": {"command": "dht", "pid": 7, "uptime": 7400.0}}
    good["ok"] |= {"summary": {}, "actors": {}}  # type: ignore[operator]
    with (
        stranger(directory / "a-1.sock", b'{"error":"too \x7f busy"}\n'),
        stranger(directory / "b-2.sock", json.dumps(good).encode() + b"\n"),
        stranger(directory / "c-3.sock", b'{"ok":{"summary":7}}\n'),
    ):
        assert looking.status() == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines == [
            str(directory / "a-1.sock"),
            r"too \x7f busy",
            "",
            "dht (process 7), up 2 h",
            "  restarts  none",
            "",
            f"what {directory / 'c-3.sock'} answers is not understood",
        ]
        assert looking.status(as_json=True) == 1
        document = json.loads(capsys.readouterr().out)
        assert [sorted(each)[:2] for each in document["programs"]] == [
            ["control", "error"],
            ["actors", "command"],
            ["control", "summary"],
        ]


def test_one_that_never_answers(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "TIMEOUT", 0.05)
    directory.mkdir()
    path = directory / "proxy-1.sock"
    with (
        socket.create_server(str(path), family=socket.AF_UNIX),
        pytest.raises(RemoteError, match=r"did not answer within 0\.05 s"),
    ):
        looking.status(target=str(path))


def test_one_that_never_ends(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = directory / "proxy-1.sock"
    long = {"v": 1, "id": 1, "ok": {"text": "x" * 200_000}}
    with stranger(path, json.dumps(long).encode() + b"\n"):
        assert looking.status(target=str(path), as_json=True) == 0
        monkeypatch.setattr(looking, "MAX_ANSWER", 100_000)
        with pytest.raises(RemoteError, match="not understood"):
            looking.status(target=str(path))


def test_one_that_drips(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "TIMEOUT", 0.2)
    path = directory / "proxy-1.sock"
    with (
        stranger(path, b"x", drips=True),
        pytest.raises(RemoteError, match=r"did not answer within 0\.2 s"),
    ):
        looking.status(target=str(path))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
nodes = st.fixed_dictionaries(
    {"id": json_values, "actor": json_values, "state": json_values},
    optional={"restarts": json_values, "last_reason": json_values, "since": st.floats(0, 1e9)},
)


def objects(**values: Any) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({}, optional=values)


answers = objects(
    command=st.sampled_from(["proxy", "service", "registry", "dht"]) | json_values,
    pid=json_values,
    uptime=st.floats(0, 1e9) | json_values,
    summary=st.dictionaries(st.text(max_size=5), json_values) | json_values,
    actors=st.dictionaries(st.text(max_size=5), st.dictionaries(st.text(max_size=5), json_values)),
    tree=st.builds(
        lambda node, below: node | {"children": below}, nodes, st.lists(nodes, max_size=3)
    ),
    proxies=st.lists(
        objects(role=json_values, path=json_values, rows=st.lists(objects(state=json_values))),
        max_size=2,
    ),
)


@given(answers)
@settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_whatever_is_answered_is_shown_in_printable_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ok: Any
) -> None:
    monkeypatch.setattr(looking, "_ask", lambda *_: ok)
    verbose = partial(looking.status, verbose=True)
    for command in (looking.status, verbose, looking.tree, looking.why, COMMANDS[3]):
        capsys.readouterr()
        with suppress(LocalError):
            # There may be no proxy.
            assert command(target="/somewhere") in (0, 1)
        assert all(line.isprintable() for line in capsys.readouterr().out.split("\n"))


# Start-up


def test_nothing_heavy_is_loaded_before_it_is_needed() -> None:
    program = (
        "import sys, hyperseaport.commands.looking, hyperseaport.commands.listing\n"
        "print(*sorted({'rich', 'platformdirs', 'thespian', 'asyncio'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == []
