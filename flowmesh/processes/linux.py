"""What Python's standard library lacks of Linux: prctl, mallopt, mounts, capabilities, a wait for any process's end."""

from __future__ import annotations

import ctypes
import os
import select
from pathlib import Path

MAX_SOCKET_PATH = 107
"""Bytes that fit into `sockaddr_un.sun_path` with its closing NUL."""

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38

_CAP_SYS_NICE = 23

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGE_BLOCK = 1 << 20
"""Bytes. More than asyncio allocates for each read from a socket (256 KiB): mapping it took 20 µs, and takes 3 so."""

_CLONE_NEWNS = 0x00020000
_MS_NOSUID = 2
_MS_NODEV = 4
_MS_REC = 0x4000
_MS_SLAVE = 1 << 19

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"prctl({option}): {os.strerror(errno)}")


def die_with_parent(signal_number: int) -> None:
    """Receive this signal when the thread that forked this process ends.

    A change of user clears it, so call this after such a change.
    """
    _prctl(_PR_SET_PDEATHSIG, signal_number)


def become_subreaper() -> None:
    """Reparent orphaned descendants to this process instead of init."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def forbid_new_privileges() -> None:
    """Keep set-uid programs from raising the privileges of this process and its descendants."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def hide_from_same_user() -> None:
    """Keep other processes of the same user from reading this one's memory and environment, which hold secrets."""
    _prctl(_PR_SET_DUMPABLE, 0)


def set_name(name: str) -> None:
    """Set the name that `ps` and `top` show. The kernel keeps 15 bytes of it."""
    if _libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NAME)")


def limit_malloc() -> None:
    """Have this process give memory back that it needed for a moment. Call it before threads are started.

    All threads use one arena: by default each has its own, which keeps what that thread needed at its peak. Large
    blocks are mapped, and unmapped when they are freed: by default the first one that is freed moves all later ones
    into the arenas. Does nothing where the C library is not glibc.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, _LARGE_BLOCK)


def trim_malloc() -> None:
    """Give the pages back that are free between blocks in use, if the C library is glibc. Takes some milliseconds."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def may_raise_priority() -> bool:
    """Whether this process may take a niceness back that it has given itself (CAP_SYS_NICE)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return False
    effective = next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)
    return bool(effective >> _CAP_SYS_NICE & 1)


def unshare_mounts() -> None:
    """Move this process into a new mount namespace: mounts made here are not seen outside it."""
    if _libc.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNS)")
    if _libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None) != 0:
        raise OSError(ctypes.get_errno(), "mount --make-rslave /")


def mount_tmpfs(path: str) -> None:
    """Mount an empty tmpfs, writable by everybody, at `path`."""
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV)
    if _libc.mount(b"tmpfs", path.encode(), b"tmpfs", flags, b"mode=1777") != 0:
        raise OSError(ctypes.get_errno(), f"mount tmpfs on {path}")


def wait_gone(pid: int, timeout_s: float) -> bool:
    """Wait until a process, which need not be a child of this one, has ended. False if the timeout passes first."""
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
