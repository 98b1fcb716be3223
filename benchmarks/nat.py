#!/usr/bin/env python3
"""Measures how long connections through NATs take to open, ours and Node's; writes docs/nat.md.

benchmarks/nat.py                        everything, an hour
benchmarks/nat.py --pairs node-node      one pair (service-proxy) alone, or several with commas
benchmarks/nat.py --rounds 3 --output -  fewer rounds; prints only

Figures of pairs that are not measured stay in the page as they are. Node's own are beside ours.

Needs root, as it makes network namespaces (tests/support/laboratory.py).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Self

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

Ratios are medians against those of Node's service and Node's proxy in this page: below 1 is faster.
"""
COLUMNS = ("first", "next", "remembered")
HEADING = re.compile(r"^## Service: (\w+), proxy: (\w+)$", re.MULTILINE)


@dataclass(slots=True)
class Row:
    """What came of a cell: the times of each round that opened, why others did not."""

    name: str
    times: list[Times] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    #: Of the machine, before each round; this program's own is well below 1.
    loads: list[float] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        return len(self.times) + len(self.failures)

    def cells(self) -> list[str]:
        """Under `COLUMNS` and "opened"."""
        if not self.times:
            return ["does not open", "", "", f"0 of {self.rounds}"]
        return [
            _spread([each.first for each in self.times]),
            _spread([each.next for each in self.times]),
            _spread([each.remembered for each in self.times if each.remembered]),
            f"{len(self.times)} of {self.rounds}",
        ]


@dataclass(slots=True)
class Section:
    """The table of a pair: by the name of a row, the cells of its `Row`, in which ratios are left
    out; and what is said below it."""

    rows: dict[str, list[str]]
    below: str

    @classmethod
    def read(cls, text: str) -> Self:
        """What `markdown` has written."""
        lines = text.strip().splitlines()
        table = [line for line in lines if line.startswith("|")]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
        below = "\n".join(line for line in lines if not line.startswith("|")).strip()
        return cls(
            {name: [each.partition(" · ")[0] for each in cells] for name, *cells in rows}, below
        )

    def markdown(self, beside: Section | None) -> str:
        """With ratios to another one's medians, if there is one."""
        lines = [
            f"| service → proxy | {' | '.join(COLUMNS)} | opened |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for name, cells in self.rows.items():
            other = [] if beside is None else beside.rows.get(name, [])
            shown = [
                f"{cell} · {ratio:.2f}x" if (ratio := _ratio(cell, against)) else cell
                for cell, against in zip_longest(cells, other[: len(COLUMNS)], fillvalue="")
            ]
            lines.append(f"| {' | '.join([name, *shown])} |")
        return "\n".join([*lines, "", self.below])


def _ratio(cell: str, against: str) -> float | None:
    ours, node = _median(cell), _median(against)
    return ours / node if ours and node else None


def _median(cell: str) -> float | None:
    number = re.match(r"[\d,]+(?= \()", cell)
    return None if number is None else float(number[0].replace(",", ""))


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments = _arguments()
    to_file = arguments.output != "-"
    page = Path(arguments.output)
    sections = _sections(page.read_text()) if to_file and page.exists() else {}
    try:
        for pair in arguments.pairs:
            begin = time.monotonic()
            rows = asyncio.run(_measure(pair, arguments.rounds))
            minutes = (time.monotonic() - begin) / 60
            cells = {row.name: row.cells() for row in rows}
            sections[pair] = Section(cells, _below(rows, arguments, minutes))
            if to_file:
                # After each, as the next may take half an hour.
                page.write_text(_page(sections))
    except NotPermitted as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"written to {page}" if to_file else _page(sections))
    return 0


def _sections(text: str) -> dict[str, Section]:
    """Those of a page, by the name of their pair."""
    _, *parts = HEADING.split(text)
    return {
        f"{service.lower()}-{proxy.lower()}": Section.read(table)
        for service, proxy, table in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    }


def _page(sections: dict[str, Section]) -> str:
    # Each section has its own load and date.
    lasting = ("processor", "memory", "kernel")
    facts = {name: fact for name, fact in procfs.machine().items() if name in lasting}
    about = ABOUT.format(
        round_trip=ROUND_TRIP * 1000, nodes=NODES, let_go=LET_GO, search=SEARCH_AGAIN
    )
    parts = [about, "\n".join(f"- {name}: {fact}" for name, fact in facts.items())]
    for pair in PAIRS:
        if pair in sections:
            service, proxy = ("Node" if each == "node" else each for each in pair.split("-"))
            beside = None if pair == "node-node" else sections.get("node-node")
            parts.append(f"\n## Service: {service}, proxy: {proxy}\n")
            parts.append(sections[pair].markdown(beside))
    return "\n".join(parts) + "\n"


async def _measure(pair: str, rounds: int) -> list[Row]:
    """Each row has a laboratory of its own, and finds nothing that others left behind."""
    service, proxy = map(_program, pair.split("-"))
    rows = []
    for sites in SITES:
        cell = Cell(*sites, service, proxy)
        rows.append(await _row(_sites(cell), cell, rounds))
    if service == "ours" or proxy == "node":
        # Node's command line can name no blind relay: a pair of scripts does.
        cell = Cell("random", "random", service, proxy, relayed=service == "ours")
        name = f"{_sites(cell)}, through a blind relay"
        rows.append(await _row(name, cell, rounds, scripts=service == "node"))
    return rows


async def _row(name: str, cell: Cell, rounds: int, *, scripts: bool = False) -> Row:
    row = Row(name)
    network: Program = "node" if cell.service == cell.proxy == "node" else "ours"
    with tempfile.TemporaryDirectory() as home:
        async with World(Path(home), programs=network, nodes=NODES) as world:
            while row.rounds < rounds and (row.times or row.rounds < HOPELESS):
                row.loads.append(os.getloadavg()[0])
                try:
                    if scripts:
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


def _below(rows: list[Row], arguments: argparse.Namespace, minutes: float) -> str:
    """What was seen where it did not open, and how it was measured."""
    reasons = [f"- {row.name}: {reason}" for row in rows for reason in sorted(set(row.failures))]
    lines = ["What was seen where it did not open:\n", *reasons, ""] if reasons else []
    state = "" if not _said("git", "status", "--porcelain") else " with local changes"
    python = f"{platform.python_implementation()} {platform.python_version()}"
    node = f"Node {_said(npm.node(), '--version')}, hyperseaport 3.2.0, hyperdht 6.34.0"
    commit = (_said("git", "rev-parse", "--short", "HEAD") or "unknown") + state
    loads = [load for row in rows for load in row.loads]
    lines += [
        f"Measured on {time.strftime('%Y-%m-%d')} in {minutes:.0f} minutes, with a load of "
        f"{min(loads):.1f} to {max(loads):.1f}: {arguments.rounds} rounds, or {HOPELESS} when none "
        f"of them opened; {python}, {node}, commit {commit}.",
    ]
    return "\n".join(lines)


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
