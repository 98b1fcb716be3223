"""The package's face: names that are imported on first use."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import hyperseaport

NAMES = [
    *("DHT", "HyperseaportError", "KeyPair", "Proxy", "Registry", "Service"),
    *("connect", "services"),
]


def loaded_by(code: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after this code."""
    script = f"import sys\n{code}\nprint(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stdout.split())


def test_the_public_names() -> None:
    assert sorted(hyperseaport.__all__) == NAMES
    for name in NAMES:
        assert getattr(hyperseaport, name) is not None
    assert issubclass(hyperseaport.HyperseaportError, Exception)
    api = importlib.import_module("hyperseaport.actors.api")
    assert hyperseaport.connect is api.connect
    assert hyperseaport.DHT is api.DHT


def test_dir_lists_them() -> None:
    assert set(NAMES) | {"__version__"} <= set(dir(hyperseaport))


def test_star_import() -> None:
    names: dict[str, object] = {}
    exec("from hyperseaport import *", names)
    assert set(NAMES) <= set(names)


@pytest.mark.parametrize("name", ["Registri", "actors_", "__wrapped__"])
def test_an_unknown_attribute(name: str) -> None:
    with pytest.raises(AttributeError, match=f"'hyperseaport' has no attribute '{name}'"):
        getattr(hyperseaport, name)
    assert not hasattr(hyperseaport, name)


def test_importing_it_imports_next_to_nothing() -> None:
    loaded = loaded_by("import hyperseaport")
    assert {name for name in loaded if name.startswith("hyperseaport.")} == set()
    assert not {"asyncio", "thespian", "nacl", "structlog", "click"} & loaded


def test_a_key_pair_needs_no_event_loop() -> None:
    loaded = loaded_by("import hyperseaport; hyperseaport.KeyPair.generate()")
    assert "hyperseaport.transport.keys" in loaded
    assert not {"asyncio", "thespian", "structlog"} & loaded


def test_the_version_is_the_packages() -> None:
    parts = hyperseaport.__version__.split(".")
    assert len(parts) == 3
    assert all(part.isdecimal() for part in parts)
