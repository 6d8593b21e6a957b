"""A task's folder while a task still plays with it: what leaves is what was checked, and nothing of others."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowmesh.errors import DeliveryError
from flowmesh.results.archive import make_archive
from flowmesh.results.job import Target
from flowmesh.results.request_bodies import FileBody
from flowmesh.results.task_folder import TaskFolder
from flowmesh.settings.schema import ArchiveSettings
from tests.kit.hostile import make_deep

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can have more rights than a task")
NOBODY = 65534


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "t-1" / "artifacts").mkdir(parents=True)
    (tmp_path / "secret").write_text("root's own")
    (tmp_path / "t-1" / "out.bin").write_bytes(b"the task's own")
    return tmp_path


@pytest.fixture
def folder(home: Path) -> Iterator[TaskFolder]:
    """Of a task that runs as nobody, if we are root."""
    if os.geteuid() == 0:
        for path in (home / "t-1", home / "t-1" / "artifacts", home / "t-1" / "out.bin"):
            os.chown(path, NOBODY, -1)
    target = Target(task_id="t-1", out_dir=str(home / "t-1"), artifacts=("out.bin", "other"))
    with contextlib.closing(TaskFolder(target)) as task:
        yield task


def entries(home: Path) -> dict[str, dict[str, object]]:
    manifest = json.loads((home / "t-1" / "manifest.json").read_text())
    return {entry["name"]: entry for entry in manifest["entries"]}


def test_a_link_that_comes_between_two_tries_is_not_sent(home: Path, folder: TaskFolder) -> None:
    with contextlib.closing(FileBody(folder.open_file(("out.bin",)), "out.bin")) as body:
        first = b"".join(body.chunks(5))
        (home / "t-1" / "out.bin").unlink()
        (home / "t-1" / "out.bin").symlink_to(home / "secret")
        assert b"".join(body.chunks(5)) == first
        assert b"the task's own" in first
        assert body.sha256 == hashlib.sha256(b"the task's own").hexdigest()
    with pytest.raises(OSError, match="not a regular file"):
        folder.open_file(("out.bin",))


def test_a_folder_above_that_becomes_a_link_leads_nowhere(home: Path, folder: TaskFolder) -> None:
    assert folder.top.fd >= 0
    (home / "t-1").rename(home / "moved")
    (home / "t-1").symlink_to(home)
    assert folder.find("secret") is None
    folder.write_result()
    assert (home / "moved" / "responses.json").exists()
    assert not (home / "responses.json").exists()


@as_root
@pytest.mark.parametrize("kind", ["hard link", "another user's"])
def test_another_users_file_is_neither_sent_hashed_nor_archived(home: Path, folder: TaskFolder, kind: str) -> None:
    for path in (home / "t-1" / "other", home / "t-1" / "artifacts" / "other"):
        if kind == "hard link":
            path.hardlink_to(home / "secret")
        else:
            path.write_text("somebody's")
            os.chown(path, 12345, -1)
    with pytest.raises(OSError, match="another user's file"):
        folder.open_file(("other",))
    folder.write_manifest({})
    said = entries(home)
    assert said["out.bin"]["status"] == "present"
    assert said["other"]["status"] == "missing"
    assert "another user's file" in str(said["other"]["reason"])
    assert said["artifacts"]["file_count"] == 0
    assert "another user's file" in str(said["artifacts"]["reason"])
    with pytest.raises(DeliveryError, match=r"artifacts/other: it is .*another user's file"):
        make_archive(folder.top, ("artifacts",), "artifacts.tar.gz", ArchiveSettings())
    assert not (home / "t-1" / "artifacts.tar.gz").exists()


def test_a_deep_folder_is_counted_and_too_deep_for_an_archive(home: Path, folder: TaskFolder) -> None:
    make_deep(home / "t-1" / "artifacts", 1500, "folder")
    folder.write_manifest({})
    assert entries(home)["artifacts"]["file_count"] == 1
    with pytest.raises(DeliveryError, match="longer than 4095 bytes"):
        make_archive(folder.top, ("artifacts",), "artifacts.tar.gz", ArchiveSettings())
    assert not folder.remove("artifacts")


def test_a_folder_in_the_place_of_a_result_is_removed(home: Path, folder: TaskFolder) -> None:
    (home / "t-1" / "responses.json" / "deep").mkdir(parents=True)
    (home / "t-1" / f".responses.json.{os.getpid()}.partial" / "deep").mkdir(parents=True)
    folder.result = {"ok": True}
    folder.write_result()
    folder.write_manifest({})
    assert json.loads((home / "t-1" / "responses.json").read_text()) == {"ok": True}
    assert entries(home)["responses.json"]["status"] == "present"
