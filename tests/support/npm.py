"""Installs the Node peers from npm, once for each content of ``tests/peers``."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

PEERS = Path(__file__).parents[1] / "peers"

#: Seconds for `npm install`; ten are usual.
INSTALL_LIMIT = 300


class PeersMissing(AssertionError):
    """The Node peers cannot be had here. The interop tests fail then, they are never skipped."""


@cache
def node() -> str:
    """The path of the Node program."""
    return _program("node")


@cache
def node_modules() -> Path:
    """The folder ``node_modules`` with the peers, installed now if it is not there yet.

    It lives in the user's cache folder under the hash of ``package.json``; a lock file makes
    parallel test runs wait for one installation, and a broken one leaves nothing behind.
    """
    node()
    npm = _program("npm")
    package = (PEERS / "package.json").read_bytes()
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = cache_home / "hyperseaport-tests" / hashlib.sha256(package).hexdigest()[:16]
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _install(npm, package, target)
    return target / "node_modules"


def _install(npm: str, package: bytes, target: Path) -> None:
    building = target.with_suffix(".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    (building / "package.json").write_bytes(package)
    # The native modules carry prebuilt binaries, so that no install script has to run.
    flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
    done = subprocess.run(
        [npm, "install", *flags, "--loglevel=error"],
        cwd=building,
        capture_output=True,
        text=True,
        timeout=INSTALL_LIMIT,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise PeersMissing(f"npm install of tests/peers/package.json failed: {' '.join(last)}")
    building.rename(target)


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise PeersMissing(f"{name} is missing: the interop tests need Node 18 or later with npm")
    return path
