"""In which order the instances of a service are tried for a connection.

    highest            those of the newest version, at random among them; then the older ones
    random             any
    round-robin        whose turn was longest ago
    least-connections  with the fewest connections, at random among equals
    hash               by the instance's key and the proxy's own, so that each proxy stays with one

All but `highest` take any version that matches for as good as any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from ..transport.errors import InvalidInput
from .messages import ServiceRecord
from .registry import matching

POLICIES = ("highest", "round-robin", "random", "least-connections", "hash")
#: Instances whose turn round-robin remembers; the ones whose turn was longest ago are forgotten,
#: and are as good as new when they come back.
MAX_TURNS = 4096


class Balancer:
    """One policy. Candidates are services with different keys, highest version first, as
    `newest_first` has them; ``own_key`` is the proxy's, and matters to `hash` only.

    Raises InvalidInput: there is no such policy.
    """

    def __init__(self, policy: str, rng: Random, own_key: bytes = b"") -> None:
        if policy not in POLICIES:
            raise InvalidInput(
                f"there is no way of balancing {policy!r}: use {', '.join(POLICIES)}"
            )
        self.policy = policy
        self._rng = rng
        self._own_key = own_key
        # Key -> number of its last turn, the oldest turn first.
        self._turns: dict[bytes, int] = {}
        self._turn = 0

    def order(
        self, candidates: Sequence[ServiceRecord], connections: Mapping[bytes, int]
    ) -> list[ServiceRecord]:
        """All of them, the one to try first first. ``connections`` are those under way, by key."""
        if len(candidates) == 1:
            return list(candidates)
        ranks = self._ranks(candidates, connections)
        places = list(range(len(candidates)))
        self._rng.shuffle(places)
        places.sort(key=ranks.__getitem__)
        return [candidates[place] for place in places]

    def favoured(
        self, candidates: Sequence[ServiceRecord], connections: Mapping[bytes, int]
    ) -> list[ServiceRecord]:
        """Those that may come first for the next connection, in the candidates' order."""
        ranks = self._ranks(candidates, connections)
        best = min(ranks, default=None)
        return [each for each, rank in zip(candidates, ranks, strict=True) if rank == best]

    def took(self, public_key: bytes) -> None:
        """A connection begins with this one."""
        if self.policy != "round-robin":
            return
        self._turn += 1
        self._turns.pop(public_key, None)
        self._turns[public_key] = self._turn
        if len(self._turns) > MAX_TURNS:
            del self._turns[next(iter(self._turns))]

    def _ranks(
        self, candidates: Sequence[ServiceRecord], connections: Mapping[bytes, int]
    ) -> list[Any]:
        """What to sort by, the lowest first; equals are equally good."""
        if self.policy == "highest":
            return _version_ranks(candidates)
        if self.policy == "round-robin":
            return [self._turns.get(each.public_key, 0) for each in candidates]
        if self.policy == "least-connections":
            return [connections.get(each.public_key, 0) for each in candidates]
        if self.policy == "hash":
            return [self._score(each.public_key) for each in candidates]
        return [0] * len(candidates)

    def _score(self, public_key: bytes) -> bytes:
        # Rendezvous hashing: every instance has a score of its own for this proxy, so that one
        # that comes or goes changes nothing between the others.
        return hashlib.blake2b(public_key, key=self._own_key[:64], digest_size=16).digest()


def newest_first(records: Sequence[ServiceRecord]) -> tuple[ServiceRecord, ...]:
    """One record a key, that of its highest version; equal versions stay in their order."""
    ordered = sorted(records, key=lambda one: matching.precedence(one.version), reverse=True)
    found: dict[bytes, ServiceRecord] = {}
    for record in ordered:
        found.setdefault(record.public_key, record)
    return tuple(found.values())


def _version_ranks(candidates: Sequence[ServiceRecord]) -> list[int]:
    ranks: list[int] = []
    rank, before = 0, ""
    for candidate in candidates:
        version = candidate.version
        # Texts are compared first: that is forty times cheaper, and mostly enough.
        if version != before and before:
            rank += matching.precedence(version) != matching.precedence(before)
        before = version
        ranks.append(rank)
    return ranks
