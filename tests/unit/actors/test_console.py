from __future__ import annotations

import asyncio
from typing import Any

from support.registry import virtual

from hyperseaport.actors.console import Console
from hyperseaport.actors.messages import LinkUp, RegistryListening
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.supervisor import ChildSpec, Supervisor, SupervisorSpec


@virtual
async def test_it_shows_everything_in_order() -> None:
    shown: list[Any] = []
    async with ActorRuntime() as runtime:
        console = runtime.spawn(Console, shown.append, "console")
        told = [LinkUp(b"1" * 32), RegistryListening(b"2" * 32), LinkUp(b"3" * 32), "anything"]
        for each in told:
            runtime.tell(console, each)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert shown == told


@virtual
async def test_one_that_cannot_show_is_restarted() -> None:
    shown: list[Any] = []

    def show(news: object) -> None:
        shown.append(news)
        if news == "bad":
            raise OSError("no space left on device")

    async with ActorRuntime() as runtime:
        spec = SupervisorSpec("rest_for_one", (ChildSpec("console", Console, show),))
        await runtime.ready(runtime.spawn(Supervisor, spec, name="root"))
        for news in ("bad", "good"):
            console = runtime.find("/root/console")
            assert console is not None
            runtime.tell(console, news)
            await asyncio.sleep(1)
    assert shown == ["bad", "good"]
