from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import EPOCH, MemoryStore, Table
from vectors import load

from hyperseaport.actors.registry import matching, roles, rows
from hyperseaport.actors.registry.lease import Refused
from hyperseaport.transport.keys import KeyPair

KEY_A, KEY_B, KEY_C = (bytes([number]) * 32 for number in (0xA, 0xB, 0xC))
#: Keys of connections.
ONE, TWO, THREE = (bytes([number]) * 32 for number in (1, 2, 3))
#: Services that sign.
KEYS = KeyPair.from_seed(b"\x01" * 32)
OTHER = KeyPair.from_seed(b"\x02" * 32)


def versions(table: Table, role: Any) -> Any:
    return [entry.version for entry in table.query(role)]


def keys(table: Table, role: Any) -> Any:
    return [entry.service_key for entry in table.query(role)]


# Shapes and matching


def test_shapes_are_those_that_the_node_programs_expect() -> None:
    entry = Table().register("s", "couchdb@3.2.2-beta.1", KEY_A, ONE)
    meta = roles.parse("couchdb@3.2.2-beta.1")
    info = {"id": KEY_A.hex(), "remotePublicKey": ONE.hex(), "meta": meta}
    assert entry.info == info
    assert entry.shape_a == {"meta": meta, "info": info}
    assert entry.shape_c == {
        "servicePublicKey": KEY_A.hex(),
        "role": "couchdb",
        "version": "3.2.2-beta.1",
        "prerelease": ["beta", 1],
    }
    assert list(entry.shape_a["meta"]) == ["role", "version", "_tags", "tags", "hash"]
    assert entry.details == entry.shape_c | {"remotePublicKey": ONE.hex(), "meta": meta}


def test_a_lease_is_told_with_its_proof() -> None:
    table = Table()
    entry = table.lease("s", "a@1.0.0", KEYS, 5, remote=TWO).entry
    assert entry.details == entry.shape_c | {
        "remotePublicKey": TWO.hex(),
        "meta": roles.parse("a@1.0.0"),
        "verified": True,
        "statement": entry.lease.text,
        "signature": entry.lease.signature.hex(),
    }
    assert entry.shape_a["info"]["id"] == KEYS.public_key.hex()


@pytest.mark.parametrize("role", ["a@1.0.0", "\u2603" * 1024 + "@1.0.0-" + "x" * 100])
def test_no_item_is_larger_than_estimated(role: Any) -> None:
    table = Table()
    for entry in (table.register("s", role, KEY_A, ONE), table.lease("s", role, KEYS, 5).entry):
        assert len(json.dumps(entry.details, ensure_ascii=False).encode()) <= entry.size


def test_highest_version_first() -> None:
    table = Table()
    for number, version in enumerate(["3.9.1", "3.10.0", "2.0.0", "3.11.0-rc.1", "4.0.0"]):
        table.register("s", f"a@{version}", bytes([number]) * 32, ONE)
    assert versions(table, "a@3.x") == ["3.10.0", "3.9.1"]
    assert versions(table, "a@*") == ["4.0.0", "3.10.0", "3.9.1", "2.0.0"]
    assert versions(table, "a@>=3.11.0-0 <4") == ["3.11.0-rc.1"]
    assert versions(table, "a") == ["4.0.0", "3.10.0", "3.9.1", "2.0.0", "3.11.0-rc.1"]
    assert versions(table, "b") == []


@pytest.mark.parametrize("case", load("rpc")["v1_selection"][:6], ids=lambda case: case["case"])
def test_selections_of_the_1x_registry_where_it_was_right(case: Any) -> None:
    # "3.10.0:b" is version and key; what 1.x found is found, and often more (spec 6.6).
    text, result = case["case"], case["result"]
    registered = text.partition(":")[0].partition(",")[0].replace(" registered", "").split(" and ")
    table = Table()
    for key, version in zip("ab", registered, strict=False):
        table.register(key, f"r@{version}", bytes.fromhex(key * 64), key.encode() * 32)
    if "leaves" in text:
        table.end("b")
        assert versions(table, "r@3.x") == ["3.9.1"]
        return
    wanted = text.rpartition(": ")[2].split(" / ") if ": " in text else ["2.x"]
    for range_, expected in zip(
        wanted, result if isinstance(result, list) else [result], strict=False
    ):
        found = table.query(f"r@{range_}")
        if expected is not None and matching.satisfies(expected.split(":")[0], range_):
            assert f"{found[0].version}:{found[0].service_key.hex()[0]}" == expected


PARTS = st.sampled_from(["", "-0", "-1", "-10", "-a", "-a.1", "-a.b", "-a.1.0", "--", "-1.a", "-A"])


@given(st.lists(st.tuples(st.tuples(*[st.integers(0, 11)] * 3), PARTS), max_size=12))
@settings(deadline=None, derandomize=True)
def test_versions_are_in_their_order(given: Any) -> None:
    texts = [".".join(map(str, numbers)) + part for numbers, part in given]
    expected = [matching.precedence(text) for text in sorted(texts, key=matching.precedence)]
    assert [matching.precedence(text) for text in sorted(texts, key=rows.rank)] == expected


def test_equals_are_spread_over_askers_and_stable_for_each() -> None:
    table = Table()
    all_keys = [bytes([number]) * 32 for number in range(4)]
    for number, key in enumerate(all_keys):
        table.register(number, "a@1.0.0", key, ONE)
    rng = random.Random(1)
    askers = [rng.randbytes(32) for _ in range(400)]
    first = [table.query("a@1.x", asker)[0].service_key for asker in askers]
    assert first == [table.query("a@1.x", asker)[0].service_key for asker in askers]
    assert min(first.count(key) for key in all_keys) > 60


def test_of_many_equals_each_asker_gets_some_and_all_are_used() -> None:
    table = Table()
    rng = random.Random(1)
    all_keys = [rng.randbytes(32) for _ in range(1000)]
    for number, key in enumerate(all_keys):
        table.register(number // 500, "a@1.0.0", key, ONE)
    seen: set[bytes] = set()
    for _ in range(50):
        found = [entry.service_key for entry in table.query("a", rng.randbytes(32))]
        assert len(found) == len(set(found)) == rows.MAX_RESULTS
        seen.update(found)
    assert seen == set(all_keys)
    # Comings and goings are in the order that is kept meanwhile.
    table.register(0, "a@1.0.0", KEY_A, ONE)
    for key in all_keys[:745]:
        table.unregister("a@1.0.0", key, ONE)
    assert sorted(keys(table, "a")) == sorted([KEY_A, *all_keys[745:]])


@pytest.mark.parametrize(
    "role", ["__proto__", "constructor", "a|b", "\ud800", "\x00", "..", "a\nb"]
)
def test_any_name_is_a_name(role: Any) -> None:
    table = Table()
    table.register("s", {"role": role, "version": "1.0.0"}, KEY_A, ONE)
    assert [entry.role for entry in table.query({"role": role, "version": "1.x"})] == [role]
    assert table.query("toString") == []


# Plain registrations: whose they are, and how long they live


def test_duplicates_of_one_connection_count_once() -> None:
    table = Table()
    for role in ("a@1.0.0", "a@v1.0.0", "a@1.0.0+build"):
        table.register("s", role, KEY_A, ONE)
    assert len(table.rows) == len(table.store.kept) == 1
    assert versions(table, "a@1.x") == ["1.0.0+build"]
    table.changes.clear()
    table.register("s", "a@1.0.0+build", KEY_A, ONE)
    assert table.changes == []
    assert len(table.end("s")) == 1
    assert len(table.rows) == len(table.store.kept) == 0


def test_a_service_that_two_connections_registered_is_told_once_the_latest_first() -> None:
    table = Table()
    table.register("old", "a@1.0.0", KEY_A, ONE)
    table.register("new", "a@1.0.0", KEY_A, TWO)
    assert [entry.remote_key for entry in table.query("a")] == [TWO]
    table.changes.clear()
    table.register("old", "a@1.0.0", KEY_A, ONE)
    assert table.changes == [("a", "1.0.0")]
    assert [entry.remote_key for entry in table.query("a")] == [ONE]
    table.end("old")
    assert [entry.remote_key for entry in table.query("a")] == [TWO]
    table.end("new")
    assert table.query("a") == []


def test_the_own_connection_of_a_service_speaks_for_it() -> None:
    table = Table()
    table.register("own", "a@1.0.0", KEY_A, KEY_A)
    table.register("stranger", "a@1.0.0", KEY_A, TWO)
    assert [entry.remote_key for entry in table.query("a")] == [KEY_A]


def test_a_session_that_ends_in_order_takes_its_entries_and_only_those() -> None:
    table = Table()
    table.register("s1", "a@1.0.0", KEY_A, ONE)
    table.register("s1", "b@1.0.0", KEY_A, ONE)
    table.register("s1", "a@1.2.0", KEY_A, ONE)
    table.register("s2", "a@1.1.0", KEY_B, TWO)
    table.register("s2", "a@1.2.0", KEY_C, TWO)
    assert {entry.role for entry in table.end("s1")} == {"a", "b"}
    assert keys(table, "a") == [KEY_C, KEY_B]
    assert keys(table, "b") == []
    assert table.end("s1") == []
    table.end("s2")
    assert list(table.rows) == []


def test_after_a_break_there_is_a_while_to_come_back_in() -> None:
    table = Table()
    table.register("s1", "a@1.0.0", KEY_A, ONE)
    table.register("s1", "b@1.0.0", KEY_B, ONE)
    table.at(100.0)
    assert table.end("s1", in_order=False) == []
    assert table.at(104.9) == []
    table.register("s2", "a@1.0.0", KEY_A, ONE)
    assert [entry.service_key for entry in table.at(105.0)] == [KEY_B]
    assert table.at(10_000.0) == []
    assert keys(table, "a") == [KEY_A]


def test_an_entry_lives_as_long_as_one_session_of_its_key_that_made_it() -> None:
    table = Table()
    table.register("s1", "a@1.0.0", KEY_A, ONE)
    table.register("s2", "a@1.0.0", KEY_A, ONE)
    assert table.end("s1") == []
    assert table.at(100.0) == []
    assert len(table.end("s2")) == 1


def test_unregister() -> None:
    table = Table()
    table.register("s1", "a@1.0.0", KEY_A, ONE)
    assert table.unregister("a@2.0.0", KEY_A, ONE) == []
    assert table.unregister("a@1.0.0", KEY_B, ONE) == []
    assert table.unregister("b@1.0.0", KEY_A, ONE) == []
    with pytest.raises(Refused, match="another connection") as caught:
        table.unregister("a@1.0.0", KEY_A, TWO)
    assert caught.value.kind == "policy"
    assert len(table.rows) == 1
    assert [entry.service_key for entry in table.unregister("a@1.0.0", KEY_A, ONE)] == [KEY_A]
    assert len(table.rows) == 0
    assert table.end("s1") == []


def test_the_owner_of_the_key_takes_out_everything_of_that_place() -> None:
    table = Table()
    for session, remote in (("s1", ONE), ("s2", TWO)):
        table.register(session, "a@1.0.0", KEY_A, remote)
    table.register("s1", "a@1.1.0", KEY_A, ONE)
    assert len(table.unregister("a@1.0.0", KEY_A, KEY_A)) == 2
    assert versions(table, "a") == ["1.1.0"]


# Leases


def test_a_lease_lives_for_its_ttl_and_renewals_put_that_off() -> None:
    table = Table()
    outcome = table.lease("s", "a@1.0.0", KEYS, 5)
    assert (outcome.changed, outcome.gone) == (True, [])
    assert table.at(20.0) == []
    table.changes.clear()
    outcome = table.lease("s", "a@1.0.0", KEYS, 6)
    assert (outcome.changed, outcome.gone) == (False, [])
    assert table.changes == []
    assert table.at(49.9) == []
    gone = table.at(50.0)
    assert [(entry.service_key, entry.lease.sequence) for entry in gone] == [(KEYS.public_key, 6)]
    assert table.changes == [("a", "1.0.0")]
    assert list(table.rows) == []


def test_a_shorter_ttl_counts_too() -> None:
    table = Table()
    table.lease("s", "a@1.0.0", KEYS, 5, ttl=3600)
    table.lease("s", "a@1.0.0", KEYS, 6, ttl=2)
    assert table.at(1.9) == []
    assert len(table.at(2.0)) == 1


@pytest.mark.parametrize(
    ("in_order", "ttl", "lives"), [(True, 30, 0), (False, 30, 5), (False, 3, 3)]
)
def test_a_lease_ends_with_the_session_that_brought_it(in_order: Any, ttl: Any, lives: Any) -> None:
    table = Table()
    table.lease("s", "a@1.0.0", KEYS, 5, ttl=ttl)
    gone = table.end("s", in_order)
    assert (len(gone), len(table.at(lives - 0.01))) == (lives == 0, 0)
    assert len(gone) + len(table.at(lives)) == 1


def test_a_session_that_no_longer_carries_the_lease_takes_nothing_with_it() -> None:
    table = Table()
    table.lease("old", "a@1.0.0", KEYS, 5)
    table.end("old", in_order=False)
    table.at(4.0)
    table.lease("new", "a@1.0.0", KEYS, 6)
    table.lease("newer", "a@1.0.0", KEYS, 7, remote=TWO)
    assert table.end("new") == []
    assert table.at(33.9) == []
    assert [entry.remote_key for entry in table.query("a")] == [TWO]
    assert len(table.at(34.0)) == 1


def test_a_stranger_who_has_brought_the_lease_takes_nothing_with_him() -> None:
    table = Table()
    table.lease("own", "a@1.0.0", KEYS, 5)
    table.lease("stranger", "a@1.0.0", KEYS, 6)
    assert table.end("stranger") == []
    assert table.at(29.9) == []
    assert len(table.end("own")) == 1


def test_a_lease_with_other_content_replaces() -> None:
    table = Table()
    table.lease("s", "a@1.0.0", KEYS, 5)
    table.changes.clear()
    assert table.lease("s", "a@1.0.0", KEYS, 6, instance="11" * 16).changed
    assert table.changes == [("a", "1.0.0")]
    outcome = table.lease("s", "b@2.0.0", KEYS, 7)
    assert outcome.changed
    assert [entry.place for entry in outcome.gone] == [("a", "1.0.0")]
    assert versions(table, "a") == []
    assert versions(table, "b") == ["2.0.0"]
    assert len(table.rows) == len(table.store.kept) == 1


@pytest.mark.parametrize("sequence", [5, 4, 0])
@pytest.mark.parametrize("how", ["living", "ended", "withdrawn", "restarted"])
def test_replays(how: Any, sequence: Any) -> None:
    table = Table()
    table.lease("s", "a@1.0.0", KEYS, 5 if how != "withdrawn" else 4)
    if how == "ended":
        table.at(100.0)
    elif how == "withdrawn":
        assert len(table.lease("s", "a@1.0.0", KEYS, 5, ttl=0).gone) == 1
    elif how == "restarted":
        table.end("s")
        table = Table(table.store)
        table.restore()
    before = table.query("a")
    with pytest.raises(Refused, match=r"stale sequence, the last was 5$") as caught:
        table.lease("s2", "a@1.0.0", KEYS, sequence)
    assert caught.value.kind == "replayed"
    assert table.query("a") == before
    assert table.lease("s2", "a@1.0.0", KEYS, 6).entry is not None


def test_the_last_sequence_is_remembered_until_no_statement_could_be_accepted() -> None:
    table = Table()
    table.lease("s", "a@1.0.0", KEYS, 5)
    table.end("s")
    table.at(rows.BURIED_FOR - 0.1)
    with pytest.raises(Refused, match="stale"):
        table.lease("s", "a@1.0.0", KEYS, 5)
    table.at(rows.BURIED_FOR)
    table.lease("s", "a@1.0.0", KEYS, 5)
    assert table.rows.buried == 0


def test_the_memory_of_sequences_is_bounded(monkeypatch: Any) -> None:
    monkeypatch.setattr(rows, "MAX_BURIED", 1)
    table = Table()
    table.lease("s", "a@1.0.0", KEYS, 5, ttl=0)
    table.now = 1.0
    table.lease("s", "a@1.0.0", OTHER, 5, ttl=0)
    assert list(table.store.graves) == [OTHER.public_key]
    for each in (table, Table(table.store)):
        if each is not table:
            each.restore()
        assert each.rows.buried == 1
        with pytest.raises(Refused, match="stale"):
            each.lease("s", "a@1.0.0", OTHER, 5)


def test_a_lease_replaces_plain_registrations_of_its_key() -> None:
    table = Table()
    table.register("s1", "a@1.0.0", KEYS.public_key, ONE)
    table.register("s2", "a@1.0.0", KEYS.public_key, KEYS.public_key)
    table.register("s2", "b@1.0.0", KEYS.public_key, TWO)
    outcome = table.lease("s3", "a@1.0.0", KEYS, 5)
    assert [entry.place for entry in outcome.gone] == [("b", "1.0.0")]
    assert [entry.lease for entry in table.rows] == [outcome.entry.lease]
    assert [row.statement for row in table.store.kept.values()] == [outcome.entry.lease.text]
    assert table.end("s1") == table.end("s2") == []


def test_only_its_own_key_registers_plainly_beside_a_lease() -> None:
    table = Table()
    leased = table.lease("s", "a@1.0.0", KEYS, 5).entry
    for role in ("a@1.0.0", "b@1.0.0"):
        with pytest.raises(Refused, match="only its own key") as caught:
            table.register("s", role, KEYS.public_key, ONE)
        assert caught.value.kind == "leased"
    assert table.register("s2", "a@1.0.0", KEYS.public_key, KEYS.public_key) is leased
    assert table.end("s2") == []
    assert table.register("s2", "b@1.0.0", KEYS.public_key, KEYS.public_key).lease is None
    assert versions(table, "a") == versions(table, "b") == ["1.0.0"]
    # Once the lease is over, it is a key like any other.
    table.at(30.0)
    assert table.register("s", "a@1.0.0", KEYS.public_key, ONE).lease is None


def test_a_withdrawal_takes_everything_of_its_key() -> None:
    table = Table()
    table.lease("s", "a@1.0.0", KEYS, 5)
    table.register("s2", "b@1.0.0", KEYS.public_key, KEYS.public_key)
    table.register("s2", "a@1.0.0", KEY_A, TWO)
    outcome = table.lease("s3", "a@1.0.0", KEYS, 6, ttl=0)
    assert outcome.entry is None
    assert len(outcome.gone) == 2
    assert keys(table, "a") == [KEY_A]


def test_a_strangers_connection_does_not_unregister_a_lease() -> None:
    table = Table()
    table.lease("s", "a@1.0.0", KEYS, 5, remote=ONE)
    with pytest.raises(Refused, match="another connection"):
        table.unregister("a@1.0.0", KEYS.public_key, ONE)
    assert len(table.unregister("a@1.0.0", KEYS.public_key, KEYS.public_key)) == 1
    with pytest.raises(Refused, match="stale"):
        table.lease("s", "a@1.0.0", KEYS, 5)


# The store


def test_what_was_kept_comes_back_and_its_owners_have_a_while() -> None:
    before = Table()
    before.register("s", "a@1.0.0", KEY_A, ONE)
    before.register("s", "a@v1.1.0+b", KEY_B, ONE)
    before.lease("s", "a@2.0.0", KEYS, 5, ttl=3600)
    before.lease("s", "a@2.0.0", OTHER, 5, ttl=1)
    table = Table(before.store)
    assert table.restore() == []
    shown = [entry.details for entry in table.query("a")]
    assert sorted(map(str, shown)) == sorted(
        str(entry.details | {"remotePublicKey": entry.holder.hex()}) for entry in before.query("a")
    )
    assert table.at(29.9) == []
    table.register("s", "a@1.0.0", KEY_A, ONE)
    table.lease("s", "a@2.0.0", KEYS, 6)
    gone = table.at(30.0)
    assert {entry.service_key for entry in gone} == {KEY_B, OTHER.public_key}
    assert len(table.store.kept) == len(table.rows) == 2
    assert keys(table, "a@1.x") == [KEY_A]


def test_rows_that_are_none_are_taken_out() -> None:
    good = Table()
    good.register("s", "a@1.0.0", KEY_A, ONE)
    plain = good.store.kept[KEY_A, ONE, "a", "1.0.0"]
    store = MemoryStore()
    for role in ("", "a" * 1025):
        store.put(replace(plain, role=role))
    for version in ("1", "v1.0.0"):
        store.put(replace(plain, version=version))
    store.put(plain)
    table = Table(store)
    assert len(table.restore()) == 4
    assert list(store.kept.values()) == [plain]
    assert len(table.rows) == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"meta": "{"},
        {"meta": "[]"},
        {"meta": "{}"},
        {"meta": '{"role":"b","version":"1.0.0"}'},
        {"statement": "{}"},
        {"statement": "["},
    ],
)
def test_a_row_that_cannot_be_read_says_only_where_it_is(bad: dict[str, Any]) -> None:
    good = Table()
    if "statement" in bad:
        good.lease("s", "a@1.0.0", KEYS, 5)
    else:
        good.register("s", "a@1.0.0", KEYS.public_key, KEYS.public_key)
    store = MemoryStore()
    store.put(replace(*good.store.kept.values(), **bad))
    table = Table(store)
    assert table.restore() == []
    (entry,) = table.query("a")
    assert entry.meta == {"role": "a", "version": "1.0.0"}
    assert "verified" not in entry.details
    # Its owner says the rest anew, and of a lease nobody repeats what it has said.
    if "statement" in bad:
        with pytest.raises(Refused, match="stale"):
            table.lease("s", "a@1.0.0", KEYS, 5)
    table.lease("s", "a@1.0.0", KEYS, 6)
    (entry,) = table.query("a")
    assert entry.details["verified"] is True
    assert entry.meta["tags"] == []


def test_an_unread_row_takes_as_much_room_as_a_read_one() -> None:
    before = Table()
    odd = {"role": "a", "version": "1.0.0", "x": '"\\\n\tä\U0001f600'}
    before.register("s", odd, KEY_A, ONE)
    before.lease("s", odd, KEYS, 5)
    table = Table(before.store)
    table.restore()
    assert [entry.size for entry in table.rows] == [entry.size for entry in before.rows]
    # What JSON can say and UTF-8 cannot may count for more.
    before.register("s", odd | {"x": "\ud800"}, KEY_A, ONE)
    table = Table(before.store)
    table.restore()
    assert next(iter(table.rows)).size >= next(iter(before.rows)).size


def test_renewals_are_written_when_asked() -> None:
    table = Table()
    table.lease("s", "a@1.0.0", KEYS, 5)
    writes = table.store.writes
    table.lease("s", "a@1.0.0", KEYS, 6)
    assert (table.store.writes, table.rows.unwritten) == (writes, 1)
    table.rows.write_renewals()
    assert (table.store.writes, table.rows.unwritten) == (writes + 1, 0)
    assert [row.sequence for row in table.store.kept.values()] == [6]
    table.lease("s", "a@1.0.0", KEYS, 7)
    table.end("s")
    table.rows.write_renewals()
    assert table.store.kept == {}
    assert table.store.graves == {KEYS.public_key: (7, EPOCH + rows.BURIED_FOR)}


# Limits


def test_a_session_has_a_limit_of_entries(monkeypatch: Any) -> None:
    monkeypatch.setattr(rows, "MAX_ENTRIES_PER_SESSION", 3)
    table = Table()
    for number in range(2):
        table.register("s", f"a{number}@1.0.0", KEY_A, ONE)
    table.lease("s", "a2@1.0.0", KEYS, 5)
    with pytest.raises(Refused, match="at most 3") as caught:
        table.register("s", "a3@1.0.0", KEY_A, ONE)
    assert caught.value.kind == "limit"
    with pytest.raises(Refused, match="at most 3"):
        table.lease("s", "a3@1.0.0", OTHER, 5)
    table.register("s", "a0@1.0.0", KEY_A, ONE)
    table.lease("s", "a4@1.0.0", KEYS, 6)
    table.register("other", "a3@1.0.0", KEY_A, ONE)
    table.lease("other", "a3@1.0.0", OTHER, 5)
    assert len(table.rows) == 5


def test_the_table_has_a_limit_of_entries(monkeypatch: Any) -> None:
    monkeypatch.setattr(rows, "MAX_ENTRIES", 2)
    table = Table()
    table.register("s1", "a@1.0.0", KEY_A, ONE)
    table.lease("s2", "b@1.0.0", KEYS, 5)
    with pytest.raises(Refused, match="full") as caught:
        table.register("s3", "c@1.0.0", KEY_A, ONE)
    assert caught.value.kind == "limit"
    with pytest.raises(Refused, match="full") as caught:
        table.lease("s3", "c@1.0.0", OTHER, 5)
    assert caught.value.kind == "limit"
    table.lease("s2", "c@1.0.0", KEYS, 6)
    table.register("s3", "a@1.0.0", KEY_A, ONE)
    table.end("s1")
    table.end("s3")
    table.lease("s3", "c@1.0.0", OTHER, 5)
    # A refused statement is one that was not there.
    assert len(table.rows) == 2


def test_the_table_has_a_limit_of_bytes(monkeypatch: Any) -> None:
    table = Table()
    entry = table.register("s1", "a@1.0.0", KEY_A, ONE)
    monkeypatch.setattr(rows, "MAX_BYTES", 2 * entry.size)
    table.register("s1", "a@1.0.0", KEY_B, ONE)
    table.register("s1", "a@1.0.0", KEY_B, ONE)
    with pytest.raises(Refused, match="full"):
        table.register("s1", "a@1.0.0", KEY_C, ONE)
    with pytest.raises(Refused, match="full"):
        table.register("s1", roles.parse("a@1.0.0") | {"metadata": "x"}, KEY_B, ONE)
    table.end("s1")
    table.register("s1", "a@1.0.0", KEY_C, ONE)


def test_a_role_has_a_limit_of_versions(monkeypatch: Any) -> None:
    monkeypatch.setattr(rows, "MAX_VERSIONS", 2)
    table = Table()
    table.register("s1", "a@1.0.0", KEY_A, ONE)
    table.register("s1", "a@2.0.0", KEY_A, ONE)
    with pytest.raises(Refused, match="at most 2 versions"):
        table.register("s1", "a@3.0.0", KEY_A, ONE)
    table.register("s1", "a@2.0.0", KEY_B, ONE)


def test_a_key_has_a_limit_of_plain_registrations(monkeypatch: Any) -> None:
    monkeypatch.setattr(rows, "MAX_PER_KEY", 2)
    table, key = Table(), KEYS.public_key
    table.register("s1", "a@1.0.0", key, ONE)
    table.register("s2", "b@1.0.0", key, TWO)
    with pytest.raises(Refused, match="2 registrations of this key") as caught:
        table.register("s3", "a@1.0.0", key, THREE)
    assert caught.value.kind == "limit"
    table.register("s2", "b@1.0.0", key, TWO)
    # Its owner gets through, if not without end.
    table.register("s3", "a@1.0.0", key, key)
    table.register("s3", "b@1.0.0", key, key)
    with pytest.raises(Refused, match="4 registrations of this key"):
        table.register("s3", "c@1.0.0", key, key)
    table.lease("s3", "a@1.0.0", KEYS, 5)
    assert len(table.rows) == 1


# All together

ROLE = st.sampled_from(["a@1.0.0", "a@1.1.0", "a@2.0.0-rc.1", "b@1.0.0"])
SESSION = st.integers(0, 3)
SIGNER = st.sampled_from([KEYS, OTHER])
SERVICE = st.sampled_from([KEY_A, KEYS.public_key, OTHER.public_key])
OPERATION = st.one_of(
    st.tuples(st.just("register"), SESSION, ROLE, SERVICE),
    st.tuples(st.just("unregister"), SESSION, ROLE, SERVICE),
    st.tuples(
        st.just("lease"), SESSION, ROLE, SIGNER, st.integers(0, 12), st.sampled_from([0, 2, 30])
    ),
    st.tuples(st.just("end"), SESSION, st.booleans()),
    st.tuples(st.just("pass"), st.floats(0, 10)),
    st.tuples(st.just("restart")),
)
#: The keys of the sessions' connections: two have the same, and one is a service's own.
REMOTES = (ONE, ONE, TWO, KEYS.public_key)


class Model:
    """A flat list of entries, searched from end to end."""

    def __init__(self) -> None:
        # service key, holder, role, version -> sessions, end, sequence (None: plain)
        self.entries: dict[tuple[Any, ...], tuple[set[int], float, int | None]] = {}
        self.highest: dict[bytes, int] = {}
        self.now = 0.0

    def leased(self, key: bytes) -> Any:
        return next(
            (
                place
                for place, (_, _, sequence) in self.entries.items()
                if place[0] == key and sequence is not None
            ),
            None,
        )

    def register(self, session: int, where: tuple[str, str], key: bytes) -> bool:
        remote = REMOTES[session]
        leased = self.leased(key)
        if leased is not None and remote != key:
            return False
        if leased is None or leased[2:] != where:
            place = key, remote, *where
            sessions = self.entries[place][0] if place in self.entries else set()
            self.entries[place] = sessions | {session}, float("inf"), None
        return True

    def unregister(self, session: int, where: tuple[str, str], key: bytes) -> bool:
        remote = REMOTES[session]
        claims = [place for place in self.entries if (place[0], place[2:]) == (key, where)]
        mine = [place for place in claims if remote in place[:2]]
        for place in mine:
            del self.entries[place]
        return bool(mine) or not claims

    def lease(
        self, session: int, where: tuple[str, str], key: bytes, sequence: int, ttl: float
    ) -> bool:
        if sequence <= self.highest.get(key, -1):
            return False
        self.highest[key] = sequence
        place = key, key, *where
        sessions, _, before = self.entries.get(place, (set(), 0.0, None))
        self.entries = {place: each for place, each in self.entries.items() if place[0] != key}
        if ttl:
            kept = set() if before is None else sessions
            self.entries[place] = kept | {session}, self.now + ttl, sequence
        return True

    def end(self, session: int, in_order: bool) -> None:
        for place, (sessions, ends, sequence) in [*self.entries.items()]:
            if session not in sessions:
                continue
            left = sessions - {session}
            if left:
                self.entries[place] = left, ends, sequence
            elif in_order:
                del self.entries[place]
            else:
                self.entries[place] = left, min(ends, self.now + rows.GRACE), sequence

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.entries = {place: each for place, each in self.entries.items() if each[1] > self.now}

    def restart(self) -> None:
        self.entries = {
            place: (set(), self.now + rows.RESTART_GRACE, each[2])
            for place, each in self.entries.items()
        }


@given(st.lists(OPERATION, max_size=40))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_agrees_with_a_model(operations: Any) -> None:
    table, model = Table(), Model()

    for operation, *rest in operations:
        if operation == "pass":
            table.at(table.now + rest[0])
            model.tick(rest[0])
        elif operation == "end":
            table.end(*rest)
            model.end(*rest)
        elif operation == "restart":
            now = table.now
            table.rows.write_renewals()
            table = Table(table.store)
            table.now = now
            assert table.restore() == []
            model.restart()
        elif operation == "lease":
            session, role, keys, sequence, ttl = rest
            expected = model.lease(session, parted(role), keys.public_key, sequence, ttl)
            values = {"remote": REMOTES[session], "ttl": ttl}
            assert expected == accepted(table.lease, session, role, keys, sequence, **values)
        elif operation == "register":
            session, role, key = rest
            expected = model.register(session, parted(role), key)
            assert expected == accepted(table.register, session, role, key, REMOTES[session])
        else:
            session, role, key = rest
            expected = model.unregister(session, parted(role), key)
            assert expected == accepted(table.unregister, role, key, REMOTES[session])
        check(table, model)


def parted(role: str) -> tuple[str, str]:
    name, _, version = role.partition("@")
    return name, version


def accepted(act: Any, *args: Any, **values: Any) -> bool:
    try:
        act(*args, **values)
    except Refused:
        return False
    return True


def check(table: Table, model: Model) -> None:
    found = {
        (entry.service_key, entry.holder, *entry.place): (
            set(entry.sessions),
            entry.ends,
            None if entry.lease is None else entry.lease.sequence,
        )
        for entry in table.rows
    }
    assert {place: (each[0], each[2]) for place, each in found.items()} == {
        place: (each[0], each[2]) for place, each in model.entries.items()
    }
    for place, (_, ends, _) in model.entries.items():
        assert found[place][1] == pytest.approx(ends)
    assert len(table.rows) == len(model.entries)
    assert set(table.store.kept) == set(model.entries)
    # Every way to an entry leads to the same ones.
    shown = {(one.service_key, *one.place) for role in ("a", "b") for one in table.query(role)}
    assert shown == {(place[0], *place[2:]) for place in model.entries}
    for role in ("a", "b"):
        for entry in table.query(role):
            own = (entry.service_key, entry.service_key, *entry.place)
            assert entry.holder == entry.service_key or own not in model.entries
    first = min((each[1] for each in model.entries.values()), default=float("inf"))
    deadline = table.rows.deadline()
    assert first == float("inf") or (deadline is not None and deadline <= first + 1e-9)
