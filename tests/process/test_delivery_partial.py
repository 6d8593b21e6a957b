"""What a failed task's delivery makes of what was finished: exports, merged children's rows, a training run's steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowmesh.messages.rows import Head, Row, line
from flowmesh.results.delivery import deliver
from flowmesh.results.job import Failure
from flowmesh.tasks.catalogue import BUILTIN
from tests.kit.delivery import delivery, http, said, target
from tests.kit.http_server import Server

VERDICT = Failure(error="killed by SIGKILL", error_kind="crash")
EXPORTER = next(kind.exporter for kind in BUILTIN if kind.name == "inference")
EXPORT = {"jsonl_export": {"path": "artifacts/deep/out.jsonl", "fields": {"q": "prompt", "a": "output"}}}


def rows(folder: Path, *indices: int, total: int = 4, document: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    items = [{"index": at, "prompt": f"p{at}", "output": f"o{at}"} for at in indices]
    lines = [line(Row(key=f"k{each['index']}", index=each["index"], item=each)) for each in items]
    (folder / "rows.jsonl").write_bytes(line(Head(total=total, document=document)) + b"".join(lines))
    return folder


def exported(folder: Path, name: str = "artifacts/deep/out.jsonl") -> list[Any]:
    return [json.loads(each) for each in (folder / name).read_text().splitlines()]


def job(out: Path, wanted: dict[str, Any] = EXPORT, destination: Any = None, **fields: Any) -> Any:
    return delivery(
        target(out, destination, artifacts=("artifacts",)), failure=VERDICT, sends_rows=True, exporter=EXPORTER,
        exports={"t-1": wanted}, **fields,
    )  # fmt: skip


def test_the_finished_items_are_exported(out: Path) -> None:
    rows(out, 2, 0)
    assert deliver(job(out), None).ok
    assert exported(out) == [{"q": "p0", "a": "o0"}, {"q": "p2", "a": "o2"}]
    result = said(out)
    assert result["ok"] is False
    assert result["jsonl_export"]["record_count"] == 2
    assert result["jsonl_export"]["path"] == str(out / "artifacts" / "deep" / "out.jsonl")


def test_the_export_is_delivered_with_the_rows(out: Path) -> None:
    rows(out, 1)
    with Server() as server:
        report = deliver(job(out, destination=http(server.url + "/r")), None)
        received = [each.path for each in server.received]
    assert report.ok, report.error
    assert received == ["/r/t-1/files", "/r/t-1/files"]
    assert {url.rpartition("/")[2] for url in report.urls} == {"rows.jsonl.gz", "out.jsonl"}


@pytest.mark.parametrize("fields", [{"a": "metadata.gone"}, {"a": {"from": "nonsense"}}])
def test_an_export_that_cannot_be_made_changes_nothing_else(fields: dict[str, Any], out: Path) -> None:
    rows(out, 1)
    wanted = {"jsonl_export": {"fields": fields, "required_fields": ["a"]}}
    report = deliver(job(out, wanted), None)
    assert report.ok
    assert "were not exported" in report.notes[0]
    assert said(out)["partial"] is True
    assert "jsonl_export" not in said(out)


def test_an_export_is_not_written_through_links(out: Path, tmp_path: Path) -> None:
    rows(out, 1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (out / "artifacts").mkdir(exist_ok=True)
    (out / "artifacts" / "deep").symlink_to(elsewhere)
    report = deliver(job(out), None)
    assert report.ok
    assert "were not exported" in report.notes[0]
    assert not list(elsewhere.iterdir())


def test_children_have_rows_exports_and_documents_of_their_own(out: Path) -> None:
    rows(out, total=2)
    children = [rows(out.parent / name, 0, document=document) for name, document in (("c-1", "a"), ("c-2", "b"))]
    targets = tuple(target(folder, task_id=folder.name) for folder in children)
    given = job(out, children=targets, child_documents={"c-1": "a", "c-2": "a"})
    given.exports["c-1"] = {"jsonl_export": {}}
    report = deliver(given, None)
    assert {name: (part.done, part.total) for name, part in report.parts.items()} == {"t-1": (0, 2), "c-1": (1, 4)}
    assert report.parts["t-1"].resume is None, "there is nothing to go on from"
    assert report.parts["c-1"].resume == {"path": str(children[0])}
    assert exported(children[0], "export.jsonl") == [{"prompt": "p0", "output": "o0"}]
    assert "items" not in said(children[1]), "of another document"


@pytest.mark.parametrize(("field", "shown"), [("queries", "queries"), ("ok", "items"), ("error_kind", "items")])
def test_a_log_names_no_other_field_of_the_result(field: str, shown: str, out: Path) -> None:
    item = {"index": 0}
    (out / "rows.jsonl").write_bytes(line(Head(total=1, field=field)) + line(Row(key="k", index=0, item=item)))
    assert deliver(delivery(target(out), failure=VERDICT), None).ok
    result = said(out)
    assert (result["ok"], result["error_kind"], result[shown]) == (False, "crash", [item])


@pytest.mark.parametrize(
    ("content", "steps"),
    [('{"done": 7, "total": 9, "checkpointed": 4, "lost": 3}', {"done": 7, "total": 9, "checkpointed": 4}),
     ('{"done": "many"}', None), ("", None)],
)  # fmt: skip
def test_a_failed_training_run_says_its_steps(content: str, steps: dict[str, int] | None, out: Path) -> None:
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / "steps.json").write_text(content)
    report = deliver(delivery(target(out), failure=VERDICT), None)
    assert said(out).get("steps") == steps
    assert (report.steps is None) == (steps is None)
