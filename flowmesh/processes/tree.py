"""Finds and kills the processes of a tree.

A task's first process is a subreaper: everything that it forked stays below it while it lives. When it has ended, the
rest is reparented to its fork server, which has not forked these children itself.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Collection

from flowmesh.processes import proc_files

_STOP_FIRST_OVER = 16
"""More processes than this are stopped before they are killed: a fork bomb forks faster than it is killed."""


def descendants(pid: int, *, besides: Collection[int] = ()) -> list[int]:
    """Every process below `pid`, parents before their children.

    Args:
        besides: left out, with all processes below them.
    """
    found: list[int] = []
    open_ = [pid]
    while open_:
        for child in proc_files.children(open_.pop()):
            if child not in besides:
                found.append(child)
                open_.append(child)
    return found


def kill_all(pids: Collection[int]) -> None:
    """SIGKILL to each; processes that have ended are ignored."""
    if len(pids) > _STOP_FIRST_OVER:
        for pid in pids:
            send(pid, signal.SIGSTOP)
    for pid in pids:
        send(pid, signal.SIGKILL)


def send(pid: int, signal_number: int) -> bool:
    """Send a signal to a process; False if it has ended, or belongs to another user."""
    try:
        os.kill(pid, signal_number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def send_group(pid: int, signal_number: int) -> bool:
    """Send a signal to the process group that `pid` leads; False if there is none, or it belongs to another user."""
    try:
        os.killpg(pid, signal_number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def in_session(leader: int) -> list[int]:
    """Processes of the session that `leader` started, including itself."""
    return [pid for pid in proc_files.all_pids() if proc_files.session_of(pid) == leader]


def marked(name: str, value: str) -> list[int]:
    """Processes other than this one that were executed with `name=value` in their environment.

    The last resort after a fork server and its supervisor were killed together. The programs that their tasks executed
    are then init's children, and only their environment shows where they belong.
    """
    needle = f"{name}={value}".encode()
    found = []
    for pid in proc_files.all_pids():
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if needle in file.read().split(b"\0"):
                    found.append(pid)
        except OSError:  # it has ended, or belongs to another user
            continue
    return [pid for pid in found if pid != os.getpid()]


def forked_from(server_id: str) -> list[int]:
    """Processes with the command line of this fork server: itself, and forks that have not executed a program.

    For a server that is dead: nothing else shows where such a fork of a task belongs.
    """
    needle = f'/{server_id}.sock"'.encode()
    found = []
    for pid in proc_files.all_pids():
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if needle in file.read():
                    found.append(pid)
        except OSError:
            continue
    return found


def is_same_or_below(pid: int, ancestor: int) -> bool:
    """Whether a process is `ancestor` or one of its descendants; `pid` may also be a thread's id."""
    seen = 0
    at: int | None = proc_files.process_of(pid)
    while at is not None and at > 1 and seen < 256:
        if at == ancestor:
            return True
        at, seen = proc_files.parent_of(at), seen + 1
    return False
