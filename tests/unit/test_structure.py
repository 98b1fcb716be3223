"""The plan of the house, proven: who may import what, and what is packaged.

A rule is a function from the package's sources to its violations; each is tried on the tree, where
it must find none, and on sources that break it, where it must find them.
"""

from __future__ import annotations

import ast
import configparser
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import hyperseaport

ROOT = Path(__file__).parents[2]
PACKAGE = "hyperseaport"

#: Folders of the tree that are no part of the package.
OUTSIDE = {"benchmarks", "build", "docs", "fuzz", "node_modules", "tests", "typings"}

#: For each part of the package, the parts it may import. The longest name that fits counts.
MAY_IMPORT = {
    "cli": {"", "actors", "commands", "supervisor", "transport"},
    "commands": {"actors", "commands", "supervisor", "transport"},
    "supervisor": {"actors.actor", "actors.messages", "actors.supervision"},
    "actors": {"actors", "supervisor", "transport"},
    # What the supervisor stands on cannot stand on it.
    "actors.actor": {"actors", "transport"},
    "actors.messages": {"actors", "transport"},
    "actors.supervision": {"actors.actor"},
    "transport": {"transport"},
    "testing": {"testing", "transport"},
}

#: Modules below transport/ that hold sockets, loops and clocks; all others are protocol cores.
SHELLS = {
    "transport.channel",
    "transport.dht.endpoint",
    "transport.machine",
    "transport.reserved",
    "transport.udp",
}
#: Where cores get time, randomness or the world from, which they must not. The only exceptions:
#: the Random class itself, and key pairs for users, made from the system's randomness.
NOT_IN_CORES = (
    "asyncio",
    "datetime",
    "multiprocessing",
    "nacl.public",
    "nacl.secret",
    "nacl.utils",
    "os",
    "random",
    "secrets",
    "select",
    "selectors",
    "signal",
    "socket",
    "subprocess",
    "threading",
    "time",
    "uuid",
)
ALLOWED_IN_CORES = {("transport.keys", "os")}
RANDOM_CALLS = {"randombytes", "urandom"}

#: Modules that turn bytes into code.
UNSAFE = ("dill", "cloudpickle", "marshal", "pickle", "shelve")

Sources = Mapping[str, str]
Rule = Callable[[Sources], list[str]]

parse = cache(ast.parse)


def read(folder: Path, outside: set[str]) -> dict[str, str]:
    """Dotted module name, relative to the folder, to source; packages by their own name."""
    sources = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts[0] in outside or any(part.startswith(".") for part in parts):
            continue
        sources[".".join(parts)] = path.read_text()
    return sources


def imports(module: str, source: str, known: set[str]) -> Iterator[tuple[str, str]]:
    """Every import as (module, name in it or ""), the package's own modules without its name and
    with a leading dot."""
    here = module.split(".")
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                base = node.module or ""
            else:
                # A module's own name and each further dot take one step up.
                parts = here[: len(here) - node.level] + (node.module or "").split(".")
                base = "." + ".".join(part for part in parts if part)
            for alias in node.names:
                inner = f"{base.rstrip('.')}.{alias.name}"
                if base.startswith(".") and known & {inner[1:], f"{inner[1:]}.__init__"}:
                    yield inner, ""
                else:
                    yield base, alias.name


def part_of(module: str, parts: set[str]) -> str | None:
    """The longest of the parts that the module is or is in."""
    fitting = [part for part in parts if f"{module}.".startswith(f"{part}.") or part == module]
    return max(fitting, key=len, default=None)


def layers(sources: Sources) -> list[str]:
    found = []
    for module, source in sources.items():
        part = part_of(module, set(MAY_IMPORT))
        if part is None:
            continue
        for target, _ in imports(module, source, set(sources)):
            if target.startswith(".") and part_of(target[1:], MAY_IMPORT[part]) is None:
                found.append(f"{module} imports {target}")
    return found


def relative_inside(sources: Sources) -> list[str]:
    return [
        f"{module} imports {target}"
        for module, source in sources.items()
        for target, _ in imports(module, source, set(sources))
        if target.split(".")[0] == PACKAGE
    ]


def pure_cores(sources: Sources) -> list[str]:
    found = []
    for module, source in sources.items():
        if not module.startswith("transport.") or module in SHELLS:
            continue
        for target, name in imports(module, source, set(sources)):
            full = f"{target}.{name}" if name else target
            bad = next((bad for bad in NOT_IN_CORES if f"{full}.".startswith(f"{bad}.")), None)
            if bad is None or (module, bad) in ALLOWED_IN_CORES or full == "random.Random":
                continue
            found.append(f"{module} imports {full}")
        for node in ast.walk(parse(source)):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
            if name in RANDOM_CALLS and (module, "os") not in ALLOWED_IN_CORES:
                found.append(f"{module} uses {name}")
    return found


def no_shell_in_cores(sources: Sources) -> list[str]:
    found = []
    for module, source in sources.items():
        if not module.startswith("transport.") or module in SHELLS:
            continue
        for target, _ in imports(module, source, set(sources)):
            if target[1:] in SHELLS:
                found.append(f"{module} imports {target}")
    return found


def no_unsafe_formats(sources: Sources) -> list[str]:
    return [
        f"{module} imports {target}"
        for module, source in sources.items()
        for target, _ in imports(module, source, set(sources))
        if target.split(".")[0] in UNSAFE
    ]


def known_root(sources: Sources) -> list[str]:
    allowed = {"__init__", "cli", "supervisor"}
    return [
        f"{module} lies at the root"
        for module in sources
        if "." not in module and module not in allowed
    ]


def known_folders(sources: Sources) -> list[str]:
    folders = {module.split(".")[0] for module in sources if "." in module}
    known = {"actors", "commands", "testing", "transport"}
    return [f"folder {name}" for name in sorted(folders - known)]


def complete_packages(sources: Sources) -> list[str]:
    folders = {module.rpartition(".")[0] for module in sources}
    return [
        f"{folder} has no __init__"
        for folder in sorted(folders)
        if f"{folder}.__init__".lstrip(".") not in sources
    ]


#: A rule, and sources that each break it.
RULES: list[tuple[Rule, list[Sources]]] = [
    (
        layers,
        [
            {"transport.noise": "from ..actors import pipe", "actors.pipe": ""},
            {"transport.dht.node": "from ...actors.pipe import Pipe", "actors.pipe": ""},
            {"transport.noise": "def f():\n    from .. import supervisor", "supervisor": ""},
            {"transport.noise": "from .. import __version__"},
            {"transport.udp": "from ..testing.network import Network", "testing.network": ""},
            {"actors.pipe": "from ..cli import main", "cli": ""},
            {"actors.registry.table": "from ...testing import clock", "testing.clock": ""},
            {"actors.actor": "from ..supervisor import Supervisor", "supervisor": ""},
            {"supervisor": "from .actors import pipe", "actors.pipe": ""},
            {"supervisor": "from .actors.actor_pool import Pool", "actors.actor_pool": ""},
            {"supervisor": "from .transport.errors import Closed", "transport.errors": ""},
            {"testing.network": "from ..actors.actor import Actor", "actors.actor": ""},
            {"cli": "from .testing import clock", "testing.clock": ""},
        ],
    ),
    (
        relative_inside,
        [
            {"cli": "import hyperseaport.transport"},
            {"transport.noise": "from hyperseaport.transport import keys"},
            {"transport.noise": "from hyperseaport import transport"},
        ],
    ),
    (
        pure_cores,
        [
            {"transport.noise": "import socket"},
            {"transport.noise": "def f():\n    import asyncio.events"},
            {"transport.udx.stream": "from time import monotonic"},
            {"transport.udx.stream": "import random"},
            {"transport.udx.stream": "from random import Random, SystemRandom"},
            {"transport.dht.node": "from os import urandom"},
            {"transport.dht.node": "import secrets as rng"},
            {"transport.dht.node": "from nacl import utils"},
            {"transport.dht.node": "from nacl import bindings\nbindings.randombytes(3)"},
            {"transport.dht.node": "from nacl.bindings import randombytes\nrandombytes(3)"},
            {"transport.keys": "import time"},
        ],
    ),
    (
        no_shell_in_cores,
        [
            {"transport.noise": "from .udp import UdpSocket", "transport.udp": ""},
            {"transport.noise": "from . import channel", "transport.channel": ""},
            {"transport.dht.node": "from .endpoint import Endpoint", "transport.dht.endpoint": ""},
        ],
    ),
    (
        no_unsafe_formats,
        [{"cli": "import pickle"}, {"cli": "def f():\n    from marshal import loads"}],
    ),
    (known_root, [{"helpers": ""}]),
    (known_folders, [{"common.helpers": ""}]),
    (complete_packages, [{"__init__": "", "transport.noise": ""}]),
]
#: What no rule objects to.
INNOCENT: Sources = {
    "__init__": "",
    "cli": "from . import __version__\nfrom .actors import pipe\nfrom .transport import keys",
    "supervisor": "from .actors.actor import Actor\nfrom .actors import messages",
    "actors.__init__": "",
    "actors.actor": "import asyncio\nfrom ..transport.errors import Closed",
    "actors.messages": "from .actor import Actor",
    "actors.pipe": "from ..supervisor import Supervisor\nfrom . import actor, messages",
    "testing.__init__": "",
    "testing.network": "import time\nfrom ..transport import keys",
    "transport.__init__": "",
    "transport.channel": "import asyncio\nfrom . import noise",
    "transport.errors": "",
    "transport.keys": "import os\nos.urandom(3)",
    "transport.noise": "from random import Random\nfrom .keys import KeyPair\nimport timeit",
    "transport.udp": "import socket, time",
}
by_rule = pytest.mark.parametrize(
    ("rule", "broken"), RULES, ids=[rule.__name__ for rule, _ in RULES]
)


@by_rule
def test_tree_keeps_the_rule(rule: Rule, broken: list[Sources]) -> None:
    assert rule(read(ROOT, OUTSIDE)) == []


@by_rule
def test_rule_can_fail(rule: Rule, broken: list[Sources]) -> None:
    for sources in broken:
        assert len(rule(sources)) == 1, sources


@by_rule
def test_rule_lets_the_innocent_pass(rule: Rule, broken: list[Sources]) -> None:
    assert rule(INNOCENT) == []


def test_the_tree_is_seen() -> None:
    sources = read(ROOT, OUTSIDE)
    assert {"__init__", "transport.noise", "transport.udx.packet"} <= set(sources)
    seen = set(imports("transport.noise", sources["transport.noise"], set(sources)))
    assert (".transport.keys", "KeyPair") in seen
    assert ("noise.noise_protocol", "NoiseProtocol") in seen


def test_tests_and_tools_use_no_unsafe_format_either() -> None:
    sources = read(ROOT, {"build", "node_modules"})
    assert any(module.startswith("tests.") for module in sources)
    assert no_unsafe_formats(sources) == []


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_every_package_is_listed() -> None:
    listed = setup_cfg()["options"]["packages"].split()
    folders = [
        module.rpartition(".")[0]
        for module in read(ROOT, OUTSIDE)
        if module.rpartition(".")[2] == "__init__"
    ]
    assert listed == sorted(f"{PACKAGE}.{folder}".rstrip(".") for folder in folders)


def test_one_version() -> None:
    version = setup_cfg()["metadata"]["version"]
    assert version == hyperseaport.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
