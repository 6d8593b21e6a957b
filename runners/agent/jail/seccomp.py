"""The seccomp program that filters the system calls of a confined command. `kernel.py` installs it.

Every jail refuses calls that bypass namespaces and file rules (other socket families, io_uring, kernel keys, new
namespaces), and those that allocate memory which no bound counts. Without its own namespaces a command shares the
machine's processes and IPC, and more calls are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import kernel  # type: ignore[import-not-found,unused-ignore]

_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000
_SINCE_2019 = {
    # The same numbers on every architecture.
    "pidfd_send_signal": 424, "io_uring_setup": 425, "clone3": 435, "memfd_secret": 447, "fchmodat2": 452,
    "setxattrat": 463, "removexattrat": 466, "file_setattr": 469,
}  # fmt: skip
_NUMBERS = {
    "x86_64": {
        "ioctl": 16, "shmget": 29, "socket": 41, "socketpair": 53, "clone": 56, "kill": 62, "semget": 64, "msgget": 68,
        "fcntl": 72, "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "syslog": 103,
        "rt_sigqueueinfo": 129, "utime": 132, "setpriority": 141, "sched_setparam": 142, "sched_setscheduler": 144,
        "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198,
        "fremovexattr": 199, "tkill": 200, "sched_setaffinity": 203, "tgkill": 234, "utimes": 235, "mq_open": 240,
        "add_key": 248, "request_key": 249, "keyctl": 250, "ioprio_set": 251, "fchownat": 260, "futimesat": 261,
        "fchmodat": 268, "unshare": 272, "utimensat": 280, "rt_tgsigqueueinfo": 297, "perf_event_open": 298,
        "prlimit64": 302, "setns": 308, "sched_setattr": 314, "memfd_create": 319, "bpf": 321, "userfaultfd": 323,
    },
    "aarch64": {
        "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16,
        "fcntl": 25, "ioctl": 29, "ioprio_set": 30, "fchmod": 52, "fchmodat": 53, "fchownat": 54, "fchown": 55,
        "utimensat": 88, "unshare": 97, "syslog": 116, "sched_setparam": 118, "sched_setscheduler": 119,
        "sched_setaffinity": 122, "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "setpriority": 140,
        "mq_open": 180, "msgget": 186, "semget": 190, "shmget": 194, "socket": 198, "socketpair": 199, "add_key": 217,
        "request_key": 218, "keyctl": 219, "clone": 220, "rt_tgsigqueueinfo": 240, "perf_event_open": 241,
        "prlimit64": 261, "setns": 268, "sched_setattr": 274, "memfd_create": 279, "bpf": 280, "userfaultfd": 282,
    },
}  # fmt: skip

_ALWAYS = ("io_uring_setup", "unshare", "setns", "keyctl", "add_key", "request_key", "bpf", "perf_event_open",
           "userfaultfd", "syslog", "shmget")  # fmt: skip
_NOT_THERE = ("clone3", "memfd_create", "memfd_secret")
"""Refused with ENOSYS, so that programs fall back. The arguments of clone3 are in memory, where a filter cannot read
them; memory of a memfd is not part of any process's RSS."""
_SHARED_IPC = ("semget", "msgget", "mq_open")
_ATTRIBUTES = (
    "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat", "setxattr", "lsetxattr",
    "fsetxattr", "setxattrat", "removexattr", "lremovexattr", "fremovexattr", "removexattrat", "file_setattr",
    "utime", "utimes", "futimesat",
)  # fmt: skip
"""Landlock does not restrict these."""
_OF_USER = ("setpriority", "ioprio_set")
_OF_A_PROCESS = ("prlimit64", "sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr")
"""The first argument is the process; 0 is the caller."""
_SIGNALS = ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal")
_SIGNALS_BY_FILES = {"fcntl": (8, 10, 15), "ioctl": (0x8901, 0x8902)}
"""Commands, the second argument: F_SETOWN, F_SETSIG, F_SETOWN_EX; FIOSETOWN, SIOCSPGRP. They make the kernel send any
signal to any process of the user when a file becomes readable."""

_NEW_NAMESPACES = 0x7E020000  # all CLONE_NEW… flags of clone
_SOCK_DGRAM = 2
_AF_UNIX = 1
_LOAD, _AND, _JEQ, _JGE, _JSET, _RET = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_ALLOW, _EPERM, _ENOSYS, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
_NUMBER, _ARCHITECTURE = 0, 4

Line = tuple[int, int, int, int]
_EPERM_ELSE_ALLOW: tuple[Line, Line] = ((_RET, 0, 0, _EPERM), (_RET, 0, 0, _ALLOW))


def program(families: Iterable[int], *, shares_machine: bool, signals_confined: bool = True) -> bytes:
    """The seccomp program of a jail.

    Args:
        families: socket families that are allowed.
        shares_machine: the command has no namespaces.
        signals_confined: Landlock restricts its signals to its own processes; else it can send none.

    Raises:
        OSError: the system call numbers of this architecture are unknown.
    """
    numbers = {**kernel.of_this_machine(_NUMBERS), **_SINCE_2019}
    allowed = tuple(families)
    refused = [*_ALWAYS]
    if shares_machine:
        refused += [*_SHARED_IPC, *_ATTRIBUTES, *_OF_USER]
    if not signals_confined:
        refused += _SIGNALS
    lines: list[Line] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JEQ, 1, 0, kernel.of_this_machine(_AUDIT)),
        (_RET, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_JGE, 0, 1, _X32),
        (_RET, 0, 0, _EPERM),
    ]
    for name in refused:
        lines += _on(numbers.get(name), [(_RET, 0, 0, _EPERM)])
    for name in _NOT_THERE:
        lines += _on(numbers[name], [(_RET, 0, 0, _ENOSYS)])
    lines += _on(numbers["clone"], [_load(0), (_JSET, 0, 1, _NEW_NAMESPACES), *_EPERM_ELSE_ALLOW])
    if shares_machine:
        for name in _OF_A_PROCESS:
            lines += _on(numbers[name], [_load(0), *_allow_only([0])])
        lines += _on(numbers["utimensat"], [_load(1), (_JEQ, 0, 2, 0), _load(1, high=True), *_allow_only([0])])
    if not signals_confined:
        for name, commands in _SIGNALS_BY_FILES.items():
            lines += _on(numbers[name], [_load(1), *_refuse_only(commands)])
    if _AF_UNIX not in allowed:  # a datagram socket of a pair could be connected to another address
        kind = [_load(1), (_AND, 0, 0, 0xF)]
        lines += _on(numbers["socketpair"], [*kind, (_JEQ, 0, 1, _SOCK_DGRAM), *_EPERM_ELSE_ALLOW])
    lines += _on(numbers["socket"], [_load(0), *_allow_only(allowed)])
    lines.append((_RET, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def _on(number: int | None, lines: list[Line]) -> list[Line]:
    """Apply `lines`, which return, to the system call of that number; None: not on this architecture."""
    return [] if number is None else [(_JEQ, 0, len(lines), number), *lines]


def _load(argument: int, *, high: bool = False) -> Line:
    """Half of a system call's argument; both architectures are little-endian."""
    return _LOAD, 0, 0, 16 + 8 * argument + (4 if high else 0)


def _allow_only(values: Iterable[int]) -> list[Line]:
    listed = tuple(values)
    tests = [(_JEQ, len(listed) - index, 0, value) for index, value in enumerate(listed)]
    return [*tests, *_EPERM_ELSE_ALLOW]


def _refuse_only(values: Iterable[int]) -> list[Line]:
    """Compares the low 32 bits only, as the kernel does for commands."""
    listed = tuple(values)
    last = len(listed) - 1
    tests = [(_JEQ, last - index, int(index == last), value) for index, value in enumerate(listed)]
    return [*tests, *_EPERM_ELSE_ALLOW]
