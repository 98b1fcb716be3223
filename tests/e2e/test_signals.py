"""SIGINT and SIGTERM end every command in order; a second SIGINT ends it at once."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

import pytest
from support.peers import OurDHT, Peer, seed
from support.servers import Backend
from support.stage import Stage, http_answer

#: Seconds for an orderly end on a busy machine: every layer has its own, shorter, limit.
ORDERLY = 15.0

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


async def ends_in_order(peer: Peer, number: signal.Signals) -> None:
    peer.process.signal(number)
    assert await peer.process.exit(deadline=ORDERLY) == 0
    assert "Traceback" not in peer.process.text("stderr")


@SIGNALS
async def test_dht(tmp_path: Path, number: signal.Signals) -> None:
    dht = OurDHT(tmp_path)
    with dht.process:
        await dht.ready()
        await ends_in_order(dht, number)


@SIGNALS
async def test_registry_service_and_proxy(stage: Stage, number: signal.Signals) -> None:
    registry = stage.registry(seed(f"to be ended by {number}"))
    await registry.ready()
    port = await stage.web_server(page=b"page")
    service = stage.service(port, "ends@1.2.3", key=registry.key)
    await service.ready()
    proxy = stage.proxy("ends@1.x", key=registry.key)
    await proxy.ready()
    await http_answer(proxy.port, "/page", b"page")
    await ends_in_order(proxy, number)
    await ends_in_order(service, number)
    await ends_in_order(registry, number)


@SIGNALS
async def test_commands_that_wait(stage: Stage, number: signal.Signals) -> None:
    """A registry that nobody announced, a service that nobody has: no reason to stay either."""
    nobody = seed("nobody")
    waiting = [
        stage.service(1, "waits@1.2.3", key=nobody),
        stage.proxy("waits@1.x", key=nobody),
        stage.proxy("waits@1.x"),
    ]
    for peer in waiting:
        await peer.process.line("^connecting to registry")
    for peer in waiting:
        await ends_in_order(peer, number)


async def test_an_ended_service_is_unregistered_at_once(stage: Stage) -> None:
    """Its entry leaves with it, so a proxy that starts now waits for the next service."""
    first = stage.service(await stage.web_server(page=b"first"), "leaves@1.2.3")
    await first.ready()
    await ends_in_order(first, signal.SIGTERM)
    proxy = stage.proxy("leaves@1.x")
    await proxy.process.line("^connected to registry$")
    second = stage.service(await stage.web_server(page=b"second"), "leaves@1.2.3")
    await second.ready()
    await proxy.ready()
    assert second.key in proxy.process.text("stdout")
    assert first.key not in proxy.process.text("stdout")


async def test_a_second_interrupt_ends_at_once(stage: Stage) -> None:
    """The far end is stopped in the middle of a transfer, so the orderly end has to wait."""
    backend = Backend()  # accepts, reads nothing, answers nothing
    with contextlib.closing(backend):
        service, proxy = await stage.chain(backend.port, "stuck")
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(bytes(1024 * 1024))
        service.process.signal(signal.SIGSTOP)
        proxy.process.signal(signal.SIGINT)
        proxy.process.signal(signal.SIGINT)
        assert await proxy.process.exit(deadline=2) is not None
        assert "Traceback" not in proxy.process.text("stderr")
        writer.transport.abort()
