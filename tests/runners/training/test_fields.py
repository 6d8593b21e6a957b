"""No field of a training task is ignored: what documents may say is read, and reaches the trainer under its name there.

A field that is added to the settings fails here until it is in a table below.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runners.api import BadRequest, Context
from runners.training import devices, settings, sharding
from runners.training.devices import Device
from runners.training.kinds import KINDS
from runners.training.plan import Plan, read
from tests.runners.training.test_plan import DATA, GPUS, MODEL, REWARD

Make = Callable[..., Context]
CPU = Device(cuda=False, bf16=False)
GPU = Device(cuda=True, bf16=True)


def planned(make_context: Make, task_type: str, spec: dict[str, Any], **fields: Any) -> tuple[Plan, Context]:
    base = {"model": MODEL, "data": DATA[task_type], **(REWARD if KINDS[task_type].rewarded else {})}
    ctx = make_context({**base, **spec}, **fields)
    return read(task_type, ctx), ctx


TRAINING = {
    "num_train_epochs": 1, "max_steps": 3, "batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": "5e-5",
    "warmup_steps": 0, "logging_steps": 10, "save_steps": 100, "save_strategy": "steps", "save_model": True,
    "bf16": False, "fp16": False, "max_seq_length": 1024, "gradient_checkpointing": True, "seed": 42,
    "deepspeed": "ds.json", "auto_deepspeed": True, "auto_deepspeed_stage": 2, "zero_stage": 2,
    "ddp_find_unused_parameters": False, "resume_from_path": "old", "allow_multi_gpu": True, "nproc_per_node": 1,
    "visible_devices": "0", "primary_gpu": 0,
}  # fmt: skip
PPO = {
    "learning_rate": 1.41e-5, "batch_size": 8, "per_device_train_batch_size": 4, "mini_batch_size": 4,
    "num_mini_batches": 2, "gradient_accumulation_steps": 1, "ppo_epochs": 4, "num_train_epochs": 1, "steps": 2,
    "kl_coef": 0.1, "target_kl": 6, "seed": 42, "max_seq_length": 64, "temperature": 0.7, "save_model": True,
}  # fmt: skip
FILE = {"path": "p", "url": "u", "download_url": "d", "worker_path": "w", "headers": {"A": "b"}, "timeoutSec": 5}
HUB = {"dataset_name": "d", "config_name": "c", "split": "train", "revision": "r", "max_samples": 5}
LOAD = {
    "type": "http", "path": "p", "uri": "u", "url": "u", "taskId": "t", "task_id": "t", "filename": "f",
    "base_url": "b", "headers": {}, "timeoutSec": 5, "archive_format": "tar.gz", "subdir": "s",
}  # fmt: skip
LORA = {"r": 16, "alpha": 32, "dropout": 0.05, "bias": "none", "target_modules": ["q_proj"], "use_rslora": True}
JUDGE = {
    "identifier": "j", "type": "sentiment", "positive_label": "a", "negative_label": "b", "scale": 2, "max_length": 9,
}  # fmt: skip

DOCUMENTS: list[tuple[str, dict[str, Any]]] = [
    ("sft", {"training": {**TRAINING, "packing": True}, "checkpoint": {"load": LOAD}}),
    ("lora_sft", {"training": {**TRAINING, "packing": True}, "lora": {**LORA, "task_type": "CAUSAL_LM"}}),
    ("dpo", {"training": {**TRAINING, "beta": 0.1, "save_freq": 100}, "lora": LORA}),
    ("ppo", {"training": PPO, "reward_model": JUDGE, "reward": None}),
    ("ppo", {"generation": {"max_new_tokens": 8, "temperature": 1, "do_sample": False, "stop": ["x"]}}),
    ("grpo", {"training": {**TRAINING, "num_generations": 2, "kl_coef": 0.1, "temperature": 1, "steps": 3}}),
    ("sft", {"data": {**HUB, "prompt_column": "p", "response_column": "r", "separator": " "}}),
    ("sft", {"data": {**HUB, "text_field": "t"}}),
    ("sft", {"data": {"jsonl": {**FILE, "text_field": "t"}}}),
    ("sft", {"data": {"jsonl": {**FILE, "prompt_field": "p", "response_field": "r", "separator": " "}}}),
    ("sft", {"data": {"jsonl_path": "p"}}),
    ("sft", {"data": {"messages": []}}),
    ("dpo", {"data": {**HUB, "prompt_column": "p", "chosen_column": "c", "rejected_column": "r"}}),
    ("dpo", {"data": {"jsonl": {**FILE, "prompt_field": "p", "chosen_field": "c", "rejected_field": "r"}}}),
    ("ppo", {"data": {"jsonl": {**FILE, "query_field": "q", "response_field": "r"}}}),
    ("ppo", {"data": {**HUB, "prompt_column": "p"}}),
]


@pytest.mark.parametrize(("task_type", "spec"), DOCUMENTS)
def test_every_field_of_the_documents_is_known(make_context: Make, task_type: str, spec: dict[str, Any]) -> None:
    planned(make_context, task_type, spec)


ARGUMENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "num_train_epochs": (3, {"num_train_epochs": 3}),
    "max_steps": (7, {"max_steps": 7}),
    "batch_size": (16, {"per_device_train_batch_size": 16}),
    "per_device_train_batch_size": (16, {"per_device_train_batch_size": 16}),
    "gradient_accumulation_steps": (3, {"gradient_accumulation_steps": 3}),
    "learning_rate": ("3e-4", {"learning_rate": 3e-4}),
    "warmup_steps": (0.1, {"warmup_steps": 0.1}),
    "logging_steps": (4, {"logging_steps": 4}),
    "save_steps": (9, {"save_steps": 9}),
    "save_freq": (9, {"save_steps": 9}),
    "save_strategy": ("epoch", {"save_strategy": "epoch"}),
    "bf16": (True, {"bf16": True}),
    "seed": (5, {"seed": 5}),
    "gradient_checkpointing": (True, {"gradient_checkpointing": True}),
    "ddp_find_unused_parameters": (True, {"ddp_find_unused_parameters": True}),
    "packing": (True, {"packing": True}),
    "beta": (0.3, {"beta": 0.3}),
    "kl_coef": (0.3, {"beta": 0.3}),
    "num_generations": (4, {"num_generations": 4}),
    "ppo_epochs": (3, {"num_iterations": 3}),
    "steps": (6, {"max_steps": 6}),
    "temperature": (0.5, {"temperature": 0.5}),
    "report_to": ("tensorboard", {"report_to": ["tensorboard"]}),
    "trainer_args": ({"weight_decay": 0.5}, {"weight_decay": 0.5}),
}
LENGTHS = {"max_length": 77}, {"max_completion_length": 38}
ELSEWHERE = {
    "fp16",  # below
    "save_model",  # test_training_types
    "save_on_time_s",  # test_steps
    "resume_from_path",  # test_training_resume
    *("allow_multi_gpu", "nproc_per_node", "visible_devices", "primary_gpu"),  # test_training_plan
    *("nnodes", "node_rank", "rdzv_endpoint", "rdzv_id"),  # test_training_groups, and below
    *settings.EvaluatedTraining.__struct_fields__[
        len(settings.Training.__struct_fields__) :
    ],  # test_training_evaluation
    *("deepspeed", "auto_deepspeed", "auto_deepspeed_stage", "zero_stage", "fsdp"),  # below
}


@pytest.mark.parametrize("task_type", [name for name, kind in KINDS.items() if kind.trainer])
def test_every_setting_reaches_the_trainer(make_context: Make, task_type: str) -> None:
    pytest.importorskip("trl", reason="needs the extra 'training'")
    from runners.training.arguments import build

    def told(**training: Any) -> Any:
        plan, ctx = planned(make_context, task_type, {"training": training})
        return build(plan, ctx, devices.lay_out(plan, ctx), CPU, sharding.Sharding("none"))

    lengths = LENGTHS[KINDS[task_type].rewarded]
    for name in KINDS[task_type].training.__struct_fields__:
        if name in ELSEWHERE:
            continue
        value, wanted = (77, lengths) if name == "max_seq_length" else ARGUMENTS[name]
        config = told(**{name: value})
        assert {key: getattr(config, key) for key in wanted} == wanted, name


def test_every_field_has_a_reader() -> None:
    """By its name, anywhere in the code but as the field itself."""
    read_names = {
        node.attr
        for folder in ("training", "models")
        for path in (Path(settings.__file__).parents[1] / folder).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    kinds = [kind.training for kind in KINDS.values()]
    for struct in (*kinds, settings.PpoArgs, settings.Lora, settings.Generation, settings.TransformersModel):
        unread = set(struct.__struct_fields__) - read_names - {"ddp_timeout"}  # read before it is known whose it is
        assert unread == set(), struct.__name__


DEEPSPEED_INSTALLED = sharding._has_deepspeed()


def picked(make_context: Make, training: dict[str, Any], *, device: Device = GPU, **spec: Any) -> sharding.Sharding:
    task_type = "lora_sft" if "lora" in spec else "sft"
    plan, ctx = planned(make_context, task_type, {"training": training, **spec}, gpus=GPUS if device.cuda else ())
    return sharding.pick(plan, ctx, devices.lay_out(plan, ctx), device)


def test_what_a_group_on_gpus_is_spread_by(make_context: Make) -> None:
    spread = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
    assert picked(make_context, {"fsdp": True}) == sharding.Sharding("fsdp2", spread)
    given = picked(make_context, {"fsdp": {"cpu_offload": True}})
    assert given.arguments["fsdp_config"] == {**spread["fsdp_config"], "cpu_offload": True}
    assert picked(make_context, {"fsdp": "full_shard auto_wrap"}).arguments == {"fsdp": "full_shard auto_wrap"}
    assert picked(make_context, {"auto_deepspeed": False}).name == "ddp"
    assert picked(make_context, {"nproc_per_node": 1}).name == "none"


@pytest.mark.skipif(DEEPSPEED_INSTALLED, reason="it is picked first")
def test_what_is_picked_without_deepspeed(make_context: Make) -> None:
    assert picked(make_context, {}).name == "fsdp2 (auto_deepspeed: deepspeed is not installed)"
    few_bits = {"model": {**MODEL, "transformers": {"load_in_4bit": True}}, "lora": {"r": 4}}
    found = picked(make_context, {}, **few_bits)
    assert found.name == "ddp (auto_deepspeed: load_in_4bit weights are not spread without deepspeed)"
    assert found.arguments == {}
    with pytest.raises(BadRequest, match=r"spec\.training\.fsdp: load_in_4bit weights cannot be spread"):
        picked(make_context, {"fsdp": True}, **few_bits)


def test_the_stage_of_an_automatic_configuration(make_context: Make) -> None:
    for name in ("auto_deepspeed_stage", "zero_stage"):
        plan, _ = planned(make_context, "sft", {"training": {name: 3}})
        assert isinstance(plan.training, settings.ShardedTraining)
        assert plan.training.stage == 3
    assert sharding.automatic(3)["zero_optimization"]["stage"] == 3


def test_half_precision_is_for_gpus(make_context: Make) -> None:
    from runners.training.arguments import common

    plan, ctx = planned(make_context, "sft", {"training": {"fp16": True}}, gpus=GPUS[:1])
    found = common(plan, ctx, devices.lay_out(plan, ctx), GPU)
    assert (found["fp16"], found["bf16"], found["use_cpu"]) == (True, False, False)
    plan, ctx = planned(make_context, "sft", {}, gpus=GPUS[:1])
    assert common(plan, ctx, devices.lay_out(plan, ctx), GPU)["bf16"] is True
    with pytest.raises(BadRequest, match=r"spec\.training\.fp16: needs a GPU"):
        common(plan_of_fp16(make_context), ctx, devices.lay_out(plan, ctx), CPU)


def plan_of_fp16(make_context: Make) -> Plan:
    return planned(make_context, "sft", {"training": {"fp16": True}})[0]


def test_torchruns_command_line(make_context: Make) -> None:
    from runners.training.torchrun import command

    nodes = {"nnodes": 2, "nproc_per_node": 4, "node_rank": 1, "rdzv_endpoint": "head:29400", "rdzv_id": "run-7"}
    plan, ctx = planned(make_context, "sft", {"training": nodes})
    words = command(plan, devices.lay_out(plan, ctx), Path("/folder"))
    for flag, value in (
        ("--nnodes", "2"),
        ("--nproc-per-node", "4"),
        ("--node-rank", "1"),
        ("--rdzv-endpoint", "head:29400"),
        ("--rdzv-id", "run-7"),
    ):
        assert words[words.index(flag) + 1] == value
