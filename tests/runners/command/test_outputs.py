"""Patterns of a program's outputs, and folders that are meant to harm."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from flowmesh.files.removal import remove_path
from flowmesh.messages.job import Job
from runners.api import Context
from runners.command.outputs import Missing, collect, expression

PATHS = ("a.txt", "b.bin", "m/c.bin", "m/n/d.bin", "m/n/.hidden", "[x]", "m-2/e.bin")


def matching(pattern: str) -> set[str]:
    return {path for path in PATHS if re.fullmatch(expression(pattern), path)}


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("a.txt", {"a.txt"}),
        ("./a.txt", {"a.txt"}),
        ("*.bin", {"b.bin"}),
        ("**/*.bin", {"b.bin", "m/c.bin", "m/n/d.bin", "m-2/e.bin"}),
        ("m", {"m/c.bin", "m/n/d.bin", "m/n/.hidden"}),
        ("m/**", {"m/c.bin", "m/n/d.bin", "m/n/.hidden"}),
        ("m/*", {"m/c.bin", "m/n/d.bin", "m/n/.hidden"}),
        ("m*/?.bin", {"m/c.bin", "m-2/e.bin"}),
        ("m/n/[a-d].bin", {"m/n/d.bin"}),
        ("m/n/[!a-c].bin", {"m/n/d.bin"}),
        ("[[]x]", {"[x]"}),
        ("**", set(PATHS)),
        ("n/d.bin", set()),
        ("a.tx", set()),
    ],
)
def test_patterns(pattern: str, paths: set[str]) -> None:
    assert matching(pattern) == paths


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    places = {name: str(tmp_path / name) for name in ("out_dir", "results_dir", "cache_dir", "tmp_dir")}
    ctx = Context(Job(attempt=1, task_id="t", task_type="command", runner="", task={"spec": {}}, **places))  # type: ignore[arg-type]
    ctx.artifacts_dir.mkdir(parents=True)
    return ctx


def test_links_are_followed_to_files_only(ctx: Context, tmp_path: Path) -> None:
    work, outside = tmp_path / "work", tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "folder/secret").write_text("not taken")
    (outside / "file").write_text("what a link leads to")
    work.mkdir()
    (work / "to file").symlink_to(outside / "file")
    (work / "to folder").symlink_to(outside / "folder")
    (work / "loop").symlink_to(work)
    os.mkfifo(work / "pipe")
    assert collect(ctx, work, ["**"], strict=True) == [{"path": "to file", "bytes": 20}]
    assert not (ctx.artifacts_dir / "to file").is_symlink()
    assert sorted(os.listdir(ctx.artifacts_dir)) == ["to file"]


def test_a_folder_of_a_thousand_levels(ctx: Context, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    fd = os.open(work, os.O_RDONLY)
    for _ in range(1000):
        os.mkdir("d", dir_fd=fd)
        fd, above = os.open("d", os.O_RDONLY, dir_fd=fd), fd
        os.close(above)
    os.close(fd)
    (work / "a.txt").write_text("a")
    assert collect(ctx, work, ["*.txt"], strict=True) == [{"path": "a.txt", "bytes": 1}]
    with pytest.raises(Missing, match=r"spec.outputs\[1\]"):
        collect(ctx, work, ["*.txt", "d/x"], strict=True)
    assert not remove_path(work)  # deeper than what pytest itself removes
