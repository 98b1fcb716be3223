from __future__ import annotations

from typing import Any

import pytest

from hyperseaport.actors.registry import lease, roles
from hyperseaport.actors.registry.lease import Refused
from hyperseaport.actors.registry.policy import QUERYING, REGISTERING, Policy
from hyperseaport.transport.keys import KeyPair

FRIEND, STRANGER = b"\x01" * 32, b"\x02" * 32
SERVICE, OTHER = KeyPair.from_seed(b"\x03" * 32), KeyPair.from_seed(b"\x04" * 32)


def leased(keys: KeyPair) -> Any:
    meta = roles.parse("a@1.0.0")
    made = lease.sign(keys, meta, instance="00" * 16, sequence=1, issued=1)
    return {"statement": made.text, "signature": made.signature.hex()}


@pytest.mark.parametrize("method", sorted(REGISTERING | QUERYING | {"unwatch", "nosuch"}))
def test_an_open_registry_is_open(method: str) -> None:
    Policy().check(method, None, STRANGER)


@pytest.mark.parametrize("method", sorted(REGISTERING - {"lease"}))
def test_who_may_register(method: str) -> None:
    policy = Policy(allow_register=frozenset({FRIEND}))
    policy.check(method, None, FRIEND)
    with pytest.raises(Refused, match=f"may register services, and {STRANGER.hex()}") as caught:
        policy.check(method, None, STRANGER)
    assert caught.value.kind == "policy"
    for open_to_all in QUERYING:
        policy.check(open_to_all, None, STRANGER)


@pytest.mark.parametrize("method", sorted(QUERYING))
def test_who_may_ask(method: str) -> None:
    policy = Policy(allow_query=frozenset({FRIEND}))
    policy.check(method, None, FRIEND)
    with pytest.raises(Refused, match=f"may look for services, and {STRANGER.hex()}") as caught:
        policy.check(method, None, STRANGER)
    assert caught.value.kind == "policy"
    policy.check("register", None, STRANGER)


def test_a_lease_is_taken_from_the_connection_or_for_the_service() -> None:
    policy = Policy(allow_register=frozenset({FRIEND, SERVICE.public_key}))
    policy.check("lease", leased(OTHER), FRIEND)
    policy.check("lease", leased(SERVICE), STRANGER)
    with pytest.raises(Refused, match="may register") as caught:
        policy.check("lease", leased(OTHER), STRANGER)
    assert caught.value.kind == "policy"
    bads: list[Any] = [None, [], {}, {"statement": 1}, leased(SERVICE) | {"signature": "no"}]
    for bad in bads:
        with pytest.raises(Refused) as caught:
            policy.check("lease", bad, STRANGER)
        assert caught.value.kind == "malformed"


def test_an_empty_list_is_for_nobody() -> None:
    with pytest.raises(Refused):
        Policy(allow_query=frozenset()).check("query", None, FRIEND)
