"""The control actor: lets the user of this machine look into the running program.

It listens on a Unix socket that nobody else can reach, and talks JSON, an object a line:

    {"v": 1, "id": 7, "do": "status"}               what the program is, what its actors show, and
                                                    what was restarted
    {"v": 1, "id": 7, "do": "tree"}                 supervisors and their children, nested
    {"v": 1, "id": 7, "do": "why", "role": "a@1.x"} why a proxy takes or passes over each instance;
                                                    of all proxies without "role"
    {"v": 1, "id": 7, "do": "describe", "path": "/node/endpoint"}
    {"v": 1, "id": 7, "do": "kill", "path": "/node/endpoint"}

    {"v": 1, "id": 7, "ok": ...}   or   {"v": 1, "id": 7, "error": "one line"}

A client's requests are answered one after the other. What a client does harms nobody but itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from msgspec import Struct

from ..supervisor import Children, ChildStatus, Supervisor, WhichChildren
from .actor import (
    KILLED,
    Actor,
    ActorAddress,
    ActorGone,
    Address,
    CallTimeout,
    InvalidInput,
    LocalError,
    handles,
)
from .cell import Cell
from .messages import Describe, Described, Explain, Explained, Measure, Measured
from .runtime_files import bind, own_directory, sweep

VERSION = 1
#: Bytes of a request, its line end not counted.
MAX_LINE = 64 * 1024
#: At a time: people, their scripts, and what they forgot to end.
MAX_CLIENTS = 32
#: Actors in an answer: a program has some twenty beside its pipes and sessions.
MAX_NODES = 1000
#: Children that are shown of a supervisor that may have very many.
FEW = 5
#: Instances that are shown of one proxy.
MAX_ROWS = 1000
#: Actors whose last failure `status` tells.
MAX_FAILURES = 20
#: Characters of a text that came from elsewhere, such as the reason of a failure.
MAX_TEXT = 1000
#: Seconds for one actor to answer, and for one request; an actor that lives takes milliseconds.
ASK = 1.0
ANSWER = 10.0
#: Seconds in which a client must have read what does not fit the socket's buffer.
PATIENCE = 5.0

Answer = dict[str, Any]
Rows = tuple[Mapping[str, Any], ...]


class ControlArgs(Struct, frozen=True):
    """Where the socket is made, the name of the command that runs, and what it says of itself: JSON
    values, no secrets."""

    path: Path
    command: str
    summary: Mapping[str, Any]


class _Listening(Struct, frozen=True):
    pass


class _Kill(Struct, frozen=True):
    address: ActorAddress


class Control(Actor):
    """Args: `ControlArgs`. Without a socket, which it logs, it serves nobody and lives on."""

    def on_start(self, args: ControlArgs) -> None:
        self._args = args
        self._clients: set[_Client] = set()
        try:
            own_directory(args.path.parent)
            sweep(args.path.parent, args.command)
            bound = bind(args.path)
        except LocalError as error:
            self.log.warning("no control socket", reason=str(error))
            self.ready()
            return
        self.own(bound.close)
        made = args.path.lstat()
        self.own(lambda: _remove(args.path, made))
        self.run(self._listen(bound), lambda _none: _Listening())

    async def _listen(self, bound: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(
            lambda: _Client(self._admit, self._take), sock=bound, start_serving=False
        )
        self.own(self._drop_clients)
        self.own(server.close)
        await server.start_serving()

    @handles(_Listening)
    def _listening(self, _message: _Listening, _sender: ActorAddress) -> None:
        self.log.info("control socket", path=str(self._args.path))
        self.ready()

    # Clients

    def _admit(self, client: _Client) -> bool:
        self._clients = {each for each in self._clients if not each.gone}
        if len(self._clients) >= MAX_CLIENTS:
            return False
        self._clients.add(client)
        return True

    def _take(self, client: _Client, line: bytes) -> None:
        self.run(self._reply(client, line))

    def _drop_clients(self) -> None:
        for client in self._clients:
            client.abort()

    async def _reply(self, client: _Client, line: bytes) -> None:
        answer: Answer = {"v": VERSION, "id": None}
        try:
            request = _parse(line, answer)
            async with asyncio.timeout(ANSWER):
                answer["ok"] = await self._do(request)
        except (LocalError, ActorGone, CallTimeout) as error:
            answer["error"] = str(error)
        except TimeoutError:
            answer["error"] = f"it took more than {ANSWER:g} s"
        except Exception as error:
            # Whoever looks in must not bring down what it looks at: a few crashes of this actor
            # would be too many for the root.
            self.log.exception("request failed")
            answer["error"] = f"this is a defect: {type(error).__name__}: {error}"
        client.answer(answer)

    async def _do(self, request: Mapping[str, Any]) -> Answer:
        match request.get("do"):
            case "status":
                return await self._status()
            case "tree":
                return self._program() | {"tree": (await self._survey(FEW)).root}
            case "why":
                return await self._why(_text(request, "role"))
            case "describe":
                return await self._show(self._find(_text(request, "path")))
            case "kill":
                return self._kill(_text(request, "path"))
            case _:
                raise InvalidInput('"do" is status, tree, why, describe or kill')

    # What is asked for

    async def _status(self) -> Answer:
        survey = await self._survey(0)
        able = {path: each for path, each in survey.actors.items() if _shows(each)}
        answers = await asyncio.gather(*(self._show(each) for each in able.values()))
        shown = {path: fields for path, fields in zip(able, answers, strict=True) if fields}
        counts = {path: {"children": count} for path, count in survey.counts.items()}
        choices = [
            {"path": path} | _choice(rows)
            for path, address in survey.actors.items()
            if (rows := await self._explained(address)) is not None
        ]
        return self._program() | {
            "uptime": survey.root["since"],
            "summary": dict(self._args.summary),
            "actors": shown | counts,
            "choices": choices,
            "restarts": survey.restarts,
            "failures": sorted(survey.failures, key=lambda each: each["since"])[:MAX_FAILURES],
        }

    async def _why(self, role: str) -> Answer:
        proxies = []
        for path, address in (await self._survey(0)).actors.items():
            if not _takes(address, Explain):
                continue
            fields = await self._show(address)
            name = _role(fields) or str(self._args.summary.get("role", ""))
            if role and role not in (name, name.partition("@")[0]):
                continue
            explained = await self._explained(address)
            if explained is not None:
                rows = explained[:MAX_ROWS]
                more = len(explained) - len(rows)
                proxies.append({"path": path, "role": name, "rows": rows, "more": more})
        return self._program() | {"proxies": proxies}

    def _kill(self, path: str) -> Answer:
        address = self._find(path)
        # When the answer is on its way: this actor may be among those that die.
        self.after(0.0, _Kill(address))
        return self._program() | {"killed": address.path}

    @handles(_Kill)
    def _kill_now(self, message: _Kill, _sender: ActorAddress) -> None:
        cell = _cell(message.address)
        if cell is not None:
            self.log.warning("killed by request", path=cell.address.path)
            cell.system.terminate(cell, KILLED)

    def _program(self) -> Answer:
        return {"command": self._args.command, "pid": os.getpid()}

    def _find(self, path: str) -> Address:
        address = self.whereis(path)
        if address is None:
            raise LocalError(f"no actor lives at {path[:200]!r}: see `tree` for those that do")
        return cast(Address, address)

    # Other actors

    async def _show(self, address: ActorAddress) -> Answer:
        """What an actor shows of itself; nothing if it has nothing to show, or does not answer."""
        fields: Answer = {}
        if _takes(address, Describe):
            described = await self._ask(address, Describe())
            if isinstance(described, Described):
                fields |= described.fields
        if _takes(address, Measure):
            measured = await self._ask(address, Measure())
            if isinstance(measured, Measured):
                fields["metrics"] = dict(measured.values)
        return fields

    async def _explained(self, address: ActorAddress) -> Rows | None:
        """What a resolver says of the instances that it knows; None of all others."""
        if not _takes(address, Explain):
            return None
        explained = await self._ask(address, Explain())
        return explained.rows if isinstance(explained, Explained) else None

    async def _ask(self, address: ActorAddress, message: object) -> object:
        with suppress(ActorGone, CallTimeout):
            return await self.call(address, message, ASK)
        return None

    async def _survey(self, few: int) -> _Survey:
        """The whole tree, supervisor by supervisor, with so many children at most of those that may
        have very many."""
        path = "/" + self.path.split("/")[1]
        root = self.whereis(path)
        survey = _Survey(path)
        level = [(root, survey.root)] if root is not None else []
        while level:
            asked = (self._ask(address, WhichChildren(few)) for address, _ in level)
            answers = await asyncio.gather(*asked)
            level = [
                supervisor
                for (_, node), children in zip(level, answers, strict=True)
                for supervisor in survey.add(node, children)
            ]
        return survey


class _Survey:
    """The tree as JSON, and who is in it."""

    def __init__(self, path: str) -> None:
        self.root: Answer = _node(path[1:], path, Supervisor) | {"since": 0.0}
        #: Those that are no supervisors, by path, the name of the root left out.
        self.actors: dict[str, ActorAddress] = {}
        #: How many children each supervisor has that may have very many, by path likewise.
        self.counts: dict[str, int] = {}
        #: Of all that are shown, and of those among them that have failed: path, restarts, how
        #: they failed last, and the seconds since they were last started.
        self.restarts = 0
        self.failures: list[Answer] = []
        self._left = MAX_NODES - 1

    def add(self, node: Answer, answer: object) -> Iterator[tuple[ActorAddress, Answer]]:
        """Put the children below their supervisor. Yields those that are supervisors."""
        if not isinstance(answer, Children):
            node["error"] = "it did not answer"
            return
        if node is self.root:
            node |= {"state": answer.state, "since": round(answer.since, 3)}
        shown = answer.children[: self._left]
        self._left -= len(shown)
        node["strategy"] = answer.strategy
        node["children"] = []
        node["more"] = answer.more + len(answer.children) - len(shown)
        if answer.strategy == "simple_one_for_one":
            self.counts[_short(node["path"])] = len(answer.children) + answer.more
        for status in shown:
            child = _node(status.id, f"{node['path']}/{status.id}", status.actor) | _fate(status)
            node["children"].append(child)
            self._count(child)
            if status.address is None:
                continue
            if issubclass(status.actor, Supervisor):
                yield status.address, child
            else:
                self.actors[_short(child["path"])] = status.address

    def _count(self, child: Answer) -> None:
        self.restarts += child["restarts"]
        if child["last_reason"]:
            shown = {name: child[name] for name in ("restarts", "last_reason", "since")}
            self.failures.append({"path": _short(child["path"])} | shown)


class _Client(asyncio.Protocol):
    """One connection, whose requests are read when the one before is answered."""

    def __init__(
        self,
        admit: Callable[[_Client], bool],
        take: Callable[[_Client, bytes], None],
    ) -> None:
        self._admit = admit
        self._take = take
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        # A request is being answered.
        self._busy = False
        self._ended = False
        # Runs while it has not read what it was sent.
        self._patience: asyncio.TimerHandle | None = None

    @property
    def gone(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def answer(self, answer: Answer) -> None:
        self._busy = False
        if self._transport is None or self.gone:
            return
        # What an actor shows should be JSON. If it is not, its text is better than nothing.
        self._transport.write(json.dumps(answer, default=str).encode() + b"\n")
        if self._patience is None:
            self._transport.resume_reading()
            self._proceed()

    # asyncio's part

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=0)
        if not self._admit(self):
            self._refuse(f"{MAX_CLIENTS} clients are connected, which is the limit: try later")

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._proceed()

    def eof_received(self) -> bool:
        self._ended = True
        self._proceed()
        # Its last answer is still to come.
        return True

    def pause_writing(self) -> None:
        if self._transport is not None:
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(PATIENCE, self._transport.abort)

    def resume_writing(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        if self._transport is not None and not self.gone:
            self._transport.resume_reading()
            self._proceed()

    def connection_lost(self, _error: Exception | None) -> None:
        if self._patience is not None:
            self._patience.cancel()

    def _proceed(self) -> None:
        transport = self._transport
        if transport is None or self.gone or self._busy or self._patience is not None:
            return
        end = self._buffer.find(b"\n", 0, MAX_LINE + 1)
        if end >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            transport.pause_reading()
            self._busy = True
            self._take(self, line)
        elif len(self._buffer) > MAX_LINE:
            self._refuse(f"a request has at most {MAX_LINE} bytes")
        elif self._ended:
            transport.close()

    def _refuse(self, text: str) -> None:
        if self._transport is not None:
            error = {"v": VERSION, "id": None, "error": text}
            self._transport.write(json.dumps(error).encode() + b"\n")
            self._transport.close()


def _parse(line: bytes, answer: Answer) -> Mapping[str, Any]:
    """A request; its id goes into the answer, also when the rest cannot be understood.

    Raises InvalidInput.
    """
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise InvalidInput("this is not JSON") from None
    if not isinstance(request, dict):
        raise InvalidInput("a request is a JSON object")
    number = request.get("id")
    if isinstance(number, str | int) and len(str(number)) <= 64:
        answer["id"] = number
    elif number is not None:
        raise InvalidInput('"id" is a short text or number')
    if request.get("v") != VERSION:
        raise InvalidInput(f'this program speaks version {VERSION}: say "v": {VERSION}')
    return request


def _text(request: Mapping[str, Any], name: str) -> str:
    text = request.get(name, "")
    if not isinstance(text, str):
        raise InvalidInput(f'"{name}" is a text')
    return text


def _cell(address: ActorAddress) -> Cell | None:
    target = address.target if isinstance(address, Address) else None
    return target if isinstance(target, Cell) else None


def _takes(address: ActorAddress, message_type: type) -> bool:
    """The actor lives and has a handler of its own for this type of message."""
    cell = _cell(address)
    if cell is None or not issubclass(cell.actor_class, Actor):
        return False
    return cell.actor_class._handlers.get(message_type) is not None


def _shows(address: ActorAddress) -> bool:
    return _takes(address, Describe) or _takes(address, Measure)


def _role(fields: Mapping[str, Any]) -> str:
    """Of a resolver: its `role` and `range`, as the command line has them."""
    role, wanted = fields.get("role"), fields.get("range")
    return f"{role}@{wanted}" if role and wanted else str(role or "")


def _choice(rows: Rows) -> Answer:
    """How many instances are in which state, and those of them that matter now: new connections go
    there, or some are open."""
    used = [each for each in rows if each.get("state") == "taken" or each.get("connections")]
    return {
        "states": dict(Counter(str(each.get("state")) for each in rows)),
        "used": used[:FEW],
        "more": max(len(used) - FEW, 0),
    }


def _short(path: str) -> str:
    """A path without the name of the root."""
    return path[path.find("/", 1) :] if path.count("/") > 1 else "/"


def _node(name: str, path: str, actor: type[Actor]) -> Answer:
    return {
        "id": name,
        "path": path,
        "actor": actor.__name__,
        "state": "serving",
        "since": 0.0,
        "restarts": 0,
        "last_reason": "",
    }


def _fate(status: ChildStatus) -> Answer:
    soon = status.restarts_in
    return {
        "state": status.state,
        "since": round(status.since, 3),
        "restarts": status.restarts,
        "last_reason": status.last_reason[:MAX_TEXT],
    } | ({} if soon is None else {"restarts_in": round(soon, 3)})


def _remove(path: Path, made: os.stat_result) -> None:
    """Remove the socket, unless it is somebody else's by now."""
    with suppress(OSError):
        if path.lstat().st_ino == made.st_ino:
            path.unlink()
