"""What a failed task had finished: the rows that its row log holds, in its result and as a file to go on from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from flowmesh.messages.rows import ROWS_ARCHIVE, ROWS_FILE, Counts, Kept, compress, line, read
from flowmesh.processes.safe_folder import open_folder
from flowmesh.results.safe_files import PARTIAL, open_regular


def has_rows(folder: Path) -> bool:
    """Whether a task's folder has a row log."""
    with contextlib.suppress(OSError), _opened(folder):
        return True
    return False


def read_rows(folder: Path) -> Kept:
    """The whole rows in a task's folder; empty where there are none, or the file cannot be read."""
    with contextlib.suppress(OSError), _opened(folder) as file:
        return read(file)
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


def write_archive(folder: Path, kept: Kept) -> Path:
    """Write ROWS_ARCHIVE with the whole rows beside the row log.

    Raises:
        OSError: it cannot be written.
    """
    at = open_folder(folder)
    try:
        partial = f".{ROWS_ARCHIVE}{PARTIAL}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial, dir_fd=at)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(partial, flags, 0o640, dir_fd=at), "wb") as file:
            head = [] if kept.head is None else [line(kept.head)]
            compress((*head, *(line(row) for row in kept.rows)), file)
        os.replace(partial, ROWS_ARCHIVE, src_dir_fd=at, dst_dir_fd=at)
    finally:
        os.close(at)
    return folder / ROWS_ARCHIVE


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[IO[bytes]]:
    at = open_folder(folder)
    try:
        with open(open_regular(ROWS_FILE, folder=at), "rb") as file:
            yield file
    finally:
        os.close(at)
