"""The rag runner: finds passages for queries, and generates answers from them if the task asks for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from runners.api import BadRequest, Context, MissingDependency, Runner, RunnerError
from runners.data.sources import load_items
from runners.inference.merge import read_children
from runners.rag.merge import check_agreement, failed
from runners.rag.task import RagTask, check_query, read_rag


class Queries(msgspec.Struct, frozen=True):
    """One task's queries."""

    texts: tuple[str, ...]
    metadata: tuple[dict[str, Any] | None, ...]
    wheres: tuple[str, ...]
    system_prompt: str | None


class RagRunner(Runner):
    """Task type `rag`."""

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
        ctx.phase("search")
        since = time.monotonic()
        texts = [text for queries in own.values() for text in queries.texts]
        found, marks = self._search(ctx, searcher, embedder, texts, task.top_k)
        search_s = time.monotonic() - since
        embedding = {"model": embedder.name, "dimension": embedder.dimension, "device": embedder.device}
        del embedder  # frees its memory for the generating model
        entries, model, answer_s, tokens, misfits = self._answer(ctx, task, own, found, marks)
        ctx.phase("save")
        results: dict[str | None, dict[str, Any]] = {}
        at = 0
        for task_id, queries in own.items():
            part = slice(at, at + len(queries.texts))
            at = part.stop
            misfit = next((misfits[index] for index in range(part.start, part.stop) if index in misfits), None)
            if task_id is not None and misfit is not None:
                refused[task_id] = self._refuse(ctx, task_id, misfit)
                continue
            results[task_id] = {
                "ok": True,
                "executor": "rag",
                **({} if model is None else {"model": model}),
                searcher.name: searcher.describe(),
                "embedding": embedding,
                "search": {"top_k": task.top_k} | _available(searcher, task.top_k),
                **searcher.notes(),
                "queries": [{"index": index, **entry} for index, entry in enumerate(entries[part])],
                "usage": _usage(entries[part], search_s, answer_s, None if model is None else tokens[part]),
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
        from runners.rag.embedder import load_embedder
        from runners.rag.qdrant_search import open_qdrant

        assert task.qdrant is not None, "one of the two is given"
        searcher = open_qdrant(ctx, task.qdrant)
        ctx.phase("load")
        embedder = load_embedder(ctx, task.embedding)
        searcher.open(ctx, embedder.dimension)
        return searcher, embedder

    @staticmethod
    def _search(
        ctx: Context, searcher: Any, embedder: Any, texts: list[str], top_k: int
    ) -> tuple[list[list[Any]], list[dict[str, bool]]]:
        """Each query's hits, and the flags of its entry: truncated, zero_vector, fewer_than_top_k."""
        if not texts:
            return [], []
        vectors = embedder.embed(ctx, texts, "query")
        cut = set(embedder.cut)
        somewhere = vectors.any(axis=1)
        hits = iter(searcher.search(ctx, vectors[somewhere], top_k) if somewhere.any() else ())
        found = [next(hits) if is_somewhere else [] for is_somewhere in somewhere]
        marks = [
            {"truncated": index in cut, "zero_vector": not somewhere[index], "fewer_than_top_k": len(each) < top_k}
            for index, each in enumerate(found)
        ]
        return found, [{name: True for name, is_so in each.items() if is_so} for each in marks]

    @staticmethod
    def _answer(
        ctx: Context,
        task: RagTask,
        own: dict[str | None, Queries],
        found: list[list[Any]],
        marks: list[dict[str, bool]],
    ) -> tuple[list[dict[str, Any]], str | None, float, list[tuple[int, int]], dict[int, BadRequest]]:
        """Each query's entry; with answers also the model, seconds, each one's tokens, and errors of merged queries."""
        asked = [
            (text, metadata, where, queries.system_prompt, task_id is not None)
            for task_id, queries in own.items()
            for text, metadata, where in zip(queries.texts, queries.metadata, queries.wheres, strict=True)
        ]
        entries: list[dict[str, Any]] = [
            {
                "query": text,
                "items": [{"id": hit.id, "score": hit.score, "payload": hit.payload} for hit in hits],
                **({} if metadata is None else {"metadata": metadata}),
                **mark,
            }
            for (text, metadata, *_), hits, mark in zip(asked, found, marks, strict=True)
        ]
        if task.generation is None or not asked:
            return entries, None, 0.0, [], {}
        from runners.rag.generate import Question, generate

        _empty_cache()
        questions = [
            Question(text, hits, system, where, merged)
            for (text, _, where, system, merged), hits in zip(asked, found, strict=True)
        ]
        made = generate(ctx, task.generation, questions)
        misfits: dict[int, BadRequest] = {}
        tokens = [(0, 0)] * len(entries)
        for index, answer in enumerate(made.answers):
            if isinstance(answer, BadRequest):
                misfits[index] = answer
            else:
                entries[index] |= answer.fields
                tokens[index] = answer.prompt_tokens, answer.completion_tokens
        return entries, made.model, made.latency_s, tokens, misfits


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


def _usage(
    entries: Sequence[dict[str, Any]], search_s: float, answer_s: float, tokens: Sequence[tuple[int, int]] | None
) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "latency_sec": round(search_s + answer_s, 6),
        "num_queries": len(entries),
        "total_results": sum(len(entry["items"]) for entry in entries),
    }
    if tokens is not None:
        prompt, completion = (sum(column) for column in zip(*tokens, strict=True)) if tokens else (0, 0)
        usage |= {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        usage |= {"search_sec": round(search_s, 6), "generate_sec": round(answer_s, 6)}
    return usage


def _need(library: str) -> None:
    import importlib.util

    if importlib.util.find_spec(library) is None:
        raise MissingDependency(library, extra="rag")


def _empty_cache() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
