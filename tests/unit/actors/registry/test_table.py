from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import load

from hyperseaport.actors.registry import matching, roles, table
from hyperseaport.actors.registry.table import Refused, Table
from hyperseaport.transport.rpc import MAX_LINE, RpcPeer, RpcRequest

KEY_A, KEY_B, KEY_C = (letter * 64 for letter in "abc")
#: Keys of connections.
ONE, TWO, THREE = (bytes([number]) * 32 for number in (1, 2, 3))


def params(role: Any, key: Any = KEY_A) -> Any:
    return {"meta": roles.parse(role), "servicePublicKey": key}


def register(entries: Any, holder: Any, role: Any, key: Any = KEY_A, remote: Any = ONE) -> Any:
    return entries.register(holder, params(role, key), remote)


def versions(entries: Any, role: Any, asker: Any = THREE) -> Any:
    return [entry.version for entry in entries.query(roles.parse(role), asker)]


def keys(entries: Any, role: Any, asker: Any = THREE) -> Any:
    return [entry.service_key for entry in entries.query(roles.parse(role), asker)]


def test_shapes_are_those_that_the_node_programs_expect() -> None:
    entries = Table[Any]()
    entry, _ = register(entries, "s", "couchdb@3.2.2-beta.1")
    meta = roles.parse("couchdb@3.2.2-beta.1")
    info = {"id": KEY_A, "remotePublicKey": ONE.hex(), "meta": meta}
    assert entry.info == info
    assert entry.shape_a == {"meta": meta, "info": info}
    assert entry.shape_c == {
        "servicePublicKey": KEY_A,
        "role": "couchdb",
        "version": "3.2.2-beta.1",
        "prerelease": ["beta", 1],
    }
    assert list(entry.shape_a["meta"]) == ["role", "version", "_tags", "tags", "hash"]


def test_highest_version_first() -> None:
    entries = Table[Any]()
    for number, version in enumerate(["3.9.1", "3.10.0", "2.0.0", "3.11.0-rc.1", "4.0.0"]):
        register(entries, "s", f"a@{version}", f"{number:064x}")
    assert versions(entries, "a@3.x") == ["3.10.0", "3.9.1"]
    assert versions(entries, "a@*") == ["4.0.0", "3.10.0", "3.9.1", "2.0.0"]
    assert versions(entries, "a@>=3.11.0-0 <4") == ["3.11.0-rc.1"]
    assert versions(entries, "a") == ["4.0.0", "3.10.0", "3.9.1", "2.0.0", "3.11.0-rc.1"]
    assert versions(entries, "b") == []


@pytest.mark.parametrize("case", load("rpc")["v1_selection"][:6], ids=lambda case: case["case"])
def test_selections_of_the_1x_registry_where_it_was_right(case: Any) -> None:
    # "3.10.0:b" is version and key; what 1.x found is found, and often more (spec 6.6).
    text, result = case["case"], case["result"]
    registered = text.partition(":")[0].partition(",")[0].replace(" registered", "").split(" and ")
    entries = Table[Any]()
    for key, version in zip("ab", registered, strict=False):
        register(entries, key, f"r@{version}", key * 64)
    if "leaves" in text:
        entries.drop("b")
        assert versions(entries, "r@3.x") == ["3.9.1"]
        return
    wanted = text.rpartition(": ")[2].split(" / ") if ": " in text else ["2.x"]
    for range_, expected in zip(
        wanted, result if isinstance(result, list) else [result], strict=False
    ):
        found = entries.query(roles.parse(f"r@{range_}"), THREE)
        if expected is not None and matching.satisfies(expected.split(":")[0], range_):
            assert f"{found[0].version}:{found[0].service_key[0]}" == expected


def test_duplicates_of_one_connection_count_once() -> None:
    entries = Table[Any]()
    for role in ("a@1.0.0", "a@v1.0.0", "a@1.0.0+build"):
        register(entries, "s", role)
    assert len(entries) == 1
    assert versions(entries, "a@1.x") == ["1.0.0+build"]
    assert entries.drop("s")
    assert len(entries) == 0


def test_the_same_service_from_a_new_connection_replaces_the_old_entry() -> None:
    entries = Table[Any]()
    register(entries, "old", "a@1.0.0", remote=ONE)
    register(entries, "new", "a@1.0.0", remote=TWO)
    assert [entry.remote_key for entry in entries] == [TWO.hex()]
    assert entries.drop("old") == []
    assert len(entries) == 1
    assert len(entries.drop("new")) == 1


def test_a_dead_session_takes_its_entries_and_only_those() -> None:
    entries = Table[Any]()
    register(entries, "s1", "a@1.0.0", KEY_A)
    register(entries, "s1", "b@1.0.0", KEY_A)
    register(entries, "s1", "a@1.2.0", KEY_A)
    register(entries, "s2", "a@1.1.0", KEY_B)
    register(entries, "s2", "a@1.2.0", KEY_C)
    assert {entry.role for entry in entries.drop("s1")} == {"a", "b"}
    assert keys(entries, "a") == [KEY_C, KEY_B]
    assert keys(entries, "b") == []
    assert entries.drop("s1") == []
    entries.drop("s2")
    assert list(entries) == []


def test_the_newest_that_remains_is_found() -> None:
    entries = Table[Any]()
    register(entries, "s1", "a@3.9.1", KEY_A)
    register(entries, "s2", "a@3.10.0", KEY_B)
    assert keys(entries, "a@3.x")[0] == KEY_B
    entries.drop("s2")
    assert keys(entries, "a@3.x") == [KEY_A]


def test_equals_are_spread_over_askers_and_stable_for_each() -> None:
    entries = Table[Any]()
    all_keys = [f"{number:064x}" for number in range(4)]
    for number, key in enumerate(all_keys):
        register(entries, number, "a@1.0.0", key)
    rng = random.Random(1)
    askers = [rng.randbytes(32) for _ in range(400)]
    first = [keys(entries, "a@1.x", asker)[0] for asker in askers]
    assert first == [keys(entries, "a@1.x", asker)[0] for asker in askers]
    assert min(first.count(key) for key in all_keys) > 60


def test_unregister() -> None:
    entries = Table[Any]()
    register(entries, "s1", "a@1.0.0", KEY_A, ONE)
    assert entries.unregister("s1", params("a@2.0.0"), ONE) is None
    assert entries.unregister("s1", params("a@1.0.0", KEY_B), ONE) is None
    assert entries.unregister("s1", params("b@1.0.0"), ONE) is None
    with pytest.raises(Refused, match="another connection"):
        entries.unregister("s2", params("a@1.0.0"), TWO)
    assert len(entries) == 1
    gone = entries.unregister("s1", params("a@1.0.0"), ONE)
    assert gone is not None
    assert gone.service_key == KEY_A
    assert len(entries) == 0


def test_the_owner_of_the_key_unregisters_from_any_connection() -> None:
    entries = Table[Any]()
    register(entries, "s1", "a@1.0.0", TWO.hex(), ONE)
    assert entries.unregister("s2", params("a@1.0.0", TWO.hex()), TWO) is not None
    assert len(entries) == 0


def test_wait_finds_at_once_what_is_there() -> None:
    entries = Table[Any]()
    register(entries, "s1", "a@3.2.2")
    found = entries.wait("w", 1, roles.parse("a@^3.0.0"), TWO, now=0.0)
    assert found is not None
    assert found.version == "3.2.2"
    assert entries.waiters == 0


def test_a_registration_answers_all_waiters_that_it_matches_and_no_other() -> None:
    entries = Table[Any]()
    for ticket, role in enumerate(["a@^1.0.0", "a", "a@1.x", "a@2.x", "b@1.x"]):
        assert entries.wait("w", ticket, roles.parse(role), TWO, now=0.0) is None
    _, answered = register(entries, "s1", "a@1.4.0")
    assert [waiter.ticket for waiter in answered] == [0, 1, 2]
    assert entries.waiters == 2
    _, answered = register(entries, "s1", "a@1.4.1")
    assert answered == []


def test_waiters_expire_in_order() -> None:
    entries = Table[Any]()
    assert entries.deadline() is None
    entries.wait("w", 1, roles.parse("a"), TWO, now=10.0)
    entries.wait("w", 2, roles.parse("b"), TWO, now=12.0)
    assert entries.deadline() == 25.0
    assert entries.expire(24.9) == []
    assert [waiter.ticket for waiter in entries.expire(25.0)] == [1]
    assert entries.deadline() == 27.0
    assert [waiter.ticket for waiter in entries.expire(100.0)] == [2]
    assert entries.deadline() is None


def test_waiters_of_a_dead_session_are_forgotten() -> None:
    entries = Table[Any]()
    entries.wait("w1", 1, roles.parse("a"), TWO, now=0.0)
    entries.wait("w2", 1, roles.parse("a"), TWO, now=0.0)
    assert entries.drop("w1") == []
    assert entries.waiters == 1
    _, answered = register(entries, "s", "a@1.0.0")
    assert [waiter.holder for waiter in answered] == ["w2"]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (None, "needs params"),
        ([], "needs params"),
        ("text", "needs params"),
        ({}, "needs a meta object"),
        ({"meta": [1]}, "needs a meta object"),
        ({"meta": {}}, "needs a role"),
        ({"meta": {"role": 5, "version": "1.0.0"}}, "needs a role"),
        ({"meta": {"role": "", "version": "1.0.0"}}, "needs a role"),
        ({"meta": {"role": "x" * 1025, "version": "1.0.0"}}, "at most 1024"),
        ({"meta": {"role": "a", "version": "1.0.0", "more": "x" * 17000}}, "at most 16384"),
        ({"meta": {"role": "a"}, "servicePublicKey": KEY_A}, "^needs to be valid semver$"),
        ({"meta": {"role": "a", "version": 1}, "servicePublicKey": KEY_A}, "valid semver"),
        ({"meta": {"role": "a", "version": "1.x"}, "servicePublicKey": KEY_A}, "valid semver"),
        ({"meta": {"role": "a", "version": "1.0.0"}}, "^info needs an id property$"),
        ({"meta": {"role": "a", "version": "1.0.0"}, "servicePublicKey": "any text"}, "64 hex"),
        ({"meta": {"role": "a", "version": "1.0.0"}, "servicePublicKey": "g" * 64}, "hexadecimal"),
        ({"meta": {"role": "a", "version": "1.0.0"}, "servicePublicKey": [1]}, "64 hex"),
    ],
)
def test_refused_registrations(bad: Any, says: Any) -> None:
    entries = Table[Any]()
    with pytest.raises(Refused, match=says):
        entries.register("s", bad, ONE)
    with pytest.raises(Refused, match=says):
        entries.unregister("s", bad, ONE)
    assert len(entries) == 0


@pytest.mark.parametrize("bad", [None, [], "a", {}, {"role": 1}, {"role": "a", "version": 3}])
def test_refused_questions(bad: Any) -> None:
    with pytest.raises(Refused):
        Table[Any]().query(bad, ONE)
    with pytest.raises(Refused):
        Table[Any]().wait("s", 1, bad, ONE, now=0.0)


def test_nobody_waits_for_what_no_version_can_be() -> None:
    with pytest.raises(Refused, match="not a version range"):
        Table[Any]().wait("s", 1, roles.parse("a@latest"), ONE, now=0.0)


@pytest.mark.parametrize(
    "role", ["__proto__", "constructor", "a|b", "\ud800", "\x00", "..", "a\nb"]
)
def test_any_name_is_a_name(role: Any) -> None:
    entries = Table[Any]()
    meta = {"role": role, "version": "1.0.0"}
    entries.register("s", {"meta": meta, "servicePublicKey": KEY_A}, ONE)
    found = entries.query({"role": role, "version": "1.x"}, TWO)
    assert [entry.role for entry in found] == [role]
    assert entries.query({"role": "toString"}, TWO) == []


def test_a_session_has_a_limit_of_entries(monkeypatch: Any) -> None:
    monkeypatch.setattr(table, "MAX_ENTRIES_PER_SESSION", 3)
    entries = Table[Any]()
    for number in range(3):
        register(entries, "s", f"a{number}@1.0.0")
    with pytest.raises(Refused, match="at most 3"):
        register(entries, "s", "a3@1.0.0")
    register(entries, "s", "a0@1.0.0")
    register(entries, "other", "a3@1.0.0")
    assert len(entries) == 4


def test_the_table_has_a_limit_of_entries(monkeypatch: Any) -> None:
    monkeypatch.setattr(table, "MAX_ENTRIES", 2)
    entries = Table[Any]()
    register(entries, "s1", "a@1.0.0")
    register(entries, "s2", "b@1.0.0")
    with pytest.raises(Refused, match="full"):
        register(entries, "s3", "c@1.0.0")
    register(entries, "s3", "b@1.0.0")
    entries.drop("s1")
    register(entries, "s3", "c@1.0.0")


def test_a_role_has_a_limit_of_versions(monkeypatch: Any) -> None:
    monkeypatch.setattr(table, "MAX_VERSIONS", 2)
    entries = Table[Any]()
    register(entries, "s1", "a@1.0.0")
    register(entries, "s1", "a@2.0.0")
    with pytest.raises(Refused, match="at most 2 versions"):
        register(entries, "s1", "a@3.0.0")
    register(entries, "s1", "a@2.0.0", KEY_B)


def test_waiters_have_limits(monkeypatch: Any) -> None:
    monkeypatch.setattr(table, "MAX_WAITERS_PER_SESSION", 2)
    monkeypatch.setattr(table, "MAX_WAITERS", 3)
    entries = Table[Any]()
    for ticket in range(2):
        entries.wait("w", ticket, roles.parse("a"), ONE, now=0.0)
    with pytest.raises(Refused, match="too many"):
        entries.wait("w", 2, roles.parse("a"), ONE, now=0.0)
    entries.wait("w2", 0, roles.parse("a"), ONE, now=0.0)
    with pytest.raises(Refused, match="too many"):
        entries.wait("w3", 0, roles.parse("a"), ONE, now=0.0)
    assert entries.waiters == 3


@pytest.mark.parametrize("details", [False, True])
def test_the_longest_answer_fits_a_line(details: Any) -> None:
    entries = Table[Any]()
    for number in range(300):
        meta = {"role": "ü" * 1024, "version": "1.0.0", "more": "\u2028" * 1500}
        service = {"meta": meta, "servicePublicKey": f"{number:064x}"}
        entries.register(number, service, ONE)
    question = {"role": "ü" * 1024, "details": details}
    found = entries.query(question, TWO)
    assert len(found) == table.MAX_RESULTS
    items = table.answer(question, found)
    line = RpcPeer().reply(RpcRequest("query", question, 1), items)
    assert 10 < len(items) < 256
    assert len(line) < MAX_LINE


ROLE = st.sampled_from(["a@1.0.0", "a@1.1.0", "a@2.0.0-rc.1", "b@1.0.0", "b@0.1.0"])
HOLDER = st.integers(0, 3)
OPERATION = st.one_of(
    st.tuples(st.just("register"), HOLDER, ROLE, st.sampled_from([KEY_A, KEY_B])),
    st.tuples(st.just("unregister"), HOLDER, ROLE, st.sampled_from([KEY_A, KEY_B])),
    st.tuples(st.just("wait"), HOLDER, st.sampled_from(["a", "a@1.x", "b@^1.0.0", "c"])),
    st.tuples(st.just("drop"), HOLDER),
    st.tuples(st.just("pass"), st.floats(0, 20)),
)


@given(st.lists(OPERATION, max_size=40))
@settings(deadline=None, derandomize=True)
def test_agrees_with_a_model(operations: Any) -> None:
    """A flat list of entries and one of waiters, searched from end to end."""
    entries = Table[Any]()
    model: dict[tuple[str, str], int] = {}
    waiting: dict[tuple[int, int], tuple[dict[str, Any], float]] = {}
    now = 0.0
    for ticket, (operation, *rest) in enumerate(operations):
        if operation == "pass":
            now += rest[0]
            expired = {(waiter.holder, waiter.ticket) for waiter in entries.expire(now)}
            assert expired == {place for place, (_, end) in waiting.items() if end <= now}
            waiting = {place: each for place, each in waiting.items() if place not in expired}
        elif operation == "drop":
            gone = entries.drop(rest[0])
            assert len(gone) == sum(holder == rest[0] for holder in model.values())
            model = {place: holder for place, holder in model.items() if holder != rest[0]}
            waiting = {place: each for place, each in waiting.items() if place[0] != rest[0]}
        elif operation == "wait":
            holder, role = rest
            wanted = roles.parse(role)
            if entries.wait(holder, ticket, wanted, TWO, now) is None:
                waiting[holder, ticket] = wanted, now + table.WAIT
        elif operation == "register":
            holder, role, key = rest
            _, answered = register(entries, holder, role, key)
            model[role, key] = holder
            meta = roles.parse(role)
            expected = {
                place
                for place, (wanted, _) in waiting.items()
                if (
                    wanted["role"] == meta["role"]
                    and matching.satisfies(meta["version"], wanted.get("version", "*"))
                )
                or (wanted["role"] == meta["role"] and "version" not in wanted)
            }
            assert {(waiter.holder, waiter.ticket) for waiter in answered} == expected
            waiting = {place: each for place, each in waiting.items() if place not in expected}
        else:
            holder, role, key = rest
            owner = model.get((role, key))
            if owner is not None and owner != holder:
                with pytest.raises(Refused):
                    entries.unregister(holder, params(role, key), ONE)
            else:
                entry = entries.unregister(holder, params(role, key), ONE)
                assert (entry is None) == (owner is None)
                model.pop((role, key), None)
        assert {(f"{e.role}@{e.version}", e.service_key): e.holder for e in entries} == model
        assert entries.waiters == len(waiting)
        assert len(entries) == len(model)
