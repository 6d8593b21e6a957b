"""A cgroup for each command, below the task's own: the kernel counts its memory and processes exactly.

With cgroup v2 the task's leaf is split: the task moves into a group `task` beside the groups of its commands, since a
group with processes cannot have groups with controllers below it. That needs a leaf that the task's user may write to,
which the node gives it (`flowmesh/processes/cgroup.py`). With version 1, as root, the groups are made below the task's.
Where neither works, commands have none, and are bound by what is measured (docs/jail.md).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from pathlib import Path

TASK = "task"
"""The task's own group in its leaf."""
OF_NODE = "flowmesh-"
"""How the folder begins in which a node makes its tasks' leaves. Other groups belong to somebody else."""
JAIL = "flowmesh-jail"
CONTROLLERS = ("memory", "pids")
REMOVE_S = 1.0
_LIMITS = {
    "memory.max": "memory", "memory.swap.max": "no swap", "pids.max": "tasks",
    "memory.limit_in_bytes": "memory", "memory.memsw.limit_in_bytes": "memory",
    "memory.kmem.tcp.limit_in_bytes": "memory",
}  # fmt: skip
"""Files with a limit, of both versions, in the order in which they are written, where they exist."""
_KILLS = ("memory.events", "memory.oom_control")
_numbers = itertools.count(1)


class Group:
    """The groups of one command, one for each hierarchy; none where this system or user has none."""

    def __init__(self, memory_bytes: int, tasks: int) -> None:
        """
        Args:
            memory_bytes: of its processes, of what the kernel holds for them, and of its files in memory.
            tasks: processes and threads.
        """
        self.folders: list[Path] = []
        values = {"memory": str(memory_bytes), "tasks": str(tasks), "no swap": "0"}
        name = f"{JAIL}-{os.getpid()}-{next(_numbers)}"
        for parent in _parents():
            folder = parent / name
            with contextlib.suppress(OSError):
                folder.mkdir()
                self.folders.append(folder)
                for file, value in _LIMITS.items():
                    if (folder / file).exists():
                        (folder / file).write_text(values[value])

    def oom_kills(self) -> int:
        """How many of its processes the kernel killed because it reached its memory limit."""
        for folder, file in itertools.product(self.folders, _KILLS):
            with contextlib.suppress(OSError, ValueError):
                for line in (folder / file).read_text().splitlines():
                    if line.startswith("oom_kill "):
                        return int(line.split()[1])
        return 0

    def remove(self) -> None:
        """Remove them, once their processes have ended. What a kernel does not let go of in time, stays."""
        end = time.monotonic() + REMOVE_S
        while self.folders:
            for folder in [*self.folders]:
                with contextlib.suppress(OSError):
                    folder.rmdir()
                    self.folders.remove(folder)
            if time.monotonic() > end:
                return
            time.sleep(0.005) if self.folders else None


def _parents() -> list[Path]:
    """The groups below which a command's are made."""
    found = []
    for mount, controllers, path in _memberships():
        own = mount / path.lstrip("/")
        if controllers:
            if set(controllers) & set(CONTROLLERS) and os.access(own, os.W_OK):
                _prune(own)
                found.append(own)
        elif (leaf := _split(own)) is not None:
            found.append(leaf)
    return found


def _split(own: Path) -> Path | None:
    """Make the task's leaf one that can hold groups with controllers; None if that is not possible."""
    leaf = own.parent if own.name == TASK else own
    try:
        available = set((leaf / "cgroup.controllers").read_text().split()) & set(CONTROLLERS)
        if not available or not leaf.parent.name.startswith(OF_NODE):
            return None
        (leaf / TASK).mkdir(exist_ok=True)
        while pids := (leaf / "cgroup.procs").read_text().split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    (leaf / TASK / "cgroup.procs").write_text(pid)
        (leaf / "cgroup.subtree_control").write_text(" ".join(f"+{each}" for each in sorted(available)))
    except OSError:
        return None  # not delegated to this user
    return leaf


def _prune(parent: Path) -> None:
    """Remove groups of tasks that are dead."""
    for folder in parent.glob(f"{JAIL}-*-*"):
        if not Path("/proc", folder.name.split("-")[2]).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()


def _memberships() -> list[tuple[Path, list[str], str]]:
    """Of this process, by hierarchy: where it is mounted, its controllers (version 2: none), the group's path."""
    mounts: dict[str, Path] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup2":
            mounts[""] = Path(left.split()[4])
        elif kind == "cgroup":
            mounts |= {name: Path(left.split()[4]) for name in options.split()[-1].split(",")}
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if names[0] in mounts:
            found.append((mounts[names[0]], [name for name in names if name], path))
    return found
