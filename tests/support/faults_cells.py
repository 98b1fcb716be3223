"""One cell of the fault matrix: hurt one actor while transfers run, and see that what should happen
does, and nothing else."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from . import faults
from .faults import Orders, Program, World, observed, restart_after
from .faults_transfers import Transfer

#: Transfers that run, each in both directions.
TRANSFERS = 20
#: Bytes of each, each way: to begin with, before the fault, under way in that very moment, after.
#: Those that no fault ends run on through all the faults of an actor.
FIRST, BEFORE, UNDER_WAY, AFTER = 65_536, 131_072, 131_072, 65_536

#: What is done to an actor, as the document says it.
IDLE = "killed while all is quiet"
BUSY = "killed in mid-stream"
HANDLER = "a handler raises"
TASK = "an owned task raises"
HANG = "hangs"
FAULTS = (IDLE, BUSY, HANDLER, TASK, HANG)

#: Every kind of actor of the four trees; N, KEY and PORT stand for what differs from run to run.
KINDS: dict[str, tuple[str, ...]] = {
    "registry": (
        "console",
        "control",
        "node",
        "node/endpoint",
        "node/registry",
        "node/registry/table",
        "node/registry/sessions",
        "node/registry/sessions/N",
        "node/registry/server",
        "node/registry/replica",
    ),
    "service": (
        "console",
        "control",
        "node",
        "node/endpoint",
        "node/pipes",
        "node/pipes/N",
        "node/links",
        "node/links/KEY",
        "node/link",
        "node/service:ROLE",
        "node/service:ROLE/listener",
        "node/service:ROLE/health",
        "node/service:ROLE/announcement",
    ),
    "proxy": (
        "console",
        "control",
        "node",
        "node/endpoint",
        "node/pipes",
        "node/pipes/N",
        "node/links",
        "node/links/KEY",
        "node/link",
        "node/proxy:PORT",
        "node/proxy:PORT/resolver",
        "node/proxy:PORT/listener",
    ),
    "relay": (
        "console",
        "control",
        "node",
        "node/endpoint",
        "node/relay",
        "node/relay/books",
        "node/relay/sessions",
        "node/relay/sessions/N",
        "node/relay/listener",
    ),
}
_PATTERNS = {"N": r"\d+", "KEY": "[0-9a-f]{8}", "PORT": r"\d+", "ROLE": "[^/]+"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one fault led to, in words that are the same in each run."""

    transfers: str
    restarted: str
    #: What happened to a client that connected in that moment.
    newcomer: str
    #: What exactly the fault was, where its name does not say.
    note: str = ""


def path_of(program: Program, kind: str) -> str:
    """The first living actor of a kind."""
    pattern = re.sub(r"\b(N|KEY|PORT|ROLE)\b", lambda found: _PATTERNS[found[1]], kind)
    return next(path for path in program.runtime.tree() if re.fullmatch(f"/root/{pattern}", path))


def kind_of(path: str) -> str:
    """The other way round, for ids."""
    path = re.sub(r"^[0-9a-f]{8}$", "KEY", path)
    return re.sub(r":\d+$", ":PORT", re.sub(r"^service:.*", "service:ROLE", path))


def survivors(program: Program, path: str, kind: str, fault: str) -> int:
    """Of `TRANSFERS`, those that do not run through the actor, nor through one that its failure
    takes with it."""
    if program.name in ("registry", "relay"):
        return TRANSFERS
    if kind.endswith("/pipes/N"):
        return TRANSFERS - 1
    doomed = restart_after(program.spec, path)
    carriers = ("/root/node", "/root/node/pipes", "/root/node/endpoint")
    dies = any(f"{doomed.where}/{each}" in carriers for each in doomed.what)
    return 0 if dies else TRANSFERS


class Cell:
    """One fault of one actor."""

    def __init__(self, world: World, program: Program, kind: str, fault: str) -> None:
        self.world = world
        self.program = program
        self.kind = kind
        self.fault = fault
        self.path = ""
        #: Who dies first; another one when the fault is that ours does not stop.
        self.victim = ""
        self.note = ""

    async def run(self) -> Outcome:
        world, program = self.world, self.program
        world.calm()
        await world.finish(keep=TRANSFERS)
        await world.open(TRANSFERS, FIRST)
        await world.healed()
        transfers = list(world.transfers.open)
        self.path = self.victim = path_of(program, self.kind)
        inject, expected_ends, expected_starts = await self._prepare()
        since = {each: len(each.runtime.journal) for each in world.programs}
        if self.fault != IDLE:
            for each in transfers:
                each.mark()
                each.push(BEFORE)
            await world.until(lambda: all(t.begun for t in transfers), "the transfers run")
            for each in transfers:
                each.push(UNDER_WAY)
            assert all(each.under_way for each in transfers)
        newcomers: list[Transfer] = []
        refused: list[bool] = []

        def at_death() -> None:
            begun = faults.probe(world.port)
            if begun is None:
                refused.append(True)
                return
            waiting.append(asyncio.ensure_future(world.transfers.connect(begun)))

        waiting: list[asyncio.Task[Transfer]] = []
        before = program.runtime.at_death.pop(self.victim, None)
        program.runtime.at_death[self.victim] = faults.chain(at_death, *[before] if before else [])
        victim = program.runtime.cell(self.victim).address
        inject()

        def restarted() -> bool:
            return (
                observed(program, since[program], "-") == expected_ends
                and observed(program, since[program], "+") == expected_starts
            )

        try:
            await world.until(lambda: not victim.alive, "its death")
            await world.until(restarted, "the restarts")
        except AssertionError as error:
            ends = observed(program, since[program], "-")
            starts = observed(program, since[program], "+")
            raise AssertionError(
                f"{error}: ended {ends}, expected {expected_ends}; "
                f"started {starts}, expected {expected_starts}"
            ) from None
        newcomers = [await each for each in waiting]
        await world.until(world._whole, "the trees are whole")
        await world.until(world._known, "the service is registered and known")
        lived = await self._judge(transfers)
        newcomer = await self._newcomer(newcomers, refused)
        await world.healed()
        # At the first attempt.
        await world.open(len(world.transfers.open) + 1, AFTER)
        await world.healed()
        for other in world.programs:
            if other is not program:
                assert observed(other, since[other], "-") == {}, f"the {other.name} suffered"
                assert observed(other, since[other], "+") == {}
        assert observed(program, since[program], "-") == expected_ends
        assert observed(program, since[program], "+") == expected_starts
        expected = survivors(program, self.victim, self.kind, self.fault)
        assert lived == expected, f"{lived} transfers lived, expected {expected}"
        return Outcome(_said(lived), self._restarted(expected_starts), newcomer, self.note)

    async def _prepare(self) -> tuple[Callable[[], None], Orders, Orders]:
        """How to inject it, and who ends and starts then, in order."""
        program, path = self.program, self.path
        doomed = restart_after(program.spec, path)
        static = path in program.parts()
        match self.fault:
            case faults_ if faults_ in (IDLE, BUSY):
                inject = faults.kill
            case faults_ if faults_ == HANDLER:
                inject = faults.crash_in_handler
            case faults_ if faults_ == TASK:
                inject = faults.crash_in_task
            case _:
                return await self._prepare_hang()
        return lambda: inject(program, path), doomed.ends if static else {}, doomed.starts

    async def _prepare_hang(self) -> tuple[Callable[[], None], Orders, Orders]:
        program, path = self.program, self.path
        faults.get_stuck(program, path)
        await self.world.until(lambda: _has_stuck_task(path), "work that never ends")
        doomed = restart_after(program.spec, path)
        if path not in program.parts():
            self.note = "does not stop when told to"
            faults.refuse_to_stop(program, path)
            return lambda: faults.terminate(program, path), {}, {}
        supervisor, child = program.parts()[path]
        if child.wait_ready is not None:
            self.note = "its successor never gets ready"
            ends, starts = dict(doomed.ends), dict(doomed.starts)
            ends[doomed.where] = [*ends[doomed.where], child.id]
            starts[doomed.where] = [child.id, *starts[doomed.where]]
            return lambda: faults.kill_and_hang(program, path), ends, starts
        if supervisor.strategy == "one_for_one" and doomed.where == "/root":
            self.note = "has work that never ends, and is killed"
            return lambda: faults.kill(program, path), doomed.ends, doomed.starts
        self.victim = faults.elder_of(program, path)
        elder = kind_of(self.victim.rpartition("/")[2])
        self.note = f"does not stop when `{elder}` dies"
        faults.refuse_to_stop(program, path)
        doomed = restart_after(program.spec, self.victim)

        def inject() -> None:
            faults.kill(program, self.victim)

        return inject, doomed.ends, doomed.starts

    async def _judge(self, transfers: list[Transfer]) -> int:
        """How many live; all others were reset at both ends."""
        for each in transfers:
            if not each.dead:
                each.push(AFTER)
        await self.world.until(
            lambda: all(each.level or each.dead for each in transfers),
            "every transfer goes on or is dead",
        )
        lived = 0
        for each in transfers:
            each.judge()
            if each.dead:
                self.world.transfers.forget(each)
            else:
                assert each.level
                lived += 1
        return lived

    async def _newcomer(self, newcomers: list[Transfer], refused: list[bool]) -> str:
        if refused:
            return "refused"
        (newcomer,) = newcomers
        await self.world.until(
            lambda: newcomer.client.lost or newcomer.server is not None, "the newcomer's fate"
        )
        if newcomer.client.lost:
            if isinstance(newcomer.client.error, ConnectionRefusedError):
                self.world.transfers.forget(newcomer)
                return "refused"
            newcomer.judge()
            self.world.transfers.forget(newcomer)
            return "reset"
        newcomer.push(AFTER)
        await self.world.until(lambda: newcomer.level, "the newcomer's bytes")
        newcomer.judge()
        self.world.transfers.open.append(newcomer)
        return "served"

    def _restarted(self, starts: Orders) -> str:
        doomed = restart_after(self.program.spec, self.victim)
        if not starts:
            return "nothing"
        return ", ".join(f"`{kind_of(each)}`" for each in starts[doomed.where])


def _has_stuck_task(path: str) -> bool:
    return any(
        task.get_name() == path and "Event.wait" in str(task.get_coro())
        for task in asyncio.all_tasks()
    )


def _said(lived: int) -> str:
    if lived == TRANSFERS:
        return "all go on"
    if lived == 0:
        return "all are reset"
    return f"{TRANSFERS - lived} is reset"


Outcomes = dict[tuple[str, str, str], Outcome]

_HEAD = """\
# What fails, and what that does

Written by `tests/faults/test_matrix.py` from what it has seen (`WRITE_SNAPSHOT=1` writes it anew);
a run that sees anything else fails. Registry, service, proxy and a blind relay run as the commands
run them, with nodes on a private DHT of 127.0.0.1. While {transfers} transfers run through the
proxy, each in both directions, one actor is hurt. Every time:

- A transfer goes on with the right bytes, or both its ends see a reset. No part passes for a whole.
- No actor restarts but those named here, in that order, and they have ended in the reverse order.
  The other programs restart nothing.
- Within {healed:g} s, and most often within one, all actors serve, the service is registered and
  known, and the next connection works at the first attempt.
- When the connections have ended, actors, tasks and descriptors are as many as before.

A supervisor (`node`, `pipes`, `links`, `registry`, `relay`, `sessions`, `service:...`, `proxy:...`)
restarts with all its children. A client that connects to the proxy in the moment in which the actor
dies is served, at once or after waiting, or sees a reset: which of these is a matter of luck.
"""


def document(outcomes: Outcomes) -> str:
    """The matrix as Markdown; the same outcomes give the same text."""
    lines = [_HEAD.format(transfers=TRANSFERS, healed=faults.HEALED)]
    for program, kinds in KINDS.items():
        lines += [
            f"## {program.capitalize()}",
            "",
            "| actor | what happens to it | transfers | restarted, in this order |",
            "|---|---|---|---|",
        ]
        for kind in kinds:
            lines += rows(kind, {fault: outcomes[program, kind, fault] for fault in FAULTS})
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def rows(kind: str, by_fault: dict[str, Outcome]) -> list[str]:
    """Of one actor; faults with the same outcome share a row."""
    shared: dict[Outcome, list[str]] = {}
    for fault, outcome in by_fault.items():
        text = f"{fault}: {outcome.note}" if outcome.note else fault
        shared.setdefault(replace(outcome, note="", newcomer=""), []).append(text)
    return [
        f"| `{kind}` | {'; '.join(texts)} | {outcome.transfers} | {outcome.restarted} |"
        for outcome, texts in shared.items()
    ]
