from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import load

from hyperseaport.actors.registry import matching

SEMVER = load("semver")


def deviations(rows: Any, versions: Any) -> Any:
    return [
        (version, row["range"], expected)
        for row in rows
        for version, expected in zip(versions, row["satisfies"], strict=True)
        if matching.satisfies(version, row["range"]) != (expected == "1")
    ]


def test_satisfies_as_node_does_in_every_recorded_case() -> None:
    rows, versions = SEMVER["rows"], SEMVER["versions"]
    assert len(rows) * len(versions) == 4524
    assert deviations(rows, versions) == []


def test_satisfies_as_node_does_in_every_random_case() -> None:
    random = SEMVER["random"]
    assert len(random["rows"]) * len(random["versions"]) == 12_000
    assert deviations(random["rows"], random["versions"]) == []


def test_valid_versions_as_node() -> None:
    expected = dict(zip(SEMVER["versions"], SEMVER["valid_version"], strict=True))
    # Node drops build metadata in `valid` too.
    assert {version: matching.valid(version) for version in expected} == expected


def test_valid_ranges_as_node() -> None:
    wrong = [
        row["range"]
        for row in SEMVER["rows"]
        if matching.valid_range(row["range"]) != (row["valid_range"] is not None)
    ]
    # The one case that differs can be satisfied by no version in either program.
    assert wrong == ["9007199254740991.x"]


@pytest.mark.parametrize("wanted", [None, 3, ["3.x"], {}, True, b"3.x"])
def test_what_is_no_text_matches_nothing(wanted: Any) -> None:
    assert not matching.satisfies("3.2.2", wanted)
    assert not matching.satisfies(wanted, "3.x")
    assert not matching.valid_range(wanted)
    assert matching.valid(wanted) is None


def test_lengths_are_limited() -> None:
    assert matching.satisfies("1.0.0", "1.0.0" + " " * 251)
    assert not matching.satisfies("1.0.0", "1.0.0" + " " * 252)
    assert matching.valid("1.0.0" + " " * 251) == "1.0.0"
    assert matching.valid("1.0.0" + " " * 252) is None


def test_precedence_orders_as_semver_does() -> None:
    ordered = ["1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-beta.2", "1.0.0-beta.11", "v1.0.0", "1.9.9"]
    ordered += ["1.10.0", "2.0.0-0", " 2.0.0 ", "10.0.0"]
    assert sorted(ordered, key=matching.precedence) == ordered
    with pytest.raises(ValueError, match="not a version"):
        matching.precedence("1.x")


@pytest.mark.parametrize(
    ("versions", "wanted", "expected"),
    [
        (["3.9.1", "3.10.0", "4.0.0"], "3.x", "3.10.0"),
        (["3.9.1"], "3.x", "3.9.1"),
        (["2.9.0", "3.0.5"], "x.x", "3.0.5"),
        (["2.9.0", "3.0.5"], "x", "3.0.5"),
        (["1.10.0-beta.1", "1.9.0"], "1.x", "1.9.0"),
        (["v2.0.0"], "2.x", "v2.0.0"),
        (["v2.0.0"], "0.x", None),
        (["1.0.0", "1.0.0+b"], "*", "1.0.0"),
        ([], "*", None),
    ],
)
def test_highest(versions: Any, wanted: Any, expected: Any) -> None:
    assert matching.highest(versions, wanted) == expected


@pytest.mark.parametrize(
    ("version", "parts"),
    [("1.0.0", []), ("1.0.0-beta.1", ["beta", 1]), ("v1.0.0-rc-1+x.2", ["rc-1"]), ("1.0.0-0", [0])],
)
def test_prerelease(version: Any, parts: Any) -> None:
    assert matching.prerelease(version) == parts


@given(st.text(), st.text())
@settings(deadline=None, derandomize=True)
def test_survives_every_text(version: Any, wanted: Any) -> None:
    assert matching.satisfies(version, wanted) in (True, False)


@given(st.text("0123456789.xX*^~<>=|-+ vab", max_size=40))
@settings(deadline=None, derandomize=True, max_examples=300)
def test_survives_everything_that_looks_like_a_range(wanted: Any) -> None:
    matching.satisfies("1.2.3", wanted)
    if matching.valid(wanted) is not None:
        assert matching.satisfies(wanted, wanted)
