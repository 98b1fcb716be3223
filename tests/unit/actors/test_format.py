from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperseaport.actors.format import inspect
from hyperseaport.actors.registry import roles

COUCHDB = """{
  role: 'couchdb',
  version: '3.2.2',
  _tags: {},
  tags: [],
  hash: 'couchdb|3.2.2|'
}"""


def test_a_registered_service() -> None:
    assert inspect(roles.parse("couchdb@3.2.2")) == COUCHDB


def test_a_found_service() -> None:
    found = {"id": "a" * 64, "remotePublicKey": "b" * 64, "meta": roles.parse("couchdb@3.2.2")}
    nested = COUCHDB.replace("\n", "\n  ")
    assert inspect(found) == (
        f"{{\n  id: '{'a' * 64}',\n  remotePublicKey: '{'b' * 64}',\n  meta: {nested}\n}}"
    )


def test_one_line_up_to_the_width() -> None:
    one_line = "{ role: 'abc', version: '1.x', _tags: {}, tags: [], hash: 'abc|1.x|' }"
    assert inspect(roles.parse("abc@1.x")) == one_line
    assert inspect(roles.parse("abcd@1.x")).count("\n") == 6


# Recorded from Node 20.
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (1.5, "1.5"),
        (1.0, "1"),
        (-0.0, "-0"),
        (0, "0"),
        (1e21, "1e+21"),
        (1e20, "100000000000000000000"),
        (1e-7, "1e-7"),
        (0.00001, "0.00001"),
        (12345678901234567890, "12345678901234567000"),
        (10**400, "Infinity"),
        (-(10**400), "-Infinity"),
        (math.inf, "Infinity"),
        (-math.inf, "-Infinity"),
        (math.nan, "NaN"),
        ("top", "'top'"),
        ([], "[]"),
        ({}, "{}"),
        (["a", 1], "[ 'a', 1 ]"),
        ({"a": "it's"}, """{ a: "it's" }"""),
        ({"a": 'it\'s "x"'}, """{ a: `it's "x"` }"""),
        ({"a": 'it\'s "x" `'}, """{ a: 'it\\'s "x" `' }"""),
        ({"a": "x\ny\\"}, r"{ a: 'x\ny\\' }"),
        ({"a": "\x01\x7f\x9b\x1b[31m"}, r"{ a: '\x01\x7F\x9B\x1B[31m' }"),
        ({"a": "\ud800"}, r"{ a: '\ud800' }"),
        (
            {"1": 2, "a-b": 1, "$x": 3, "ü": 4, "": 5},
            "{ '1': 2, 'a-b': 1, '$x': 3, 'ü': 4, '': 5 }",
        ),
        ({"__proto__": 1, "a": 2}, "{ ['__proto__']: 1, a: 2 }"),
        ({"a": {"b": {"c": {"d": 1}}}}, "{ a: { b: { c: [Object] } } }"),
        ({"a": {"b": {"c": [1]}}}, "{ a: { b: { c: [Array] } } }"),
        ({"x": {"y": {"z": {}}}}, "{ x: { y: { z: {} } } }"),
        ({"t": ["x", "y"], "_t": {"x": True}}, "{ t: [ 'x', 'y' ], _t: { x: true } }"),
        (
            {"e": "\U0001f600", "w": "日本語" * 9, "q": 1, "r": "abcdefghijklm", "t": 2},
            "{\n  e: '\U0001f600',\n  w: '" + "日本語" * 9 + "',\n  q: 1,\n"
            "  r: 'abcdefghijklm',\n  t: 2\n}",
        ),
        (
            {"k": ["x" * 30, "y" * 30, "z" * 30]},
            "{\n  k: [\n" + ",\n".join(f"    '{c * 30}'" for c in "xyz") + "\n  ]\n}",
        ),
    ],
)
def test_as_node_prints_it(value: Any, text: Any) -> None:
    assert inspect(value) == text


def test_long_arrays_are_cut() -> None:
    assert inspect(list(range(102))).endswith("99,\n  ... 2 more items\n]")
    assert inspect(list(range(101))).endswith("99,\n  ... 1 more item\n]")


def test_only_json_values() -> None:
    with pytest.raises(TypeError, match="set"):
        inspect({"a": {1}})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON)
@settings(deadline=None, derandomize=True)
def test_no_control_character_comes_through(value: Any) -> None:
    text = inspect(value)
    assert not [c for c in text.replace("\n", "") if ord(c) < 32 or 127 <= ord(c) < 160]
