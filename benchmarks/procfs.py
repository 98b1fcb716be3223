"""What a program costs, read from /proc: of a process and all others of its session."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def _stats(session: int) -> Iterator[list[str]]:
    """The fields of /proc/PID/stat from the third on, for each process of a session."""
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        with contextlib.suppress(OSError):
            fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                yield fields


def cpu_seconds(session: int) -> float:
    """User and system time so far, children that have ended included."""
    return sum(int(tick) for stat in _stats(session) for tick in stat[11:15]) / TICKS


def resident(session: int) -> int:
    """Bytes of resident memory."""
    return sum(int(stat[21]) for stat in _stats(session)) * PAGE


class Peak:
    """While the block runs, the most memory that each session had above what it had before."""

    def __init__(self, *sessions: int, every: float = 0.1) -> None:
        self._sessions = sessions
        self._every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._before = [resident(session) for session in sessions]
        #: Bytes, in the order of the sessions.
        self.growth = [0] * len(sessions)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self._sample()

    def _sample(self) -> None:
        for index, session in enumerate(self._sessions):
            grown = resident(session) - self._before[index]
            self.growth[index] = max(self.growth[index], grown)


def machine() -> dict[str, str]:
    """What figures depend on: processor, cores, kernel."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PHYS_PAGES") * PAGE / 2**30
    return {
        "processor": f"{model}, {os.cpu_count()} cores",
        "memory": f"{memory:.0f} GiB",
        "kernel": f"{os.uname().sysname} {os.uname().release}",
        "load before the run": f"{os.getloadavg()[0]:.2f}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
