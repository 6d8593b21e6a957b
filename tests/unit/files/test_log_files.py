"""`flowmesh logs` opens what a task calls its logs without following a link of the task's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flowmesh.errors import FlowMeshError
from flowmesh.files.log_files import LogFiles, Tail, start_of_last


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    logs = tmp_path / "task" / "logs"
    for rank in ("10", "9"):
        (logs / rank).mkdir(parents=True)
        (logs / rank / "stdout.log").write_text(f"rank {rank}\n")
    (logs / "stdout.log").write_text("one\ntwo\nthree")
    (tmp_path / "secret").write_text("of the operator\n")
    return logs


def test_files_in_the_order_of_ranks(folder: Path) -> None:
    (folder / "stderr.log").touch()
    assert LogFiles(folder).names(None) == ["stdout.log", "stderr.log", "9/stdout.log", "10/stdout.log"]
    assert LogFiles(folder).names("stderr") == ["stderr.log"]
    assert LogFiles(folder / "none").names(None) == []


def test_no_link_is_followed(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    logs = LogFiles(folder)
    tail = Tail(lambda: logs.open("stdout.log"), "stdout", None)
    assert tail.lines(at_end=False) == [b"one", b"two"]
    (folder / "stdout.log").unlink()
    (folder / "stdout.log").symlink_to(secret)
    (folder / "stderr.log").symlink_to(secret)
    (folder / "9" / "stdout.log").unlink()
    os.mkfifo(folder / "9" / "stdout.log")
    (folder / "linked").symlink_to(folder / "10")
    assert tail.is_empty
    assert tail.lines(at_end=True) == []
    assert logs.names(None) == ["10/stdout.log"]
    for name in ("stderr.log", "9/stdout.log", "linked/stdout.log", "../../secret"):
        with pytest.raises(OSError, match=r"."):
            logs.open(name)
    folder.rename(folder.with_name("moved"))
    folder.symlink_to(folder.with_name("moved"))
    with pytest.raises(FlowMeshError, match="cannot be read"):
        logs.names(None)


@pytest.mark.parametrize(
    ("text", "count", "offset"),
    [(b"", 3, 0), (b"a\nb\n", 1, 2), (b"a\nb", 1, 2), (b"a\nb\n", 9, 0), (b"a\nb\n", 0, 4), (b"x" * 200_000, 1, 0)],
)
def test_the_last_lines(tmp_path: Path, text: bytes, count: int, offset: int) -> None:
    (tmp_path / "log").write_bytes(text)
    with (tmp_path / "log").open("rb") as file:
        assert start_of_last(file, count) == offset
