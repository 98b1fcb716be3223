"""The order of instances: properties that hold for any set of them."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperseaport.actors import balance
from hyperseaport.actors.balance import POLICIES, Balancer, newest_first
from hyperseaport.actors.messages import ServiceRecord
from hyperseaport.actors.registry import matching
from hyperseaport.transport.errors import InvalidInput

KEYS = st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=12, unique=True)
VERSIONS = st.sampled_from(["1.0.0", "1.0.0+build", "1.2.0", "1.2.0-beta.1", "1.10.0", "2.0.0"])
EXAMPLES = settings(deadline=None, derandomize=True, max_examples=60)


def record(key: bytes, version: str = "1.0.0") -> ServiceRecord:
    return ServiceRecord(key, "a", version, {})


def records(count: int, version: str = "1.0.0") -> list[ServiceRecord]:
    return [record(bytes([number]) * 32, version) for number in range(count)]


@st.composite
def candidates(draw: st.DrawFn) -> tuple[ServiceRecord, ...]:
    return newest_first([record(key, draw(VERSIONS)) for key in draw(KEYS)])


def first(balancer: Balancer, given: list[ServiceRecord]) -> ServiceRecord:
    """One connection's choice."""
    choice = balancer.order(given, {})[0]
    balancer.took(choice.public_key)
    return choice


@pytest.mark.parametrize("policy", POLICIES)
@EXAMPLES
@given(given_=candidates(), seed=st.integers(0, 2**32))
def test_an_order_has_each_candidate_once_and_begins_with_a_favoured_one(
    policy: str, given_: tuple[ServiceRecord, ...], seed: int
) -> None:
    rng = Random(seed)
    balancer = Balancer(policy, rng, b"own")
    connections = {each.public_key: rng.randrange(3) for each in given_}
    for _ in range(4):
        ordered = balancer.order(given_, connections)
        assert sorted(each.public_key for each in ordered) == sorted(
            each.public_key for each in given_
        )
        favoured = balancer.favoured(given_, connections)
        assert ordered[0] in favoured
        # They come before all others.
        assert set(map(id, ordered[: len(favoured)])) == set(map(id, favoured))
        balancer.took(ordered[0].public_key)


def test_nobody_is_a_list_too() -> None:
    for policy in POLICIES:
        balancer = Balancer(policy, Random(1))
        assert balancer.order((), {}) == []
        assert balancer.favoured((), {}) == []


@EXAMPLES
@given(given_=candidates(), seed=st.integers(0, 2**32))
def test_highest_takes_versions_in_order(given_: tuple[ServiceRecord, ...], seed: int) -> None:
    ordered = Balancer("highest", Random(seed)).order(given_, {})
    assert [each.version.partition("+")[0] for each in ordered] == [
        each.version.partition("+")[0] for each in given_
    ]


def test_highest_is_fair_among_equals() -> None:
    new, old = records(4, "2.0.0"), [record(b"\xff" * 32)]
    balancer = Balancer("highest", Random(1))
    chosen = Counter(first(balancer, [*new, *old]).public_key for _ in range(4000))
    assert set(chosen) == {each.public_key for each in new}
    # 1000 each, within five times the deviation that is expected.
    assert all(860 < count < 1140 for count in chosen.values())


def test_random_is_fair_among_all() -> None:
    given_ = [*records(2, "2.0.0"), *[record(b"\xff" * 32)]]
    balancer = Balancer("random", Random(2))
    chosen = Counter(first(balancer, given_).public_key for _ in range(3000))
    assert all(870 < chosen[each.public_key] < 1130 for each in given_)


@EXAMPLES
@given(given_=candidates(), rounds=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_round_robin_differs_by_one_at_most(
    given_: tuple[ServiceRecord, ...], rounds: int, seed: int
) -> None:
    balancer = Balancer("round-robin", Random(seed))
    chosen = Counter({each.public_key: 0 for each in given_})
    for _ in range(rounds):
        chosen[first(balancer, list(given_)).public_key] += 1
    assert max(chosen.values()) - min(chosen.values()) <= 1


def test_round_robin_goes_on_when_instances_come_and_go() -> None:
    a, b, c, d = records(4)
    balancer = Balancer("round-robin", Random(1))
    turns = [first(balancer, [a, b, c]) for _ in range(3)]
    assert sorted(turns, key=str) == [a, b, c]
    remaining = [each for each in turns if each is not turns[1]]
    assert [first(balancer, remaining) for _ in range(2)] == remaining
    # A newcomer is next, and then waits for its turn.
    assert [first(balancer, [*remaining, d]) for _ in range(4)] == [d, *remaining, d]


def test_what_round_robin_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "MAX_TURNS", 3)
    balancer = Balancer("round-robin", Random(1))
    given_ = records(5)
    for each in given_:
        balancer.took(each.public_key)
    # Of five, the turns of three are known; the other two are as good as new.
    assert balancer.favoured(given_, {}) == given_[:2]


@EXAMPLES
@given(given_=candidates(), seed=st.integers(0, 2**32), data=st.data())
def test_least_connections_comes_first(
    given_: tuple[ServiceRecord, ...], seed: int, data: st.DataObject
) -> None:
    connections = {each.public_key: data.draw(st.integers(0, 5)) for each in given_}
    ordered = Balancer("least-connections", Random(seed)).order(given_, connections)
    counts = [connections[each.public_key] for each in ordered]
    assert counts == sorted(counts)


def test_least_connections_spreads_over_equals() -> None:
    given_ = records(3)
    balancer = Balancer("least-connections", Random(3))
    connections: Counter[bytes] = Counter()
    for _ in range(30):
        connections[balancer.order(given_, connections)[0].public_key] += 1
    assert set(connections.values()) == {10}


@EXAMPLES
@given(
    given_=candidates(),
    own_keys=st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=20),
    gone=st.integers(0, 11),
    seed=st.integers(0, 2**32),
)
def test_hash_moves_only_the_connections_of_the_one_that_went(
    given_: tuple[ServiceRecord, ...], own_keys: list[bytes], gone: int, seed: int
) -> None:
    left = list(given_)
    left.pop(gone % len(left))
    for own_key in own_keys:
        balancer = Balancer("hash", Random(seed), own_key)
        before = balancer.order(given_, {})
        # Whatever the chance and the registry's order.
        assert Balancer("hash", Random(seed + 1), own_key).order(given_[::-1], {}) == before
        assert balancer.order(left, {}) == [each for each in before if each in left]


def test_hash_spreads_proxies() -> None:
    given_ = records(4)
    rng = Random(4)
    chosen = Counter(
        Balancer("hash", rng, rng.randbytes(32)).order(given_, {})[0].public_key
        for _ in range(2000)
    )
    assert all(400 < chosen[each.public_key] < 600 for each in given_)


@EXAMPLES
@given(st.lists(st.tuples(st.sampled_from([b"a" * 32, b"b" * 32, b"c" * 32]), VERSIONS)))
def test_a_key_counts_once_with_its_newest_version(pairs: list[tuple[bytes, str]]) -> None:
    found = newest_first([record(key, version) for key, version in pairs])
    assert {each.public_key for each in found} == {key for key, _ in pairs}
    assert len(found) == len({key for key, _ in pairs})
    ranks = [matching.precedence(each.version) for each in found]
    assert ranks == sorted(ranks, reverse=True)
    for each in found:
        versions = [matching.precedence(v) for key, v in pairs if key == each.public_key]
        assert matching.precedence(each.version) == max(versions)


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match="no way of balancing 'best': use highest, round-robin"):
        Balancer("best", Random(1))
