"""Where the node may do more than its tasks, none of them leads it elsewhere by a link in a place that it writes to."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flowmesh.execution.logs import bound_logs, finish_logs, log_tail
from tests.support import short_dir

pytestmark = [
    pytest.mark.redis,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user"),
]
AT_FDCWD, RENAME_EXCHANGE = -100, 2
SECRET = b"root's own\rline\n" * 10_000


@pytest.fixture
def home() -> Iterator[Path]:
    folder = short_dir().resolve()  # pytest's own let no other user through
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def secret(home: Path) -> Path:
    path = home / "secret"
    path.write_bytes(SECRET)
    path.chmod(0o600)
    return path


@contextlib.contextmanager
def as_nobody(work: Callable[[], object]) -> Iterator[None]:
    """Another user does this beside us, again and again."""
    nobody = pwd.getpwnam("nobody")
    if (pid := os.fork()) == 0:
        os.setgroups([])
        os.setgid(nobody.pw_gid)
        os.setuid(nobody.pw_uid)
        signal.alarm(60)
        while True:
            with contextlib.suppress(OSError):
                work()
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def folder_of_nobody(path: Path) -> Path:
    path.mkdir(parents=True)
    os.chown(path, pwd.getpwnam("nobody").pw_uid, -1)
    return path


def test_a_log_that_is_swapped_for_a_link_leads_nowhere(home: Path, secret: Path) -> None:
    logs = folder_of_nobody(home / "task" / "logs")
    log, link = logs / "stderr.log", logs / "link"
    log.touch()
    log.chmod(0o666)
    link.symlink_to(secret)
    libc = ctypes.CDLL(None)

    def swap() -> None:
        """A log that is too large to stay, one that is to be folded, and root's file in turn."""
        for text in (b"x" * 200_000, b"y\ry\n"):
            with contextlib.suppress(OSError):
                log.write_bytes(text)
            for _ in range(20):
                libc.renameat2(AT_FDCWD, bytes(log), AT_FDCWD, bytes(link), RENAME_EXCHANGE)

    seen = set()
    with as_nobody(swap):
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            bound_logs([logs], 120_000)
            finish_logs(logs.parent, keep=True)
            seen.add("root" in log_tail(logs.parent))
    assert secret.read_bytes() == SECRET
    assert seen == {False}


def test_anothers_file_is_not_looked_after_under_a_second_name(home: Path, secret: Path) -> None:
    """As a task can give it one where fs.protected_hardlinks is off."""
    logs = folder_of_nobody(home / "task" / "logs")
    (logs / "stderr.log").hardlink_to(secret)
    (told,) = bound_logs([logs], 120_000).values()
    assert "another user's file" in str(told)
    finish_logs(logs.parent, keep=True)
    assert log_tail(logs.parent) == ""
    assert secret.read_bytes() == SECRET


def test_a_log_that_is_swapped_with_its_folder_leads_nowhere(home: Path) -> None:
    logs, others = folder_of_nobody(home / "task" / "logs"), home / "others"
    os.chown(logs.parent, logs.stat().st_uid, -1)
    others.mkdir()
    (others / "stderr.log").write_bytes(SECRET)
    (home / "task" / "link").symlink_to(others)
    names = bytes(logs), bytes(home / "task" / "link")
    libc = ctypes.CDLL(None)
    with as_nobody(lambda: libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE)):
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            bound_logs([logs], 120_000)
            finish_logs(logs.parent, keep=True)
            finish_logs(logs.parent, keep=False)
            assert log_tail(logs.parent) == ""
    assert (others / "stderr.log").read_bytes() == SECRET
