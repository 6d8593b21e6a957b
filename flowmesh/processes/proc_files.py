"""Reads /proc: the processes of this machine, their parents, children, sessions and start times."""

from __future__ import annotations

import os
from pathlib import Path

_CHUNK_BYTES = 64 * 1024


def read_small(path: str | Path) -> bytes:
    """Read one of the kernel's small files, with four system calls; Python's own `open` makes nine.

    Raises:
        OSError: it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, _CHUNK_BYTES):  # until the end: the kernel may return less than there is
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def write_small(path: str | Path, data: bytes) -> None:
    """Write one of the kernel's small files, with three system calls.

    Raises:
        OSError: it cannot be written.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def thread_names() -> list[str]:
    """Names of this process's native threads; the main thread is first."""
    folder = Path("/proc/self/task")
    names = []
    for tid in sorted(os.listdir(folder), key=int):
        try:
            names.append((folder / tid / "comm").read_text().strip())
        except OSError:  # the thread ended meanwhile
            continue
    return names


def children(pid: int) -> list[int]:
    """Direct children of a process: from the kernel's list if it keeps one, else by a scan of /proc."""
    found: list[int] = []
    try:
        for tid in os.listdir(f"/proc/{pid}/task"):
            found += map(int, read_small(f"/proc/{pid}/task/{tid}/children").split())
    except FileNotFoundError:
        if not Path("/proc/self/task", str(os.getpid()), "children").exists():
            return [each for each in all_pids() if parent_of(each) == pid]
    except ProcessLookupError:
        pass
    return found


def own_children() -> list[int]:
    """Direct children of the calling process, which must have one thread."""
    try:
        return [int(word) for word in read_small("/proc/thread-self/children").split()]
    except FileNotFoundError:
        return children(os.getpid())


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def parent_of(pid: int) -> int | None:
    """The parent's pid; None if there is no such process."""
    fields = _stat(pid)
    return None if fields is None else int(fields[1])


def process_of(thread: int) -> int:
    """The pid of the process that a thread belongs to; `thread` itself if there is no such thread."""
    try:
        lines = Path(f"/proc/{thread}/status").read_text().splitlines()
    except OSError:
        return thread
    return next((int(line.split()[1]) for line in lines if line.startswith("Tgid:")), thread)


def session_of(pid: int) -> int | None:
    """The process's session id; None if there is no such process, or it is a zombie."""
    fields = _stat(pid)
    return None if fields is None or fields[0] == b"Z" else int(fields[3])


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is no such process.

    Pids are reused; a pid together with its start is unique.
    """
    fields = _stat(pid)
    return None if fields is None else int(fields[19])


def _stat(pid: int) -> list[bytes] | None:
    """The fields of /proc/PID/stat from the state on: the command before it may contain spaces and parentheses."""
    try:
        data = read_small(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return data[data.rindex(b")") + 2 :].split()
