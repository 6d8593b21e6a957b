"""What Python's standard library lacks of Linux: prctl, mounts, capabilities, and a wait for any process's end."""

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
