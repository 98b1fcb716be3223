from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.registries import BEGIN, item, record, verified
from support.registries import signed as signed_now
from support.registry import virtual

from hyperseaport.actors.messages import ServiceRecord
from hyperseaport.actors.registry import lease, records, roles
from hyperseaport.actors.registry.lease import Lease
from hyperseaport.actors.registry.records import Reader, same
from hyperseaport.transport.keys import KeyPair

KEY_A, KEY_B = b"\xaa" * 32, b"\xbb" * 32
ONE, TWO = KeyPair.from_seed(b"\x0a" * 32), KeyPair.from_seed(b"\x0b" * 32)
WANTED = roles.parse("a@1.x")


class Clock:
    now = BEGIN

    def __call__(self) -> float:
        return self.now


def reader(wanted: Any = WANTED) -> Reader:
    return Reader(wanted, Clock())


def signed(key_pair: KeyPair, role: Any, sequence: int = 1, **more: Any) -> Lease:
    given: dict[str, Any] = {"instance": "ab" * 16, "issued": int(BEGIN * 1000), "ttl": 30.0} | more
    return lease.sign(key_pair, roles.parse(role), sequence=sequence, **given)


# What nobody has proven


@pytest.mark.parametrize(
    "answer",
    [
        None,
        7,
        "text",
        [None, 1, [], {}],
        {"info": 3},
        {"id": 5},
        {"id": KEY_A.hex(), "meta": {"role": "a", "version": "9.0.0"}},
        {"id": KEY_A.hex(), "meta": {"role": "b", "version": "1.0.0"}},
        {"id": "short", "meta": {"role": "a", "version": "1.0.0"}},
        {"id": KEY_A.hex(), "meta": {"role": "a", "version": "one"}},
        {"id": KEY_A.hex(), "meta": {"role": 1, "version": "1.0.0"}},
        {"id": KEY_A.hex(), "meta": []},
        {"id": KEY_A.hex(), "remotePublicKey": "x", "meta": {"role": "a", "version": "1.0.0"}},
    ],
)
def test_answers_that_are_none(answer: Any) -> None:
    assert reader().read(answer) == ()


def test_records_are_sorted_and_single() -> None:
    shapes = [
        {"servicePublicKey": KEY_A.hex(), "role": "a", "version": "1.0.0", "prerelease": []},
        {"servicePublicKey": KEY_B.hex(), "role": "a", "version": "1.10.0"},
        {"servicePublicKey": KEY_A.hex(), "role": "a", "version": "1.0.0"},
        {"role": "a", "version": "1.0.0"},
    ]
    found = reader(roles.parse("a")).read(shapes)
    assert found == (record("a@1.10.0", KEY_B), record("a@1.0.0", KEY_A))


def test_what_an_answer_may_hold_is_limited(monkeypatch: Any) -> None:
    monkeypatch.setattr(records, "MAX_RECORDS", 1)
    answer = [item(signed(ONE, "a@1.0.0")), item(signed(TWO, "a@1.0.0"))]
    assert [each.public_key for each in reader().read(answer)] == [ONE.public_key]


# What the service itself has signed


def test_a_lease_is_told_with_all_that_is_in_it() -> None:
    made = signed(ONE, {"role": "a", "version": "1.2.3", "metadata": {"zone": "z"}}, 77)
    subject = reader()
    (found,) = subject.read([item(made)])
    assert found == verified(made)
    assert found == ServiceRecord(ONE.public_key, "a", "1.2.3", {}, verified=True)
    assert found.meta["metadata"] == {"zone": "z"}
    assert (found.instance, found.sequence, found.expires) == ("ab" * 16, 77, BEGIN + 30)
    assert found.remote_public_key == b"\xcc" * 32
    assert not subject.refused


def changed(**members: Any) -> Any:
    """A good item with other members; None takes one out."""
    whole = item(signed(ONE, "a@1.0.0")) | members
    return {name: value for name, value in whole.items() if value is not None}


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (changed(signature="00" * 64), "forged"),
        (changed(signature=signed(TWO, "a@1.0.0").signature.hex()), "forged"),
        (changed(statement=signed(ONE, "a@1.0.1").text), "forged"),
        # Signed well, and not by the service that it is told of.
        (changed(servicePublicKey=TWO.public_key.hex()), "forged"),
        (changed(servicePublicKey="aa"), "forged"),
        (changed(signature="00"), "malformed"),
        (changed(signature=None), "malformed"),
        (changed(signature=5), "malformed"),
        (changed(statement=None), "malformed"),
        (changed(statement={}), "malformed"),
        (changed(statement="{}"), "malformed"),
        (changed(statement="[" * 70_000), "oversized"),
        (changed(servicePublicKey=None), "malformed"),
        # It only says that it was verified.
        (changed(statement=None, signature=None), "malformed"),
        (changed(statement="", signature=""), "malformed"),
        (item(signed(ONE, "a@1.0.0", ttl=0)), "expired"),
        (item(signed(ONE, "a@1.0.0", issued=int(BEGIN * 1000) - 631_000)), "expired"),
    ],
)
def test_what_does_not_hold_is_left_out_and_never_passes_as_unproven(
    answer: Any, kind: str
) -> None:
    subject = reader()
    other = item(signed(TWO, "a@1.1.0"))
    for times in (1, 2):
        assert [each.version for each in subject.read([answer, other])] == ["1.1.0"]
        assert subject.refused == {kind: times}


def test_clocks_may_differ() -> None:
    for issued in (BEGIN - 629, BEGIN + 599):
        assert reader().read(item(signed(ONE, "a@1.0.0", issued=int(issued * 1000))))


def test_role_and_version_are_those_that_were_signed() -> None:
    cheat = item(signed(ONE, "b@1.0.0")) | {"role": "a", "version": "1.0.0"}
    assert reader().read([cheat | {"meta": roles.parse("a@1.0.0")}]) == ()
    old = item(signed(ONE, "a@1.0.0")) | {"version": "1.9.0", "meta": roles.parse("a@1.9.0")}
    assert [each.version for each in reader().read([old])] == ["1.0.0"]


def test_an_older_statement_does_not_replace_a_newer_one_until_that_ends() -> None:
    clock = Clock()
    subject = Reader(WANTED, clock)
    older = item(signed(ONE, "a@1.0.0", 5))
    newer = item(signed(ONE, "a@1.1.0", 6))
    assert [each.sequence for each in subject.read([newer])] == [6]
    assert [each.sequence for each in subject.read([older])] == [6]
    assert [each.sequence for each in subject.read([older, newer])] == [6]
    # Not a word about what is listed no longer.
    assert subject.read([]) == ()
    assert [each.sequence for each in subject.read([older])] == [5]
    assert [each.sequence for each in subject.read([newer])] == [6]
    clock.now = BEGIN + 31
    assert [each.sequence for each in subject.read([older])] == [5]


def test_what_ends_is_known_to_end_also_when_it_comes_again() -> None:
    clock = Clock()
    subject = Reader(WANTED, clock)
    answer = [item(signed(ONE, "a@1.0.0"))]
    assert subject.read(answer)
    clock.now = BEGIN + 631
    assert subject.read(answer) == ()
    assert subject.refused == {"expired": 1}


def test_a_list_that_comes_again_costs_no_verification(monkeypatch: Any) -> None:
    calls = []
    subject = reader()
    verify = subject.verifier.verify

    def counted(_self: object, *given: Any) -> Any:
        calls.append(given)
        return verify(*given)

    monkeypatch.setattr(type(subject.verifier), "verify", counted)
    answer = [item(signed(KeyPair.from_seed(bytes([n]) * 32), "a@1.0.0")) for n in range(20)]
    first = subject.read(answer)
    again = subject.read(list(reversed(answer)))
    assert len(first) == len(again) == len(calls) == 20
    assert subject.read(answer) == first
    assert len(calls) == 20


def test_renewals_say_the_same_and_changes_do_not() -> None:
    def read(made: Lease) -> Any:
        return reader().read([item(made)])

    first = read(signed(ONE, "a@1.0.0", 1))
    assert same(first, read(signed(ONE, "a@1.0.0", 2, issued=int(BEGIN * 1000) + 10_000)))
    assert not same(first, ())
    assert not same(first, read(signed(TWO, "a@1.0.0", 1)))
    assert not same(first, read(signed(ONE, {"role": "a", "version": "1.0.0", "metadata": 1}, 1)))
    assert not same(first, read(signed(ONE, "a@1.0.0", 1, instance="cd" * 16)))
    assert not same(first, (record("a@1.0.0", ONE.public_key),))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)
ITEM = st.fixed_dictionaries(
    {},
    optional={
        "servicePublicKey": JSON | st.just(ONE.public_key.hex()),
        "id": JSON,
        "role": JSON | st.just("a"),
        "version": JSON | st.just("1.0.0"),
        "meta": JSON | st.just(roles.parse("a@1.0.0")),
        "info": JSON,
        "remotePublicKey": JSON,
        "verified": JSON,
        "statement": JSON | st.just(signed(ONE, "a@1.0.0").text),
        "signature": JSON | st.just(signed(TWO, "a@1.0.0").signature.hex()),
    },
)


@given(st.lists(JSON | ITEM, max_size=2) | ITEM)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_survives_whatever_is_answered(answer: Any) -> None:
    subject = reader()
    for found in (subject.read(answer), subject.read(answer)):
        assert not any(each.verified for each in found)


@virtual
async def test_the_helper_of_other_tests_signs_at_the_same_time() -> None:
    assert abs(signed_now(ONE, "a@1.0.0").issued / 1000 - BEGIN) < 1
