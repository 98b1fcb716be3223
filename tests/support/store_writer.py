"""A seeded stream of changes to a store, and processes that make them and are killed meanwhile.

As a program: ``store_writer.py FOLDER-OF-PACKAGE``. For each line ``SEED FILE`` on its standard
input it forks a writer: to start one anew would take fifty times as long. The writer prints its
process id before it opens the file, and ``c`` for each commit that has returned; when it is dead,
``end`` follows.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

#: Few, so that most changes meet what earlier ones have left.
KEYS = [bytes([number]) * 32 for number in range(24)]
#: Most rows are small; one that fills several pages makes a commit of several writes.
SIZES = (20, 200, 200, 200, 3_000, 20_000)
#: Beyond all tests.
UNTIL = 4e9

#: put: the fields of a row; remove: those that tell it apart; bury: key and sequence.
Change = tuple[str, tuple[bytes, bytes, str, str, str, int]]


def commits(seed: str) -> Iterator[list[Change]]:
    """What each commit changes, without end."""
    rng = Random(seed)
    serial = 0
    while True:
        batch: list[Change] = []
        for _ in range(rng.choice((1, 1, 1, 2, 5, 30))):
            serial += 1
            action = rng.choice(("put", "put", "put", "remove", "bury"))
            meta = f"{seed} {serial} ".ljust(rng.choice(SIZES), "m")
            key, holder = rng.choice(KEYS), rng.choice(KEYS[:2])
            batch.append((action, (key, holder, rng.choice("ab"), "1.0.0", meta, serial)))
        yield batch


def main(package: str) -> None:
    sys.path.insert(0, package)
    from hyperseaport.actors.registry.store import Row, Store

    def write(seed: str, file: str) -> None:
        os.write(1, b"%d\n" % os.getpid())
        store = Store(Path(file))
        for batch in commits(seed):
            for action, (key, holder, role, version, meta, sequence) in batch:
                row = Row(key, holder, role, version, meta, sequence=sequence)
                if action == "put":
                    store.put(row)
                elif action == "remove":
                    store.remove(row.place)
                else:
                    store.bury(key, sequence, UNTIL)
            store.commit()
            os.write(1, b"c\n")

    for line in sys.stdin:
        writer = os.fork()
        if writer == 0:
            try:
                write(*line.rstrip("\n").split(" ", 1))
            finally:
                os._exit(1)
        os.waitpid(writer, 0)
        os.write(1, b"end\n")


if __name__ == "__main__":
    main(sys.argv[1])
