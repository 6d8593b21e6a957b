"""The rag runner: finds passages for queries, and generates answers from them if the task asks for it."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec

from runners.api import BadRequest, Context, MissingDependency, Preparation, Runner, RunnerError
from runners.data.sources import load_items
from runners.inference.merge import read_children
from runners.rag.batch import Batch
from runners.rag.merge import check_agreement, failed
from runners.rag.rows import Queries, usage
from runners.rag.task import RagTask, check_query, read_rag
from runners.rows.log import report_rows


class RagRunner(Runner):
    """Task type `rag`."""

    def ahead(self, ctx: Context) -> list[Preparation]:
        from runners.rag.ahead import parts_ahead

        return parts_ahead(ctx, read_rag(ctx, ctx.spec))

    def run(self, ctx: Context) -> dict[str, Any]:
        ctx.phase("prepare")
        task = read_rag(ctx, ctx.spec)
        own: dict[str | None, Queries] = {None: read_queries(ctx, task, ctx.spec, "spec")}
        children = read_children(ctx)
        refused: dict[str, dict[str, Any]] = {}
        for child in children:
            try:
                theirs = read_rag(ctx, child.spec, child.where)
                queries = read_queries(ctx, theirs, child.spec, child.where)
                check_agreement(task, theirs, child.where)
                own[child.task_id] = queries
            except RunnerError as error:
                refused[child.task_id] = self._refuse(ctx, child.task_id, error)
        searcher, embedder = self._open(ctx, task)
        answerer = None
        if task.generation is not None:
            from runners.rag.generate import find_answerer

            answerer = find_answerer(ctx, task.generation)
        ctx.phase("search")
        batch = Batch(ctx, task, own, searcher, embedder, answerer)
        embedding = {"model": embedder.name, "dimension": embedder.dimension, "device": embedder.device}
        del embedder  # frees its memory for the generating model
        documents: dict[str | None, tuple[dict[str, Any], str]] = {None: (ctx.spec, "spec")}
        documents |= {each.task_id: (each.spec, each.where) for each in children}

        def refuse(child: str, error: BadRequest) -> None:
            if child not in refused:
                refused[child] = self._refuse(ctx, child, error)

        with contextlib.ExitStack() as stack:
            batch.open_logs(stack, documents, refuse)
            stack.callback(report_rows, ctx, batch.logs.values())
            batch.run(refuse)
        ctx.phase("save")
        results: dict[str | None, dict[str, Any]] = {}
        for task_id in own:
            if task_id in refused:
                continue
            log = batch.logs.get(task_id)
            counts = None if log is None else log.counts
            rows = () if log is None else log.rows.values()
            results[task_id] = {
                "ok": True,
                "executor": "rag",
                **({} if answerer is None or not batch.logs else {"model": answerer.source.shown}),
                searcher.name: searcher.describe(),
                "embedding": embedding,
                "search": {"top_k": task.top_k} | _available(searcher, task.top_k),
                **searcher.notes(),
                "queries": [] if log is None else log.items(),
                **({"rows": msgspec.to_builtins(counts)} if counts is not None and counts.reused else {}),
                "usage": usage(rows, batch.search_s, batch.answer_s, answers=answerer is not None and bool(batch.logs)),
            }
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

    @staticmethod
    def _open(ctx: Context, task: RagTask) -> tuple[Any, Any]:
        _need("sentence_transformers")
        if task.faiss is not None:
            _need("faiss")
            from runners.rag.faiss_search import open_faiss

            return open_faiss(ctx, task)
        from runners.embedding.load import load_embedder
        from runners.rag.qdrant_search import open_qdrant
        from runners.rag.task import note_embedded

        assert task.qdrant is not None, "one of the two is given"
        note_embedded(ctx, task)
        searcher = open_qdrant(ctx, task.qdrant)
        ctx.phase("load")
        embedder = load_embedder(ctx, task.embedding)
        searcher.open(ctx, embedder.dimension)
        return searcher, embedder


def read_queries(ctx: Context, task: RagTask, spec: dict[str, Any], where: str) -> Queries:
    """`query`, or the rows of `data`; none where the task only builds an index.

    Raises:
        BadRequest: naming the field.
    """
    if not check_query(spec, where, builds_index=task.builds_index):
        return Queries((), (), (), None)
    if (query := spec.get("query")) is not None:
        return Queries((query,), (None,), (f"{where}.query",), task.system_prompt)
    items = load_items(ctx, spec, where)
    for prompt, place in zip(items.prompts, items.wheres, strict=True):
        if not isinstance(prompt, str):
            raise BadRequest(f"{place}: chat messages cannot be searched for; give one text")
        if not prompt.strip():
            raise BadRequest(f"{place}: is empty; give a query or leave it out")
    texts = tuple(prompt for prompt in items.prompts if isinstance(prompt, str))
    return Queries(texts, items.metadata, items.wheres, task.system_prompt)


def _available(searcher: Any, top_k: int) -> dict[str, int]:
    """The number of passages, if it is less than `top_k`."""
    count = searcher.describe().get("count")
    return {"available": count} if isinstance(count, int) and count < top_k else {}


def _need(library: str) -> None:
    import importlib.util

    if importlib.util.find_spec(library) is None:
        raise MissingDependency(library, extra="rag")
