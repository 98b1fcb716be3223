"""Figures of all rounds as Markdown: medians, spread, and ratios against Node to Node."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cases import Case, Figures, Metric
from contenders import NODE, NODE_OURS, OURS, OURS_NODE, Contender

#: By case and contender, what each round gave; a text when a round failed.
Results = dict[str, dict[Contender, list["Figures | str"]]]


@dataclass(slots=True)
class Report:
    """`sections`: what is not a case, below the cases."""

    title: str
    facts: dict[str, str]
    cases: Sequence[Case]
    results: Results = field(default_factory=dict)
    sections: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The page, except for cases that were not run."""
        parts = [f"# {self.title}", INTRODUCTION]
        parts.append("\n".join(f"- {name}: {value}" for name, value in self.facts.items()))
        parts.append(self._goals())
        for case in self.cases:
            if case.name in self.results:
                parts += [self.table(case, *table) for table in case.tables]
        return "\n\n".join([*parts, *self.sections]) + "\n"

    def table(self, case: Case, title: str, text: str, metrics: Sequence[Metric]) -> str:
        """One table of a case, with its heading and its notes."""
        head = ["", *(metric.title for metric in metrics)]
        rows = [head, ["---", *("---:" for _ in metrics)]]
        notes: list[str] = []
        for index, contender in enumerate(case.contenders):
            rounds = self.results[case.name].get(contender, [])
            name = case.labels[index] if case.labels else contender.name
            rows.append([name, *(self._cell(case, contender, metric) for metric in metrics)])
            reasons = [each if isinstance(each, str) else each.get("note", "") for each in rounds]
            for reason in dict.fromkeys(filter(None, map(str, reasons))):
                times = reasons.count(reason)
                notes.append(f"- {name}, {times} of {len(rounds)} rounds: {reason}")
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        parts = [f"## {title}", text, "\n".join(lines)]
        if notes:
            parts.append("\n".join(notes))
        return "\n\n".join(parts)

    def median(self, case: str, contender: Contender, key: str) -> float | None:
        """None when no round has that figure."""
        values = self._values(case, contender, key)
        return statistics.median(values) if values else None

    def _values(self, case: str, contender: Contender, key: str) -> list[float]:
        found = []
        for figures in self.results.get(case, {}).get(contender, []):
            value = figures.get(key) if isinstance(figures, dict) else None
            if isinstance(value, float | int):
                found.append(float(value))
        return found

    def _cell(self, case: Case, contender: Contender, metric: Metric) -> str:
        values = self._values(case.name, contender, metric.key)
        if not values:
            for figures in self.results[case.name].get(contender, []):
                if isinstance(figures, dict) and isinstance(figures.get(metric.key), str):
                    return str(figures[metric.key])
            return "failed"
        median = statistics.median(values)
        number = f"{{:,.{metric.digits}f}}"
        text = number.format(median)
        if len(values) > 1:
            text += f" ({number.format(min(values))}-{number.format(max(values))})"
        node = self.median(case.name, NODE, metric.key)
        if metric.ratio and contender != NODE and node is not None and node > 0 and median >= 0:
            text += f" · {median / node:.2f}x"
        return text

    # What must be reached

    def _goals(self) -> str:
        lines = ["| what | at least | aim | measured | |", "| --- | ---: | ---: | ---: | --- |"]
        for goal in GOALS:
            measured = goal.figure(self)
            if measured is None:
                shown, verdict = "", "not measured"
            else:
                shown = f"{measured:.2f}{goal.unit}"
                verdict = goal.verdict(measured)
            least, aim = (f"{value:g}{goal.unit}" for value in (goal.least, goal.aim))
            lines.append(f"| {goal.what} | {least} | {aim} | {shown} | {verdict} |")
        return "## What must be reached\n\n" + "\n".join(lines)


INTRODUCTION = """\
Written by `benchmarks/run.py`; how it measures is in
[benchmarks/README.md](../benchmarks/README.md).

Rows name the service, then the proxy: in "ours → Node" our service sends the download to a Node
proxy. Node is hyperseaport 3.2.0 on HyperDHT 6. Cells are the median of all rounds, the least and
the greatest in parentheses, and the ratio to Node → Node: above 1 is good for rates, below 1 for
times, memory and CPU. Contenders take turns in each round."""


@dataclass(frozen=True, slots=True)
class Goal:
    """`less`: a figure that should be small."""

    what: str
    least: float
    aim: float
    unit: str
    figure: Callable[[Report], float | None]
    less: bool = False

    def verdict(self, measured: float) -> str:
        sign = -1 if self.less else 1
        measured = round(measured, 2)
        if measured * sign >= self.aim * sign:
            return "aim"
        return "reached" if measured * sign >= self.least * sign else "**missed**"


def _ratio(case: str, keys: Sequence[str], contenders: Sequence[Contender], worst: Callable[
    [list[float]], float] = min) -> Callable[[Report], float | None]:  # fmt: skip
    """The worst ratio to Node to Node over these figures and contenders."""

    def figure(report: Report) -> float | None:
        ratios = []
        for contender in contenders:
            for key in keys:
                ours = report.median(case, contender, key)
                node = report.median(case, NODE, key)
                if ours is None or not node:
                    return None
                ratios.append(ours / node)
        return worst(ratios)

    return figure


def _own(case: str, keys: Sequence[str], worst: Callable[[list[float]], float]) -> Callable[
    [Report], float | None]:  # fmt: skip
    """Our worst figure over these; of a case with a size in its name, that of the largest."""

    def figure(report: Report) -> float | None:
        names = [each.name for each in report.cases if each.name.startswith(case)]
        names = [name for name in names if name in report.results]
        if not names:
            return None
        values = [report.median(names[-1], OURS, key) for key in keys]
        known = [value for value in values if value is not None]
        return worst(known) if len(known) == len(values) else None

    return figure


BOTH = ("down", "up")
GROWTH = ("service_down", "proxy_down", "service_up", "proxy_up")
GOALS = [
    Goal("one stream, ours to ours", 1.5, 3, "x", _ratio("one", BOTH, [OURS])),
    Goal("one stream, ours to Node and Node to ours", 1, 1.3, "x",
         _ratio("one", BOTH, [OURS_NODE, NODE_OURS])),
    Goal("eight streams in sum, ours to ours", 1.5, 3, "x", _ratio("eight", BOTH, [OURS])),
    Goal("goodput at 2 % loss", 1, 2, "x", _ratio("loss", ["loss2"], [OURS])),
    Goal("time to a new connection", 1, 0.5, "x", _ratio("connect", ["single"], [OURS], max),
         less=True),
    Goal("64-byte round trip", 1, 0.5, "x", _ratio("roundtrip", ["median"], [OURS], max),
         less=True),
    Goal("new connections/s, 64 at once", 2, 5, "x", _ratio("connect", ["burst"], [OURS])),
    Goal("memory of an idle connection, the worse process", 24, 12, " KiB",
         _own("idle", ["service", "proxy"], max), less=True),
    Goal("memory growth with a stalled reader, the worst process", 2, 0.5, " MiB",
         _own("stall", GROWTH, max), less=True),
    Goal("two streams share the path: the slower one", 0.33, 0.5, "",
         _own("share", ["share"], min)),
]  # fmt: skip
