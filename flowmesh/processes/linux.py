"""The few Linux calls that Python's standard library does not have, and readings of /proc, each in one place."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
from pathlib import Path

MAX_SOCKET_PATH = 107
"""Bytes that fit `sockaddr_un.sun_path` with its closing NUL."""

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38

_CLONE_NEWNS = 0x00020000
_MS_NOSUID = 2
_MS_NODEV = 4
_MS_REC = 0x4000
_MS_SLAVE = 1 << 19
_SMALL_BYTES = 64 * 1024

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""Opens a folder, and no link to one."""

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"prctl({option}): {os.strerror(errno)}")


def die_with_parent(signal_number: int) -> None:
    """Get this signal when the thread that forked us ends. Cleared by a change of user, so set it after."""
    _prctl(_PR_SET_PDEATHSIG, signal_number)


def become_subreaper() -> None:
    """Orphans among our descendants become our children instead of init's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def forbid_new_privileges() -> None:
    """No set-uid program that we or our descendants start gains anything by it."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def hide_from_same_user() -> None:
    """Keep other processes of our user from reading our memory and environment, where the secrets are."""
    _prctl(_PR_SET_DUMPABLE, 0)


def set_name(name: str) -> None:
    """The name that `ps` and `top` show; 15 bytes of it."""
    if _libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NAME)")


def unshare_mounts() -> None:
    """A mount namespace of our own, whose changes nobody else sees."""
    if _libc.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNS)")
    if _libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None) != 0:
        raise OSError(ctypes.get_errno(), "mount --make-rslave /")


def mount_tmpfs(path: str) -> None:
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV)
    if _libc.mount(b"tmpfs", path.encode(), b"tmpfs", flags, b"mode=1777") != 0:
        raise OSError(ctypes.get_errno(), f"mount tmpfs on {path}")


def open_folder(path: Path, *, make: bool = False) -> int:
    """A descriptor of the folder that really lies at this path.

    A path was free of links when it was checked; a task may have put one into it since. What is then done by the
    descriptor is done there.

    Args:
        path: absolute.
        make: have it made, with its parents, where it is not there.

    Raises:
        OSError: it is not there, or cannot be made; or there is a link on the way, which is followed by nothing.
    """
    try:
        folder = os.open(path, FOLDER)
    except FileNotFoundError:
        if not make:
            raise
        return _make_folder(path)
    except NotADirectoryError:
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory, or a link to one; remove it", str(path)) from None
    real = os.readlink(f"/proc/self/fd/{folder}")  # noqa: PTH115 - of what is open, so nobody can change it after this look
    if real != str(path):
        os.close(folder)
        raise OSError(errno.ELOOP, f"a link leads from it to {real}; remove that link", str(path))
    return folder


def _make_folder(path: Path) -> int:
    parent = open_folder(path.parent, make=True)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path.name, dir_fd=parent)
        return os.open(path.name, FOLDER, dir_fd=parent)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(parent)


def read_small(path: str | Path) -> bytes:
    """What one of the kernel's small files says: in four calls, where Python's own open makes nine.

    Raises:
        OSError: it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, _SMALL_BYTES):  # to the end: the kernel may give less at a time than there is
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def thread_names(pid: int | None = None) -> list[str]:
    """The names of a process's native threads, the main one first; of our own where `pid` is None."""
    folder = Path(f"/proc/{'self' if pid is None else pid}/task")
    names = []
    for tid in sorted(os.listdir(folder), key=int):
        try:
            names.append((folder / tid / "comm").read_text().strip())
        except OSError:  # a thread that ended while we looked
            continue
    return names


def children(pid: int) -> list[int]:
    """The direct children of a process, by the kernel's own list where it keeps one, else by a walk of /proc."""
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
    """The direct children of the calling process, which has one thread."""
    try:
        return [int(word) for word in read_small("/proc/thread-self/children").split()]
    except FileNotFoundError:
        return children(os.getpid())


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def parent_of(pid: int) -> int | None:
    """The parent's pid, or None for a process that is not there."""
    fields = _stat(pid)
    return None if fields is None else int(fields[1])


def process_of(thread: int) -> int:
    """The pid of the process that a thread belongs to; the number itself where there is no such thread."""
    try:
        lines = Path(f"/proc/{thread}/status").read_text().splitlines()
    except OSError:
        return thread
    return next((int(line.split()[1]) for line in lines if line.startswith("Tgid:")), thread)


def session_of(pid: int) -> int | None:
    """The session's id, or None for a process that is not there (a zombie is as good as not there)."""
    fields = _stat(pid)
    return None if fields is None or fields[0] == b"Z" else int(fields[3])


def is_zombie(pid: int) -> bool:
    fields = _stat(pid)
    return fields is not None and fields[0] == b"Z"


def start_ticks(pid: int) -> int | None:
    """When a process began, in clock ticks since boot: with the pid, a name that is not used twice."""
    fields = _stat(pid)
    return None if fields is None else int(fields[19])


def _stat(pid: int) -> list[bytes] | None:
    """The fields of /proc/PID/stat from the state on (the command before it may hold anything)."""
    try:
        data = read_small(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return data[data.rindex(b")") + 2 :].split()


def wait_gone(pid: int, timeout_s: float) -> bool:
    """Wait until a process, which need not be our child, has ended. False where it has not in `timeout_s`."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))
    finally:
        os.close(handle)
