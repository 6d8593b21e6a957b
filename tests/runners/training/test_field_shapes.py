"""Training documents of the field: sizes of ppo, reward models without named labels, shapes of rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runners.api import Context
from runners.training import ppo_batches
from runners.training.plan import read
from runners.training.settings import RewardModel
from tests.kit.training_tasks import train

Make = Callable[..., Context]
QUIET = {"max_steps": 1, "save_model": False, "save_strategy": "no", "max_seq_length": 64}


@pytest.mark.parametrize(
    ("training", "sizes"),
    [
        ({"batch_size": 4, "mini_batch_size": 1, "gradient_accumulation_steps": 4}, (4, 4, 1)),
        ({"batch_size": 16, "mini_batch_size": 2, "gradient_accumulation_steps": 4}, (16, 8, 2)),
        ({"batch_size": 4, "mini_batch_size": 2, "gradient_accumulation_steps": 4}, (4, 4, 2)),
        ({"batch_size": 6, "mini_batch_size": 1, "gradient_accumulation_steps": 4}, (6, 3, 1)),
        ({"mini_batch_size": 2, "gradient_accumulation_steps": 4}, (8, 8, 2)),
        ({"batch_size": 4, "mini_batch_size": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
         (4, 4, 1)),
        ({"batch_size": 4, "gradient_accumulation_steps": 8}, (4, 4, 1)),
    ],
)  # fmt: skip
def test_an_accumulation_larger_than_the_mini_batch(
    make_context: Make, training: dict[str, Any], sizes: tuple[int, int, int]
) -> None:
    pytest.importorskip("trl", reason="needs the extra 'training'")
    spec = {"model": {"source": {"identifier": "m"}}, "data": {"prompts": ["p"]}, "reward": "length"}
    warnings: list[str] = []
    found = ppo_batches.sizes(read("ppo", make_context({**spec, "training": training})), warnings.append)
    assert (found.update, found.step, found.forward) == sizes
    assert len(warnings) == 1, "what was made of it is said"


@pytest.mark.parametrize(
    ("given", "labels", "wanted", "warned"),
    [
        ({}, ["no", "yes"], (1, None), "'yes' is taken"),
        ({}, ["POSITIVE", "NEGATIVE"], (0, None), "'positive' is taken"),
        ({}, ["LABEL_0", "LABEL_1"], (1, None), "'label_1' is taken"),
        ({"negative_label": "yes"}, ["no", "yes"], (0, 1), "'no' is taken"),
        ({"positive_label": "no"}, ["no", "yes"], (0, None), None),
        ({"type": "sentiment"}, ["NEGATIVE", "POSITIVE"], (1, 0), None),
        ({"type": "sentiment"}, ["bad", "good"], (1, 0), "'good' is taken"),
    ],
)
def test_two_labels_without_a_positive_one(
    given: dict[str, Any], labels: list[str], wanted: tuple[int, int | None], warned: str | None
) -> None:
    pytest.importorskip("torch", reason="needs the extra 'training'")
    from runners.training.reward_model import labels_of

    warnings: list[str] = []
    known = {label.lower(): i for i, label in enumerate(labels)}
    assert labels_of(RewardModel(identifier="j", **given), known, 2, warnings.append) == wanted
    assert [warned in each for each in warnings] == ([] if warned is None else [True])


def rows_file(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"jsonl": {"path": str(path)}}


def asked(name: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": name}, {"role": "assistant", "content": answer}]


ULTRA = [
    {"prompt": name, "prompt_id": "7f", "chosen": asked(name, good), "rejected": asked(name, bad),
     "messages": asked(name, good), "score_chosen": 8.0, "score_rejected": 2.5}
    for name, good, bad in (("Name a fruit.", "A pear.", "No."), ("Name a city.", "Rome.", "Why?"))
]  # fmt: skip


@pytest.mark.parametrize("task_type", ["dpo", "reward"])
@pytest.mark.parametrize("source", ["jsonl", "saved", "split"])
def test_ultrafeedbacks_shape(tmp_path: Path, task_type: str, source: str) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra 'training'")
    data = rows_file(tmp_path / "x.jsonl", ULTRA)
    if source != "jsonl":
        parts = {"train_prefs": datasets.Dataset.from_list(ULTRA), "test_prefs": datasets.Dataset.from_list(ULTRA)}
        datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
        data = {"dataset_name": str(tmp_path / "saved"), "split": "train_prefs"}
    if source == "split":
        data |= {"config_name": "train_prefs", "split": "train[:2]"}
    result = train(tmp_path, task_type, {"data": data, "training": {**QUIET, "batch_size": 2}})
    assert (result["dataset_size"], result["dropped_rows"]) == (2, {})
    assert ("warnings" in result) is (source == "split")


def test_a_text_column_of_lists_of_strings(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs the extra 'training'")
    one = train(tmp_path, "sft", {"data": rows_file(tmp_path / "a.jsonl", [{"text": ["the node", "waits"]}] * 2),
                                  "training": {**QUIET, "batch_size": 2}})  # fmt: skip
    two = train(tmp_path, "sft", {"data": {"prompts": ["the node\nwaits"] * 2}, "training": {**QUIET, "batch_size": 2}})
    assert one["metrics"]["loss_history"] == two["metrics"]["loss_history"]
    assert one["metrics"]["tokens"] == two["metrics"]["tokens"]
