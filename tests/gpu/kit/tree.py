"""Ends all processes below this one. Needs only the standard library."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

KILL_S = 10.0
"""A process that hangs in the driver may survive SIGKILL for longer: it is reported then."""


def below(root: int) -> list[int]:
    """All processes below one that have not ended."""
    parents: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError):
            state, parent = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                parents.setdefault(int(parent), []).append(int(name))
            elif name not in parents:
                parents.setdefault(int(parent), [])
    found, open_ = [], [root]
    while open_:
        children = parents.get(open_.pop(), [])
        found += children
        open_ += children
    return found


def kill_below(root: int, within_s: float = KILL_S) -> list[str]:
    """SIGKILL everything below this process, which is the subreaper of its descendants, and collect the dead.

    Returns:
        what is still there after `within_s` seconds: each pid with its command.
    """
    deadline = time.monotonic() + within_s
    while left := below(root):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        collect()
        if time.monotonic() > deadline:
            return [f"{pid} {command(pid)}" for pid in left]
        time.sleep(0.01)
    collect()
    return []


def collect() -> None:
    """Reap children that have ended. Only for a process that waits for none of its own."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:200]
    return ""
