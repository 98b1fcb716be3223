"""A registry's store and ``kill -9``: what was acknowledged is there, nothing is there by half."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

from support import store_writer
from support.store_writer import UNTIL, Change

import hyperseaport
from hyperseaport.actors.registry.store import Row, Store, unpacked

#: Chains of kills, which run at once; the file that one writer leaves is the next one's.
CHAINS = 3
#: Kills of each chain.
KILLS = 75
#: One file lives for so many kills; then the next begins with none.
LIVES = 15
#: Acknowledged commits after which a writer is killed: often before the first, when it opens the
#: file, and sometimes after the log has been moved into the file.
ACKNOWLEDGED = (0, 0, 0, 1, 2, 5, 20, 60, 150)

Rows = dict[tuple[bytes, bytes, str, str], Row]
State = tuple[Rows, dict[bytes, int]]


def test_what_was_acknowledged_is_there(tmp_path: Path) -> None:
    folders = [tmp_path / str(chain) for chain in range(CHAINS)]
    with ThreadPoolExecutor(CHAINS) as pool:
        kills = list(pool.map(run_chain, range(CHAINS), folders))
    assert sum(kills) == CHAINS * KILLS


def run_chain(chain: int, folder: Path) -> int:
    """The number of kills that the chain has survived."""
    rng = Random(chain)
    state: State = ({}, {})
    package = Path(hyperseaport.__file__).parents[1]
    command = [sys.executable, store_writer.__file__, str(package)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writers:
        for kill in range(KILLS):
            if kill % LIVES == 0:
                state = ({}, {})
            file = folder / f"{kill // LIVES}.db"
            seed = f"{chain}/{kill}"
            acknowledged = killed_after(rng.choice(ACKNOWLEDGED), writers, file, seed)
            batches = store_writer.commits(seed)
            for _ in range(acknowledged):
                apply(state, next(batches))
            found = read(file)
            if found != state:
                # The writer may have died between a commit and its acknowledgement.
                apply(state, next(batches))
            assert found == state, f"kill {seed}: {acknowledged} commits were acknowledged"
    return KILLS


def killed_after(
    acknowledgements: int, writers: subprocess.Popen[bytes], file: Path, seed: str
) -> int:
    """Have a writer start, and kill it when it has acknowledged so many commits; returns how many
    it has acknowledged in the end."""
    assert writers.stdin is not None
    assert writers.stdout is not None
    writers.stdin.write(f"{seed} {file}\n".encode())
    writers.stdin.flush()
    writer = int(writers.stdout.readline())
    for _ in range(acknowledgements):
        assert writers.stdout.readline() == b"c\n", "the writer ended by itself"
    os.kill(writer, signal.SIGKILL)
    while (line := writers.stdout.readline()) == b"c\n":
        acknowledgements += 1
    assert line == b"end\n"
    return acknowledgements


def apply(state: State, batch: Iterable[Change]) -> None:
    rows, buried = state
    for action, (key, holder, role, version, meta, sequence) in batch:
        if action == "put":
            row = Row(key, holder, role, version, meta, sequence=sequence)
            rows[key, holder, role, version] = row
        elif action == "remove":
            rows.pop((key, holder, role, version), None)
        else:
            buried[key] = max(sequence, buried.get(key, 0))


def read(file: Path) -> State:
    with contextlib.closing(Store(file)) as store:
        rows = {record[:4]: unpacked(record) for record in store.records()}
        buried = {}
        for key, sequence, until in store.buried():
            assert until == UNTIL
            buried[key] = sequence
    return rows, buried
