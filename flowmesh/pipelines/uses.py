"""The stages whose results a stage uses: in its spec, in the columns of a graph template, and in its conditions."""

from __future__ import annotations

from typing import Any

from flowmesh.pipelines import references
from flowmesh.pipelines.conditions import Condition, ConditionError
from flowmesh.pipelines.entries import Entry
from flowmesh.validation.describe import nearest


def used_by(entry: Entry, spec: dict[str, Any], names: tuple[str, ...], faults: list[str]) -> list[str]:
    """Their names. What is wrong with a reference is added to `faults`."""
    used = []
    for path, text in references.texts(spec):
        for match in references.REFERENCE.finditer(text):
            if match["escape"] is not None:
                continue
            found = references.split(match["expr"], names)
            if found is not None:
                used.append(found.stage)
                if what := references.syntax_fault(found):
                    faults.append(f"{entry.place(path)}: {what}")
            elif what := references.fault(match["expr"], names):
                faults.append(f"{entry.place(path)}: {what}")
    for index, column in enumerate(references.columns_of(spec)):
        stage = references.stage_of_column(column, names)
        if stage is not None:
            used.append(stage)
        elif isinstance(node := column.get("node"), str) and "default" not in column and "_upstreamResults" not in spec:
            place = entry.place(("data", "template", "columns", index, "node"))
            faults.append(f"{place}: there is no stage {node!r}; {nearest(node, names)}")
    used += _of_condition(entry, names, faults)
    if entry.name in used:
        faults.append(f"{entry.where}: uses its own result")
    return used


def _of_condition(entry: Entry, names: tuple[str, ...], faults: list[str]) -> list[str]:
    used = []
    if isinstance(entry.fields.when, str):
        try:
            condition = Condition(entry.fields.when)
        except ConditionError as error:
            faults.append(f"{entry.where}.when: {error}")
            return []
        for expr in condition.references:
            found = references.split(expr, names)
            if found is not None:
                used.append(found.stage)
            elif references.split(expr, (references.EACH,)) is None:
                what = references.fault(expr, names) or f"${{{expr}}}: there is no such stage; {nearest(expr, names)}"
                faults.append(f"{entry.where}.when: {what}")
    if (field := entry.fields.condition) is not None:
        if field.node in names:
            used.append(field.node)
        else:
            faults.append(
                f"{entry.where}.condition.node: there is no stage {field.node!r}; {nearest(field.node, names)}"
            )
    return used
