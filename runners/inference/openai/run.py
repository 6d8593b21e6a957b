"""Runs a batch file: one engine for all of its lines.

The file is read twice: first for the keys of its lines and their errors, then for their prompts, some thousand lines at
a time. So neither prompts, tokens nor answers of all lines are in memory at once. Every line has a row in the row log:
its line of `output.jsonl`, or of `errors.jsonl`.
"""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import msgspec

from flowmesh.messages.rows import document_key
from runners.api import BadRequest, Context
from runners.data.openai_batch import TYPE, BatchFile, OpenAIBatch, opened
from runners.inference.openai.answers import refused
from runners.inference.openai.batch_rows import Answered, add_line, lean
from runners.inference.openai.file_lines import LineReader, Lines
from runners.inference.openai.generate import Generation
from runners.inference.openai.lines import EMBEDDINGS, LineFault, read_line
from runners.inference.openai.outputs import ERRORS, OUTPUT, first_errors, write_lines, write_outputs
from runners.inference.task import InferenceTask
from runners.models.sources import Source
from runners.rows.log import RowLog, report_rows
from runners.rows.resume import read_resume, starts_anew

SHOWN_ERRORS = 5


class Kind(Protocol):
    """What the lines of a file ask of the model: text, or embeddings."""

    source: Source

    @property
    def reader(self) -> LineReader[Any]:
        """Reads lines; those of the other kind are faults."""

    def answer(self, lines: Lines[Any], log: RowLog) -> Answered:
        """Answer the lines that have no row, and write their rows."""


def is_batch(spec: dict[str, Any]) -> bool:
    """Whether a task's data are a batch file."""
    data = spec.get("data")
    return isinstance(data, dict) and data.get("type") == TYPE


def run_batch(ctx: Context, task: InferenceTask) -> dict[str, Any]:
    """Answer the lines of `spec.data`; returns the task's result.

    Raises:
        BadRequest: the file is no batch file, no line can be served, or as for other inference tasks.
    """
    with opened(ctx, ctx.spec["data"], "spec.data") as (data, file):
        file.check()
        ctx.phase("load")
        given = data.served_model_name or ()
        names = (given,) if isinstance(given, str) else given
        kind: Kind
        if wants_embeddings(data, file):
            from runners.inference.openai.embed import Embeddings

            kind = Embeddings(ctx, task, names)
        else:
            kind = Generation(ctx, task, names)
        return _run(ctx, kind, Lines(ctx, file, kind.reader))


def wants_embeddings(data: OpenAIBatch, file: BatchFile) -> bool:
    """Whether the task's model is used as an embedding model: as `endpoint` says, else as the first line that can be
    read has its url."""
    if data.endpoint is not None:
        return data.endpoint == EMBEDDINGS
    for _, line in file.lines():
        with contextlib.suppress(LineFault):
            return read_line(line).url == EMBEDDINGS
    return False


def _run(ctx: Context, kind: Kind, lines: Lines[Any]) -> dict[str, Any]:
    total = len(lines.keys)
    if lines.keys and len(lines.faults) == total:
        errors = [refused(fault, where) for where, fault in lines.faults.values()]
        write_lines(ctx.out_dir, errors)
        raise BadRequest(f"no line can be served; the first error is {errors[0]['error']['error']['message']}")
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(
            RowLog(ctx.out_dir, lines.keys, fresh=starts_anew(ctx.spec), document=document_key(ctx.spec))
        )
        log.take(read_resume(ctx, ctx.spec), lambda index, row: {**row.item, "custom_id": lines.custom_ids[index]})
        for index, row in log.rows.items():
            log.rows[index] = lean(row)
        stack.callback(report_rows, ctx, [log])
        stack.push(lambda kind, *_: _write_early(ctx, total) if kind is not None else None)
        if log.reused:
            ctx.log.info("rows that stand already task=%s rows=%d of %d", ctx.task_id, log.reused, total)
        for index, (where, fault) in lines.faults.items():
            add_line(log, index, refused(fault, where), again=True)
        answered = Answered(0.0)
        if log.counts.done < total:
            answered = kind.answer(lines, log)
        ctx.phase("save")
        return _result(ctx, kind.source, log, answered)


def _result(ctx: Context, source: Source, log: RowLog, work: Answered) -> dict[str, Any]:
    """The task's result (docs/tasks.md), when all lines have their row."""
    counts = log.counts
    written = write_outputs(ctx.out_dir, counts.total)
    prompt_tokens = sum(row.prompt_tokens for row in log.rows.values())
    answered = sum(row.completion_tokens for row in log.rows.values())
    result: dict[str, Any] = {
        "ok": True,
        "model": source.shown,
        "request_counts": {"total": counts.total, "completed": written.completed, "failed": written.failed},
        "output_file": _file(ctx, OUTPUT, written.completed, "output_file"),
    }
    if written.failed:
        first = first_errors(ctx.out_dir, SHOWN_ERRORS)
        if not written.completed:
            raise BadRequest(f"no line can be served; the first error is {first[0]}")
        result["error_file"] = _file(ctx, ERRORS, written.failed, "error_file")
        result["first_errors"] = first
        ctx.log.warning("%d of %d lines have an error: %s", written.failed, counts.total, first[0])
    return {
        **result,
        **work.fields,
        **({"rows": msgspec.to_builtins(counts)} if counts.reused else {}),
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": answered,
            "total_tokens": prompt_tokens + answered,
            "num_requests": written.completed,
            "latency_sec": round(work.latency_s, 6),
        },
    }


def _file(ctx: Context, relative: str, lines: int, field: str) -> dict[str, Any]:
    """An entry in the shape of `jsonl_export`'s."""
    ctx.upload(relative, field)
    path = str(ctx.out_dir / relative)
    return {"path": path, "worker_path": path, "relative_path": relative, "record_count": lines}


def _write_early(ctx: Context, total: int) -> None:
    """The lines that are finished, of a task that ends before all are."""
    try:
        write_outputs(ctx.out_dir, total)
    except OSError as error:
        ctx.log.warning("output of the finished lines not written: %s", error)
