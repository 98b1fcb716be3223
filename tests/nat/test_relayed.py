"""Who meets at a blind relay, ours and Node's: two random NATs have no other way."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import npm
from support.blind_relays import RELAYS, RelayedProxy, RelayedService
from support.laboratory import Host, Kind
from support.laboratory_cells import World, connected, exchange, first_exchange
from support.peers import START, OurProxy, OurService, Peer, Proxy, Service
from support.peers import Kind as Program
from support.ports import free_port
from support.process import Process, environment
from support.servers import Backend

if TYPE_CHECKING:
    from .conftest import Outcomes

pytestmark = pytest.mark.timeout(900)

#: Seconds until the first byte of a connection.
LIMIT = 12.0
#: Milliseconds; slower is broken. Node loses its first packet at a relay now and then, and repeats
#: it after a second.
SLOW, SLOW_NODE = 1000.0, 2500.0
#: Bytes there and back while a stream leaves the relay.
POURED = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Meeting:
    """Whose relay, service and proxy, and what both of them sit behind."""

    relay: Program
    service: Program
    proxy: Program
    site: Kind = "random"

    @property
    def name(self) -> str:
        return f"{self.site}-{self.service}-to-{self.proxy}-at-{self.relay}"


class DialingProxy(Proxy):
    """Ours in front of a service that is in no registry."""

    kind = "ours"

    def __init__(self, home: Path, bootstrap: str, service: str, relay: str) -> None:
        self.port = free_port()
        script = npm.PEERS / "dial.py"
        self.process = Process(
            "our dialer",
            [sys.executable, script, str(self.port), service, relay],
            cwd=home,
            env=environment(home, HYPERSEAPORT_BOOTSTRAP=bootstrap),
        )

    async def ready(self) -> None:
        await self.process.line("^ready$", deadline=START)


@contextlib.asynccontextmanager
async def meet(world: World, meeting: Meeting) -> AsyncIterator[tuple[Host, Proxy]]:
    """A proxy that has not connected yet, and its host. All have sites of their own."""
    with contextlib.ExitStack() as stack:

        async def start(host: Host, make: Callable[[Path], Peer]) -> None:
            with host.entered():
                peer = make(world.folder(meeting.name))
            stack.callback(peer.close)
            await peer.ready()
            started.append(peer)

        started: list[Peer] = []
        bootstrap, role = world.bootstrap, f"{meeting.name}@1.2.3"
        await start(world.laboratory.host(), lambda home: RELAYS[meeting.relay](home, bootstrap))
        relay: str = started[0].key  # type: ignore[attr-defined]
        through = ["--relay-through", relay]
        home, away = (world.laboratory.site(meeting.site).hosts[0] for _ in range(2))
        with home.entered():
            backend = Backend()
        stack.callback(backend.close)

        def service(place: Path) -> Service:
            if meeting.service == "node":
                return RelayedService(place, bootstrap, port=backend.port)
            return OurService(
                place, bootstrap, world.key, port=backend.port, role=role, options=through
            )

        def proxy(place: Path) -> Proxy:
            key: str = started[1].key  # type: ignore[attr-defined]
            if meeting.proxy == "node":
                return RelayedProxy(place, bootstrap, key, relay=relay)
            if meeting.service == "node":
                return DialingProxy(place, bootstrap, key, relay)
            return OurProxy(
                place, bootstrap, world.key, role=f"{meeting.name}@1.x", options=through
            )

        await start(home, service)
        await start(away, proxy)
        async with backend.serving():
            front = started[2]
            assert isinstance(front, Proxy)
            yield away, front
        assert not backend.errors, backend.errors


@dataclass(frozen=True, slots=True)
class ThreeTimes(Meeting):
    """Milliseconds to the first byte of three connections in a row."""

    async def __call__(self, world: World) -> list[float]:
        async with meet(world, self) as (host, proxy):
            times = [await first_exchange(host, proxy, LIMIT)]
            times += [await exchange(host, proxy.port, LIMIT) for _ in range(2)]
        return times


@dataclass(frozen=True, slots=True)
class AllTheWay(Meeting):
    """Bytes of one connection that begins at the relay and soon has a direct path."""

    async def __call__(self, world: World) -> int:
        came = 0

        def arrived(count: int) -> None:
            nonlocal came
            came = count

        async with (
            meet(world, self) as (host, proxy),
            connected(host, proxy.port, LIMIT) as (connection, _),
        ):
            await connection.pour(POURED, arrived)
        return came


RANDOM = [
    ThreeTimes("ours", "ours", "ours"),
    ThreeTimes("node", "ours", "ours"),
    ThreeTimes("node", "ours", "node"),
    ThreeTimes("node", "node", "ours"),
]
CONSISTENT = [
    AllTheWay("ours", "ours", "ours", "consistent"),
    AllTheWay("node", "node", "ours", "consistent"),
    AllTheWay("node", "ours", "node", "consistent"),
]


@pytest.mark.parametrize("scenario", RANDOM, ids=lambda each: each.name)
def test_random_nats_meet_at_a_relay(scenario: ThreeTimes, outcomes: Outcomes) -> None:
    ours = scenario.service == scenario.proxy == "ours"
    assert max(outcomes.of(scenario)) < (SLOW if ours else SLOW_NODE)


@pytest.mark.parametrize("scenario", CONSISTENT, ids=lambda each: each.name)
def test_streams_leave_the_relay(scenario: AllTheWay, outcomes: Outcomes) -> None:
    assert outcomes.of(scenario) == POURED
