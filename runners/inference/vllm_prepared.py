"""What an engine of vLLM is started with: checked weights, adapters, engine arguments."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from runners.api import Context
from runners.inference.lora import check_fit
from runners.inference.task import InferenceTask
from runners.inference.tokens import Texts
from runners.inference.vision import load_texts
from runners.inference.vllm_args import WHERE, Work, engine_arguments
from runners.inference.vllm_finite import CLASS
from runners.inference.vllm_weights import check_weights, merged, overridden
from runners.models.adapters import LocalAdapter, check_product
from runners.models.code import may_run_code
from runners.models.sources import Source, loading


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """What vLLM starts with."""

    path: str
    """The model's folder or hub id, with the adapters that are merged."""
    revision: str | None
    texts: Texts
    arguments: dict[str, Any]
    """Engine arguments besides the model and its tokenizer."""
    runtime: tuple[LocalAdapter, ...]
    """Adapters that are loaded after the start."""
    checks_logits: bool
    """Whether the workers have the method of `vllm_finite.FiniteLogits`; else only NaN is found."""

    @property
    def alone(self) -> bool:
        """Whether the engine needs no processes of workers."""
        size = self.arguments["tensor_parallel_size"] * self.arguments.get("pipeline_parallel_size", 1)
        return bool(size == 1) and self.arguments.get("distributed_executor_backend") in (None, "uni")


def prepare(
    ctx: Context, task: InferenceTask, source: Source, adapters: Sequence[LocalAdapter], *, work: Work
) -> Prepared:
    """Check everything that can be checked without the engine. Errors as for `vllm_engine.load`."""
    runtime = tuple(adapter for adapter in adapters if adapter.apply == "runtime")
    arguments, texts, trust = arguments_of(ctx, task, source, runtime, work=work)
    path = source.path
    if len(runtime) < len(adapters):
        path = str(merged(ctx, task, source, adapters, texts, trust=trust))
    # vLLM's default seed is a constant, so that all unseeded tasks would draw the same. numpy's seed has 32 bits; each
    # request has the task's full seed.
    seed = task.sampling.seed if task.sampling.seed is not None else secrets.randbits(31)
    arguments["seed"] = seed % 2**32
    checks_logits = arguments["worker_extension_cls"] == CLASS
    if not checks_logits:
        ctx.log.warning("%s.worker_extension_cls: logits are checked for NaN only, not for infinity", WHERE)
    return Prepared(
        path=path,
        revision=source.revision if path == source.path else None,
        texts=texts,
        arguments=arguments,
        runtime=runtime,
        checks_logits=checks_logits,
    )


def arguments_of(
    ctx: Context, task: InferenceTask, source: Source, runtime: Sequence[LocalAdapter], *, work: Work
) -> tuple[dict[str, Any], Texts, bool]:
    """`LLM`'s arguments besides the model, its tokenizer, and whether it may run its own code. Errors as for `load`."""
    trust = may_run_code(ctx, source, task.vllm.get("trust_remote_code"), f"{WHERE}.trust_remote_code")
    cache_dir = task.vllm.get("download_dir")
    with loading(source):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=trust, cache_dir=cache_dir
        )
        texts = load_texts(ctx, source, trust, config, work, cache_dir)
    config = overridden(config, task.vllm.get("hf_overrides"))
    check_weights(ctx, task, source, config, work)
    for adapter in runtime:
        check_product(adapter, "vLLM")
        check_fit(ctx, adapter, config, trust_remote_code=trust)
    arguments = engine_arguments(ctx, task, config, work=work, adapter_ranks=[each.rank for each in runtime])
    arguments["trust_remote_code"] = trust
    arguments.setdefault("worker_extension_cls", CLASS)
    return arguments, texts, trust
