from __future__ import annotations

import json
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperseaport.commands import output


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("couchdb@3.x [red] √ ü 数", "couchdb@3.x [red] √ ü 数"),
        ("a\nb\tc\x1b[2J\x7f\x9b", r"a\x0ab\x09c\x1b[2J\x7f\x9b"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\u200b\ufeff\u2029", r"\u200b\ufeff\u2029"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
        (7, "7"),
        (None, "None"),
    ],
)
def test_clean(text: object, shown: str) -> None:
    assert output.clean(text) == shown


@given(st.text() | st.characters())
@settings(deadline=None, derandomize=True, max_examples=200)
def test_what_is_clean_is_printable(text: str) -> None:
    assert output.clean(text).isprintable()


@pytest.mark.parametrize(
    ("age", "shown"),
    [
        (None, "-"),
        (0, "0.0 s"),
        (0.25, "0.2 s"),
        (9.94, "9.9 s"),
        (10, "10 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7199, "120 min"),
        (7200, "2 h"),
        (86400 * 2, "2 d"),
        (86400 * 365, "365 d"),
    ],
)
def test_seconds(age: float | None, shown: str) -> None:
    assert output.seconds(age) == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (10_189, "10.0 KiB"),
        (10_240, "10 KiB"),
        (1 << 20, "1.0 MiB"),
        (350 << 20, "350 MiB"),
        (5 << 30, "5.0 GiB"),
        (3 << 50, "3072 TiB"),
    ],
)
def test_size(number: int, shown: str) -> None:
    assert output.size(number) == shown


def test_plain_facts_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    output.facts([("key", "5b64a895"), ("listening", "\x1b[2J"), ("", "more")])
    assert capsys.readouterr().out == (
        "  key        5b64a895\n  listening  \\x1b[2J\n             more\n"
    )
    output.facts([])
    assert capsys.readouterr().out == ""


def test_facts_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output.facts([("key", "[bold]" + "5b64a895" * 2), ("bytes", "\x1b[2J")])
    lines = re.sub(r"\x1b\[[0-9]*m", "", capsys.readouterr().out).splitlines()
    assert [line.rstrip() for line in lines] == [
        "  key    [bold]5b64a8955",
        "         b64a895",
        r"  bytes  \x1b[2J",
    ]


def test_plain_tables_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("A", "LONG HEADER"), [("long cell", 1), ("x", ""), ("\x1b", None)])
    assert capsys.readouterr().out == (
        "A          LONG HEADER\nlong cell  1\nx\n\\x1b       None\n"
    )


def test_a_document_is_one_line_of_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"a": "\x7f\x9b\x1b\n ü"}
    output.document(value)
    out = capsys.readouterr().out
    assert out.isascii()
    assert out.removesuffix("\n").isprintable()
    assert json.loads(out) == value


def test_a_narrow_encoding_loses_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ascii:
        encoding = "ascii"
        write = staticmethod(sys.stdout.write)
        flush = staticmethod(sys.stdout.flush)

    monkeypatch.setattr(sys, "stdout", Ascii())
    output.say("√")
    monkeypatch.undo()
    assert capsys.readouterr().out == "\\u221a\n"
