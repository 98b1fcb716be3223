"""The programs run on asyncio's own event loop as well as on uvloop."""

from __future__ import annotations

import contextlib
import random
import sys
from pathlib import Path

import pytest
from support.process import Process, environment
from support.servers import Backend, exchange
from support.stage import Stage

SIZE = 4 * 1024 * 1024


def runs_uvloop(process: Process) -> bool:
    return "uvloop" in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.parametrize(("choice", "module"), [("asyncio", "asyncio"), ("", "uvloop")])
async def test_bytes_both_ways(stage: Stage, choice: str, module: str) -> None:
    env = environment(stage.home, HYPERSEAPORT_BOOTSTRAP=stage.bootstrap, HYPERSEAPORT_LOOP=choice)
    backend = Backend()
    with contextlib.closing(backend):
        async with backend.serving():
            service = stage.run(
                "our service",
                [
                    *(sys.executable, "-m", "hyperseaport.cli", "service", stage.key),
                    *("-p", str(backend.port), "-r", f"loops-{module}@1.2.3"),
                ],
                env=env,
            )
            await service.line(r"^registered service \{")
            proxy = stage.run(
                "our proxy",
                [
                    *(sys.executable, "-m", "hyperseaport.cli", "proxy", stage.key),
                    *("-p", "0", "-r", f"loops-{module}@1.x"),
                ],
                env=env,
            )
            port = int((await proxy.line(r"^proxy from  (\d+) to p2p service"))[1])
            for process in (service, proxy):
                assert runs_uvloop(process) == (module == "uvloop")
            payload = random.Random(7).randbytes(SIZE)
            await exchange(port, payload, payload[::-1])
