from __future__ import annotations

import asyncio
import re

import pytest

from hyperseaport.actors import demo


def test_it_shows_every_step_and_succeeds() -> None:
    lines: list[str] = []
    assert demo.run(lines.append) == 0
    text = "\n".join(lines)
    steps = [
        r"\$ hyperseaport dht --port 0\ndht node listening on 127\.0\.0\.1:\d+",
        r"\$ hyperseaport registry --seed \.\.\.\nRegistry listening\. Connect with pubkey  \w{64}",
        r"\$ hyperseaport service [0-9a-f]{8}\.\.\. -p \d+ -r hello@1\.2\.3\n"
        r"started p2p service on \w{64}\nconnecting to registry \w{64}",
        r"\$ hyperseaport proxy [0-9a-f]{8}\.\.\. -p 0 -r hello@1\.x\n",
        r"\nlistening on 127\.0\.0\.1:\d+\n",
        r"\nconnecting to registry \w{64}\n",
        r"\nconnected to registry\n",
        r"\nproxy from  \d+ to p2p service \w{64}",
        r"\$ curl http://localhost:\d+\n\{\"hello\":",
    ]
    position = 0
    for step in steps:
        match = re.compile(step).search(text, position)
        assert match, step
        position = match.start()


def test_it_gives_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def forever(_say: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(demo, "TIMEOUT", 0.01)
    monkeypatch.setattr(demo, "_run", forever)
    lines: list[str] = []
    assert demo.run(lines.append) == 1
    assert lines == ["the demonstration did not finish within 0.01 s"]
