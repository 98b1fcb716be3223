"""The wall around the Node programs: they cannot leave this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support import npm
from support.process import environment

LISTED = "console.log(JSON.stringify(require('hyperdht/lib/constants').BOOTSTRAP_NODES))"
SEND = "new (require('udx-native'))().createSocket().{call}(Buffer.from('x'), 9, '192.0.2.1')"
CONNECT = """
const udx = new (require('udx-native'))()
const socket = udx.createSocket()
socket.bind(0)
udx.createStream(1).connect(socket, 2, 9, '192.0.2.1')
"""


def run(script: str, home: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    env = environment(home, NODE_PATH=str(npm.node_modules()), **extra)
    command = [npm.node(), "-r", str(npm.PEERS / "preload.js"), "-e", script]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=20, check=False)


@pytest.mark.parametrize(("given", "nodes"), [("none", "[]"), ("127.0.0.1:5", '["127.0.0.1:5"]')])
def test_the_bootstrap_list_is_replaced(tmp_path: Path, given: str, nodes: str) -> None:
    done = run(LISTED, tmp_path, HYPERSEAPORT_TEST_BOOTSTRAP=given)
    assert (done.returncode, done.stdout.strip()) == (0, nodes), done.stderr


@pytest.mark.parametrize("extra", [{}, {"HYPERSEAPORT_TEST_BOOTSTRAP": "192.0.2.1:49737"}])
def test_nothing_runs_without_a_local_bootstrap_node(tmp_path: Path, extra: dict[str, str]) -> None:
    done = run("console.log('started')", tmp_path, **extra)
    assert done.returncode != 0
    assert done.stdout == ""
    assert "HYPERSEAPORT_TEST_BOOTSTRAP must be" in done.stderr


@pytest.mark.parametrize(
    "script",
    [
        SEND.format(call="send"),
        SEND.format(call="trySend"),
        CONNECT,
        "new (require('udx-native'))().lookup('node1.example')",
        "require('dns').lookup('node1.example', () => {})",
    ],
    ids=["send", "trySend", "connect", "udx-lookup", "dns-lookup"],
)
def test_other_addresses_end_the_process(tmp_path: Path, script: str) -> None:
    done = run(script, tmp_path, HYPERSEAPORT_TEST_BOOTSTRAP="none")
    assert done.returncode == 97, done.stderr
    assert "preload: refused to" in done.stderr
