from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from flowmesh.results.job import Target
from flowmesh.results.manifest import Known
from flowmesh.results.task_folder import TaskFolder


def write_manifest(
    folder: Path, task_id: str, artifacts: Iterable[str] = (), known: dict[str, Known] | None = None
) -> None:
    target = Target(task_id=task_id, out_dir=str(folder), artifacts=tuple(artifacts))
    with contextlib.closing(TaskFolder(target)) as task:
        task.write_manifest(known or {})


def written(folder: Path) -> dict[str, Any]:
    said = json.loads((folder / "manifest.json").read_text())
    assert set(said) == {"task_id", "generated_at", "entries"}
    said["by_name"] = {entry["name"]: entry for entry in said["entries"]}
    return said


def test_what_is_there_what_is_missing_and_what_nobody_asked_for(tmp_path: Path) -> None:
    (tmp_path / "responses.json").write_bytes(b'{"ok": true}\n')
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "task.log").write_bytes(b"12345")
    (tmp_path / "logs" / "more").mkdir()
    (tmp_path / "logs" / "more" / "x").write_bytes(b"678")
    (tmp_path / "model.bin").write_bytes(b"weights")
    (tmp_path / "extra").mkdir()
    (tmp_path / "out.jsonl").write_bytes(b"{}\n")
    write_manifest(tmp_path, "t-1", ["out.jsonl", "absent.csv"])
    said = written(tmp_path)
    assert said["task_id"] == "t-1"
    assert datetime.fromisoformat(said["generated_at"]).utcoffset() is not None
    names = [entry["name"] for entry in said["entries"]]
    assert names == ["out.jsonl", "absent.csv", "responses.json", "logs", "artifacts", "extra", "model.bin"]

    result = said["by_name"]["responses.json"]
    assert (result["type"], result["required"], result["status"]) == ("result", True, "present")
    assert result["size"] == 13
    assert result["sha256"] == hashlib.sha256(b'{"ok": true}\n').hexdigest()
    assert datetime.fromisoformat(result["updated_at"]).utcoffset() is not None
    assert "file_count" not in result

    logs = said["by_name"]["logs"]
    assert (logs["type"], logs["status"], logs["size"], logs["file_count"]) == ("logs", "present", 8, 2)
    assert "sha256" not in logs
    assert said["by_name"]["absent.csv"] == {
        "name": "absent.csv", "path": "absent.csv", "type": "artifact", "required": True, "status": "missing",
        "reason": "the task wrote no such file or folder",
    }  # fmt: skip
    assert said["by_name"]["artifacts"]["type"] == "directory"
    assert said["by_name"]["artifacts"]["status"] == "missing"
    extra = said["by_name"]["extra"]
    assert (extra["type"], extra["required"], extra["size"], extra["file_count"]) == ("directory", False, 0, 0)
    assert said["by_name"]["model.bin"]["type"] == "artifact"
    assert not said["by_name"]["model.bin"]["required"]


def test_it_is_not_in_itself_even_where_it_is_asked_for_and_there_already(tmp_path: Path) -> None:
    for _ in range(2):
        write_manifest(tmp_path, "t-1", ["manifest.json", "logs/"])
    names = [entry["name"] for entry in written(tmp_path)["entries"]]
    assert names == ["logs", "responses.json", "artifacts"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json"]


def test_links_are_not_followed_out_and_pipes_are_not_opened(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "task"
    outside.mkdir()
    folder.mkdir()
    (outside / "secret").write_bytes(b"s3cret")
    (folder / "link").symlink_to(outside / "secret")
    (folder / "responses.json").symlink_to(outside / "secret")
    (folder / "logs").symlink_to(outside)
    (folder / "kept").mkdir()
    (folder / "kept" / "link").symlink_to(outside / "secret")
    (folder / "inner").write_bytes(b"inner")
    (folder / "alias").symlink_to("inner")
    os.mkfifo(folder / "pipe")
    write_manifest(folder, "t-1", ["link", "alias", "pipe"])
    said = written(folder)["by_name"]
    assert {name: said[name]["status"] for name in ("link", "responses.json", "logs", "alias", "pipe")} == {
        "link": "missing",
        "responses.json": "missing",
        "logs": "missing",
        "alias": "present",
        "pipe": "missing",
    }
    assert said["alias"]["sha256"] == hashlib.sha256(b"inner").hexdigest()
    assert (said["kept"]["size"], said["kept"]["file_count"]) == (0, 0)
    assert hashlib.sha256(b"s3cret").hexdigest() not in (folder / "manifest.json").read_text()


def test_a_manifest_that_a_task_made_a_link_is_replaced_not_written_through(tmp_path: Path) -> None:
    folder = tmp_path / "task"
    folder.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (folder / "manifest.json").symlink_to(victim)
    (folder / f".manifest.json.{os.getpid()}.partial").symlink_to(victim)
    write_manifest(folder, "t-1")
    assert victim.read_text() == "untouched"
    assert not (folder / "manifest.json").is_symlink()


def test_a_nested_artifact_and_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_bytes(b"b")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).write_bytes(b"x")
    write_manifest(tmp_path, "t-1", ["a/b.txt"])
    said = written(tmp_path)["by_name"]
    assert said["a/b.txt"]["sha256"] == hashlib.sha256(b"b").hexdigest()
    assert said["\ufffd"]["size"] == 1


def test_a_known_checksum_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "final_model.tar.gz").write_bytes(b"x")
    write_manifest(tmp_path, "t-1", known={str(tmp_path / "final_model.tar.gz"): Known(7, "00ff")})
    assert written(tmp_path)["by_name"]["final_model.tar.gz"]["sha256"] == "00ff"
