"""Random trees as a hostile task could leave them: all is removed or reported, and nothing outside is touched."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowmesh.files.removal import remove_path
from flowmesh.files.walk import Troubles, walk
from tests.kit.hostile import bind, cannot_mount, in_child, make_deep, make_socket

NAMES = st.sampled_from(
    ["a", "b", "c", "-rf", "new\nline", "\x1b[31m", "x" * 255, b"\xff\xfe".decode("utf-8", "surrogateescape"), "*", "~"]
)
LEAVES = st.one_of(
    st.just(("file", 3)),
    st.just(("link", "")),
    st.just(("loop", "")),
    st.just(("hard", "")),
    st.just(("fifo", "")),
    st.just(("socket", "")),
    st.just(("mount", "")),
    st.tuples(st.just("deep"), st.integers(1, 150)),
)
MODES = st.sampled_from([0o755, 0o555, 0o000, 0o300, 0o400, 0o1777])
TREES = st.recursive(
    LEAVES,
    lambda below: st.tuples(st.just("folder"), MODES, st.dictionaries(NAMES, below, max_size=4)),
    max_leaves=12,
).map(lambda tree: ("folder", 0o755, {"top": tree}))


class Ground:
    """A folder with a victim beside it, on one device."""

    def __init__(self, home: Path, *, mounts: bool) -> None:
        self.home = home
        self.mounts = mounts
        self.victim = home / "victim"
        self.top = home / "work" / "tree"
        self.made = 0
        """Entries below the top, without what is below a mount."""
        self.mounted = 0
        (self.victim / "inner").mkdir(parents=True)
        (self.victim / "inner" / "file").write_text("precious")
        (self.victim / "file").write_text("precious")
        self.top.parent.mkdir()

    def build(self, path: Path, tree: Any) -> None:
        kind, *rest = tree
        self.made += 1
        match kind:
            case "folder":
                path.mkdir()
                for name, each in rest[1].items():
                    self.build(path / name, each)
                path.chmod(rest[0])
            case "file":
                path.write_bytes(b"x" * rest[0])
            case "link":
                path.symlink_to(self.victim)
            case "loop":
                path.symlink_to(path)
            case "hard":
                path.hardlink_to(self.victim / "file")
            case "fifo":
                os.mkfifo(path)
            case "socket":
                make_socket(path.parent, path.name)
            case "mount" if self.mounts:
                path.mkdir()
                bind(self.victim, path)
                self.mounted += 1
            case "mount":
                self.made -= 1
            case "deep":
                path.mkdir()
                make_deep(path, rest[0], "d" * 100)
                self.made += rest[0] + 1

    def check_victim(self) -> None:
        assert (self.victim / "file").read_text() == "precious"
        assert (self.victim / "inner" / "file").read_text() == "precious"
        assert self.victim.stat().st_mode & 0o777 == 0o755


@contextlib.contextmanager
def ground(*, mounts: bool) -> Iterator[Ground]:
    home = Path(tempfile.mkdtemp())
    try:
        yield Ground(home, mounts=mounts)
    finally:
        if not mounts:  # else they end with the child, and its parent removes the folder
            shutil.rmtree(home, ignore_errors=True)


def check_tree(tree: Any, *, mounts: bool) -> None:
    with ground(mounts=mounts) as on:
        on.build(on.top, tree)
        top = os.open(on.top.parent, os.O_RDONLY)
        try:
            for ordered in (False, True):
                troubles = Troubles()
                seen = [each.is_file and each.status.st_size for each in walk(top, troubles, ordered=ordered)]
                assert len(seen) == on.made
                assert troubles.count == on.mounted
        finally:
            os.close(top)
        left = remove_path(on.top)
        on.check_victim()
        assert left.count == on.mounted, left
        assert "\n" not in str(left)
        assert str(left).isprintable()
        assert os.path.lexists(on.top) == bool(on.mounted)
        kept = [folder for folder, _, _ in os.walk(on.top) if Path(folder).stat().st_ino == on.victim.stat().st_ino]
        assert len(kept) == on.mounted


def check_many(*, mounts: bool) -> None:
    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(tree=TREES)
    def examples(tree: Any) -> None:
        check_tree(tree, mounts=mounts)

    examples()


@pytest.mark.parametrize("openat2", [True, False], ids=["openat2", "older kernel"])
def test_all_is_removed_or_reported(*, openat2: bool) -> None:
    in_child(lambda: check_many(mounts=False), openat2=openat2)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("openat2", [True, False], ids=["openat2", "older kernel"])
def test_a_user_gives_itself_the_rights_that_are_missing(*, openat2: bool) -> None:
    assert pwd.getpwnam("nobody")
    in_child(lambda: check_many(mounts=False), user="nobody", openat2=openat2)


@pytest.mark.skipif(bool(why := cannot_mount()), reason=why or "-")
@pytest.mark.parametrize("openat2", [True, False], ids=["openat2", "older kernel"])
def test_no_mount_is_entered(*, openat2: bool, tmp_path: Path) -> None:
    def work() -> None:
        tempfile.tempdir = str(tmp_path)
        check_many(mounts=True)

    in_child(work, mounts=True, openat2=openat2)
