"""Answers the lines of a batch file that ask for text: one engine for all, each with sampling of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from runners.api import Context
from runners.data.images import Images
from runners.inference.engine import Completion, Request, Watch
from runners.inference.engines import load_engine, parser_of, reasoning_of
from runners.inference.identity import identity_of
from runners.inference.openai.answers import Answers, refused, served
from runners.inference.openai.batch_rows import Answered, add_line
from runners.inference.openai.bodies import DEFAULTS, ChatBody, Defaults
from runners.inference.openai.file_lines import Lines
from runners.inference.openai.lines import LineFault
from runners.inference.openai.model_defaults import ends_of_model, model_defaults
from runners.inference.openai.prompts import Prompts, template_arguments
from runners.inference.openai.requests import Asked, Reader, requests_of
from runners.inference.parts import completion_tokens
from runners.inference.task import InferenceTask
from runners.inference.task_model import find_source
from runners.models.adapters import LocalAdapter, load_adapters
from runners.models.sources import Source
from runners.rows.keys import key_of
from runners.rows.log import RowLog

WINDOW_LINES = 4096
WINDOW_TOKENS = 8_000_000
"""Limits of what is in memory at once: of lines, and of the tokens of their prompts (0.3 GB as Python's numbers)."""
WINDOW_BYTES = 512 * 2**20
"""And of their text, which may hold images."""


class Generation:
    """The task's model as one that generates. See `run.Kind`."""

    def __init__(self, ctx: Context, task: InferenceTask, names: Sequence[str]) -> None:
        """
        Args:
            names: that lines may give the model, besides its own.

        Raises:
            BadRequest, RunnerError: see `find_source` and `load_adapters`.
        """
        self._ctx = ctx
        self._task = task
        self.source = find_source(ctx, task)
        self._adapters = load_adapters(ctx, task.model.adapters)
        identity = identity_of(ctx, task, self.source, self._adapters)
        defaults = Defaults(task_defaults(ctx), model_defaults(ctx, task, self.source))
        known = tuple(dict.fromkeys((*names, self.source.shown)))
        self.reader = Reader(known, identity.digests, defaults, identity.model, parser_of(ctx, task), Images(ctx))

    def answer(self, lines: Lines[Asked], log: RowLog) -> Answered:
        """Answer the lines that have no row."""
        return Answered(_Batch(self._ctx, self._task, self.source, self._adapters, lines, log).run())


def task_defaults(ctx: Context) -> dict[str, Any]:
    """What `spec.inference` says for lines that leave it out."""
    given = {name: value for name, value in (ctx.spec.get("inference") or {}).items() if value is not None}
    found = {name: value for name, value in given.items() if name in DEFAULTS}
    if given.get("max_new_tokens") is not None:
        found["max_tokens"] = given["max_new_tokens"]
    if given.get("do_sample") is False:
        found["temperature"] = 0.0
    return found


class _Batch:
    """The lines of one task that have no answer yet."""

    def __init__(  # noqa: PLR0917
        self,
        ctx: Context,
        task: InferenceTask,
        source: Source,
        adapters: Sequence[LocalAdapter],
        lines: Lines[Asked],
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
        tokens = given_bytes = 0
        for index, where, asked in self._lines.asked(done):
            try:
                requests = requests_of(asked, self._prompts, self._engine, self._texts, self._adapters)
            except LineFault as fault:
                fault.custom_id = asked.line.custom_id
                add_line(self._log, index, refused(fault, where), again=True)
                watch.done += 1
                continue
            window.append((index, asked, requests))
            tokens += sum(len(each.token_ids) for each in requests)
            given_bytes += asked.work[0]
            if len(window) >= WINDOW_LINES or tokens >= WINDOW_TOKENS or given_bytes >= WINDOW_BYTES:
                yield window
                window, tokens, given_bytes = [], 0, 0
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
        add_line(
            self._log, index, served(asked.line.custom_id, body),
            prompt_tokens=sum(map(len, prompts)), completion_tokens=sum(map(completion_tokens, completions)),
        )  # fmt: skip
