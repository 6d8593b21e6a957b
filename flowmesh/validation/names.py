"""What an error may show of a file's content: names of columns that look like names, and kinds of values."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

MOST_SHOWN = 30
_NAME = re.compile(r"[^\W\d_]+([ _./-][^\W\d_]+|[ _.-]?\d{1,3})*_?")
"""Words, perhaps with short numbers. Not: a line of another format, a key, a token."""
_LONGEST = 40
_KINDS = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a mapping"}


def listed(names: Iterable[Any], *, most: int = MOST_SHOWN, quoted: bool = False) -> str:
    """Names of columns for an error. Those that do not look like names are only counted: they may be content."""
    every = [str(name) for name in names]
    plausible = [name for name in every if is_name(name)]
    parts = [repr(name) if quoted else name for name in plausible[:most]]
    if len(plausible) > most:
        parts.append("…")
    if hidden := len(every) - len(plausible):
        parts.append(f"{hidden} with unusual names")
    return ", ".join(parts) or "none"


def is_name(text: str) -> bool:
    """Whether a text looks like the name of a column, and not like a line of a file."""
    return len(text) <= _LONGEST and _NAME.fullmatch(text.removeprefix("_")) is not None


def kind(value: Any) -> str:
    """A value of a row for an error: what it is, not what it says."""
    if value is None or value == "":
        return repr(value)
    return _KINDS.get(type(value), type(value).__name__)
