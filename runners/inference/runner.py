"""The inference runner: prompts in, answers out, on vLLM or Transformers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from runners.api import BadRequest, Context, Preparation, Runner, RunnerError
from runners.data.images import images_of
from runners.data.sources import files_ahead, load_items
from runners.gang import gang_of
from runners.inference.engine import Completion, Request, Watch
from runners.inference.engines import load_engine, parser_of, reasoning_of
from runners.inference.export import read_export
from runners.inference.identity import Identity, identity_of
from runners.inference.members import Lead, lead
from runners.inference.merge import check_agreement, failed, folder_of, read_children
from runners.inference.openai.run import is_batch, run_batch
from runners.inference.parts import (
    Part,
    blank_item,
    check_not_all_blank,
    completion_tokens,
    item_of,
    placed,
    prepare,
    result_of,
    row_keys,
)
from runners.inference.task import InferenceTask, read_document
from runners.inference.task_model import find_source, parts_ahead
from runners.inference.vllm_args import Work
from runners.models.adapters import LocalAdapter, load_adapters
from runners.models.sources import Source
from runners.rows.log import RowLog, report_rows
from runners.rows.opening import open_rows


class InferenceRunner(Runner):
    """Task type `inference`."""

    def ahead(self, ctx: Context) -> list[Preparation]:
        task = read_document(ctx, ctx.spec, "spec")
        return [*parts_ahead(ctx, task), lambda: files_ahead(ctx, ctx.spec)]

    def run(self, ctx: Context) -> dict[str, Any]:
        ctx.phase("prepare")
        task = read_document(ctx, ctx.spec, "spec")
        gang = gang_of(ctx)
        if gang is not None and gang.rank:
            from runners.inference.vllm_member import compute

            return compute(ctx, task, gang)
        with contextlib.nullcontext() if gang is None else lead(ctx, gang) as others:
            return self._run(ctx, task, others)

    def _run(self, ctx: Context, task: InferenceTask, others: Lead | None) -> dict[str, Any]:
        children = read_children(ctx)
        if is_batch(ctx.spec):
            return run_batch(ctx, task)
        parent = read_part(ctx, task, ctx.spec, "spec", task_id=None, folder=ctx.out_dir)
        parts: dict[str | None, Part] = {None: parent}
        specs: dict[str | None, tuple[dict[str, Any], str]] = {
            None: (ctx.spec, "spec"),
            **{child.task_id: (child.spec, child.where) for child in children},
        }
        refused: dict[str, dict[str, Any]] = {}
        for child in children:
            try:
                own = read_document(ctx, child.spec, child.where)
                check_agreement(task, own, child.where)
                folder = folder_of(ctx, child.task_id)
                parts[child.task_id] = read_part(
                    ctx, own, child.spec, child.where, task_id=child.task_id, folder=folder
                )
            except RunnerError as error:
                refused[child.task_id] = self._refuse(ctx, child.task_id, error)
        ctx.phase("load")
        source = find_source(ctx, task)
        adapters = load_adapters(ctx, task.model.adapters)
        identity = identity_of(ctx, task, source, adapters)
        with contextlib.ExitStack() as stack:
            batch: dict[str | None, tuple[Part, RowLog]] = {}
            for task_id, part in parts.items():
                spec, where = specs[task_id]
                try:
                    batch[task_id] = part, stack.enter_context(open_log(ctx, part, identity, spec, where))
                except BadRequest as error:
                    if task_id is None:
                        raise
                    refused[task_id] = self._refuse(ctx, task_id, error)
            logs = [log for _, log in batch.values()]
            stack.callback(report_rows, ctx, logs)
            latency_s = 0.0
            if any(log.counts.done < log.counts.total for log in logs):
                latency_s = self._generate(ctx, task, source, adapters, batch, refused, others)
            ctx.phase("save")
            results: dict[str | None, dict[str, Any]] = {}
            for task_id, (part, log) in batch.items():
                if task_id in refused:
                    continue
                results[task_id] = result_of(part, log, source, latency_s)
                if part.export is not None:
                    items = results[task_id]["items"]
                    results[task_id]["jsonl_export"] = part.export.write(ctx, part.folder, items, task_id)
        result = results.pop(None)
        if children:
            result["children"] = {
                child.task_id: refused.get(child.task_id) or results[child.task_id] for child in children
            }
        return result

    def _generate(  # noqa: PLR0917
        self,
        ctx: Context,
        task: InferenceTask,
        source: Source,
        adapters: Sequence[LocalAdapter],
        batch: dict[str | None, tuple[Part, RowLog]],
        refused: dict[str, dict[str, Any]],
        others: Lead | None,
    ) -> float:
        """Answer the items that have no row; returns the seconds that took."""
        work = work_of(((part, log.rows) for part, log in batch.values()), task)
        first = _first_image(*batch[None])
        if first is not None:
            work = msgspec.structs.replace(work, image_where=first)
        engine, texts = load_engine(ctx, task, source, adapters, work=work, lead=others)
        ctx.log.info(
            "model loaded model=%s %s", source.shown, " ".join(f"{k}={v}" for k, v in engine.describe().items())
        )
        split = reasoning_of(ctx, task, engine, texts)
        asked: list[tuple[Part, RowLog, int]] = []
        requests: list[Request] = []
        for task_id, (part, log) in batch.items():
            try:
                prepared = prepare(part, texts, engine, adapters, log.rows)
            except BadRequest as error:
                if task_id is None:
                    raise
                refused[task_id] = self._refuse(ctx, task_id, error)
                continue
            asked += [(prepared, log, index) for index in prepared.requests]
            requests += prepared.requests.values()
        ctx.phase("generate")
        since = time.monotonic()
        counts = [log.counts for _, log in batch.values()]
        watch = Watch(ctx, sum(each.total for each in counts), sum(each.done for each in counts))

        def finished(number: int, completion: Completion) -> None:
            part, log, index = asked[number]
            log.add(
                index,
                item_of(part, index, completion, texts, split),
                prompt_tokens=len(requests[number].token_ids),
                completion_tokens=completion_tokens(completion),
            )
            watch.done += 1

        engine.generate(requests, watch, finished)
        return time.monotonic() - since

    @staticmethod
    def _refuse(ctx: Context, task_id: str, error: RunnerError) -> dict[str, Any]:
        ctx.log.error("child refused child=%s error=%s", task_id, error)
        return failed(error)


def read_part(
    ctx: Context, task: InferenceTask, spec: dict[str, Any], where: str, *, task_id: str | None, folder: Path
) -> Part:
    """A task's part of the batch: its items, prompts and export.

    Raises:
        BadRequest: names the field.
    """
    items = load_items(ctx, spec, where, with_images=True)
    part = Part(
        task_id=task_id,
        folder=folder,
        items=items,
        samplings=(task.sampling,) * len(items.prompts),
        system_prompt=task.system_prompt,
        chat=task.chat,
        parser=parser_of(ctx, task),
        export=read_export(ctx, spec, where),
    )
    part.check_export(task.sampling)
    return part


def open_log(ctx: Context, part: Part, identity: Identity, spec: dict[str, Any], where: str) -> RowLog:
    """The part's row log, with the rows that stand already and those of its blank prompts.

    Raises:
        BadRequest: an item names no adapter, there is nothing to answer, or `resume` names no rows.
    """
    check_not_all_blank(part)
    keys = row_keys(part, identity)
    task_id = part.task_id or ctx.task_id
    log = open_rows(
        ctx, spec, where, part.folder, keys, lambda index, row: placed(part, index, row.item), task_id=task_id
    )
    with contextlib.ExitStack() as stack:
        stack.callback(log.close)
        if part.blank:
            ctx.log.warning("blank prompts skipped task=%s count=%d", task_id, len(part.blank))
        for index in sorted(part.blank - log.rows.keys()):
            log.add(index, blank_item(part, index))
        stack.pop_all()
    return log


def _first_image(part: Part, log: RowLog) -> str | None:
    """The name of the first item with an image that has no answer yet."""
    named = zip(part.items.prompts, part.items.wheres, strict=True)
    return next((where for i, (prompt, where) in enumerate(named) if i not in log.rows and images_of(prompt)), None)


def work_of(parts: Iterable[tuple[Part, Container[int]]], task: InferenceTask) -> Work:
    """Upper bounds of the work.

    Args:
        parts: each with the items that are answered already.
    """
    asked = [prompt for part, done in parts for index, prompt in enumerate(part.asked) if index not in done]
    texts = (prompt if isinstance(prompt, str) else "".join(turn.text for turn in prompt) for prompt in asked)
    counts = [len(images_of(prompt)) for prompt in asked]
    return Work(
        prompts=len(asked),
        prompt_bytes=sum(len(text.encode(errors="replace")) for text in texts),
        new_tokens=task.sampling.max_tokens,
        copies=task.sampling.n,
        images=sum(counts),
        images_of_one=max(counts, default=0),
    )
