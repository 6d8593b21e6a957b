"""Ends what a test process leaves running when it is killed: a node outlives whoever started it, with all its tasks.

As a script it is the process that does it. It reads folders, one a line, until the test process is gone or sends an
empty line, and then kills what runs in those that still exist.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.kit.paths import ROOT

GIVE_UP_S = 10.0

_process: subprocess.Popen[bytes] | None = None


def watch(folder: Path) -> None:
    """Kill what runs in a folder when this process is gone."""
    global _process  # noqa: PLW0603 - one for the whole process
    if _process is None:
        command = [sys.executable, "-m", __name__]
        _process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True)
        atexit.register(_end, _process, os.getpid())
    assert _process.stdin is not None
    _process.stdin.write(f"{folder}\n".encode())
    _process.stdin.flush()


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:
        process.communicate(b"\n")


def main() -> None:
    lines = itertools.takewhile(lambda line: line != "\n", sys.stdin)
    folders = [line.rstrip("\n") for line in lines]
    left = [folder for folder in folders if Path(folder).is_dir()]
    if not left:
        return
    from tests.kit.support import with_mark  # costs half a second of CPU time

    deadline = time.monotonic() + GIVE_UP_S
    while (found := with_mark(*left)) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    main()
