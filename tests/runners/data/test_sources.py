"""Every source of `spec.data`: what it yields and how it fails."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runners.api import BadRequest, Context
from runners.data.prompts import Message
from runners.data.shard import Shard
from runners.data.sources import load_items
from tests.kit.file_server import Served, Server

Load = Callable[..., Any]
ROWS = [{"text": f"row {i}", "id": i, "tags": ["a", str(i)]} for i in range(10)]


@pytest.fixture
def load(make_context: Callable[..., Context]) -> Load:
    def one(data: dict[str, Any], **spec: Any) -> Any:
        whole = {"data": data, **spec}
        return load_items(make_context(whole), whole)

    return one


@pytest.fixture
def server() -> Iterator[Server]:
    with Server().running() as running:
        yield running


def jsonl(path: Path, rows: list[Any] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 13])
@pytest.mark.parametrize("contiguous", [True, False, None])
def test_shards_are_a_partition_of_nearly_equal_parts(total: int, contiguous: bool | None) -> None:
    parts = [list(Shard(index=i, total=total, contiguous=contiguous).rows(10)) for i in range(total)]
    assert sorted(row for part in parts for row in part) == list(range(10))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if contiguous is not False:
        assert [row for part in parts for row in part] == list(range(10))


def test_jsonl(load, tmp_path) -> None:
    items = load({"type": "jsonl", "path": str(jsonl(tmp_path / "x.jsonl")), "metadata_columns": {"id": "number"}})
    assert items.prompts == tuple(row["text"] for row in ROWS)
    assert items.metadata == tuple({"number": i} for i in range(10))


def test_jsonl_of_chats_and_all_other_columns(load, tmp_path) -> None:
    rows = [{"chat": [{"role": "user", "content": "hi", "name": None}], "a": 1, "b": {"c": [2]}}]
    data = {"type": "jsonl", "path": str(jsonl(tmp_path / "x", rows)), "column": "chat", "metadata_include_all": True}
    items = load(data)
    assert items.prompts == ((Message("user", "hi"),),)
    assert items.metadata == ({"a": 1, "b": {"c": [2]}},)


def test_a_relative_path_is_looked_for_in_results_dir_too(load, tmp_path) -> None:
    (tmp_path / "results").mkdir(exist_ok=True)
    jsonl(tmp_path / "results" / "x.jsonl")
    assert len(load({"type": "jsonl", "path": "x.jsonl"}).prompts) == 10


def test_jsonl_by_url(load, server) -> None:
    body = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    server.files["rows"] = Served(body, token="Bearer x")
    data = {"type": "jsonl", "url": server.url("rows"), "headers": {"Authorization": "Bearer x"}}
    assert load(data, shard={"index": 1, "total": 3}).prompts == ("row 4", "row 5", "row 6")


def test_csv(load, tmp_path) -> None:
    (tmp_path / "x.csv").write_text('﻿question,n\n"two\nlines, a comma",1\nplain,2\n', encoding="utf-8")
    data = {"type": "csv", "path": str(tmp_path / "x.csv"), "column": "question", "metadata_columns": ["n"]}
    items = load(data)
    assert items.prompts == ("two\nlines, a comma", "plain")
    assert items.metadata == ({"n": "1"}, {"n": "2"})


def test_a_csv_cell_may_be_a_whole_document(load, tmp_path) -> None:
    (tmp_path / "x.csv").write_text("text\n" + "w" * 300_000 + "\n")
    assert len(load({"type": "csv", "path": str(tmp_path / "x.csv")}).prompts[0]) == 300_000


def test_parquet(load, tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow (extra 'training')")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    items = load({"type": "parquet", "path": str(tmp_path / "x.parquet"), "metadata_include_all": True})
    assert items.prompts == tuple(row["text"] for row in ROWS)
    assert items.metadata[3] == {"id": 3, "tags": ["a", "3"]}
    (tmp_path / "bad").write_text("no")
    with pytest.raises(BadRequest, match=r"spec\.data\.path: not a Parquet file"):
        load({"type": "parquet", "path": str(tmp_path / "bad")})
    with pytest.raises(BadRequest, match=r"spec\.data\.column: no column 'q'; there are: text, id, tags"):
        load({"type": "parquet", "path": str(tmp_path / "x.parquet"), "column": "q"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}\n{"text": \n', r"spec\.data\.path line 2: not JSON"),
        ('\n["a"]\n', r"spec\.data\.path line 2: expected an object \(found list\)"),
        ('{"q": "a", "id": 1}\n', r"spec\.data\.column: no column 'text'; there are: q, id"),
        ('{"text": "a"}\n{"q": "a"}\n', r"spec\.data\.path line 2: has no 'text'; it has: q"),
        ('{"text": {"a": 1}}\n', r"spec\.data\.path line 1: text: expected a string or a list"),
    ],
)
def test_bad_jsonl(load, tmp_path, text: str, message: str) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(BadRequest, match=message):
        load({"type": "jsonl", "path": str(tmp_path / "x")})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"type": "jsonl"}, r"spec\.data: give either `path` or `url`"),
        ({"type": "jsonl", "path": "a", "url": "http://h/x"}, r"spec\.data: give either `path` or `url`"),
        ({"type": "csv", "path": "/no/such"}, r"spec\.data\.path: there is no file '/no/such'"),
        ({"type": "csv", "url": "/no/such"}, r"spec\.data\.url: '/no/such' is not an http"),
        ({"type": "jsonl", "path": "a", "colum": "b"}, r"spec\.data\.colum: unknown field; did you mean 'column'"),
    ],
)
def test_bad_files(load, data: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        load(data)


def test_bad_csv_and_bad_text(load, tmp_path) -> None:
    (tmp_path / "x").write_text("text,id\na\n")
    with pytest.raises(BadRequest, match=r"spec\.data\.path line 2: 1 cells under 2 columns"):
        load({"type": "csv", "path": str(tmp_path / "x")})
    (tmp_path / "x").write_bytes(b'{"text": "\xff"}\n')
    for kind in ("csv", "jsonl"):
        with pytest.raises(BadRequest, match=r"spec\.data\.path: not UTF-8 text"):
            load({"type": kind, "path": str(tmp_path / "x")})


def test_a_missing_metadata_column_lists_those_there_are(load, tmp_path) -> None:
    data = {"type": "jsonl", "path": str(jsonl(tmp_path / "x")), "metadata_columns": ["idd"]}
    with pytest.raises(BadRequest, match=r"spec\.data\.metadata_columns: no column 'idd'; there are: text, id, tags"):
        load(data)


@pytest.mark.parametrize("row", [{"text": "\ud800"}, {"text": "a", "n": ["\udfff"]}])
def test_half_a_character_is_found_before_anything_is_computed(load, tmp_path, row: dict[str, Any]) -> None:
    data = {
        "type": "jsonl",
        "path": str(jsonl(tmp_path / "x", [{"text": "𝔘", "n": 1}, row])),
        "metadata_include_all": True,
    }
    with pytest.raises(BadRequest, match=r"spec\.data\.path line 2: half a character in its text"):
        load(data)


UPSTREAM = {
    "draft": {"items": [{"output": "first {col1_value}"}, {"output": "second"}], "usage": {"total_tokens": 7}},
    "my.stage": {"items": [{"output": "dotted"}]},
    "odd": {"result": {"x": "inner"}, "key with space": "k"},
}


def graph(load: Load, template: dict[str, Any], **spec: Any) -> str:
    items = load({"type": "graph_template", "template": template}, _upstreamResults=UPSTREAM, **spec)
    assert len(items.prompts) == 1
    return items.prompts[0]


def test_an_inline_template(load) -> None:
    columns = [
        {"label": "Draft", "expr": "draft.result.items[0].output"},
        {"label": "Tokens", "node": "draft", "path": "usage.total_tokens"},
        {"label": "None", "expr": "draft.nothing", "default": "-"},
    ]
    text = 'Say {col0_label}={col0_value}; {col1_value}; {col2_value}. {{col0_label}} {"json": {"a": 1}} {role}!'
    prompt = graph(load, {"text": text, "columns": columns, "options": {"role": "a judge"}})
    assert prompt == 'Say Draft=first {col1_value}; 7; -. {col0_label} {"json": {"a": 1}} a judge!'


def test_what_a_template_leaves_out_and_what_is_empty_is_named(make_context, caplog) -> None:
    columns = [
        {"label": "Draft", "expr": "draft.items[1].output"},
        {"label": "Left out", "expr": "draft.usage.total_tokens"},
        {"label": "Nothing", "expr": "gone.output"},
    ]
    template = {"text": "{role}: {col0_value} {col2_value}", "columns": columns, "options": {"role": "a", "intro": "b"}}
    spec = {
        "data": {"type": "graph_template", "template": template},
        "_upstreamResults": {**UPSTREAM, "gone": {"output": None}},
    }
    ctx = make_context(spec)
    assert load_items(ctx, spec).prompts == ("a: second null",)
    assert ctx.unused == ["spec.data.template.columns[1]", "spec.data.template.options.intro"]
    assert "spec.data.template.columns[2]: 'Nothing' is null in the prompt; give it a default" in caplog.text
    assert caplog.text.count("in the prompt") == 1


def test_the_built_in_briefing(load) -> None:
    columns = [{"label": "One", "expr": "draft.items[0].output"}, {"label": "Two", "expr": "draft.items[-1].output"}]
    options = {"role": "an editor", "intro": "Compare.", "closing": "Decide."}
    prompt = graph(load, {"name": "two_column_briefing", "columns": columns, "options": options})
    lines = prompt.splitlines()
    assert lines == [
        "You are an editor.", "Compare.", "", "- One: first {col1_value}", "- Two: second", "", "Decide.",
    ]  # fmt: skip
    short = graph(load, {"name": "two_column_briefing", "columns": columns[:1]}).splitlines()
    assert "" not in (short[0], short[-1])
    assert short[2] == "- One: first {col1_value}"


@pytest.mark.parametrize(
    ("expr", "value"),
    [
        ("${draft.result.items[1].output}", "second"),
        ("my.stage.result.items[0].output", "dotted"),
        ("odd.result.x", "inner"),
        ('odd["key with space"]', "k"),
        ("draft.items[1]", '{"output": "second"}'),
        ("draft.usage.total_tokens", "7"),
    ],
)
def test_expressions(load, expr: str, value: str) -> None:
    assert graph(load, {"text": "{col0_value}", "columns": [{"label": "x", "expr": expr}]}) == value


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({}, r"template: needs a `text`, or a `name`: two_column_briefing"),
        ({"name": "three_column"}, r"template\.name: no built-in template 'three_column'"),
        ({"name": "two_column_briefing"}, r"template\.columns: two_column_briefing needs at least one"),
        ({"text": "{col0_valu}"}, r"template\.text: \{col0_valu\} stands for nothing; known: role, intro, closing"),
        ({"text": "x", "columns": [{"label": "a"}]}, r"columns\[0\]: give either `expr`, or `node` and `path`"),
        (
            {"text": "x", "columns": [{"label": "a", "expr": "nope.x"}]},
            r"columns\[0\]\.expr: there is no result of a stage 'nope'; stages with results: draft, my\.stage, odd",
        ),
        (
            {"text": "x", "columns": [{"label": "a", "node": "nope", "path": "x"}]},
            r"columns\[0\]\.node: there is no result of a stage 'nope'",
        ),
        (
            {"text": "x", "columns": [{"label": "a", "expr": "draft.items[5].output"}]},
            r"columns\[0\]\.expr: draft\.items has 2 entries and none at \[5\]",
        ),
        (
            {"text": "x", "columns": [{"label": "a", "expr": "draft.item"}]},
            r"columns\[0\]\.expr: draft has no 'item'; it has items, usage",
        ),
        (
            {"text": "x", "columns": [{"label": "a", "expr": "draft.items.output"}]},
            r"columns\[0\]\.expr: draft\.items is a list; give a number in brackets",
        ),
        ({"text": "x", "columns": [{"label": "a", "expr": "draft.items[*]"}]}, r"columns\[0\]\.expr: .* is no path"),
        ({"text": "x", "colums": []}, r"template\.colums: unknown field; did you mean 'columns'"),
    ],
)
def test_bad_templates(load, template: dict[str, Any], message: str) -> None:
    with pytest.raises(
        BadRequest, match=r"^spec\.data\." + ("template\\." if message.startswith("columns") else "") + message
    ):
        graph(load, template)


@pytest.fixture
def datasets() -> Any:
    return pytest.importorskip("datasets", reason="needs datasets (extra 'training')")


@pytest.fixture
def folder(tmp_path: Path, datasets: Any) -> Path:
    target = tmp_path / "set"
    target.mkdir()
    jsonl(target / "train.jsonl")
    jsonl(target / "test.jsonl", ROWS[:3])
    return target


def test_a_folder_with_splits(load, folder) -> None:
    data = {"type": "dataset", "url": str(folder)}
    assert load(data).prompts == tuple(row["text"] for row in ROWS)
    assert load({**data, "split": "test"}).prompts == ("row 0", "row 1", "row 2")
    assert load({**data, "split": "train[2:4]+test[:1]"}).prompts == ("row 2", "row 3", "row 0")


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.txt", "x.parquet"])
def test_single_files(load, tmp_path, datasets, name: str) -> None:
    whole = datasets.Dataset.from_list([{"text": row["text"]} for row in ROWS])
    target = tmp_path / name
    match target.suffix:
        case ".csv":
            whole.to_csv(target)
        case ".parquet":
            whole.to_parquet(target)
        case ".txt":
            target.write_text("\n".join(row["text"] for row in ROWS))
        case _:
            jsonl(target)
    data = {"type": "dataset", "url": str(target), "split": "train[:3]"}
    assert load(data).prompts == ("row 0", "row 1", "row 2")


def test_what_save_to_disk_wrote(load, tmp_path, datasets) -> None:
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select(range(2))}).save_to_disk(tmp_path / "two")
    assert len(load({"type": "dataset", "url": str(tmp_path / "one")}).prompts) == 10
    data = {"type": "dataset", "url": str(tmp_path / "two"), "split": "test"}
    assert load(data).prompts == ("row 0", "row 1")
    assert load({**data, "split": "train[80%:]"}).prompts == ("row 8", "row 9")
    with pytest.raises(BadRequest, match=r"spec\.data\.split: no split 'dev'; there are: train, test"):
        load({**data, "split": "dev"})


def test_a_dataset_behind_a_url(load, server, datasets) -> None:
    server.files["rows.jsonl"] = Served("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    data = {"type": "dataset", "url": server.url("rows.jsonl"), "metadata_columns": ["id"]}
    assert [each["id"] for each in load(data).metadata] == list(range(10))


def test_local_files_have_no_cache(make_context, tmp_path, datasets) -> None:
    spec = {"data": {"type": "dataset", "url": str(jsonl(tmp_path / "a.jsonl"))}}
    ctx = make_context(spec, cache_dir=str(tmp_path / "cache"))
    assert load_items(ctx, spec).prompts[9] == "row 9"
    assert not list((tmp_path / "cache").rglob("*"))


def test_shuffled_first_and_sharded_then(load, folder, datasets) -> None:
    data = {"type": "dataset", "url": str(folder), "shuffle": True}
    whole = load(data).prompts
    expected = datasets.Dataset.from_list(ROWS).shuffle(seed=42)["text"]
    assert list(whole) == list(expected)
    assert load({**data, "seed": 7}).prompts != whole
    parts = [load(data, shard={"index": i, "total": 3}).prompts for i in range(3)]
    assert parts[0] + parts[1] + parts[2] == whole
    window = load({**data, "buffer_size": 2}).prompts
    assert sorted(window) == sorted(whole)
    assert window != whole


def test_metadata_of_a_dataset(load, folder) -> None:
    data = {"type": "dataset", "url": str(folder), "metadata_include_all": True, "metadata_columns": {"id": "number"}}
    assert load(data).metadata[1] == {"number": 1, "tags": ["a", "1"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"column": "txt"}, r"spec\.data\.column: no column 'txt'; there are: .*text"),
        ({"split": "dev"}, r"spec\.data\.split: .*dev"),
        ({"url": "/no/such/folder"}, r"spec\.data\.url: there is no file or folder"),
        ({"name": "other"}, r"spec\.data\.name: "),
        ({"url": None}, r"spec\.data\.url: "),
        ({"metadata_columns": ["x"]}, r"spec\.data\.metadata_columns: no column 'x'"),
        ({"shufle": True}, r"spec\.data\.shufle: unknown field; did you mean 'shuffle'"),
    ],
)
def test_bad_datasets(load, folder, change: dict[str, Any], message: str) -> None:
    data = {
        name: value for name, value in {"type": "dataset", "url": str(folder), **change}.items() if value is not None
    }
    with pytest.raises(BadRequest, match=message) as caught:
        load(data)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_and_an_unreachable_hub(load, tmp_path, datasets) -> None:
    from runners.api import RunnerError

    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(BadRequest, match=r"spec\.data\.url line 2: not JSON"):
        load({"type": "dataset", "url": str(tmp_path / "x.jsonl")})
    with pytest.raises(RunnerError, match=r"spec\.data\.url: the dataset hub cannot be reached"):
        load({"type": "dataset", "url": "nobody/nothing"})


def test_without_the_library_it_says_which_extra(load, tmp_path) -> None:
    import importlib.util

    if importlib.util.find_spec("datasets") is not None:
        pytest.skip("datasets is installed here")
    with pytest.raises(BadRequest, match=r"datasets is not installed .*flowmesh-supervisor\[training\]"):
        load({"type": "dataset", "url": "x"})
