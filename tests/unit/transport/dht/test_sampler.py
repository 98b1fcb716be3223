"""The public address by majority."""

from __future__ import annotations

from typing import Any

import pytest
from vectors import load

from hyperseaport.transport.dht.sampler import RING, Sampler


@pytest.mark.parametrize("vector", load("hyperdht")["natSampler"], ids=lambda v: v["note"])
def test_recorded_samples(vector: dict[str, Any]) -> None:
    sampler = Sampler()
    for step in vector["steps"]:
        sampler.add((step["host"], step["port"]))
        assert sampler.size == step["size"]
        assert sampler.threshold == step["threshold"]
        assert (sampler.host, sampler.port) == (step["resultHost"], step["resultPort"])


def test_nothing_is_known_before_the_first_sample() -> None:
    assert (Sampler().host, Sampler().port) == (None, 0)


def test_a_move_is_believed_once_the_ring_is_full_of_it() -> None:
    sampler = Sampler()
    for _ in range(RING):
        sampler.add(("5.0.0.1", 100))
    for _ in range(RING):
        sampler.add(("6.0.0.1", 100))
    assert (sampler.host, sampler.port) == ("6.0.0.1", 100)
