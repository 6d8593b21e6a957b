"""Checks a pipeline's document, and each stage's task with what it inherits. Nothing that it names is opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowmesh.errors import FieldError
from flowmesh.pipelines import references
from flowmesh.pipelines.document import Pipeline, Stage, read
from flowmesh.pipelines.shards import LISTS
from flowmesh.tasks.catalogue import TaskType
from flowmesh.tasks.checks import check_task
from flowmesh.validation.checked import Checked
from flowmesh.validation.describe import Path, dotted
from flowmesh.validation.json_paths import PathError, parse

MAX_CHECKED = 8
"""Of the stages of one `foreach`."""


def check_pipeline(document: dict[str, Any], types: Mapping[str, TaskType]) -> tuple[Checked, list[str]]:
    """Check a pipeline as far as its fields and their types go.

    Args:
        types: the known task types.

    Returns:
        What was found, and why the fields of some types were not checked.
    """
    try:
        pipeline = read(document)
    except FieldError as error:
        return Checked(faults=error.faults), []
    faults: list[str] = []
    unused: list[str] = []
    notes: list[str] = []
    for stage in _some(pipeline):
        checked, note = check_task({"spec": stage.spec}, types)
        open_places = _references(stage, pipeline.names)
        faults += [_placed(stage, fault) for fault in checked.faults if not _is_open(fault, open_places)]
        faults += _parallel_faults(stage)
        unused += [_placed(stage, path) for path in checked.unused if not _is_inherited(stage, path)]
        if note:
            notes.append(_placed(stage, note))
    return Checked(faults=tuple(dict.fromkeys(faults)), unused=tuple(dict.fromkeys(unused))), list(dict.fromkeys(notes))


def _some(pipeline: Pipeline) -> list[Stage]:
    some = {name for names in pipeline.groups.values() for name in names[:MAX_CHECKED]}
    return [stage for stage in pipeline.stages if stage.name in some]


def _references(stage: Stage, names: tuple[str, ...]) -> list[str]:
    """The paths of texts whose values are known only when other stages have ended."""
    return [
        dotted("spec", path)
        for path, text in references.texts(stage.spec)
        if any(references.split(match["expr"], names) for match in references.REFERENCE.finditer(text))
    ]


def _is_open(fault: str, open_places: list[str]) -> bool:
    """Whether a fault is about a value that is not known yet."""
    return any(
        fault.startswith(place) and fault[len(place) : len(place) + 1] in (":", ".", "[", " ") for place in open_places
    )


def _placed(stage: Stage, fault: str) -> str:
    """A message about `spec.…` of a stage, with the path in the pipeline's document."""
    place, colon, what = fault.partition(": ")
    path = _path_of(place)
    return fault if path is None else f"{stage.entry.place(path)}{colon}{what}"


def _path_of(place: str) -> Path | None:
    try:
        first, *rest = parse(place)
    except (PathError, ValueError):
        return None
    return tuple(rest) if first == "spec" else None


def _is_inherited(stage: Stage, path: str) -> bool:
    """Whether a field without effect is the outer spec's: another stage's perhaps."""
    steps = _path_of(path)
    return steps is not None and not stage.entry.place(steps).startswith(stage.entry.where)


def _parallel_faults(stage: Stage) -> list[str]:
    task_type = stage.spec.get("taskType")
    if stage.parallel is None or task_type in LISTS:
        return []
    known = ", ".join(LISTS)
    return [f"{stage.entry.where}.parallel.enabled: {task_type!r} cannot be divided; only {known} can; set it to false"]
