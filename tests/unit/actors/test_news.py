"""The lines that people and scripts know, to the letter (spec: registry 7.4)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from support.endpoint import MemoryEndpoint, MemoryNetwork
from support.registry import REGISTRY, running_registry, virtual

from hyperseaport.actors import news
from hyperseaport.actors.console import Console
from hyperseaport.actors.messages import (
    EndpointReady,
    LinkConnecting,
    LinkDown,
    LinkUp,
    ProxyListening,
    ProxyRouted,
    ProxyUnrouted,
    Registered,
    RegistrationRefused,
    RegistryListening,
    RelayListening,
    ServiceGone,
    ServiceListening,
    ServiceRecord,
    ServiceRegistered,
    Watch,
)
from hyperseaport.actors.registry import roles
from hyperseaport.actors.registry.link import Link, LinkArgs
from hyperseaport.actors.system import ActorRuntime

KEY = bytes.fromhex("abe213285052e5c2f2166d144afcd71e31aa5c7d72656d7b956a2c93f76d260f")
CLIENT = bytes.fromhex("03008865d93c046129d65b8d68829e5a4757b3b24844bbd1d36d27fe1e683b59")
META = roles.to_register("couchdb@3.2.2")
RECORD = ServiceRecord(KEY, "couchdb", "3.2.2", META, remote_public_key=CLIENT)

META_LINES = """\
{
  role: 'couchdb',
  version: '3.2.2',
  _tags: {},
  tags: [],
  hash: 'couchdb|3.2.2|'
}"""
NESTED_META_LINES = META_LINES.replace("\n", "\n  ")

Show = Callable[[Callable[[str], None]], Callable[[object], None]]


def proxy(say: Callable[[str], None]) -> Callable[[object], None]:
    return news.proxy(say, "couchdb@3.x")


def dht(say: Callable[[str], None]) -> Callable[[object], None]:
    return news.dht(say, 2)


LINK_LINES = [
    (LinkConnecting(KEY, 1), f"connecting to registry {KEY.hex()}"),
    # Attempts after the first are announced by the line that says how long it has been.
    (LinkConnecting(KEY, 2), None),
    (LinkDown(KEY, "nobody", 1.0, 0.0), f"waiting for registry {KEY.hex()} (0 s)"),
    (LinkDown(KEY, "nobody", 15.0, 12.4), f"waiting for registry {KEY.hex()} (12 s)"),
    (LinkDown(KEY, "nobody", 15.0, 86_400.0), f"waiting for registry {KEY.hex()} (86400 s)"),
]
INFO = {"id": KEY.hex(), "remotePublicKey": CLIENT.hex(), "meta": META}
INFO_LINES = f"""\
{{
  id: '{KEY.hex()}',
  remotePublicKey: '{CLIENT.hex()}',
  meta: {NESTED_META_LINES}
}}"""

LINES: list[tuple[Show, object, str | None]] = [
    (
        news.registry,
        RegistryListening(KEY),
        f"Registry listening. Connect with pubkey  {KEY.hex()}",
    ),
    (
        news.registry,
        RegistryListening(KEY, anybody_registers=True, anybody_queries=True),
        f"Registry listening. Connect with pubkey  {KEY.hex()}\n"
        "whoever knows this key may register and look for services "
        "(--allow-register, --allow-query KEY: only some)",
    ),
    (
        news.registry,
        RegistryListening(KEY, anybody_queries=True),
        f"Registry listening. Connect with pubkey  {KEY.hex()}\n"
        "whoever knows this key may look for services (--allow-query KEY: only some)",
    ),
    (news.registry, ServiceRegistered(INFO), f"registered service {INFO_LINES}"),
    (news.registry, ServiceGone(INFO), None),
    (news.registry, EndpointReady(("127.0.0.1", 1), 3), None),
    (
        news.relay,
        RelayListening(KEY, anybody=True),
        f"Relay listening. Connect through pubkey  {KEY.hex()}\n"
        "whoever knows this key may use the relay (--allow KEY: only some)",
    ),
    (
        news.relay,
        RelayListening(KEY, anybody=False),
        f"Relay listening. Connect through pubkey  {KEY.hex()}",
    ),
    (news.relay, EndpointReady(("127.0.0.1", 1), 3), None),
    (news.service, ServiceListening(KEY), f"started p2p service on {KEY.hex()}"),
    (news.service, Registered(META, KEY), f"registered service {META_LINES}"),
    (
        news.service,
        RegistrationRefused(META, KEY, "the registry is full"),
        "the registry refuses the service: the registry is full",
    ),
    (news.service, LinkUp(KEY), None),
    (news.service, EndpointReady(("127.0.0.1", 1), 3), None),
    *((news.service, message, line) for message, line in LINK_LINES),
    *((proxy, message, line) for message, line in LINK_LINES),
    (proxy, LinkUp(KEY), "connected to registry"),
    (proxy, ProxyListening("127.0.0.1", 5985), None),
    (proxy, ProxyListening("127.0.0.1", 41234, chosen=True), "listening on 127.0.0.1:41234"),
    (proxy, ProxyUnrouted(5985), "waiting for service couchdb@3.x"),
    (
        proxy,
        ProxyRouted(5985, RECORD),
        f"found service {INFO_LINES}\nproxy from  5985 to p2p service {KEY.hex()}",
    ),
]


@pytest.mark.parametrize(("show", "message", "line"), LINES)
def test_lines(show: Show, message: object, line: str | None) -> None:
    said: list[str] = []
    show(said.append)(message)
    assert "\n".join(said) == (line or "")


def test_who_registered_a_service_is_left_out_when_nobody_told() -> None:
    said: list[str] = []
    proxy(said.append)(ProxyRouted(1, ServiceRecord(KEY, "a", "1.0.0", {"role": "a"})))
    assert said[0] == f"found service {{\n  id: '{KEY.hex()}',\n  meta: {{ role: 'a' }}\n}}"


def test_a_dht_says_once_where_it_is_found() -> None:
    said: list[str] = []
    show = dht(said.append)
    show(EndpointReady(("127.0.0.1", 49737), 0))
    assert said == []
    show(EndpointReady(("127.0.0.1", 49738), 1))
    assert said == ["dht node listening on 127.0.0.1:49737"]
    show(EndpointReady(("127.0.0.1", 49738), 1))  # one of them came back
    assert len(said) == 1


def test_a_stranger_cannot_drive_the_terminal() -> None:
    said: list[str] = []
    news.registry(said.append)(ServiceRegistered({"id": "\x1b[2J", "meta": {"role": "\r\n"}}))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said[0])


@virtual
async def test_a_registry_that_nobody_serves_costs_few_lines_and_no_work() -> None:
    network = MemoryNetwork(connect_delay=0.5)
    said: list[str] = []
    loop: Any = asyncio.get_running_loop()
    turns = 0
    run_once = loop._run_once

    def counting() -> None:
        nonlocal turns
        turns += 1
        run_once()

    async with ActorRuntime() as runtime:
        console = runtime.spawn(Console, proxy(said.append), "console")
        endpoint = runtime.spawn(MemoryEndpoint, network, "endpoint")
        context = {"console": console, "endpoint": endpoint}
        link = runtime.spawn(Link, LinkArgs(REGISTRY.public_key, rng=Random(1)), "link", context)
        runtime.tell(link, Watch(roles.to_find("a@1.x")))
        await asyncio.sleep(3600)
        key = REGISTRY.public_key.hex()
        assert said[0] == f"connecting to registry {key}"
        waits = [
            re.fullmatch(rf"waiting for registry {key} \((\d+) s\)", line) for line in said[1:]
        ]
        times = [int(match[1]) for match in waits if match]
        assert len(times) == len(said) - 1
        assert network.attempts > 1000
        # The longer it is away, the rarer the lines.
        assert len(times) < 25
        assert times == sorted(times)
        gaps = [after - before for before, after in pairwise(times)]
        assert all(later >= before for before, later in pairwise(gaps[2:]))
        loop._run_once = counting
        await asyncio.sleep(60)
        loop._run_once = run_once
        # Some thirty attempts, each of them a few messages.
        assert turns < 400

        async with running_registry(network):
            await asyncio.sleep(20)
            assert said[-1] == "connected to registry"
