"""Rows to train on, from everywhere a task may have them; what is wrong is told with its place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runners.api import BadRequest, Context
from runners.training import inputs
from runners.training.plan import read
from tests.kit.file_server import Served, Server

datasets = pytest.importorskip("datasets", reason="needs the extra 'training'")
from runners.training import data  # noqa: E402

Make = Callable[..., Context]
MODEL = {"source": {"identifier": "builtin:tiny-llama"}}


def rows(make_context: Make, task_type: str, section: dict[str, Any], **spec: Any) -> list[dict[str, Any]]:
    reward = {"reward": {"function": "length"}} if task_type in ("ppo", "grpo", "rloo") else {}
    ctx = make_context({"model": MODEL, "data": section, **reward, **spec})
    plan = read(task_type, ctx)
    return list(data.load(plan, ctx, inputs.fetch(plan, ctx).jsonl).dataset)


def refusal(make_context: Make, task_type: str, section: dict[str, Any]) -> str:
    with pytest.raises(BadRequest) as caught:
        rows(make_context, task_type, section)
    return str(caught.value)


def write(path: Path, *lines: Any) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def test_texts_and_chats_in_the_task(make_context: Make) -> None:
    assert rows(make_context, "sft", {"prompts": ["a", "b"]}) == [{"text": "a"}, {"text": "b"}]
    assert rows(make_context, "sft", {"messages": [CHAT]}) == [{"messages": CHAT}]
    assert rows(make_context, "sft", {"messages": [{"messages": CHAT}]}) == [{"messages": CHAT}]


def test_the_other_shapes_in_the_task(make_context: Make) -> None:
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert rows(make_context, "dpo", {"preferences": [pair]}) == [pair]
    assert rows(make_context, "reward", {"preferences": [{"chosen": "c", "rejected": "r"}]}) == [
        {"chosen": "c", "rejected": "r"}
    ]
    example = {"prompt": "p", "completion": "c", "label": True}
    assert rows(make_context, "kto", {"examples": [example]}) == [example]
    found = rows(make_context, "grpo", {"prompts": ["a", {"prompt": CHAT[:1], "answer": "4"}][1:]})
    assert found == [{"prompt": CHAT[:1], "answer": "4"}]


def test_what_is_made_of_a_dataset_is_its_tasks_own(make_context: Make, tmp_path: Path) -> None:
    """A second task with other columns finds nothing of the first one's; the dataset's folder stays as it was."""
    datasets.Dataset.from_dict({"a": ["one"] * 5, "b": ["two"] * 5}).save_to_disk(tmp_path / "set")
    there = sorted((tmp_path / "set").iterdir())
    for column, text in (("a", "ONE"), ("b", "TWO")):
        section = {"dataset_name": str(tmp_path / "set"), "text_field": column}
        ctx = make_context({"model": MODEL, "data": section}, task_id=column)
        loaded = data.load(read("sft", ctx), ctx, None).dataset
        assert loaded.map(_upper)["text"] == [text] * 5
    assert sorted((tmp_path / "set").iterdir()) == there


def _upper(row: dict[str, str]) -> dict[str, str]:
    return {"text": row["text"].upper()}


def test_a_shard_looks_at_its_own_rows_only(make_context: Make, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"text": f"row {i}", "n": i} for i in range(10)]
    lines[3] = {"text": None, "n": 3}
    section = {"dataset_name": write(tmp_path / "x.jsonl", *lines), "max_samples": 9}
    found = rows(make_context, "sft", section, shard={"index": 1, "total": 2})
    assert [row["text"] for row in found] == [f"row {i}" for i in range(5, 9)]
    with pytest.raises(BadRequest, match=r"x\.jsonl line 4: column 'text'"):
        rows(make_context, "sft", section, shard={"index": 1, "total": 2, "contiguous": False})


def test_max_samples_then_the_shard(make_context: Make) -> None:
    section = {"prompts": [str(i) for i in range(10)], "max_samples": 5}
    assert [row["text"] for row in rows(make_context, "sft", section, shard={"index": 1, "total": 2})] == ["3", "4"]
    found = rows(make_context, "sft", section, shard={"index": 1, "total": 2, "contiguous": False})
    assert [row["text"] for row in found] == ["1", "3"]


@pytest.mark.parametrize(
    ("task_type", "section", "message"),
    [
        ("dpo", {"preferences": [{"prompt": "a", "chosen": "b"}]}, "spec.data.preferences[0]: no column 'rejected'"),
        ("dpo", {"preferences": [{"prompt": "a", "chosen": 1, "rejected": "c"}]}, "column 'chosen': a text or a list"),
        (
            "kto",
            {"examples": [{"prompt": "a", "completion": "b", "label": "yes"}]},
            "true or false is needed, found a text",
        ),
        ("sft", {"messages": [[{"role": "user"}]]}, "spec.data.messages[0]: column 'messages': message 0 must be"),
        ("sft", {"messages": ["hello"]}, "spec.data.messages[0]: column 'messages': a list of chat messages is needed"),
        ("grpo", {"prompts": [""]}, "spec.data.prompts[0]: column 'prompt': the prompt is empty"),
        ("grpo", {"prompts": [{"query": "x"}]}, "spec.data.prompts[0]: no column 'prompt' (spec.data.prompts)"),
        ("sft", {"prompts": []}, "spec.data: there is not one row"),
    ],
)
def test_bad_rows_in_the_task(make_context: Make, task_type: str, section: dict[str, Any], message: str) -> None:
    assert message in refusal(make_context, task_type, section)


def test_jsonl_columns_by_their_settings(make_context: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"q": "one", "a": "1", "body": "x"}, "", {"q": "two", "a": "2", "body": "y"})
    pair = {"path": path, "prompt_field": "q", "response_field": "a"}
    assert rows(make_context, "sft", {"jsonl": pair}) == [{"text": "one\n\n1"}, {"text": "two\n\n2"}]
    found = rows(make_context, "sft", {"jsonl": {**pair, "separator": " = "}, "max_samples": 1})
    assert found == [{"text": "one = 1"}]
    assert [row["text"] for row in rows(make_context, "sft", {"jsonl": {"path": path, "text_field": "body"}})] == [
        "x",
        "y",
    ]
    found = rows(
        make_context, "sft", {"jsonl_path": path, "prompt_column": "q", "response_column": "a", "separator": "-"}
    )
    assert found[0] == {"text": "one-1"}


def test_jsonl_of_chats_and_of_queries(make_context: Make, tmp_path: Path) -> None:
    chats = write(tmp_path / "chats.jsonl", {"messages": CHAT}, {"messages": CHAT})
    assert rows(make_context, "sft", {"jsonl_path": chats}) == [{"messages": CHAT}] * 2
    queries = write(tmp_path / "queries.jsonl", {"query": "q", "gold": "g", "level": 3})
    assert rows(make_context, "ppo", {"jsonl": {"path": queries, "response_field": "gold"}}) == [
        {"prompt": "q", "response": "g", "level": 3}
    ]


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        ("{not json", "bad.jsonl line 2: not JSON"),
        ("[1]", "bad.jsonl line 2: expected an object (found list)"),
        ('{"txt": "b"}', "bad.jsonl line 2: no column 'text' (spec.data.text_field); there are: 'txt'"),
        ('{"text": null}', "bad.jsonl line 2: column 'text': a text or a list of chat messages is needed, found None"),
    ],
)
def test_a_bad_line_is_named(make_context: Make, tmp_path: Path, second_line: str, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", {"text": "a"}, second_line)
    assert message in refusal(make_context, "sft", {"jsonl_path": path})


def test_half_a_pair_of_fields(make_context: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"q": "a"})
    assert "spec.data.jsonl.response_field: missing" in refusal(
        make_context, "sft", {"jsonl": {"path": path, "prompt_field": "q"}}
    )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "rows.jsonl"
    write(path, {"text": "served"}, {"text": 5})
    with Server() as running:
        running.files["rows.jsonl"] = Served(path.read_bytes())
        yield running.origin


def test_jsonl_falls_back_in_order(make_context: Make, tmp_path: Path, server: str) -> None:
    local = write(tmp_path / "local.jsonl", {"text": "local"})
    served = {"url": f"{server}/rows.jsonl", "path": local}
    assert rows(make_context, "sft", {"jsonl": served, "max_samples": 1}) == [{"text": "served"}]
    broken = {"download_url": f"{server}/none.jsonl", "path": str(tmp_path / "none"), "worker_path": local}
    assert rows(make_context, "sft", {"jsonl": broken}) == [{"text": "local"}]
    message = refusal(make_context, "sft", {"jsonl": {**broken, "worker_path": "none.jsonl"}})
    assert "spec.data.jsonl.download_url: the server answered 404" in message
    assert "spec.data.jsonl.path: there is no file" in message
    assert "spec.data.jsonl.worker_path: there is no file 'none.jsonl'" in message
    assert "rows.jsonl line 2: column 'text'" in refusal(make_context, "sft", {"jsonl": served})


def test_local_files_and_folders(make_context: Make, tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"text": f"row {i}", "label": i} for i in range(6)])
    table.to_csv(tmp_path / "t.csv")
    table.to_parquet(tmp_path / "t.parquet")
    table.save_to_disk(str(tmp_path / "saved"))
    for name in ("t.csv", "t.parquet", "saved"):
        found = rows(make_context, "sft", {"dataset_name": str(tmp_path / name), "max_samples": 2})
        assert found == [{"text": "row 0"}, {"text": "row 1"}], name
    found = rows(make_context, "sft", {"dataset_name": str(tmp_path / "t.parquet"), "split": "train[4:]"})
    assert [row["text"] for row in found] == ["row 4", "row 5"]


def test_columns_of_datasets(make_context: Make, tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"q": "a", "yes": "b", "no": "c", "gold": "d"}])
    path = str(tmp_path / "pairs.parquet")
    table.to_parquet(path)
    columns = {"prompt_column": "q", "chosen_column": "yes", "rejected_column": "no"}
    assert rows(make_context, "dpo", {"dataset_name": path, **columns}) == [
        {"prompt": "a", "chosen": "b", "rejected": "c"}
    ]
    found = rows(make_context, "sft", {"dataset_name": path, "prompt_column": "q", "response_column": "yes"})
    assert found == [{"text": "a\n\nb"}]
    found = rows(make_context, "rloo", {"dataset_name": path, "prompt_column": "q", "response_column": "gold"})
    assert found == [{"prompt": "a", "response": "d", "yes": "b", "no": "c"}]
    message = refusal(make_context, "dpo", {"dataset_name": path})
    assert "no column 'chosen' (spec.data.chosen_column); there are: 'q', 'yes', 'no', 'gold'" in message


def test_a_bad_row_of_a_dataset_is_named(make_context: Make, tmp_path: Path) -> None:
    path = str(tmp_path / "holes.parquet")
    datasets.Dataset.from_list([{"text": "a"}, {"text": None}]).to_parquet(path)
    assert f"{path} row 1: column 'text'" in refusal(make_context, "sft", {"dataset_name": path})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"dataset_name": "/no/such/folder"}, "spec.data.dataset_name"),
        ({"dataset_name": "t.csv", "split": "test"}, "spec.data.split"),
        ({"dataset_name": "t.csv", "config_name": "main"}, "spec.data.config_name"),
    ],
)
def test_datasets_that_are_not_there(make_context: Make, tmp_path: Path, section: dict[str, Any], message: str) -> None:
    (tmp_path / "results").mkdir(exist_ok=True)
    (tmp_path / "results" / "t.csv").write_text("text\na\n")
    assert message in refusal(make_context, "sft", section)
