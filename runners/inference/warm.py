"""Imported by fork servers only, after `transformers`: fills tables that every task would fill anew. See `warming`."""

from __future__ import annotations

import fnmatch

from transformers import GenerationConfig, LlamaConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto import tokenization_auto

from runners.api import Context
from runners.data.sources import load_items
from runners.inference.export import read_export
from runners.inference.task import read_task
from runners.warming import rehearse_reading

get_checkpoint_conversion_mapping("llama")  # compiles some 600 patterns for all architectures: 0.1 s
LlamaConfig().to_dict()  # the checks of its fields, and of all configurations
GenerationConfig().to_dict()
for _pattern in getattr(tokenization_auto, "MODEL_IDS_TO_TOKENIZERS_BACKEND", ()):
    fnmatch.fnmatch("", _pattern)


def _read(ctx: Context) -> None:
    read_task(ctx, ctx.spec)
    load_items(ctx, ctx.spec)
    read_export(ctx, ctx.spec, "spec")


rehearse_reading(
    "inference",
    _read,
    {
        "taskType": "inference",
        "model": {"source": {"type": "huggingface", "identifier": "builtin:tiny-llama"}, "transformers": {}},
        "data": {"type": "list", "items": ["one"]},
        "inference": {"temperature": 0.0, "max_tokens": 1},
    },
)
