"""Retrieve, then generate: passages into a prompt, the prompt through the inference runner's engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from runners.api import BadRequest, Context
from runners.data.prompts import Items
from runners.inference.engine import Completion, Watch
from runners.inference.engines import load_engine, reasoning_of
from runners.inference.identity import Identity, identity_of
from runners.inference.parts import Part, completion_tokens, item_of, prepare
from runners.inference.routing import adapter_of
from runners.inference.runner import work_of
from runners.inference.task_model import find_source
from runners.inference.tokens import Texts
from runners.models.adapters import LocalAdapter, load_adapters
from runners.models.sources import Source
from runners.rag.search import Hit
from runners.rag.task import PLACEHOLDERS, Generation
from runners.rows.keys import key_of

WHERE = "spec.generate"


class Question(msgspec.Struct, frozen=True):
    """One query with its hits."""

    query: str
    hits: Sequence[Hit]
    system_prompt: str | None
    where: str
    merged: bool
    """Whether it belongs to a task that was merged into this one; its error does not fail this task."""


class Answer(msgspec.Struct, frozen=True):
    """The fields that generation adds to a query's entry in the result."""

    fields: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int


class Answerer(msgspec.Struct, frozen=True):
    """What answers a task's questions; nothing of it is loaded yet."""

    generation: Generation
    source: Source
    adapters: Sequence[LocalAdapter]
    identity: Identity

    @property
    def digest(self) -> str:
        """Identity of everything that determines an answer but the question, its passages and its system prompt."""
        task = self.generation.inference
        route = adapter_of(self.identity.adapters, None, WHERE)
        adapter = None if route is None else self.identity.digests[route]
        parsers = [each for each in (task.reasoning_parser, task.vllm.get("reasoning_parser")) if each is not None]
        return key_of(self.generation.template, task.sampling, task.chat, self.identity.model, adapter, *parsers)


def find_answerer(ctx: Context, generation: Generation) -> Answerer:
    """
    Raises:
        BadRequest: the model or an adapter cannot be had.
        RunnerError: see the inference runner.
    """
    task = generation.inference
    source = find_source(ctx, task)
    adapters = load_adapters(ctx, task.model.adapters)
    return Answerer(generation, source, adapters, identity_of(ctx, task, source, adapters))


def generate(  # noqa: PLR0917
    ctx: Context,
    answerer: Answerer,
    questions: Sequence[Question],
    watch: Watch,
    finished: Callable[[int, Answer], None],
    refused: Callable[[int, BadRequest], None],
) -> float:
    """Answer the questions in one batch of the engine; returns the seconds that took.

    Args:
        finished: called with a question's position as soon as it is answered, in any order.
        refused: called for merged questions that do not fit the model.

    Raises:
        BadRequest: a question of the task's own does not fit the model even without a passage.
        RunnerError: see the inference runner.
        Cancelled: the node asked the task to stop.
    """
    ctx.phase("load model")
    generation, source, adapters = answerer.generation, answerer.source, answerer.adapters
    task = generation.inference
    prompts = [_prompt(generation, question, len(question.hits)) for question in questions]
    whole = [_part(ctx, generation, *pair) for pair in zip(questions, prompts, strict=True)]
    engine, texts = load_engine(ctx, task, source, adapters, work=work_of(((part, ()) for part in whole), task))
    ctx.log.info("model loaded model=%s %s", source.shown, " ".join(f"{k}={v}" for k, v in engine.describe().items()))
    room = None if engine.max_positions is None else engine.max_positions - task.sampling.max_tokens
    asked: list[tuple[int, int, Part]] = []
    for index, question in enumerate(questions):
        try:
            used, prompt = _fitting(ctx, generation, question, texts, room)
            asked.append((index, used, prepare(_part(ctx, generation, question, prompt), texts, engine, adapters)))
        except BadRequest as error:
            if not question.merged:
                raise
            refused(index, error)

    split = reasoning_of(ctx, task, engine, texts, WHERE)

    def answered(number: int, completion: Completion) -> None:
        index, used, part = asked[number]
        item = item_of(part, 0, completion, texts, split)
        fields = {name: value for name, value in item.items() if name not in ("index", "prompt", "metadata")}
        fields["passages_used"] = used
        finished(index, Answer(fields, len(part.requests[0].token_ids), completion_tokens(completion)))
        watch.done += 1

    ctx.phase("generate")
    since = time.monotonic()
    engine.generate([part.requests[0] for _, _, part in asked], watch, answered)
    return time.monotonic() - since


def _prompt(generation: Generation, question: Question, passages: int) -> str:
    """The template with the best `passages` passages, numbered, in place."""
    context = "\n\n".join(f"[{number}] {hit.text()}" for number, hit in enumerate(question.hits[:passages], start=1))
    values = {"context": context, "query": question.query}
    return PLACEHOLDERS.sub(lambda match: values[match[1]], generation.template)


def _part(ctx: Context, generation: Generation, question: Question, prompt: str) -> Part:
    return Part(
        task_id=None,
        folder=ctx.out_dir,
        items=Items((prompt,), (None,), (question.where,)),
        system_prompt=question.system_prompt,
        samplings=(generation.inference.sampling,),
        chat=generation.inference.chat,
        export=None,
    )


def _fitting(
    ctx: Context, generation: Generation, question: Question, texts: Texts, room: int | None
) -> tuple[int, str]:
    """How many of the best passages fit the model with the answer, and the prompt with them."""
    passages = len(question.hits)
    while True:
        prompt = _prompt(generation, question, passages)
        if room is None:
            return passages, prompt
        tokens = len(texts.encode(_part(ctx, generation, question, prompt).asked, [question.where])[0])
        if tokens <= room:
            break
        if passages == 0:
            raise BadRequest(
                f"{question.where}: the question alone has {tokens} tokens; the model has room for {max(room, 0)} "
                f"beside an answer of {generation.inference.sampling.max_tokens}; lower {WHERE}.max_tokens"
            )
        passages -= 1
    if passages < len(question.hits):
        ctx.log.warning(
            "passages left out: %d of %d fit the model where=%s", passages, len(question.hits), question.where
        )
    return passages, prompt
