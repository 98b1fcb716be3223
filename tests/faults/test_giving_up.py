"""A program whose tree gives up ends with 1 and one line that says what failed how often."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

from support.peers import OurDHT, ours, seed
from support.process import RUNTIME

#: Kills that come sooner than a supervisor bears: more than 3 in 5 s.
INTENSITY = 3


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
        await _kill(control, "/console", INTENSITY + 1)
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


async def _kill(control: Path, path: str, times: int) -> None:
    """So often, as fast as it comes back."""
    reader, writer = await asyncio.open_unix_connection(control)
    request = json.dumps({"v": 1, "id": 1, "do": "kill", "path": path}).encode() + b"\n"
    while times:
        writer.write(request)
        answer = json.loads(await asyncio.wait_for(reader.readline(), 20))
        if "ok" in answer:
            times -= 1
        else:
            assert "no actor lives" in answer["error"], answer
            await asyncio.sleep(0.01)
    writer.close()


def _folder(home: Path, name: str) -> Path:
    folder = home / name
    folder.mkdir()
    return folder
