"""Wrong words on the command line: exit code 2, one line that says what, nothing started."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from support.peers import ours, seed
from support.stage import Stage, public_key

SEED = seed("wrong input")
KEY = public_key(SEED)
#: Nobody's bootstrap node: what starts by mistake gets nowhere.
NOWHERE = "127.0.0.1:9"

WRONG = {
    "unknown command": ["registri"],
    "unknown option": ["registry", "--sed", SEED],
    "registry, no seed": ["registry"],
    "registry, seed too short": ["registry", "--seed", SEED[:-2]],
    "registry, seed too long": ["registry", "--seed", SEED + "00"],
    "registry, seed not hex": ["registry", "--seed", "x" * 64],
    "registry, bootstrap without port": ["registry", "--seed", SEED, "--bootstrap", "127.0.0.1"],
    "registry, bootstrap port": ["registry", "--seed", SEED, "--bootstrap", "127.0.0.1:70000"],
    "service, no key": ["service", "-p", "5984", "-r", "couchdb@3.2.2"],
    "service, key not hex": ["service", "couchdb", "-p", "5984", "-r", "couchdb@3.2.2"],
    "service, key too short": ["service", KEY[:-1], "-p", "5984", "-r", "couchdb@3.2.2"],
    "service, key too long": ["service", KEY + "0", "-p", "5984", "-r", "couchdb@3.2.2"],
    "service, seed not hex": ["service", KEY, "-p", "1", "-r", "a@1.0.0", "--seed", "z" * 64],
    "service, no role": ["service", KEY, "-p", "5984"],
    "service, empty role": ["service", KEY, "-p", "5984", "-r", ""],
    "service, version": ["service", KEY, "-p", "5984", "-r", "couchdb@three"],
    "service, range for version": ["service", KEY, "-p", "5984", "-r", "couchdb@3.x"],
    "service, port not a number": ["service", KEY, "-p", "http", "-r", "couchdb@3.2.2"],
    "service, port negative": ["service", KEY, "-p", "-1", "-r", "couchdb@3.2.2"],
    "service, port too high": ["service", KEY, "-p", "65536", "-r", "couchdb@3.2.2"],
    "service, allowed key": ["service", KEY, "-p", "1", "-r", "a@1.0.0", "--allow", "friend"],
    "proxy, no key": ["proxy", "-p", "5985", "-r", "couchdb@3.x"],
    "proxy, key": ["proxy", KEY[:-1] + "g", "-p", "5985", "-r", "couchdb@3.x"],
    "proxy, range": ["proxy", KEY, "-p", "5985", "-r", "couchdb@three to four"],
    "proxy, port": ["proxy", KEY, "-p", "65536", "-r", "couchdb@3.x"],
    "proxy, seed": ["proxy", KEY, "-p", "5985", "-r", "couchdb@3.x", "--seed", "1"],
    "dht, port": ["dht", "--host", "127.0.0.1", "--port", "none"],
    "dht, no nodes": ["dht", "--host", "127.0.0.1", "--port", "0", "--nodes", "0"],
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG.keys())
async def test_wrong_input(tmp_path: Path, arguments: list[str]) -> None:
    with ours("wrong input", arguments, tmp_path, bootstrap=NOWHERE) as process:
        assert await process.exit(deadline=10) == 2
    assert process.text("stdout") == ""
    assert_one_line(process.text("stderr"))


def assert_one_line(text: str) -> None:
    assert len(text.splitlines()) == 1, text
    assert text.strip(), "an empty line says nothing"


async def test_the_proxys_port_is_in_use(stage: Stage) -> None:
    service = stage.service(await stage.web_server(), "taken@1.2.3")
    await service.ready()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        proxy = stage.proxy("taken@1.x", port=taken.getsockname()[1])
        assert await proxy.process.exit() == 1
    assert "proxy from" not in proxy.process.text("stdout")
    assert_one_line(proxy.process.text("stderr"))


async def test_the_dhts_port_is_in_use(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        arguments = ["dht", "--host", "127.0.0.1", "--port", str(taken.getsockname()[1])]
        with ours("second dht", arguments, tmp_path, bootstrap=None) as process:
            assert await process.exit() == 1
    assert process.text("stdout") == ""
    assert_one_line(process.text("stderr"))
