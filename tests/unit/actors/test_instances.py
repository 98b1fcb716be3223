"""Trust in instances: how it is lost, and how one connection at a time brings it back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperseaport.actors.balance import POLICIES, Balancer
from hyperseaport.actors.instances import (
    BACKOFF_FIRST,
    BACKOFF_LAST,
    HEDGE_FIRST,
    HEDGE_MAX,
    HEDGE_MIN,
    MAX_OVERTAKEN,
    TRIAL,
    ConnectTimes,
    Instances,
)
from hyperseaport.actors.messages import ServiceRecord, ServiceWorked
from hyperseaport.transport.dht.timings import Timings

NOBODY: Mapping[bytes, int] = {}


def record(name: str, version: str = "1.0.0", **more: Any) -> ServiceRecord:
    return ServiceRecord(name.encode() * 32, "a", version, {}, **more)


A, B, C = record("a", "3.0.0"), record("b", "2.0.0"), record("c", "1.0.0")


def key(of: ServiceRecord) -> bytes:
    return of.public_key


def instances(*records: ServiceRecord, **more: Any) -> Instances:
    rng = Random(1)
    made = Instances(Balancer("highest", rng), rng, **more)
    made.update(records)
    return made


def test_the_set_aside_come_last_and_are_offered_when_nobody_else_is() -> None:
    known = instances(C, A, B)
    assert known.choose((), NOBODY, 0.0) == [A, B, C]
    assert known.failed(key(A), "refused", 0.0)
    assert known.choose((), NOBODY, 0.1) == [B, C, A]
    assert known.choose((key(B), key(C)), NOBODY, 0.1) == [A]
    known.failed(key(C), "refused", 0.1)
    known.failed(key(B), "refused", 0.2)
    times = {each: known[key(each)].due_at for each in (A, B, C)}
    assert known.choose((), NOBODY, 0.3) == sorted(times, key=lambda each: times[each])
    assert known.choose((key(A), key(B), key(C)), NOBODY, 0.3) == []


def test_each_failure_in_a_row_doubles_the_time_until_a_minute() -> None:
    known = instances(A)
    now, longest = 100.0, BACKOFF_FIRST
    seconds = []
    for _ in range(12):
        assert known.failed(key(A), "refused", now)
        seconds.append(known[key(A)].due_at - now)
        assert longest / 2 <= seconds[-1] <= longest
        now = known[key(A)].due_at
        longest = min(BACKOFF_LAST, longest * 2)
    assert longest == BACKOFF_LAST
    # Chance takes something off.
    assert len(set(seconds[6:])) > 1
    assert known.worked(key(A), now)
    assert not known.worked(key(A), now)
    known.failed(key(A), "refused", now)
    assert known[key(A)].due_at - now <= BACKOFF_FIRST


def test_failures_of_connections_that_began_before_count_once() -> None:
    known = instances(A)
    assert known.failed(key(A), "refused", 0.0)
    due_at = known[key(A)].due_at
    for _ in range(100):
        assert not known.failed(key(A), "timed out", due_at / 2)
    assert (known[key(A)].failures, known[key(A)].due_at) == (1, due_at)
    assert known[key(A)].reason == "timed out"
    assert not known.failed(key(B), "nobody knows it", 0.0)
    assert not known.worked(key(B), 0.0)


def test_exactly_one_connection_tries_one_that_is_due() -> None:
    known = instances(A, B)
    known.failed(key(A), "refused", 0.0)
    due_at = known[key(A)].due_at
    assert known.next_due(0.0) == due_at
    assert list(known.due(due_at - 0.01)) == []
    assert list(known.due(due_at)) == [A]
    assert known.choose((), NOBODY, due_at) == [A, B]
    known.begin(key(A), "first", due_at)
    assert known.choose((), NOBODY, due_at) == [B, A]
    assert list(known.due(due_at)) == []
    # Its own end without a result lets somebody else try, nobody else's does.
    assert not known.release(key(A), "another")
    assert known.release(key(A), "first")
    assert known.choose((), NOBODY, due_at) == [A, B]
    known.begin(key(A), "second", due_at)
    assert known.next_due(due_at) == due_at + TRIAL
    assert known.choose((), NOBODY, due_at + TRIAL) == [A, B]
    assert known.failed(key(A), "refused", due_at + 1)
    assert known[key(A)].failures == 2
    assert known.choose((), NOBODY, due_at + 1) == [B, A]


def test_one_trial_a_connection_whose_rivals_are_trusted() -> None:
    known = instances(A, B, C)
    for each in (A, B):
        known.failed(key(each), "refused", 0.0)
    assert known.choose((), NOBODY, 10.0)[:2] == [A, C]


def test_one_that_is_due_and_not_favoured_waits() -> None:
    known = instances(A, B)
    known.failed(key(B), "refused", 0.0)
    assert known.choose((), NOBODY, 10.0) == [A, B]
    assert list(known.due(10.0)) == [B]


def test_to_be_overtaken_often_is_a_failure() -> None:
    known = instances(A, B)
    for _ in range(MAX_OVERTAKEN - 1):
        assert not known.overtaken(key(A), "somebody", 0.0)
    known.connected(key(A))
    for _ in range(MAX_OVERTAKEN - 1):
        assert not known.overtaken(key(A), "somebody", 0.0)
    assert known.choose((), NOBODY, 0.0) == [A, B]
    assert known.overtaken(key(A), "somebody", 0.0)
    assert known.choose((), NOBODY, 0.0) == [B, A]
    # What is on trial has no more chances; what others tried meanwhile says nothing.
    assert not known.overtaken(key(A), "somebody", 0.0)
    known.begin(key(A), "tries", 10.0)
    assert not known.overtaken(key(A), "somebody", 10.1)
    assert known.overtaken(key(A), "tries", 10.1)
    assert known[key(A)].failures == 2
    assert not known.overtaken(key(C), "somebody", 0.0)
    known.connected(key(C))


def test_who_left_or_runs_anew_is_trusted_again() -> None:
    known = instances(A, record("b", "2.0.0", instance="01"))
    for each in (A, B):
        known.failed(key(each), "refused", 0.0)
    known.worked(key(A), 0.0)
    known.failed(key(A), "refused", 1.0)
    assert known.update([A, record("b", "2.0.0", instance="01")]) == []
    assert known.update([A, record("b", "2.0.0", instance="02")]) == [key(B)]
    assert known.choose((), NOBODY, 1.0) == [B, A]
    known.update([B])
    known.update([A, B])
    assert known.choose((), NOBODY, 1.0) == [A, B]
    assert known[key(A)].worked_at is None


def test_the_unverified_are_refused_when_told_so() -> None:
    signed = record("b", "1.0.0", verified=True)
    known = instances(A, signed, verified_only=True)
    assert known.choose((), NOBODY, 0.0) == [signed]
    assert known.choose((key(signed),), NOBODY, 0.0) == []
    assert (len(known), known.usable) == (2, 1)
    assert not known.is_trusted(key(A))
    assert known.is_trusted(key(signed))
    assert known.leader(None, NOBODY) == signed
    assert [(row["state"], row["key"]) for row in known.explain(NOBODY, 0.0)] == [
        ("taken", key(signed).hex()),
        ("refused", key(A).hex()),
    ]


def test_the_leader_stays_while_connections_go_there() -> None:
    equal = record("d", "3.0.0")
    known = instances(A, equal, B)
    assert known.leader(None, NOBODY) == A
    assert known.leader(equal, NOBODY) == equal
    # An older version leads only when the newer ones fail.
    assert known.leader(B, NOBODY) == A
    known.failed(key(A), "refused", 0.0)
    assert known.leader(A, NOBODY) == equal
    known.failed(key(equal), "refused", 0.0)
    known.failed(key(B), "refused", 0.0)
    assert known.leader(B, NOBODY) == B
    known.update([])
    assert known.leader(B, NOBODY) is None


@pytest.mark.parametrize("policy", ["random", "round-robin", "least-connections"])
def test_the_leader_of_equals_does_not_change_with_each_connection(policy: str) -> None:
    known = Instances(Balancer(policy, Random(1)), Random(1))
    known.update([A, B, C])
    for _ in range(5):
        chosen = known.choose((), NOBODY, 0.0)[0]
        known.begin(key(chosen), "somebody", 0.0)
        assert known.leader(B, {key(B): 7}) == B


def test_it_explains_each() -> None:
    old, equal = record("d", "0.1.0"), record("e", "3.0.0", verified=True)
    known = instances(A, equal, B, C, old)
    known.worked(key(A), 5.0)
    known.failed(key(B), "nobody announces it", 9.0)
    known.failed(key(C), "reset", 0.0)
    known.begin(key(C), "somebody", 9.5)
    rows = known.explain({key(A): 2}, 10.0)
    assert [row["state"] for row in rows] == ["taken", "taken", "candidate", *["set aside"] * 2]
    assert rows[0] == {
        "key": key(A).hex(),
        "role": "a",
        "version": "3.0.0",
        "verified": False,
        "state": "taken",
        "reason": "newest version, one of 2",
        "failures": 0,
        "retry_in": None,
        "connections": 2,
        "worked_ago": 5.0,
        "last": None,
    }
    assert rows[1]["verified"] is True
    assert rows[2]["reason"] == "there is a newer version"
    assert (rows[3]["reason"], rows[3]["failures"]) == ("nobody announces it", 1)
    assert rows[3]["retry_in"] == 0.0
    assert rows[4]["reason"] == "on trial after: reset"


def test_it_tells_where_the_time_of_the_last_connection_went() -> None:
    known = instances(A, B)
    timings = Timings(lookup=0.08, handshake=0.0463, path=0.09, how="punched")
    known.worked(key(A), 5.0, ServiceWorked(key(A), 0.2364, 0.0102, timings))
    known.worked(key(B), 5.0, ServiceWorked(key(B), 0.2, 0.0, None))
    rows = {row["key"]: row["last"] for row in known.explain({}, 10.0)}
    assert rows[key(B).hex()] is None
    assert rows[key(A).hex()] == {
        "path": "punched",
        "total_ms": 246.6,
        "wait_ms": 10.2,
        "lookup_ms": 80.0,
        "handshake_ms": 46.3,
        "path_ms": 90.0,
        "first_byte_ms": 20.1,
    }
    # A service that runs anew under its key has its history, and the next connection replaces it.
    known.failed(key(A), "reset", 6.0)
    anew = replace(A, instance="ab" * 16)
    known.update([anew])
    (row,) = known.explain({}, 10.0)
    assert row["last"]["total_ms"] == 246.6
    quick = Timings(0.0, 0.0404, 0.0, "remembered")
    known.worked(key(A), 11.0, ServiceWorked(key(A), 0.0807, 0.0, quick))
    (row,) = known.explain({}, 11.0)
    assert (row["last"]["path"], row["last"]["total_ms"]) == ("remembered", 80.7)


@pytest.mark.parametrize("policy", POLICIES)
@settings(deadline=None, derandomize=True, max_examples=20)
@given(data=st.data())
def test_whatever_happens_everybody_usable_is_offered_once(
    policy: str, data: st.DataObject
) -> None:
    """And nobody else, and at most one trial of each at a time."""
    everybody = [record(name, version) for name in "abcd" for version in ("1.0.0", "2.0.0")]
    rng = Random(1)
    known = Instances(Balancer(policy, rng, b"own"), rng)
    now, present = 0.0, set[bytes]()
    trials: dict[bytes, object] = {}
    for step in range(data.draw(st.integers(1, 20))):
        now += data.draw(st.floats(0, 20))
        one = data.draw(st.sampled_from("abcd")).encode() * 32
        match data.draw(st.sampled_from(["update", "failed", "worked", "release", "begin"])):
            case "update":
                records = data.draw(st.lists(st.sampled_from(everybody)))
                known.update(records)
                present = {each.public_key for each in records}
                trials = {each: who for each, who in trials.items() if each in present}
            case "failed":
                known.failed(one, "it said so", now)
            case "worked":
                known.worked(one, now)
            case "release":
                known.release(one, trials.pop(one, None))
            case _:
                pass
        excluding = data.draw(st.sets(st.sampled_from(sorted(present)))) if present else set()
        offered = [each.public_key for each in known.choose(excluding, NOBODY, now)]
        assert sorted(offered) == sorted(present - excluding)
        due = {each.public_key for each in known.due(now)}
        # Only the first can be a trial.
        trusted = [each for each in offered[1:] if known.is_trusted(each)]
        assert offered[1 : 1 + len(trusted)] == trusted
        if offered:
            known.begin(offered[0], step, now)
            if offered[0] in due:
                trials[offered[0]] = step
                assert offered[0] not in {each.public_key for each in known.due(now)}


def test_the_time_to_hedge_follows_the_typical_time_within_limits() -> None:
    times = ConnectTimes()
    assert (times.typical, times.hedge) == (None, HEDGE_FIRST)
    times.add(0.04)
    assert times.hedge == pytest.approx(0.16)
    for _ in range(100):
        times.add(0.001)
    assert times.hedge == HEDGE_MIN
    for _ in range(100):
        times.add(5.0)
    assert times.hedge == HEDGE_MAX
    assert times.typical == pytest.approx(5.0, rel=0.01)
