"""`foreach`: the stages that one entry of a document stands for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from flowmesh.pipelines.entries import Entry
from flowmesh.pipelines.fields import MAX_STAGES
from flowmesh.validation.describe import nearest

Instances = list[tuple[str, dict[str, Any] | None]]
"""Names and values of `foreach`."""


def instances_of(entries: Sequence[Entry], faults: list[str]) -> dict[str, Instances]:
    """The stages of each entry, by its name. What is wrong is added to `faults`."""
    found: dict[str, Instances] = {}
    by_name = {entry.name: entry for entry in entries}
    for entry in entries:
        source = source_of(entry, by_name)
        if source is None:
            what = nearest(str(entry.fields.foreach), [each.name for each in entries if _is_table(each)])
            faults.append(f"{entry.where}.foreach: {entry.fields.foreach!r} is no stage with a foreach; {what}")
            found[entry.name] = [(entry.name, None)]
            continue
        values = source.fields.foreach
        if not isinstance(values, dict):
            found[entry.name] = [(entry.name, None)]
            continue
        count = math.prod(len(listed) for listed in values.values())
        if not values or count > MAX_STAGES:
            faults.append(f"{source.where}.foreach: {count} combinations; expected 1 to {MAX_STAGES}")
            found[entry.name] = [(entry.name, None)]
            continue
        rows = itertools.product(*values.values())
        found[entry.name] = [
            (f"{entry.name}.{number}", dict(zip(values, row, strict=True))) for number, row in enumerate(rows)
        ]
    return found


def _is_table(entry: Entry) -> bool:
    return isinstance(entry.fields.foreach, dict)


def source_of(entry: Entry, by_name: dict[str, Entry]) -> Entry | None:
    """The entry with the values of this one's `foreach`; itself where it has none. None: there is no such stage."""
    seen: set[str] = set()
    while isinstance(entry.fields.foreach, str):
        if entry.name in seen or entry.fields.foreach not in by_name:
            return None
        seen.add(entry.name)
        entry = by_name[entry.fields.foreach]
    return entry if not seen or _is_table(entry) else None
