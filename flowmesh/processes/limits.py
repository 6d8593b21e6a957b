"""What bounds a child: applied by the child itself, between fork and the first line of its work."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from pathlib import Path

import msgspec

from flowmesh.processes import linux, shm
from flowmesh.processes.cgroup import Leaf


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Each as the node's settings have it; None leaves what the fork server has."""

    memory_max_bytes: int | None = None
    """Of its cgroup, as `pids_max`; the fork server sets both."""
    pids_max: int | None = None
    cpus: tuple[int, ...] | None = None
    nice: int = 0
    oom_score_adj: int | None = None
    uid: int | None = None
    gid: int | None = None
    groups: tuple[int, ...] = ()
    """The user's other groups; only with `gid`."""
    private_shm: bool = False
    """A /dev/shm of its own, where that is allowed."""


def enter(leaf: Leaf | None, parent: int) -> None:
    """Become a child that cannot outlive its parent, in a session and (where there is one) a cgroup of its own.

    Args:
        parent: the pid of the process that forked us; if it has died meanwhile, so do we.

    Raises:
        OSError: the cgroup cannot be joined.
    """
    die_with(parent)
    os.setsid()
    if leaf is not None:
        leaf.join()


def die_with(parent: int) -> None:
    linux.die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def apply(limits: Limits, parent: int) -> None:
    """Take on what bounds the task, and its user.

    Raises:
        OSError: a limit was refused; nothing of the task has run.
    """
    if limits.oom_score_adj is not None:
        _raise_oom_score_adj(limits.oom_score_adj)
    if limits.cpus is not None:
        with contextlib.suppress(OSError):  # a CPU that went offline: better slower than not at all
            os.sched_setaffinity(0, limits.cpus)
    if limits.nice:
        os.nice(limits.nice)
    if limits.private_shm:
        shm.make_private()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limits.gid is not None:
        os.setgroups(limits.groups)
        os.setgid(limits.gid)
    if limits.uid is not None:
        os.setuid(limits.uid)
    linux.forbid_new_privileges()
    linux.become_subreaper()
    die_with(parent)  # anew: a change of user clears it


def _raise_oom_score_adj(wanted: int) -> None:
    """Lowering it needs a privilege, so where the node's own is higher already, as in many a container, it stays."""
    path = Path("/proc/self/oom_score_adj")
    if wanted > int(path.read_text()):
        path.write_text(str(wanted))
