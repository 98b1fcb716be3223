"""Objects as text, laid out as Node's inspector lays them out (spec: registry 7.4).

People and scripts know the lines `registered service {...}` and `found service {...}` in this form.
Only JSON's types occur. Arrays of more than six entries are not set in columns, as Node does, but
one entry a line; and a text is never split at its line ends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

#: Characters of a line up to which an object stays on one line.
WIDTH = 80
#: Objects inside objects that are shown; what lies deeper is named only.
DEPTH = 2
#: Entries of an array that are shown.
MAX_ITEMS = 100
#: Entries above which an array is not put on one line.
ONE_LINE_ITEMS = 6

_IDENTIFIER = re.compile(r"[a-zA-Z_][a-zA-Z_0-9]*")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\\\x7f-\x9f\ud800-\udfff]")
_SHORT = {"\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r", "\\": "\\\\"}


def inspect(value: Any) -> str:
    """A JSON value as Node prints it; several lines without a final line end.

    No control character comes through, so what a stranger registered cannot drive a terminal.
    """
    return _value(value, 0, 0)


def _value(value: Any, depth: int, indent: int) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, Mapping):
        return _object(value, depth, indent)
    if isinstance(value, Sequence):
        return _array(value, depth, indent)
    raise TypeError(f"not a JSON value: {type(value).__name__}")


def _object(members: Mapping[str, Any], depth: int, indent: int) -> str:
    if not members:
        return "{}"
    if depth > DEPTH:
        return "[Object]"
    entries = [
        f"{_key(str(key))}: {_value(value, depth + 1, indent + 2)}"
        for key, value in members.items()
    ]
    return _layout(entries, "{", "}", indent)


def _array(items: Sequence[Any], depth: int, indent: int) -> str:
    if not items:
        return "[]"
    if depth > DEPTH:
        return "[Array]"
    entries = [_value(item, depth + 1, indent + 2) for item in items[:MAX_ITEMS]]
    if (more := len(items) - MAX_ITEMS) > 0:
        entries.append(f"... {more} more item{'s' if more > 1 else ''}")
    return _layout(entries, "[", "]", indent, one_line=len(entries) <= ONE_LINE_ITEMS)


def _layout(entries: list[str], start: str, end: str, indent: int, one_line: bool = True) -> str:
    # The rule as observed: spec registry 7.4.
    length = sum(map(_units, entries)) + 2 * len(entries) + 11 + indent
    if one_line and length <= WIDTH and not any("\n" in entry for entry in entries):
        return f"{start} {', '.join(entries)} {end}"
    line_end = "\n" + " " * indent
    return f"{start}{line_end}  {f',{line_end}  '.join(entries)}{line_end}{end}"


def _key(key: str) -> str:
    if key == "__proto__":
        return "['__proto__']"
    return key if _IDENTIFIER.fullmatch(key) else _quoted(key, "'")


def _quoted(text: str, quote: str = "") -> str:
    """In the first kind of quotes that the text does not contain."""
    quote = quote or next((mark for mark in "'\"`" if mark not in text), "'")
    escaped = _UNPRINTABLE.sub(_escape, text)
    return quote + (escaped.replace(quote, "\\" + quote) if quote == "'" else escaped) + quote


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    code = ord(character)
    return _SHORT.get(character) or (f"\\x{code:02X}" if code < 256 else f"\\u{code:04x}")


def _number(value: float) -> str:
    """As JavaScript writes the double it would hold."""
    try:
        number = float(value)
    except OverflowError:
        return "Infinity" if value > 0 else "-Infinity"
    if number != number:
        return "NaN"
    if number in (float("inf"), float("-inf")):
        return "Infinity" if number > 0 else "-Infinity"
    if number == 0:
        return "-0" if str(number).startswith("-") else "0"
    shortest = repr(number)
    if 1e-6 <= abs(number) < 1e21:
        plain = f"{Decimal(shortest):f}"
        return plain.removesuffix(".0")
    mantissa, _, exponent = shortest.partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent):+d}"


def _units(text: str) -> int:
    """Length as JavaScript counts it: UTF-16 units."""
    return len(text) + sum(character > "\uffff" for character in text)
