"""Blind relays, Node's and ours, and a pair of Node programs that meet there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import npm
from .peers import HEX, START, Kind, Peer, Proxy, Service, node, ours, seed
from .ports import free_port
from .process import RUNTIME, Process

SCRIPT = npm.PEERS / "blind_relay.js"


class Relay(Peer):
    """`key` (64 hex digits) is known once it is ready."""

    key: str


class NodeRelay(Relay):
    kind = "node"

    def __init__(self, home: Path, bootstrap: str) -> None:
        self.process = _script("relay", home, bootstrap)

    async def ready(self) -> None:
        self.key = (await self.process.line(f"^relay ({HEX})$", deadline=START))[1]


class OurRelay(Relay):
    kind = "ours"

    def __init__(self, home: Path, bootstrap: str, *, options: Sequence[str] = ()) -> None:
        arguments = ["relay", "--seed", seed(str(home)), *options]
        self.process = ours("our relay", arguments, home, bootstrap=bootstrap)

    async def ready(self) -> None:
        pattern = f"^Relay listening. Connect through pubkey  ({HEX})$"
        self.key = (await self.process.line(pattern, deadline=START))[1]

    async def books(self) -> dict[str, Any]:
        """What it says of its sessions and pairs, and what it has passed on."""
        (control,) = RUNTIME.rglob(f"*-{self.process.pid}.sock")
        reader, writer = await asyncio.open_unix_connection(control)
        writer.write(b'{"v": 1, "do": "describe", "path": "/node/relay/books"}\n')
        answer = json.loads(await reader.readline())
        writer.close()
        await writer.wait_closed()
        books: dict[str, Any] = answer["ok"]
        return books


RELAYS: dict[Kind, type[NodeRelay | OurRelay]] = {"node": NodeRelay, "ours": OurRelay}


class RelayedService(Service):
    """A Node service that may name a relay, and that nobody reaches but through one."""

    kind = "node"

    def __init__(self, home: Path, bootstrap: str, *, port: int, relay: str = "none") -> None:
        self.process = _script("service", home, bootstrap, str(port), relay, "only")


class RelayedProxy(Proxy):
    """A Node proxy that reaches a service by its key, and only through the relay that it or the
    service names."""

    kind = "node"

    def __init__(self, home: Path, bootstrap: str, service: str, *, relay: str = "none") -> None:
        self.port = free_port()
        self.process = _script("proxy", home, bootstrap, str(self.port), service, relay, "only")

    async def ready(self) -> None:
        await self.process.line("^ready$", deadline=START)


def _script(role: str, home: Path, bootstrap: str, *arguments: str) -> Process:
    return node(f"node {role}", [SCRIPT, role, *arguments], home, bootstrap=bootstrap)
