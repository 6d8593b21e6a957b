"""A cgroup that is removed at the moment at which it is used is gone, and no error."""

from __future__ import annotations

import contextlib
import itertools
import secrets
import threading
from pathlib import Path

import pytest

from flowmesh.processes.cgroup import Leaf, prepare
from flowmesh.processes.remains import end_leaves


@pytest.fixture
def base() -> Path:
    made = prepare(f"test-{secrets.token_hex(4)}")
    if made is None:
        pytest.skip("no cgroup v2 is delegated to this user")
    return made


def test_a_cgroup_that_is_being_removed_is_gone(base: Path) -> None:
    """The kernel answers ENODEV where a file of the group is opened at that moment: about 1 in 50 opens here."""
    ended = threading.Event()

    def churn() -> None:
        while not ended.is_set():
            Leaf.make(base, "server.1").remove_within(5)

    other = threading.Thread(target=churn)
    other.start()
    try:
        for _ in range(4000):
            leaf = Leaf(base / "server.1")
            leaf.kill()
            assert leaf.pids() == []
            leaf.remove()
    finally:
        ended.set()
        other.join()
        Leaf(base / "server.1").remove_within(5)
        base.rmdir()


def test_a_cgroup_that_cannot_be_removed_ends_no_start(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leaf = Leaf.make(base, "server.1")
    with contextlib.ExitStack() as stack:
        stack.callback(base.rmdir)
        stack.callback(leaf.path.rmdir)
        calls = itertools.count()

        def refuse(self: Leaf) -> bool:
            next(calls)
            raise PermissionError(13, "Permission denied", str(self.path))

        monkeypatch.setattr(Leaf, "remove", refuse)
        monkeypatch.setattr(Leaf, "kill", refuse)
        assert end_leaves([leaf], limit_s=0.05) == 0
        assert next(calls) > 2
