"""A model's weights before vLLM starts: checked against its architecture, with adapters merged into them."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runners.api import BadRequest, Context
from runners.inference.lora import apply_adapters
from runners.inference.task import InferenceTask
from runners.inference.tokens import Texts
from runners.inference.vision import Vision, model_class, takes_images
from runners.inference.vllm_args import WHERE, Work
from runners.models.adapters import LocalAdapter
from runners.models.quantized import method_of
from runners.models.sources import Source
from runners.models.tied import other_head
from runners.models.weights import check_checkpoint, load_model

SAME_FILES = frozenset(
    ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "bitsandbytes", "pt", "npcache")
)
"""Load formats that read the checkpoint that Transformers reads."""
PICKLED = frozenset(("pt", "npcache"))


def check_weights(ctx: Context, task: InferenceTask, source: Source, config: Any, work: Work | None = None) -> None:
    """Raises BadRequest where the checkpoint does not hold the model's weights, before an engine is started with it.

    vLLM's own check is the only one for architectures that Transformers does not have, and for other files. It leaves
    quantized models out: the task's result says where nothing was checked.

    Args:
        config: with the task's overrides.
        work: decides whether the model is loaded as one that takes images.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    load_format = task.vllm.get("load_format") or "auto"
    if load_format == "dummy":
        raise BadRequest(f"{WHERE}.load_format: 'dummy' fills the model with random weights; leave it out")
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or takes_images(config)
    packed = task.vllm.get("quantization") is not None or method_of(config) is not None
    if not known or load_format not in SAME_FILES:
        if packed or load_format not in {"mistral", *SAME_FILES}:
            reason = (
                f"the files of {load_format!r} have other names" if known else "Transformers lacks its architecture"
            )
            _unchecked(ctx, source, reason)
        return
    given: dict[str, Any] = {"config": config, "cache_dir": task.vllm.get("download_dir")}
    if load_format in PICKLED:
        given["use_safetensors"] = False  # where both are there, vLLM would read the other
    found = check_checkpoint(model_class(config, work), source, **given)
    if source.is_local and (head := other_head(Path(source.path), config)):
        raise BadRequest(
            f"{source.where}: {source.shown!r} holds an output layer {head!r} that differs from the embeddings, and "
            "its config.json ties them, so vLLM would leave it out; set tie_word_embeddings to false in config.json, "
            "or spec.engine to 'transformers'"
        )
    if found == "unchecked":
        _unchecked(ctx, source, f"the names of its quantization {method_of(config)!r} are not known")


def _unchecked(ctx: Context, source: Source, reason: str) -> None:
    ctx.log.warning("not checked whether %s holds all of its weights: %s", source.shown, reason)


def overridden(config: Any, changes: Any) -> Any:
    """A model's configuration with the task's `hf_overrides`, as vLLM applies them."""
    if not changes:
        return config
    if not isinstance(changes, dict):
        raise BadRequest(f"{WHERE}.hf_overrides: expected a mapping (found {type(changes).__name__})")
    found = copy.deepcopy(config)
    for name, value in changes.items():
        part: Any = getattr(found, name, None)
        if isinstance(value, dict) and hasattr(part, "update"):
            part.update(value)
        else:
            setattr(found, name, value)
    return found


def merged(
    ctx: Context, task: InferenceTask, source: Source, adapters: Sequence[LocalAdapter], texts: Texts, *, trust: bool
) -> Path:
    """Merge adapters into the model's weights, and write it into this attempt's TMPDIR."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    target = Path(tempfile.mkdtemp(prefix="merged-", dir=ctx.tmp_dir))
    model = load_model(
        AutoModelForImageTextToText if isinstance(texts, Vision) else AutoModelForCausalLM,
        source,
        trust_remote_code=trust,
        cache_dir=task.vllm.get("download_dir"),
        dtype="auto",
        device_map="cpu",
    )
    with torch.no_grad():
        model = apply_adapters(model, [adapter for adapter in adapters if adapter.apply == "merge"])
    model.save_pretrained(target)
    (texts.processor if isinstance(texts, Vision) else texts.tokenizer).save_pretrained(target)
    return target
