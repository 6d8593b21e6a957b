"""Ends process trees. A task's first process is a subreaper, so whatever it forked is below it while it lives, and
below its fork server, as a child that nobody named, from the moment it is gone."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection

from flowmesh.processes import linux

_STOP_FIRST_OVER = 16
"""A crowd is stopped before it is killed, or it forks faster than it dies."""


def descendants(pid: int, *, besides: Collection[int] = ()) -> list[int]:
    """Every process below `pid`, parents before children, leaving out those in `besides` and all below them."""
    found: list[int] = []
    open_ = [pid]
    while open_:
        for child in linux.children(open_.pop()):
            if child not in besides:
                found.append(child)
                open_.append(child)
    return found


def kill_all(pids: Collection[int]) -> None:
    """SIGKILL to each; those already gone are no error."""
    if len(pids) > _STOP_FIRST_OVER:
        for pid in pids:
            send(pid, signal.SIGSTOP)
    for pid in pids:
        send(pid, signal.SIGKILL)


def send(pid: int, signal_number: int) -> bool:
    """One signal to one process; False where it is gone, or is not ours to signal."""
    try:
        os.kill(pid, signal_number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def send_group(pid: int, signal_number: int) -> bool:
    """One signal to the process group that `pid` leads; False where there is none."""
    try:
        os.killpg(pid, signal_number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def in_session(leader: int) -> list[int]:
    """Processes of the session that `leader` began, itself included."""
    return [pid for pid in linux.all_pids() if linux.session_of(pid) == leader]


def marked(name: str, value: str) -> list[int]:
    """Processes whose environment, as they were executed, has `name=value`.

    The last resort after a fork server and its supervisor were killed together: what their tasks had executed by then
    belongs to nobody, but still carries its mark.
    """
    needle = f"{name}={value}".encode()
    found = []
    for pid in linux.all_pids():
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if needle in file.read().split(b"\0"):
                    found.append(pid)
        except OSError:  # gone, or somebody else's
            continue
    return [pid for pid in found if pid != os.getpid()]


def forked_from(server_id: str) -> list[int]:
    """Processes that still have the arguments of this fork server: itself, and its forks that executed nothing.

    For a server that is dead; what a task has forked and not executed carries no other mark.
    """
    needle = f'/{server_id}.sock"'.encode()
    found = []
    for pid in linux.all_pids():
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if needle in file.read():
                    found.append(pid)
        except OSError:
            continue
    return found


def is_same_or_below(pid: int, ancestor: int) -> bool:
    """Whether a process is `ancestor` or descends from it; `pid` may also be that of a thread."""
    seen = 0
    at: int | None = linux.process_of(pid)
    while at is not None and at > 1 and seen < 256:
        if at == ancestor:
            return True
        at, seen = linux.parent_of(at), seen + 1
    return False
