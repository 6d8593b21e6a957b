"""cgroup v2 leaves, one for each child, if the node may create them: `cgroup.kill` ends a whole tree, forks included.

The leaves are created below the node's cgroup, so that cgroup must be delegated to the node's user, unless the node
runs as root.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import time
from collections.abc import Collection
from pathlib import Path

from flowmesh.processes.proc_files import read_small, write_small

CONTROLLERS = ("memory", "pids", "cpu")
SUBGROUP = "supervisor"
"""The node's own leaf below a cgroup that is delegated to it (systemd: DelegateSubgroup=supervisor).

A cgroup that contains processes cannot enable controllers for its children. So only with this leaf can the memory of a
task be counted and limited.
"""

OWN_GROUP = "task"
"""Group in a leaf into which a task moves itself, to have others for its parts (runners/agent/cgroups.py)."""
MAX_SUBGROUPS = 64

GONE = (errno.ENOENT, errno.ENODEV)
"""What a file of a cgroup answers once the cgroup is removed: the second where that happens while it is opened."""

_REMOVE_INTERVAL_S = 0.005


def own_cgroup() -> Path | None:
    """The folder of this process's v2 cgroup; None if no v2 hierarchy is mounted."""
    mounts = _mounts("cgroup2")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if mounts and line.startswith("0::"):
            return mounts[-1] / line[3:].lstrip("/")
    return None


def prepare(name: str, requested: Collection[str] = CONTROLLERS) -> Path | None:
    """Create the cgroup in which tasks get their leaves.

    Args:
        name: part of its name, so that nodes in one cgroup do not share it.
        requested: controllers to enable for the leaves; those that are not delegated are left out.

    Returns:
        its folder; None if this user may not create leaves, or not move processes into them.
    """
    own = own_cgroup()
    if own is None:
        return None
    delegated = own.parent if own.name == SUBGROUP else own
    base = delegated / f"flowmesh-{name}"
    probe = base / "probe"
    try:
        base.mkdir(exist_ok=True)
        probe.mkdir(exist_ok=True)
        usable = os.access(probe / "cgroup.kill", os.W_OK) and os.access(probe / "cgroup.procs", os.W_OK)
        # To move a process, the kernel also requires write access to the common ancestor's cgroup.procs.
        usable = usable and os.access(delegated / "cgroup.procs", os.W_OK)
        probe.rmdir()
        if not usable:
            base.rmdir()
    except OSError:
        return None
    if not usable:
        return None
    for folder in (delegated, base) if delegated != own else (base,):
        enable(folder, requested)
    return base


def enable(folder: Path, requested: Collection[str] = CONTROLLERS) -> None:
    """Enable these controllers for what is below a cgroup, as far as they are delegated."""
    for controller in requested:
        with contextlib.suppress(OSError):  # not delegated, or other processes are in it: the leaves do without
            (folder / "cgroup.subtree_control").write_text(f"+{controller}")


def controllers(base: Path) -> set[str]:
    """The controllers that leaves below `base` have."""
    try:
        return set((base / "cgroup.subtree_control").read_text().split())
    except OSError:
        return set()


def oom_kills_near() -> int:
    """How many processes the kernel's OOM killer has killed in this process's cgroup; else on the machine.

    Inside a container the cgroup's own count leaves out what happened to other containers of the host.
    """
    for path in _counters_near():
        try:
            lines = read_small(path).splitlines()
        except OSError:
            continue
        if found := [int(line.split()[1]) for line in lines if line.startswith(b"oom_kill ")]:
            return found[0]
    return 0


@functools.cache
def _counters_near() -> tuple[Path, ...]:
    own = own_cgroup()
    return (*(() if own is None else (own / "memory.events",)), *_v1_counters(), Path("/proc/vmstat"))


def _v1_counters() -> list[Path]:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return [mount / path.lstrip("/") / "memory.oom_control" for mount in _mounts("cgroup", "memory")]
    return []


def _mounts(kind: str, option: str = "") -> list[Path]:
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        name, _, options = right.split(" ", 2)
        if name == kind and (not option or option in options.split()[-1].split(",")):
            found.append(Path(left.split()[4]))
    return found


class Leaf:
    """The cgroup of one child of a fork server."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def make(cls, base: Path, name: str) -> Leaf:
        """Create the leaf `name` below `base`.

        Raises:
            OSError: it cannot be created.
        """
        leaf = cls(base / name)
        try:
            leaf.path.mkdir(exist_ok=True)
        except FileNotFoundError:  # somebody has removed the node's cgroup
            base.mkdir(exist_ok=True)
            enable(base)
            leaf.path.mkdir(exist_ok=True)
        return leaf

    @classmethod
    def of_server(cls, base: Path, server_id: str) -> list[Leaf]:
        """The leaves of a fork server's children, also if the server is dead."""
        return [cls(path) for path in base.glob(f"{server_id}.*")]

    @property
    def server_id(self) -> str:
        return self.path.name.partition(".")[0]

    def limit(self, *, memory_max_bytes: int | None, pids_max: int | None) -> None:
        """Limit the leaf's memory in bytes, without swap, and its number of processes. None: no limit.

        Raises:
            OSError: the leaf lacks the controller of a limit.
        """
        if memory_max_bytes is not None:
            (self.path / "memory.max").write_text(str(memory_max_bytes))
            with contextlib.suppress(OSError):
                (self.path / "memory.swap.max").write_text("0")
        if pids_max is not None:
            (self.path / "pids.max").write_text(str(pids_max))

    def delegate(self, uid: int, gid: int) -> None:
        """Let a task's user make groups below the leaf, for parts of the task. The leaf's own limits stay the node's.

        Raises:
            OSError: this user may not give the leaf away.
        """
        for name, most in (("cgroup.max.descendants", MAX_SUBGROUPS), ("cgroup.max.depth", 1)):
            (self.path / name).write_text(str(most))
        for path in (self.path, self.path / "cgroup.procs", self.path / "cgroup.subtree_control"):
            os.chown(path, uid, gid)

    def join(self) -> None:
        """Move the calling process into the leaf. Children that it forks from now on are in it, too."""
        write_small(f"{self.path}/cgroup.procs", b"0")

    def kill(self) -> None:
        """SIGKILL to every process in the leaf, including those that are just being forked."""
        try:
            (self.path / "cgroup.kill").write_text("1")
        except OSError as error:
            if error.errno not in GONE:
                raise

    def populated(self) -> bool:
        """Whether a process is in the leaf or below it."""
        try:
            return b"populated 1" in read_small(f"{self.path}/cgroup.events")
        except OSError:
            return False

    def pids(self) -> list[int]:
        """The processes in the leaf and below it; none if it does not exist."""
        found = []
        for path in (self.path, *self._below()):
            with contextlib.suppress(OSError):
                found += [int(word) for word in (path / "cgroup.procs").read_text().split()]
        return found

    def _below(self) -> list[Path]:
        """The groups that the task made in the leaf."""
        with contextlib.suppress(OSError), os.scandir(self.path) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
        return []

    def oom_kills(self) -> int | None:
        """How many processes of this leaf the kernel's OOM killer has killed; None without the memory controller.

        Those of an agent's commands, which reached limits of their own, do not count.
        """
        for path in (f"{self.path}/{OWN_GROUP}/memory.events", f"{self.path}/memory.events"):
            with contextlib.suppress(OSError):
                lines = read_small(path).splitlines()
                return next((int(line.split()[1]) for line in lines if line.startswith(b"oom_kill ")), None)
        return None

    def remove_within(self, limit_s: float) -> bool:
        """Retry `remove` until it succeeds; False if it did not within `limit_s` seconds."""
        end = time.monotonic() + limit_s
        while not self.remove():
            if time.monotonic() >= end:
                return False
            time.sleep(_REMOVE_INTERVAL_S)
        return True

    def remove(self) -> bool:
        """Remove the leaf, in which all processes have ended. False while the kernel still reports it as busy.

        Raises:
            OSError: it cannot be removed for another reason.
        """
        try:
            for path in self._below():
                with contextlib.suppress(FileNotFoundError):
                    path.rmdir()
            self.path.rmdir()
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.ENODEV):
                return False
            raise
        return True
