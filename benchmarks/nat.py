#!/usr/bin/env python3
"""Measures how long connections through NATs take to open, ours and Node's; writes docs/nat.md.

benchmarks/nat.py                        everything, half an hour
benchmarks/nat.py --pairs node-node      one pair (service-proxy) alone, or several with commas
benchmarks/nat.py --rounds 3 --output -  fewer rounds; prints only

Needs root, as it makes network namespaces (tests/support/laboratory.py).
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import procfs

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support import npm  # noqa: E402
from support.laboratory import ROUND_TRIP, Kind, NotPermitted  # noqa: E402
from support.laboratory_cells import LET_GO, SEARCH_AGAIN, Cell, NotOpened, Times, World  # noqa: E402
from support.peers import Kind as Program  # noqa: E402

PAGE = ROOT / "docs" / "nat.md"
PAIRS = ("node-node", "ours-ours", "ours-node", "node-ours")
#: Where the service is, and where the proxy is.
SITES: list[tuple[Kind, Kind]] = [
    ("open", "open"),
    ("open", "consistent"),
    ("open", "random"),
    ("consistent", "open"),
    ("random", "open"),
    ("consistent", "consistent"),
    ("cgnat", "cgnat"),
    ("lan", "lan"),
    ("lan-hairpin", "lan-hairpin"),
    ("consistent", "random"),
    ("random", "consistent"),
    ("random", "random"),
]
#: Public DHT nodes: as many as when the figures of others were taken that people compare with.
NODES = 13
ROUNDS = 10
#: After these rounds, what has never opened will not.
HOPELESS = 3

ABOUT = """\
# Connections through NATs

Written by `benchmarks/nat.py`. Every program runs in a network namespace, behind a router made of
nftables where it says so (`tests/support/laboratory.py`); between any two sites, DHT nodes and the
registry lies a round trip of {round_trip:.0f} ms. {nodes} DHT nodes are at public addresses. The
bootstrap node is nearer and has no identity, so that it tells programs early whether they are open,
and carries nothing else.

Figures are milliseconds from the connect of a TCP client at the proxy to the first byte of the
answer of the backend behind the service: the median, the least and the greatest. It takes one round
trip of {round_trip:.0f} ms when everything else is there already.

- *first*: the proxy has never connected to that service
- *next*: right after the first was closed; a socket that is still open may be used again
- *remembered*: {let_go:.0f} s later, when that socket is gone and only the relays are remembered;
  {search:.0f} s later where the port of a random router was searched for, as Node programs refuse
  the next search for 20 s

| site | what is there |
| --- | --- |
| open | a public address |
| consistent | a router that keeps the port, and admits answers only |
| random | a router that takes another port for each destination, and admits answers only |
| cgnat | a consistent router behind another one |
| lan | service and proxy behind one consistent router |
| lan-hairpin | as lan, and each can reach the other at the public address |
"""


@dataclass(slots=True)
class Row:
    """What came of a cell: the times of each round that opened, why others did not."""

    name: str
    times: list[Times] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        return len(self.times) + len(self.failures)

    def markdown(self) -> str:
        if not self.times:
            return f"| {self.name} | does not open | | | 0 of {self.rounds} |"
        first = _spread([each.first for each in self.times])
        following = _spread([each.next for each in self.times])
        remembered = _spread([each.remembered for each in self.times if each.remembered])
        opened = f"{len(self.times)} of {self.rounds}"
        return f"| {self.name} | {first} | {following} | {remembered} | {opened} |"


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments = _arguments()
    begin = time.monotonic()
    sections = []
    try:
        for pair in arguments.pairs:
            rows = asyncio.run(_measure(pair, arguments.rounds))
            sections.append(_section(pair, rows))
    except NotPermitted as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    text = "\n".join([_head(time.monotonic() - begin, arguments), *sections])
    if arguments.output == "-":
        print(text)
    else:
        Path(arguments.output).write_text(text)
        print(f"written to {arguments.output}")
    return 0


async def _measure(pair: str, rounds: int) -> list[Row]:
    """Each row has a laboratory of its own, and finds nothing that others left behind."""
    service, proxy = map(_program, pair.split("-"))
    rows = []
    for sites in SITES:
        cell = Cell(*sites, service, proxy)
        rows.append(await _row(_sites(cell), cell, rounds))
    if service == proxy == "node":
        # Our programs can name no blind relay, nor can Node's command line: a pair of scripts.
        cell = Cell("random", "random", service, proxy)
        name = f"{_sites(cell)}, through a blind relay"
        rows.append(await _row(name, cell, rounds, relayed=True))
    return rows


async def _row(name: str, cell: Cell, rounds: int, *, relayed: bool = False) -> Row:
    row = Row(name)
    network: Program = "node" if cell.service == cell.proxy == "node" else "ours"
    with tempfile.TemporaryDirectory() as home:
        async with World(Path(home), programs=network, nodes=NODES) as world:
            while row.rounds < rounds and (row.times or row.rounds < HOPELESS):
                try:
                    if relayed:
                        times = await world.measure_relayed(cell)
                    else:
                        times = await world.measure(cell, remembered=True)
                    row.times.append(times)
                    said = str(row.times[-1])
                except NotOpened as error:
                    said = _why(error)
                    row.failures.append(said)
                line = f"{cell.service}-{cell.proxy}, {name}: {said}"
                print(line, file=sys.stderr, flush=True)
    return row


def _why(error: NotOpened) -> str:
    """What was seen, without its seconds, and the code that a Node program printed."""
    printed = "\n".join(getattr(error, "__notes__", []))
    codes = sorted(set(re.findall(r"code: '(\w+)'", printed)))
    return " ".join([re.sub(r" after [\d.]+ s", "", str(error)), *codes])


def _sites(cell: Cell) -> str:
    if cell.service_site.startswith("lan"):
        return cell.service_site
    return f"{cell.service_site} → {cell.proxy_site}"


def _program(name: str) -> Program:
    return "node" if name == "node" else "ours"


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"


def _section(pair: str, rows: list[Row]) -> str:
    service, proxy = ("Node" if each == "node" else "ours" for each in pair.split("-"))
    lines = [
        f"## Service: {service}, proxy: {proxy}\n",
        "| service → proxy | first | next | remembered | opened |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(row.markdown() for row in rows),
    ]
    reasons = [f"- {row.name}: {reason}" for row in rows for reason in sorted(set(row.failures))]
    if reasons:
        lines += ["\nWhat was seen where it did not open:\n", *reasons]
    return "\n".join(lines) + "\n"


def _head(seconds: float, arguments: argparse.Namespace) -> str:
    state = "" if not _said("git", "status", "--porcelain") else " with local changes"
    facts = {
        **procfs.machine(),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "Node": f"{_said(npm.node(), '--version')}, hyperseaport 3.2.0, hyperdht 6.34.0",
        "commit": (_said("git", "rev-parse", "--short", "HEAD") or "unknown") + state,
        "command": shlex.join(["benchmarks/nat.py", *sys.argv[1:]]),
        "rounds": f"{arguments.rounds}, or {HOPELESS} when none of them opened",
        "time it took": f"{seconds / 60:.0f} minutes",
    }
    about = ABOUT.format(
        round_trip=ROUND_TRIP * 1000, nodes=NODES, let_go=LET_GO, search=SEARCH_AGAIN
    )
    return about + "\n" + "\n".join(f"- {name}: {fact}" for name, fact in facts.items()) + "\n"


def _said(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs",
        metavar="PAIR[,PAIR]",
        default=list(PAIRS),
        type=_pairs,
        help=f"whose service and whose proxy: {', '.join(PAIRS)}",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="of every cell")
    parser.add_argument("--output", metavar="FILE", default=PAGE, help="the page; - prints it")
    return parser.parse_args()


def _pairs(text: str) -> list[str]:
    found = text.split(",")
    if unknown := set(found) - set(PAIRS):
        raise argparse.ArgumentTypeError(f"no such pair: {', '.join(unknown)}")
    return found


if __name__ == "__main__":
    sys.exit(main())
