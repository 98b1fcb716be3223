"""Role texts and the meta objects they stand for (spec: registry 6.1).

A role text is what users write after ``-r``: `couchdb@3.2.2`, `couchdb@3.x`, `@scope/name@^1.0.0`.
A meta object is what programs send to a registry: a JSON object with `role`, `version` (left out
when unknown), `_tags`, `tags` and `hash`, in this order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from ...transport.errors import InvalidInput
from . import matching

#: A JSON object. Never changed once made: messages carry it from actor to actor.
Meta: TypeAlias = Mapping[str, Any]

#: Characters of a role text that a user may type: a registry takes no larger ones.
MAX_ROLE_TEXT = 1024


def parse(role: str | Mapping[str, Any]) -> dict[str, Any]:
    """The meta object of a role text, or of an object whose `role` is one.

    Nothing is checked or trimmed, as in the Node programs; unknown members of an object stay.
    """
    if isinstance(role, str):
        name, version = _split(role)
        meta: dict[str, Any] = {"role": name}
        if version is not None:
            meta["version"] = version
    else:
        meta = _parse_object(role)
    tags = _tag_set(meta.get("tags") or [])
    meta.setdefault("_tags", tags)
    meta.setdefault("tags", [])
    version = meta.get("version")
    texts = [meta["role"], "undefined" if version is None else version, "|".join(tags)]
    meta["hash"] = "|".join(map(str, texts))
    return meta


def to_register(role: str, tags: Sequence[str] = ()) -> dict[str, Any]:
    """The meta object to register. Raises `InvalidInput` when the text names no exact version."""
    meta = _parse_named(role, "couchdb@3.2.2")
    if tags:
        meta = parse({"role": role, "tags": list(tags)})
    version = meta.get("version")
    if not version:
        raise InvalidInput(f"the role {role!r} has no version: write it as {meta['role']}@1.2.3")
    if matching.valid(version) is None:
        raise InvalidInput(
            f"{version!r} is not a version: a service registers one exact version, like 1.2.3"
        )
    return meta


def to_find(role: str) -> dict[str, Any]:
    """The meta object to look for. Raises `InvalidInput` when the text's range is none.

    Without a version every version will do.
    """
    meta = _parse_named(role, "couchdb@3.x")
    version = meta.get("version")
    if version is not None and not matching.valid_range(version):
        raise InvalidInput(f"{version!r} is not a version range: write 3.2.2, 3.x or ^3.0.0")
    return meta


def text(meta: Meta) -> str:
    """The role text of a meta object, for people: `couchdb@3.x`."""
    version = meta.get("version")
    return str(meta.get("role")) if version is None else f"{meta.get('role')}@{version}"


def _parse_named(role: str, example: str) -> dict[str, Any]:
    if len(role) > MAX_ROLE_TEXT:
        raise InvalidInput(f"a role has at most {MAX_ROLE_TEXT} characters, this one {len(role)}")
    meta = parse(role)
    if meta["role"] in ("", "@"):
        raise InvalidInput(f"the role {role!r} has no name: write it as {example}")
    return meta


def _split(role: str) -> tuple[str, str | None]:
    """Name and version. A name may itself begin with `@`: then the second one divides."""
    parts = role.split("@")
    if role.startswith("@"):
        return "@" + parts[1], parts[2] if len(parts) > 2 else None
    return parts[0], parts[1] if len(parts) > 1 else None


def _parse_object(given: Mapping[str, Any]) -> dict[str, Any]:
    meta = dict(given)
    role = meta.get("role")
    if not isinstance(role, str):
        raise InvalidInput("a service description needs a role, which is a text")
    meta["role"], version = _split(role)
    # The Node programs disagree with themselves here: only an unscoped text beats the member.
    if version is not None and (not role.startswith("@") or meta.get("version") is None):
        meta["version"] = version
    return meta


def _tag_set(tags: Any) -> dict[str, bool]:
    """Each tag once, in the order in which JavaScript enumerates an object's members: decimal
    integers first and ascending, then the rest as they came."""
    names = dict.fromkeys(map(str, tags), True)
    numbers = sorted((name for name in names if _is_index(name)), key=int)
    return dict.fromkeys(numbers, True) | names


def _is_index(name: str) -> bool:
    return name.isascii() and name.isdecimal() and str(int(name)) == name and int(name) < 2**32 - 1
