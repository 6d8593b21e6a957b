"""Merged tasks: the children that run with their parent, and the errors of those that cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from runners.api import BadRequest, Context
from runners.inference.task import InferenceTask
from runners.models.files import SAFE_ID


class Child(msgspec.Struct, frozen=True):
    """A task merged into another one."""

    task_id: str
    spec: dict[str, Any]
    where: str
    """The path of its `spec`, for errors."""


def read_children(ctx: Context) -> list[Child]:
    """The children in `merge_children`.

    Raises:
        BadRequest: one has no unique id, so that its result would have no folder.
    """
    if not isinstance(ctx.merge_children, list):
        raise BadRequest(f"merge_children: expected a list, found {type(ctx.merge_children).__name__}")
    children: list[Child] = []
    for i, entry in enumerate(ctx.merge_children):
        where = f"merge_children[{i}]"
        task_id = entry.get("task_id") if isinstance(entry, dict) else None
        if not isinstance(task_id, str) or not SAFE_ID.fullmatch(task_id):
            raise BadRequest(f"{where}.task_id: invalid task id {task_id!r}")
        if task_id == ctx.task_id or any(task_id == other.task_id for other in children):
            raise BadRequest(f"{where}.task_id: {task_id!r} is given twice")
        spec = entry.get("spec")
        children.append(Child(task_id, spec if isinstance(spec, dict) else {}, f"{where}.spec"))
    return children


def folder_of(ctx: Context, task_id: str) -> Path:
    """A child's folder."""
    folders: dict[str, str] = getattr(ctx.job, "child_dirs", {})
    return Path(folders.get(task_id) or ctx.results_dir / task_id)


def check_agreement(parent: InferenceTask, child: InferenceTask, where: str) -> None:
    """Raises BadRequest naming the first field in which a child's model or sampling differs from its parent's."""
    for section, field in (
        ("model", "model"),
        ("checkpoint.load", "checkpoint"),
        ("engine", "engine"),
        ("enforce_cpu", "enforce_cpu"),
        ("inference", "sampling"),
        ("inference.reasoning_parser", "reasoning_parser"),
    ):
        mine, theirs = getattr(child, field), getattr(parent, field)
        if mine == theirs:
            continue
        name = _first_difference(mine, theirs)
        path = f"{where}.{section}.{name}" if name else f"{where}.{section}"
        here, there = (getattr(value, name) if name else value for value in (mine, theirs))
        raise BadRequest(f"{path}: {_show(here)}, but the task it is merged into has {_show(there)}; send it by itself")


def _first_difference(one: Any, other: Any) -> str:
    if isinstance(one, msgspec.Struct) and isinstance(other, msgspec.Struct):
        for name in one.__struct_fields__:
            if getattr(one, name) != getattr(other, name):
                return name
    return ""


def _show(value: Any) -> str:
    """A short form of a value. Structs may contain headers, so only their type is shown."""
    if isinstance(value, msgspec.Struct | dict | tuple):
        return "another one"
    return repr(value)


def failed(error: Exception) -> dict[str, Any]:
    """The entry of a child that did not run."""
    return {
        "ok": False,
        "error": str(error),
        "items": [],
        "usage": {
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "total_tokens": 0,
            "num_requests": 0,
            "latency_sec": 0.0,
        },
    }
