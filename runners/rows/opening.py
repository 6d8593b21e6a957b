"""Opens the row log of a task or of a merged child, with the rows that stand already."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flowmesh.messages.rows import Row, document_key
from flowmesh.redaction import Redactor, in_document
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
    stands: Callable[[int, Row], bool] = lambda *_: True,
) -> RowLog:
    """The row log in `folder`, with the rows of earlier attempts and of `resume`.

    Args:
        keys: of the task's items, in order; see `RowLog`.
        field: the list in the result that holds the items.
        task_id: the task's, or the merged child's.
        stands: see `RowLog.take`.

    Raises:
        BadRequest: `resume` names no rows.
        RunnerError: another process writes the log, or the server of `resume` is unreachable.
    """
    others = read_resume(ctx, spec, where)
    secrets = list(in_document(ctx.job.task, os.environ))
    redact = Redactor(secrets, exact=True).deep if secrets else _as_it_is  # as the result's
    log = RowLog(folder, keys, field=field, fresh=starts_anew(spec), document=document_key(spec), redact=redact)
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
        if log.gone:
            ctx.log.warning("rows whose files are not here are computed again task=%s rows=%d", task_id, log.gone)
        if log.reused:
            ctx.log.info("rows that stand already task=%s rows=%d of %d", task_id, log.reused, len(keys))
        stack.pop_all()
    return log


def _as_it_is(item: dict[str, Any]) -> dict[str, Any]:
    return item
