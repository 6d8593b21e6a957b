"""Evaluation while training: on rows of their own, a share, or another split of the dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runners.api import BadRequest, Context, RunnerError
from runners.training.plan import read

pytest.importorskip("trl", reason="needs the extra 'training'")
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer

from runners.training.progress import Meter
from tests.kit.training_tasks import PAIRS, SUMS, refused, start, train

Make = Callable[..., Context]
HELD = ["7 plus 7 is 14", "a slot", "3 plus 4 is 7"]
TRAINING = {"max_steps": 6, "batch_size": 4, "learning_rate": 2e-3, "max_seq_length": 64, "logging_steps": 1}


def loss_of(folder: str, texts: list[str]) -> float:
    """By Transformers alone: over all tokens of `texts`."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text + tokenizer.eos_token)["input_ids"]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def test_eval_loss_is_that_of_the_saved_model(tmp_path: Path) -> None:
    """Also where no evaluation falls on the last step."""
    spec = {"data": {"prompts": SUMS[:16], "eval": {"prompts": HELD}}, "training": {**TRAINING, "eval_steps": 4}}
    result = train(tmp_path, "sft", spec)
    assert result["eval_dataset_size"] == 3
    assert result["dataset_size"] == 16
    history = result["metrics"]["eval_history"]
    assert [point["step"] for point in history] == [4, 6]
    assert result["eval_loss"] == history[-1]["eval_loss"]
    assert result["eval_loss"] == pytest.approx(loss_of(result["final_model_path"], HELD), abs=1e-3)


def test_the_best_weights_are_saved_and_training_ends_early(tmp_path: Path) -> None:
    training = {**TRAINING, "max_steps": 40, "learning_rate": 2e-2, "eval_steps": 1, "save_strategy": "steps"}
    stopping = {"load_best_model_at_end": True, "early_stopping": {"patience": 2}}
    spec = {
        "data": {"prompts": SUMS[:16], "eval": {"prompts": ["the log of a slot", "an engine waits"]}},
        "training": {**training, **stopping},
    }
    result = train(tmp_path, "sft", spec)
    history = result["metrics"]["eval_history"]
    best = min(history, key=lambda point: point["eval_loss"])
    assert result["metrics"]["best_step"] == best["step"]
    assert result["eval_loss"] == best["eval_loss"]
    assert history[-1]["step"] == best["step"] + 2 < 40
    found = loss_of(result["final_model_path"], ["the log of a slot", "an engine waits"])
    assert found == pytest.approx(best["eval_loss"], abs=1e-3)


def test_a_share_of_the_rows_is_held_out(tmp_path: Path) -> None:
    spec = {"data": {"prompts": SUMS[:20], "eval_split": 0.25}, "training": {**TRAINING, "eval_strategy": "steps"}}
    result = train(tmp_path, "sft", spec)
    assert (result["dataset_size"], result["eval_dataset_size"]) == (15, 5)
    assert result["eval_loss"] > 0


def test_another_split_of_a_dataset(tmp_path: Path) -> None:
    parts = {"train": Dataset.from_dict({"text": SUMS[:12]}), "validation": Dataset.from_dict({"text": HELD})}
    for name, part in parts.items():
        (tmp_path / "set").mkdir(exist_ok=True)
        part.to_parquet(str(tmp_path / "set" / f"{name}.parquet"))
    assert DatasetDict(parts)["validation"].num_rows == 3
    data = {"dataset_name": str(tmp_path / "set"), "eval_split": "validation"}
    result = train(tmp_path, "sft", {"data": data, "training": TRAINING})
    assert (result["dataset_size"], result["eval_dataset_size"]) == (12, 3)
    assert result["eval_loss"] == pytest.approx(loss_of(result["final_model_path"], HELD), abs=1e-3)


@pytest.mark.parametrize("task_type", ["lora_sft", "dpo", "kto", "reward", "grpo", "rloo"])
def test_every_trainer_of_trls(tmp_path: Path, task_type: str) -> None:
    example = [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0} for i, p in enumerate(PAIRS)]
    rows: dict[str, tuple[str, list[Any]]] = {
        "lora_sft": ("prompts", SUMS),
        "kto": ("examples", example),
        "grpo": ("prompts", [{"prompt": "2+2=", "answer": 4}, {"prompt": "a", "answer": 2.5}] * 4),
        "rloo": ("prompts", [{"prompt": "2+2=", "answer": 4}, {"prompt": "a", "answer": 2.5}] * 4),
    }
    name, found = rows.get(task_type, ("preferences", PAIRS))
    held = [{"prompt": "2+2=", "answer": "007"}] * 4 if task_type in ("grpo", "rloo") else found[:4]
    rewarded = {"reward": "exact_match", "generation": {"max_new_tokens": 4}} if task_type in ("grpo", "rloo") else {}
    training = {"max_steps": 2, "batch_size": 4, "max_seq_length": 64, "logging_steps": 1, "save_model": False}
    training |= {"num_generations": 2} if rewarded else {}
    data = {name: found[:8], "eval": {name: held}}
    result = train(tmp_path, task_type, {"data": data, "training": {**training, "eval_steps": 1}, **rewarded})
    assert [point["step"] for point in result["metrics"]["eval_history"]] == [1, 2]
    assert isinstance(result["eval_loss"], float)
    assert (result["dataset_size"], result["eval_dataset_size"]) == (8, 4)
    if rewarded:
        assert result["metrics"]["eval_history"][-1]["eval_reward"] == 0


def test_two_ranks_evaluate_together(tmp_path: Path) -> None:
    training = {**TRAINING, "max_steps": 3, "nproc_per_node": 2, "per_device_eval_batch_size": 1, "eval_steps": 2}
    result = train(
        tmp_path, "sft", {"data": {"prompts": SUMS, "eval": {"prompts": ["a slot"] * 4}}, "training": training}
    )
    assert result["metrics"]["world_size"] == 2
    assert [point["step"] for point in result["metrics"]["eval_history"]] == [2, 3]
    assert result["eval_loss"] == pytest.approx(loss_of(result["final_model_path"], ["a slot"]), abs=1e-3)


def test_rows_to_evaluate_on_that_are_too_long_are_named(tmp_path: Path) -> None:
    long = {"prompt": "the node " * 60, "chosen": " yes", "rejected": " no"}
    data = {"preferences": PAIRS[:4], "eval": {"preferences": [long]}}
    message = refused(tmp_path, "reward", {"data": data, "training": {**TRAINING, "max_seq_length": 32}})
    assert "spec.data.eval: no row is left of 1" in message


def test_rows_that_are_trained_and_evaluated_on_are_a_warning(tmp_path: Path) -> None:
    training = {**TRAINING, "max_steps": 1, "save_model": False}
    for task_id, rows in (("shared", [*SUMS[:2], "a slot"]), ("apart", ["a slot", "a log"])):
        spec = {"data": {"prompts": SUMS, "eval": {"prompts": rows}}, "training": training}
        running = start(tmp_path, "sft", spec, task_id=task_id)
        assert running.wait().ok
        said = "2 of 3 different rows to evaluate on are trained on as well"
        assert (said in running.log()) == (task_id == "shared")


def test_an_evaluation_that_is_not_a_number_is_an_error(make_context: Any) -> None:
    meter = Meter(make_context({}))
    meter.evaluated(1, {"eval_loss": 0.5})
    with pytest.raises(RunnerError, match=r"eval_loss is nan at step 2: look for bad rows in spec\.data\.eval"):
        meter.evaluated(2, {"eval_loss": float("nan")})


@pytest.mark.parametrize("margin", ["nan", "inf"])
def test_margins_that_are_no_numbers(tmp_path: Path, margin: str) -> None:
    path = tmp_path / "rows.parquet"
    Dataset.from_list([{**pair, "margin": float(margin)} for pair in PAIRS[:4]]).to_parquet(path)
    message = refused(tmp_path, "reward", {"data": {"dataset_name": str(path)}, "training": TRAINING})
    assert f"column 'margin': a finite number is needed, found {margin}" in message


ROWS = {"prompts": ["a", "b"]}


@pytest.mark.parametrize(
    ("task_type", "data", "training", "message"),
    [
        ("ppo", {**ROWS, "eval": ROWS}, {}, "spec.data.eval: ppo evaluates nothing"),
        ("ppo", {**ROWS, "eval_split": 0.5}, {}, "spec.data.eval_split: ppo evaluates nothing"),
        ("ppo", ROWS, {"eval_steps": 4}, "spec.training.eval_steps: unknown field here; it is one of sft"),
        ("sft", ROWS, {"eval_steps": 4}, "spec.training.eval_steps: no evaluation: spec.data has neither eval"),
        ("sft", ROWS, {"load_best_model_at_end": True}, "spec.training.load_best_model_at_end: no evaluation"),
        ("sft", ROWS, {"early_stopping": {"patience": 2}}, "spec.training.early_stopping: no evaluation"),
        ("sft", {**ROWS, "eval": ROWS}, {"eval_strategy": "no", "eval_steps": 2}, "no evaluation: it is off"),
        ("sft", {**ROWS, "eval": ROWS, "eval_split": 0.5}, {}, "spec.data.eval_split: given besides"),
        ("sft", {**ROWS, "eval_split": 1.5}, {}, "spec.data.eval_split: a share between 0 and 1"),
        ("sft", {**ROWS, "eval_split": "test"}, {}, "spec.data.eval_split: 'test' is a split of a dataset"),
        ("sft", {**ROWS, "eval": {"promps": []}}, {}, "spec.data.eval.promps"),
        ("sft", {**ROWS, "eval": {}}, {}, "spec.data.eval: no data; give one of"),
        ("sft", {**ROWS, "eval": ROWS}, {"early_stopping": {"patience": 0}}, "spec.training.early_stopping.patience"),
        (
            "sft",
            {**ROWS, "eval": ROWS},
            {"load_best_model_at_end": True, "save_strategy": "no"},
            "spec.training.load_best_model_at_end: needs checkpoints",
        ),
        (
            "sft",
            {**ROWS, "eval": ROWS},
            {"load_best_model_at_end": True, "eval_steps": 2, "save_steps": 3},
            "spec.training.save_steps: load_best_model_at_end writes a checkpoint at each evaluation",
        ),
    ],
)
def test_what_does_not_go_together(
    make_context: Make, task_type: str, data: dict[str, Any], training: dict[str, Any], message: str
) -> None:
    reward = {"reward": "length"} if task_type == "ppo" else {}
    spec = {"model": {"source": {"identifier": "x"}}, "data": data, "training": training, **reward}
    with pytest.raises(BadRequest) as caught:
        read(task_type, make_context(spec))
    assert message in str(caught.value)
