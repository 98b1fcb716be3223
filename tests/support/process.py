"""Processes under test: started in their own group, their lines read as they come, always killed.

The readers are threads, not tasks: a process may outlive the event loop of the test that started
it, and others go on to use it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

from .waiting import until

#: Lines kept of each process; a chatty one drops its oldest.
LINES_KEPT = 2000

#: Where programs make their control sockets, whose paths have to be short.
RUNTIME = Path(tempfile.mkdtemp(prefix="hsp-"))
atexit.register(shutil.rmtree, RUNTIME, ignore_errors=True)

#: Every process that runs, or has run in the test that is being judged: for a failure's report.
started: list[Process] = []

Stream = Literal["stdout", "stderr"]


class Process:
    """One child process. `lines` holds (seconds since start, stream, text), oldest first."""

    def __init__(
        self, name: str, command: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str]
    ) -> None:
        self.name = name
        self.command = [str(part) for part in command]
        self.cwd = cwd
        self.lines: list[tuple[float, Stream, str]] = []
        self.closed = False
        self._begin = time.monotonic()
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []
        self._popen = subprocess.Popen(
            self.command,
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert self._popen.stdout is not None
        assert self._popen.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=(stream, pipe), daemon=True)
            for stream, pipe in (("stdout", self._popen.stdout), ("stderr", self._popen.stderr))
        ]
        self._unread = len(self._readers)
        for reader in self._readers:
            reader.start()
        started.append(self)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs, else its exit code; negative when a signal ended it."""
        return self._popen.poll()

    def text(self, stream: Stream | None = None) -> str:
        """What it printed so far, on one stream or on both in the order of arrival."""
        with self._lock:
            return "".join(
                f"{text}\n" for _, source, text in self.lines if stream in (None, source)
            )

    def transcript(self) -> str:
        """Everything kept, with times, for a person who looks at a failed test."""
        state = "running" if self.returncode is None else f"exit code {self.returncode}"
        with self._lock:
            lines = [f"{at:8.3f} {stream} | {text}" for at, stream, text in self.lines]
        return "\n".join([f"$ {' '.join(self.command)}", *lines, f"({state}, pid {self.pid})"])

    async def line(self, pattern: str, *, deadline: float = 20.0) -> re.Match[str]:
        """The first match of `pattern` in what it prints or has printed, on either stream.

        The pattern may span lines. AssertionError when `deadline` seconds pass or it exits first.
        """
        search = re.compile(pattern, re.MULTILINE)
        changed = asyncio.Event()
        loop = asyncio.get_running_loop()

        def listener() -> None:
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(changed.set)

        with self._lock:
            self._listeners.append(listener)
        try:
            async with asyncio.timeout(deadline):
                while True:
                    changed.clear()
                    ended = self._unread == 0
                    if match := search.search(self.text()):
                        return match
                    assert not ended, f"{self.name} ended without printing {pattern!r}"
                    await changed.wait()
        except TimeoutError:
            raise AssertionError(
                f"{self.name} did not print {pattern!r} within {deadline:g} s"
            ) from None
        finally:
            with self._lock:
                self._listeners.remove(listener)

    async def exit(self, *, deadline: float = 20.0) -> int:
        """Its exit code, once it has ended and all it printed has been read."""

        async def ended() -> bool:
            return self.returncode is not None and self._unread == 0

        await until(ended, f"{self.name} exits", deadline=deadline, every=0.01)
        assert self.returncode is not None
        return self.returncode

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone, not to its group."""
        self._popen.send_signal(number)

    def descriptors(self) -> int:
        """How many file descriptors it holds now."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def close(self) -> None:
        """Kill its whole group, wait for it, and close the pipes. Can be called twice."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()
        for reader in self._readers:
            reader.join(timeout=5)
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, stream: Stream, pipe: IO[str]) -> None:
        with pipe:
            for text in pipe:
                with self._lock:
                    self.lines.append((time.monotonic() - self._begin, stream, text.rstrip("\n")))
                    del self.lines[:-LINES_KEPT]
                self._notify()
        with self._lock:
            self._unread -= 1
        self._notify()

    def _notify(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener()


def environment(home: Path, **extra: str) -> dict[str, str]:
    """The test's environment without what configures the programs, and with its own HOME."""
    ours = re.compile(r"(hyper)?seaport_|APPDATA$|XDG_|NODE_|PYTHON(?!PATH$)", re.IGNORECASE)
    kept = {name: value for name, value in os.environ.items() if not ours.match(name)}
    own = {"HOME": str(home), "XDG_RUNTIME_DIR": str(RUNTIME), "LC_ALL": "C.UTF-8"}
    return kept | own | extra
