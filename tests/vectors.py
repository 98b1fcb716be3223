"""The recorded vectors of the wire protocols, by name."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any


@cache
def load(name: str) -> Any:
    """The parsed content of ``tests/vectors/<name>.json``; shared, so not to be changed."""
    return json.loads((Path(__file__).parent / "vectors" / f"{name}.json").read_text())
