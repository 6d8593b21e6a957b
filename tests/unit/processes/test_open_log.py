"""The log of a task that runs as another user, who owns its folder, and whatever lies in the place of the log."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from flowmesh.processes.child_main import _open_log
from flowmesh.processes.limits import Limits

SECRET = b"somebody else's\n"
IN_ITS_PLACE: dict[str, Callable[[Path, Path], object]] = {
    "a link": lambda log, secret: log.symlink_to(secret),
    "a link to nothing": lambda log, secret: log.symlink_to(secret.with_name("new")),
    "a hard link": lambda log, secret: log.hardlink_to(secret),
    "a pipe": lambda log, _secret: os.mkfifo(log),
}


@pytest.mark.parametrize("what", IN_ITS_PLACE)
def test_what_is_no_file_of_its_own_is_replaced(tmp_path: Path, what: str) -> None:
    secret, log = tmp_path / "secret", tmp_path / "logs" / "stderr.log"
    secret.write_bytes(SECRET)
    log.parent.mkdir()
    IN_ITS_PLACE[what](log, secret)
    with open(_open_log(str(log), Limits(uid=os.getuid())), "wb") as file:
        file.write(b"the task's\n")
    assert log.read_bytes() == b"the task's\n"
    assert stat.S_ISREG(log.lstat().st_mode)
    assert secret.read_bytes() == SECRET
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "secret"]


def test_a_log_is_appended_to(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"before\n")
    descriptor = _open_log(str(tmp_path / "log"), Limits(uid=os.getuid()))
    assert os.get_blocking(descriptor)
    with open(descriptor, "wb") as file:
        file.write(b"after\n")
    assert (tmp_path / "log").read_bytes() == b"before\nafter\n"
