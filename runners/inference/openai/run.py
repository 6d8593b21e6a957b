"""Runs a batch file: one engine for all of its lines, each with sampling of its own.

The file is read twice: first for the keys of its lines and their errors, then for their prompts, some thousand lines at
a time. So neither prompts, tokens nor answers of all lines are in memory at once. Every line has a row in the row log:
its line of `output.jsonl`, or of `errors.jsonl`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from flowmesh.messages.rows import Row, document_key
from runners.api import BadRequest, Context
from runners.data.openai_batch import TYPE, OpenAIBatch, opened
from runners.inference.engine import Completion, Request, Watch
from runners.inference.engines import load_engine, parser_of, reasoning_of
from runners.inference.identity import identity_of
from runners.inference.openai.answers import Answers, refused, served
from runners.inference.openai.bodies import DEFAULTS, ChatBody, Defaults
from runners.inference.openai.file_lines import Lines
from runners.inference.openai.lines import LineFault
from runners.inference.openai.model_defaults import ends_of_model, model_defaults
from runners.inference.openai.outputs import ERRORS, OUTPUT, first_errors, write_lines, write_outputs
from runners.inference.openai.prompts import Prompts, template_arguments
from runners.inference.openai.requests import Asked, Reader, requests_of
from runners.inference.parts import completion_tokens
from runners.inference.task import InferenceTask
from runners.inference.task_model import find_source
from runners.models.adapters import LocalAdapter, load_adapters
from runners.models.sources import Source
from runners.rows.keys import key_of
from runners.rows.log import RowLog, report_rows
from runners.rows.resume import read_resume, starts_anew

WINDOW_LINES = 4096
WINDOW_TOKENS = 8_000_000
"""Limits of what is in memory at once: of lines, and of the tokens of their prompts (0.3 GB as Python's numbers)."""
SHOWN_ERRORS = 5


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
        source = find_source(ctx, task)
        adapters = load_adapters(ctx, task.model.adapters)
        identity = identity_of(ctx, task, source, adapters)
        defaults = Defaults(task_defaults(ctx), model_defaults(ctx, task, source))
        reader = Reader(names_of(data, source), identity.digests, defaults, identity.model, parser_of(ctx, task))
        lines = Lines(ctx, file, reader)
        return _run(ctx, task, source, adapters, lines)


def names_of(data: OpenAIBatch, source: Source) -> Sequence[str]:
    """The names of the task's model; the first one is in the answers."""
    given = data.served_model_name or ()
    return tuple(dict.fromkeys([*((given,) if isinstance(given, str) else given), source.shown]))


def task_defaults(ctx: Context) -> dict[str, Any]:
    """What `spec.inference` says for lines that leave it out."""
    given = {name: value for name, value in (ctx.spec.get("inference") or {}).items() if value is not None}
    found = {name: value for name, value in given.items() if name in DEFAULTS}
    if given.get("max_new_tokens") is not None:
        found["max_tokens"] = given["max_new_tokens"]
    if given.get("do_sample") is False:
        found["temperature"] = 0.0
    return found


def _run(
    ctx: Context, task: InferenceTask, source: Source, adapters: Sequence[LocalAdapter], lines: Lines
) -> dict[str, Any]:
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
            log.rows[index] = _lean(row)
        stack.callback(report_rows, ctx, [log])
        stack.push(lambda kind, *_: _write_early(ctx, total) if kind is not None else None)
        if log.reused:
            ctx.log.info("rows that stand already task=%s rows=%d of %d", ctx.task_id, log.reused, total)
        for index, (where, fault) in lines.faults.items():
            _add(log, index, refused(fault, where), again=True)
        latency_s = 0.0
        if log.counts.done < total:
            latency_s = _Batch(ctx, task, source, adapters, lines, log).run()
        ctx.phase("save")
        return _result(ctx, source, log, latency_s)


def _add(log: RowLog, index: int, item: dict[str, Any], **fields: Any) -> None:
    row = log.add(index, item, **fields)
    log.rows[index] = _lean(row)


def _lean(row: Row) -> Row:
    """A row whose answer is in the file only."""
    return msgspec.structs.replace(row, item={})


def _result(ctx: Context, source: Source, log: RowLog, latency_s: float) -> dict[str, Any]:
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
        **({"rows": msgspec.to_builtins(counts)} if counts.reused else {}),
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": answered,
            "total_tokens": prompt_tokens + answered,
            "num_requests": written.completed,
            "latency_sec": round(latency_s, 6),
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


class _Batch:
    """The lines of one task that have no answer yet."""

    def __init__(  # noqa: PLR0917
        self,
        ctx: Context,
        task: InferenceTask,
        source: Source,
        adapters: Sequence[LocalAdapter],
        lines: Lines,
        log: RowLog,
    ) -> None:
        self._ctx = ctx
        self._lines = lines
        self._log = log
        self._adapters = adapters
        self._engine, self._texts = load_engine(ctx, task, source, adapters, work=lines.work_besides(log.rows))
        shown = self._engine.describe()
        ctx.log.info("model loaded model=%s %s", source.shown, " ".join(f"{k}={v}" for k, v in shown.items()))
        self._answers = Answers(
            self._texts,
            ends_of_model(source),
            reasoning_of(ctx, task, self._engine, self._texts),
            f"flowmesh-{shown.get('engine', '')}-{key_of(shown)[:8]}",
        )
        self._prompts = Prompts(self._texts)

    def run(self) -> float:
        """Answer them; returns the seconds that took."""
        self._ctx.phase("generate")
        since = time.monotonic()
        counts = self._log.counts
        watch = Watch(self._ctx, counts.total, counts.done)
        done = frozenset(self._log.rows)
        for window in self._windows(done, watch):
            self._generate(window, watch)
        return time.monotonic() - since

    def _windows(self, done: frozenset[int], watch: Watch) -> Iterator[list[tuple[int, Asked, list[Request]]]]:
        window: list[tuple[int, Asked, list[Request]]] = []
        tokens = 0
        for index, where, asked in self._lines.asked(done):
            try:
                requests = requests_of(asked, self._prompts, self._engine, self._texts, self._adapters)
            except LineFault as fault:
                fault.custom_id = asked.line.custom_id
                _add(self._log, index, refused(fault, where), again=True)
                watch.done += 1
                continue
            window.append((index, asked, requests))
            tokens += sum(len(each.token_ids) for each in requests)
            if len(window) >= WINDOW_LINES or tokens >= WINDOW_TOKENS:
                yield window
                window, tokens = [], 0
        if window:
            yield window

    def _generate(self, window: list[tuple[int, Asked, list[Request]]], watch: Watch) -> None:
        requests = [(at, number) for at, (_, _, own) in enumerate(window) for number in range(len(own))]
        answers: dict[int, dict[int, Completion]] = {}

        def finished(position: int, completion: Completion) -> None:
            at, number = requests[position]
            found = answers.setdefault(at, {})
            found[number] = completion
            if len(found) == len(window[at][2]):
                self._finish(window[at], [found[each] for each in sorted(found)])
                del answers[at]
                watch.done += 1

        self._engine.generate([window[at][2][number] for at, number in requests], watch, finished)

    def _finish(self, entry: tuple[int, Asked, list[Request]], completions: Sequence[Completion]) -> None:
        index, asked, requests = entry
        prompts = [each.token_ids for each in requests]
        if isinstance(asked.body, ChatBody):
            shows = asked.body.include_reasoning is not False
            body = self._answers.chat(
                asked.model, prompts[0], asked.sampling, completions[0], template_arguments(asked.body),
                with_reasoning=shows,
            )  # fmt: skip
        else:
            body = self._answers.completion(asked.model, prompts, asked.sampling, completions)
        _add(
            self._log, index, served(asked.line.custom_id, body),
            prompt_tokens=sum(map(len, prompts)), completion_tokens=sum(map(completion_tokens, completions)),
        )  # fmt: skip
