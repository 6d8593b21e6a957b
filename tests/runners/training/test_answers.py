"""What exact_match compares with is what the document says: 4 is not 4.0, and true is not True."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runners.api import BadRequest, Context

pytest.importorskip("trl", reason="needs the extra 'training'")
from datasets import Dataset

from runners.training import data, inputs, rewards
from runners.training.plan import read

Make = Callable[..., Context]
MIXED = [
    [4, 2.5],
    [4, "four"],
    [4, 4.0],
    ["007", 7],
    ["4", True],
    [True, False],
    [0.1, 1],
    [10**20, 1],
    [[1, 2.5], {"a": 4}],
    ["null", "a"],
]


def in_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def graded(make_context: Make, section: dict[str, Any], completions: list[str]) -> list[float]:
    ctx = make_context({"model": {"source": {"identifier": "x"}}, "data": section, "reward": "exact_match"})
    plan = read("grpo", ctx)
    rows = data.load(plan, ctx, inputs.fetch(plan, ctx).jsonl)
    call = rewards.for_trl(rewards.load(plan, ctx, "cpu", rows)[0], rows.as_json)
    columns = {name: rows.dataset[name][:] for name in rows.dataset.column_names if name != "prompt"}
    return call(list(rows.dataset["prompt"]), completions, **columns)


@pytest.mark.parametrize("answers", MIXED, ids=str)
@pytest.mark.parametrize("source", ["inline", "jsonl"])
def test_the_documents_own_values(make_context: Make, tmp_path: Path, answers: list[Any], source: str) -> None:
    rows = [{"prompt": "a", "answer": answer} for answer in answers]
    section: dict[str, Any] = {"prompts": rows}
    if source == "jsonl":
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"query": "a", "answer": answer}) + "\n" for answer in answers))
        section = {"jsonl_path": str(path)}
    texts = [in_json(answer) for answer in answers]
    assert graded(make_context, section, texts) == [1.0, 1.0]
    assert graded(make_context, section, [f"{text}.0" for text in texts]) == [0.0, 0.0]


def test_a_named_column_of_numbers(make_context: Make, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "a", "gold": 4}\n{"query": "b", "gold": 2.5}\n')
    section = {"jsonl": {"path": str(path), "response_field": "gold"}}
    assert graded(make_context, section, ["4", "2.5"]) == [1.0, 1.0]


@pytest.mark.parametrize("answers", [[4, None], [None, "a"], [None, None]])
def test_a_row_without_an_answer_is_named(make_context: Make, answers: list[Any]) -> None:
    rows = [{"prompt": "a", "answer": answer} for answer in answers]
    with pytest.raises(BadRequest, match=rf"spec\.data\.prompts\[{answers.index(None)}\]: column 'answer': no answer"):
        graded(make_context, {"prompts": rows}, ["4", "4"])


def test_other_rewards_see_the_documents_values(make_context: Make) -> None:
    rows = [{"prompt": "a", "level": 4, "tags": ["x"]}, {"prompt": "b", "level": 2.5, "tags": []}]
    ctx = make_context({"model": {"source": {"identifier": "x"}}, "data": {"prompts": rows}, "reward": "length"})
    loaded = data.load(read("grpo", ctx), ctx, None)
    columns = {name: loaded.dataset[name][:] for name in ("level", "tags")}
    found = rewards.decoded(columns, loaded.as_json)
    assert found == {"level": [4, 2.5], "tags": [["x"], []]}
    assert [type(value) for value in found["level"]] == [int, float]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_datasets_integers_that_became_floats(make_context: Make, tmp_path: Path, name: str) -> None:
    """A column of Parquet does not show whether it held 4 or 4.0."""
    rows = [{"prompt": "a", "answer": 4}, {"prompt": "b", "answer": 2.5}]
    if name.endswith("jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Dataset.from_dict({"prompt": ["a", "b"], "answer": [4.0, 2.5]}).to_parquet(str(tmp_path / name))
    section = {"dataset_name": str(tmp_path / name)}
    assert graded(make_context, section, ["4", "2.5"]) == [1.0, 1.0]
    if name.endswith("parquet"):  # JSONL still shows that it wrote 4
        assert graded(make_context, section, ["4.0", "2"]) == [1.0, 0.0]
