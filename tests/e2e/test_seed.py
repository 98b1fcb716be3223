"""``hyperseaport seed``: a fresh key pair, quickly."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from support.peers import HEX, ours, seed
from support.process import Process, environment
from support.stage import public_key

PRINTED = re.compile(
    rf"\n?Generated a random seed for you!\n--seed ({HEX})\n"
    rf"services and proxies will connect with pubkey ({HEX})\n\n?"
)


async def test_a_random_seed_and_its_public_key(tmp_path: Path) -> None:
    seeds = set()
    for _ in range(2):
        with ours("seed", ["seed"], tmp_path, bootstrap=None) as process:
            assert await process.exit() == 0
        assert process.text("stderr") == ""
        match = PRINTED.fullmatch(process.text("stdout"))
        assert match, process.text()
        assert match[2] == public_key(match[1])
        seeds.add(match[1])
    assert len(seeds) == 2


def test_the_key_of_the_readme() -> None:
    printed = "c84c7034a0309479299d81468b7bc59592a96b3a919fd1ff159aea1879407382"
    key = "5b64a8956d8f2404c4f4b4e6f402ef439f610f7fe297718093641359130b0d45"
    assert public_key(printed) == key
    assert public_key(seed("another")) != key


async def test_it_loads_nothing_of_the_network(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "hyperseaport.cli", "seed"]
    begin = time.monotonic()
    with Process("seed", command, cwd=tmp_path, env=environment(tmp_path)) as process:
        assert await process.exit() == 0
    record_property("seconds", round(time.monotonic() - begin, 3))
    imported = set(re.findall(r"\| +([\w.]+)$", process.text("stderr"), re.MULTILINE))
    assert "encodings" in imported, "the list of imports was not understood"
    heavy = {"asyncio", "thespian", "noise", "cryptography"}
    assert not {name for name in imported if name.split(".")[0] in heavy}
