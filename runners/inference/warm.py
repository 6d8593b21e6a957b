"""Imported by fork servers only, after `transformers`: fills caches that every task would fill again.

Uses no tensor: children of a process that has computed inherit broken thread pools.
"""

from __future__ import annotations

import fnmatch

from transformers import GenerationConfig, LlamaConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto import tokenization_auto

from flowmesh.messages.job import Job
from runners.api import Context
from runners.data.sources import load_items
from runners.inference.export import read_export
from runners.inference.task import read_task

get_checkpoint_conversion_mapping("llama")  # compiles some 600 patterns for all architectures: 0.1 s
LlamaConfig().to_dict()  # the checks of its fields, and of all configurations
GenerationConfig().to_dict()
for _pattern in getattr(tokenization_auto, "MODEL_IDS_TO_TOKENIZERS_BACKEND", ()):
    fnmatch.fnmatch("", _pattern)


_ctx = Context(
    Job(
        attempt=0,
        task_id="",
        task_type="inference",
        runner="",
        out_dir="",
        results_dir="",
        cache_dir="",
        tmp_dir="",
        task={
            "spec": {
                "taskType": "inference",
                "model": {"source": {"type": "huggingface", "identifier": "builtin:tiny-llama"}, "transformers": {}},
                "data": {"type": "list", "items": ["one"]},
                "inference": {"temperature": 0.0, "max_tokens": 1},
            }
        },
    )
)
# msgspec builds tables for each struct when it first reads one: tens of milliseconds
read_task(_ctx, _ctx.spec)
load_items(_ctx, _ctx.spec)
read_export(_ctx, _ctx.spec, "spec")
