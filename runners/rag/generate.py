"""Retrieve, then generate: passages into a prompt, the prompt through the inference runner's engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from runners.api import BadRequest, Context
from runners.data.prompts import Items
from runners.inference.engine import Watch, collect
from runners.inference.engines import load_engine, reasoning_of
from runners.inference.parts import Part, completion_tokens, item_of, prepare
from runners.inference.runner import work_of
from runners.inference.task_model import find_source
from runners.inference.tokens import Texts
from runners.models.adapters import load_adapters
from runners.rag.search import Hit
from runners.rag.task import PLACEHOLDERS, Generation

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


class Answers(msgspec.Struct, frozen=True):
    model: str
    answers: tuple[Answer | BadRequest, ...]
    """The answer to each question; for merged questions possibly the error instead."""
    latency_s: float


def generate(ctx: Context, generation: Generation, questions: Sequence[Question]) -> Answers:
    """An answer to each question, all in one batch of the engine.

    Raises:
        BadRequest: the model cannot be had, or a question of the task's own does not fit it even without a passage.
        RunnerError: see the inference runner.
        Cancelled: the node asked the task to stop.
    """
    ctx.phase("load model")
    task = generation.inference
    source = find_source(ctx, task)
    adapters = load_adapters(ctx, task.model.adapters)
    prompts = [_prompt(generation, question, len(question.hits)) for question in questions]
    whole = [_part(ctx, generation, *pair) for pair in zip(questions, prompts, strict=True)]
    engine, texts = load_engine(ctx, task, source, adapters, work=work_of(((part, ()) for part in whole), task))
    ctx.log.info("model loaded model=%s %s", source.shown, " ".join(f"{k}={v}" for k, v in engine.describe().items()))
    room = None if engine.max_positions is None else engine.max_positions - task.sampling.max_tokens
    used: dict[int, int] = {}
    parts: dict[int, Part] = {}
    answers: dict[int, Answer | BadRequest] = {}
    for index, question in enumerate(questions):
        try:
            used[index], prompt = _fitting(ctx, generation, question, texts, room)
            parts[index] = prepare(_part(ctx, generation, question, prompt), texts, engine, adapters)
        except BadRequest as error:
            if not question.merged:
                raise
            answers[index] = error
    split = reasoning_of(ctx, task, engine, texts, WHERE)
    ctx.phase("generate")
    requests = [part.requests[0] for part in parts.values()]
    since = time.monotonic()
    completions = collect(engine, requests, Watch(ctx, len(requests)))
    latency_s = time.monotonic() - since
    for (index, part), completion in zip(parts.items(), completions, strict=True):
        item = item_of(part, 0, completion, texts, split)
        fields = {name: value for name, value in item.items() if name not in ("index", "prompt", "metadata")}
        fields["passages_used"] = used[index]
        answers[index] = Answer(fields, len(part.requests[0].token_ids), completion_tokens(completion))
    return Answers(source.shown, tuple(answers[index] for index in range(len(questions))), latency_s)


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
