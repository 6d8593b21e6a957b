"""What a failed task had finished: the rows that its row log holds, in its result and as a file to go on from."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from flowmesh.files.folder import Folder
from flowmesh.messages.rows import ROWS_FILE, Counts, Kept, compress, line, read


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
        kept.head.field if kept.head else "items": [rows[index].item for index in sorted(rows)],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }


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
