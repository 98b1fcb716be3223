"""Goodput over loss, delay and queue, as a text table that is compared with its snapshot.

Clock and randomness are virtual, so every figure is exact: a change of the code that makes streams
faster or slower shows as a difference of ``goodput.txt``. Write it anew with

    WRITE_SNAPSHOT=1 python -m pytest tests/sim/test_goodput.py
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from random import Random

from support.transfers import Pair, assert_delivered

from hyperseaport.testing.network import Link

SNAPSHOT = Path(__file__).with_name("goodput.txt")

MIB = 1024 * 1024
DATA = Random(1).randbytes(2 * MIB)
SEED = 1
LOSSES = (0.0, 0.01, 0.02, 0.05)
#: Seconds, one way.
DELAYS = (0.001, 0.02, 0.1)
#: Bytes a second and bytes of queue: 100 Mbit/s, and 10 ms of it.
BOTTLENECK = (12_500_000.0, 125_000)
#: Seconds, one way, for two streams that share the bottleneck.
SHARED_DELAY = 0.01
#: Bytes of both together after which their shares are taken.
SHARED_BYTES = 6 * MIB


def goodput(loss: float, delay: float, *, bottleneck: bool) -> float:
    """MB/s from the first write until the last byte was received."""
    link = Link(delay=delay, loss=loss)
    if bottleneck:
        link.bandwidth, link.queue = BOTTLENECK
    pair = Pair(link, SEED)
    halves = pair.stream(DATA, b"")
    assert pair.run(1000.0)
    assert_delivered(*halves)
    return len(DATA) / halves[1].last_at / 1e6


def share(loss: float, later: float) -> tuple[float, float]:
    """Two streams of one pair, the second ``later`` seconds after the first: the second's share
    of what arrives while both run, and MB/s of both together."""
    link = Link(delay=SHARED_DELAY, loss=loss, bandwidth=BOTTLENECK[0], queue=BOTTLENECK[1])
    pair = Pair(link, SEED)
    first = pair.stream(DATA * 10, b"")[1]
    pair.network.run(until=later)
    second = pair.stream(DATA * 10, b"")[1]
    begin = first.received

    def both() -> int:
        return first.received - begin + second.received

    assert pair.network.run(until=1000.0, done=lambda: both() >= SHARED_BYTES)
    return second.received / both(), both() / (pair.network.now - later) / 1e6


@cache
def shares() -> dict[tuple[float, float], tuple[float, float]]:
    """By loss and start of the second: share and sum."""
    return {each: share(*each) for each in ((0.0, 0.0), (0.01, 0.0), (0.0, 0.25))}


def table() -> str:
    """All figures, for people and for `diff`."""
    lines = [
        f"Goodput of one stream of {len(DATA) // MIB} MiB, MB/s (10^6 bytes).",
        "Left: no limit of bandwidth. Right: 100 Mbit/s with a queue of 125 kB, drop-tail.",
        "",
        "one way".rjust(8) + 2 * "".join(f"{delay * 1000:.0f} ms".rjust(10) for delay in DELAYS),
    ]
    for loss in LOSSES:
        cells = [
            goodput(loss, delay, bottleneck=bottleneck)
            for bottleneck in (False, True)
            for delay in DELAYS
        ]
        figures = "".join(f"{cell:10.3f}" for cell in cells)
        lines.append(f"loss {loss:.0%}".rjust(8) + figures)
    lines += [
        "",
        "Two streams of one pair on that bottleneck, 10 ms one way.",
        "",
        "    loss    second joins    its share    both, MB/s",
    ]
    for (loss, later), (part, both) in shares().items():
        lines.append(f"{loss:8.0%}{later:14.2f} s{part:13.3f}{both:14.3f}")
    return "\n".join(lines) + "\n"


def test_goodput_is_as_in_the_snapshot() -> None:
    text = table()
    if os.environ.get("WRITE_SNAPSHOT"):
        SNAPSHOT.write_text(text)
    assert text == SNAPSHOT.read_text()


def test_two_streams_that_start_together_share_the_path() -> None:
    for (loss, later), (part, _) in shares().items():
        if not later:
            assert 1 / 3 < part < 2 / 3, f"at {loss:.0%} loss"
