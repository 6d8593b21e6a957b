"""Opens the row log of a task or of a merged child, with the rows that stand already."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flowmesh.messages.rows import Row, document_key
from runners.api import Context
from runners.rows.log import RowLog
from runners.rows.resume import read_resume, starts_anew

Place = Callable[[int, Row], dict[str, Any]]
"""A kept row's entry in this task's result, for an item."""


def open_rows(  # noqa: PLR0917
    ctx: Context,
    spec: dict[str, Any],
    where: str,
    folder: Path,
    keys: Sequence[str],
    place: Place,
    *,
    task_id: str,
    field: str = "items",
    stands: Callable[[Row], bool] = lambda _: True,
) -> RowLog:
    """The row log in `folder`, with the rows of earlier attempts and of `resume`.

    Args:
        keys: of the task's items, in order; see `RowLog`.
        field: the list in the result that holds the items.
        task_id: the task's, or the merged child's.
        stands: whether a row may be taken over, as far as its key does not say it.

    Raises:
        BadRequest: `resume` names no rows.
        RunnerError: another process writes the log, or the server of `resume` is unreachable.
    """
    others = read_resume(ctx, spec, where)
    log = RowLog(folder, keys, field=field, fresh=starts_anew(spec), document=document_key(spec))
    with contextlib.ExitStack() as stack:
        stack.callback(log.close)
        log.take(others, place, stands)
        if log.bad_lines:
            ctx.log.warning("rows with a wrong checksum are computed again task=%s count=%d", task_id, log.bad_lines)
        if log.unfit:
            ctx.log.warning(
                "rows of %s.resume are not of this document's items, model or options, and not taken task=%s rows=%d "
                "of %d", where, task_id, log.unfit, len(others),
            )  # fmt: skip
        if log.reused:
            ctx.log.info("rows that stand already task=%s rows=%d of %d", task_id, log.reused, len(keys))
        stack.pop_all()
    return log
