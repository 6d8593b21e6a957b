"""The inference runner: prompts in, answers out, on vLLM or Transformers."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runners.api import BadRequest, Context, Runner, RunnerError
from runners.data.sources import load_items
from runners.inference.engine import Completion, Watch
from runners.inference.engines import load_engine
from runners.inference.export import read_export
from runners.inference.merge import check_agreement, failed, folder_of, read_children
from runners.inference.parts import Part, answer, prepare
from runners.inference.task import InferenceTask, read_document
from runners.inference.vllm_args import Work
from runners.models.adapters import load_adapters
from runners.models.checkpoints import load_checkpoint, model_root
from runners.models.sources import Source, local_folder, resolve_identifier


class InferenceRunner(Runner):
    """Task type `inference`."""

    def run(self, ctx: Context) -> dict[str, Any]:
        ctx.phase("prepare")
        task = read_document(ctx, ctx.spec, "spec")
        children = read_children(ctx)
        parent = read_part(ctx, task, ctx.spec, "spec", task_id=None, folder=ctx.out_dir)
        parts: dict[str | None, Part] = {None: parent}
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
        work = work_of(parts.values(), task)
        engine, texts = load_engine(ctx, task, source, adapters, work=work)
        ctx.log.info(
            "model loaded model=%s %s", source.shown, " ".join(f"{k}={v}" for k, v in engine.describe().items())
        )
        prepared: dict[str | None, Part] = {}
        for task_id, part in parts.items():
            try:
                prepared[task_id] = prepare(part, texts, engine, adapters)
                if part.blank:
                    ctx.log.warning("blank prompts skipped task=%s count=%d", task_id or ctx.task_id, len(part.blank))
            except BadRequest as error:
                if task_id is None:
                    raise
                refused[task_id] = self._refuse(ctx, task_id, error)
        ctx.phase("generate")
        requests = [request for part in prepared.values() for request in part.requests]
        since = time.monotonic()
        completions = engine.generate(requests, task.sampling, Watch(ctx, len(requests), task.sampling.n))
        latency_s = time.monotonic() - since
        ctx.phase("save")
        results: dict[str | None, dict[str, Any]] = {}
        for task_id, own_completions in split(prepared, completions).items():
            part = prepared[task_id]
            results[task_id] = answer(part, own_completions, texts, source, latency_s)
            if part.export is not None:
                items = results[task_id]["items"]
                results[task_id]["jsonl_export"] = part.export.write(ctx, part.folder, items, task_id)
        result = results.pop(None)
        if children:
            result["children"] = {
                child.task_id: refused.get(child.task_id) or results[child.task_id] for child in children
            }
        return result

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
    part = Part(
        task_id=task_id,
        folder=folder,
        system_prompt=task.system_prompt,
        chat=task.chat,
        items=load_items(ctx, spec, where),
        export=read_export(ctx, spec, where),
    )
    part.check_export(task.sampling)
    return part


def work_of(parts: Iterable[Part], task: InferenceTask) -> Work:
    """Upper bounds of the work."""
    asked = [prompt for part in parts for prompt in part.asked]
    texts = (prompt if isinstance(prompt, str) else "".join(turn.content for turn in prompt) for prompt in asked)
    return Work(
        prompts=len(asked),
        prompt_bytes=sum(len(text.encode(errors="replace")) for text in texts),
        new_tokens=task.sampling.max_tokens,
        copies=task.sampling.n,
    )


def find_source(ctx: Context, task: InferenceTask) -> Source:
    """The task's weights: its checkpoint, else `model.source`.

    Raises:
        BadRequest: not found.
        RunnerError: their server is unreachable.
    """
    given = task.model.source
    if task.checkpoint is None:
        where = "spec.model.source.identifier"
        return resolve_identifier(ctx, given.identifier or "", given.revision, where)
    loaded = load_checkpoint(ctx, task.checkpoint)
    folder = local_folder(ctx, model_root(loaded.folder, loaded.where), loaded.shown, loaded.where)
    tokenizer = None
    if given.identifier is not None and not has_tokenizer(folder):
        tokenizer = resolve_identifier(ctx, given.identifier, given.revision, "spec.model.source.identifier").path
    return Source(path=str(folder), revision=None, shown=loaded.shown, where=loaded.where, tokenizer=tokenizer)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def split(parts: dict[str | None, Part], completions: list[Completion]) -> dict[str | None, list[Completion]]:
    """Each part's completions of the shared batch."""
    answers: dict[str | None, list[Completion]] = {}
    at = 0
    for task_id, part in parts.items():
        answers[task_id] = completions[at : at + len(part.requests)]
        at += len(part.requests)
    return answers
