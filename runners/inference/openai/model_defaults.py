"""What a model's generation_config.json says, which requests get that leave it out: as in vLLM's server."""

from __future__ import annotations

from typing import Any

from runners.api import Context
from runners.inference.task import InferenceTask
from runners.models.sources import Source

FIELDS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repetition_penalty",
          "max_new_tokens": "max_tokens"}  # fmt: skip
NOT_HONOURED = ("min_p",)


def model_defaults(ctx: Context, task: InferenceTask, source: Source) -> dict[str, Any]:
    """The sampling that the model's authors chose, by the names of `spec.inference`."""
    if task.vllm.get("generation_config") == "vllm":
        return {}
    given = _read(source)
    found = {ours: given[theirs] for theirs, ours in FIELDS.items() if given.get(theirs) is not None}
    for name in NOT_HONOURED:
        if given.get(name):
            ctx.log.warning("%s of the model's generation_config is not used", name)
    overrides = task.vllm.get("override_generation_config")
    if isinstance(overrides, dict):
        found |= {ours: overrides[theirs] for theirs, ours in FIELDS.items() if overrides.get(theirs) is not None}
    return found


def ends_of_model(source: Source) -> frozenset[int]:
    """Tokens that end an answer by the same file."""
    ids = _read(source).get("eos_token_id")
    return frozenset(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])


def _read(source: Source) -> dict[str, Any]:
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(source.path, revision=source.revision)
    except (OSError, ValueError):
        return {}  # most models of research have none
    found: dict[str, Any] = config.to_diff_dict()
    return found
