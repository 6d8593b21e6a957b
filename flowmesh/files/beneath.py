"""Opens an entry of a folder: no link is followed, and no mount point is crossed.

By `openat2` where the kernel has it. Elsewhere (before Linux 5.6, or where a container forbids it) by `openat` and a
comparison of the mounts, which /proc/self/fdinfo shows.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""Flags that open a folder, but no link to one."""

_SYS_OPENAT2 = 437  # on every architecture
_RESOLVE = 0x01 | 0x02 | 0x04 | 0x08  # NO_XDEV, NO_MAGICLINKS, NO_SYMLINKS, BENEATH
_UNKNOWN = frozenset({errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.E2BIG})
"""Answers to `openat2` that may be a filter's or an old kernel's, not the entry's."""


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_syscall = ctypes.CDLL(None, use_errno=True).syscall


def open_beneath(folder: int, name: str, flags: int) -> int:
    """Open `name`, one entry of `folder`.

    Args:
        folder: a descriptor.
        name: without a slash.
        flags: as for `os.open`; nothing is created.

    Returns:
        a descriptor, which the caller closes.

    Raises:
        OSError: it cannot be opened. ELOOP, ENOTDIR: it is a link. EXDEV: something is mounted there.
    """
    if "/" in name or name in {"", ".", ".."}:
        raise OSError(errno.EINVAL, "not the name of an entry", name)
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC
    how = _OpenHow(flags, 0, _RESOLVE)
    path = ctypes.c_char_p(os.fsencode(name))
    while True:
        fd = int(_syscall(_SYS_OPENAT2, ctypes.c_int(folder), path, ctypes.byref(how), ctypes.sizeof(how)))
        if fd >= 0:
            return fd
        number = ctypes.get_errno()
        if number == errno.EINTR:
            continue
        if number in _UNKNOWN:
            return _open_and_compare(folder, name, flags)
        raise OSError(number, os.strerror(number), name)


def _open_and_compare(folder: int, name: str, flags: int) -> int:
    fd = os.open(name, flags, dir_fd=folder)
    try:
        if _mount(fd) != _mount(folder):
            raise OSError(errno.EXDEV, "something is mounted there", name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _mount(fd: int) -> tuple[int, str]:
    """The device and the mount of an open file. Two mounts of one device differ in the second."""
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    except OSError:  # no /proc: devices alone have to do
        lines = []
    return os.fstat(fd).st_dev, next((line for line in lines if line.startswith("mnt_id:")), "")
