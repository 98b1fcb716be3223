"""``python -m http.server`` behind a service, and HTTP clients at the proxy."""

from __future__ import annotations

import asyncio
import http.client
import random
from pathlib import Path

import pytest
from support.peers import seed
from support.stage import Stage, http_get, public_key


async def test_files_of_a_web_server(stage: Stage) -> None:
    big = random.Random(1).randbytes(3_000_000)
    port = await stage.web_server(welcome=b'{"couchdb":"Welcome"}', big=big, empty=b"")
    service, proxy = await stage.chain(port, "couchdb")
    async with stage.undisturbed(service, proxy):
        assert await http_get(proxy.port, "/welcome") == (200, b'{"couchdb":"Welcome"}')
        assert await http_get(proxy.port, "/empty") == (200, b"")
        assert await http_get(proxy.port, "/big") == (200, big)
        status, _ = await http_get(proxy.port, "/missing")
        assert status == 404


async def test_many_clients_at_once(stage: Stage) -> None:
    page = random.Random(2).randbytes(50_000)
    service, proxy = await stage.chain(await stage.web_server(page=page), "many")
    async with stage.undisturbed(service, proxy):
        for _ in range(3):
            answers = await asyncio.gather(*(http_get(proxy.port, "/page") for _ in range(20)))
            assert answers == [(200, page)] * 20


async def test_the_proxy_listens_on_loopback_only(stage: Stage) -> None:
    """Unless ``--host`` says otherwise; the Node program listens on every interface."""
    port = await stage.web_server(page=b"page")
    _, proxy = await stage.chain(port, "loopback")
    listening = listening_sockets()
    assert f"0100007F:{proxy.port:04X}" in listening
    assert f"00000000:{proxy.port:04X}" not in listening


async def test_only_allowed_keys_reach_the_service(stage: Stage) -> None:
    port = await stage.web_server(page=b"for friends")
    friend, stranger = seed("friend"), seed("stranger")
    service = stage.service(port, "private@1.0.0", options=["--allow", public_key(friend)])
    await service.ready()
    invited = stage.proxy("private@1.x", options=["--seed", friend])
    refused = stage.proxy("private@1.x", options=["--seed", stranger])
    await invited.ready()
    await refused.ready()
    async with stage.undisturbed(service, invited, refused):
        assert await http_get(invited.port, "/page") == (200, b"for friends")
        with pytest.raises((OSError, http.client.HTTPException)):
            await http_get(refused.port, "/page", deadline=30)


def listening_sockets() -> list[str]:
    """Address and port of every listening IPv4 TCP socket, in the kernel's notation."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A"]
