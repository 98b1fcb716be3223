"""Node programs that only meet at a relay: at Node's, which proves the tests themselves, and at
ours.

Ids read DHT-relay, and who of the two names the relay.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.blind_relays import RELAYS, OurRelay, Relay, RelayedProxy, RelayedService
from support.peers import DHTS, KINDS, Kind, Peer
from support.servers import Backend, exchange, half_close
from support.waiting import until

MIB = 1024 * 1024

MEETINGS = list(itertools.product(KINDS, KINDS, ("proxy", "service")))


@dataclass(slots=True)
class Meeting:
    """A Node proxy and a Node service that meet at a relay."""

    relay: Relay
    proxy: RelayedProxy


@contextlib.asynccontextmanager
async def meeting(
    home: Path, dht: Kind, relay: Kind, named_by: str, options: Sequence[str] = ()
) -> AsyncIterator[Meeting]:
    """``options`` are our relay's. All programs run to the end."""
    with contextlib.ExitStack() as stack:
        peers: list[Peer] = []

        async def start(peer: Peer) -> None:
            peers.append(peer)
            stack.callback(peer.close)
            await peer.ready()

        def folder(name: str) -> Path:
            (home / name).mkdir()
            return home / name

        backend = Backend()
        stack.callback(backend.close)
        network = DHTS[dht](folder("dht"))
        await start(network)
        place = folder("relay"), network.bootstrap
        middle = OurRelay(*place, options=options) if relay == "ours" else RELAYS[relay](*place)
        await start(middle)
        keys = {named_by: middle.key}
        service = RelayedService(
            folder("service"),
            network.bootstrap,
            port=backend.port,
            relay=keys.get("service", "none"),
        )
        await start(service)
        proxy = RelayedProxy(
            folder("proxy"), network.bootstrap, service.key, relay=keys.get("proxy", "none")
        )
        await start(proxy)
        async with backend.serving():
            yield Meeting(middle, proxy)
        assert not backend.errors, backend.errors
        for peer in peers:
            code = peer.process.returncode
            assert code is None, f"{peer.process.name} ended with exit code {code}"


@pytest.mark.parametrize(("dht", "relay", "named_by"), MEETINGS)
async def test_sixteen_mebibytes_each_way(
    tmp_path: Path, dht: Kind, relay: Kind, named_by: str
) -> None:
    payload = random.Random(2).randbytes(16 * MIB)
    async with meeting(tmp_path, dht, relay, named_by) as there:
        await exchange(there.proxy.port, payload, b"", b"still in step")
        if isinstance(there.relay, OurRelay):
            books = await there.relay.books()
            assert books["bytes"] > 2 * len(payload)
            assert books["strangers"] == 0


async def test_many_connections_and_none_is_left(tmp_path: Path) -> None:
    rng = random.Random(3)
    payloads = [rng.randbytes(64 * 1024 + index) for index in range(20)]
    async with meeting(tmp_path, "ours", "ours", "proxy") as there:
        async with asyncio.TaskGroup() as clients:
            for payload in payloads:
                clients.create_task(exchange(there.proxy.port, payload, payload[:100]))
        await half_close(there.proxy.port, payloads[0][:3000])
        relay = there.relay
        assert isinstance(relay, OurRelay)

        async def over() -> bool:
            books = await relay.books()
            return not (books["sessions"] or books["pairs"] or books["waiting"])

        await until(over, "all sessions are over", deadline=30)
        counted = (await relay.books())["counters"]
        assert counted["paired"] == len(payloads) + 1
        assert counted["accepted"] == 2 * counted["paired"]
