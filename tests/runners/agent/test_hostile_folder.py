"""What a command may leave in its folder: deep trees, folders without rights, links and mounts that lead out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flowmesh.files.removal import remove_path
from runners.agent.jail import copies
from runners.agent.rows import clear
from runners.agent.usage import over_disk
from runners.agent.workspace import Workspace
from tests.kit.hostile import bind, cannot_mount, in_child, make_deep

MIB = 2**20


class Ground:
    """Made and used by an ordinary user: root needs no rights."""

    def __init__(self, home: Path) -> None:
        self.victim = home / "victim"
        self.work = home / "work"

    def make(self, *, depth: int) -> None:
        for folder in (self.victim, self.work / "closed" / "inner", self.work / "deep"):
            folder.mkdir(parents=True)
        (self.victim / "file").write_text("precious")
        (self.victim / "file").chmod(0o4755)
        (self.work / "good").write_text("good")
        make_deep(self.work / "deep", depth)
        (self.work / "out").symlink_to(self.victim)
        (self.work / "closed" / "inner" / "file").write_text("x")
        (self.work / "closed" / "inner" / "out").symlink_to(self.victim / "file")
        (self.work / "closed" / "inner").chmod(0o555)
        (self.work / "closed").chmod(0)

    def check_victim(self) -> None:
        assert os.listdir(self.victim) == ["file"]
        assert (self.victim / "file").read_text() == "precious"
        assert (self.victim / "file").stat().st_mode & 0o7777 == 0o4755


@pytest.fixture
def ground() -> Iterator[Ground]:
    home = Path(tempfile.mkdtemp())
    home.chmod(0o777)
    yield Ground(home)
    assert not remove_path(home)


def as_user(act: Callable[[], None]) -> None:
    in_child(act, user="nobody" if os.geteuid() == 0 else "")


def test_it_is_made_fit_for_packing(ground: Ground) -> None:
    def act() -> None:
        ground.make(depth=1000)
        ground.work.chmod(0)
        assert Workspace(ground.work).tidy() == ["closed/inner/out", "/".join(["deep", *["d"] * 100]), "out"]
        ground.check_victim()
        assert sorted(os.listdir(ground.work)) == ["closed", "deep", "good"]
        assert os.listdir(ground.work / "closed" / "inner") == ["file"]

    as_user(act)


def test_it_is_measured(ground: Ground) -> None:
    def act() -> None:
        ground.make(depth=1000)
        assert over_disk(ground.work, 100 * MIB) == "it nested more than 100 folders"
        remove_path(ground.work / "deep")
        (ground.work / "good").chmod(0o6755)
        (ground.work / "closed" / "inner" / "file").chmod(0o4755)
        (ground.work / "closed").chmod(0)
        assert over_disk(ground.work, 100 * MIB) == ""
        ground.check_victim()
        assert (ground.work / "good").stat().st_mode & 0o7777 == 0o755
        assert (ground.work / "closed" / "inner" / "file").stat().st_mode & 0o7777 == 0o755

    as_user(act)


def test_it_is_copied_into_a_jail_and_back(ground: Ground) -> None:
    def act() -> None:
        ground.make(depth=1000)
        box = ground.work.parent / "box"
        box.mkdir()
        real, work = (copies.open_folder(str(each)) for each in (ground.work, box))
        known = copies.copy_in(real, work)
        assert sorted(os.listdir(box)) == ["closed", "deep", "good", "out"]
        for name in ("closed", "deep", "out"):
            assert not remove_path(box / name)
        (box / "new").mkdir()
        (box / "new" / "file").write_text("new")
        (box / "new").chmod(0)
        with copies.scratch(real) as scratch:
            back = copies.Back(scratch)
            back.copy(work, real, known)
        assert back.left == []
        assert sorted(os.listdir(ground.work)) == ["good", "new"]
        assert (ground.work / "new" / "file").read_text() == "new"
        ground.check_victim()

    as_user(act)


def test_what_earlier_runs_left_is_removed(ground: Ground) -> None:
    def act() -> None:
        ground.make(depth=1000)
        ground.work.chmod(0o555)
        clear(ground.work, frozenset({"good"}))
        assert os.listdir(ground.work) == ["good"]
        ground.check_victim()

    as_user(act)


@pytest.mark.skipif(bool(cannot_mount()), reason=cannot_mount() or "mounts work")
def test_what_is_mounted_there_stays_as_it_is(ground: Ground) -> None:
    def act() -> None:
        ground.make(depth=1)
        for parent in (ground.work, ground.work / "deep"):
            (parent / "mounted").mkdir()
            bind(ground.victim, parent / "mounted")
        box = ground.work.parent / "box"
        box.mkdir()
        real, work = (copies.open_folder(str(each)) for each in (ground.work, box))
        known = copies.copy_in(real, work)
        assert known["mounted"] is None
        assert not remove_path(box / "deep")
        (box / "mounted").mkdir()
        with copies.scratch(real) as scratch:
            back = copies.Back(scratch)
            back.copy(work, real, known)
        assert back.left == ["mounted/", "deep"]
        ground.check_victim()
        assert over_disk(ground.work, 100 * MIB) == ""
        Workspace(ground.work).tidy()
        ground.check_victim()
        clear(ground.work, frozenset())
        ground.check_victim()
        assert sorted(os.listdir(ground.work)) == ["deep", "mounted"]

    in_child(act, mounts=True)
