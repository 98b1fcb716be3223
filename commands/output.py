"""How commands show what they found: tables for people, JSON for programs.

What strangers chose (roles, tags, reasons of failures) is printed like all else, so no text reaches
the terminal before `clean`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

Row = Sequence[object]

#: Units of more than a byte, the largest first.
_SIZES = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
#: Units of time, the longest first, in seconds.
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


def clean(text: object) -> str:
    """A text in which every character that is not printable is escaped: nothing in it moves the
    cursor, hides, or turns the direction of what follows."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else _escaped(ord(each)) for each in text)


def seconds(age: float | None) -> str:
    """A span of time in the unit that suits it; `-` for none."""
    if age is None:
        return "-"
    for unit, name in _UNITS:
        if age >= 2 * unit:
            return f"{age / unit:.0f} {name}"
    return f"{age:.1f} s" if age < 10 else f"{age:.0f} s"


def size(number: int) -> str:
    """So many bytes in the unit that suits them."""
    for unit, name in _SIZES:
        if number >= unit:
            value = number / unit
            return f"{value:.1f} {name}" if value < 10 else f"{value:.0f} {name}"
    return f"{number} B"


def short(key: object) -> str:
    """The beginning of a key, long enough to tell it from others."""
    return str(key)[:8]


def say(line: str = "") -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    sys.stdout.flush()


def document(value: Any) -> None:
    """One JSON value on one line, in ASCII."""
    say(json.dumps(value).replace("\x7f", "\\u007f"))


def facts(named: Sequence[tuple[str, str]]) -> None:
    """A line each, below a heading."""
    texts = [(clean(name), clean(value)) for name, value in named]
    if sys.stdout.isatty():
        _rich_facts(texts)
        return
    width = max((len(name) for name, _ in texts), default=0)
    for name, value in texts:
        say(f"  {name:{width}}  {value}".rstrip())


def table(headers: Sequence[str], rows: Sequence[Row]) -> None:
    """Columns under their headers."""
    texts = [[clean(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _rich_table(headers, texts)
        return
    widths = [max(map(len, column)) for column in zip(headers, *texts, strict=True)]
    for row in (headers, *texts):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        say("  ".join(cells).rstrip())


def heading(text: str) -> None:
    text = clean(text)
    say(f"\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() else text)


def _rich_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    # Loading it takes longer than most commands do.
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for header in headers:
        drawn.add_column(Text(header), overflow="fold")
    for row in rows:
        # Not a str, in which brackets would be markup.
        drawn.add_row(*(Text(cell) for cell in row))
    Console(file=sys.stdout, highlight=False).print(drawn)


def _rich_facts(texts: Sequence[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A value that is too long for its line goes on below itself.
    drawn = Table.grid(padding=(0, 0, 0, 2), pad_edge=True)
    drawn.add_column(no_wrap=True, style="cyan")
    drawn.add_column(overflow="fold")
    for name, value in texts:
        drawn.add_row(Text(name), Text(value))
    Console(file=sys.stdout, highlight=False).print(drawn)


def _escaped(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
