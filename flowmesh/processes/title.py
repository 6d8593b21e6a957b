"""The command line that `ps`, `top` and nvitop show of a task's child: its task id, in place of its fork server's."""

from __future__ import annotations

import ctypes
import functools

from flowmesh.processes.proc_files import read_small

NAME = b"flowmesh-task"
_ARG_START, _ARG_END = 45, 46
"""Of /proc/PID/stat after the process's name: fields 48 and 49 of proc_pid_stat(5)."""
_SOCKET_END = b'.sock"'


@functools.cache
def arguments() -> tuple[int, int, bytes] | None:
    """Where this process's arguments begin and end in its memory, and the last one; None if that cannot be read.

    Called first in the fork server: its children have them at the same place.
    """
    try:
        fields = read_small("/proc/self/stat").rpartition(b")")[2].split()
        last = read_small("/proc/self/cmdline").rstrip(b"\0").rpartition(b"\0")[2]
        return int(fields[_ARG_START]), int(fields[_ARG_END]), last
    except (OSError, ValueError, IndexError):
        return None


def show_task(task_id: str) -> None:
    """Overwrite this process's arguments with its task's id and its fork server's socket.

    By the socket, `processes/tree` finds the forks of a server that has died. A task id for which there is no room is
    cut. Does nothing where the arguments cannot be read: this is a help for people.
    """
    if (found := arguments()) is None:
        return
    start, end, last = found
    # The last byte stays NUL: otherwise the kernel takes the text to go on into the environment behind it.
    room = end - start - 1
    server = last[: last.find(_SOCKET_END) + len(_SOCKET_END)] if _SOCKET_END in last else last
    left = room - len(NAME) - len(server) - 2
    if start and left > 0:
        text = b"\0".join((NAME, task_id.encode(errors="replace")[:left], server))
        ctypes.memmove(start, text.ljust(room + 1, b"\0"), room + 1)
