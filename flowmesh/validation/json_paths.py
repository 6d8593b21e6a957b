"""Paths into JSON values: `stage.result.items[0].output`, `metadata["a key"].x`."""

from __future__ import annotations

import re
from typing import Any

from flowmesh.validation.names import listed

_STEP = re.compile(r"""\.?(?P<name>[^.\[\]"']+)|\[(?P<index>-?\d+)\]|\[(?P<quote>["'])(?P<key>.*?)(?P=quote)\]""")
_SHOWN = 12


class PathError(LookupError):
    """Raised when nothing is at a path. The message gives the last existing part and what is there instead."""


def parse(path: str) -> list[str | int]:
    """The steps of a path.

    Raises:
        PathError: the syntax is wrong.
    """
    steps: list[str | int] = []
    at = 0
    while at < len(path):
        match = _STEP.match(path, at)
        if match is None or (at == 0 and path.startswith(".")):
            raise PathError(f"{path!r} is no path; write it like items[0].output")
        if match["index"] is not None:
            steps.append(int(match["index"]))
        else:
            steps.append(match["name"] if match["name"] is not None else match["key"])
        at = match.end()
    return steps


def walk(value: Any, steps: list[str | int], start: str) -> Any:
    """The value at `steps` below `value`.

    Args:
        start: the name of `value` in errors.

    Raises:
        PathError: there is none.
    """
    here = start
    for step in steps:
        if isinstance(value, dict):
            if step not in value:
                raise PathError(f"{here} has no {step!r}; it has {_some(sorted(map(str, value)))}")
            value, here = value[step], f"{here}.{step}"
        elif isinstance(value, list) and (isinstance(step, int) or step.isdecimal()):
            index = int(step)  # `items.0.output` is `items[0].output`
            if not -len(value) <= index < len(value):
                raise PathError(f"{here} has {len(value)} entries and none at [{index}]")
            value, here = value[index], f"{here}[{index}]"
        else:
            kind = "a list; give a number in brackets" if isinstance(value, list) else f"a {type(value).__name__}"
            raise PathError(f"{here} is {kind}, so there is no {step!r} in it")
    return value


def _some(names: list[str]) -> str:
    shown = listed(names, most=_SHOWN) if names else "nothing"
    return f"{shown} ({len(names)} in all)" if len(names) > _SHOWN else shown
