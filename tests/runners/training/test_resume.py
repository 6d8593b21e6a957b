"""Stop and go: checkpoints on a cancel, after kill -9, and from elsewhere; torn ones are skipped."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the extra 'training'")

from flowmesh.processes.pipe import Progress
from runners.training.checkpoints import torn
from tests.kit.training_tasks import (
    PAIRS,
    QUICK,
    SUMS,
    losses,
    refused,
    start,
    train,
)
from tests.kit.training_zygote import Running

ALLOWED = {"reward_callables": ["tests.kit.training_tasks:*"]}
STEPS = {**QUICK, "save_steps": 4, "logging_steps": 1}
SPECS: dict[str, dict[str, Any]] = {
    "sft": {"data": {"prompts": SUMS}, "training": STEPS},
    "lora_sft": {"data": {"prompts": SUMS}, "training": STEPS, "lora": {"r": 4, "dropout": 0.1}},
    "dpo": {"data": {"preferences": PAIRS}, "training": {**STEPS, "batch_size": 4}},
    "ppo": {
        "data": {"prompts": ["a task", "the node", "a slot"]},
        "reward": {"function": "tests.kit.training_tasks:likes_e"},
        "generation": {"max_new_tokens": 4},
        "training": {**STEPS, "max_seq_length": 32},
    },
}


def checkpoints(running: Running) -> list[str]:
    folder = running.out_dir / "checkpoints"
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def weights(result: dict[str, Any]) -> dict[str, bytes]:
    path = result.get("final_model_path") or result["final_lora_path"]
    return {file.name: file.read_bytes() for file in Path(path).glob("*.safetensors")}


def whole_run(tmp_path: Path, task_type: str) -> dict[str, Any]:
    return train(tmp_path, task_type, SPECS[task_type], task_id="whole", limits=ALLOWED)


def with_checkpoint(tmp_path: Path, whole: dict[str, Any], *names: str) -> Path:
    """The folder of a task that was ended after the checkpoints of these names."""
    folder = tmp_path / "results" / "again" / "checkpoints"
    for name in names:
        shutil.copytree(Path(whole["checkpoints_dir"]) / name, folder / name)
    return folder


@pytest.mark.parametrize("task_type", SPECS)
def test_a_resumed_run_ends_as_if_it_had_never_been_stopped(tmp_path: Path, task_type: str) -> None:
    whole = whole_run(tmp_path, task_type)
    folder = with_checkpoint(tmp_path, whole, "checkpoint-8")
    again = train(tmp_path, task_type, SPECS[task_type], task_id="again", limits=ALLOWED)
    assert again["resume_from_path"] == str(folder / "checkpoint-8")
    assert (again["metrics"]["first_step"], again["metrics"]["steps"]) == (8, 12)
    assert losses(again) == losses(whole)
    assert weights(again) == weights(whole)


@pytest.mark.parametrize("task_type", ["lora_sft", "ppo"])
def test_a_run_that_ended_before_its_result_was_saved_trains_no_further_step(tmp_path: Path, task_type: str) -> None:
    whole = whole_run(tmp_path, task_type)
    with_checkpoint(tmp_path, whole, "checkpoint-12")
    again = train(tmp_path, task_type, SPECS[task_type], task_id="again", limits=ALLOWED)
    assert (again["metrics"]["first_step"], again["metrics"]["steps"]) == (12, 12)
    assert losses(again) == losses(whole)
    assert weights(again) == weights(whole)


def test_torn_checkpoints_are_skipped_with_a_warning(tmp_path: Path) -> None:
    whole = whole_run(tmp_path, "sft")
    folder = with_checkpoint(tmp_path, whole, "checkpoint-4", "checkpoint-8", "checkpoint-12")
    model = folder / "checkpoint-12" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-100])
    (folder / "checkpoint-8" / "trainer_state.json").unlink()
    running = start(tmp_path, "sft", SPECS["sft"], task_id="again")
    outcome = running.wait()
    assert outcome.ok, outcome.message
    assert (outcome.result or {})["metrics"]["first_step"] == 4
    log = running.log()
    assert "skipped incomplete checkpoint-12: model.safetensors: " in log
    assert "skipped incomplete checkpoint-8: no trainer_state.json" in log


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("optimizer.pt", 1000, "optimizer.pt ends early"),
        ("optimizer.pt", None, "no optimizer.pt"),
        ("scheduler.pt", None, "no scheduler.pt"),
        ("rng_state.pth", 50, "rng_state.pth ends early"),
        ("rng_state.pth", None, "no rng_state.pth"),
        ("model.safetensors", None, "model.safetensors: missing"),
        ("model.safetensors", 5, "model.safetensors: its header cannot be read"),
        ("trainer_state.json", 20, "trainer_state.json: "),
    ],
)
def test_what_makes_a_checkpoint_torn(trained: Path, tmp_path: Path, name: str, size: int | None, reason: str) -> None:
    folder = shutil.copytree(trained / "checkpoint-8", tmp_path / "checkpoint-8")
    assert torn(folder) == ""
    if size is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])
    assert torn(folder).startswith(reason)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a whole run."""
    return Path(whole_run(tmp_path_factory.mktemp("trained"), "sft")["checkpoints_dir"])


def test_a_checkpoint_says_its_own_step(trained: Path, tmp_path: Path) -> None:
    assert (
        torn(shutil.copytree(trained / "checkpoint-8", tmp_path / "checkpoint-9")) == "trainer_state.json says step 8"
    )


ENDLESS = {**STEPS, "max_steps": 100_000, "trainer_args": {"save_total_limit": 2}}


@pytest.mark.parametrize("task_type", ["sft", "ppo"])
def test_kill_9_then_the_same_task_again(tmp_path: Path, task_type: str) -> None:
    spec = {**SPECS[task_type], "training": {**ENDLESS, "max_seq_length": 32}}
    first = start(tmp_path, task_type, spec, limits=ALLOWED)
    first.wait_for(lambda frame: isinstance(frame, Progress) and frame.done >= 5)
    first.kill(signal.SIGKILL)
    assert first.ended(10)
    first.pipe.close()
    assert checkpoints(first)
    second = start(tmp_path, task_type, spec, limits=ALLOWED)
    begun = second.wait_for(lambda frame: isinstance(frame, Progress) and frame.unit == "steps")
    assert begun.done >= 4
    assert begun.done % 4 == 0
    second.cancel()
    assert second.wait(20).fault == "cancelled"


@pytest.mark.parametrize("task_type", ["sft", "lora_sft", "ppo"])
def test_checkpoint_then_stop(tmp_path: Path, task_type: str) -> None:
    spec = {
        **SPECS[task_type],
        "training": {**SPECS[task_type]["training"], "max_steps": 100_000, "save_strategy": "no"},
    }
    running = start(tmp_path, task_type, spec, limits=ALLOWED)
    running.wait_for(lambda frame: isinstance(frame, Progress) and frame.done >= 2)
    running.cancel(checkpoint=True)
    outcome = running.wait(20)
    assert (outcome.fault, outcome.message) == ("cancelled", "cancelled by a test")
    (name,) = checkpoints(running)
    folder = running.out_dir / "checkpoints" / name
    assert torn(folder) == ""
    step = json.loads((folder / "trainer_state.json").read_text())["global_step"]
    assert name == f"checkpoint-{step}"
    again = {**SPECS[task_type], "training": {**SPECS[task_type]["training"], "max_steps": step + 2}}
    result = train(tmp_path, task_type, again, limits=ALLOWED)
    assert (result["metrics"]["first_step"], result["metrics"]["steps"]) == (step, step + 2)


def test_a_plain_cancel_leaves_at_once(tmp_path: Path) -> None:
    spec = {**SPECS["sft"], "training": {**SPECS["sft"]["training"], "max_steps": 100_000, "save_strategy": "no"}}
    running = start(tmp_path, "sft", spec)
    running.wait_for(lambda frame: isinstance(frame, Progress) and frame.done >= 2)
    running.cancel()
    assert running.wait(10).fault == "cancelled"
    assert checkpoints(running) == []


def test_a_cancel_inside_gradient_accumulation(tmp_path: Path) -> None:
    accumulating = {**QUICK, "batch_size": 1, "gradient_accumulation_steps": 10_000, "num_train_epochs": 10_000}
    running = start(tmp_path, "sft", {**SPECS["sft"], "training": {**accumulating, "max_steps": 5}})
    running.wait_for(lambda frame: isinstance(frame, Progress) and frame.unit == "steps")
    running.cancel()
    assert running.wait(10).fault == "cancelled"


def test_resume_from_path_takes_a_checkpoint_or_a_folder_of_them(tmp_path: Path) -> None:
    whole = whole_run(tmp_path, "sft")
    first = Path(whole["checkpoints_dir"])
    for task_id, path, step in (
        ("one", first / "checkpoint-4", 4),
        ("all", first, 12),
        ("task", Path("whole"), 12),  # relative to the node's results
    ):
        more = {**SPECS["sft"], "training": {**STEPS, "max_steps": 13, "resume_from_path": str(path)}}
        result = train(tmp_path, "sft", more, task_id=task_id)
        assert result["metrics"]["first_step"] == step
        assert result["metrics"]["steps"] == 13
    for path, message in (("nothing", "there is no folder"), (str(tmp_path), "holds no whole checkpoint-N folder")):
        more = {**SPECS["sft"], "training": {**STEPS, "resume_from_path": path}}
        found = refused(tmp_path, "sft", more, task_id="none")
        assert found.startswith("spec.training.resume_from_path: ")
        assert message in found


def test_checkpoint_load_goes_on_from_a_checkpoint_weights_or_an_adapter(tmp_path: Path) -> None:
    whole = whole_run(tmp_path, "sft")
    by_path = {"load": {"type": "local", "path": f"{whole['checkpoints_dir']}/checkpoint-8"}}
    result = train(tmp_path, "sft", {**SPECS["sft"], "checkpoint": by_path}, task_id="resumed")
    assert (result["metrics"]["first_step"], weights(result)) == (8, weights(whole))

    short = {**STEPS, "max_steps": 2}
    result = train(
        tmp_path, "sft", {**SPECS["sft"], "training": short, "checkpoint": {"load": {"taskId": "whole"}}}, task_id="on"
    )
    assert result["metrics"]["first_step"] == 0
    assert losses(result)[0] < losses(whole)[0] / 3  # it began with what the other task had learnt

    adapter = train(
        tmp_path, "lora_sft", {**SPECS["lora_sft"], "training": {**STEPS, "learning_rate": 3e-2}}, task_id="a"
    )
    load = {"load": {"path": adapter["final_lora_path"]}}
    base = losses(adapter)[0]
    onward = {"data": {"prompts": SUMS}, "training": short, "checkpoint": load}
    continued = train(tmp_path, "lora_sft", {**onward, "lora": {"r": 4}}, task_id="b")
    assert losses(continued)[0] < base - 0.5
    merged = train(tmp_path, "sft", onward, task_id="c")
    assert losses(merged)[0] == pytest.approx(losses(continued)[0], rel=0.1)
    assert "final_model_path" in merged
    message = refused(tmp_path, "lora_sft", {**onward, "lora": {"r": 8}}, task_id="d")
    assert "spec.lora.r: 8, but the adapter in final_lora has 4" in message


@pytest.mark.parametrize("task_type", ["dpo", "ppo"])
def test_preferences_on_top_of_an_adapter(tmp_path: Path, task_type: str) -> None:
    adapter = train(
        tmp_path, "lora_sft", {**SPECS["lora_sft"], "training": {**STEPS, "learning_rate": 3e-2}}, task_id="a"
    )
    spec = {**SPECS[task_type], "lora": {"r": 4}, "checkpoint": {"load": {"path": adapter["final_lora_path"]}}}
    result = train(tmp_path, task_type, spec, task_id="b", limits=ALLOWED)
    first = result["metrics"]["loss_history"][0]
    if task_type == "dpo":
        assert first["loss"] == pytest.approx(0.6931, abs=1e-3)  # the adapter as it was is the reference
    else:
        assert first["kl"] == pytest.approx(0, abs=1e-3)
    names = {path.name for path in Path(result["final_lora_path"]).iterdir()}
    assert "adapter_model.safetensors" in names
    assert "ref" not in names


def test_a_resumed_run_on_top_of_an_adapter_goes_on_with_what_it_had_learnt(tmp_path: Path) -> None:
    adapter = train(tmp_path, "lora_sft", SPECS["lora_sft"], task_id="a")
    spec = {**SPECS["dpo"], "lora": {"r": 4}, "checkpoint": {"load": {"path": adapter["final_lora_path"]}}}
    spec["training"] = {**spec["training"], "learning_rate": 2e-2}
    whole = train(tmp_path, "dpo", spec, task_id="whole")
    assert losses(whole)[8] < 0.5 < losses(whole)[0]
    folder = with_checkpoint(tmp_path, whole, "checkpoint-8")
    again = train(tmp_path, "dpo", spec, task_id="again")
    assert again["resume_from_path"] == str(folder / "checkpoint-8")
    assert losses(again) == losses(whole)
    assert weights(again) == weights(whole)
    del spec["checkpoint"]
    spec["training"]["resume_from_path"] = str(folder / "checkpoint-8")
    elsewhere = train(tmp_path, "dpo", spec, task_id="elsewhere")
    assert losses(elsewhere)[-4:] == pytest.approx(losses(whole)[-4:], abs=1e-4)


def test_a_merged_adapter_is_also_the_reference(tmp_path: Path) -> None:
    adapter = train(
        tmp_path, "lora_sft", {**SPECS["lora_sft"], "training": {**STEPS, "learning_rate": 3e-2}}, task_id="a"
    )
    spec = {"data": {"preferences": PAIRS}, "training": {**QUICK, "max_steps": 1, "nproc_per_node": 2}}
    result = train(tmp_path, "dpo", {**spec, "checkpoint": {"load": {"path": adapter["final_lora_path"]}}}, task_id="b")
    assert losses(result)[0] == pytest.approx(0.6931, abs=1e-3)


def test_what_cannot_be_gone_on_from(tmp_path: Path) -> None:
    whole = whole_run(tmp_path, "sft")
    load = {"load": {"path": whole["checkpoints_dir"]}}
    message = refused(tmp_path, "lora_sft", {**SPECS["lora_sft"], "checkpoint": load}, task_id="lora")
    assert "spec.lora: checkpoint-12 is the checkpoint of a run that trained all weights" in message
    (tmp_path / "results" / "empty").mkdir()
    message = refused(tmp_path, "sft", {**SPECS["sft"], "checkpoint": {"load": {"taskId": "empty"}}}, task_id="e")
    assert "spec.checkpoint.load" in message


def test_a_checkpoint_of_another_task_type_is_refused(tmp_path: Path) -> None:
    """A language model's has no head for rewards: it would be random, and trained on from there."""
    sft = train(tmp_path, "sft", {"data": {"prompts": SUMS}, "training": {**STEPS, "max_steps": 1}}, task_id="sft")
    training = {**STEPS, "resume_from_path": sft["checkpoints_dir"]}
    message = refused(tmp_path, "reward", {"data": {"preferences": PAIRS}, "training": training}, task_id="reward")
    assert "spec.training.resume_from_path: the checkpoint lacks 'score.weight' (1 weights)" in message


def test_an_adapter_of_another_base_model_is_a_warning(tmp_path: Path) -> None:
    """Where all shapes are the same, only the name that the adapter's files have shows it."""
    lora = train(tmp_path, "lora_sft", {**SPECS["lora_sft"], "training": {**STEPS, "max_steps": 1}}, task_id="first")
    shutil.copytree(Path(json_of(lora, "adapter_config.json")["base_model_name_or_path"]), tmp_path / "other-7b")
    for task_id, more in (("same", {}), ("other", {"model": {"source": {"identifier": str(tmp_path / "other-7b")}}})):
        spec = {**SPECS["lora_sft"], "training": {**STEPS, "max_steps": 1}, **more}
        running = start(
            tmp_path, "lora_sft", {**spec, "checkpoint": {"load": {"taskId": "first", "subdir": "final_lora"}}},
            task_id=task_id,
        )  # fmt: skip
        assert running.wait().ok
        assert ("if they are different models" in running.log()) == (task_id == "other")


def json_of(result: dict[str, Any], name: str) -> dict[str, Any]:
    return dict(json.loads(Path(result["final_lora_path"], name).read_text()))
