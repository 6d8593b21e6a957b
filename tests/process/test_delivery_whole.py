"""Whole deliveries: from folders on disk to real servers, in order, and resumed after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flowmesh.errors import FieldError
from flowmesh.messages.job import ArchiveRequest, Fault, Outcome, UploadRequest
from flowmesh.messages.output import HttpDestination, LocalDestination, read_output
from flowmesh.processes.pipe import Finished, Frame, Hello, Phase, Pipe, Progress
from flowmesh.results.delivery import deliver, main, read_report, write_job
from flowmesh.results.job import DeliveryJob, DeliveryReport, Failure, Target, children_of, file_url_template
from flowmesh.settings_schema import ArchiveSettings
from tests.http_server import Answer, Reset, Server, Stall

QUICK: dict[str, Any] = {
    "first_backoff_s": 0.01,
    "max_backoff_s": 0.05,
    "total_timeout_s": 20.0,
    "archive": ArchiveSettings(pigz_threads=2),
}


def http(url: str, **fields: Any) -> HttpDestination:
    made = read_output({"destination": {"type": "http", "url": url, **fields}}).destination
    assert isinstance(made, HttpDestination)
    return made


def target(out_dir: Path, destination: Any = None, task_id: str = "t-1", artifacts: tuple[str, ...] = ()) -> Target:
    return Target(
        task_id=task_id, out_dir=str(out_dir), destination=destination or LocalDestination(), artifacts=artifacts
    )


def delivery(task: Target, **fields: Any) -> DeliveryJob:
    return DeliveryJob(**{"attempt": 1, "worker_id": "w-1", "task": task, **QUICK, **fields})


def outcome(result: dict[str, Any] | None = None, **fields: Any) -> Outcome:
    return Outcome(**{"attempt": 1, "ok": True, "result": {"ok": True} if result is None else result, **fields})


def said(folder: Path, name: str = "responses.json") -> Any:
    return json.loads((folder / name).read_text())


def manifest(folder: Path) -> dict[str, Any]:
    return {entry["name"]: entry for entry in said(folder, "manifest.json")["entries"]}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "results" / "t-1"
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "task.log").write_text("line\n")
    return folder


def with_model(out: Path, name: str = "final_model", size: int = 3_000_000) -> Path:
    (out / name).mkdir()
    (out / name / "weights.bin").write_bytes(os.urandom(size))
    (out / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (out / "checkpoints" / "checkpoint-5" / "x").write_text("x")
    return out / name


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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


def trained(folder: str = "final_model") -> Outcome:
    return outcome({"task_id": "t-1", "training_successful": True}, archives=(ArchiveRequest(folder=folder),))


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
            until(when)
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
        export = {"path": "e.jsonl", "uploaded": True, "url": url, "download_url": url}
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
        children_of(merged, read_output(None), tmp_path)
    assert caught.value.path == path
    assert str(caught.value).startswith(path)


def test_the_template_of_a_files_address() -> None:
    output = read_output({"destination": {"type": "http", "url": "http://u:p@h/r?x=1"}})
    assert file_url_template(output, "t-1") == "http://h/r/t-1/files/{name}"
    assert file_url_template(read_output(None), "t-1") is None


def test_a_refusal_leaves_everything_on_disk_and_tells_the_servers_word(out: Path) -> None:
    with_model(out)
    with Server(Answer(507), Answer(403, b"quota of k3y-secret exceeded")) as server:
        job = delivery(target(out, http(server.url, headers={"X-Key": "k3y-secret"})), cleanup_after_upload=True)
        report = deliver(job, trained())
        assert server.received == []
    assert not report.ok
    assert report.status == 403
    assert "403" in report.error
    assert "quota of [hidden] exceeded" in report.error
    assert (out / "final_model" / "weights.bin").exists()
    assert (out / "checkpoints").exists()
    assert said(out)["final_model_archive_uploaded"] is False
    assert "final_model_archive_url" not in said(out)
    assert manifest(out)["responses.json"]["sha256"] == checksum(out / "responses.json")
    assert manifest(out)["final_model.tar.gz"]["status"] == "present"


def test_a_result_that_is_refused_is_a_failed_delivery(out: Path) -> None:
    with Server(Answer(422, b"no")) as server:
        report = deliver(delivery(target(out, http(server.url))), outcome())
        assert server.received == []
    assert (report.ok, report.status) == (False, 422)
    assert said(out) == {"ok": True}


def test_after_a_success_the_model_may_go(out: Path) -> None:
    with_model(out)
    (out / "keep.txt").write_text("x")
    with Server() as server:
        report = deliver(delivery(target(out, http(server.url)), cleanup_after_upload=True), trained())
        assert report.ok
        assert set(server.files()) == {"final_model.tar.gz"}
    assert sorted(p.name for p in out.iterdir()) == ["keep.txt", "logs", "manifest.json", "responses.json"]
    assert "final_model.tar.gz" not in manifest(out)
    assert said(out)["final_model_archive_uploaded"] is True


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount needs root")
def test_what_cannot_be_removed_after_the_upload_is_told_and_no_failure(out: Path) -> None:
    with_model(out)
    busy = out / "checkpoints" / "checkpoint-5"
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(busy)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this system does not allow mounting a tmpfs")
    try:
        with Server() as server:
            report = deliver(delivery(target(out, http(server.url)), cleanup_after_upload=True), trained())
            assert report.ok, report
            assert len(server.received) == 2
    finally:
        subprocess.run(["umount", "-l", str(busy)], check=True)
    assert not (out / "final_model").exists()
    assert "checkpoints could not be removed after its upload: Device or resource busy" in report.notes


def test_a_model_that_was_not_sent_is_never_dropped(out: Path) -> None:
    with_model(out)
    job = delivery(target(out), cleanup_after_upload=True)
    assert deliver(job, trained()).ok
    assert (out / "final_model" / "weights.bin").exists()
    assert not (out / "final_model.tar.gz").exists()
    with Server() as server:
        assert deliver(delivery(target(out, http(server.url)), cleanup_after_upload=True), outcome()).ok
    assert (out / "final_model" / "weights.bin").exists()
    assert (out / "checkpoints").exists()


CHILD = (
    "import socket, sys\n"
    "from pathlib import Path\n"
    "from flowmesh.processes.pipe import Pipe\n"
    "from flowmesh.results.delivery import main\n"
    "fd, spool, token = sys.argv[1:]\n"
    "pipe = Pipe(socket.socket(fileno=int(fd))) if fd != '-' else None\n"
    "heavy = {'torch', 'numpy', 'requests', 'redis', 'asyncio', 'psutil'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
    "sys.exit(main(pipe, Path(spool), token or None))\n"
)


def start(spool: Path, pipe: Pipe | None = None, token: str = "") -> subprocess.Popen[bytes]:
    fd = pipe.fileno() if pipe is not None else None
    command = [sys.executable, "-c", CHILD, "-" if fd is None else str(fd), str(spool), token]
    return subprocess.Popen(command, pass_fds=() if fd is None else (fd,), stderr=subprocess.PIPE)


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    folder = tmp_path / "spool"
    folder.mkdir()
    return folder


def prepare(spool: Path, job: DeliveryJob, ran: Outcome) -> None:
    write_job(job, spool)
    (spool / "outcome.json").write_bytes(msgspec.json.encode(ran))


def until(condition: Any, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_child_tells_its_progress_and_leaves_its_report(out: Path, spool: Path) -> None:
    with_model(out)
    with Server() as server:
        prepare(spool, delivery(target(out, http(server.url)), orchestrator_url=server.url), trained())
        near, far = Pipe.pair()
        process = start(spool, far, token="n0de-token")
        far.close()
        frames: list[Frame] = []
        while near.wait(20):
            try:
                frame = near.poll()
            except EOFError:
                break
            assert frame is not None
            frames.append(frame)
        near.close()
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
        assert all(r.headers["authorization"] == "Bearer n0de-token" for r in server.received)
    kinds = [type(frame) for frame in frames]
    assert kinds[0] is Hello
    assert kinds[-1] is Finished
    assert Phase("archive") in frames
    assert Phase("upload") in frames
    assert Progress in kinds
    report = read_report(spool)
    assert report is not None
    assert report.ok
    assert (spool / "delivery.json").stat().st_mode & 0o077 == 0
    assert b"n0de-token" not in b"".join(p.read_bytes() for p in [*spool.iterdir(), out / "responses.json"])


def test_killed_in_mid_upload_it_goes_on_where_it_was(out: Path, spool: Path) -> None:
    with_model(out)
    (out / "then.txt").write_text("then")
    with Server(Answer(), Stall(100_000)) as server:
        ran = msgspec.structs.replace(trained(), uploads=(UploadRequest(path="then.txt", field="then"),))
        prepare(spool, delivery(target(out, http(server.url, timeoutSec=60))), ran)
        # the archive arrives, the file after it stalls
        process = start(spool)
        until(lambda: len(server.requests) == 2)
        archive = (out / "final_model.tar.gz").stat()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert read_report(spool) is None
        assert said(out)["training_successful"] is True  # the computed result is not lost
        again = start(spool)
        _, errors = again.communicate(timeout=30)
        assert again.returncode == 0, errors
        assert [r.file_name for r in server.received] == ["final_model.tar.gz", "then.txt", None]
        assert (out / "final_model.tar.gz").stat().st_mtime_ns == archive.st_mtime_ns
        assert server.results()[0]["final_model_archive_uploaded"] is True
        assert server.results()[0]["then"]["uploaded"] is True


def test_killed_while_it_packs_it_packs_again(out: Path, spool: Path, tmp_path: Path) -> None:
    model = with_model(out)
    slow = tmp_path / "slow-pigz"
    slow.write_text("#!/bin/sh\nhead -c 2000000 | pigz -c\nwhile [ -e /proc/$PPID/fd ]; do sleep 0.05; done\n")
    slow.chmod(0o755)
    with Server() as server:
        job = delivery(target(out, http(server.url)), archive=ArchiveSettings(pigz_bin=str(slow)))
        prepare(spool, job, trained())
        process = start(spool)
        partial = out / "final_model.tar.gz.partial"
        until(lambda: partial.exists() and partial.stat().st_size > 0)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert partial.exists()
        assert not (out / "final_model.tar.gz").exists()
        prepare(spool, delivery(target(out, http(server.url))), trained())
        assert main(None, spool) == 0
        assert server.files()["final_model.tar.gz"].file_sha256 == checksum(out / "final_model.tar.gz")
    assert not partial.exists()
    with tarfile.open(out / "final_model.tar.gz") as tar:
        assert tar.getmember("final_model/weights.bin").size == (model / "weights.bin").stat().st_size


def test_killed_after_the_cleanup_it_still_ends_well(out: Path, spool: Path) -> None:
    with_model(out)
    with Server() as server:
        job = delivery(target(out, http(server.url), artifacts=("final_model",)), cleanup_after_upload=True)
        prepare(spool, job, trained())
        assert main(None, spool) == 0
        (spool / "delivered.json").unlink()  # as if it had been killed just before writing this
        assert main(None, spool) == 0
        assert len(server.received) == 2
        assert said(out)["final_model_archive_uploaded"] is True
        report = read_report(spool)
        assert report is not None
        assert report.urls == (f"{server.url}/t-1/files/final_model.tar.gz",)


def test_an_archive_of_an_earlier_attempt_is_not_taken_for_this_ones(out: Path, spool: Path) -> None:
    with_model(out)
    (out / "final_model.tar.gz").write_bytes(b"of an earlier attempt")
    with Server() as server:
        prepare(spool, delivery(target(out, http(server.url))), trained())
        assert main(None, spool) == 0
        first = server.files()["final_model.tar.gz"]
        assert first.file_size > 1000
        (out / "final_model" / "weights.bin").write_bytes(b"other weights")
        prepare(spool, delivery(target(out, http(server.url)), attempt=2), trained())
        (spool / "delivered.json").unlink()
        assert main(None, spool) == 0
        assert server.files()["final_model.tar.gz"].file_sha256 != first.file_sha256


def test_done_is_done_unless_asked_to_send_again(out: Path, spool: Path) -> None:
    with Server(Answer(403)) as server:
        prepare(spool, delivery(target(out, http(server.url))), outcome())
        assert main(None, spool) == 1
        report = read_report(spool)
        assert report is not None
        assert not report.ok
        assert main(None, spool) == 0  # a failed delivery is tried again when the child is started again
        assert main(None, spool) == 0
        assert len(server.received) == 1
        assert main(None, spool, again=True) == 0
        assert len(server.received) == 2


def test_two_children_of_one_spool_deliver_once(out: Path, spool: Path) -> None:
    with_model(out)
    with Server(Reset(1000)) as server:
        prepare(spool, delivery(target(out, http(server.url))), trained())
        both = [start(spool), start(spool)]
        for process in both:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
        assert [r.file_name for r in server.received] == ["final_model.tar.gz", None]


def test_it_goes_on_without_the_node(out: Path, spool: Path) -> None:
    with_model(out)
    with Server() as server:
        prepare(spool, delivery(target(out, http(server.url))), trained())
        near, far = Pipe.pair()
        process = start(spool, far)
        far.close()
        near.close()
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
        assert len(server.received) == 2


def test_a_broken_job_is_a_report(spool: Path, out: Path) -> None:
    prepare(spool, delivery(target(out)), outcome())
    (spool / "outcome.json").write_text("{")
    assert main(None, spool) == 1
    report = read_report(spool)
    assert report is not None
    assert "broke down: DecodeError" in report.error


@pytest.mark.parametrize("name", ["delivered.json", "delivery_state.json", "outcome.json", "delivery.json"])
@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "garbage"])
def test_the_child_reads_nothing_but_files(out: Path, spool: Path, name: str, kind: str) -> None:
    with Server() as server:
        prepare(spool, delivery(target(out, http(server.url))), outcome())
        path = spool / name
        path.unlink(missing_ok=True)
        match kind:
            case "pipe":
                os.mkfifo(path)
            case "link":
                path.symlink_to(out / "responses.json")
            case "folder":
                path.mkdir()
            case _:
                path.write_bytes(b'{"ok": "\xff"}')
        process = start(spool)
        process.communicate(timeout=20)
        report = read_report(spool)
        if name == "delivery_state.json" or (name == "delivered.json" and kind != "folder"):
            assert (process.returncode, report and report.ok) == (0, True)
            assert len(server.results()) == 1
        else:
            assert process.returncode != 0
            assert report is None or not report.ok
            assert (server.results() == []) == (name != "delivered.json")


def test_the_result_arrives_byte_for_byte(out: Path) -> None:
    text = "".join(chr(c) for c in (*range(1, 0x250), 0x2028, 0x1F600)) * 500
    with Server() as server:
        assert deliver(delivery(target(out, http(server.url))), outcome({"text": text})).ok
        (result,) = server.results()
    assert result["text"] == text
    assert said(out)["text"] == text
