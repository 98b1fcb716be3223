"""Which versions a range accepts, as npm understands both (spec: registry 6.5, 6.7).

Everything that chooses a service goes through here, so that a registry and a proxy never disagree.
A range is what `semver.satisfies` of Node takes; anything that is not one accepts nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import semver

#: Node refuses longer versions; ranges are limited alike, since parsing costs time per comparator.
MAX_LENGTH = 256
#: The largest integer that a JavaScript number holds exactly: Node refuses versions above it.
MAX_NUMBER = 2**53 - 1
#: Parsed ranges and versions kept: more than the roles a busy registry is asked for.
CACHE_SIZE = 4096

_VERSION = re.compile(
    r"[vV]?(?P<core>(?P<major>0|[1-9]\d*)\.(?P<minor>0|[1-9]\d*)\.(?P<patch>0|[1-9]\d*)"
    r"(?:-(?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)"
    r"(?:\.(?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*)?)"
    r"(?:\+[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?",
    re.ASCII,
)
_BUILD = re.compile(r"\+\S*")
_OPERATORS = "<>=vV"
#: An operator and its version may stand apart: `^ 3.2.2`.
_APART = re.compile(r"([~^]>?)\s+")
_NUMBER_AFTER_WILDCARD = re.compile(r"(?:\d+\.)?[xX*]\.\d")
_NUMBER = re.compile(r"\d{16,}", re.ASCII)
_PRERELEASE = re.compile(r"-\S*")
_HYPHEN_RANGE = re.compile(r"\s*\S+\s+-\s+\S+\s*")


def valid(version: object) -> str | None:
    """The version without white space, `v` and build metadata; None when it is not one.

    Accepts what Node's `semver.valid` accepts, which is what a registry takes in `register`.
    """
    if not isinstance(version, str) or len(version) > MAX_LENGTH:
        return None
    return _core(version)


@lru_cache(CACHE_SIZE)
def _core(version: str) -> str | None:
    found = _VERSION.fullmatch(version.strip())
    if found is None:
        return None
    if any(int(found[part]) > MAX_NUMBER for part in ("major", "minor", "patch")):
        return None
    return found["core"]


def valid_range(wanted: object) -> bool:
    """Whether the text is a range at all. The empty text is one: it accepts every release."""
    return isinstance(wanted, str) and _range(wanted) is not None


def satisfies(version: object, wanted: object) -> bool:
    """Whether the range accepts the version. Anything that is not a text accepts nothing."""
    core = valid(version)
    if core is None or not isinstance(wanted, str):
        return False
    parsed = _range(wanted)
    return parsed is not None and bool(parsed.test(_node_version(core)))


@lru_cache(CACHE_SIZE)
def precedence(version: str) -> semver.Version:
    """The sorting key of a valid version, lowest first. Raises ValueError for any other text."""
    import semver

    core = valid(version)
    if core is None:
        raise ValueError(f"not a version: {version!r}")
    return semver.Version.parse(core)


def highest(versions: Iterable[str], wanted: object) -> str | None:
    """The highest of the versions that the range accepts; the first of equals."""
    return max(
        (version for version in versions if satisfies(version, wanted)),
        key=precedence,
        default=None,
    )


def prerelease(version: str) -> list[str | int]:
    """The parts after the `-` as Node splits them: `1.0.0-beta.1` gives ``["beta", 1]``."""
    core = valid(version) or ""
    _, _, parts = core.partition("-")
    return [int(part) if part.isdecimal() else part for part in parts.split(".") if part]


@lru_cache(CACHE_SIZE)
def _range(wanted: str) -> Any:
    """node-semver's parsed range, or None. Its deviations from Node are kept out before."""
    import nodesemver

    if len(wanted) > MAX_LENGTH:
        return None
    wanted = _BUILD.sub("", wanted)
    if any(int(number) > MAX_NUMBER for number in _NUMBER.findall(_PRERELEASE.sub("", wanted))):
        return None
    if any(_misplaced_wildcard(part) for part in wanted.split("||")):
        return None
    try:
        return nodesemver.make_range(wanted, False)
    except ValueError:
        return None


def _misplaced_wildcard(comparators: str) -> bool:
    """Whether a number follows a wildcard (`3.x.1`): Node takes that after `^` and `~` and in a
    hyphen range only."""
    if _HYPHEN_RANGE.fullmatch(comparators):
        return False
    return any(
        token[0] not in "~^" and _NUMBER_AFTER_WILDCARD.match(token.lstrip(_OPERATORS))
        for token in _APART.sub(r"\1", comparators).split()
    )


@lru_cache(CACHE_SIZE)
def _node_version(core: str) -> Any:
    import nodesemver

    return nodesemver.make_semver(core, False)
