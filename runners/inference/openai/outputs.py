"""`output.jsonl` and `errors.jsonl`, written from the row log in the order of the batch file."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.messages.rows import ROWS_FILE, Row, scan

OUTPUT, ERRORS = "artifacts/output.jsonl", "artifacts/errors.jsonl"


class Written(msgspec.Struct, frozen=True):
    """Lines in each file."""

    completed: int
    failed: int


def write_outputs(folder: Path, total: int) -> Written:
    """Write both files below a task's folder. Of the answers, one at a time is in memory.

    `errors.jsonl` is there only if a line has an error.

    Args:
        total: lines of the batch.
    """
    return write_lines(folder, _in_order(folder / ROWS_FILE, total))


def write_lines(folder: Path, lines: Iterable[dict[str, Any]]) -> Written:
    """Write lines, as `answers` makes them, into both files."""
    (folder / OUTPUT).parent.mkdir(parents=True, exist_ok=True)
    targets = [folder / OUTPUT, folder / ERRORS]
    scratch = [target.with_name(f".{target.name}.partial") for target in targets]
    counts = [0, 0]
    with scratch[0].open("wb") as output, scratch[1].open("wb") as errors:
        for line in lines:
            failed = line.get("error") is not None
            (errors if failed else output).write(msgspec.json.encode(line) + b"\n")
            counts[failed] += 1
    scratch[0].rename(targets[0])
    if counts[1]:
        scratch[1].rename(targets[1])
    else:
        scratch[1].unlink()
        targets[1].unlink(missing_ok=True)  # of an earlier attempt
    return Written(*counts)


def first_errors(folder: Path, count: int) -> list[str]:
    """The messages of the first lines of `errors.jsonl`."""
    with (folder / ERRORS).open("rb") as file:
        return [msgspec.json.decode(line)["error"]["error"]["message"] for line in itertools.islice(file, count)]


def _in_order(path: Path, total: int) -> Iterator[dict[str, Any]]:
    """The items of a row file by their index, read by their places in the file."""
    starts, lengths = array("q", [-1]) * total, array("q", [0]) * total
    with path.open("rb") as file:
        for row, start, length in scan(file):
            if isinstance(row, Row) and row.index is not None and row.index < total:
                starts[row.index], lengths[row.index] = start, length
        for start, length in zip(starts, lengths, strict=True):
            if start < 0:
                continue  # the task ended before it was answered
            file.seek(start)
            yield _item(file.read(length))


def _item(data: bytes) -> dict[str, Any]:
    item: dict[str, Any] = msgspec.json.decode(data)["row"]["item"]
    return item
