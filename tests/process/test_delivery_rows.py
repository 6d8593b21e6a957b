"""What a failed task had finished: in its result, and as a file for another node."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pytest

from flowmesh.messages.rows import Head, Row, line, read
from flowmesh.results.delivery import deliver
from flowmesh.results.job import Failure
from tests.kit.delivery import delivery, http, said, target
from tests.kit.http_server import Answer, Server

VERDICT = Failure(error="the task ran longer than its limit", error_kind="timeout")
ROWS = [
    Row(key=f"k{n}", index=n, prompt_tokens=2, completion_tokens=3, item={"index": n, "output": f"o{n}"})
    for n in (2, 0)
]  # fmt: skip


@pytest.fixture
def logged(out: Path) -> Path:
    """A folder with two rows, and half of a third."""
    (out / "rows.jsonl").write_bytes(line(Head(total=4)) + b"".join(map(line, ROWS)) + line(ROWS[0])[:-9])
    return out


def test_a_failed_result_has_the_finished_items(logged: Path) -> None:
    report = deliver(delivery(target(logged), failure=VERDICT, sends_rows=True), None)
    assert report.ok
    assert report.rows is not None
    assert (report.rows.done, report.rows.total) == (2, 4)
    result = said(logged)
    assert result["ok"] is False
    assert result["partial"] is True
    assert result["rows"] == {"done": 2, "total": 4}
    assert result["items"] == [ROWS[1].item, ROWS[0].item]
    assert result["usage"]["total_tokens"] == 10


@pytest.mark.parametrize(("document", "shown"), [("a", True), ("b", False), ("", True)])
def test_rows_of_another_document_are_not_shown(document: str, shown: bool, logged: Path) -> None:
    (logged / "rows.jsonl").write_bytes(line(Head(total=4, document="a")) + b"".join(map(line, ROWS)))
    report = deliver(delivery(target(logged), failure=VERDICT, sends_rows=True, document=document), None)
    assert report.ok
    assert (report.rows is not None, "items" in said(logged)) == (shown, shown)
    assert (logged / "rows.jsonl").exists()


def test_rows_go_where_the_result_would_have_gone(logged: Path) -> None:
    child = logged.parent / "c-1"
    child.mkdir()
    (child / "rows.jsonl").write_bytes(line(Head(total=1)) + line(Row(index=0, item={"index": 0})))
    with Server() as server:
        task = target(logged, http(server.url + "/r"))
        children = (target(child, http(server.url + "/r"), task_id="c-1"),)
        report = deliver(delivery(task, failure=VERDICT, sends_rows=True, children=children), None)
        received = {each.path: each for each in server.received}
    assert report.rows is not None
    assert (report.rows.done, report.rows.total) == (3, 5)
    assert set(received) == {"/r/t-1/files", "/r/c-1/files"}
    assert report.parts["t-1"].resume == {"url": f"{server.url}/r/t-1/files/rows.jsonl.gz"}
    assert report.parts["c-1"].resume == {"url": f"{server.url}/r/c-1/files/rows.jsonl.gz"}
    assert (report.parts["c-1"].done, report.parts["c-1"].total) == (1, 1)
    kept = read(io.BytesIO(gzip.decompress((logged / "rows.jsonl.gz").read_bytes())))
    assert list(kept.rows) == ROWS
    assert said(child)["partial"] is True


def test_rows_that_cannot_be_sent_change_no_verdict(logged: Path) -> None:
    with Server(*[Answer(403)] * 5) as server:
        report = deliver(delivery(target(logged, http(server.url)), failure=VERDICT, sends_rows=True), None)
    assert report.ok
    assert report.parts["t-1"].resume == {"path": str(logged)}
    assert "were not delivered" in report.notes[0]
    assert said(logged)["partial"] is True


def test_a_link_in_place_of_the_log_is_not_followed(out: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(line(Head(total=1)) + line(ROWS[0]))
    (out / "rows.jsonl").symlink_to(elsewhere)
    report = deliver(delivery(target(out), failure=VERDICT), None)
    assert report.rows is None
    assert "partial" not in said(out)
