"""Strict JSON, with numbers that keep their spelling."""

from __future__ import annotations

import decimal
import json
from typing import Any

from flowmesh.validation.names import is_name


class Spelled(float):
    """A JSON number with a point or an exponent. `str` gives it as it was written: `1.10`, not `1.1`."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> Spelled:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text

    def plain(self) -> float | str:
        """A float if it is the same number, else the text: 64 bits cannot hold 1e400 or thirty digits."""
        same = decimal.Decimal(float.__repr__(self)) == decimal.Decimal(self.text)
        return float(self) if same else self.text


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: invalid JSON, NaN or Infinity, a key twice in one object, or nesting that is too deep.
    """
    try:
        return json.loads(text, parse_float=Spelled, parse_constant=_refuse, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value; write null or a string")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice" if is_name(twice) else "a key is there twice")
    return found
