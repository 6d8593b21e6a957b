"""The queries of a rag task and of its merged children: searched for and answered together, a row for each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runners.api import BadRequest, Context
from runners.inference.merge import folder_of
from runners.rag.rows import Found, Queries, entry_of, open_log, passages_digest, row_keys
from runners.rag.task import RagTask
from runners.rows.keys import key_of
from runners.rows.log import RowLog

if TYPE_CHECKING:
    from runners.rag.generate import Answer, Answerer

Place = tuple[str | None, int]
"""A query: the task's id (None: the parent) and its position there."""
SEARCHED_AT_ONCE = 4096
"""Queries of a task that only searches: their rows are written before the next ones are searched."""


class Batch:
    """
    Args:
        own: each task's queries; None is the parent.
        embedder: released when no query is left to embed.
        answerer: None: the task only searches.
    """

    def __init__(  # noqa: PLR0917
        self,
        ctx: Context,
        task: RagTask,
        own: dict[str | None, Queries],
        searcher: Any,
        embedder: Any,
        answerer: Answerer | None,
    ) -> None:
        self._ctx = ctx
        self._top_k = task.top_k
        self._own = own
        self._searcher = searcher
        self._embedder = embedder
        self._answerer = answerer
        self._found: dict[Place, Found] = {}
        self.logs: dict[str | None, RowLog] = {}
        """Of each task with queries."""
        self.search_s = 0.0
        self.answer_s = 0.0

    def open_logs(
        self,
        stack: contextlib.ExitStack,
        documents: Mapping[str | None, tuple[dict[str, Any], str]],
        refuse: Callable[[str, BadRequest], object],
    ) -> None:
        """
        Args:
            documents: each task's spec and its path, for errors.
            refuse: called for merged children whose `resume` names no rows.
        """
        ctx, answering = self._ctx, None if self._answerer is None else self._answerer.digest
        same = self._searcher.digest and key_of(self._searcher.digest, self._embedder.digest, self._top_k)
        if not same and answering is not None:
            self._search([(task_id, index) for task_id, queries in self._own.items() for index in _range(queries)])
        for task_id, queries in self._own.items():
            if not queries.texts:
                continue
            retrieval = [self._retrieval((task_id, index), same) for index in _range(queries)]
            keys = row_keys(queries, retrieval, answering)
            folder = ctx.out_dir if task_id is None else folder_of(ctx, task_id)
            spec, where = documents[task_id]
            try:
                log = open_log(ctx, spec, where, folder, queries, keys, task_id or ctx.task_id)
            except BadRequest as error:
                if task_id is None:
                    raise
                refuse(task_id, error)
                continue
            self.logs[task_id] = stack.enter_context(log)

    def run(self, refuse: Callable[[str, BadRequest], object]) -> None:
        """Compute the rows that are missing.

        Args:
            refuse: called for merged children with a question that does not fit the model.
        """
        missing = [
            (task_id, index) for task_id, log in self.logs.items() for index in _range(self._own[task_id])
            if index not in log.rows
        ]  # fmt: skip
        if self._answerer is None:
            for first in range(0, len(missing), SEARCHED_AT_ONCE):
                places = missing[first : first + SEARCHED_AT_ONCE]
                self._search(places)
                for place in places:
                    self.logs[place[0]].add(place[1], entry_of(self._own[place[0]], place[1], self._found.pop(place)))
            return
        self._search([place for place in missing if place not in self._found])
        self._embedder = None
        if missing:
            self._answer(self._answerer, missing, refuse)

    def _retrieval(self, place: Place, same: str) -> str:
        found = self._found.get(place)
        return same if found is None else passages_digest(found)

    def _search(self, places: Sequence[Place]) -> None:
        """Find the passages of some queries."""
        if not places:
            return
        since = time.monotonic()
        embedder = self._embedder
        texts = [self._own[task_id].texts[index] for task_id, index in places]
        vectors = embedder.embed(self._ctx, texts, "query")
        cut = set(embedder.cut)
        somewhere = vectors.any(axis=1)
        hits = iter(self._searcher.search(self._ctx, vectors[somewhere], self._top_k) if somewhere.any() else ())
        for number, place in enumerate(places):
            each = next(hits) if somewhere[number] else []
            marks = {
                "truncated": number in cut,
                "zero_vector": not somewhere[number],
                "fewer_than_top_k": len(each) < self._top_k,
            }
            self._found[place] = Found(each, {name: True for name, is_so in marks.items() if is_so})
        self.search_s += time.monotonic() - since

    def _answer(
        self, answerer: Answerer, missing: Sequence[Place], refuse: Callable[[str, BadRequest], object]
    ) -> None:
        from runners.inference.engine import Watch
        from runners.rag.generate import Question, generate

        _empty_cache()
        questions = [
            Question(
                queries.texts[index],
                self._found[task_id, index].hits,
                queries.system_prompt,
                queries.wheres[index],
                merged=task_id is not None,
            )
            for task_id, index in missing
            for queries in (self._own[task_id],)
        ]
        counts = [log.counts for log in self.logs.values()]
        watch = Watch(self._ctx, sum(each.total for each in counts), sum(each.done for each in counts))

        def finished(number: int, answer: Answer) -> None:
            task_id, index = missing[number]
            entry = entry_of(self._own[task_id], index, self._found[task_id, index]) | answer.fields
            self.logs[task_id].add(
                index, entry, prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens
            )

        def refused(number: int, error: BadRequest) -> None:
            task_id, _ = missing[number]
            assert task_id is not None, "the task's own questions raise"
            refuse(task_id, error)

        self.answer_s = generate(self._ctx, answerer, questions, watch, finished, refused)


def _range(queries: Queries) -> range:
    return range(len(queries.texts))


def _empty_cache() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
