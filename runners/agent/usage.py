"""What the processes of a command use: memory with what the kernel holds for them, and space on disk.

Sampled from outside, for bounds that no kernel mechanism enforces here. What cannot be measured exactly counts as the
most that it can be.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from flowmesh.files.beneath import FOLDER, open_beneath
from flowmesh.files.descent import give_rights
from flowmesh.files.walk import Troubles, walk

DEEPEST = 100
"""Nesting of folders that a command may create. Deeper ones could not be measured and packed."""
ENTRY_BYTES = 4096
"""Minimum size that a file or folder counts for: empty ones use disk space, too."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
PIPE_BYTES = 64 * 1024
"""Of one pipe: its size cannot be changed in a jail."""
SOCKET_BYTES = 2 * 208 * 1024
"""Of one socket: the kernel's defaults of both directions, which cannot be changed in a jail."""
GROWN_SOCKET_BYTES = 10 * 2**20
"""The same on the machine's network, where TCP's buffers grow to about this size with what is in them."""
SET_ID = stat.S_ISUID | stat.S_ISGID
_LOOKS = 5
"""From the start again, where folders are moved while they are counted."""


def descendants(pid: int) -> Iterator[int]:
    """The descendants of a process, lazily: scanning all of a fork bomb takes seconds."""
    todo = [pid]
    while todo:
        for child in children(todo.pop()):
            yield child
            todo.append(child)


def children(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            yield from map(int, Path(f"/proc/{pid}/task/{task}/children").read_bytes().split())


def resident_bytes(pid: int) -> int:
    """A process's resident memory; 0 if it is gone."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * PAGE_BYTES
    return 0


def buffer_bytes(pids: Sequence[int], limit: int, *, own_network: bool) -> int:
    """The most that the kernel may hold in pipes and sockets for these processes.

    Args:
        limit: below it the number of descriptors decides alone; above it they are counted one by one.
        own_network: they share a network of their own: its sockets are counted, also those that no process has open,
            such as connections that nobody accepted.
    """
    sockets = _sockets_of_network(pids) if own_network else 0
    each = SOCKET_BYTES if own_network else GROWN_SOCKET_BYTES
    if (sum(map(_descriptors, pids)) + sockets) * each <= limit:
        return 0
    queued = {} if own_network else _queued_bytes()
    found: dict[str, int] = {}
    for path, link in _links(pids):
        if link.startswith("socket:"):
            found[link] = 0 if own_network else max(SOCKET_BYTES, 2 * queued.get(link[8:-1], 0))
        elif link.startswith(("pipe:", "/")):
            with contextlib.suppress(OSError):
                about = os.stat(path)  # noqa: PTH116 - called for each descriptor
                if stat.S_ISFIFO(about.st_mode):
                    found[f"pipe {about.st_dev} {about.st_ino}"] = PIPE_BYTES
    return sockets * SOCKET_BYTES + sum(found.values())


def deleted_bytes(pids: Sequence[int], folder: Path) -> int:
    """Size of deleted files on the folder's file system that these processes have open."""
    device, found = folder.stat().st_dev, {}
    for path, link in _links(pids):
        if link.endswith(" (deleted)"):
            with contextlib.suppress(OSError):
                about = os.stat(path)  # noqa: PTH116 - called for each descriptor
                if stat.S_ISREG(about.st_mode) and about.st_nlink == 0 and about.st_dev == device:
                    found[about.st_ino] = about.st_blocks * 512
    return sum(found.values())


def over_disk(folder: Path, limit_bytes: int, held: int = 0) -> str:
    """Which bound a folder exceeds; empty if none. Opens folders that cannot be read, and removes set-id bits.

    Args:
        held: bytes that count, too.
    """
    for _ in range(_LOOKS):
        troubles = _Uncounted()
        try:
            top = open_own(folder)
        except FileNotFoundError:
            return ""
        except OSError:
            return "it made a folder that cannot be read"
        try:
            if over := _over(top, limit_bytes, held, troubles):
                return over
        finally:
            os.close(top)
        if troubles.first is None:
            return ""
        if troubles.first.errno != errno.ESTALE:
            return f"it made a folder that cannot be read: {troubles}"
    return "it moved its folders all the time, so they could not be counted"


class _Uncounted(Troubles):
    """What is mounted there is not the command's: it can mount nothing that others see."""

    def add(self, error: OSError, names: list[str]) -> None:
        if error.errno != errno.EXDEV:
            super().add(error, names)


def _over(top: int, limit_bytes: int, held: int, troubles: Troubles) -> str:
    total = held
    for entry in walk(top, troubles):
        total += max(entry.status.st_blocks * 512, ENTRY_BYTES)
        if total > limit_bytes:
            return f"it filled its folder with more than {limit_bytes} bytes"
        if entry.is_folder and entry.depth >= DEEPEST:
            return f"it nested more than {DEEPEST} folders"
        if entry.status.st_mode & SET_ID:
            with contextlib.suppress(OSError):
                change_mode(entry.folder, entry.name, entry.status.st_mode & 0o1777)
    return ""


def open_own(folder: Path) -> int:
    """A descriptor of a folder of ours, from which a command may have taken our rights: it gets them back.

    Raises:
        OSError: it is gone, or a link, or another user's.
    """
    try:
        fd = os.open(folder, FOLDER)
    except PermissionError:
        handle = os.open(folder, FOLDER | os.O_PATH)
        try:
            os.chmod(f"/proc/self/fd/{handle}", 0o755)  # noqa: PTH101 - a descriptor of O_PATH has no fchmod
        finally:
            os.close(handle)
        fd = os.open(folder, FOLDER)
    give_rights(fd, 0o755)
    return fd


def change_mode(folder: int, name: str, mode: int) -> None:
    """chmod of an entry of an open folder, which follows no link.

    Raises:
        OSError: it is gone, or a link, or another user's.
    """
    fd = open_beneath(folder, name, os.O_PATH)
    try:
        if not stat.S_ISLNK(os.fstat(fd).st_mode):
            os.chmod(f"/proc/self/fd/{fd}", mode)  # noqa: PTH101 - a descriptor of O_PATH has no fchmod
    finally:
        os.close(fd)


def _descriptors(pid: int) -> int:
    """How many descriptors a process has open."""
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        return os.stat(folder).st_size or len(os.listdir(folder))  # noqa: PTH116 - the size is 0 before Linux 6.2
    return 0


def _sockets_of_network(pids: Sequence[int]) -> int:
    for pid in pids:
        with contextlib.suppress(OSError, IndexError, ValueError):
            return int(Path(f"/proc/{pid}/net/sockstat").read_text().split()[2])
    return 0


def _queued_bytes() -> dict[str, int]:
    """What waits in TCP sockets of this process's network, by inode. The kernel needs up to twice as much."""
    found = {}
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                found[fields[9]] = sum(int(size, 16) for size in fields[4].split(":"))
    return found


def _links(pids: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Each open descriptor: its path in /proc, and what it is."""
    for pid in pids:
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                path = f"/proc/{pid}/fd/{name}"
                with contextlib.suppress(OSError):
                    yield path, os.readlink(path)  # noqa: PTH115 - called for each descriptor
