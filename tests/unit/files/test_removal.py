"""Removal at its bounds: depth, width, descriptors, memory, and somebody who moves folders meanwhile."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from pathlib import Path

import pytest

from flowmesh.files import removal
from flowmesh.files.beneath import open_beneath
from flowmesh.files.descent import Descent, Moved
from flowmesh.files.removal import empty, remove_path
from flowmesh.files.safe_folder import open_folder
from flowmesh.files.walk import Troubles, walk
from tests.kit.hostile import in_child, make_deep


def test_five_thousand_levels_with_few_descriptors(tmp_path: Path) -> None:
    """Deeper than Python recurses, and than a path can be long."""
    make_deep(tmp_path / ".", 1)
    make_deep(tmp_path / "d", 5_000, "long" * 10)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
        troubles = Troubles()
        top = os.open(tmp_path, os.O_RDONLY)
        assert sum(1 for _ in walk(top, troubles)) == 5_000 + 3
        assert sum(1 for _ in walk(top, troubles, ordered=True)) == 5_000 + 3
        assert not troubles
        assert not remove_path(tmp_path / "d")

    in_child(work)
    assert list(tmp_path.iterdir()) == []


def test_more_folders_than_are_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "MOST_NAMES", 10)
    top = tmp_path / "top"
    for index in range(95):
        (top / str(index)).mkdir(parents=True)
        (top / str(index) / "file").touch()
    assert not remove_path(top)
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_no_trouble_and_a_file_is_removed_too(tmp_path: Path) -> None:
    assert not remove_path(tmp_path / "absent")
    assert not remove_path(tmp_path / "absent" / "absent")
    (tmp_path / "link").symlink_to("/etc")
    os.mkfifo(tmp_path / "pipe")
    assert not remove_path(tmp_path / "link")
    assert not remove_path(tmp_path / "pipe")
    assert Path("/etc").is_dir()


def test_a_report_is_one_line_and_counts(tmp_path: Path) -> None:
    """Of files that somebody may not remove: they lie in another user's folder."""
    if os.geteuid() != 0:
        pytest.skip("only root can make another user's folders")
    tmp_path.chmod(0o755)
    theirs = tmp_path / "top" / "theirs\n\x1b[31m"
    theirs.mkdir(parents=True)
    for index in range(20):
        (theirs / str(index)).touch()
    for parent in tmp_path.parents:
        parent.chmod(parent.stat().st_mode | 0o111)

    def work() -> None:
        left = remove_path(tmp_path / "top")
        assert left.count == 20
        assert str(left).startswith("20 entries are left, such as top/theirs\\n\\x1b[31m/")
        assert str(left).endswith(": Permission denied")

    os.chown(tmp_path, 65534, -1)
    os.chown(tmp_path / "top", 65534, -1)
    in_child(work, user="nobody")
    assert len(list(theirs.iterdir())) == 20


def test_a_folder_that_is_moved_away_meanwhile_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "top" / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    top = os.open(tmp_path / "top", os.O_RDONLY)
    with Descent(top, 0o700) as way:
        for name in ("a", "b", "c"):
            way.down(name)
        (tmp_path / "top" / "a" / "b").rename(tmp_path / "elsewhere" / "b")
        way.up()
        with pytest.raises(Moved):
            way.up()
    os.close(top)


def test_removal_ends_while_somebody_creates_and_moves_files(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    for index in range(300):
        (tmp_path / "top" / str(index % 7) / "x" / "y" / str(index)).mkdir(parents=True)
    done = threading.Event()

    def disturb() -> None:
        count = 0
        top = tmp_path / "top"
        while not done.is_set() and count < 30_000:  # a bound for the disk, if the removal did not end
            count += 1
            with contextlib.suppress(OSError):
                (top / "2" / "x").rename(top / "3" / "moved")
            with contextlib.suppress(OSError):
                (top / "4" / "x" / "y").rename(outside / f"y{count}")
            with contextlib.suppress(OSError):
                (top / "5" / f"new{count}").mkdir()
            with contextlib.suppress(OSError):
                (top / "6" / f"link{count}").symlink_to(outside)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        remove_path(tmp_path / "top")
    finally:
        done.set()
        thread.join()
    assert not remove_path(tmp_path / "top")
    assert (outside / "precious").exists()


def test_a_folder_is_emptied_except_for_what_stays(tmp_path: Path) -> None:
    for name in ("a", "b", "stays"):
        (tmp_path / name / "below").mkdir(parents=True)
    tmp_path.chmod(0o500)
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        assert empty(folder, {"stays"}.__contains__) == {}
    finally:
        os.close(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["stays"]
    assert (tmp_path / "stays" / "below").is_dir()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc"])
def test_only_an_entry_has_a_name(tmp_path: Path, name: str) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="not the name of an entry"):
            open_beneath(folder, name, os.O_RDONLY)
    finally:
        os.close(folder)


def test_a_folder_is_made_at_any_depth_a_path_can_have(tmp_path: Path) -> None:
    path = tmp_path.joinpath(*["d"] * 1500)
    os.close(open_folder(path, make=True))
    fd = open_folder(path)
    assert Path(f"/proc/self/fd/{fd}").readlink() == path
    os.close(fd)
    assert not remove_path(tmp_path / "d")
