#!/usr/bin/env python3
"""Measures ours and the Node programs side by side, and writes docs/performance.md.

benchmarks/run.py                    everything, about an hour
benchmarks/run.py --short            for the desk: minutes; prints only
benchmarks/run.py --only one,loss    some cases; prints only
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import procfs
from cases import SHORT, Case, Figures, Size, cases
from contenders import ROOT, Contender, Failure, Lab
from lossy import LEASH
from report import Report
from support import npm

PERFORMANCE = ROOT / "docs" / "performance.md"
SCALE = Path(__file__).parent / "scale.py"
#: Seconds for the networks on the virtual clock; 10,000 nodes take most of it.
SCALE_LIMIT = 3600


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    arguments = _arguments()
    size = SHORT if arguments.short else Size()
    if arguments.rounds:
        size = replace(size, rounds=arguments.rounds, long_rounds=arguments.rounds)
    every = cases(size)
    wanted = set(arguments.only.split(",")) if arguments.only else None
    names = [case.name for case in every] + ["scale"]
    if wanted and (unknown := wanted - set(names)):
        print(f"no such case: {', '.join(unknown)}; there are {', '.join(names)}", file=sys.stderr)
        return 2
    report = Report("Performance", _facts(size, arguments), every)
    lab = Lab()
    try:
        for case in every:
            if not wanted or case.name in wanted:
                _measure(lab, case, size, report)
        if not wanted or "scale" in wanted:
            report.sections.append(_scale(lab, size))
    except KeyboardInterrupt:
        return 130
    finally:
        lab.close()
    report.facts["time it took"] = f"{(time.monotonic() - BEGIN) / 60:.0f} minutes"
    text = report.markdown()
    output = arguments.output or (None if arguments.short or wanted else PERFORMANCE)
    if output is None or output == "-":
        print(text)
    else:
        Path(output).write_text(text)
        print(f"written to {output}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(_plain(report), indent=1))
    return 0


def _measure(lab: Lab, case: Case, size: Size, report: Report) -> None:
    results = report.results.setdefault(case.name, {})
    rounds = size.long_rounds if case.long else size.rounds
    for number in range(rounds):
        # Who begins differs from round to round, so that nobody always runs after the same one.
        turn = number % len(case.contenders)
        for contender in (*case.contenders[turn:], *case.contenders[:turn]):
            found = _figures(lab, case, contender, size)
            results.setdefault(contender, []).append(found)
            print(
                f"{time.monotonic() - BEGIN:6.0f} s  {case.name} {number + 1}/{rounds}  "
                f"{contender.name}: {_brief(found)}",
                file=sys.stderr,
                flush=True,
            )


def _figures(lab: Lab, case: Case, contender: Contender, size: Size) -> Figures | str:
    try:
        return case.measure(lab, contender, size)
    except Failure as failure:
        lab.drop(contender)
        return f"failed: {failure}"
    except (OSError, subprocess.SubprocessError, ValueError, AssertionError) as error:
        lab.drop(contender)
        return f"failed: {type(error).__name__}: {error}"


def _brief(found: Figures | str) -> str:
    if isinstance(found, str):
        return found
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float | int) else f"{key} {value}"
        for key, value in found.items()
    )


def _scale(lab: Lab, size: Size) -> str:
    env = os.environ | {"PYTHONPATH": str(lab.source)}
    command = [*LEASH, sys.executable, str(SCALE), *map(str, size.scale)]
    try:
        done = subprocess.run(
            command, env=env, stdout=subprocess.PIPE, text=True, timeout=SCALE_LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"## Networks on the virtual clock\n\nNo end after {SCALE_LIMIT} s."
    return done.stdout.strip() or "## Networks on the virtual clock\n\nfailed"


def _facts(size: Size, arguments: argparse.Namespace) -> dict[str, str]:
    node = _said([npm.node(), "--version"])
    state = "" if not _said(["git", "status", "--porcelain"]) else " with local changes"
    return {
        **procfs.machine(),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "Node": node,
        "commit": (_said(["git", "rev-parse", "--short", "HEAD"]) or "unknown") + state,
        "command": _command(arguments),
        "rounds": f"{size.rounds}; {size.long_rounds} of the long cases"
        + (" (the short form: figures are indicative)" if arguments.short else ""),
    }


def _command(arguments: argparse.Namespace) -> str:
    """The command, without where its results went."""
    command = ["benchmarks/run.py"]
    command += ["--short"] if arguments.short else []
    command += ["--only", arguments.only] if arguments.only else []
    command += ["--rounds", str(arguments.rounds)] if arguments.rounds else []
    return shlex.join(command)


def _said(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _plain(report: Report) -> dict[str, object]:
    results = {
        name: {contender.name: rounds for contender, rounds in found.items()}
        for name, found in report.results.items()
    }
    return {"facts": report.facts, "results": results}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--only", metavar="CASE[,CASE]", help="these cases alone")
    parser.add_argument("--rounds", type=int, metavar="N", help="of every case")
    parser.add_argument("--output", metavar="FILE", help="where to write the page; - prints it")
    parser.add_argument("--json", metavar="FILE", help="where to write all figures as JSON")
    return parser.parse_args()


BEGIN = time.monotonic()

if __name__ == "__main__":
    sys.exit(main())
