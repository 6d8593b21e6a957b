"""Fields of a task's document that are accepted and have no effect.

Documents carry fields for other programs, for other stages of the same document, and for people. Those that cannot
change a result are listed here. Every other unknown field is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from msgspec import inspect

from flowmesh.validation.schemas import LISTS, bare, choose, holds, is_mapping, item_type

ANY = object()


class Unused(NamedTuple):
    """Fields of one block that are accepted without effect, where the task type has no such field itself."""

    block: str
    """The dotted path below `spec`, without list indices; empty: `spec`; `*`: every block."""
    names: tuple[str, ...]
    why: str
    only: tuple[Any, ...] | object = ANY
    """The values that are accepted; any other one would change the result, and is refused. Null always is."""


BLOCKS = (
    "model", "data", "inference", "postprocess", "checkpoint", "engine", "enforce_cpu", "training", "generation",
    "reward_model", "reward", "query", "search", "embedding", "qdrant", "faiss", "generate", "task", "configName",
    "agent",
)  # fmt: skip
"""Fields of `spec` that some task types read. Not `lora`: a trainer that ignored it would train something else."""

TABLE = (
    Unused(
        "*",
        ("notes", "note", "comment", "comments", "description", "author", "owner", "title", "remarks"),
        "for people",
    ),
    Unused("", BLOCKS, "another stage's, inherited"),
    Unused(
        "",
        ("parallel", "dependsOn", "depends_on", "dependencies", "stage", "stages", "graph", "name", "priority",
         "retry", "retries", "schedule", "labels", "annotations", "tags", "version", "executor", "placement"),
        "the orchestrator's",
    ),
    Unused(
        "model",
        ("config", "vllm", "sglang", "tgi", "llama_cpp", "ollama", "openai", "trl", "deepspeed", "parallel", "name",
         "provider"),
        "another executor's",
    ),
    Unused("model.source", ("cache_dir", "license"), "the node has its own cache"),
    Unused(
        "model.transformers",
        ("use_cache", "cache_dir", "max_memory", "offload_folder", "use_safetensors"),
        "memory and speed are the node's",
    ),
    Unused("model.adapters", ("base_model", "base_model_name_or_path"), "the adapter's files name it"),
    Unused("checkpoint", ("save",), "training saves as its own fields say"),
    Unused(
        "data",
        ("cache_dir", "num_proc", "streaming", "license"),
        "how rows are read does not change them",
    ),
    Unused("data", ("trust_remote_code",), "this version of `datasets` runs no code"),
    Unused(
        "inference",
        ("batch_size", "max_batch_size", "concurrency", "max_concurrency", "use_cache", "parallel"),
        "the engine batches by itself",
    ),
    Unused(
        "inference",
        ("stream", "use_beam_search", "early_stopping", "return_full_text", "include_stop_str_in_output"),
        "the neutral value",
        (False,),
    ),
    Unused("inference", ("num_beams", "best_of", "num_return_sequences", "length_penalty"), "the neutral value", (1,)),
    Unused("inference", ("skip_special_tokens", "detokenize"), "the neutral value", (True,)),
    Unused(
        "training",
        ("log_with", "tracker_project_name", "tracker_kwargs", "project_kwargs", "accelerator_kwargs", "exp_name",
         "task_name", "project_name", "run_name", "logging_dir", "logging_strategy", "logging_first_step",
         "logging_nan_inf_filter", "log_level", "disable_tqdm", "tqdm"),
        "logs and trackers; see `report_to`",
    ),
    Unused(
        "training",
        ("optimize_cuda_cache", "optimize_device_cache", "forward_batch_size", "dataloader_num_workers",
         "dataloader_pin_memory", "dataloader_prefetch_factor", "dataset_num_proc", "preprocessing_num_workers",
         "ddp_backend", "local_rank", "world_size", "torch_empty_cache_steps"),
        "memory and speed are the node's",
    ),
    Unused(
        "training",
        ("output_dir", "overwrite_output_dir", "save_safetensors", "hub_model_id", "hub_strategy",
         "hub_private_repo"),
        "results go where `output` says",
    ),
    Unused("training", ("model_name", "remove_unused_columns"), "`model` and `data` say it"),
    Unused(
        "training",
        ("beta", "kl_coef", "target_kl", "ppo_epochs", "num_generations", "temperature",
         "auto_deepspeed", "auto_deepspeed_stage", "zero_stage", "parallel"),
        "another trainer's",
    ),
    Unused("training", ("early_stopping",), "without an evaluation there is nothing to compare", (True, False)),
    Unused("training", ("push_to_hub", "do_eval", "load_best_model_at_end"), "the neutral value", (False,)),
    Unused("training", ("do_train",), "the neutral value", (True,)),
    Unused("training", ("eval_strategy", "evaluation_strategy"), "the neutral value", ("no",)),
    Unused("lora", ("peft_type",), "the neutral value", ("LORA",)),
    Unused("lora", ("inference_mode", "use_dora", "fan_in_fan_out", "lora_bias"), "the neutral value", (False,)),
    Unused("lora", ("init_lora_weights",), "the neutral value", (True,)),
    Unused("lora", ("modules_to_save", "layers_to_transform", "layers_pattern"), "the neutral value", ()),
    Unused("lora", ("base_model_name_or_path",), "`model` names it"),
    Unused("generation", ("top_k",), "the neutral value", (0, -1)),
    Unused("generation", ("top_p", "repetition_penalty", "length_penalty", "num_beams"), "the neutral value", (1,)),
    Unused("generation", ("min_length", "min_new_tokens"), "the neutral value", (-1, 0)),
    Unused("generation", ("return_prompt", "early_stopping"), "the neutral value", (False,)),
    Unused("generation", ("pad_token_id", "batch_size", "use_cache"), "the trainer's own"),
    Unused("reward_model", ("batch_size", "device"), "memory and speed are the node's"),
    Unused("reward_model", ("trust_remote_code",), "the neutral value", (False,)),
    Unused("embedding", ("batch_size", "cache_dir"), "memory and speed are the node's"),
    Unused("qdrant", ("prefer_grpc", "grpc_port"), "HTTP is used"),
    Unused("agent", ("name", "verbose", "log_level"), "see the execution log"),
    Unused("output", ("format",), "the neutral value", ("json",)),
    Unused("output", ("name",), "the folder is named by the task's id"),
    Unused("output.destination", ("path",), "of local results"),
    Unused("output.destination", ("retries", "retry", "name"), "the node has its own rules"),
)  # fmt: skip

BESIDE = frozenset(
    (*BLOCKS, "taskType", "resources", "nodes", "output", "shard", "timeoutSec", "retainLogs", "env", "resume", "lora")
)
"""Fields of `spec` that mean nothing beside it, where wrong indentation puts them."""
_PREFIX = re.compile(r"^(?:merge_children\[\d+\]\.)?spec(?:\.|$)")
_ALIASES = {"data.eval": "data", "faiss.documents": "data", "generate": "inference"}
"""Blocks that have the fields of another one."""


def is_unused(block: str, name: str, value: Any) -> bool:
    """Whether a field that the task type does not have is accepted without effect.

    Args:
        block: as in `Unused`.
    """
    return any(
        name in entry.names and entry.block in (block, "*") and (entry.only is ANY or _is_one(value, entry.only))
        for entry in TABLE
    )


def block_of(where: str) -> str:
    """The block of a dotted path: without `spec`, `merge_children[i]` and list indices."""
    block = re.sub(r"\[\d+\]", "", _PREFIX.sub("", where))
    return _ALIASES.get(block, block)


def without_unused(value: Any, schema: inspect.Type, where: str) -> tuple[Any, list[str]]:
    """`value` without the fields that are accepted without effect, and their paths.

    Args:
        schema: the type that it is converted to.
        where: the dotted path of `value`.
    """
    found: list[str] = []
    return _walk(value, schema, where, found), found


def _walk(value: Any, declared: inspect.Type, where: str, found: list[str]) -> Any:
    schema = choose(value, bare(declared))
    if isinstance(schema, inspect.StructType) and is_mapping(value):
        return _without(value, schema, where, found)
    if isinstance(schema, inspect.DictType) and is_mapping(value) and _has_structs(schema):
        return {key: _walk(item, schema.value_type, f"{where}.{key}", found) for key, item in value.items()}
    if isinstance(schema, LISTS) and isinstance(value, list | tuple) and _has_structs(schema):
        return [_walk(item, item_type(schema, i), f"{where}[{i}]", found) for i, item in enumerate(value)]
    return value


def _without(value: Mapping[Any, Any], schema: inspect.StructType, where: str, found: list[str]) -> dict[Any, Any]:
    fields = {field.encode_name: field for field in schema.fields}
    kept: dict[Any, Any] = {}
    for name, item in value.items():
        if name in fields:
            kept[name] = _walk(item, fields[name].type, f"{where}.{name}", found)
        elif (
            schema.forbid_unknown_fields
            and name != schema.tag_field
            and isinstance(name, str)
            and is_unused(block_of(where), name, item)
        ):
            found.append(f"{where}.{name}")
        else:
            kept[name] = item
    return kept


def unused_beside_spec(document: Mapping[str, Any]) -> list[str]:
    """Fields of a document that belong into its `spec` and stand beside it. Peers may have other ones there."""
    return [f"{name} beside spec" for name, value in document.items() if name in BESIDE and value is not None]


def _has_structs(schema: inspect.Type) -> bool:
    """Whether a struct is anywhere in a type; else its data are not walked."""
    return holds(schema, inspect.StructType)


def _is_one(value: Any, allowed: Any) -> bool:
    """`1` and `true` are different values; `0` and `0.0` are one. Numbers may be written as text."""
    return value is None or any(
        value.lower() == str(each).lower()
        if isinstance(value, str)
        else isinstance(value, bool) == isinstance(each, bool) and value == each
        for each in allowed
    )
