"""Rows that a trainer leaves out are counted with the reason; a run that has none left, or no step, is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the extra 'training'")

from tests.kit.training_tasks import refused, start, train

LONG = "the node returns its memory and then a task reads the log again " * 6
FITS = 32
TRAINING = {"max_steps": 1, "batch_size": 2, "save_strategy": "no", "save_model": False, "max_seq_length": FITS}
DATA: dict[str, tuple[str, Any, Any]] = {
    "dpo": (
        "preferences",
        {"prompt": "the node", "chosen": " a slot", "rejected": " a log"},
        {"prompt": LONG, "chosen": " yes", "rejected": " no"},
    ),
    "reward": (
        "preferences",
        {"prompt": "the node", "chosen": " a slot", "rejected": " a log"},
        {"prompt": LONG, "chosen": " yes", "rejected": " no"},
    ),
    "kto": (
        "examples",
        {"prompt": "the node", "completion": " a slot", "label": True},
        {"prompt": LONG, "completion": " yes", "label": False},
    ),
}
REASON = {
    "dpo": "the prompt alone fills spec.training.max_seq_length",
    "kto": "the prompt alone fills spec.training.max_seq_length",
    "reward": "longer than spec.training.max_seq_length",
}


@pytest.mark.parametrize("task_type", ["dpo", "kto", "reward"])
def test_rows_that_are_too_long(tmp_path: Path, task_type: str) -> None:
    name, short, long = DATA[task_type]
    spec = {"data": {name: [long, short, long, short]}, "training": TRAINING}
    result = train(tmp_path, task_type, spec, task_id="some")
    assert (result["dataset_size"], result["dropped_rows"]) == (2, {REASON[task_type]: 2})
    log = next((tmp_path / "results").glob("some/logs/*err*"), None)
    assert log is None or "rows dropped" in log.read_text()
    message = refused(tmp_path, task_type, {**spec, "data": {name: [long] * 4}}, task_id="none")
    assert f"no row is left of 4; dropped: 4 ({REASON[task_type]})" in message
    assert message.endswith(f"it is {FITS}: raise it")


@pytest.mark.parametrize(("rate", "changes"), [(1e-30, False), (1e-4, True)])
def test_a_run_that_changes_no_weight_is_a_warning(tmp_path: Path, rate: float, changes: bool) -> None:
    training = {**TRAINING, "learning_rate": rate}
    running = start(tmp_path, "sft", {"data": {"prompts": ["a slot", "a log"]}, "training": training})
    assert running.wait().ok
    assert ("not one weight changed in 1 steps" in running.log()) != changes


YES_AND_NO = {"prompt": "the node", "chosen": " yes", "rejected": " no"}


@pytest.mark.parametrize("task_type", ["dpo", "reward"])
def test_answers_that_are_the_same(tmp_path: Path, task_type: str) -> None:
    """Their loss has no gradient: a run of nothing else would save an untouched model."""
    same = {**YES_AND_NO, "rejected": " yes"}
    spec = {"data": {"preferences": [same, YES_AND_NO, same, YES_AND_NO]}, "training": TRAINING}
    result = train(tmp_path, task_type, spec, task_id="some")
    assert (result["dataset_size"], result["dropped_rows"]) == (2, {"chosen and rejected are the same": 2})
    message = refused(tmp_path, task_type, {**spec, "data": {"preferences": [same] * 2}}, task_id="none")
    assert "no row is left of 2; dropped: 2 (chosen and rejected are the same)" in message


def test_answers_that_are_the_same_as_far_as_they_are_read(tmp_path: Path) -> None:
    row = {"prompt": "the node", "chosen": LONG + "yes", "rejected": LONG + "no"}
    reason = "chosen and rejected are the same within spec.training.max_seq_length"
    spec = {"data": {"preferences": [row, YES_AND_NO, YES_AND_NO]}, "training": TRAINING}
    assert train(tmp_path, "dpo", spec, task_id="some")["dropped_rows"] == {reason: 1}
    message = refused(tmp_path, "dpo", {**spec, "data": {"preferences": [row] * 2}}, task_id="none")
    assert reason in message
    assert message.endswith("raise it")


@pytest.mark.parametrize("task_type", ["dpo", "reward", "kto"])
def test_empty_answers(tmp_path: Path, task_type: str) -> None:
    name, whole, _ = DATA[task_type]
    empty = {**whole, "completion" if task_type == "kto" else "chosen": ""}
    spec = {"data": {name: [empty, whole, whole]}, "training": TRAINING}
    result = train(tmp_path, task_type, spec, task_id="some")
    assert (result["dataset_size"], result["dropped_rows"]) == (2, {"an empty answer": 1})
    assert "2 (an empty answer)" in refused(tmp_path, task_type, {**spec, "data": {name: [empty] * 2}}, task_id="none")


def test_sft_rows_with_an_empty_response(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response\nthe node,a slot\na task,\nthe log,a slot\n")
    data = {"dataset_name": str(path), "prompt_column": "prompt", "response_column": "response"}
    result = train(tmp_path, "sft", {"data": data, "training": TRAINING})
    assert (result["dataset_size"], result["dropped_rows"]) == (2, {"empty": 1})


CUT: dict[str, tuple[str, list[Any]]] = {
    "sft": ("prompts", [LONG, "a slot"]),
    "dpo": ("preferences", [{"prompt": "the node", "chosen": LONG, "rejected": " a log"}, DATA["dpo"][1]]),
    "kto": ("examples", [{"prompt": "the node", "completion": LONG, "label": True}, DATA["kto"][1]]),
    "grpo": ("prompts", [LONG, "a slot"]),
}


@pytest.mark.parametrize("task_type", list(CUT))
def test_rows_that_are_cut(tmp_path: Path, task_type: str) -> None:
    name, (long, short) = CUT[task_type]
    online = {"reward": "length", "generation": {"max_new_tokens": 4}} if task_type == "grpo" else {}
    training = {**TRAINING, **({"num_generations": 2} if online else {})}
    result = train(tmp_path, task_type, {"data": {name: [long, short, short]}, "training": training, **online})
    assert (result["dataset_size"], result["dropped_rows"], result["truncated_rows"]) == (3, {}, 1)


def test_sft_rows_without_a_token_to_predict(tmp_path: Path) -> None:
    spec = {"data": {"prompts": ["", "a slot", "a log"]}, "training": TRAINING}
    result = train(tmp_path, "sft", spec, task_id="some")
    assert (result["dataset_size"], result["dropped_rows"]) == (2, {"empty": 1})
    assert "no row is left of 2" in refused(tmp_path, "sft", {**spec, "data": {"prompts": ["", ""]}}, task_id="none")


def test_sft_rows_whose_labels_are_all_masked(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": LONG, "weight": 0}, {"role": "assistant", "content": "a slot"}]
    short = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a slot"}]
    reason = "nothing to learn from within spec.training.max_seq_length"
    result = train(tmp_path, "sft", {"data": {"messages": [chat, short, short]}, "training": TRAINING}, task_id="some")
    assert (result["dataset_size"], result["dropped_rows"]) == (2, {reason: 1})
    message = refused(tmp_path, "sft", {"data": {"messages": [chat]}, "training": TRAINING}, task_id="none")
    assert reason in message


@pytest.mark.parametrize("packing", [False, True])
def test_packed_rows_are_counted_as_rows(tmp_path: Path, packing: bool) -> None:
    spec = {"data": {"prompts": ["a slot", "", "a log", "the node"]}, "training": {**TRAINING, "packing": packing}}
    spec["training"] |= {"batch_size": 1}
    result = train(tmp_path, "sft", spec)
    assert (result["dataset_size"], result["dropped_rows"]) == (3, {"empty": 1})


def test_rows_beyond_max_samples(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a slot"}\n\n' * 5)
    for i, data in enumerate(({"jsonl_path": str(path)}, {"prompts": ["a"] * 5}, {"dataset_name": str(path)})):
        spec = {"data": {**data, "max_samples": 3}, "training": TRAINING}
        result = train(tmp_path, "sft", spec, task_id=f"task-{i}")
        assert (result["dataset_size"], result["dropped_rows"]) == (3, {"beyond spec.data.max_samples": 2})


@pytest.mark.parametrize("task_type", ["grpo", "rloo"])
def test_too_few_prompts_for_one_batch(tmp_path: Path, task_type: str) -> None:
    """TRL's sampler leaves out a last batch that is not full, and that may be all."""
    spec = {
        "data": {"prompts": ["a slot"]},
        "reward": "length",
        "training": {**TRAINING, "batch_size": 8, "num_generations": 2},
    }
    assert "spec.training.batch_size: the 1 rows do not fill one batch" in refused(tmp_path, task_type, spec)
