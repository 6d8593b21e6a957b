"""What of a task's model determines its answers, whichever engine computes them; part of the keys of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from runners.api import Context
from runners.inference.task import InferenceTask
from runners.models.adapters import LocalAdapter
from runners.models.digest import weights_digest
from runners.models.sources import Source
from runners.rows.keys import folder_digest, key_of


class Identity(msgspec.Struct, frozen=True):
    """A task's model and adapters."""

    model: str
    """Digest of weights, precision and merged adapters."""
    adapters: Sequence[LocalAdapter]
    digests: dict[str, str]
    """Of the runtime adapters, by name."""


def identity_of(ctx: Context, task: InferenceTask, source: Source, adapters: Sequence[LocalAdapter]) -> Identity:
    """Reads the weights of a local model once; of a hub's model, only its commit.

    Raises:
        BadRequest, RunnerError: as for `sources.loading`.
    """
    digests = {each.name: folder_digest(each.folder) for each in adapters}
    merged = [digests[each.name] for each in adapters if each.apply == "merge"]
    tokenizer = None if source.tokenizer is None else weights_digest(source, source.tokenizer)
    model = key_of(weights_digest(source, source.path), tokenizer, merged, _precision(task))
    ctx.log.debug("identity of the model: %s", model)
    return Identity(model, adapters, {each.name: digests[each.name] for each in adapters if each.apply == "runtime"})


def _precision(task: InferenceTask) -> list[Any]:
    """As the document gives it: what both engines decide by themselves is the same model."""
    options = task.transformers
    return [
        task.vllm.get("dtype") or options.dtype,
        bool(options.load_in_8bit),
        bool(options.load_in_4bit),
        task.vllm.get("quantization"),
    ]
