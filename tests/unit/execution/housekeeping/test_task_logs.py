"""The node reads, cuts and removes a task's logs: never what the task made a link to."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flowmesh.execution.housekeeping.task_logs import bound_logs, finish_logs, log_tail
from tests.kit.support import ROOT


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    folder = tmp_path / "var-log"
    folder.mkdir()
    (folder / "stderr.log").write_text("s3cret\rof\nothers\n")
    return folder / "stderr.log"


@pytest.mark.parametrize("whole", [True, False], ids=["the folder", "the file"])
def test_links_are_left_alone(tmp_path: Path, victim: Path, whole: bool) -> None:
    out_dir = tmp_path / "t-1"
    logs = out_dir / "logs"
    if whole:
        out_dir.mkdir()
        logs.symlink_to(victim.parent)
    else:
        logs.mkdir(parents=True)
        (logs / "stderr.log").symlink_to(victim)
    before = victim.read_bytes()
    assert log_tail(out_dir) == ""
    bound_logs([logs], 4)
    finish_logs(out_dir, keep=True)
    finish_logs(out_dir, keep=False)
    assert victim.read_bytes() == before


def test_a_tasks_own_logs_are_folded_and_read(tmp_path: Path) -> None:
    (tmp_path / "logs" / "0").mkdir(parents=True)
    (tmp_path / "logs" / "stderr.log").write_bytes(b"1 %\r2 %\ndone\n")
    (tmp_path / "logs" / "0" / "stderr.log").write_bytes(b"x" * 100_000)
    assert log_tail(tmp_path) == "2 %\ndone"
    bound_logs([tmp_path / "logs"], 65_536)
    assert (tmp_path / "logs" / "0" / "stderr.log").stat().st_size < 20_000
    finish_logs(tmp_path, keep=True)
    assert (tmp_path / "logs" / "stderr.log").read_bytes() == b"2 %\ndone\n"
    finish_logs(tmp_path, keep=False)
    assert [path for path in (tmp_path / "logs").rglob("*") if path.is_file()] == []


def test_a_task_writes_on_behind_what_was_kept(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "stderr.log"
    log.parent.mkdir()
    with log.open("ab", buffering=0) as task:
        task.write(b"x" * 100_000)
        assert bound_logs([log.parent], 65_536) == {}
        task.write(b"next\n")
    head, _, tail = log.read_bytes().partition(b"\n")
    assert head == b"[flowmesh: 83616 bytes of this log were dropped here]"
    assert tail == b"x" * 16_384 + b"next\n"


UNREADABLE = """
import os, sys
from pathlib import Path
from flowmesh.execution.housekeeping.task_logs import bound_logs, finish_logs
home = Path(sys.argv[1]).resolve()
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for name in ("closed", "open"):
    (home / name / "logs").mkdir(parents=True)
    (home / name / "logs" / "stderr.log").write_bytes(b"x" * 1000)
(home / "closed").chmod(0)
try:
    print(*bound_logs([home / "closed" / "logs", home / "open" / "logs"], 400))
    print((home / "open" / "logs" / "stderr.log").stat().st_size < 400)
    finish_logs(home / "closed", keep=False)
finally:
    (home / "closed").chmod(0o700)
"""


def test_a_folder_that_cannot_be_read_keeps_nobody_from_the_others() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own let no other user through
        home = Path(folder).resolve()
        home.chmod(0o777)
        program = [sys.executable, "-c", UNREADABLE, folder]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(program, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(home / "closed" / "logs"), "True"]
    assert "Permission denied" in done.stderr
