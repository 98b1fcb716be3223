from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import load

from hyperseaport.actors.registry import roles
from hyperseaport.transport.errors import InvalidInput


@pytest.mark.parametrize("case", load("rpc")["role_parsing"], ids=lambda case: str(case["input"]))
def test_parses_as_the_node_programs(case: Any) -> None:
    meta = roles.parse(case["input"])
    assert json.dumps(meta, ensure_ascii=False, separators=(",", ":")) == case["json"]
    assert meta["hash"] == case["hash"]


@given(st.text())
@settings(deadline=None, derandomize=True)
def test_parses_every_text(text: Any) -> None:
    meta = roles.parse(text)
    version = ["version"] if "version" in meta else []
    assert list(meta) == ["role", *version, "_tags", "tags", "hash"]
    if text.count("@") <= 1 and not text.startswith("@"):
        assert roles.text(meta) == text


def test_an_object_needs_a_role_that_is_a_text() -> None:
    with pytest.raises(InvalidInput, match="needs a role"):
        roles.parse({"role": 5})


@pytest.mark.parametrize("text", ["couchdb@3.2.2", "@scope/name@1.0.0-beta.1+b", "a@v1.2.3"])
def test_a_service_registers_one_exact_version(text: Any) -> None:
    assert roles.to_register(text) == roles.parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no name"),
        ("@1.0.0", "no version"),
        ("@@1.0.0", "has no name"),
        ("couchdb", "no version: write it as couchdb@1.2.3"),
        ("couchdb@", "no version"),
        ("couchdb@3.x", "'3.x' is not a version"),
        ("couchdb@3", "'3' is not a version"),
        ("@scope/name", "write it as @scope/name@1.2.3"),
        ("a" * 2000 + "@1.0.0", "at most 1024 characters"),
    ],
)
def test_what_cannot_be_registered_says_what_to_do(text: Any, says: Any) -> None:
    with pytest.raises(InvalidInput, match=says) as raised:
        roles.to_register(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text", ["couchdb", "couchdb@3.x", "@s/n@^1.0.0", "a@>=1.0.0 <2", "a@*", "a@", "a@1.x || 3.x"]
)
def test_a_proxy_takes_ranges(text: Any) -> None:
    assert roles.to_find(text) == roles.parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no name"),
        ("@", "has no name"),
        ("a@latest", "'latest' is not a version range"),
        ("a@x.2", "'x.2' is not a version range"),
    ],
)
def test_what_cannot_be_found_says_what_to_do(text: Any, says: Any) -> None:
    with pytest.raises(InvalidInput, match=says):
        roles.to_find(text)


def test_a_role_with_at_sign_only_in_front_is_a_name() -> None:
    # `-r @1.0.0` is, by the rule for scoped names, the name "@1.0.0" without a version.
    assert roles.parse("@1.0.0")["role"] == "@1.0.0"
