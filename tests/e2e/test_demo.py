"""``hyperseaport demo``: everything on this machine, one request, and a clean end."""

from __future__ import annotations

import re
from pathlib import Path

from support.peers import HEX, ours
from support.process import Process


async def demonstrated(home: Path) -> Process:
    with ours("demo", ["demo"], home, bootstrap=None) as process:
        assert await process.exit(deadline=60) == 0
    return process


async def test_it_shows_every_step_and_ends(tmp_path: Path) -> None:
    process = await demonstrated(tmp_path)
    assert process.text("stderr") == ""
    shown = [
        r"^dht node listening on 127\.0\.0\.1:\d+$",
        rf"^Registry listening. Connect with pubkey  {HEX}$",
        rf"^started p2p service on {HEX}$",
        r"^registered service \{",
        r"^found service \{",
        rf"^proxy from  \d+ to p2p service {HEX}$",
        r"^\$ curl http://localhost:\d+$",
    ]
    text = process.text("stdout")
    places = [re.search(pattern, text, re.MULTILINE) for pattern in shown]
    assert all(places), [pattern for pattern, place in zip(shown, places, strict=True) if not place]
    starts = [place.start() for place in places if place]
    assert starts == sorted(starts), "the steps are shown in order"
