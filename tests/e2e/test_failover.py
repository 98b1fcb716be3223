"""Connections find another way: instances that die, registries that are away."""

from __future__ import annotations

import json
import signal
from typing import Any

from support.peers import OurService, seed
from support.stage import NOTICED, Stage, http_answer, http_get
from support.waiting import until


async def instance(stage: Stage, role: str, body: bytes, **options: Any) -> OurService:
    service = stage.service(await stage.web_server(page=body), role, **options)
    await service.ready()
    return service


async def test_the_instance_in_use_is_killed(stage: Stage) -> None:
    """No client notices: the connection that meets the dead one goes to the other."""
    newer = await instance(stage, "falls@1.3.0", b"newer")
    older = await instance(stage, "falls@1.2.0", b"older")
    proxy = stage.proxy("falls@1.x")
    await proxy.ready()
    async with stage.undisturbed(older, proxy):
        await http_answer(proxy.port, "/page", b"newer")
        newer.process.signal(signal.SIGKILL)
        for _ in range(20):
            assert await http_get(proxy.port, "/page") == (200, b"older")


async def test_it_comes_back_under_its_key(stage: Stage) -> None:
    again = ["--seed", seed("comes back")]
    newer = await instance(stage, "returns@1.3.0", b"newer", options=again)
    older = await instance(stage, "returns@1.2.0", b"older")
    proxy = stage.proxy("returns@1.x")
    await proxy.ready()
    newer.process.signal(signal.SIGKILL)
    assert await http_get(proxy.port, "/page") == (200, b"older")
    # Its successor need not wait for the old entry to end.
    await instance(stage, "returns@1.3.0", b"newest", options=again)
    await http_answer(proxy.port, "/page", b"newest")
    assert older.process.returncode is None


async def test_a_host_that_vanishes_without_a_word(stage: Stage) -> None:
    """Stopped, its process neither answers nor refuses, as if its cable had been cut."""
    newer = await instance(stage, "silent@1.3.0", b"newer")
    await instance(stage, "silent@1.2.0", b"older")
    proxy = stage.proxy("silent@1.x")
    await proxy.ready()
    await http_answer(proxy.port, "/page", b"newer")
    newer.process.signal(signal.SIGSTOP)
    for _ in range(5):
        assert await http_get(proxy.port, "/page") == (200, b"older")


async def listed(stage: Stage, key: str, role: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(await stage.command("list", key, role, "--json"))[
        "services"
    ]
    return found


async def test_connections_need_no_registry(stage: Stage) -> None:
    """Killed, it takes nobody with it; started again, it lists every living service as before."""
    label = seed("registry that dies")
    registry = stage.registry(label)
    await registry.ready()
    services = [
        await instance(stage, f"stays@1.{minor}.0", b"here", key=registry.key) for minor in range(3)
    ]
    proxy = stage.proxy("stays@1.x", key=registry.key)
    await proxy.ready()
    keys = {service.key for service in services}
    assert {row["key"] for row in await listed(stage, registry.key, "stays")} == keys

    registry.process.signal(signal.SIGKILL)
    await registry.process.exit()
    for _ in range(20):
        assert await http_get(proxy.port, "/page") == (200, b"here")

    await stage.registry(label, home=registry.process.cwd).ready()

    async def all_are_back() -> bool:
        rows = await listed(stage, registry.key, "stays")
        return {row["key"] for row in rows if row["verified"]} == keys

    await until(all_are_back, "every service is listed and verified", deadline=NOTICED)
    assert await http_get(proxy.port, "/page") == (200, b"here")


async def test_any_one_of_several_registries_is_enough(stage: Stage) -> None:
    first, second = (stage.registry(seed(f"one of two, {name}")) for name in ("a", "b"))
    await first.ready()
    await second.ready()
    port = await stage.web_server(page=b"found")
    service = stage.service(port, "doubly@1.2.3", key=first.key, options=[second.key])
    await service.process.line(r"(?s)^registered service \{.*^registered service \{")
    first.process.signal(signal.SIGKILL)
    proxy = stage.proxy("doubly@1.x", key=first.key, options=[second.key])
    await proxy.ready()
    assert await http_get(proxy.port, "/page") == (200, b"found")


async def test_a_service_whose_target_is_down_is_not_registered(stage: Stage) -> None:
    port = await stage.web_server(page=b"up")
    web_server = stage.processes[-1]
    watched = ["--health-check", "http:/page", "--health-interval", "0.2"]
    service = await instance_at(stage, port, "watched@1.3.0", watched)
    await instance(stage, "watched@1.2.0", b"other")
    proxy = stage.proxy("watched@1.x")
    await proxy.ready()
    await http_answer(proxy.port, "/page", b"up")
    web_server.close()
    await service.process.line("the service is not registered while its target is down")
    await http_answer(proxy.port, "/page", b"other")
    await stage.web_server(port=port, page=b"up again")
    await http_answer(proxy.port, "/page", b"up again")


async def instance_at(stage: Stage, port: int, role: str, options: list[str]) -> OurService:
    service = stage.service(port, role, options=options)
    await service.ready()
    return service
