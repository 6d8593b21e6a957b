"""Whole deliveries: folders on disk to real servers, in order."""

from __future__ import annotations

import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flowmesh.errors import FieldError
from flowmesh.messages.job import ArchiveRequest, Fault, Outcome, UploadRequest
from flowmesh.messages.output import read_output
from flowmesh.processes.pipe import Frame, Phase, Progress
from flowmesh.results.delivery import deliver
from flowmesh.results.job import DeliveryJob, DeliveryReport, Failure, children_of, file_url_template
from flowmesh.settings.schema import ArchiveSettings
from tests.kit.delivery import (
    checksum,
    delivery,
    http,
    manifest,
    outcome,
    said,
    target,
    trained,
    with_model,
)
from tests.kit.http_server import Answer, Reset, Server, Stall
from tests.kit.support import until


def test_a_local_result_and_its_manifest(out: Path) -> None:
    frames: list[Frame] = []
    job = delivery(target(out), extra={"resources": {"gpu": 1}, "ok": "never"})
    report = deliver(job, outcome({"ok": True, "echo": {"a": 1}, "bad": float("nan")}), frames.append)
    assert report.ok
    assert (report.error, report.sent_bytes, report.urls) == ("", 0, ())
    assert said(out) == {"ok": True, "echo": {"a": 1}, "bad": None, "resources": {"gpu": 1}}
    assert manifest(out)["responses.json"]["sha256"] == checksum(out / "responses.json")
    assert manifest(out)["logs"]["file_count"] == 1
    assert sorted(p.name for p in out.iterdir()) == ["logs", "manifest.json", "responses.json"]
    assert not job.over_http
    assert frames == []


def test_the_folder_is_made_where_it_is_missing(tmp_path: Path) -> None:
    assert deliver(delivery(target(tmp_path / "a" / "t-1")), outcome()).ok
    assert said(tmp_path / "a" / "t-1") == {"ok": True}


def test_a_disk_that_refuses_is_a_report_and_no_exception(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    report = deliver(delivery(target(tmp_path / "file" / "t-1")), outcome())
    assert not report.ok
    assert "Not a directory" in report.error


@pytest.mark.parametrize("destination", ["local", "http"])
def test_a_failure_is_written_with_its_evidence_and_sent_nowhere(out: Path, destination: str) -> None:
    with Server() as server:
        verdict = Failure(
            error="the kernel killed\nthe task", error_kind="host_oom", detail="Traceback …",
            evidence="memory.events oom_kill +1", log_tail=("a", "b"),
        )  # fmt: skip
        child = target(out.parent / "c-1", task_id="c-1")
        task = target(out, http(server.url) if destination == "http" else None)
        job = delivery(task, failure=verdict, children=(child,))
        assert not job.over_http
        assert deliver(job, None).ok
        assert server.requests == []
    expected = {
        "ok": False, "error": "the kernel killed the task", "error_kind": "host_oom", "task_id": "t-1",
        "detail": "Traceback …", "evidence": "memory.events oom_kill +1", "log_tail": ["a", "b"],
    }  # fmt: skip
    assert said(out) == expected
    assert said(out.parent / "c-1") == {**expected, "task_id": "c-1"}
    assert manifest(out.parent / "c-1")["responses.json"]["status"] == "present"


def test_the_childs_own_word_stands_where_there_is_no_verdict(out: Path) -> None:
    failed = Outcome(attempt=1, ok=False, fault=Fault.GPU_OOM, message="CUDA out of memory", detail="…")
    assert deliver(delivery(target(out)), failed).ok
    assert said(out)["error_kind"] == "gpu_oom"
    assert deliver(delivery(target(out)), None).ok
    assert said(out) == {"ok": False, "error": "the task left no result", "error_kind": "crash", "task_id": "t-1"}


def test_merged_children_have_folders_of_their_own(out: Path, tmp_path: Path) -> None:
    merged = [
        ("c-1", {"output": {"destination": {"type": "local", "path": "elsewhere"}, "artifacts": ["x"]}}),
        ("c-2", {}),
        ("c-3", {}),
    ]
    children = children_of(merged, read_output(None), out.parent)
    result = {
        "ok": True,
        "model": "m",
        "items": [1],
        "children": {
            "c-1": {"items": [2], "usage": {}},
            "c-2": {"error": "another model", "error_kind": "bad_request"},
        },
    }
    assert deliver(delivery(target(out), children=children), outcome(result)).ok
    assert said(out) == result
    first = out.parent / "elsewhere" / "c-1"
    assert said(first) == {"ok": True, "model": "m", "items": [2], "usage": {}}
    assert manifest(first)["x"]["status"] == "missing"
    assert said(out.parent / "c-2") == {
        "ok": False, "model": "m", "error": "another model", "error_kind": "bad_request",
    }  # fmt: skip
    assert said(out.parent / "c-3")["ok"] is False
    assert said(out.parent / "c-3")["task_id"] == "c-3"


@pytest.mark.parametrize("folder", ["final_model", "final_lora"])
def test_a_model_is_packed_and_sent_before_the_result_that_names_it(out: Path, tmp_path: Path, folder: str) -> None:
    model = with_model(out, folder)
    frames: list[Frame] = []
    with Server() as server:
        report = deliver(delivery(target(out, http(server.url + "/r"))), trained(folder), frames.append)
        archive = out / f"{folder}.tar.gz"
        assert [r.path for r in server.received] == ["/r/t-1/files", "/r"]
        file, result = server.received
        expected = {
            "task_id": "t-1",
            "training_successful": True,
            f"{folder}_archive": f"{folder}.tar.gz",
            f"{folder}_archive_path": str(archive),
            f"{folder}_archive_bytes": archive.stat().st_size,
            f"{folder}_archive_url": f"{server.url}/r/t-1/files/{folder}.tar.gz",
            f"{folder}_archive_uploaded": True,
        }
        assert result.json == {"task_id": "t-1", "result": expected, "worker_id": "w-1"}
        assert result.headers["content-type"] == "application/json"
        assert (file.file_name, file.file_sha256) == (f"{folder}.tar.gz", checksum(archive))
    assert report.ok
    assert report.urls == (expected[f"{folder}_archive_url"],)
    assert report.sent_bytes > archive.stat().st_size
    assert said(out) == expected
    assert manifest(out)[f"{folder}.tar.gz"]["sha256"] == checksum(archive)
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "there", filter="data")
    assert checksum(tmp_path / "there" / folder / "weights.bin") == checksum(model / "weights.bin")
    phases = [frame.name for frame in frames if isinstance(frame, Phase)]
    assert phases == ["archive", "upload"]
    done = [frame.done for frame in frames if isinstance(frame, Progress)]
    assert done == sorted(done)
    assert done[-1] == report.sent_bytes


SLOW_PIGZ = """#!/bin/sh
cat > /dev/null
head -c 40000000 /dev/urandom
while [ ! -e {go} ] && [ -e {home} ]; do sleep 0.02; done
echo the end
exit {status}
"""


def slow_pigz(tmp_path: Path, status: int = 0) -> ArchiveSettings:
    """Settings with a pigz that does not exit before `tmp_path`/go exists."""
    script = tmp_path / "slow-pigz"
    script.write_text(SLOW_PIGZ.format(go=tmp_path / "go", home=tmp_path, status=status))
    script.chmod(0o755)
    return ArchiveSettings(pigz_bin=str(script))


def deliver_slowly(job: DeliveryJob, go: Path, when: Any) -> DeliveryReport:
    """Deliver, and let pigz exit once `when` returns true."""
    with ThreadPoolExecutor(1) as pool:
        report = pool.submit(deliver, job, trained())
        try:
            until(when, "the archive grows")
        finally:
            go.touch()
        return report.result(60)


def test_a_large_archive_leaves_while_it_is_still_written(out: Path, tmp_path: Path) -> None:
    with_model(out)
    with Server(unsized=True) as server:
        job = delivery(target(out, http(server.url)), archive=slow_pigz(tmp_path))
        report = deliver_slowly(job, tmp_path / "go", lambda: server.requests)
        assert report.ok, report
        file, result = server.received
        archive = out / "final_model.tar.gz"
        assert (file.unsized, file.file_name, file.file_size) == (True, archive.name, archive.stat().st_size)
        assert file.file_sha256 == checksum(archive) == manifest(out)[archive.name]["sha256"]
        assert not result.unsized
        assert result.json["result"]["final_model_archive_bytes"] == file.file_size
        assert result.json["result"]["final_model_archive_uploaded"] is True


@pytest.mark.parametrize(
    "plan",
    [None, [Answer(411)], [Answer(400)], [Answer(501)], [Answer(503)], [Reset(50_000)], [Stall(50_000)],
     [Answer(200, early=True)]],
    ids=["411", "late 411", "400", "501", "503", "reset", "stall", "200 at once"],
)  # fmt: skip
def test_a_server_that_wants_a_length_gets_it(out: Path, tmp_path: Path, plan: list[Any] | None) -> None:
    with_model(out)
    with Server(*(plan or []), unsized=plan is not None) as server:
        job = delivery(target(out, http(server.url, timeoutSec=0.5)), archive=slow_pigz(tmp_path))
        report = deliver_slowly(job, tmp_path / "go", lambda: server.requests)
        assert report.ok, report
        assert len(server.requests) == 3
        file, _ = server.received
        assert (file.unsized, file.file_sha256) == (False, checksum(out / "final_model.tar.gz"))


def test_a_refusal_of_an_early_archive_is_final_and_the_archive_is_kept(out: Path, tmp_path: Path) -> None:
    with_model(out)
    with Server(Answer(403, b"quota"), unsized=True) as server:
        job = delivery(target(out, http(server.url)), archive=slow_pigz(tmp_path))
        report = deliver_slowly(job, tmp_path / "go", lambda: server.requests)
        assert (report.ok, report.status) == (False, 403)
        assert "quota" in report.error
        assert len(server.requests) == 1
        assert (out / "final_model.tar.gz").stat().st_size > 40_000_000


def test_an_archive_that_fails_after_its_beginning_left_never_arrives(out: Path, tmp_path: Path) -> None:
    with_model(out)
    with Server(unsized=True) as server:
        job = delivery(target(out, http(server.url)), archive=slow_pigz(tmp_path, status=3))
        report = deliver_slowly(job, tmp_path / "go", lambda: server.requests)
        assert not report.ok
        assert "status 3" in report.error
        assert server.received == []
        assert not (out / "final_model.tar.gz").exists()


def test_artifacts_are_sent_files_as_they_are_and_folders_packed(out: Path) -> None:
    (out / "nested").mkdir()
    (out / "nested" / "table.csv").write_text("a,b\n")
    (out / "report.txt").write_text("text")
    wanted = ("responses.json", "logs", "nested/table.csv", "report.txt", "absent", "manifest.json")
    with Server() as server:
        report = deliver(delivery(target(out, http(server.url, method="PUT"), artifacts=wanted)), outcome())
        assert report.ok, report
        names = [r.file_name for r in server.received]
        assert names == ["logs.tar.gz", "table.csv", "report.txt", "responses.json", "manifest.json", None]
        assert [r.method for r in server.received] == ["POST"] * 5 + ["PUT"]
        files = server.files()
        assert files["table.csv"].file_sha256 == checksum(out / "nested" / "table.csv")
        assert files["responses.json"].file_sha256 == checksum(out / "responses.json")
        assert files["manifest.json"].file_sha256 == checksum(out / "manifest.json")
        assert server.results() == [{"ok": True}]
    with tarfile.open(out / "logs.tar.gz") as tar:
        assert tar.getnames() == ["logs", "logs/task.log"]
    assert manifest(out)["absent"]["status"] == "missing"
    assert manifest(out)["nested/table.csv"]["required"]


def test_a_file_asked_for_twice_is_sent_once(out: Path) -> None:
    with_model(out)
    wanted = ("final_model", "final_model.tar.gz", "export.jsonl")
    (out / "export.jsonl").write_text("{}\n")
    ran = msgspec.structs.replace(trained(), uploads=(UploadRequest(path="export.jsonl", field="jsonl_export"),))
    with Server() as server:
        assert deliver(delivery(target(out, http(server.url), artifacts=wanted)), ran).ok
        assert sorted(r.file_name or "" for r in server.received) == ["", "export.jsonl", "final_model.tar.gz"]
        url = f"{server.url}/t-1/files/export.jsonl"
    assert said(out)["jsonl_export"] == {"uploaded": True, "url": url, "download_url": url}
    assert said(out)["final_model_archive_uploaded"] is True


def test_two_files_of_one_name_are_refused_before_anything_is_sent(out: Path) -> None:
    for folder in ("a", "b"):
        (out / folder).mkdir()
        (out / folder / "x.txt").write_text(folder)
    ran = outcome(uploads=(UploadRequest(path="a/x.txt", field="a"), UploadRequest(path="b/x.txt", field="b")))
    with Server() as server:
        report = deliver(delivery(target(out, http(server.url))), ran)
        assert server.requests == []
    assert not report.ok
    assert "would both be uploaded as 'x.txt'" in report.error


def test_nothing_that_leads_out_of_the_folder_is_sent(out: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret")
    (out / "link").symlink_to(tmp_path / "secret")
    (out / "folder").symlink_to(tmp_path)
    (out / "alias").symlink_to("logs/task.log")
    with Server() as server:
        job = delivery(target(out, http(server.url), artifacts=("link", "folder", "alias")))
        report = deliver(job, outcome())
        assert report.ok
        assert [r.file_name for r in server.received] == ["alias", None]
        assert len(report.notes) == 2
        for request in (UploadRequest(path="link", field="x"), UploadRequest(path="../t-1/../secret", field="x")):
            report = deliver(job, outcome(uploads=(request,)))
            assert not report.ok
            assert "there is no such file" in report.error
        for folder in ("folder", "..", ".", "", "/etc", "absent"):
            report = deliver(job, outcome(archives=(ArchiveRequest(folder=folder),)))
            assert not report.ok, folder
            assert "no such folder" in report.error
        assert len(server.received) == 2


def test_children_are_sent_to_their_own_address_or_else_to_the_parents(out: Path) -> None:
    with Server() as parent, Server() as other:
        spec = {"output": {"destination": {"type": "http", "url": other.url + "/c"}}}
        merged: list[tuple[str, dict[str, Any]]] = [
            ("c-1", spec),
            ("c-2", {}),
            ("c-3", {"output": {"destination": {"type": "local"}}}),
        ]
        output = read_output({"destination": {"type": "http", "url": parent.url + "/p"}})
        children = children_of(merged, output, out.parent)
        (out.parent / "c-1").mkdir()
        (out.parent / "c-1" / "e.jsonl").write_text("{}\n")
        parts: dict[str, Any] = {f"c-{i}": {"items": [i]} for i in (1, 2, 3)}
        parts["c-1"]["jsonl_export"] = {"path": "e.jsonl"}
        ran = outcome(
            {"ok": True, "model": "m", "children": parts},
            uploads=(UploadRequest(path="e.jsonl", field="jsonl_export", child="c-1"),),
        )
        assert deliver(delivery(target(out, output.destination), children=children), ran).ok
        assert [(r.path, r.file_name) for r in other.received] == [("/c/c-1/files", "e.jsonl"), ("/c", None)]
        (first,) = other.results()
        url = f"{other.url}/c/c-1/files/e.jsonl"
        export = {"path": url, "uploaded": True, "url": url, "download_url": url}  # path: readable anywhere
        assert first == {"ok": True, "model": "m", "items": [1], "jsonl_export": export}
        assert said(out.parent / "c-1") == first
        sent = {r.json["task_id"]: r.json["result"] for r in parent.received}
        assert set(sent) == {"t-1", "c-2"}
        assert sent["t-1"]["children"]["c-1"]["jsonl_export"] == export
        assert sent["c-2"] == {"ok": True, "model": "m", "items": [2]}
        assert said(out.parent / "c-3")["items"] == [3]


@pytest.mark.parametrize(
    ("merged", "path"),
    [
        ([("../x", {})], "merge_children[0].task_id"),
        ([("a", {}), ("a", {})], "merge_children[1].task_id"),
        ([("a", {"output": {"destination": {"type": "x"}}})], "merge_children[0].spec.output.destination.type"),
        ([("a", {"output": {"destination": {"type": "local", "path": ".."}}})],
         "merge_children[0].spec.output.destination.path"),
    ],
)  # fmt: skip
def test_a_child_that_cannot_be_delivered_is_named(merged: Any, path: str, tmp_path: Path) -> None:
    with pytest.raises(FieldError) as caught:
        children_of(merged, read_output(None), tmp_path, refuse_outside=True)
    assert caught.value.path == path
    assert str(caught.value).startswith(path)


def test_the_template_of_a_files_address() -> None:
    output = read_output({"destination": {"type": "http", "url": "http://u:p@h/r?x=1"}})
    assert file_url_template(output, "t-1") == "http://h/r/t-1/files/{name}"
    assert file_url_template(read_output(None), "t-1") is None
