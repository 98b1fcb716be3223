"""The routing table."""

from __future__ import annotations

from random import Random

from vectors import load

from hyperseaport.transport.dht.addresses import node_id
from hyperseaport.transport.dht.table import Contact, K, Table

VECTOR = load("hyperdht")["routingTable"]


def contact(name: bytes, number: int = 0) -> Contact:
    return Contact(name, ("10.0.0.1", number), 0)


def test_rows_and_closest_as_recorded() -> None:
    table = Table(bytes.fromhex(VECTOR["tableId"]))
    for node, row in zip(VECTOR["nodes"], VECTOR["buckets"], strict=True):
        address = node["host"], node["port"]
        assert table.row(node_id(address)) == row
        table.add(Contact(node_id(address), address, 0))
    for query in VECTOR["queries"]:
        target = bytes.fromhex(query["target"])
        assert table.row(target) == query["bucket"]
        found = [f"{c.address[0]}:{c.address[1]}" for c in table.closest(target)]
        assert found == query["closest"]


def test_our_own_id_and_its_nearest_neighbour_share_the_last_row() -> None:
    own = bytes(32)
    table = Table(own)
    assert table.row(own) == 255
    assert table.row(bytes(31) + b"\x01") == 255
    assert table.row(bytes(31) + b"\x02") == 254
    assert table.row(b"\x80" + bytes(31)) == 0


def test_a_row_takes_twenty_and_replaces_equal_ids() -> None:
    table = Table(bytes(32))
    rng = Random(1)
    ids = [b"\xff" + rng.randbytes(31) for _ in range(K + 1)]
    assert all(table.add(contact(name)) for name in ids[:K])
    assert not table.add(contact(ids[K]))
    assert ids[K] not in table
    newer = contact(ids[3], 9)
    assert table.add(newer)
    assert table.find(ids[3]) is newer
    assert newer in table.contacts(0)
    assert len(table) == len(table.contacts(0)) == K
    assert [c.id for c in table.contacts(0)] == sorted(ids[:K])


def test_the_list_is_ordered_by_who_was_heard_last() -> None:
    table = Table(bytes(32))
    contacts = [contact(bytes((n,)) * 32) for n in range(1, 6)]
    for one in contacts:
        table.add(one)
    table.touch(contacts[0])
    assert list(table) == [*contacts[1:], contacts[0]]
    assert next(iter(reversed(table))) is contacts[0]


def test_what_was_removed_is_gone_everywhere() -> None:
    table = Table(bytes(32))
    one = contact(b"\x01" * 32)
    table.add(one)
    assert table.remove(one.id)
    assert not table.remove(one.id)
    assert len(table) == 0
    assert table.closest(one.id) == []
    assert table.find(one.id) is None


def test_closest_is_no_longer_than_asked_for() -> None:
    table = Table(bytes(32))
    rng = Random(2)
    for _ in range(100):
        table.add(contact(rng.randbytes(32)))
    found = table.closest(rng.randbytes(32), 7)
    assert len(found) == len({c.id for c in found}) == 7


def test_nearest_is_sorted_by_distance() -> None:
    table = Table(bytes(32))
    rng = Random(3)
    for _ in range(200):
        table.add(contact(rng.randbytes(32)))
    target = rng.randbytes(32)
    everybody = sorted(c.id for c in table)
    everybody.sort(key=lambda name: int.from_bytes(name) ^ int.from_bytes(target))
    assert [c.id for c in table.nearest(target)] == everybody[:K]
