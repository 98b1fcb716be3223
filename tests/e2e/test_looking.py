"""Looking into running programs, and killing what is in them."""

from __future__ import annotations

import json
import re
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
    told = json.loads(await stage.command(*words, "--json", "--control", control(peer)))
    (answer,) = told["programs"]
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
    assert re.search(r"^  traffic +last [\d.]+ s ago$", text, re.MULTILINE), text
    for peer in (service, proxy):
        shown = (await asked(stage, peer, "status"))["actors"]["/node/endpoint"]
        assert 0 <= shown["traffic_age_s"] < 60
    everybody = await stage.command("tree")
    assert "/node/endpoint" in everybody or "endpoint" in everybody
    await stage.command("why", "seen@1.x", "--control", control(proxy))
    assert service.key[:8] in await stage.command("why", "--control", control(proxy))
    proxy.process.close()
    service.process.close()


async def test_why_tells_where_the_milliseconds_went(stage: Stage) -> None:
    _, proxy = await stage.chain(await stage.web_server(page=b"page"), "timed")
    for path in (("local", "direct"), ("remembered",)):
        assert await http_get(proxy.port, "/page") == (200, b"page")
        ((row,),) = [each["rows"] for each in (await asked(stage, proxy, "why"))["proxies"]]
        last = row["last"]
        assert last["path"] in path
        parts = [last[f"{name}_ms"] for name in ("wait", "lookup", "handshake", "path")]
        assert abs(last["total_ms"] - sum(parts) - last["first_byte_ms"]) < 0.5
        assert 0 < last["handshake_ms"] < last["total_ms"]
        assert last["first_byte_ms"] > 0
    text = await stage.command("why", "timed@1.x", "--control", control(proxy))
    line = text.splitlines()[-1]
    assert re.search(r"opened [\d.]+ s ago in \d+ ms: .*first byte \d+ \(remembered\)$", line), text


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
