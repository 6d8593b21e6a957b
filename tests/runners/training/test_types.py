"""Each type of training for real: a tiny model learns, and the result is what docs/tasks.md says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the extra 'training'")

from flowmesh.processes.pipe import Phase, Progress
from runners.models.builtin import write_tiny_llama
from tests.kit.training_tasks import (
    EXAMPLES,
    PAIRS,
    QUICK,
    SUMS,
    hub,
    losses,
    refused,
    run,
    start,
    train,
    zygote,
)

ALLOWED = {"reward_callables": ["tests.kit.training_tasks:*"]}
LETTERS = {"prompts": ["a task", "the node", "a slot", "an engine"]}
LIKES_E = {"function": "tests.kit.training_tasks:likes_e"}


def test_the_preloaded_process_has_one_thread() -> None:
    assert zygote().threads == 1


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_sft_learns_and_says_everything(tmp_path: Path) -> None:
    running = start(tmp_path, "sft", {"data": {"prompts": SUMS}, "training": {**QUICK, "warmup_steps": 2}})
    outcome = running.wait()
    assert outcome.ok, outcome.message
    result = outcome.result or {}
    out = running.out_dir
    metrics = result.pop("metrics")
    assert result.pop("training_time_seconds") > 0
    assert result == {
        "task_id": "task-1",
        "training_successful": True,
        "error_message": None,
        "model_name": "builtin:tiny-llama",
        "dataset_size": 64,
        "dropped_rows": {},
        "truncated_rows": 0,
        "output_dir": str(out),
        "checkpoints_dir": str(out / "checkpoints"),
        "resume_from_path": None,
        "final_model_path": str(out / "final_model"),
    }
    history = metrics["loss_history"]
    assert [point["step"] for point in history] == [1, 3, 6, 9, 12]
    assert history[-1]["loss"] < history[0]["loss"] / 3
    assert metrics["final_loss"] == history[-1]["loss"]
    assert (metrics["steps"], metrics["samples"], metrics["world_size"]) == (12, 96, 1)
    for name in ("steps_per_s", "samples_per_s", "tokens", "tokens_per_s", "peak_host_bytes", "parameters"):
        assert metrics[name] > 0, name
    assert {"joules", "gpu_joules", "cpu_joules", "peak_gpu_bytes", "sharding"} <= metrics.keys()
    assert files(out / "final_model") >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not files(out / "final_model") & {"training_args.bin", "README.md"}
    assert [archive.folder for archive in outcome.archives] == ["final_model"]
    assert list(outcome.phases) == ["fetch", "load", "train", "save"]
    names = [frame.name for frame in running.frames if isinstance(frame, Phase)]
    assert names == ["fetch", "load", "train", "save"]
    progress = [frame for frame in running.frames if isinstance(frame, Progress)]
    assert (progress[0].done, progress[0].total, progress[0].unit) == (0, 12, "steps")
    assert progress[-1].done == 12
    assert {"loss", "tokens_per_s", "eta_s"} <= progress[-1].metrics.keys()


def test_lora_sft_on_chats(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a slot."}]
    lora = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}
    spec = {"data": {"messages": [chat] * 16}, "training": {**QUICK, "learning_rate": 2e-2}, "lora": lora}
    result = train(tmp_path, "lora_sft", spec)
    assert losses(result)[-1] < losses(result)[0] * 0.8
    folder = Path(result["final_lora_path"])
    written = json.loads((folder / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], sorted(written["target_modules"])) == (4, 8, ["q_proj", "v_proj"])
    assert (written["use_rslora"], written["task_type"]) == (True, "CAUSAL_LM")
    assert (folder / "adapter_model.safetensors").is_file()
    assert "final_model_path" not in result
    assert result["metrics"]["trainable_parameters"] < result["metrics"]["parameters"] / 10


def test_sft_packs_and_obeys_the_trainers_own_arguments(tmp_path: Path) -> None:
    trainer_args = {"lr_scheduler_type": "constant", "weight_decay": "0.01", "packing_strategy": "wrapped"}
    training = {**QUICK, "max_steps": 4, "packing": True, "trainer_args": trainer_args}
    spec = {"data": {"prompts": SUMS}, "training": training}
    result = train(tmp_path, "sft", {**spec, "model": {**_model(), "transformers": {"dtype": "fp32"}}})
    assert result["metrics"]["last"]["learning_rate"] == QUICK["learning_rate"]
    per_step = result["metrics"]["tokens"] / 4
    assert per_step > 8 * 64 * 0.8  # packed: nearly every place of a batch holds a token


def _model() -> dict[str, Any]:
    return {"source": {"identifier": "builtin:tiny-llama"}}


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_dpo_tells_the_chosen_from_the_rejected(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    training = {**QUICK, "learning_rate": 1e-3 if lora is None else 2e-2, "beta": 0.2, "batch_size": 4}
    spec = {"data": {"preferences": PAIRS}, "training": training, **({"lora": lora} if lora else {})}
    result = train(tmp_path, "dpo", spec)
    assert losses(result)[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: policy and reference agree at first
    assert losses(result)[-1] < 0.3
    assert result["metrics"]["last"]["rewards/accuracies"] == 1
    assert ("final_lora_path" if lora else "final_model_path") in result


def test_reward_learns_to_rate(tmp_path: Path) -> None:
    training = {**QUICK, "learning_rate": 1e-3, "batch_size": 4}
    result = train(tmp_path, "reward", {"data": {"preferences": PAIRS}, "training": training})
    assert losses(result)[-1] < 0.1
    config = json.loads((Path(result["final_model_path"]) / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]


def test_kto_parts_good_from_bad(tmp_path: Path) -> None:
    training = {**QUICK, "learning_rate": 1e-3, "batch_size": 8, "num_train_epochs": 4, "max_steps": -1}
    result = train(tmp_path, "kto", {"data": {"examples": EXAMPLES}, "training": training})
    assert result["metrics"]["steps"] == 16
    last = result["metrics"]["last"]
    assert last["rewards/chosen"] > last["rewards/rejected"] + 0.3
    assert losses(result)[-1] < losses(result)[0]


ONLINE = {
    "data": LETTERS,
    "reward": LIKES_E,
    "generation": {"max_new_tokens": 8},
}


def rewards_of(result: dict[str, Any]) -> list[float]:
    return [point["reward"] for point in result["metrics"]["loss_history"]]


@pytest.mark.parametrize("task_type", ["grpo", "rloo"])
def test_completions_get_better(tmp_path: Path, task_type: str) -> None:
    training = {"steps": 14, "batch_size": 16, "num_generations": 8, "learning_rate": 4e-3, "max_seq_length": 64}
    spec = {**ONLINE, "training": {**training, "logging_steps": 1, "ppo_epochs": 1, "temperature": 1.0, "kl_coef": 0.0}}
    result = train(tmp_path, task_type, spec, limits=ALLOWED)
    rewards = rewards_of(result)
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 * 1.2
    assert result["metrics"]["tokens"] > 0
    assert "final_model_path" in result


@pytest.mark.parametrize("lora", [None, {"r": 8, "dropout": 0.0, "target_modules": "all-linear"}])
def test_ppo_raises_the_reward(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    sizes = {"steps": 22, "batch_size": 32, "mini_batch_size": 16, "ppo_epochs": 2, "learning_rate": 1e-2}
    if lora is None:
        sizes |= {"steps": 16, "mini_batch_size": 8, "ppo_epochs": 4, "learning_rate": 3e-3}
    training = {**sizes, "kl_coef": 0.0, "max_seq_length": 64, "logging_steps": 1}
    spec = {**ONLINE, "training": training, **({"lora": lora} if lora else {})}
    result = train(tmp_path, "ppo", spec, limits=ALLOWED)
    rewards = rewards_of(result)
    assert sum(rewards[-4:]) > sum(rewards[:4]) * 1.25  # 1.5 at the least, of nine seeds
    assert result["metrics"]["samples"] == sizes["steps"] * 32
    assert (Path(result["final_lora_path" if lora else "final_model_path"]) / "tokenizer.json").is_file()


def test_ppo_stays_near_the_reference_when_that_is_dear(tmp_path: Path) -> None:
    training = {"steps": 16, "batch_size": 32, "ppo_epochs": 4, "learning_rate": 5e-4, "max_seq_length": 64}

    def divergence(**more: Any) -> tuple[float, float]:
        spec = {**ONLINE, "training": {**training, **more}}
        name = "-".join(more)
        last = train(tmp_path, "ppo", spec, limits=ALLOWED, task_id=f"kl-{name}")["metrics"]["last"]
        return last["kl"], last["passes"]

    free, passes = divergence(kl_coef=0.0)
    assert passes == 4
    assert divergence(kl_coef=1.0, seed=42)[0] < free * 0.8
    held, passes = divergence(kl_coef=0.0, target_kl=0.01)
    assert passes < 4
    assert held < free * 0.8


def test_ppo_begins_each_update_where_its_rollout_was(tmp_path: Path) -> None:
    training = {"steps": 3, "batch_size": 8, "ppo_epochs": 1, "learning_rate": 3e-2, "max_seq_length": 64}
    spec = {**ONLINE, "training": {**training, "logging_steps": 1}}
    last = train(tmp_path, "ppo", {**spec, "lora": {"r": 4}}, limits=ALLOWED)["metrics"]["last"]
    assert (last["approx_kl"], last["clip_fraction"]) == (pytest.approx(0, abs=1e-6), 0)  # no dropout between them
    noisy = train(tmp_path, "ppo", {**spec, "lora": {"r": 4, "dropout": 0.5}}, limits=ALLOWED, task_id="noisy")
    assert noisy["metrics"]["last"]["approx_kl"] > 1e-5  # unless it is asked for


def test_ppos_passes_through_the_model_are_its_own_affair(tmp_path: Path) -> None:
    training = {"steps": 2, "batch_size": 8, "ppo_epochs": 2, "max_seq_length": 64, "logging_steps": 1}

    def history(task_id: str, **more: Any) -> list[dict[str, float]]:
        spec = {**ONLINE, "training": {**training, "learning_rate": 1e-3, **more}}
        found: list[dict[str, float]] = train(tmp_path, "ppo", spec, limits=ALLOWED, task_id=task_id)["metrics"][
            "loss_history"
        ]
        return found

    whole = history("whole")
    parts = history("parts", per_device_train_batch_size=2, gradient_accumulation_steps=4, mini_batch_size=8)
    for one, other in zip(whole, parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["reward"] == other["reward"]


@pytest.mark.parametrize(
    ("task_type", "data"),
    [("reward", {"preferences": PAIRS}), ("kto", {"examples": EXAMPLES}), ("grpo", LETTERS), ("rloo", LETTERS)],
)
def test_every_trainer_can_train_an_adapter(tmp_path: Path, task_type: str, data: dict[str, Any]) -> None:
    online = {"reward": LIKES_E, "generation": {"max_new_tokens": 4}} if data is LETTERS else {}
    training = {"max_steps": 2, "batch_size": 8, "max_seq_length": 32, "gradient_checkpointing": True}
    spec = {**online, "data": data, "training": training, "lora": {"r": 4}}
    result = train(tmp_path, task_type, spec, limits=ALLOWED)
    written = json.loads((Path(result["final_lora_path"]) / "adapter_config.json").read_text())
    assert written["task_type"] == ("SEQ_CLS" if task_type == "reward" else "CAUSAL_LM")


@pytest.mark.parametrize("task_type", ["sft", "ppo"])
def test_bfloat16_and_less_memory(tmp_path: Path, task_type: str) -> None:
    online = {} if task_type == "sft" else ONLINE
    training = {"max_steps": 3, "batch_size": 8, "max_seq_length": 64, "bf16": True, "gradient_checkpointing": True}
    spec = {"data": {"prompts": SUMS}, **online, "training": {**training, "logging_steps": 1}}
    result = train(tmp_path, task_type, spec, limits=ALLOWED)
    plain = {**spec, "training": {**training, "logging_steps": 1, "bf16": False, "gradient_checkpointing": False}}
    wanted = train(tmp_path, task_type, plain, limits=ALLOWED, task_id="plain")
    assert losses(result)[0] == pytest.approx(losses(wanted)[0], rel=0.05, abs=0.02)
    assert losses(result) != losses(wanted)


def test_without_saving_there_is_no_model(tmp_path: Path) -> None:
    training = {**QUICK, "max_steps": 2, "save_model": False, "save_strategy": "no"}
    running = start(tmp_path, "sft", {"data": {"prompts": SUMS}, "training": training})
    outcome = running.wait()
    assert outcome.ok
    assert "final_model_path" not in (outcome.result or {})
    assert outcome.archives == ()
    assert list((running.out_dir / "checkpoints").glob("checkpoint-*")) == []


@pytest.mark.parametrize(
    ("task_type", "spec", "message"),
    [
        ("sft", {"training": {"fp16": True}}, "spec.training.fp16: needs a GPU"),
        ("sft", {"training": {"fsdp": True}}, "spec.training.fsdp: accelerate shards on GPUs only"),
        ("sft", {"training": {"trainer_args": {"optimm": 1}}}, "trainer_args.optimm: SFTConfig has no such argument"),
        ("sft", {"training": {"trainer_args": {"warmup_ratio": 0.1}}}, "use warmup_steps, which takes a fraction"),
        ("sft", {"training": {"trainer_args": {"output_dir": "x"}}}, "output_dir: cannot be set; checkpoints lie in"),
        ("sft", {"training": {"trainer_args": {"hub_token": "x"}}}, "hub_token: cannot be set; results go where"),
        ("sft", {"training": {"trainer_args": {"weight_decay": "much"}}}, "spec.training.trainer_args.weight_decay: "),
        (
            "sft",
            {"training": {"trainer_args": {"lr_scheduler_type": "up"}}},
            "spec.training: up is not a valid SchedulerType",
        ),
        (
            "sft",
            {"training": {"batch_size": 2, "trainer_args": {"per_device_train_batch_size": 4}}},
            "spec.training.batch_size sets it already",
        ),
        ("sft", {"model": {**_model(), "transformers": {"dtype": "int4"}}}, "spec.model.transformers.dtype: 'int4'"),
        ("sft", {"model": {**_model(), "transformers": {"device_map": "cuda"}}}, "'cuda', but this task has no GPU"),
        (
            "sft",
            {"model": {**_model(), "transformers": {"use_flash_attention_2": True}}},
            "spec.model.transformers.use_flash_attention_2: flash attention needs a GPU",
        ),
        ("sft", {"model": {"source": {"identifier": "/no/model"}}}, "spec.model.source.identifier: there is no folder"),
        ("sft", {"model": {}}, "spec.model.source: missing"),
        ("lora_sft", {"lora": {"target_modules": ["qq_proj"]}}, "spec.lora.target_modules: the model has no 'qq_proj'"),
        (
            "lora_sft",
            {"lora": {"r": 4}, "model": {**_model(), "transformers": {"load_in_4bit": True}}},
            "bitsandbytes (spec.model.transformers.load_in_4bit) is not installed",
        ),
    ],
)
def test_what_only_the_libraries_know_is_told_as_clearly(
    tmp_path: Path, task_type: str, spec: dict[str, Any], message: str
) -> None:
    assert message in refused(tmp_path, task_type, {"data": {"prompts": SUMS}, **spec})


def test_completions_that_do_not_come_out_even(tmp_path: Path) -> None:
    training = {"batch_size": 6, "num_generations": 4}
    message = refused(tmp_path, "grpo", {**ONLINE, "training": training}, limits=ALLOWED)
    assert "spec.training.num_generations: 4 does not divide the 6 completions" in message
    message = refused(tmp_path, "ppo", {**ONLINE, "training": {"max_seq_length": 8}}, limits=ALLOWED)
    assert "spec.generation.max_new_tokens: 8 leaves no room for a prompt in training.max_seq_length 8" in message


def test_completions_leave_room_for_a_prompt(tmp_path: Path) -> None:
    spec = {**ONLINE, "training": {"max_seq_length": 64, "trainer_args": {"max_completion_length": 64}}}
    message = refused(tmp_path, "grpo", spec, limits=ALLOWED)
    assert message == (
        "spec.training.trainer_args.max_completion_length: 64 leaves no room for a prompt in training.max_seq_length 64"
    )


@pytest.mark.parametrize(
    ("task_type", "section"),
    [("dpo", {"preferences": PAIRS}), ("kto", {"examples": EXAMPLES}), ("reward", {"preferences": PAIRS})],
)
def test_the_adapters_dropout_is_what_the_task_says(tmp_path: Path, task_type: str, section: dict[str, Any]) -> None:
    training = {"max_steps": 2, "batch_size": 4, "logging_steps": 1, "max_seq_length": 64, "learning_rate": 2e-2}
    found = [
        losses(
            train(
                tmp_path,
                task_type,
                {"data": section, "training": training, "lora": {"r": 4, "dropout": share}},
                task_id=f"dropout-{share}",
            )
        )
        for share in (0.0, 0.9)
    ]
    assert found[0] != found[1]


def test_long_prompts_lose_their_beginning(tmp_path: Path) -> None:
    spec = {
        **ONLINE,
        "data": {"prompts": [" ".join(["the node"] * 60)]},
        "training": {"steps": 1, "max_seq_length": 24},
    }
    assert train(tmp_path, "ppo", spec, limits=ALLOWED)["metrics"]["tokens"] <= 8 * 24
    chat = [{"role": "user", "content": "the node " * 60}]
    message = refused(tmp_path, "ppo", {**spec, "data": {"prompts": [chat]}}, limits=ALLOWED, task_id="chat")
    assert "spec.data.prompts[0]: the chat has" in message


def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from runners.models.builtin import resolve
    from tests.kit.training_tasks import shared

    source = resolve("builtin:tiny-llama", shared() / "cache")
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in source.iterdir():
        (plain / path.name).write_bytes(path.read_bytes())
    (plain / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(plain)
    assert tokenizer.chat_template is None
    spec = {"model": {"source": {"identifier": str(plain)}}, "data": {"messages": [[{"role": "user", "content": "a"}]]}}
    assert "has no chat template" in refused(tmp_path, "sft", spec)


@pytest.mark.parametrize(
    ("task_type", "spec", "of_equals"),
    [
        ("dpo", {"data": {"preferences": PAIRS}}, {"rewards/margins": 0.0}),
        ("grpo", {**ONLINE, "training": {"num_generations": 4, "beta": 0.1}}, {"kl": 0.0}),
    ],
)
def test_the_reference_is_of_the_revision_that_is_trained(
    tmp_path: Path, task_type: str, spec: dict[str, Any], of_equals: dict[str, float]
) -> None:
    repository = hub() / f"models--tests--{task_type}"
    for seed, (branch, commit) in enumerate({"main": "a" * 40, "v1": "b" * 40}.items()):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        write_tiny_llama(snapshot, seed=seed)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    model = {"source": {"identifier": f"tests/{task_type}", "revision": "v1"}}
    training = {**spec.get("training", {}), "max_steps": 1, "batch_size": 4, "logging_steps": 1, "max_seq_length": 64}
    result = train(tmp_path, task_type, {**spec, "model": model, "training": training}, limits=ALLOWED)
    assert {name: result["metrics"]["last"][name] for name in of_equals} == pytest.approx(of_equals, abs=1e-3)


def test_missing_model_is_the_tasks_fault_and_not_the_hubs(tmp_path: Path) -> None:
    outcome = run(tmp_path, "sft", {"model": {"source": {"identifier": "nobody/nothing"}}, "data": {"prompts": ["a"]}})
    assert not outcome.ok
    assert "spec.model.source.identifier: 'nobody/nothing' is not in this node's model cache" in outcome.message
