"""Text stays text: every way to name a local file gives the same rows, and odd files are refused by their line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runners.api import BadRequest, Context
from runners.data.prompts import Message
from runners.data.sources import load_items
from tests.kit.file_server import Served, Server

pytest.importorskip("datasets", reason="needs datasets (extra 'training')")

Load = Callable[..., Any]
CELLS = [
    "007", "00123", "NA", "None", "null", "nan", "true", "1.10", "1e5", "12345678901234567890123", "",
    "2024-01-02T03:04:05+05:30", "-0", " x ",
]  # fmt: skip


@pytest.fixture
def load(make_context: Callable[..., Context]) -> Load:
    def one(data: dict[str, Any], **spec: Any) -> Any:
        whole = {"data": data, **spec}
        return load_items(make_context(whole), whole)

    return one


def refusal(load: Load, data: dict[str, Any]) -> str:
    with pytest.raises(BadRequest) as caught:
        load(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def table(suffix: str) -> bytes:
    """CELLS under `text`, the same again under `again`."""
    match suffix:
        case "csv" | "tsv":
            mark = "," if suffix == "csv" else "\t"
            return "".join(f'"{a}"{mark}"{a}"\r\n' for a in ["text", *CELLS]).replace('"text"\r', '"again"\r').encode()
        case "json":
            return json.dumps([{"text": each, "again": each} for each in CELLS], indent=1).encode()
        case _:
            return "".join(json.dumps({"text": each, "again": each}) + "\n" for each in CELLS).encode()


SAME = [("csv", "csv"), ("tsv", "csv"), ("json", None), ("jsonl", "jsonl"), ("ndjson", "jsonl")]


@pytest.mark.parametrize("pack", ["", ".gz", ".bz2", ".xz"])
@pytest.mark.parametrize(("suffix", "kind"), SAME)
def test_every_cell_is_what_is_written(load, tmp_path, suffix: str, kind: str | None, pack: str) -> None:
    packed = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[pack](table(suffix))
    folder = tmp_path / "set"
    folder.mkdir()
    file = folder / f"train-1.{suffix}{pack}"
    file.write_bytes(packed)
    ways: list[dict[str, Any]] = [
        {"type": "dataset", "url": str(file)},
        {"type": "dataset", "url": str(folder)},
        {"type": "dataset", "url": str(folder / f"train-*.{suffix}{pack}")},
    ]
    if kind is not None:
        ways += [{"type": kind, "path": str(file)}, {"type": kind, "path": str(folder / "train-*")}]
    for way in ways:
        items = load({**way, "metadata_columns": ["again"]})
        assert list(items.prompts) == CELLS, way
        assert [each["again"] for each in items.metadata] == CELLS, way


def test_a_folder_of_csv_keeps_its_splits_configurations_and_delimiters(load, tmp_path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.tsv").write_text("text\tn\n007\t1\n008\t2\n")
    (folder / "b.csv").write_text("text;n\n009;1\n")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: a.tsv\n"
        "- config_name: two\n  sep: ';'\n  data_files:\n  - split: test\n    path: b.csv\n---\n"
    )
    data = {"type": "dataset", "url": str(folder)}
    assert load({**data, "name": "one"}).prompts == ("007", "008")
    assert load({**data, "name": "two"}).prompts == ("009",)
    assert load({**data, "name": "one", "split": "train[1:]"}).prompts == ("008",)
    assert "spec.data.name: " in refusal(load, data)
    readme = (folder / "README.md").read_text()
    (folder / "README.md").write_text(readme.replace("sep: ';'", "encoding: latin-1"))
    assert "sets encoding for its files, which has no effect" in refusal(load, {**data, "name": "two"})


def test_splits_of_files(load, tmp_path) -> None:
    for name, first in (("train", 0), ("test", 100)):
        (tmp_path / f"{name}.csv").write_text("text\n" + "".join(f"0{first + i}\n" for i in range(10)))
    data = {"type": "dataset", "url": str(tmp_path)}
    assert load({**data, "split": "train[:2]+test[-10%:]"}).prompts == ("00", "01", "0109")
    assert load({**data, "split": "train[20%:40%]"}).prompts == ("02", "03")
    assert len(load({**data, "split": "all"}).prompts) == 20
    assert "spec.data.split: no split 'dev'; there are: train, test" in refusal(load, {**data, "split": "train+dev"})
    assert len(load({**data, "split": "train[:100]", "shuffle": True}).prompts) == 10
    assert "spec.data.split: " in refusal(load, {**data, "split": "train[x:]"})


def test_json_numbers_keep_their_spelling(load, tmp_path) -> None:
    spelled = ["1.10", "1e5", "-0.0", "12345678901234567890123", "0.12345678901234567890123", "1e400", "true"]
    lines = "".join(f'{{"text": {each}, "n": {each}}}\n' for each in spelled)
    (tmp_path / "x.jsonl").write_text(lines)
    (tmp_path / "x.json").write_text("[" + ",".join(lines.splitlines()) + "]")
    for way in (
        {"type": "jsonl", "path": "x.jsonl"},
        {"type": "dataset", "url": "x.jsonl"},
        {"type": "dataset", "url": "x.json"},
    ):
        items = load({**{k: v.replace("x.", f"{tmp_path}/x.") for k, v in way.items()}, "metadata_columns": ["n"]})
        assert list(items.prompts) == spelled
        numbers = [1.1, 1e5, 0.0, 12345678901234567890123, "0.12345678901234567890123", "1e400", True]
        assert [each["n"] for each in items.metadata] == numbers
        assert type(items.metadata[0]["n"]) is float


def test_mixed_types_stay_each_its_own(load, tmp_path) -> None:
    values: list[Any] = [1, "1", True, None, "2024-01-02", [1, "a"], {"k": None}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": "t", "m": each}) + "\n" for each in values))
    data = {"type": "dataset", "url": str(tmp_path / "x.jsonl"), "metadata_columns": ["m"]}
    found = [each["m"] for each in load(data).metadata]
    assert [(type(each), each) for each in found] == [(type(each), each) for each in values]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "dataset"])
def test_a_file_that_was_rewritten_with_its_size_and_time_gives_its_new_rows(load, tmp_path, kind: str) -> None:
    name = "x.jsonl" if kind == "jsonl" else "x.csv"
    file = tmp_path / name
    for value in ("old", "new"):
        file.write_text(f'{{"text": "{value}"}}\n' if kind == "jsonl" else f"text\n{value}\n")
        os.utime(file, (1_000_000, 1_000_000))
        assert load({"type": kind, "url" if kind == "dataset" else "path": str(file)}).prompts == (value,)


@pytest.mark.parametrize("kind", ["csv", "dataset"])
def test_a_download_with_the_same_date_and_size_gives_its_new_rows(load, kind: str) -> None:
    with Server().running() as server:
        for value in (b"old", b"new"):
            server.files["x.csv"] = Served(b"text\n" + value + b"\n", etag=None, modified=True)
            assert load({"type": kind, "url": server.url("x.csv")}).prompts == (value.decode(),)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"text,id,text\na,1,b\n", "line 1: columns 1 and 3 are both called 'text'"),
        (b"text,id\na,1\nb\n", "line 3: 1 cells under 2 columns"),
        (b'text,id\n"a\nb",1,2\n', "line 2: 3 cells under 2 columns"),
        (b'text\na\n"b\nc\n', "line 3: not CSV from here on"),
        (b'text\n"a"b\n', "line 2: not CSV from here on"),
        (b"text\na\nb\xffc\n", "not UTF-8 text (byte 0xff in line 3)"),
        (b"text\na\n\xe4\xf6\n", "not UTF-8 text (byte 0xe4 in line 3)"),
        ("text\na\n".encode("utf-16")[2:], "line 1: a NUL byte"),
        (b"text\na\0b\n", "line 2: a NUL byte"),
        ("text\nä\n".encode("utf-16")[:-1], "not UTF-16 text"),
        (b"", "there is not one row in it"),
        (b"\xef\xbb\xbf", "there is not one row in it"),
        (b"text\n", "there is not one row in it"),
        (b"q,id\na,1\n", "column: no column 'text'; there are: q, id"),
        (gzip.compress(b"text\na\n" * 1000, mtime=0)[:-9], "its compressed data are damaged"),
        (b"PK\x03\x04....", "a zip archive, which is not read here"),
    ],
)
def test_odd_csv_is_refused_by_its_line_by_every_reader(load, tmp_path, body: bytes, said: str) -> None:
    (tmp_path / "x.csv").write_bytes(body)
    assert said in refusal(load, {"type": "csv", "path": str(tmp_path / "x.csv")})
    assert said in refusal(load, {"type": "dataset", "url": str(tmp_path / "x.csv")})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_byte_order_marks_and_line_ends(load, tmp_path, encoding: str, end: str) -> None:
    (tmp_path / "x.csv").write_bytes(end.join(["text,ä", '"a ""quoted"" 漢",1', "b,2", ""]).encode(encoding))
    for data in ({"type": "csv", "path": "x.csv"}, {"type": "dataset", "url": "x.csv"}):
        where = {key: str(tmp_path / value) if value == "x.csv" else value for key, value in data.items()}
        items = load({**where, "metadata_columns": ["ä"]})
        assert items.prompts == ('a "quoted" 漢', "b")
        assert [each["ä"] for each in items.metadata] == ["1", "2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"text": "a"}\n{"text": NaN}\n', "line 2: not JSON (NaN is not a JSON value"),
        ('{"text": "a", "text": "b"}\n', "line 1: not JSON (the key 'text' is there twice)"),
        ('{"text": ' + "[" * 100_000 + "\n", "line 1: not JSON (nested too deeply)"),
        ('\n\n{"text": "a"} x\n', "line 3: not JSON (Extra data at column 15)"),
        ("", "there is not one row in it"),
    ],
)
def test_odd_json_lines(load, tmp_path, text: str, said: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    assert said in refusal(load, {"type": "jsonl", "path": str(tmp_path / "x.jsonl")})
    assert said in refusal(load, {"type": "dataset", "url": str(tmp_path / "x.jsonl")})


ROWS = [
    {"id": i, "body": {"messages": [{"role": "user", "content": f"m{i}"}], "n": i}, "turns": [f"a{i}", {"b": f"b{i}"}],
     "dotted.name": f"d{i}", "none": None}
    for i in range(4)
]  # fmt: skip


@pytest.fixture(params=["jsonl", "dataset", "parquet", "dataset-parquet", "saved"])
def nested(request, tmp_path: Path) -> dict[str, Any]:
    """ROWS by every source that can nest."""
    import datasets

    kind = request.param
    rows = (
        ROWS if "jsonl" in kind or kind == "dataset" else [{**row, "turns": [{"b": f"b{row['id']}"}]} for row in ROWS]
    )
    target = tmp_path / ("saved" if kind == "saved" else "x.parquet" if "parquet" in kind else "x.jsonl")
    if kind in ("jsonl", "dataset"):
        target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(target))
    else:
        datasets.Dataset.from_list(rows).to_parquet(str(target))
    return {"type": kind, "path": str(target)} if kind in ("jsonl", "parquet") else {
        "type": "dataset", "url": str(target)
    }  # fmt: skip


def test_what_lies_inside_of_a_column_can_be_named(load, nested) -> None:
    wanted = {"column": "body.messages", "metadata_columns": {"body.n": "n", "turns[-1].b": "b", "none.x": "x"}}
    items = load({**nested, **wanted})
    assert items.prompts == tuple((Message("user", f"m{i}"),) for i in range(4))
    assert items.metadata[2] == {"n": 2, "b": "b2", "x": None}
    assert load({**nested, "column": "body.messages.0.content"}).prompts == ("m0", "m1", "m2", "m3")
    assert load({**nested, "column": "dotted.name"}).prompts[1] == "d1"
    assert "body has no 'nn'; it has messages, n" in refusal(load, {**nested, "column": "body.nn"})
    message = refusal(load, {**nested, "column": "dotted.name", "metadata_columns": ["body.nn"]})
    assert "spec.data.metadata_columns: 'body.nn' is not in" in message
    assert "no column 'bodi.n'; there are: id, body" in refusal(load, {**nested, "column": "bodi.n"})


def test_two_columns_cannot_have_one_name_in_the_metadata(load, nested) -> None:
    data = {**nested, "column": "dotted.name", "metadata_columns": {"id": "n", "body.n": "n"}}
    assert "'id' and 'body.n' would both be called 'n'" in refusal(load, data)


def test_shuffle_shard_and_metadata_are_alike_for_all_readers(load, tmp_path) -> None:
    import datasets

    rows = [{"text": f"row {i}", "n": str(i)} for i in range(20)]
    whole = datasets.Dataset.from_list(rows)
    whole.to_csv(tmp_path / "x.csv")
    whole.to_parquet(tmp_path / "x.parquet")
    whole.save_to_disk(str(tmp_path / "saved"))
    for name in ("x.jsonl", "train.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (tmp_path / "x.txt").write_text("".join(f"row {i}\n" for i in range(20)))
    ways = [{"type": kind, "path": str(tmp_path / f"x.{kind}")} for kind in ("csv", "jsonl", "parquet")]
    names = ("x.csv", "x.jsonl", "x.json", "x.parquet", "saved", "x.txt")
    ways += [{"type": "dataset", "url": str(tmp_path / name)} for name in names]
    for more in ({"shuffle": True}, {"shuffle": True, "seed": 7}, {"shuffle": True, "buffer_size": 3}, {}):
        for shard in ({"index": 1, "total": 3}, {"index": 2, "total": 3, "contiguous": False}, None):
            found = set()
            for way in ways:
                columns = {} if way.get("url", "").endswith(".txt") else {"metadata_columns": ["n"]}
                items = load({**way, **more, **columns}, shard=shard)
                if columns:
                    assert [f"row {each['n']}" for each in items.metadata] == list(items.prompts)
                found.add(items.prompts)
            assert len(found) == 1, (more, shard)


def test_parquet_keeps_its_types_and_loses_no_digits(load, tmp_path) -> None:
    import datetime
    import decimal

    import pyarrow as pa
    import pyarrow.parquet as pq

    zone = datetime.timezone(datetime.timedelta(hours=2))
    columns = {
        "text": pa.array([decimal.Decimal("1.10")], pa.decimal128(10, 2)),
        "large": pa.array([decimal.Decimal("12345678901234567890.123456789")], pa.decimal128(38, 9)),
        "small": pa.array([decimal.Decimal("2.50")], pa.decimal128(10, 2)),
        "when": pa.array([datetime.datetime(2024, 1, 2, tzinfo=zone)], pa.timestamp("us", "+02:00")),
        "nanos": pa.array([1_700_000_000_000_000_001], pa.timestamp("ns")),
        "raw": pa.array([b"\xff\x00"], pa.binary()),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    for way in ({"type": "parquet", "path": "x.parquet"}, {"type": "dataset", "url": "x.parquet"}):
        data = {key: str(tmp_path / each) if each == "x.parquet" else each for key, each in way.items()}
        items = load({**data, "metadata_include_all": True})
        assert items.prompts == ("1.10",)
        assert items.metadata[0] == {
            "large": "12345678901234567890.123456789", "small": 2.5, "when": "2024-01-02T00:00:00+02:00",
            "nanos": "2023-11-14T22:13:20.000000001", "raw": "/wA=",
        }  # fmt: skip
