"""Looking into running programs, and killing what is in them."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from support.peers import Peer, ours
from support.process import RUNTIME
from support.stage import Stage, http_get
from support.waiting import until


def control(peer: Peer) -> Path:
    """The control socket of a program of ours."""
    (found,) = RUNTIME.rglob(f"*-{peer.process.pid}.sock")
    return found


async def asked(stage: Stage, peer: Peer, *words: str) -> Any:
    """The one program's answer."""
    (answer,) = json.loads(await stage.command(*words, "--json", "--control", control(peer)))
    return answer


async def test_every_program_can_be_looked_into(stage: Stage) -> None:
    service, proxy = await stage.chain(await stage.web_server(page=b"page"), "seen")
    assert await http_get(proxy.port, "/page") == (200, b"page")
    for peer in (*stage.network.peers, service, proxy):
        path = control(peer)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        await asked(stage, peer, "status")
        await asked(stage, peer, "tree")
    text = await stage.command("status", "--control", control(proxy))
    assert "seen" in text
    everybody = await stage.command("tree")
    assert "/node/endpoint" in everybody or "endpoint" in everybody
    await stage.command("why", "seen@1.x", "--control", control(proxy))
    assert service.key[:8] in await stage.command("why", "--control", control(proxy))
    proxy.process.close()
    service.process.close()


async def test_the_tree_heals_in_front_of_the_user(stage: Stage) -> None:
    service, proxy = await stage.chain(await stage.web_server(page=b"page"), "healed")
    for peer, path in (
        (proxy, "/node/link"),
        (proxy, "/node/links"),
        (proxy, f"/node/proxy:{proxy.port}/resolver"),
        (proxy, "/node/endpoint"),
        (service, "/console"),
        (service, "/node/service:healed@1.2.3/listener"),
        (service, "/node/endpoint"),
    ):
        await stage.command("kill", path, "--control", control(peer))

        async def works() -> bool:
            try:
                return await http_get(proxy.port, "/page") == (200, b"page")
            except OSError:
                return False

        await until(works, f"the page, after {path} was killed", deadline=60.0)
    assert service.process.returncode is None
    assert proxy.process.returncode is None


async def test_wrong_words_are_one_line(stage: Stage) -> None:
    _, proxy = await stage.chain(await stage.web_server(page=b"page"), "asked")
    for words in (["kill", "/node/nobody"], ["why", "nothing@1.x"]):
        done = ours(
            "our command",
            [*words, "--control", str(control(proxy))],
            stage.home,
            bootstrap=stage.bootstrap,
        )
        with done:
            assert await done.exit() in (1, 2)
            (line,) = done.text("stderr").splitlines()
            assert line.startswith("hyperseaport: ")
    assert await http_get(proxy.port, "/page") == (200, b"page")
