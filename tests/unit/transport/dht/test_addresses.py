"""Node ids and kinds of addresses."""

from __future__ import annotations

from typing import Any

import pytest
from vectors import load

from hyperseaport.transport.dht.addresses import (
    is_bogon,
    is_private,
    is_refused,
    is_reserved,
    match,
    node_id,
    packed,
)


@pytest.mark.parametrize("vector", load("hyperdht")["nodeIds"], ids=lambda v: v["host"])
def test_an_id_is_the_hash_of_the_six_bytes(vector: dict[str, Any]) -> None:
    address = vector["host"], vector["port"]
    assert packed(address).hex() == vector["preimage"]
    assert node_id(address).hex() == vector["id"]


@pytest.mark.parametrize("vector", load("hyperdht")["bogon"], ids=lambda v: v["ip"])
def test_bogons(vector: dict[str, Any]) -> None:
    host = vector["ip"]
    assert is_private(host) is vector["private"]
    assert is_reserved(host) is vector["reserved"]
    assert is_bogon(host) is vector["bogon"]


@pytest.mark.parametrize("number", range(len(load("hyperdht")["matchAddress"])))
def test_match_prefers_the_nearest_network(number: int) -> None:
    vector = load("hyperdht")["matchAddress"][number]
    theirs = [(host, 1000 + index) for index, host in enumerate(vector["theirs"])]
    found = match(vector["mine"], theirs)
    assert (found and found[0]) == vector["result"]
    assert found is None or found in theirs


def test_refused_addresses() -> None:
    assert is_refused(("134.209.28.98", 49738))
    assert not is_refused(("134.209.28.98", 49737))
    assert is_refused(("150.136.142.116", 1))
