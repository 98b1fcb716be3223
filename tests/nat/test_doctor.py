"""`hyperseaport doctor` behind routers of every kind."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from support.laboratory import Kind
from support.laboratory_cells import NODES, World
from support.peers import ours

if TYPE_CHECKING:
    from .conftest import Outcomes

pytestmark = pytest.mark.timeout(900)

#: Seconds that it may take, on a machine that does eight other things.
LIMIT = 15.0
#: Milliseconds to the nodes and back; the bootstrap node is near.
FAR = (40.0, 200.0)


class Told:
    """What it said, with which exit code, after how many seconds."""

    def __init__(self, words: dict[str, Any], error: str, code: int, took: float) -> None:
        self.words = words
        self.error = error
        self.code = code
        self.took = took


def scenario(kind: Kind) -> Callable[[World], Any]:
    async def examine(world: World) -> Told:
        began = time.monotonic()
        site = world.laboratory.site(kind)
        with site.hosts[0].entered():
            process = ours(
                "doctor", ["doctor", "--json"], world.folder("doctor"), bootstrap=world.bootstrap
            )
        with process:
            code = await process.exit(deadline=LIMIT)
        took = time.monotonic() - began
        words = json.loads(process.text("stdout"))
        assert [site.hosts[0].address] == words["local"]
        for socket in words["sockets"]:
            assert {seen.partition(":")[0] for seen in socket["seen"]} == {site.public}
        return Told(words, process.text("stderr"), code, took)

    examine.__name__ = f"doctor-{kind}"
    return examine


EXPECTED: dict[Kind, tuple[str, bool, bool | None]] = {
    # The NAT, whether ports are kept, and whether there is a way in from inside.
    "open": ("open", True, None),
    "consistent": ("consistent", True, False),
    "cgnat": ("consistent", True, False),
    "lan-hairpin": ("consistent", True, True),
    "random": ("random", False, None),
}
SCENARIOS = {kind: scenario(kind) for kind in (*EXPECTED, "udp-blocked")}


@pytest.mark.parametrize(
    ("kind", "scenario"), [(kind, SCENARIOS[kind]) for kind in EXPECTED], ids=EXPECTED
)
def test_what_a_host_looks_like(kind: Kind, scenario: Any, outcomes: Outcomes) -> None:
    told = outcomes.of(scenario)
    nat, kept, hairpin = EXPECTED[kind]
    words = told.words
    assert told.code == 0
    assert told.error == ""
    assert told.took < LIMIT
    assert (words["nat"], words["port_kept"], words["hairpin"]) == (nat, kept, hairpin)
    assert words["reachable"] is True
    assert words["stable"] is True
    assert words["nodes"]["answered"] == words["nodes"]["asked"] == NODES + 1
    assert FAR[0] <= words["nodes"]["median_ms"] < FAR[1]
    relayed = any("hyperseaport relay" in each for each in words["do"])
    assert relayed == (nat in ("open", "random"))


@pytest.mark.parametrize("scenario", [SCENARIOS["udp-blocked"]])
def test_where_udp_is_blocked(scenario: Any, outcomes: Outcomes) -> None:
    told = outcomes.of(scenario)
    assert told.code == 1
    assert told.words["reachable"] is False
    (line,) = told.error.splitlines()
    assert line.startswith("hyperseaport: the DHT cannot be reached, no answer from ")
    assert told.took < LIMIT
