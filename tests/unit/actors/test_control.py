"""The control socket: who may use it, what it answers, and that nobody harms anybody through it."""

from __future__ import annotations

import asyncio
import json
import os
import select
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.control import ROWS, Endpoint, program, proxy_node, resolver, rest
from support.running import run
from support.waiting import until

from hyperseaport.actors import control
from hyperseaport.actors.actor import Actor, ActorAddress, handles
from hyperseaport.actors.control import MAX_CLIENTS, MAX_LINE, MAX_NODES, Control
from hyperseaport.actors.messages import (
    Describe,
)
from hyperseaport.actors.runtime_files import control_path
from hyperseaport.supervisor import ChildSpec, StartChild, Supervisor, WhichChildren


class Silent(Actor):
    """Never answers."""

    @handles(Describe)
    def _describe(self, _message: Describe, _sender: ActorAddress) -> None:
        pass


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    @asynccontextmanager
    async def to(cls, path: Path) -> AsyncIterator[Self]:
        reader, writer = await asyncio.open_unix_connection(path, limit=1 << 24)
        try:
            yield cls(reader, writer)
        finally:
            writer.transport.abort()

    async def line(self) -> Any:
        line = await self.reader.readline()
        return json.loads(line) if line else None

    async def say(self, raw: bytes) -> Any:
        self.writer.write(raw + b"\n")
        return await self.line()

    async def ask(self, do: str, **more: Any) -> Any:
        answer = await self.say(json.dumps({"v": 1, "id": 7, "do": do} | more).encode())
        assert (answer["v"], answer["id"]) == (1, 7)
        return answer.get("ok", answer.get("error"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "proxy-1.sock"


# Where it lies


def mode(path: Path) -> int:
    """Kind and permissions of what is there; 0 if there is nothing."""
    try:
        return path.lstat().st_mode
    except OSError:
        return 0


async def test_the_socket_is_the_users_own_and_goes_with_the_program(path: Path) -> None:
    previous = os.umask(0)
    try:
        async with program(path):
            assert mode(path.parent) == stat.S_IFDIR | 0o700
            assert mode(path) == stat.S_IFSOCK | 0o600
    finally:
        os.umask(previous)
    assert not mode(path)


def test_where_it_is_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import platformdirs

    monkeypatch.setattr(platformdirs, "user_runtime_dir", lambda *_, **__: str(tmp_path / "mine"))
    assert control_path("proxy") == tmp_path / "mine" / f"proxy-{os.getpid()}.sock"
    assert control_path("dht", tmp_path) == tmp_path / f"dht-{os.getpid()}.sock"


def leave_socket(path: Path) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def dead_process() -> int:
    """The number of a process that has been and gone."""
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    return child


async def test_sockets_of_dead_processes_are_removed(path: Path) -> None:
    leave_socket(path)
    left = path.with_name(f"proxy-{dead_process()}.sock")
    starting = path.with_name(f"proxy-{os.getppid()}.sock")
    others = path.with_name(f"dht-{dead_process()}.sock")
    for each in (left, starting, others):
        leave_socket(each)
    async with program(path), Client.to(path) as client:
        assert (await client.ask("status"))["command"] == "proxy"
        assert not left.exists()
        # Its process lives, and may be just about to listen.
        assert starting.exists()
        assert others.exists()


def make_public(path: Path) -> None:
    path.parent.mkdir(mode=0o755)
    path.parent.chmod(0o755)


def make_link(path: Path) -> None:
    elsewhere = path.parent.with_name("elsewhere")
    elsewhere.mkdir(mode=0o700)
    path.parent.symlink_to(elsewhere)


def make_file(path: Path) -> None:
    path.parent.write_text("")


def put_file(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.write_text("precious")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (make_public, "others may look into"),
        (make_link, "is not a directory"),
        (make_file, "is not a directory"),
        (put_file, "Address already in use"),
    ],
)
async def test_without_a_safe_place_the_program_runs_on(
    path: Path, spoil: Any, reason: str
) -> None:
    spoil(path)
    with structlog.testing.capture_logs() as entries:
        async with program(path):
            pass
    (warning,) = (each for each in entries if each["log_level"] == "warning")
    assert warning["event"] == "no control socket"
    assert reason in warning["reason"]
    assert (mode(path) and stat.S_ISREG(mode(path))) == (spoil is put_file)


async def test_a_directory_of_somebody_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.parent.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with structlog.testing.capture_logs() as entries:
        async with program(path):
            assert not mode(path)
    assert [each["event"] for each in entries if each["log_level"] == "warning"] == [
        "no control socket"
    ]


async def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100) / ("y" * 100)
    with structlog.testing.capture_logs() as entries:
        async with program(long):
            assert not mode(long)
    assert "too long" in next(e["reason"] for e in entries if e["log_level"] == "warning")


async def test_a_living_programs_socket_is_left_alone(path: Path) -> None:
    async with program(path, proxy_node()):
        with structlog.testing.capture_logs() as entries:
            async with program(path):
                pass
        assert [e["event"] for e in entries if e["log_level"] == "warning"] == ["no control socket"]
        async with Client.to(path) as client:
            assert (await client.ask("status"))["actors"]


# What it answers


async def test_status(path: Path) -> None:
    async with program(path, proxy_node(), role="couchdb@3.x", port=1) as running:
        pipes = running.runtime.find("/node/pipes")
        assert pipes is not None
        for _ in range(3):
            await running.runtime.call(pipes, StartChild())
        async with Client.to(path) as client:
            status = await client.ask("status")
        assert status.pop("uptime") >= 0
        assert status == {
            "command": "proxy",
            "pid": os.getpid(),
            "summary": {"role": "couchdb@3.x", "port": 1},
            "actors": {
                "/node/endpoint": {"address": "127.0.0.1:49737", "metrics": {"channels": 3}},
                "/node/pipes": {"children": 3},
                "/node/proxy:1/resolver": {"role": "couchdb", "range": "3.x"},
            },
            "choices": [
                {
                    "path": "/node/proxy:1/resolver",
                    "states": {"taken": 1},
                    "used": list(ROWS),
                    "more": 0,
                }
            ],
            "restarts": 0,
            "failures": [],
        }
        assert running.runtime.unhandled == 0


async def test_status_tells_which_instances_matter(path: Path) -> None:
    rows = (
        {"state": "taken", "connections": 0},
        *({"state": "candidate", "connections": number} for number in range(8)),
        {"state": "set aside", "connections": 1},
        {"state": "set aside"},
    )
    async with program(path, rest(resolver("a", "1.x", rows))), Client.to(path) as client:
        (choice,) = (await client.ask("status"))["choices"]
    assert choice["states"] == {"taken": 1, "candidate": 8, "set aside": 2}
    assert choice["used"] == [rows[0], *rows[2:6]]
    assert choice["more"] == 4


async def test_status_counts_restarts(path: Path) -> None:
    async with program(path, proxy_node()) as running:
        for name, reason in (("proxy:1/resolver", "it was tired"), ("endpoint", "so was I")):
            victim = running.runtime.find(f"/node/{name}")
            assert victim is not None
            running.runtime.kill(f"/node/{name}", reason)
            await running.runtime.stopped(victim)
        async with Client.to(path) as client:
            status: Any = {"restarts": 0, "actors": {}}
            while "/node/proxy:1/resolver" not in status["actors"]:
                status = await client.ask("status")
    # The endpoint, and with it those after it. The resolver's supervisor is another one by now.
    assert status["restarts"] == 3
    (failure,) = status["failures"]
    assert failure.pop("since") >= 0
    assert failure == {"path": "/node/endpoint", "restarts": 1, "last_reason": "so was I"}


async def test_who_does_not_answer_is_left_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "ASK", 0.01)
    node = proxy_node(ChildSpec("silent", Silent))
    async with program(path, node), Client.to(path) as client:
        status = await client.ask("status")
        assert set(status["actors"]) == {
            "/node/endpoint",
            "/node/pipes",
            "/node/proxy:1/resolver",
        }
        assert await client.ask("describe", path="/node/silent") == {}


async def test_tree(path: Path) -> None:
    async with program(path, proxy_node()) as running:
        runtime = running.runtime
        pipes = runtime.find("/node/pipes")
        assert pipes is not None
        for _ in range(7):
            await runtime.call(pipes, StartChild())
        runtime.kill("/node/proxy:1/resolver", "it was tired")
        async with Client.to(path) as client:
            root = (await client.ask("tree"))["tree"]
    assert (root["id"], root["state"], root["strategy"]) == ("root", "serving", "one_for_one")
    own, node = root["children"]
    assert (own["id"], own["actor"], own["state"]) == ("control", "Control", "serving")
    endpoint, shown_pipes, proxy = node["children"]
    assert endpoint["path"] == "/root/node/endpoint"
    assert ([each["id"] for each in shown_pipes["children"]], shown_pipes["more"]) == (
        ["1", "2", "3", "4", "5"],
        2,
    )
    (fallen,) = proxy["children"]
    assert fallen["actor"] == "Resolver"
    assert (fallen["state"], fallen["restarts"]) == ("serving", 1)
    assert fallen["last_reason"] == "it was tired"
    assert fallen["since"] >= 0


async def test_a_very_wide_tree_is_cut(path: Path) -> None:
    wide = rest(*(ChildSpec(str(number), Endpoint, {}) for number in range(1500)))
    nodes = rest(ChildSpec("wide", Supervisor, wide), ChildSpec("deep", Supervisor, proxy_node()))
    async with program(path, nodes), Client.to(path) as client:
        root = (await client.ask("tree"))["tree"]

    def count(node: Any) -> int:
        return 1 + sum(map(count, node.get("children", ())))

    assert count(root) == MAX_NODES
    shown_wide, deep = root["children"][1]["children"]
    assert shown_wide["more"] == 1500 - len(shown_wide["children"])
    assert (deep["children"], deep["more"]) == ([], 3)


async def test_what_waits_for_its_restart(path: Path) -> None:
    async with program(path, proxy_node()) as running:
        for _ in range(2):
            running.runtime.kill("/node/proxy:1/resolver")
            await running.runtime.call(running.root, WhichChildren())
        async with Client.to(path) as client:
            root = (await client.ask("tree"))["tree"]
    waiting = root["children"][1]["children"][2]["children"][0]
    assert waiting["state"] == "waiting"
    assert 0 <= waiting["restarts_in"] <= 0.1
    assert waiting["last_reason"] == "killed"


@pytest.mark.parametrize(
    ("role", "found"),
    [
        (None, ["/node/a/resolver", "/node/b/resolver"]),
        ("", ["/node/a/resolver", "/node/b/resolver"]),
        ("couchdb", ["/node/a/resolver", "/node/b/resolver"]),
        ("couchdb@3.x", ["/node/a/resolver"]),
        ("couchdb@4.x", []),
        ("couch", []),
    ],
)
async def test_why(path: Path, role: str | None, found: list[str]) -> None:
    node = rest(
        ChildSpec("a", Supervisor, rest(resolver("couchdb", "3.x"))),
        ChildSpec("b", Supervisor, rest(resolver("couchdb", None))),
    )
    async with program(path, node), Client.to(path) as client:
        asked = {} if role is None else {"role": role}
        proxies = (await client.ask("why", **asked))["proxies"]
    assert [each["path"] for each in proxies] == found
    assert all(each["rows"] == list(ROWS) and each["more"] == 0 for each in proxies)
    assert {each["role"] for each in proxies} <= {"couchdb@3.x", "couchdb"}


async def test_why_takes_the_role_from_the_summary_and_has_a_limit(path: Path) -> None:
    node = rest(resolver("", None, ROWS * 1003))
    async with program(path, node, role="redis@7.x"), Client.to(path) as client:
        (proxy,) = (await client.ask("why", role="redis"))["proxies"]
    assert (proxy["role"], len(proxy["rows"]), proxy["more"]) == ("redis@7.x", 1000, 3)


async def test_describe(path: Path) -> None:
    async with program(path, proxy_node()) as running, Client.to(path) as client:
        assert await client.ask("describe", path="/root/node/endpoint") == {
            "address": "127.0.0.1:49737",
            "metrics": {"channels": 3},
        }
        # It has nothing to show, and hears nothing of it.
        assert await client.ask("describe", path="/node/pipes") == {}
        assert "no actor lives at '/nobody'" in await client.ask("describe", path="/nobody")
        assert running.runtime.unhandled == 0


async def test_what_is_not_json_is_shown_as_text(path: Path) -> None:
    node = rest(ChildSpec("endpoint", Endpoint, {"address": ("127.0.0.1", 1), "key": b"\x00"}))
    async with program(path, node), Client.to(path) as client:
        fields = await client.ask("describe", path="/node/endpoint")
    assert fields == {"address": ["127.0.0.1", 1], "key": r"b'\x00'", "metrics": {"channels": 3}}


async def test_a_defect_is_told_and_survived(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_self: Control) -> None:
        raise RuntimeError("never thought of")

    monkeypatch.setattr(Control, "_program", broken)
    async with program(path) as running, Client.to(path) as client:
        address = running.runtime.find("/control")
        with structlog.testing.capture_logs() as entries:
            for _ in range(10):
                text = await client.ask("status")
                assert text == "this is a defect: RuntimeError: never thought of"
        assert [each["event"] for each in entries] == ["request failed"] * 10
        assert running.runtime.find("/control") is address


# Killing


async def test_kill(path: Path) -> None:
    async with program(path, proxy_node()) as running, Client.to(path) as client:
        victim = running.runtime.find("/node/endpoint")
        assert victim is not None
        answer = await client.ask("kill", path="/node/endpoint")
        assert answer["killed"] == "/root/node/endpoint"
        assert (await running.runtime.stopped(victim)).text == "killed"
        endpoint: Any = {"state": "waiting"}
        while endpoint["state"] == "waiting":
            # Until those that depend on it have stopped.
            root = (await client.ask("tree"))["tree"]
            endpoint = root["children"][1]["children"][0]
        assert (endpoint["state"], endpoint["restarts"], endpoint["last_reason"]) == (
            "serving",
            1,
            "killed",
        )


async def test_it_can_kill_itself_and_comes_back(path: Path) -> None:
    async with program(path) as running:
        old = running.runtime.find("/control")
        assert old is not None
        async with Client.to(path) as client:
            assert (await client.ask("kill", path="/control"))["killed"] == "/root/control"
            assert await client.line() is None
        await running.runtime.stopped(old)
        await running.runtime.call(running.root, WhichChildren())
        successor = running.runtime.find("/control")
        assert successor is not None
        await running.runtime.ready(successor)
        async with Client.to(path) as client:
            assert (await client.ask("status"))["command"] == "proxy"


@pytest.mark.parametrize("spared", ["", "/", "//", "/roo", "/root/", "root/x", "/node/nobody"])
async def test_nothing_but_its_own_path_kills_the_root(path: Path, spared: str) -> None:
    async with program(path) as running, Client.to(path) as client:
        assert "no actor lives at" in await client.ask("kill", path=spared)
        assert (await client.ask("tree"))["tree"]["state"] == "serving"
        assert (await client.ask("kill", path="/root"))["killed"] == "/root"
        assert (await running.runtime.stopped(running.root)).text == "killed"
        assert not mode(path)


# Clients that do as they like


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"", "this is not JSON"),
        (b"{", "this is not JSON"),
        (b"\xff\xfe\xff", "this is not JSON"),
        (b"[" * 60_000, "this is not JSON"),
        (b"[]", "a request is a JSON object"),
        (b"{}", "this program speaks version 1"),
        (b'{"v":2,"do":"status"}', "this program speaks version 1"),
        (b'{"v":1}', '"do" is'),
        (b'{"v":1,"do":{}}', '"do" is'),
        (b'{"v":1,"do":"kill"}', "no actor lives at"),
        (b'{"v":1,"do":"kill","path":7}', '"path" is a text'),
        (b'{"v":1,"do":"why","role":[]}', '"role" is a text'),
        (b'{"v":1,"do":"status","id":{}}', '"id" is a short text or number'),
        (b'{"v":1,"do":"status","id":"%s"}' % (b"x" * 65), '"id" is a short text or number'),
        (b'{"v":1,"do":"status","id":1e999}', '"id" is a short text or number'),
        (b"x" * MAX_LINE, "this is not JSON"),
    ],
)
async def test_nonsense_gets_an_error_line_and_may_go_on(
    path: Path, line: bytes, says: str
) -> None:
    async with program(path), Client.to(path) as client:
        answer = await client.say(line)
        assert says in answer["error"]
        assert (answer["v"], answer["id"]) == (1, None)
        assert (await client.ask("status"))["command"] == "proxy"


async def test_an_error_bears_the_id(path: Path) -> None:
    async with program(path), Client.to(path) as client:
        answer = await client.say(b'{"v":1,"id":"mine","do":"dance"}')
        assert answer["id"] == "mine"


async def test_requests_are_answered_in_order(path: Path) -> None:
    async with program(path, proxy_node()), Client.to(path) as client:
        numbers = range(500)
        for number in numbers:
            request = {"v": 1, "id": number, "do": "status" if number % 100 == 0 else "nothing"}
            client.writer.write(json.dumps(request).encode() + b"\n")
        assert [(await client.line())["id"] for _ in numbers] == [*numbers]


async def test_who_has_said_all_still_gets_the_answer(path: Path) -> None:
    async with program(path), Client.to(path) as client:
        client.writer.write(b'{"v":1,"id":1,"do":"status"}\n{"half a line')
        client.writer.write_eof()
        assert (await client.line())["ok"]["command"] == "proxy"
        assert await client.line() is None


@pytest.mark.parametrize("end", [b"", b"\n"])
async def test_an_endless_line_ends_the_connection(path: Path, end: bytes) -> None:
    async with program(path), Client.to(path) as client:
        client.writer.write(b"x" * (MAX_LINE + 1) + end)
        answer = await client.line()
        assert answer["error"] == "a request has at most 65536 bytes"
        assert await client.line() is None


async def test_too_many_clients(path: Path) -> None:
    async with program(path):
        clients = [await asyncio.open_unix_connection(path) for _ in range(MAX_CLIENTS)]
        for reader, writer in clients:
            writer.write(b"\n")
            await reader.readline()
        async with Client.to(path) as one_too_many:
            assert "32 clients" in (await one_too_many.line())["error"]
            assert await one_too_many.line() is None
        reader, writer = clients.pop()
        writer.close()
        await writer.wait_closed()
        async with Client.to(path) as client:
            assert (await client.ask("status"))["command"] == "proxy"
        for _, writer in clients:
            writer.transport.abort()


async def test_who_does_not_read_is_dropped(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "PATIENCE", 0.05)
    big = rest(ChildSpec("endpoint", Endpoint, {"text": "x" * (1 << 22)}))
    loop = asyncio.get_running_loop()
    async with program(path, big):
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.setblocking(False)
            await loop.sock_connect(deaf, str(path))
            await loop.sock_sendall(deaf, b'{"v":1,"do":"status"}\n')
            # What it reads in the end is not the whole answer.
            await until_hung_up(deaf)
            received = b""
            while chunk := await loop.sock_recv(deaf, 1 << 20):
                received += chunk
            assert 0 < len(received) < 1 << 22
        async with Client.to(path) as client:
            assert len((await client.ask("status"))["actors"]["/node/endpoint"]["text"]) == 1 << 22


async def test_who_does_not_read_cannot_fill_the_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "PATIENCE", 0.2)
    big = rest(ChildSpec("endpoint", Endpoint, {"text": "x" * (1 << 22)}))

    def flood() -> int:
        """How much of 64 MiB it gets rid of before it is dropped."""
        sent = 0
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.settimeout(10.0)
            deaf.connect(str(path))
            deaf.sendall(b'{"v":1,"do":"status"}\n')
            while sent < 1 << 26:
                try:
                    sent += deaf.send(b"\n" * (1 << 16))
                except ConnectionError:
                    break
        return sent

    async with program(path, big):
        assert await asyncio.to_thread(flood) < 1 << 21


async def test_who_leaves_in_the_middle_makes_room(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "ASK", 0.05)
    monkeypatch.setattr(control, "MAX_CLIENTS", 1)

    async def requests() -> list[Any]:
        return [task for task in asyncio.all_tasks() if task.get_name() == "/root/control"]

    async def no_requests() -> bool:
        return not await requests()

    async with program(path, proxy_node(ChildSpec("silent", Silent))):
        for _ in range(3):
            async with Client.to(path) as client:
                client.writer.write(b'{"v":1,"do":"status"}\n')
                await until(requests, "a request is under way", deadline=10.0, every=0.001)
            # Its end is seen when there is an answer to write.
            await until(no_requests, "the request is over", deadline=10.0, every=0.001)
        async with Client.to(path) as client:
            assert (await client.ask("tree"))["tree"]["state"] == "serving"


async def until_hung_up(connection: socket.socket) -> None:
    """Until the other side is gone, reading nothing."""
    poll = select.poll()
    poll.register(connection, 0)
    assert await asyncio.to_thread(poll.poll, 10_000)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
requests = st.fixed_dictionaries(
    {},
    optional={
        "v": st.just(1) | json_values,
        "id": json_values,
        "do": st.sampled_from(["status", "tree", "why", "describe", "kill"]) | json_values,
        "path": st.sampled_from(["/", "/node", "/control/x", ".."]) | json_values,
        "role": json_values,
    },
).map(lambda request: json.dumps(request).encode())
lines = st.lists(st.binary(max_size=200) | requests, max_size=8)


@given(lines)
@settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_it_survives_whatever_comes(tmp_path: Path, said: list[bytes]) -> None:
    path = tmp_path / "run" / "proxy-1.sock"

    async def talk() -> None:
        node = rest(resolver("couchdb", "3.x"))
        async with program(path, node) as running:
            address = running.runtime.find("/control")
            async with Client.to(path) as client:
                for each in said:
                    client.writer.write(each + b"\n")
                client.writer.write_eof()
                while (answer := await client.line()) is not None:
                    assert set(answer) in ({"v", "id", "ok"}, {"v", "id", "error"})
                    assert answer["v"] == 1
            async with Client.to(path) as client:
                assert (await client.ask("status"))["command"] == "proxy"
            assert running.runtime.find("/control") is address
            assert running.root.alive

    run(talk())
