"""Text of local files in training: `dataset_name` and `jsonl` give the same rows, as they are written."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runners.api import BadRequest, Context
from runners.training import inputs
from runners.training.plan import read

datasets = pytest.importorskip("datasets", reason="needs the extra 'training'")
from runners.training import data  # noqa: E402

Make = Callable[..., Context]
CELLS = ["007", "04", "NA", "None", "null", "nan", "true", "1.10", "2024-01-02T03:04:05+05:30", "123456789012345678901"]


def rows(make_context: Make, task_type: str, section: dict[str, Any], **spec: Any) -> list[dict[str, Any]]:
    reward = {"reward": {"function": "length"}} if task_type in ("ppo", "grpo", "rloo") else {}
    ctx = make_context({"model": {"source": {"identifier": "builtin:tiny-llama"}}, "data": section, **reward, **spec})
    plan = read(task_type, ctx)
    return list(data.load(plan, ctx, inputs.fetch(plan, ctx).jsonl).dataset)


@pytest.fixture(params=["t.csv", "t.tsv", "t.csv.gz", "t.jsonl", "t.json", "t*.jsonl", "folder"])
def named(request, tmp_path: Path) -> str:
    """CELLS under prompt and response, and as extra `gold`, by the name that a task gives."""
    name = request.param
    table = [{"prompt": f"q{i}", "response": cell, "gold": cell} for i, cell in enumerate(CELLS)]
    mark = "\t" if name == "t.tsv" else ","
    lines = [mark.join(table[0]), *(mark.join(row.values()) for row in table)]
    body = ("\n".join(lines) + "\n").encode()
    if "json" in name:
        body = "".join(json.dumps(row) + "\n" for row in table).encode()
    if name == "t.json":
        body = json.dumps(table).encode()
    folder = tmp_path / "set"
    folder.mkdir()
    target = folder / {"t*.jsonl": "t1.jsonl", "folder": "train.csv"}.get(name, name)
    target.write_bytes(gzip.compress(body) if name.endswith(".gz") else body)
    return str(folder) if name == "folder" else str(folder / name)


def test_answers_and_references_are_what_is_written(make_context: Make, named: str) -> None:
    section = {"dataset_name": named, "prompt_column": "prompt", "response_column": "response"}
    texts = [f"q{i}\n\n{cell}" for i, cell in enumerate(CELLS)]
    assert [row["text"] for row in rows(make_context, "sft", section)] == texts
    found = rows(make_context, "grpo", section)
    assert found == [{"prompt": f"q{i}", "response": cell, "gold": cell} for i, cell in enumerate(CELLS)]
    part = rows(
        make_context, "sft", {**section, "split": "train[2:]", "max_samples": 5}, shard={"index": 1, "total": 2}
    )
    assert [row["text"] for row in part] == texts[5:7]


def test_labels_of_a_csv_are_booleans_by_their_words(make_context: Make, tmp_path: Path) -> None:
    words = ["true", "False", "1", "0"]
    (tmp_path / "x.csv").write_text("prompt,completion,label\n" + "".join(f"p,c,{word}\n" for word in words))
    section = {"dataset_name": str(tmp_path / "x.csv")}
    assert [row["label"] for row in rows(make_context, "kto", section)] == [True, False, True, False]
    (tmp_path / "x.csv").write_text("prompt,completion,label\np,c,\n")
    with pytest.raises(BadRequest, match=r"x\.csv line 2: column 'label': true or false is needed, found ''"):
        rows(make_context, "kto", section)


def test_nested_columns(make_context: Make, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    line = {"body": {"messages": chat, "pairs": [{"q": "a", "yes": "b", "no": "c"}]}, "x.y": "own"}
    (tmp_path / "x.jsonl").write_text(json.dumps(line) + "\n")
    datasets.Dataset.from_list([line]).save_to_disk(str(tmp_path / "saved"))
    for name in ("x.jsonl", "saved"):
        path = str(tmp_path / name)
        assert rows(make_context, "sft", {"dataset_name": path, "text_field": "body.messages"}) == [{"messages": chat}]
        assert rows(make_context, "sft", {"dataset_name": path, "text_field": "x.y"}) == [{"text": "own"}]
        columns = {"prompt_column": "q", "chosen_column": "yes", "rejected_column": "no"}
        inside = {key: f"body.pairs[0].{value}" for key, value in columns.items()}
        found = rows(make_context, "dpo", {"dataset_name": path, **inside})
        assert found == [{"prompt": "a", "chosen": "b", "rejected": "c"}]
        with pytest.raises(BadRequest, match=r"no column 'body\.mesages' \(spec\.data\.text_field\)"):
            rows(make_context, "sft", {"dataset_name": path, "text_field": "body.mesages"})
    inside = {"path": str(tmp_path / "x.jsonl"), "text_field": "body.messages[1].content"}
    assert rows(make_context, "sft", {"jsonl": inside}) == [{"text": "ho"}]


def test_a_file_that_was_rewritten_with_its_size_and_time_gives_its_new_rows(make_context: Make, tmp_path) -> None:
    file = tmp_path / "x.csv"
    for value in ("old", "new"):
        file.write_text(f"text\n{value}\n")
        os.utime(file, (1_000_000, 1_000_000))
        assert rows(make_context, "sft", {"dataset_name": str(file)}) == [{"text": value}]


def test_many_rows_wait_in_files_and_not_in_memory(make_context: Make, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(data, "BATCH", 10)
    monkeypatch.setattr(data, "BATCHES_IN_MEMORY", 2)
    (tmp_path / "x.csv").write_text("prompt,extra\n" + "".join(f"p{i},{i}\n" for i in range(95)))
    found = rows(make_context, "grpo", {"dataset_name": str(tmp_path / "x.csv")})
    assert [row["prompt"] for row in found] == [f"p{i}" for i in range(95)]
    assert len(list((tmp_path / "tmp" / "task-1").glob("rows-*.arrow"))) == 8


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"prompt,prompt\na,b\n", "x.csv line 1: columns 1 and 2 are both called 'prompt'"),
        (b"prompt,a\nb\n", "x.csv line 2: 1 cells under 2 columns"),
        (b"prompt\n\xff\n", "x.csv: not UTF-8 text (byte 0xff in line 2)"),
        (b"prompt\n", "there is not one row to train on"),
        (b"", "there is not one row to train on"),
    ],
)
def test_odd_files_are_refused_by_their_line(make_context: Make, tmp_path: Path, body: bytes, said: str) -> None:
    (tmp_path / "x.csv").write_bytes(body)
    with pytest.raises(BadRequest) as caught:
        rows(make_context, "grpo", {"dataset_name": str(tmp_path / "x.csv")})
    assert said in str(caught.value)


def test_half_a_character_is_named_by_its_line(make_context: Make, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "\\ud800"}\n')
    for section in ({"dataset_name": str(tmp_path / "x.jsonl")}, {"jsonl_path": str(tmp_path / "x.jsonl")}):
        with pytest.raises(BadRequest, match=r"x\.jsonl line 2: half a character"):
            rows(make_context, "sft", section)
    with pytest.raises(BadRequest, match=r"spec\.data\.prompts\[1\]: half a character"):
        rows(make_context, "sft", {"prompts": ["a", "\udfff"]})


def test_an_integer_of_more_than_64_bits_keeps_its_digits(make_context: Make, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "n": 12345678901234567890123}\n')
    (row,) = rows(make_context, "grpo", {"dataset_name": str(tmp_path / "x.jsonl")})
    assert str(row["n"]) == "12345678901234567890123"
