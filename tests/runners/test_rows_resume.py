"""`spec.resume` in each of its forms, and rows that are torn, damaged, or of another model."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path
from typing import Any

import pytest

from flowmesh.messages.rows import compress, read
from runners.api import BadRequest, Context
from tests.kit.file_server import Served, Server
from tests.kit.row_runners import RowsRunner

SPEC: dict[str, Any] = {"count": 6, "row_s": 0}


def run(make_context, spec: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return RowsRunner().run(make_context(spec, **fields))


@pytest.fixture
def earlier(make_context) -> Path:
    """The folder of a whole run."""
    context: Context = make_context(SPEC, task_id="earlier")
    RowsRunner().run(context)
    return context.out_dir


def packed(folder: Path) -> bytes:
    target = folder / "rows.jsonl.gz"
    with target.open("wb") as file:
        compress((folder / "rows.jsonl").read_bytes().splitlines(keepends=True), file)
    return target.read_bytes()


@pytest.mark.parametrize(
    "form", ["task", "folder", "file", "packed file", "url", "url of text", "folder with a packed file"]
)
def test_each_form(form: str, earlier: Path, make_context) -> None:
    data = packed(earlier)
    plain = (earlier / "rows.jsonl").read_bytes()
    with Server() as server:
        server.files["rows.jsonl.gz"] = Served(data if form == "url" else plain, token="Bearer t0ken")
        resume = {
            "task": {"taskId": "earlier"},
            "file": {"path": str(earlier / "rows.jsonl")},
            "packed file": {"path": str(earlier / "rows.jsonl.gz")},
        }.get(form, {"path": str(earlier)})
        if form.startswith("url"):
            resume = {"url": server.url("rows.jsonl.gz"), "headers": {"Authorization": "Bearer t0ken"}}
        if form == "folder with a packed file":
            (earlier / "rows.jsonl").unlink()
        result = run(make_context, SPEC | {"resume": resume}, task_id="later")
    assert result["reused"] == 6
    assert [item["output"] for item in result["items"]] == list("012345")


@pytest.mark.parametrize(
    ("served", "error"),
    [(Served(b"", statuses=[404]), r"spec\.resume\.url: .*404"),
     (Served(b"rows", token="Bearer other"), r"spec\.resume\.url: .*401"),
     (Served(b"<html>"), r"spec\.resume\.url: holds no rows"),
     (Served(b"\x1f\x8bnot gzip"), r"spec\.resume\.url: its rows cannot be read"),
     (Served(gzip.compress(b"x" * 100_000)[:60]), r"spec\.resume\.url: its rows cannot be read")],
)  # fmt: skip
def test_what_a_server_has_in_place_of_rows_is_refused(served: Served, error: str, make_context) -> None:
    with Server() as server:
        server.files["rows.jsonl.gz"] = served
        with pytest.raises(BadRequest, match=error):
            run(make_context, SPEC | {"resume": {"url": server.url("rows.jsonl.gz")}}, task_id="later")


@pytest.mark.parametrize(
    ("harm", "left"),
    [(lambda lines: [*lines[:3], lines[3].replace(b'"output":"2"', b'"output":"9"'), *lines[4:]], 5),
     (lambda lines: [*lines[:3], lines[3].replace(b'"crc32":"', b'"crc32":"f'), *lines[4:]], 5),
     (lambda lines: [*lines[:-1], lines[-1][:-4]], 5),
     (lambda lines: lines[1:], 6),
     (lambda lines: [lines[0], b"\xff\xfe garbage\n", *lines[1:]], 6),
     (lambda lines: [*lines, *lines[1:]], 6)],
    ids=["changed", "checksum", "torn", "no head", "garbage", "twice"],
)  # fmt: skip
@pytest.mark.parametrize("how", ["own", "another task's"])
def test_only_whole_rows_are_taken(harm: Any, left: int, how: str, earlier: Path, make_context) -> None:
    path = earlier / "rows.jsonl"
    path.write_bytes(b"".join(harm(path.read_bytes().splitlines(keepends=True))))
    if how == "own":
        result = run(make_context, SPEC, task_id="earlier", anew=False)
    else:
        result = run(make_context, SPEC | {"resume": {"taskId": "earlier"}}, task_id="later")
    assert result["reused"] == left
    assert [item["output"] for item in result["items"]] == list("012345")


def test_rows_of_another_model_are_not_taken_and_that_is_said(earlier: Path, make_context, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        result = run(make_context, SPEC | {"model": "other", "resume": {"path": str(earlier)}}, task_id="later")
    assert result["reused"] == 0
    assert (
        "spec.resume are not of this document's items, model or options, and not taken task=later rows=6 of 6"
        in caplog.text
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert run(make_context, SPEC | {"resume": {"path": str(earlier)}}, task_id="third")["reused"] == 6
    assert not caplog.text


def test_a_child_has_its_own_resume_and_goes_on_alone(make_context, tmp_path: Path) -> None:
    run(make_context, SPEC, task_id="earlier")
    folders = {name: str(tmp_path / "results" / name) for name in ("c1", "c2")}
    children = [
        {"task_id": "c1", "spec": SPEC | {"resume": {"taskId": "earlier"}}},
        {"task_id": "c2", "spec": {"count": 2, "row_s": 0}},
    ]
    result = run(make_context, SPEC, children=children, child_dirs=folders)
    assert (result["reused"], result["children"]["c1"]["reused"], result["children"]["c2"]["reused"]) == (0, 6, 0)
    alone = run(make_context, {"count": 2, "row_s": 0}, task_id="c2", anew=False)
    assert alone["reused"] == 2
    with Path(folders["c2"], "rows.jsonl").open("rb") as file:
        assert len(read(file).rows) == 2


def test_secrets_of_the_document_are_not_in_the_rows(make_context, earlier: Path) -> None:
    resume = {"url": "http://nowhere", "headers": {"Authorization": "Bearer s3cret-of-the-task"}}
    context = make_context({"count": 1, "row_s": 0, "resume": False, "unused": resume}, task_id="hidden")
    from runners.rows.opening import open_rows

    with open_rows(
        context, context.spec, "spec", context.out_dir, ["a"], lambda _, row: row.item, task_id="hidden"
    ) as log:
        log.take((), lambda _, row: row.item)
        log.add(0, {"index": 0, "output": "it is Bearer s3cret-of-the-task"})
    assert b"s3cret" not in (context.out_dir / "rows.jsonl").read_bytes()
