"""Patterns in folders that another task may have written: any depth, link loops, hidden names."""

from __future__ import annotations

import glob
from pathlib import Path

import pytest

from flowmesh.files.removal import remove_path
from runners.data import patterns
from tests.kit.hostile import make_deep


def below(folder: Path, pattern: str) -> list[str]:
    return sorted(str(each.relative_to(folder)) for each in patterns.found(folder / pattern) if each.is_file())


@pytest.mark.parametrize(
    "pattern",
    ["*.csv", "**/*.csv", "a/**/b/*.csv", "**/b/**", "**", "*/*.csv", "**/.hid/*.csv", "**/c.csv/x", "[ab]/**/[!c]*"],
)
def test_as_the_standard_library_does(tmp_path: Path, pattern: str) -> None:
    for name in ("a/b/c.csv", "a/x/b/d.csv", "a/.h.csv", "e.csv", ".hid/f.csv", "a/.hid/g.csv", "b/c.csv", "a/b/t.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    wanted = map(Path, glob.glob(str(tmp_path / pattern), recursive=True))  # noqa: PTH207 - what is compared with
    assert below(tmp_path, pattern) == sorted({str(each.relative_to(tmp_path)) for each in wanted if each.is_file()})


def test_links_to_folders_and_deep_trees(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").touch()
    (tmp_path / "linked.csv").symlink_to("rows.csv")
    for name in ("one", "two", "three"):  # each level of links would triple the work
        (tmp_path / name).symlink_to(".")
    make_deep(tmp_path, 1200)
    try:
        assert below(tmp_path, "**/*.csv") == ["linked.csv", "rows.csv"]
    finally:
        remove_path(tmp_path / "d")
