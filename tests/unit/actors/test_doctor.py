"""The examination of this host, with real UDP on the loopback."""

from __future__ import annotations

import asyncio
import time

import pytest
from msgspec.structs import replace
from support.pipes import descriptors, soon

from hyperseaport.actors import doctor
from hyperseaport.actors.api import DHT
from hyperseaport.transport.dht import examine as limits
from hyperseaport.transport.dht.endpoint import EndpointConfig
from hyperseaport.transport.dht.messages import Firewall
from hyperseaport.transport.errors import ConnectError, LocalError


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "APART", 0.3)


async def test_a_host_in_a_private_network() -> None:
    before, tasks = descriptors(), asyncio.all_tasks()
    async with DHT() as dht:
        findings = await doctor.examine(EndpointConfig(dht.bootstrap))
    assert findings.reachable
    assert findings.firewall == Firewall.OPEN
    assert findings.public_hosts == ("127.0.0.1",)
    assert not findings.translated
    assert (findings.port_kept, findings.stable) == (True, True)
    assert len(findings.round_trips) == findings.asked == 4
    await soon(lambda: asyncio.all_tasks() == tasks)
    await soon(lambda: descriptors() == before)


async def test_it_ends_when_the_network_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LIMIT", 0.5)
    before, tasks = descriptors(), asyncio.all_tasks()
    began = time.monotonic()
    with pytest.raises(ConnectError, match=r"too slowly: nothing was found out in 0\.5 s"):
        await doctor.examine(EndpointConfig(("127.0.0.1:9",)))
    assert time.monotonic() - began < 5
    await soon(lambda: asyncio.all_tasks() == tasks)
    await soon(lambda: descriptors() == before)


async def test_an_address_that_is_not_ours() -> None:
    config = replace(EndpointConfig(("127.0.0.1:9",)), host="192.0.2.7")
    with pytest.raises(LocalError, match=r"192\.0\.2\.7"):
        await doctor.examine(config)
