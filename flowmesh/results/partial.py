"""What a failed task had finished: its rows, in its result, as a file to go on from and as its export; its steps."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from flowmesh.files.folder import Folder, Parts
from flowmesh.messages import steps
from flowmesh.messages.rows import ROWS_FILE, Counts, Kept, compress, line, read
from flowmesh.messages.steps import Steps
from flowmesh.results.job import PartRows
from flowmesh.results.safe_files import write_in_task
from flowmesh.results.task_folder import TaskFolder

_FIELDS = frozenset({"items", "queries"})


class Export(msgspec.Struct, frozen=True):
    """An export of finished items, not yet written."""

    parts: Parts
    """Its path below the task's folder."""
    data: bytes
    shown: dict[str, Any]
    """`jsonl_export` of the result, without its path."""


def has_rows(path: Path) -> bool:
    """Whether a task's folder has a row log. False where the folder cannot be opened."""
    try:
        with Folder.open(path) as folder:
            folder.status((ROWS_FILE,))
    except OSError:
        return False
    return True


def read_rows(folder: Folder) -> Kept:
    """The whole rows in a task's folder; empty where there are none, or the file cannot be read."""
    try:
        with open(folder.open_file((ROWS_FILE,)), "rb") as file:
            return read(file)
    except OSError:
        return Kept()


def fields(kept: Kept) -> dict[str, Any]:
    """What the result of a failed task gets; nothing where no item was finished."""
    rows = kept.current
    if not rows:
        return {}
    prompt = sum(row.prompt_tokens for row in rows.values())
    completion = sum(row.completion_tokens for row in rows.values())
    return {
        "partial": True,
        "rows": shown(kept.counts),
        _field(kept): [rows[index].item for index in sorted(rows)],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }


def _field(kept: Kept) -> str:
    """The list in the result that holds the items. A task wrote it: no other field of the result may be named."""
    given = "items" if kept.head is None else kept.head.field
    return given if given in _FIELDS else "items"


def read_steps(folder: Folder) -> Steps | None:
    """How far a training run got; None where there is no such file in the task's folder."""
    try:
        with open(folder.open_file((steps.FOLDER, steps.STEPS_FILE)), "rb") as file:
            return steps.read(file)
    except OSError:
        return None


def steps_shown(found: Steps) -> dict[str, int]:
    """As events and results of failed tasks have them."""
    return {"done": found.done, "total": found.total, "checkpointed": found.checkpointed}


def part_of(kept: Kept, folder: TaskFolder, url: str | None) -> PartRows:
    """
    Args:
        url: where its rows were uploaded.
    """
    counts = kept.counts
    return PartRows(done=counts.done, total=counts.total, url=url, out_dir=str(folder.path))


def export(exporter: str, wanted: dict[str, Any], kept: Kept) -> Export:
    """The export of the finished items.

    Args:
        exporter: `module:function`; see `TaskType.exporter`.
        wanted: `spec.postprocess`.

    Raises:
        Exception: what the exporter raises, where an item lacks what the export needs.
    """
    module, _, name = exporter.partition(":")
    function: Exporter = getattr(importlib.import_module(module), name)
    rows = kept.current
    path, data, said = function(wanted, [rows[index].item for index in sorted(rows)])
    return Export(PurePosixPath(path).parts, data, said)


Exporter = Callable[[dict[str, Any], Sequence[dict[str, Any]]], tuple[str, bytes, dict[str, Any]]]


def write_below(top: Folder, parts: Parts, data: bytes) -> None:
    """Write a file in a task's folder, and make the folders above it.

    Raises:
        OSError: one of them is a link, a file or a mount.
    """
    for depth in range(1, len(parts)):
        with top.below(parts[: depth - 1]) as above, contextlib.suppress(FileExistsError):
            os.mkdir(parts[depth - 1], 0o750, dir_fd=above)
    with top.below(parts[:-1]) as folder:
        os.close(write_in_task(folder, parts[-1], data))


def shown(counts: Counts) -> dict[str, int]:
    """As events and results of failed tasks have them."""
    return {"done": counts.done, "total": counts.total}


def total(all_counts: list[Counts]) -> Counts:
    """Of a task and its merged children."""
    return Counts(done=sum(each.done for each in all_counts), total=sum(each.total for each in all_counts))


def archive(kept: Kept) -> bytes:
    """ROWS_ARCHIVE with the whole rows."""
    target = io.BytesIO()
    head = [] if kept.head is None else [line(kept.head)]
    compress((*head, *(line(row) for row in kept.rows)), target)
    return target.getvalue()
