"""A model's weights before vLLM starts: checked against its architecture, with adapters merged into them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runners.api import Context
from runners.inference.lora import apply_adapters
from runners.inference.task import InferenceTask
from runners.inference.tokens import Texts
from runners.models.adapters import LocalAdapter
from runners.models.sources import Source
from runners.models.weights import check_checkpoint, load_model

OWN_LOADING = ("load_format", "hf_overrides", "quantization", "model_impl")
"""Engine arguments with which vLLM loads another checkpoint or builds another model than Transformers would."""


def check_weights(ctx: Context, task: InferenceTask, source: Source, config: Any) -> None:
    """Raises BadRequest where the checkpoint does not hold the model's weights, before an engine is started with it.

    Only if Transformers would load the same checkpoint; otherwise vLLM's own checks remain.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    changed = [name for name in OWN_LOADING if task.vllm.get(name) not in (None, "auto")]
    quantized = getattr(config, "quantization_config", None) is not None
    if changed or quantized or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        ctx.log.info("weights not checked before the engine starts model=%s", source.shown)
        return
    check_checkpoint(AutoModelForCausalLM, source, config=config, cache_dir=task.vllm.get("download_dir"))


def merged(
    ctx: Context, task: InferenceTask, source: Source, adapters: Sequence[LocalAdapter], texts: Texts, *, trust: bool
) -> Path:
    """Merge adapters into the model's weights, and write it into this attempt's TMPDIR."""
    import torch
    from transformers import AutoModelForCausalLM

    target = Path(tempfile.mkdtemp(prefix="merged-", dir=ctx.tmp_dir))
    model = load_model(
        AutoModelForCausalLM,
        source,
        trust_remote_code=trust,
        cache_dir=task.vllm.get("download_dir"),
        dtype="auto",
        device_map="cpu",
    )
    with torch.no_grad():
        model = apply_adapters(model, [adapter for adapter in adapters if adapter.apply == "merge"])
    model.save_pretrained(target)
    texts.tokenizer.save_pretrained(target)
    return target
