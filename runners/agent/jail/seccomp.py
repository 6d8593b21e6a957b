"""The seccomp program that filters the system calls of a confined command. `kernel.py` installs it.

Every jail refuses four kinds: calls that bypass namespaces and file rules, set-id modes and other privileges that would
stay on a file, memory that no bound counts (shared anonymous mappings, memfd, SysV and POSIX IPC, larger socket and
pipe buffers), and what this table does not know. Without its own namespaces a command shares the machine's processes,
IPC and file attributes, and more is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import kernel  # type: ignore[import-not-found,unused-ignore]
import numbers_of_calls as numbers  # type: ignore[import-not-found,unused-ignore]

_PRIVILEGED = (
    "unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "open_tree", "open_tree_attr", "move_mount",
    "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr", "statmount", "listmount", "keyctl", "add_key",
    "request_key", "bpf", "perf_event_open", "userfaultfd", "syslog", "ptrace", "process_vm_readv",
    "process_vm_writev", "process_madvise", "process_mrelease", "pidfd_getfd", "kcmp", "move_pages", "migrate_pages",
    "open_by_handle_at", "name_to_handle_at", "fanotify_init", "fanotify_mark", "kexec_load", "kexec_file_load",
    "init_module", "finit_module", "delete_module", "create_module", "reboot", "swapon", "swapoff", "acct",
    "quotactl", "quotactl_fd", "settimeofday", "clock_settime", "adjtimex", "clock_adjtime", "sethostname",
    "setdomainname", "iopl", "ioperm", "vhangup", "modify_ldt", "nfsservctl", "lookup_dcookie", "uselib", "ustat",
    "sysfs", "_sysctl", "lsm_set_self_attr",
)  # fmt: skip
"""Most need a capability, which a command does not have. None is useful to it."""
_UNCOUNTED = (
    "io_uring_setup", "io_uring_enter", "io_uring_register", "shmget", "shmat", "shmctl", "shmdt", "semget", "semop",
    "semctl", "semtimedop", "msgget", "msgsnd", "msgrcv", "msgctl", "mq_open", "mq_unlink", "vmsplice",
)  # fmt: skip
"""Kernel memory that is part of no process's RSS, or would stay after the command."""
_NOT_THERE = ("clone3", "openat2", "memfd_create", "memfd_secret")
"""Refused with ENOSYS, so that programs fall back. Arguments of the first two are in memory, where a filter cannot read
them; memory of a memfd is part of no process's RSS."""
_EXTENDED = (
    "setxattr", "lsetxattr", "fsetxattr", "setxattrat", "removexattr", "lremovexattr", "fremovexattr",
    "removexattrat", "file_setattr",
)  # fmt: skip
"""Refused with EOPNOTSUPP, as by a file system without them: capabilities of files, access lists, immutable files."""
_OF_FILES_OUTSIDE = ("chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat", "utime",
                     "utimes", "futimesat")  # fmt: skip
"""Landlock does not restrict these."""
_OF_USER = ("setpriority", "ioprio_set", "inotify_init", "inotify_init1", "inotify_add_watch")
_OF_A_PROCESS = ("prlimit64", "sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr")
"""The first argument is the process; 0 is the caller."""
_SIGNALS = ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal")
_SIGNALS_BY_FILES = (8, 10, 15)
"""Commands of fcntl: F_SETOWN, F_SETSIG, F_SETOWN_EX. They make the kernel send any signal to any process of the user
when a file becomes readable. The same of ioctl is not in _IOCTLS."""
_GROWING = (1031, 1026)
"""Commands of fcntl: F_SETPIPE_SZ, F_NOTIFY."""
_IOCTLS = (
    0x2, 0x5401, 0x802C542A, 0x540F, 0x5411, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x5452, 0x5460, 0x80045200,
    0x80086601, 0x801C581F, 0xC020660B, 0x40049409, 0x4020940D, 0x8905, 0x8910, 0x8912, 0x8913, 0x8915, 0x8917,
    0x8919, 0x891B, 0x8921, 0x8927, 0x8933, 0x8942,
)  # fmt: skip
"""All that are allowed: questions about terminals, files and interfaces, non-blocking and close-on-exec modes, FICLONE.
Others may change files outside (flags, verity, encryption), send signals, or type into a terminal."""

_MODES = {
    "chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2, "mkdir": 1, "mkdirat": 2, "mknod": 1, "mknodat": 2,
    "creat": 1,
}  # fmt: skip
"""Which argument is a file's mode."""
_OPENS = {"open": 1, "openat": 2}
"""Which argument holds the flags; the mode follows, and counts only if a file is created."""
_SET_ID = 0o6000
_CREATES = 0o100 | 0o20000000  # O_CREAT, __O_TMPFILE

_MAP_SHARED_ANONYMOUS, _MAP_HUGETLB = 0x21, 0x40000
_NEW_NAMESPACES = 0x7E020000  # all CLONE_NEW… flags of clone
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
_PROTOCOLS = (0, 1, 6, 17, 58)
"""Of internet sockets: default, ICMP, TCP, UDP, ICMPv6. Others load modules of the kernel."""
_SOCK_STREAM, _SOCK_SEQPACKET = 1, 5
_SOL_SOCKET, _SOL_TCP = 1, 6
_BUFFERS = (7, 8, 32, 33)
"""SO_SNDBUF, SO_RCVBUF and their forced forms: without effect, which the kernel's own limits may mean, too."""
_SOCKET_OPTIONS = (26, 50, 51, 52, 60)
"""Refused: filter programs, and SO_ZEROCOPY, which keeps a process's memory beyond the process."""
_TCP_ULP = 31

_LOAD, _AND, _JEQ, _JGT, _JGE, _JSET, _RET = 0x20, 0x54, 0x15, 0x25, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE = 0, 4

Line = tuple[int, int, int, int]
_ALLOW: Line = (_RET, 0, 0, 0x7FFF0000)
_EPERM: Line = (_RET, 0, 0, 0x00050001)
_ENOTTY: Line = (_RET, 0, 0, 0x00050019)
_ENOSYS: Line = (_RET, 0, 0, 0x00050026)
_EOPNOTSUPP: Line = (_RET, 0, 0, 0x0005005F)
_PRETEND: Line = (_RET, 0, 0, 0x00050000)
"""Success without any effect."""
_KILL: Line = (_RET, 0, 0, 0x80000000)


def program(families: Iterable[int], *, shares_machine: bool, signals_confined: bool = True) -> bytes:
    """The seccomp program of a jail.

    Args:
        families: socket families that are allowed.
        shares_machine: the command has no namespaces.
        signals_confined: Landlock restricts its signals to its own processes; else it can send none.

    Raises:
        OSError: the system call numbers of this architecture are unknown.
    """
    known: dict[str, int] = kernel.of_this_machine(numbers.NUMBERS)
    first, last = kernel.of_this_machine(numbers.GAP)
    lines: list[Line] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JEQ, 1, 0, kernel.of_this_machine(numbers.AUDIT)),
        _KILL,
        (_LOAD, 0, 0, _NUMBER),
        (_JGE, 0, 1, numbers.X32),
        _EPERM,
        (_JGT, 0, 1, numbers.LAST),
        _ENOSYS,
        (_JGE, 0, 2, first),
        (_JGT, 1, 0, last),
        _ENOSYS,
    ]
    for name, rule in _rules(tuple(families), shares_machine, signals_confined).items():
        if name in known:
            lines += [(_JEQ, 0, len(rule), known[name]), *rule]
    lines.append(_ALLOW)
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def _rules(families: tuple[int, ...], shares_machine: bool, signals_confined: bool) -> dict[str, list[Line]]:
    """By call, lines that end in a verdict."""
    rules: dict[str, list[Line]] = {}
    for name, argument in _MODES.items():
        rules[name] = [_load(argument), (_JSET, 0, 1, _SET_ID), _EPERM, _ALLOW]
    for name, argument in _OPENS.items():
        creating = [_load(argument + 1), (_JSET, 0, 1, _SET_ID), _EPERM, _ALLOW]
        rules[name] = [_load(argument), (_JSET, 0, 3, _CREATES), *creating]
    shared = [(_AND, 0, 0, _MAP_SHARED_ANONYMOUS), (_JEQ, 0, 1, _MAP_SHARED_ANONYMOUS), _EPERM, _ALLOW]
    rules["mmap"] = [_load(3), (_JSET, 0, 1, _MAP_HUGETLB), _EPERM, *shared]
    rules["clone"] = [_load(0), (_JSET, 0, 1, _NEW_NAMESPACES), _EPERM, _ALLOW]
    rules["ioctl"] = _allow_only(1, _IOCTLS, _ENOTTY)
    rules["fcntl"] = _refuse_only(1, (*_GROWING, *(() if signals_confined else _SIGNALS_BY_FILES)))
    rules["socket"] = _socket(families)
    rules["socketpair"] = _socketpair(datagrams=_AF_UNIX in families)
    rules["setsockopt"] = _setsockopt()
    if shares_machine:
        for name in _OF_A_PROCESS:
            rules[name] = _allow_only(0, (0,), _EPERM)
        by_descriptor = [_load(1), (_JEQ, 0, 2, 0), _load(1, high=True), (_JEQ, 1, 0, 0), _EPERM, _ALLOW]
        rules["utimensat"] = by_descriptor  # by name it could change the times of files outside
        rules |= {name: [_EPERM] for name in (*_OF_FILES_OUTSIDE, *_OF_USER)}
    if not signals_confined:
        rules |= {name: [_EPERM] for name in _SIGNALS}
    rules |= {name: [_EPERM] for name in (*_PRIVILEGED, *_UNCOUNTED)}
    rules |= {name: [_ENOSYS] for name in _NOT_THERE}
    rules |= {name: [_EOPNOTSUPP] for name in _EXTENDED}
    return rules


def _socket(families: tuple[int, ...]) -> list[Line]:
    lines: list[Line] = []
    for family in families:
        if family in (_AF_INET, _AF_INET6):
            lines += _if_equal(0, family, _allow_only(2, _PROTOCOLS, _EPERM))
        elif family == _AF_NETLINK:  # NETLINK_ROUTE, which libc's getaddrinfo uses
            lines += _if_equal(0, family, _allow_only(2, (0,), _EPERM))
        else:
            lines += _if_equal(0, family, [_ALLOW])
    return [*lines, _EPERM]


def _socketpair(*, datagrams: bool) -> list[Line]:
    """A datagram socket of a pair could be connected to another address. SOCK_RAW makes one, too."""
    kinds: list[Line] = [_ALLOW]
    if not datagrams:
        kinds = [_load(1), (_AND, 0, 0, 0xF), (_JEQ, 2, 0, _SOCK_STREAM), (_JEQ, 1, 0, _SOCK_SEQPACKET), _EPERM, _ALLOW]
    return [*_if_equal(0, _AF_UNIX, kinds), _EPERM]


def _setsockopt() -> list[Line]:
    of_socket: list[Line] = []
    for option in _BUFFERS:
        of_socket += _if_equal(2, option, [_PRETEND])
    of_socket += _refuse_only(2, _SOCKET_OPTIONS)
    of_tcp = _refuse_only(2, (_TCP_ULP,))
    return [*_if_equal(1, _SOL_SOCKET, of_socket), *_if_equal(1, _SOL_TCP, of_tcp), _ALLOW]


def _load(argument: int, *, high: bool = False) -> Line:
    """Half of a system call's argument; both architectures are little-endian."""
    return _LOAD, 0, 0, 16 + 8 * argument + (4 if high else 0)


def _if_equal(argument: int, value: int, then: list[Line]) -> list[Line]:
    """`then` ends in a verdict; what follows these lines applies otherwise."""
    return [_load(argument), (_JEQ, 0, len(then), value), *then]


def _allow_only(argument: int, values: tuple[int, ...], otherwise: Line) -> list[Line]:
    """Compares the low 32 bits only, as the kernel does for these arguments."""
    last = len(values)
    tests = [(_JEQ, last - index, 0, value) for index, value in enumerate(values)]
    return [_load(argument), *tests, otherwise, _ALLOW]


def _refuse_only(argument: int, values: tuple[int, ...]) -> list[Line]:
    last = len(values)
    tests = [(_JEQ, last - index, 0, value) for index, value in enumerate(values)]
    return [_load(argument), *tests, _ALLOW, _EPERM]
