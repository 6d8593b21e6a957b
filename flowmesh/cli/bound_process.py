"""Starts processes that end with their owner: the kernel signals them when the thread that started them ends."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from flowmesh.processes import linux


def start_bound(
    arguments: Sequence[str],
    *,
    end_signal: signal.Signals,
    log: Path,
    stdin: int = subprocess.DEVNULL,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a process in a new session, so that Ctrl-C on the terminal reaches only its owner.

    Args:
        end_signal: sent by the kernel when the calling thread ends, however it ends.
        log: gets standard output and standard error; overwritten.

    Raises:
        OSError: it cannot be started.
    """
    owner = os.getpid()

    def in_child() -> None:
        linux.die_with_parent(end_signal)
        if os.getppid() != owner:  # it ended before the line above
            os._exit(1)

    with open(log, "wb") as output:
        return subprocess.Popen(
            arguments,
            stdin=stdin,
            stdout=output,
            stderr=output,
            cwd=cwd,
            env=env,
            pass_fds=pass_fds,
            start_new_session=True,
            preexec_fn=in_child,  # noqa: PLW1509 - one system call; its library was loaded before the fork
        )
