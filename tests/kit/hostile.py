"""What a task can leave in a folder, and children that may mount, become nobody, or lack a system call."""

from __future__ import annotations

import ctypes
import os
import pwd
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

from flowmesh.processes import linux

_MS_BIND = 4096
_OPENAT2 = 437
_libc = ctypes.CDLL(None, use_errno=True)


def bind(source: Path, target: Path) -> None:
    """Mount `source` at `target`; for a process with mounts of its own."""
    if _libc.mount(bytes(source), bytes(target), None, ctypes.c_ulong(_MS_BIND), None) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


def cannot_mount() -> str:
    """Why this machine allows no mounts to a test; empty if it does."""
    if os.geteuid() != 0:
        return "only root can mount"
    try:
        in_child(lambda: None, mounts=True)
    except AssertionError:
        return "this system does not allow mounts in a namespace of one's own"
    return ""


class _Filter(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("count", ctypes.c_ushort), ("filters", ctypes.POINTER(_Filter)))


def without_openat2() -> None:
    """As under a kernel before 5.6: the call is answered with ENOSYS from here on."""
    filters = (_Filter * 4)(
        _Filter(0x20, 0, 0, 0),  # load the number of the call
        _Filter(0x15, 0, 1, _OPENAT2),
        _Filter(0x06, 0, 0, 0x00050000 | 38),  # ENOSYS
        _Filter(0x06, 0, 0, 0x7FFF0000),  # allow
    )
    linux.forbid_new_privileges()
    if _libc.prctl(22, 2, ctypes.byref(_Program(4, filters)), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "seccomp")


def in_child(work: Callable[[], object], *, mounts: bool = False, user: str = "", openat2: bool = True) -> None:
    """Do the work in a child process, which may mount, or is another user, or has no `openat2`.

    Raises:
        AssertionError: the work failed; with its traceback.
    """
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        failure = b""
        writer = os.dup2(writer, 3)
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))  # the test's process may have many open: few must do here
        try:
            if mounts:
                linux.unshare_mounts()
            if user:
                found = pwd.getpwnam(user)
                os.setgroups([])
                os.setgid(found.pw_gid)
                os.setuid(found.pw_uid)
            if not openat2:
                without_openat2()
            work()
        except BaseException:  # noqa: BLE001 - reported to the parent
            failure = traceback.format_exc().encode()[-60_000:]
        os.write(writer, failure)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        failure = file.read()
    _, status = os.waitpid(pid, 0)
    assert not failure, failure.decode()
    assert status == 0, f"the child ended with status {status}"


def make_deep(folder: Path, depth: int, name: str = "d") -> None:
    """A chain of folders in `folder`, with a file at its end. Its path may be longer than the kernel takes."""
    at = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=at)
        below = os.open(name, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(os.open("end", os.O_CREAT | os.O_WRONLY, dir_fd=at))
    os.close(at)


def make_socket(folder: Path, name: str) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = os.open(".", os.O_RDONLY)
        os.chdir(folder)  # a socket's path is short
        one.bind(".s")
        Path(".s").rename(name)
        os.fchdir(here)
        os.close(here)
