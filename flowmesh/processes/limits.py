"""A child's limits and privileges. The child applies them to itself, between the fork and the start of its work."""

from __future__ import annotations

import contextlib
import os
import resource
import signal

import msgspec

from flowmesh.processes import linux, shm
from flowmesh.processes.cgroup import Leaf
from flowmesh.processes.proc_files import read_small, write_small

_OOM_SCORE_ADJ = "/proc/self/oom_score_adj"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits that the node's settings give a child; None leaves the fork server's value."""

    memory_max_bytes: int | None = None
    """Limit of its cgroup, like `pids_max`; the fork server sets both."""
    pids_max: int | None = None
    cpus: tuple[int, ...] | None = None
    nice: int = 0
    umask: int | None = None
    oom_score_adj: int | None = None
    uid: int | None = None
    gid: int | None = None
    groups: tuple[int, ...] = ()
    """The user's supplementary groups; used with `gid` only."""
    private_shm: bool = False
    """Mount an empty /dev/shm for it, if the system allows that."""


def enter(leaf: Leaf | None, parent: int) -> None:
    """Start a new session, join the cgroup, and die with the parent from now on.

    Args:
        leaf: the cgroup to join; None: none.
        parent: the pid of the process that forked this one. If it is dead already, this one is killed now.

    Raises:
        OSError: the cgroup cannot be joined.
    """
    die_with(parent)
    os.setsid()
    if leaf is not None:
        leaf.join()


def die_with(parent: int) -> None:
    """SIGKILL this process when its parent dies, or at once if `parent` is not its parent any more."""
    linux.die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def apply(limits: Limits, parent: int) -> None:
    """Apply the limits to this process, then become the task's user.

    Args:
        parent: the pid of the process that forked this one.

    Raises:
        OSError: a limit cannot be set; nothing of the task has run yet.
    """
    if limits.oom_score_adj is not None:
        _raise_oom_score_adj(limits.oom_score_adj)
    if limits.cpus is not None:
        with contextlib.suppress(OSError):  # a CPU went offline: run on any CPU rather than fail
            os.sched_setaffinity(0, limits.cpus)
    if limits.nice:
        os.nice(limits.nice)
    if limits.private_shm:
        shm.make_private()
    if limits.umask is not None:
        os.umask(limits.umask)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limits.gid is not None:
        os.setgroups(limits.groups)
        os.setgid(limits.gid)
    if limits.uid is not None:
        os.setuid(limits.uid)
    linux.forbid_new_privileges()
    linux.become_subreaper()
    die_with(parent)  # once more: the change of user cleared it


def _raise_oom_score_adj(minimum: int) -> None:
    """Raise it to `minimum`. Lowering needs a privilege, so a value that is higher, as in many containers, is kept."""
    if minimum > int(read_small(_OOM_SCORE_ADJ)):
        write_small(_OOM_SCORE_ADJ, str(minimum).encode())
