"""The score runner: pairs of texts in, scores out; or documents in the order of their scores (rerank)."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from flowmesh.messages.rows import Row
from runners.api import BadRequest, Context, MissingDependency, Preparation, Runner, RunnerError
from runners.data.sources import files_ahead
from runners.embedding.load import model_digest
from runners.inference.merge import failed, folder_of, read_children
from runners.models.sources import Source
from runners.rows.keys import key_of
from runners.rows.log import RowLog, report_rows
from runners.rows.opening import open_rows
from runners.scoring.ranking import item_of
from runners.scoring.scorer import SECTION, Pair, Scorer, load_scorer
from runners.scoring.task import Group, ScoreTask, read_groups, read_score
from runners.vectors.part import counts_of
from runners.vectors.source import find_source

if TYPE_CHECKING:
    from runners.scoring.vllm_scorer import VllmScorer

COUNTED = 256
MOST_LISTED = 200


class Part(msgspec.Struct, frozen=True):
    """One task's pairs. Each merged task has one part."""

    task_id: str | None
    folder: Path
    task: ScoreTask
    groups: list[Group]
    pairs: list[tuple[int, int]]
    """Of each row: its group and its document's number there."""

    def pair(self, row: int) -> Pair:
        group, document = self.pairs[row]
        return self.groups[group].query, self.groups[group].documents[document]


class Wanted(msgspec.Struct):
    """A pair, and the rows that have it."""

    pair: Pair
    where: str
    rows: list[tuple[RowLog, int, int, int]]
    """Log, row, group and document."""
    tokens: int = 0


class ScoreRunner(Runner):
    """Task type `score`."""

    def ahead(self, ctx: Context) -> list[Preparation]:
        task = read_score(ctx, ctx.spec)
        return [lambda: _source(ctx, task).folders, lambda: files_ahead(ctx, ctx.spec)]

    def run(self, ctx: Context) -> dict[str, Any]:
        ctx.phase("prepare")
        if importlib.util.find_spec("sentence_transformers") is None:
            raise MissingDependency("sentence_transformers", extra="rag")
        task = read_score(ctx, ctx.spec)
        parts: dict[str | None, Part] = {None: read_part(ctx, task, ctx.spec, "spec", None, ctx.out_dir)}
        places: dict[str | None, tuple[dict[str, Any], str]] = {None: (ctx.spec, "spec")}
        children = read_children(ctx)
        refused: dict[str, dict[str, Any]] = {}
        for child in children:
            try:
                own = read_score(ctx, child.spec, child.where)
                check_agreement(task, own, child.where)
                folder = folder_of(ctx, child.task_id)
                parts[child.task_id] = read_part(ctx, own, child.spec, child.where, child.task_id, folder)
                places[child.task_id] = child.spec, child.where
            except RunnerError as error:
                refused[child.task_id] = _refuse(ctx, child.task_id, error)
        ctx.phase("load")
        source = _source(ctx, task)
        digest = identity(task, source)
        with contextlib.ExitStack() as stack:
            logs: dict[str | None, RowLog] = {}
            for task_id, part in parts.items():
                try:
                    logs[task_id] = stack.enter_context(open_log(ctx, part, digest, *places[task_id]))
                except BadRequest as error:
                    if task_id is None:
                        raise
                    refused[task_id] = _refuse(ctx, task_id, error)
            stack.callback(report_rows, ctx, list(logs.values()))
            about: dict[str, Any] = {"model": source.shown}
            latency_s = 0.0
            if any(log.counts.done < log.counts.total for log in logs.values()):
                scorer = load(ctx, task, source)
                about = scorer.describe()
                check_order(scorer, [parts[task_id] for task_id in logs])
                ctx.phase("score")
                since = time.monotonic()
                score_missing(ctx, scorer, [(parts[task_id], log) for task_id, log in logs.items()])
                latency_s = time.monotonic() - since
            ctx.phase("save")
            results = {task_id: _result(ctx, parts[task_id], log, about, latency_s) for task_id, log in logs.items()}
        result = results.pop(None)
        if children:
            result["children"] = {
                child.task_id: refused.get(child.task_id) or results[child.task_id] for child in children
            }
        return result


def _source(ctx: Context, task: ScoreTask) -> Source:
    return find_source(ctx, task.options.model, task.options.revision, task.model, task.checkpoint, SECTION)


def load(ctx: Context, task: ScoreTask, source: Source) -> Scorer | VllmScorer:
    """The task's cross-encoder on its engine; see `load_scorer`."""
    if task.engine != "vllm":
        return load_scorer(ctx, task, source)
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependency("vllm", "spec.engine")
    from runners.scoring.vllm_scorer import load_vllm

    return load_vllm(ctx, task, source)


def read_part(  # noqa: PLR0917
    ctx: Context, task: ScoreTask, spec: dict[str, Any], where: str, task_id: str | None, folder: Path
) -> Part:
    """A task's part of the batch. Raises BadRequest, naming the field or the row."""
    groups = read_groups(ctx, task, spec, where)
    pairs = [(number, each) for number, group in enumerate(groups) for each in range(len(group.documents))]
    return Part(task_id, folder, task, groups, pairs)


def identity(task: ScoreTask, source: Source) -> str:
    """Digest of what a pair's score depends on."""
    names = ("prompt", "prompt_name", "max_seq_length", "activation", "dtype")
    return key_of(model_digest(source), {name: getattr(task.options, name) for name in names})


def open_log(ctx: Context, part: Part, model: str, spec: dict[str, Any], where: str) -> RowLog:
    """The part's row log, with a row for each pair."""
    keys = [key_of("score", *part.pair(row), model) for row in range(len(part.pairs))]

    def place(index: int, row: Row) -> dict[str, Any]:
        group, document = part.pairs[index]
        return {**row.item, "index": index, "group": group, "document": document}

    def stands(_: int, row: Row) -> bool:
        return isinstance(row.item.get("score"), float | list)

    task_id = part.task_id or ctx.task_id
    return open_rows(ctx, spec, where, part.folder, keys, place, task_id=task_id, stands=stands)


def check_agreement(parent: ScoreTask, child: ScoreTask, where: str) -> None:
    """Raises BadRequest, naming the section, if a child is scored differently from its parent."""
    free = ("documents_column", "top_n", "return_documents")
    for name in parent.options.__struct_fields__:
        if name not in free and getattr(parent.options, name) != getattr(child.options, name):
            raise BadRequest(f"{where}.score.{name}: differs from the task that it is merged into; send it by itself")
    for field, name in (
        ("model", "model"),
        ("checkpoint", "checkpoint"),
        ("engine", "engine"),
        ("on_cpu", "enforce_cpu"),
    ):
        if getattr(parent, field) != getattr(child, field):
            raise BadRequest(f"{where}.{name}: differs from the task that it is merged into; send it by itself")


def check_order(scorer: Scorer | VllmScorer, parts: Sequence[Part]) -> None:
    """Raises BadRequest where several numbers are to be an order of documents, or a single one a share of several."""
    if scorer.labels > 1 and any(not group.is_pair for part in parts for group in part.groups):
        raise BadRequest(
            f"{SECTION}.model: has {scorer.labels} labels, so documents have no order; score `pairs`, or name a "
            "model with one label"
        )
    if scorer.labels == 1 and parts[0].task.options.activation == "softmax":
        raise BadRequest(f"{SECTION}.activation: softmax is over several labels, and the model has one; use sigmoid")


def score_missing(ctx: Context, scorer: Scorer | VllmScorer, parts: Sequence[tuple[Part, RowLog]]) -> None:
    """Score the pairs that have no row, each different pair once.

    Raises:
        BadRequest: a pair is too long and may not be cut, or its score is NaN or infinity.
        Cancelled: the node asked the task to stop.
    """
    found: dict[Pair, Wanted] = {}
    for part, log in parts:
        for row, (group, document) in enumerate(part.pairs):
            if row not in log.rows:
                wanted = found.setdefault(part.pair(row), Wanted(part.pair(row), part.groups[group].where, []))
                wanted.rows.append((log, row, group, document))
    total = sum(log.counts.total for _, log in parts)
    done = sum(log.counts.done for _, log in parts)
    waiting, longest = list(found.values()), scorer.max_tokens
    truncate = parts[0][0].task.options.truncate
    for first in range(0, len(waiting), COUNTED):
        ctx.progress(done, total, "pairs")
        some = waiting[first : first + COUNTED]
        for each, tokens in zip(some, scorer.count([each.pair for each in some]), strict=True):
            each.tokens = tokens
            if longest is not None and tokens > longest and truncate is False:
                raise BadRequest(
                    f"{each.where}: a pair has {tokens} tokens, and the model uses {longest}; shorten it, or leave "
                    f"{SECTION}.truncate out"
                )
    lengths = [each.tokens if longest is None else min(each.tokens, longest) for each in waiting]
    for batch in scorer.batches(lengths):
        ctx.progress(done, total, "pairs")
        scores = scorer.score([waiting[number].pair for number in batch])
        broken = ""
        for number, score in zip(batch, scores, strict=True):
            each = waiting[number]
            if not np.isfinite(score).all():
                broken = broken or each.where
                continue
            value = float(score[0]) if scorer.labels == 1 else [float(one) for one in score]
            marks = {"truncated": True, "tokens_given": each.tokens} if lengths[number] < each.tokens else {}
            for log, row, group, document in each.rows:
                item = {"index": row, "group": group, "document": document, "score": value, "tokens": lengths[number]}
                log.add(row, item | marks, prompt_tokens=lengths[number])
                done += 1
        if broken:
            raise BadRequest(f"{broken}: {scorer.not_finite()}")
    ctx.progress(done, total, "pairs")


def _result(ctx: Context, part: Part, log: RowLog, about: dict[str, Any], latency_s: float) -> dict[str, Any]:
    counts, rows = log.counts, [log.rows[index].item for index in range(len(part.pairs))]
    cut = counts_of(rows, MOST_LISTED).get("truncated")
    if cut is not None:
        ctx.log.warning("pairs truncated task=%s count=%d", part.task_id or ctx.task_id, cut["count"])
    by_group: list[list[dict[str, Any]]] = [[] for _ in part.groups]
    for row in rows:
        by_group[row["group"]].append(row)
    named = sorted({row["group"] for row in rows if row.get("truncated")})
    tokens = sum(row.prompt_tokens for row in log.rows.values())
    return {
        "ok": True,
        "model": about["model"],
        "score": about,
        "items": [
            item_of(index, group, of_group, part.task.options)
            for index, (group, of_group) in enumerate(zip(part.groups, by_group, strict=True))
        ],
        **({} if cut is None else {"truncated": {"count": cut["count"], "items": named[:MOST_LISTED]}}),
        **({"rows": msgspec.to_builtins(counts)} if counts.reused else {}),
        "usage": {
            "prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens, "num_requests": len(rows),
            "latency_sec": round(latency_s, 6),
        },
    }  # fmt: skip


def _refuse(ctx: Context, task_id: str, error: RunnerError) -> dict[str, Any]:
    ctx.log.error("child refused child=%s error=%s", task_id, error)
    return failed(error)
