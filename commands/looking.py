"""What `status`, `tree`, `why` and `kill` do: ask the running programs of this user through their
control sockets (`actors.control`), and show the answers.

Each function returns the command's exit code.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from ..actors.runtime_files import runtime_directory, sockets
from ..transport.errors import HyperseaportError, InvalidInput, LocalError, RemoteError
from .output import clean, document, heading, say, seconds, short, table
from .status import show as show_status

VERSION = 1
#: Seconds for a program to answer, which it does or says why not within 10.
TIMEOUT = 15.0
#: Bytes of an answer: a thousand actors and instances have a megabyte.
MAX_ANSWER = 16 << 20

Fields = Mapping[str, Any]


class _Answer(Struct, frozen=True):
    """What a program says, or why there is no answer."""

    path: Path
    ok: Fields
    error: str = ""

    @property
    def title(self) -> str:
        if "command" in self.ok:
            return f"{self.ok['command']} (process {self.ok.get('pid')})"
        return str(self.path)

    @property
    def json(self) -> Fields:
        result = {"error": self.error} if self.error else self.ok
        return {"control": str(self.path), **result}


def status(*, as_json: bool = False, verbose: bool = False, target: str | None = None) -> int:
    """What each program is and does: a few lines, and with ``verbose`` or as JSON also all that its
    actors show.

    Raises LocalError: no program runs.
    """
    return _show(
        _ask_all(target, {"do": "status"}), as_json, lambda answer: show_status(answer.ok, verbose)
    )


def tree(*, as_json: bool = False, target: str | None = None) -> int:
    """The living actors of each program, how often each was restarted, and why.

    Raises LocalError: no program runs.
    """
    return _show(_ask_all(target, {"do": "tree"}), as_json, _tree)


def why(role: str | None = None, *, as_json: bool = False, target: str | None = None) -> int:
    """Why each proxy, or those for a role, takes each instance or passes it over.

    Raises LocalError: no program runs, or none of them is such a proxy.
    """
    answers = [
        each
        for each in _ask_all(target, {"do": "why", "role": role or ""})
        if each.error or each.ok.get("proxies")
    ]
    if not answers:
        raise LocalError(
            f"no proxy for {clean(role)} runs here: see `status` for those that do"
            if role
            else "no proxy runs here: start one, or give --control PATH"
        )
    return _show(answers, as_json, _why)


def kill(path: str, *, as_json: bool = False, target: str | None = None) -> int:
    """Kill an actor of the only program that runs, or of that at ``target``.

    Raises InvalidInput: there are several programs.
    Raises LocalError: no program runs, or it has no such actor.
    """
    programs = _programs(target)
    if len(programs) > 1:
        names = ", ".join(clean(each) for each in programs)
        raise InvalidInput(f"{len(programs)} programs run, choose one with --control: {names}")
    ok = _ask(programs[0], {"do": "kill", "path": path})
    if as_json:
        document({"control": str(programs[0]), **ok})
    else:
        say(f"killed {clean(ok.get('killed'))}")
    return 0


# Asking


def _ask_all(target: str | None, request: Fields) -> list[_Answer]:
    """Of a program that is asked alone, the error is raised."""
    programs = _programs(target)
    if target is not None:
        return [_Answer(programs[0], _ask(programs[0], request))]
    answers = []
    for path in programs:
        try:
            answers.append(_Answer(path, _ask(path, request)))
        except HyperseaportError as error:
            answers.append(_Answer(path, {}, str(error)))
    return answers


def _programs(target: str | None) -> list[Path]:
    if target is not None:
        return [Path(target)]
    found = [path for path in sockets(runtime_directory()) if _listens(path)]
    if not found:
        raise LocalError("no hyperseaport of yours runs here: start one, or give --control PATH")
    return found


def _listens(path: Path) -> bool:
    """It is no leftover of a program that died."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(TIMEOUT)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            pass
    return True


def _ask(path: Path, request: Fields) -> Fields:
    """What a program answers.

    Raises LocalError: nobody listens there, or it cannot do what it was asked.
    Raises RemoteError: what listens there is no program of ours, or it is stuck.
    """
    line = json.dumps({"v": VERSION, "id": 1, **request}).encode() + b"\n"
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT)
            connection.connect(str(path))
            connection.sendall(line)
            answer = json.loads(_read_line(connection))
    except TimeoutError as error:
        raise RemoteError(f"{clean(path)} did not answer within {TIMEOUT:g} s") from error
    except OSError as error:
        reason = error.strerror or error
        raise LocalError(f"cannot ask {clean(path)} ({reason}): see `status`") from error
    except (ValueError, RecursionError) as error:
        raise RemoteError(f"what {clean(path)} answers is not understood") from error
    if isinstance(answer, dict) and isinstance(answer.get("error"), str):
        raise LocalError(clean(answer["error"]))
    if not isinstance(answer, dict) or not isinstance(answer.get("ok"), dict):
        raise RemoteError(f"what {clean(path)} answers is not understood")
    ok: Fields = answer["ok"]
    return ok


def _read_line(connection: socket.socket) -> bytes:
    """Up to the first line end. Raises ValueError: there is none, or it does not come in sight."""
    end = time.monotonic() + TIMEOUT
    received = bytearray()
    while chunk := connection.recv(1 << 16):
        received += chunk
        if b"\n" in chunk:
            return bytes(received.partition(b"\n")[0])
        if len(received) > MAX_ANSWER:
            break
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
    raise ValueError("no line end")


# Showing


def _show(answers: list[_Answer], as_json: bool, show: Callable[[_Answer], None]) -> int:
    """Returns 1 if any of the programs did not answer as it should."""
    if as_json:
        document({"programs": [each.json for each in answers]})
        return 1 if any(each.error for each in answers) else 0
    shown = True
    for number, answer in enumerate(answers):
        if number:
            say()
        shown &= _show_one(answer, show)
    return 0 if shown else 1


def _show_one(answer: _Answer, show: Callable[[_Answer], None]) -> bool:
    if answer.error:
        heading(answer.title)
        say(clean(answer.error))
        return False
    try:
        show(answer)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError):
        say(f"what {clean(answer.path)} answers is not understood")
        return False
    return True


def _tree(answer: _Answer) -> None:
    heading(answer.title)
    rows = list(_branches(answer.ok["tree"], 0))
    table(("ACTOR", "CLASS", "STATE", "RESTARTS", "AGE", "LAST FAILURE"), rows)


def _branches(root: Fields, depth: int) -> Iterator[tuple[object, ...]]:
    # A stack rather than recursion: nobody knows who answers.
    left: list[tuple[Fields | int, int]] = [(root, depth)]
    while left:
        node, depth = left.pop()
        indent = "  " * depth
        if isinstance(node, int):
            yield (f"{indent}and {node} more", "", "", "", "", "")
            continue
        state = str(node["state"])
        if node.get("restarts_in") is not None:
            state += f" {seconds(node['restarts_in'])}"
        restarts = node["restarts"] or ""
        reason = node.get("error") or node["last_reason"]
        yield (indent + node["id"], node["actor"], state, restarts, seconds(node["since"]), reason)
        if node.get("more"):
            left.append((int(node["more"]), depth + 1))
        left += [(child, depth + 1) for child in reversed(node.get("children", ()))]


#: What the time until a path was there is called, for each kind of path.
_PATHS = {"punched": "punch", "relayed": "relay"}


def _last(row: Fields) -> str:
    """Where the milliseconds of the last connection went; parts that took none are left out."""
    last = row["last"]
    how = str(last["path"])
    parts = (
        ("waiting", last["wait_ms"]),
        ("lookup", last["lookup_ms"]),
        ("handshake", last["handshake_ms"]),
        (_PATHS.get(how, "path"), last["path_ms"]),
        ("first byte", last["first_byte_ms"]),
    )
    said = ", ".join(f"{name} {each:.0f}" for name, each in parts if each >= 0.5)
    return clean(
        f"{short(row['key'])}: opened {seconds(row['worked_ago'])} ago in "
        f"{last['total_ms']:.0f} ms: {said or 'no part took long'} ({how})"
    )


def _why(answer: _Answer) -> None:
    for number, proxy in enumerate(answer.ok["proxies"]):
        if number:
            say()
        heading(f"{answer.title}: {proxy['role'] or proxy['path']}")
        if not proxy["rows"]:
            say("no instance is known")
            continue
        rows = [
            (
                row.get("state", ""),
                f"{row.get('role', '')}@{row.get('version', '')}",
                short(row.get("key", "")),
                "yes" if row.get("verified") else "no",
                row.get("connections", ""),
                row.get("failures", ""),
                seconds(row.get("retry_in")),
                row.get("reason", ""),
            )
            for row in proxy["rows"]
        ]
        headers = ("STATE", "SERVICE", "KEY", "VERIFIED", "IN USE", "FAILED", "RETRY IN", "WHY")
        table(headers, rows)
        for row in proxy["rows"]:
            if row.get("last"):
                say(_last(row))
        if proxy.get("more"):
            say(f"and {int(proxy['more'])} more")
