"""Linux system calls that the jail needs and Python lacks. Each raises OSError that names the call."""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 1 << 18
MNT_DETACH = 2

_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_SECCOMP = 1, 24, 22
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_SET_DUMPABLE = 36, 38, 4
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_SECCOMP_MODE_FILTER = 2

# The same on all architectures, as for all system calls since 2019.
_SYS_MOUNT_SETATTR, _SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 442, 444, 445, 446
_PIVOT_ROOT_AND_CAPSET = {"x86_64": (155, 126), "aarch64": (41, 91)}
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
_LAST_CAPABILITY = 63

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _checked(name: str, result: int) -> int:
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{name}: {os.strerror(errno)}")
    return result


def _syscall(name: str, number: int, *args: object) -> int:
    return _checked(name, _libc.syscall(ctypes.c_long(number), *args))


def of_this_machine(by_machine: Mapping[str, T]) -> T:
    """The entry for this machine's architecture.

    Raises:
        OSError: there is none.
    """
    found = by_machine.get(platform.machine())
    if found is None:
        raise OSError(38, f"no system call numbers for {platform.machine()}")
    return found


def _prctl(option: int, *args: int) -> None:
    padded = [ctypes.c_ulong(arg) for arg in (*args, 0, 0, 0, 0)[:4]]
    _checked(f"prctl({option})", _libc.prctl(option, *padded))


def release() -> tuple[int, int]:
    """This kernel's version."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(itertools.takewhile(str.isdigit, minor)) or 0)


def die_with_parent(signal_number: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, signal_number)


def become_subreaper() -> None:
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def forbid_new_privileges() -> None:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def filter_calls(program: bytes) -> None:
    """Install a seccomp program, as `seccomp.py` makes it, for all further system calls."""
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    holder = ctypes.create_string_buffer(header, len(header))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(holder))


def undumpable() -> None:
    """Processes of the same user cannot inspect this one by /proc or ptrace."""
    _prctl(_PR_SET_DUMPABLE, 0)


def dumpable() -> None:
    """Undo `undumpable`: the uid map of a new user namespace can only be written by a dumpable process."""
    _prctl(_PR_SET_DUMPABLE, 1)


def unshare(flags: int) -> None:
    _checked("unshare", _libc.unshare(ctypes.c_int(flags)))


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if each is None else os.fsencode(each) for each in (source, target, kind, data)]
    _checked(f"mount {target}", _libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]))


def make_read_only(target: str) -> None:
    """Make a mount and all below it read-only, without set-uid and devices. Works where a remount is refused."""
    _set_attributes(target, _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV)


def without_set_id(target: str) -> None:
    """Ignore set-uid bits and devices on a mount and all below it."""
    _set_attributes(target, _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV)


def _set_attributes(target: str, which: int) -> None:
    attributes = struct.pack("=QQQQ", which, 0, 0, 0)
    path = os.fsencode(target)
    _syscall("mount_setattr", _SYS_MOUNT_SETATTR, _AT_FDCWD, path, _AT_RECURSIVE, attributes, ctypes.c_size_t(32))


def pivot_root(new_root: str, put_old: str) -> None:
    _syscall("pivot_root", of_this_machine(_PIVOT_ROOT_AND_CAPSET)[0], os.fsencode(new_root), os.fsencode(put_old))


def unmount(target: str) -> None:
    _checked(f"umount {target}", _libc.umount2(os.fsencode(target), MNT_DETACH))


def drop_capabilities() -> None:
    """Drop all capabilities, also for programs that are executed."""
    for capability in range(_LAST_CAPABILITY + 1):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError:
            break  # past the last one that this kernel knows
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _syscall("capset", of_this_machine(_PIVOT_ROOT_AND_CAPSET)[1], header, none)


_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_FS_V1 = (1 << 13) - 1
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_NET_ALL = 3  # bind and connect of TCP
_SCOPE_ALL = 3  # abstract unix sockets, signals
_READING = _EXECUTE | _READ_FILE | _READ_DIR
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
LANDLOCK_NEEDED = 3
"""Before it, files that could not be opened could be truncated."""
LANDLOCK_OF_SIGNALS = 6
"""From it on, signals can be restricted."""


def landlock_version() -> int:
    """The version of the kernel's Landlock interface; 0 if there is none or it is disabled."""
    try:
        return _syscall("landlock", _SYS_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    except OSError:
        return 0


def landlock(readable: Iterable[str], writable: Iterable[str], *, network: bool) -> None:
    """Restrict this process: only files below `readable` can be read, only those below `writable` changed.

    Args:
        network: whether TCP stays allowed, where this kernel's Landlock supports it.

    Raises:
        OSError: the kernel has no Landlock.
    """
    version = landlock_version()
    handled = _FS_V1
    for since, right in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV)):
        handled |= right if version >= since else 0
    net = 0 if network or version < 4 else _NET_ALL
    scope = _SCOPE_ALL if version >= LANDLOCK_OF_SIGNALS else 0
    attributes = struct.pack("=QQQ", handled, net, scope)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = _syscall(
        "landlock", _SYS_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0)
    )
    for paths, rights in ((readable, _READING), (writable, handled)):
        for path in paths:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue  # a missing path needs no rule
            allowed = rights & handled if Path(path).is_dir() else rights & handled & _OF_FILES
            rule = struct.pack("=Qi", allowed, fd)
            _syscall("landlock", _SYS_LANDLOCK_ADD, ruleset, ctypes.c_int(1), rule, ctypes.c_uint32(0))
            os.close(fd)
    _syscall("landlock", _SYS_LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0))
    os.close(ruleset)
