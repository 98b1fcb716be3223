"""Who may do what at a registry that not everybody may use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from . import lease
from .lease import Refused

#: Methods that change what the registry tells, and methods that ask it.
REGISTERING = frozenset({"register", "unregister", "lease"})
QUERYING = frozenset({"query", "roles", "waitFor", "watch"})


class Policy(Struct, frozen=True):
    """Public keys, of 32 bytes each; None is for everybody."""

    #: Connections of these keys may register services, and these services may have leases, whoever
    #: brings them.
    allow_register: frozenset[bytes] | None = None
    #: Connections of these keys may ask for services.
    allow_query: frozenset[bytes] | None = None

    def check(self, method: str, params: Any, remote_key: bytes) -> None:
        """Whether a connection with this key may make the call. Raises `Refused`: policy, and for a
        lease that cannot be read also malformed and oversized."""
        if method in QUERYING and not _allows(self.allow_query, remote_key):
            raise _refusal("look for services", remote_key)
        if method not in REGISTERING or _allows(self.allow_register, remote_key):
            return
        # Here only what it says of itself; the table verifies that the key has signed it.
        if method == "lease" and _allows(self.allow_register, _service_key(params)):
            return
        raise _refusal("register services", remote_key)


def _allows(keys: frozenset[bytes] | None, key: bytes) -> bool:
    return keys is None or key in keys


def _service_key(params: Any) -> bytes:
    if not isinstance(params, Mapping):
        raise Refused("needs params: an object with statement and signature")
    return lease.parse(params.get("statement"), params.get("signature")).key


def _refusal(what: str, key: bytes) -> Refused:
    return Refused(
        f"only keys that the registry's operator has allowed may {what}, and {key.hex()} is not "
        "one of them",
        "policy",
    )
