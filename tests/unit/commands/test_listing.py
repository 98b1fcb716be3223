from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator

import pytest

from hyperseaport.actors.messages import ServiceRecord
from hyperseaport.commands import listing

NOW = 1_700_000_000.0

LEASED = ServiceRecord(
    bytes.fromhex("5b64a8956d8f2404" * 4),
    "couchdb",
    "3.2.2",
    {"role": "couchdb", "tags": ["eu"]},
    verified=True,
    instance="0123456789abcdef" * 2,
    sequence=7,
    expires=NOW + 23.4,
)
PLAIN = ServiceRecord(b"\xab" * 32, "evil\x1b[2J\n", "1.0.0", {"role": "evil"})


async def updates(*lists: tuple[ServiceRecord, ...]) -> AsyncIterator[tuple[ServiceRecord, ...]]:
    for each in lists:
        yield each


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)
    monkeypatch.setattr(time, "strftime", lambda _format: "14:03:07")


async def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    await listing.show(updates((LEASED, PLAIN), (LEASED,)))
    assert capsys.readouterr().out.splitlines() == [
        "ROLE             VERSION  KEY       VERIFIED  INSTANCE  EXPIRES IN",
        "couchdb          3.2.2    5b64a895  yes       01234567  23 s",
        r"evil\x1b[2J\x0a  1.0.0    abababab  no        -         -",
    ]


async def test_an_empty_registry(capsys: pytest.CaptureFixture[str]) -> None:
    await listing.show(updates(()))
    assert capsys.readouterr().out == "no services\n"


async def test_nothing_was_told(capsys: pytest.CaptureFixture[str]) -> None:
    await listing.show(updates())
    assert capsys.readouterr().out == ""


async def test_watching(capsys: pytest.CaptureFixture[str]) -> None:
    await listing.show(updates((LEASED,), (), (LEASED, PLAIN)), watch=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("14:03:07")] == [
        "14:03:07  1 service",
        "14:03:07  0 services",
        "14:03:07  2 services",
    ]
    assert len([line for line in lines if line.startswith("couchdb")]) == 2


@pytest.mark.parametrize("watch", [False, True])
async def test_as_json_it_is_a_line_a_list(capsys: pytest.CaptureFixture[str], watch: bool) -> None:
    await listing.show(updates((LEASED, PLAIN), (), (LEASED,)), as_json=True, watch=watch)
    lists = [json.loads(line)["services"] for line in capsys.readouterr().out.splitlines()]
    assert [len(each) for each in lists] == ([2, 0, 1] if watch else [2])
    assert lists[0][0] == {
        "role": "couchdb",
        "version": "3.2.2",
        "key": "5b64a8956d8f2404" * 4,
        "verified": True,
        "instance": "0123456789abcdef" * 2,
        "sequence": 7,
        "expires": NOW + 23.4,
        "meta": {"role": "couchdb", "tags": ["eu"]},
    }
    assert lists[0][1]["expires"] is None


async def test_what_has_expired_meanwhile(capsys: pytest.CaptureFixture[str]) -> None:
    late = ServiceRecord(b"\x01" * 32, "a", "1.0.0", {}, expires=NOW - 5)
    await listing.show(updates((late,)))
    assert capsys.readouterr().out.splitlines()[1].endswith("0.0 s")
