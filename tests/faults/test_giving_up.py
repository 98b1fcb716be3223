"""A program whose tree gives up ends with 1 and one line that says what failed how often."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from pathlib import Path

from support.peers import OurDHT, ours, seed
from support.process import RUNTIME


async def test_a_program_gives_up(tmp_path: Path) -> None:
    dht = OurDHT(_folder(tmp_path, "dht"))
    program = None
    try:
        await dht.ready()
        arguments = ["registry", "--memory", "--seed", seed("giving up")]
        program = ours(
            "registry", arguments, _folder(tmp_path, "registry"), bootstrap=dht.bootstrap
        )
        await program.line("^Registry listening")
        (control,) = RUNTIME.rglob(f"*-{program.pid}.sock")
        await _kill(control, "/console")
        assert await program.exit(deadline=20) == 1
        said = [
            line
            for line in program.text("stderr").splitlines()
            if line.startswith("hyperseaport: ")
        ]
        assert len(said) == 1, program.transcript()
        expected = r"hyperseaport: /console failed 4 times in 5 s, the last time: killed"
        assert re.fullmatch(expected, said[0]), said
    finally:
        dht.close()
        if program is not None:
            program.close()


async def _kill(control: Path, path: str) -> None:
    """As often as it comes back, until there is nobody left to ask."""
    reader, writer = await asyncio.open_unix_connection(control)
    request = json.dumps({"v": 1, "id": 1, "do": "kill", "path": path}).encode() + b"\n"
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(20):
            while True:
                writer.write(request)
                if not await reader.readline():
                    break
    writer.close()


def _folder(home: Path, name: str) -> Path:
    folder = home / name
    folder.mkdir()
    return folder
