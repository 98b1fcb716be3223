from __future__ import annotations

from typing import Any

import pytest

from hyperseaport.actors.registry import interest
from hyperseaport.actors.registry.interest import Waiters, Watches
from hyperseaport.actors.registry.lease import Refused

KEY = b"\x01" * 32


def test_a_registration_answers_all_waiters_that_it_matches_and_no_other() -> None:
    waiters: Waiters[Any] = Waiters()
    for ticket, (role, wanted) in enumerate(
        [("a", "^1.0.0"), ("a", None), ("a", "1.x"), ("a", "2.x"), ("b", "1.x")]
    ):
        waiters.add("w", ticket, role, wanted, now=0.0)
    assert [waiter.ticket for waiter in waiters.take("a", "1.4.0")] == [0, 1, 2]
    assert len(waiters) == 2
    assert waiters.take("a", "1.4.1") == []


def test_waiters_expire_in_order() -> None:
    waiters: Waiters[Any] = Waiters()
    assert waiters.deadline() is None
    waiters.add("w", 1, "a", None, now=10.0)
    waiters.add("w", 2, "b", None, now=12.0)
    assert waiters.deadline() == 25.0
    assert waiters.expire(24.9) == []
    assert [waiter.ticket for waiter in waiters.expire(25.0)] == [1]
    assert waiters.deadline() == 27.0
    assert [waiter.ticket for waiter in waiters.expire(100.0)] == [2]
    assert waiters.deadline() is None


def test_waiters_of_a_dead_session_are_forgotten() -> None:
    waiters: Waiters[Any] = Waiters()
    waiters.add("w1", 1, "a", None, now=0.0)
    waiters.add("w2", 1, "a", None, now=0.0)
    waiters.drop("w1")
    assert [waiter.session for waiter in waiters.take("a", "1.0.0")] == ["w2"]


def test_waiters_have_limits(monkeypatch: Any) -> None:
    monkeypatch.setattr(interest, "MAX_WAITERS_PER_SESSION", 2)
    monkeypatch.setattr(interest, "MAX_WAITERS", 3)
    waiters: Waiters[Any] = Waiters()
    for ticket in range(2):
        waiters.add("w", ticket, "a", None, now=0.0)
    with pytest.raises(Refused, match="too many"):
        waiters.add("w", 2, "a", None, now=0.0)
    waiters.add("w2", 0, "a", None, now=0.0)
    with pytest.raises(Refused, match="too many"):
        waiters.add("w3", 0, "a", None, now=0.0)
    assert len(waiters) == 3


def test_a_change_is_told_to_those_whom_it_concerns() -> None:
    watches: Watches[Any] = Watches()
    watches.add("s1", 1, "a", "1.x", KEY)
    watches.add("s1", 2, "a", "2.x", KEY)
    watches.add("s2", 1, "a", "1.x", KEY)
    watches.add("s2", 2, "b", None, KEY)
    assert watches.deadline() is None
    watches.changed("a", "1.5.0")
    watches.changed("a", "1.6.0")
    assert watches.deadline() == 0.0
    (group,) = watches.due(0.0)
    assert set(group.watches) == {("s1", 1), ("s2", 1)}
    assert watches.due(0.0) == []


def test_at_most_one_notification_in_an_interval_and_the_last_change_is_told() -> None:
    watches: Watches[Any] = Watches()
    watches.add("s", 1, "a", None, KEY)
    watches.changed("a", "1.0.0")
    (group,) = watches.due(10.0)
    watches.told(group, 10.0, size=1000)
    watches.changed("a", "1.0.0")
    assert watches.deadline() == pytest.approx(10.05)
    assert watches.due(10.04) == []
    assert watches.due(10.05) == [group]
    # Long lists come less often.
    watches.told(group, 20.0, size=4 * interest.PACE_BYTES)
    watches.changed("a", "1.0.0")
    assert watches.deadline() == pytest.approx(20.2)
    # So do those that many are told.
    assert watches.due(30.0) == [group]
    for number in range(2, 3 * interest.PACE_WATCHES + 1):
        watches.add(number, 1, "a", None, KEY)
    watches.told(group, 30.0, size=1000)
    watches.changed("a", "1.0.0")
    assert watches.deadline() == pytest.approx(30.15)


def test_watches_end_with_their_session_or_when_told() -> None:
    watches: Watches[Any] = Watches()
    for number in range(3):
        watches.add("s1", number, "a", None, KEY)
    watches.add("s2", 0, "a", None, KEY)
    watches.changed("a", "1.0.0")
    watches.remove("s1", 1)
    watches.remove("s1", 1)
    watches.remove("nobody", 1)
    assert len(watches) == 3
    watches.drop("s1")
    watches.drop("s1")
    watches.drop("s2")
    assert len(watches) == 0
    assert watches.due(0.0) == []
    watches.changed("a", "1.0.0")
    assert watches.deadline() is None


def test_watches_have_limits(monkeypatch: Any) -> None:
    monkeypatch.setattr(interest, "MAX_WATCHES_PER_SESSION", 2)
    monkeypatch.setattr(interest, "MAX_WATCHES", 4)
    monkeypatch.setattr(interest, "MAX_RANGES", 2)
    watches: Watches[Any] = Watches()
    watches.add("s1", 1, "a", "1.x", KEY)
    with pytest.raises(Refused, match="there already") as caught:
        watches.add("s1", 1, "a", "1.x", KEY)
    assert caught.value.kind == "malformed"
    watches.add("s1", 2, "a", "2.x", KEY)
    with pytest.raises(Refused, match="at most 2") as caught:
        watches.add("s1", 3, "b", None, KEY)
    assert caught.value.kind == "limit"
    with pytest.raises(Refused, match="too many"):
        watches.add("s2", 1, "a", "3.x", KEY)
    watches.add("s2", 1, "a", "2.x", KEY)
    watches.add("s2", 2, "b", None, KEY)
    with pytest.raises(Refused, match="too many"):
        watches.add("s3", 1, "c", None, KEY)
    assert len(watches) == 4
    watches.drop("s1")
    watches.add("s3", 1, "a", "3.x", KEY)
