"""Whatever starts first, dies or comes back: the proxy finds a service that serves."""

from __future__ import annotations

import signal

import pytest
from support.peers import seed
from support.ports import free_port
from support.stage import Stage, http_answer, public_key


async def test_a_proxy_starts_before_its_service(stage: Stage) -> None:
    proxy = stage.proxy("later@1.x")
    await proxy.process.line(f"^connecting to registry {stage.key}$")
    await proxy.process.line("^connected to registry$")
    service = stage.service(await stage.web_server(page=b"served"), "later@1.2.3")
    await service.ready()
    await proxy.ready()
    async with stage.undisturbed(service, proxy):
        await http_answer(proxy.port, "/page", b"served")


async def test_service_and_proxy_start_before_the_registry(stage: Stage) -> None:
    secret = seed("a registry that comes last")
    key = public_key(secret)
    proxy = stage.proxy("early@1.x", key=key)
    service = stage.service(await stage.web_server(page=b"early"), "early@1.2.3", key=key)
    await proxy.process.line(f"^connecting to registry {key}$")
    await service.process.line(f"^connecting to registry {key}$")
    registry = stage.registry(secret)
    await registry.ready()
    assert registry.key == key
    await service.ready()
    await proxy.ready()
    async with stage.undisturbed(registry, service, proxy):
        await http_answer(proxy.port, "/page", b"early")


@pytest.mark.parametrize("standby", [True, False], ids=["standby", "started-later"])
async def test_another_service_takes_over_from_a_killed_one(stage: Stage, standby: bool) -> None:
    name = "standby" if standby else "successor"
    first = stage.service(await stage.web_server(page=b"first"), f"{name}@1.2.3")
    await first.ready()
    proxy = stage.proxy(f"{name}@1.x")
    await proxy.ready()
    await http_answer(proxy.port, "/page", b"first")
    port = await stage.web_server(page=b"second")
    second = stage.service(port, f"{name}@1.2.3")
    if standby:
        await second.ready()
    first.process.signal(signal.SIGKILL)
    assert await first.process.exit() == -signal.SIGKILL
    await http_answer(proxy.port, "/page", b"second")
    await second.ready()
    async with stage.undisturbed(second, proxy):
        for _ in range(5):
            await http_answer(proxy.port, "/page", b"second", deadline=10)


async def test_the_registry_comes_back_empty_and_is_filled_again(stage: Stage) -> None:
    secret = seed("a registry that is killed")
    registry = stage.registry(secret)
    await registry.ready()
    port = await stage.web_server(page=b"again")
    service = stage.service(port, "again@1.2.3", key=registry.key)
    await service.ready()
    first = stage.proxy("again@1.x", key=registry.key)
    await first.ready()
    registry.process.signal(signal.SIGKILL)
    await registry.process.exit()
    await http_answer(first.port, "/page", b"again", deadline=10)  # an open path needs no registry

    reborn = stage.registry(secret)
    await reborn.ready()
    second = stage.proxy("again@1.x", key=reborn.key)
    await second.process.line("^proxy from ", deadline=60)  # the service has to notice first
    await second.ready()
    async with stage.undisturbed(reborn, service, first, second):
        await http_answer(first.port, "/page", b"again", deadline=10)
        await http_answer(second.port, "/page", b"again", deadline=10)


async def test_a_service_starts_before_its_server(stage: Stage) -> None:
    port = free_port()
    service, proxy = await stage.chain(port, "empty")
    async with stage.undisturbed(service, proxy):
        with pytest.raises(AssertionError, match="not so within"):
            await http_answer(proxy.port, "/page", b"here", deadline=1)  # nobody listens yet
        await stage.web_server(port=port, page=b"here")
        await http_answer(proxy.port, "/page", b"here", deadline=20)
