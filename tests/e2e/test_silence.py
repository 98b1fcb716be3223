"""Programs that stop in the middle, as on a laptop whose lid is closed, and go on later."""

from __future__ import annotations

import asyncio
import signal
import time

from support.servers import Backend, answering
from support.stage import Stage

#: Seconds of silence after which a peer is dead, and what a busy machine may add.
DEAD = 15.0
BUSY = 3.0
#: Seconds after which a program that goes on serves as before.
BACK = 10.0


async def test_idle_connections_end_with_a_peer_that_stops_and_it_comes_back(stage: Stage) -> None:
    backend = Backend()
    try:
        async with backend.serving():
            service = stage.service(backend.port, "sleepy@1.2.3")
            await service.ready()
            proxy = stage.proxy("sleepy@1.x")
            await proxy.ready()
            await answering(proxy.port)
            clients = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in range(5)]
            for reader, writer in clients:
                writer.write(b"F" + bytes(8))  # an empty frame, and no more
                await reader.readexactly(32 + 8)
            await asyncio.sleep(2.0)

            service.process.signal(signal.SIGSTOP)
            stopped = time.monotonic()
            async with asyncio.timeout(DEAD + BUSY):
                for reader, _ in clients:
                    try:
                        assert await reader.read() == b""
                    except ConnectionResetError:
                        continue
            # Two heartbeats went unanswered, at least.
            assert time.monotonic() - stopped > DEAD - 5.0 - 1.0
            for _, writer in clients:
                writer.close()

            service.process.signal(signal.SIGCONT)
            await answering(proxy.port, deadline=BACK)
            assert service.process.returncode is None
    finally:
        backend.close()
