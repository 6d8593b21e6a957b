"""What an earlier attempt left is not an output of the next."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from flowmesh.execution.launch.outputs import empty_outputs
from flowmesh.files.safe_folder import open_folder
from flowmesh.tasks.catalogue import BUILTIN
from tests.kit.hostile import bind, cannot_mount, in_child, make_deep


def start_again(folder: Path, others: Iterable[Path] = (), stays: Iterable[str] = ()) -> None:
    fd = open_folder(folder)
    try:
        empty_outputs(fd, folder, lambda: others, stays)
    finally:
        os.close(fd)


def an_attempt(folder: Path, depth: int = 1200) -> None:
    for name in ("logs/0", "artifacts/deep", "final_model", "checkpoints/checkpoint-1", ".final_model.partial"):
        (folder / name).mkdir(parents=True)
    make_deep(folder / "artifacts" / "deep", depth)
    for name in ("responses.json", "manifest.json", "rows.jsonl", "final_model.tar.gz", "checkpoints/checkpoint-1/x"):
        (folder / name).write_text("earlier")
    (folder / "final_model").chmod(0o555)


def test_only_what_an_attempt_continues_from_stays(tmp_path: Path) -> None:
    an_attempt(tmp_path)
    start_again(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "rows.jsonl"]
    assert (tmp_path / "checkpoints" / "checkpoint-1" / "x").read_text() == "earlier"


def test_an_agents_workspace_stays(tmp_path: Path) -> None:
    an_attempt(tmp_path)
    (tmp_path / "workspace").mkdir()
    agent = next(kind for kind in BUILTIN if kind.name == "agent")
    start_again(tmp_path, stays=agent.continues_from)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "rows.jsonl", "workspace"]


def test_a_folder_that_no_task_had_stays_as_it_is(tmp_path: Path) -> None:
    """A document can name any folder below the allowed roots."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "thesis.tex").write_text("years of work")
    start_again(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "thesis.tex"]


def test_folders_of_other_tasks_inside_it_stay(tmp_path: Path) -> None:
    an_attempt(tmp_path)
    an_attempt(tmp_path / "group" / "t-2", 1)
    start_again(tmp_path, [tmp_path / "group" / "t-2", Path("/elsewhere/t-3"), tmp_path])
    assert (tmp_path / "group" / "t-2" / "artifacts").is_dir()
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.skipif(bool(why := cannot_mount()), reason=why or "-")
def test_what_cannot_be_removed_is_no_output_either(tmp_path: Path) -> None:
    task, others = tmp_path / "t-1", tmp_path / "others"
    an_attempt(task)
    (task / "artifacts" / "mount").mkdir()
    others.mkdir()
    (others / "data").write_text("precious")

    def work() -> None:
        bind(others, task / "artifacts" / "mount")
        for _ in range(2):
            start_again(task)
            left = [path.name for path in task.iterdir() if path.name.startswith(".left-")]
            assert len(left) == 1
            assert not (task / "artifacts").exists()
            assert (task / left[0] / "mount" / "data").read_text() == "precious"
            (task / "logs").mkdir()
        (task / "artifacts").mkdir()
        bind(others, task / "artifacts")
        with pytest.raises(OSError, match="an earlier attempt left artifacts: something is mounted there"):
            start_again(task)

    in_child(work, mounts=True)
    assert (others / "data").read_text() == "precious"
