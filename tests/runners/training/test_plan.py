"""What a training task may ask, checked before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from runners.api import BadRequest, Context
from runners.training import devices, ppo_batches
from runners.training.kinds import KINDS
from runners.training.plan import Plan, read
from runners.training.settings import PpoTraining

MODEL = {"source": {"identifier": "builtin:tiny-llama"}}
DATA = {
    "sft": {"prompts": ["a"]},
    "lora_sft": {"prompts": ["a"]},
    "dpo": {"preferences": []},
    "reward": {"preferences": []},
    "kto": {"examples": []},
    "ppo": {"prompts": ["a"]},
    "grpo": {"prompts": ["a"]},
    "rloo": {"prompts": ["a"]},
}
REWARD = {"reward": {"function": "length"}}

Make = Callable[..., Context]


def plan(make_context: Make, task_type: str, spec: dict[str, Any], **fields: Any) -> Plan:
    base = {"model": MODEL, "data": DATA[task_type], **(REWARD if KINDS[task_type].rewarded else {})}
    return read(task_type, make_context({**base, **spec}, **fields))


def refusal(make_context: Make, task_type: str, spec: dict[str, Any]) -> str:
    with pytest.raises(BadRequest) as caught:
        plan(make_context, task_type, spec)
    return str(caught.value)


def test_the_runners_import_nothing_heavy() -> None:
    code = (
        "import sys, runners.training.runner, runners.training.plan, runners.training.preload; "
        "print([m for m in ('torch','transformers','trl','datasets','peft','numpy','pyarrow') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("task_type", KINDS)
def test_the_least_a_task_needs(make_context: Make, task_type: str) -> None:
    assert plan(make_context, task_type, {}).kind.task_type == task_type


@pytest.mark.parametrize(
    ("task_type", "wanted"),
    [
        ("sft", (5e-5, 2, True, "final_model")),
        ("lora_sft", (2e-4, 2, False, "final_lora")),
        ("dpo", (5e-7, 4, False, "final_model")),
        ("ppo", (1.41e-5, 8, False, "final_model")),
    ],
)
def test_the_defaults_that_documents_rely_on(
    make_context: Make, task_type: str, wanted: tuple[float, int, bool, str]
) -> None:
    found = plan(make_context, task_type, {})
    assert (found.learning_rate, found.batch_size, found.gradient_checkpointing, found.folder) == wanted
    training = found.training
    assert (training.num_train_epochs, training.logging_steps, training.save_strategy) == (1, 10, "steps")
    assert (training.max_seq_length, training.save_model, training.allow_multi_gpu) == (1024, True, True)


def test_numbers_may_be_strings_since_yaml_reads_5e_7_as_one(make_context: Make) -> None:
    assert plan(make_context, "dpo", {"training": {"learning_rate": "5e-6"}}).learning_rate == 5e-6


@pytest.mark.parametrize(
    ("task_type", "spec", "message"),
    [
        (
            "sft",
            {"training": {"logging_stepz": 5}},
            "spec.training.logging_stepz: unknown field; did you mean 'logging_steps'?",
        ),
        (
            "dpo",
            {"training": {"packing": True}},
            "spec.training.packing: unknown field here; it is one of sft, lora_sft",
        ),
        ("sft", {"training": {"lr_scheduler_type": "cosine"}}, "own arguments go under spec.training.trainer_args"),
        ("sft", {"training": {"batch_size": 0}}, "spec.training.batch_size: expected"),
        ("sft", {"training": {"max_steps": 0}}, "spec.training.max_steps: 0 steps train nothing"),
        ("sft", {"training": {"save_steps": 5, "save_freq": 6}}, "save_freq: 6 contradicts save_steps 5"),
        ("sft", {"training": {"batch_size": 2, "per_device_train_batch_size": 4}}, "4 contradicts batch_size 2"),
        ("sft", {"training": {"zero_stage": 2, "auto_deepspeed_stage": 3}}, "zero_stage: 2 contradicts"),
        ("sft", {"training": {"deepspeed": {"a": 1}, "fsdp": True}}, "spec.training.fsdp: given besides deepspeed"),
        ("grpo", {"training": {"kl_coef": 0.1, "beta": 0.2}}, "kl_coef: 0.1 contradicts beta 0.2"),
        ("ppo", {"training": {"steps": 3, "max_steps": 4}}, "steps: 3 contradicts max_steps 4"),
        ("ppo", {"training": {"deepspeed": {}}}, "spec.training.deepspeed: unknown field here; it is one of sft"),
        ("sft", {"trainning": {}}, "spec.trainning: unknown field; did you mean 'training'?"),
        ("sft", {"lora": {"r": 8}}, "spec.lora: sft trains all weights; for an adapter set spec.taskType to lora_sft"),
        ("lora_sft", {"lora": {"rank": 8}}, "spec.lora.rank: unknown field"),
        ("reward", {"lora": {"task_type": "CAUSAL_LM"}}, "spec.lora.task_type: reward trains a SEQ_CLS model"),
        ("sft", {"model": {**MODEL, "adapters": [{"path": "x"}]}}, "as spec.checkpoint.load instead"),
        ("sft", {"model": {**MODEL, "transformers": {"load_in_4bit": True}}}, "only be trained with spec.lora"),
        ("ppo", {"reward": None}, "spec.reward_model: missing; give a reward_model, or spec.reward {function: …}"),
        ("grpo", {"reward": [{"funktion": "length"}]}, "spec.reward[0].funktion: unknown field"),
        ("grpo", {"generation": {"do_sample": False}}, "spec.generation.do_sample: grpo learns from samples"),
        ("grpo", {"generation": {"stop": ["x"]}}, "spec.generation.stop: grpo stops at the end-of-text token only"),
        ("ppo", {"generation": {"max_new_tokens": 3, "max_tokens": 4}}, "spec.generation.max_tokens: 4 contradicts"),
        ("sft", {"shard": {"index": 2, "total": 2}}, "spec.shard.index: 2 of 2 shards"),
        (
            "sft",
            {"checkpoint": {"load": {"pth": "x"}}},
            "spec.checkpoint.load.pth: unknown field; did you mean 'path'?",
        ),
        ("sft", {"data": {}}, "spec.data: no data; give one of dataset_name, jsonl, prompts, messages"),
        (
            "sft",
            {"data": {"prompts": ["a"], "jsonl_path": "x"}},
            "spec.data.prompts and spec.data.jsonl_path are both given",
        ),
        ("sft", {"data": {"jsonl": {}, "jsonl_path": "x"}}, "short for data.jsonl.path"),
        ("dpo", {"data": {"prompts": ["a"]}}, "spec.data.prompts: unknown field"),
    ],
)
def test_what_is_refused_and_how(make_context: Make, task_type: str, spec: dict[str, Any], message: str) -> None:
    assert message in refusal(make_context, task_type, spec)


GPUS = ("GPU-a", "GPU-b", "GPU-c")


def layout(make_context: Make, training: dict[str, Any], gpus: tuple[str, ...], **model: Any) -> devices.Layout:
    spec = {"model": {**MODEL, **model}, "data": DATA["sft"], "training": training}
    ctx = make_context(spec, gpus=gpus)
    return devices.lay_out(read("sft", ctx), ctx)


@pytest.mark.parametrize(
    ("training", "gpus", "used", "ranks"),
    [
        ({}, (), (), 1),
        ({"nproc_per_node": 2}, (), (), 2),
        ({}, GPUS[:1], GPUS[:1], 1),
        ({}, GPUS, GPUS, 3),
        ({"nproc_per_node": 2}, GPUS, GPUS[:2], 2),
        ({"nproc_per_node": 1}, GPUS, GPUS[:1], 1),
        ({"allow_multi_gpu": False}, GPUS, GPUS[:1], 1),
        ({"allow_multi_gpu": False, "primary_gpu": 2}, GPUS, ("GPU-c",), 1),
        ({"visible_devices": "2,0"}, GPUS, ("GPU-c", "GPU-a"), 2),
        ({"visible_devices": [1, "GPU-a"], "primary_gpu": 1}, GPUS, ("GPU-a", "GPU-b"), 2),
    ],
)
def test_which_gpus_and_how_many_ranks(
    make_context: Make, training: dict[str, Any], gpus: tuple[str, ...], used: tuple[str, ...], ranks: int
) -> None:
    found = layout(make_context, training, gpus)
    assert (found.gpus, found.ranks) == (used, ranks)


def test_a_model_over_several_gpus_in_one_process(make_context: Make) -> None:
    found = layout(make_context, {"allow_multi_gpu": False}, GPUS, transformers={"device_map": "auto"})
    assert found.spread
    assert found.gpus == GPUS


@pytest.mark.parametrize(
    ("training", "gpus", "message"),
    [
        ({"visible_devices": "3"}, GPUS, "spec.training.visible_devices: no GPU '3'; the task has 3"),
        ({"visible_devices": [-1]}, GPUS, "spec.training.visible_devices: no GPU -1; the task has 3"),
        ({"visible_devices": "0,0"}, GPUS, "spec.training.visible_devices: names a GPU twice"),
        ({"visible_devices": [0]}, (), "spec.training.visible_devices: this task has no GPU"),
        ({"primary_gpu": 3}, GPUS, "spec.training.primary_gpu: 3, but the task uses 3 GPUs; the last is 2"),
        ({"nproc_per_node": 4}, GPUS, "spec.training.nproc_per_node: 4 ranks, but the task has 3 GPUs"),
        ({"nproc_per_node": 2, "allow_multi_gpu": False}, (), "nproc_per_node: 2, but allow_multi_gpu is false"),
        ({"nnodes": 2}, (), "spec.training.rdzv_endpoint: missing"),
        ({"rdzv_endpoint": "a:1"}, (), "spec.training.rdzv_endpoint: only a run over several nodes has one"),
    ],
)
def test_what_a_task_does_not_have(
    make_context: Make, training: dict[str, Any], gpus: tuple[str, ...], message: str
) -> None:
    with pytest.raises(BadRequest, match=r"spec\.") as caught:
        layout(make_context, training, gpus)
    assert message in str(caught.value)


@pytest.mark.parametrize("training", [{"visible_devices": "0"}, {"primary_gpu": 0}])
def test_gpus_are_not_chosen_for_a_run_on_the_cpu(make_context: Make, training: dict[str, Any]) -> None:
    field = f"spec.training.{next(iter(training))}: given, but spec.model.transformers.device_map is 'cpu'"
    with pytest.raises(BadRequest, match=field):
        layout(make_context, training, GPUS, transformers={"device_map": "cpu"})


@pytest.mark.parametrize(
    ("training", "sizes"),
    [
        ({}, (8, 8, 8)),
        ({"batch_size": 12}, (12, 12, 12)),
        ({"batch_size": 12, "mini_batch_size": 4}, (12, 4, 4)),
        ({"batch_size": 12, "num_mini_batches": 3}, (12, 4, 4)),
        ({"batch_size": 12, "mini_batch_size": 4, "gradient_accumulation_steps": 2}, (12, 4, 2)),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, (6, 6, 2)),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_mini_batches": 2}, (12, 6, 2)),
        ({"batch_size": 8, "per_device_train_batch_size": 2}, (8, 8, 2)),
    ],
)
def test_batches_of_ppo(make_context: Make, training: dict[str, Any], sizes: tuple[int, int, int]) -> None:
    found = ppo_batches.sizes(plan(make_context, "ppo", {"training": training}))
    assert (found.update, found.step, found.forward) == sizes


@pytest.mark.parametrize(
    ("training", "field"),
    [
        ({"batch_size": 10, "mini_batch_size": 4}, "mini_batch_size"),
        ({"batch_size": 10, "num_mini_batches": 3}, "num_mini_batches"),
        ({"batch_size": 8, "mini_batch_size": 4, "num_mini_batches": 4}, "num_mini_batches"),
        ({"batch_size": 8, "gradient_accumulation_steps": 3}, "gradient_accumulation_steps"),
        ({"batch_size": 8, "per_device_train_batch_size": 3}, "per_device_train_batch_size"),
        (
            {"batch_size": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
            "gradient_accumulation",
        ),
    ],
)
def test_sizes_that_contradict(make_context: Make, training: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest, match=f"spec.training.{field}"):
        ppo_batches.sizes(plan(make_context, "ppo", {"training": training}))


def test_updates_are_epochs_over_the_prompts_unless_said(make_context: Make) -> None:
    assert ppo_batches.updates(plan(make_context, "ppo", {"training": {"num_train_epochs": 2}}), 20, 8) == 5
    limited = plan(make_context, "ppo", {"training": {"steps": 3}})
    assert isinstance(limited.training, PpoTraining)
    assert ppo_batches.updates(limited, 20, 8) == 3


def test_the_order_of_rows_is_a_function_of_the_position() -> None:
    whole = ppo_batches.Order(7, seed=3).take(0, 21)
    assert all(sorted(whole[i : i + 7]) == list(range(7)) for i in (0, 7, 14))
    assert whole[:7] != whole[7:14]
    assert ppo_batches.Order(7, seed=3).take(10, 6) == whole[10:16]
    assert ppo_batches.Order(7, seed=4).take(0, 21) != whole
