"""Chooses a task's engine and loads it."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from typing import Any

import msgspec

from runners.api import BadRequest, Context, MissingDependency
from runners.gang import gang_of
from runners.inference.engine import Engine
from runners.inference.members import Lead
from runners.inference.options import Sampling
from runners.inference.reasoning import Splitter, splitter_of
from runners.inference.task import SHARED, InferenceTask, TransformersOptions
from runners.inference.tokens import Texts
from runners.inference.vllm_args import Work
from runners.models.adapters import LocalAdapter, warn_other_base
from runners.models.sources import Source


def choose(ctx: Context, task: InferenceTask) -> str:
    """`vllm` if it is installed and the task has a GPU, or if it is requested or there are several nodes, else
    `transformers`.

    Raises:
        MissingDependency: the requested engine is not installed.
    """
    if task.engine == "vllm" or gang_of(ctx) is not None:
        _need("vllm")
        return "vllm"
    if task.engine == "auto" and ctx.gpus and not task.enforce_cpu and importlib.util.find_spec("vllm") is not None:
        if _only_transformers_can(task) or _has_slices(ctx):
            return "transformers"
        return "vllm"
    _need("torch")
    _need("transformers")
    return "transformers"


def load_engine(
    ctx: Context,
    task: InferenceTask,
    source: Source,
    adapters: Sequence[LocalAdapter],
    *,
    work: Work,
    lead: Lead | None = None,
) -> tuple[Engine, Texts]:
    """The engine, loaded, and its tokenizer.

    Args:
        work: the amount of work, which decides whether compiling pays.
        lead: the other members of a task on several nodes.

    Raises:
        BadRequest: the model cannot be loaded here, or an option does not fit it or this node.
        MissingDependency: the engine's library is not installed.
        GpuOutOfMemory: the model does not fit.
        RunnerError: the model hub is unreachable.
    """
    chosen = choose(ctx, task)
    note_unused(ctx, task, chosen)
    for adapter in adapters:
        warn_other_base(ctx, adapter.where, adapter.base, source)
    engine: Engine
    if chosen == "vllm":
        from runners.inference import vllm_engine

        engine, texts = vllm_engine.load(ctx, task, source, adapters, work=work, lead=lead)
    elif task.sampling.json_schema is not None:
        raise BadRequest(
            "spec.inference.json_schema: only vLLM can keep answers to a schema; set spec.engine to 'vllm'"
        )
    else:
        from runners.inference import loader

        engine, texts = loader.load(ctx, task, source, adapters, work=work)
    if engine.vocabulary is not None and len(texts.tokenizer) > engine.vocabulary:
        ctx.log.warning(
            "tokenizer larger than the embeddings model=%s tokens=%d rows=%d; a prompt with one of the tokens that the "
            "model does not have is refused", source.shown, len(texts.tokenizer), engine.vocabulary,
        )  # fmt: skip
    check_ids(task.sampling, engine, texts, "spec.inference")
    return engine, texts


def parser_of(ctx: Context, task: InferenceTask) -> str | None:
    """The name of the task's reasoning parser, or None: the document's, else on vLLM the engine argument's.

    Raises:
        MissingDependency: the requested engine is not installed.
    """
    own = task.vllm.get("reasoning_parser") if task.reasoning_parser is None else None
    return task.reasoning_parser or (str(own) if own and choose(ctx, task) == "vllm" else None)


def reasoning_of(
    ctx: Context, task: InferenceTask, engine: Engine, texts: Texts, section: str = "spec.inference"
) -> Splitter | None:
    """What takes the reasoning out of answers; None where the task does not ask for it.

    Raises:
        BadRequest: the engine or the operator does not have the parser, or it does not fit the model's tokenizer.
    """
    where = f"{section}.reasoning_parser" if task.reasoning_parser else "spec.model.vllm.reasoning_parser"
    return splitter_of(ctx, parser_of(ctx, task), engine.name, texts, where)


def check_ids(sampling: Sampling, engine: Engine, texts: Texts, where: str) -> None:
    """Raises BadRequest where the sampling names token ids that the model does not have."""
    rows = engine.vocabulary
    if rows is None:
        return
    for field, ids in (
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", sampling.logit_bias),
        ("bad_words", itertools.chain(*texts.bad_word_ids(sampling.bad_words, where))),
    ):
        if beyond := [token_id for token_id in ids if token_id >= rows]:
            raise BadRequest(f"{where}.{field}: the model has no token {beyond[0]}; its ids end at {rows - 1}")


def note_unused(ctx: Context, task: InferenceTask, chosen: str) -> None:
    """Note the other engine's options, which have no effect: a document may have options for both."""
    other: dict[str, Any] = task.model.vllm or {}
    if chosen == "vllm":
        other = msgspec.structs.asdict(task.model.transformers or TransformersOptions())
    section = "transformers" if chosen == "vllm" else "vllm"
    names = [name for name, value in other.items() if value is not None and name not in SHARED]
    ctx.unused += [f"spec.model.{section}.{name} (engine {chosen})" for name in names]
    ctx.report_unused()


def _has_slices(ctx: Context) -> bool:
    """Whether the GPUs are MIG slices: vLLM 0.32 takes a slice's index for a board's, and fails or uses another."""
    return any(gpu.startswith("MIG-") for gpu in ctx.gpus)


def _only_transformers_can(task: InferenceTask) -> bool:
    """Whether the task has options that only Transformers supports, and none of vLLM's."""
    options = task.transformers
    return bool(options.load_in_8bit or options.load_in_4bit or options.device_map == "cpu") and not task.model.vllm


def _need(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise MissingDependency(library)
