"""Services that are known and do not come: the proxy says which of them refuses, and which is dead,
while whoever connects still waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator

from support.peers import OurProxy, seed
from support.process import RUNTIME
from support.servers import Backend
from support.stage import Stage, public_key
from support.waiting import until

from hyperseaport.transport.dht.endpoint import Endpoint, EndpointConfig

#: Seconds until the proxy knows, and what a busy machine may add.
KNOWN = 4.0
BUSY = 2.0
LOGGED = ["--log-level", "info"]


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[int]:
    """The port of a server."""
    backend = Backend()
    try:
        async with backend.serving():
            yield backend.port
    finally:
        backend.close()


async def told(stage: Stage, proxy: OurProxy, text: str) -> float:
    """Connect to the proxy, and wait until it says a line with this text, which `why` repeats.
    Seconds until the line."""
    _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    begin = time.monotonic()
    writer.write(b"F")
    try:

        async def said() -> bool:
            return text in proxy.process.text()

        await until(said, f"the proxy says {text!r}", deadline=KNOWN + BUSY)
        took = time.monotonic() - begin
        (path,) = RUNTIME.rglob(f"*-{proxy.process.pid}.sock")
        assert text in await stage.command("why", "--json", "--control", path)
    finally:
        writer.close()
    return took


async def test_a_service_that_refuses(stage: Stage) -> None:
    friend = public_key(seed("friend"))
    async with serving() as port:
        service = stage.service(port, "picky@1.2.3", options=["--allow", friend])
        await service.ready()
        proxy = stage.proxy("picky@1.x", options=LOGGED)
        await proxy.ready()
        assert await told(stage, proxy, "refuses this key") < KNOWN


async def test_a_service_that_does_not_answer(stage: Stage) -> None:
    async with serving() as port:
        service = stage.service(port, "stopped@1.2.3")
        await service.ready()
        proxy = stage.proxy("stopped@1.x", options=LOGGED)
        await proxy.ready()
        service.process.signal(signal.SIGSTOP)
        assert await told(stage, proxy, "does not answer: is its program running?") < KNOWN


async def test_a_service_that_nobody_announces(stage: Stage) -> None:
    meta = {"role": "ghost", "version": "1.2.3", "_tags": {}, "tags": [], "hash": "ghost|1.2.3|"}
    params = {"meta": meta, "servicePublicKey": public_key(seed("ghost"))}
    request = json.dumps({"method": "register", "params": params, "id": 1}) + "\n"
    endpoint = await Endpoint.open(EndpointConfig(bootstrap=(stage.bootstrap,), host="127.0.0.1"))
    try:
        await endpoint.ready()
        session = await endpoint.connect(bytes.fromhex(stage.key))
        session.set_protocol(asyncio.Protocol())
        session.write(request.encode())
        proxy = stage.proxy("ghost@1.x", options=LOGGED)
        await proxy.ready()
        assert await told(stage, proxy, "nobody announces") < KNOWN
    finally:
        await endpoint.close()
