"""ZeRO on the CPU, where DeepSpeed is installed: it trains, saves a whole model, and goes on from a checkpoint."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the extra 'training'")

from tests.kit.training_tasks import QUICK, SUMS, losses, refused, train

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
AUTO = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}


@pytest.mark.slow
@pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs the extra 'deepspeed'")
@pytest.mark.parametrize(("stage", "ranks"), [(2, 1), (2, 2), (3, 2)])
def test_zero_trains_saves_and_resumes(tmp_path: Path, stage: int, ranks: int) -> None:
    deepspeed = {**AUTO, "zero_optimization": {"stage": stage}}
    training = {**QUICK, "save_steps": 6, "nproc_per_node": ranks, "deepspeed": deepspeed}
    spec = {"data": {"prompts": SUMS}, "training": training}
    whole = train(tmp_path, "sft", spec, threads=2)
    assert whole["metrics"]["sharding"] == f"deepspeed zero-{stage}"
    assert losses(whole)[-1] < losses(whole)[0] / 3
    assert (Path(whole["final_model_path"]) / "model.safetensors").is_file()
    there = Path(whole["checkpoints_dir"]) / "checkpoint-6"
    shutil.copytree(there, tmp_path / "results" / "again" / "checkpoints" / there.name)
    again = train(tmp_path, "sft", spec, threads=2, task_id="again")
    assert again["metrics"]["first_step"] == 6
    assert losses(again) == pytest.approx(losses(whole), rel=1e-3)


@pytest.mark.skipif(HAS_DEEPSPEED, reason="it is installed")
def test_without_it_the_extra_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path, "sft", {"data": {"prompts": SUMS}, "training": {"deepspeed": AUTO}})
    assert message.startswith("deepspeed (spec.training.deepspeed) is not installed in this environment")
    assert "[deepspeed]" in message
