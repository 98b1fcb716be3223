"""An hour without any network costs next to nothing, and is over in seconds when there is one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import structlog
from support.endpoint import MemoryNetwork
from support.pipes import in_memory
from support.registry import REGISTRY, running_registry, virtual

from hyperseaport.actors import deployment
from hyperseaport.actors.messages import LinkDown, LinkUp
from hyperseaport.actors.registry import link
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.supervisor import Supervisor, SupervisorSpec
from hyperseaport.testing.network import Host, Network
from hyperseaport.transport.dht.endpoint import EndpointConfig
from hyperseaport.transport.dht.hyperdht import Connection, HyperDHT, HyperDHTConfig
from hyperseaport.transport.dht.node import NodeConfig
from hyperseaport.transport.keys import KeyPair
from hyperseaport.transport.transmit import CLIENT_SOCKET, SERVER_SOCKET

HOUR = 3600.0
#: Of a core; actors and node together.
SHARE = 0.01
#: Seconds.
BACK = 5.0
LOOPBACK = "127.0.0.1"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
    yield
    structlog.reset_defaults()


def tree(name: str, show: Any) -> SupervisorSpec:
    config, keys = EndpointConfig(bootstrap=()), (REGISTRY.public_key,)
    common: Any = {"host": LOOPBACK, "key_pair": None, "show": show}
    if name == "service":
        return deployment.service_tree(config, keys, "a@1.0.0", port=9, allow=None, **common)
    return deployment.proxy_tree(config, keys, "a@1.x", port=0, **common)


@pytest.mark.parametrize("name", ["service", "proxy"])
@virtual
async def test_the_actors_of_a_program_that_is_offline(name: str) -> None:
    network = MemoryNetwork()
    news: list[tuple[float, object]] = []
    loop = asyncio.get_running_loop()

    def times(kind: type) -> list[float]:
        return [when for when, piece in news if isinstance(piece, kind)]

    async with running_registry(network), ActorRuntime() as runtime:
        spec = in_memory(tree(name, lambda piece: news.append((loop.time(), piece))), network)
        await runtime.ready(runtime.spawn(Supervisor, spec, name="root"))
        await asyncio.sleep(20)
        assert len(times(LinkUp)) == 1
        network.up = False
        for ends in network.connections:
            for end in ends:
                end.blackhole()
        await asyncio.sleep(60)
        assert times(LinkDown), "nobody has noticed"
        attempts, work = network.attempts, time.process_time()
        await asyncio.sleep(HOUR)
        work = time.process_time() - work
        attempts = network.attempts - attempts
        # One each 1.5 to 3 s.
        assert HOUR / link.BACKOFF_LAST <= attempts <= HOUR / link.BACKOFF_LAST * 2
        assert work < SHARE / 2 * HOUR
        network.up = True
        back = loop.time()
        await asyncio.sleep(BACK)
        assert times(LinkUp)[-1] - back < BACK


class Node:
    """A DHT node on the simulated network."""

    def __init__(self, network: Network, port: int, bootstrap: int | None, permanent: bool) -> None:
        self.network = network
        config = NodeConfig(
            bootstrap=() if bootstrap is None else ((LOOPBACK, bootstrap),),
            public_address=(LOOPBACK, port) if permanent else None,
        )
        self.dht = HyperDHT(HyperDHTConfig(node=config, local_hosts=(LOOPBACK,)), Random(port))
        self.dht.start(network.now, server_port=port, client_port=port + 1000)
        sockets = {SERVER_SOCKET: (LOOPBACK, port), CLIENT_SOCKET: (LOOPBACK, port + 1000)}
        self.host: Host = network.attach(self.dht, sockets)
        assert network.run(until=network.now + 10, done=lambda: self.dht.node.ready)


class Dialer:
    """Connects as a link does: again and again, with its pauses."""

    def __init__(self, node: Node, key: bytes) -> None:
        self.node = node
        self.key = key
        self.attempts = 0
        #: When.
        self.opened: list[float] = []
        self._rng = Random(3)

    def dial(self) -> None:
        self.attempts += 1
        network = self.node.network
        self.node.dht.connect(self.key, network.now, on_open=self._opened, on_error=self._failed)
        network.poke(self.node.host)

    def _opened(self, _connection: Connection, now: float) -> None:
        self.opened.append(now)

    def _failed(self, _error: Exception, now: float) -> None:
        pause = self._rng.uniform(link.BACKOFF_LAST / 2, link.BACKOFF_LAST)
        self.node.network.at(now + pause, self.dial)


def test_the_node_of_a_program_that_is_offline() -> None:
    network = Network(Random(1))
    first = Node(network, 40_001, None, True)
    nodes = [first, *(Node(network, port, 40_001, True) for port in (40_002, 40_003, 40_004))]
    server = Node(network, 40_005, 40_001, False)
    listening: list[float] = []
    keys = KeyPair.from_seed(b"\x09" * 32)
    server.dht.listen(
        keys,
        network.now,
        on_connection=lambda _connection, _now: None,
        on_listening=listening.append,
    )
    network.poke(server.host)
    assert network.run(until=network.now + 20, done=lambda: bool(listening))
    client = Node(network, 40_006, 40_001, False)
    network.run(until=network.now + 30)
    network.partition([client.host], [each.host for each in (*nodes, server)])
    begin, lost, work = network.now, network.lost, time.process_time()
    dialer = Dialer(client, keys.public_key)
    dialer.dial()
    network.run(until=begin + HOUR)
    # Six nodes are simulated, and all their work is counted as if it were one's.
    work = time.process_time() - work
    assert not dialer.opened
    assert dialer.attempts > HOUR / 60
    assert work < SHARE / 2 * HOUR
    assert network.lost - lost < 100 * HOUR / link.BACKOFF_LAST
    network.heal()
    healed = network.now
    network.run(until=healed + 60, done=lambda: bool(dialer.opened))
    assert dialer.opened
    assert dialer.opened[0] - healed < BACK
