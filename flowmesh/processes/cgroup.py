"""cgroup v2 leaves, one a task, where the node may make them: `cgroup.kill` ends a tree that no fork can outrun.

Only a hierarchy that is ours is used: below our own cgroup when it was delegated to us, or anywhere as root.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import time
from collections.abc import Collection
from pathlib import Path

from flowmesh.processes.linux import read_small

CONTROLLERS = ("memory", "pids", "cpu")
SUBGROUP = "supervisor"
"""The node's own leaf below a cgroup that is delegated to it (systemd: DelegateSubgroup=supervisor). A cgroup with
processes in it can hand no controller on, so only with this leaf can a task's memory be counted and limited."""

_REMOVE_AGAIN_S = 0.005


def own_cgroup() -> Path | None:
    """The folder of the v2 cgroup that we are in, or None where no v2 hierarchy is mounted."""
    mounts = _mounts("cgroup2")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if mounts and line.startswith("0::"):
            return mounts[-1] / line[3:].lstrip("/")
    return None


def prepare(name: str, wanted: Collection[str] = CONTROLLERS) -> Path | None:
    """A folder in which we may make leaves, or None where the system does not let us.

    Args:
        name: tells nodes on one machine apart where they share a cgroup.
        wanted: controllers that leaves should have, as far as the system hands them on.
    """
    own = own_cgroup()
    if own is None:
        return None
    ours = own.parent if own.name == SUBGROUP else own
    base = ours / f"flowmesh-{name}"
    probe = base / "probe"
    try:
        base.mkdir(exist_ok=True)
        probe.mkdir(exist_ok=True)
        usable = os.access(probe / "cgroup.kill", os.W_OK) and os.access(probe / "cgroup.procs", os.W_OK)
        # Moving a process needs the right to write to what it does not leave as well.
        usable = usable and os.access(ours / "cgroup.procs", os.W_OK)
        probe.rmdir()
        if not usable:
            base.rmdir()
    except OSError:
        return None
    if not usable:
        return None
    for folder in (ours, base) if ours != own else (base,):
        for controller in wanted:
            with contextlib.suppress(OSError):  # not handed on to us, or processes live beside us: leaves then lack it
                (folder / "cgroup.subtree_control").write_text(f"+{controller}")
    return base


def controllers(base: Path) -> set[str]:
    """What can be limited in leaves below `base`."""
    try:
        return set((base / "cgroup.subtree_control").read_text().split())
    except OSError:
        return set()


def oom_kills_near() -> int:
    """Processes that the kernel has killed for memory in our own cgroup, or where it does not count them, anywhere.

    In a container, whose cgroups are its host's, this leaves out what happened to its neighbours.
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
    """One task's cgroup."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def make(cls, base: Path, name: str) -> Leaf:
        """Make the leaf.

        Raises:
            OSError: it cannot be made.
        """
        leaf = cls(base / name)
        leaf.path.mkdir(exist_ok=True)
        return leaf

    @classmethod
    def of_server(cls, base: Path, server_id: str) -> list[Leaf]:
        """Those of a fork server's children, whether it lives or not."""
        return [cls(path) for path in base.glob(f"{server_id}.*")]

    @property
    def server_id(self) -> str:
        return self.path.name.partition(".")[0]

    def limit(self, *, memory_max_bytes: int | None, pids_max: int | None) -> None:
        """Set its limits; None leaves one open.

        Raises:
            OSError: it has no controller for one that is asked for.
        """
        if memory_max_bytes is not None:
            (self.path / "memory.max").write_text(str(memory_max_bytes))
            with contextlib.suppress(OSError):
                (self.path / "memory.swap.max").write_text("0")
        if pids_max is not None:
            (self.path / "pids.max").write_text(str(pids_max))

    def join(self) -> None:
        """Move the calling process in. Its later children are born inside."""
        (self.path / "cgroup.procs").write_text("0")

    def kill(self) -> None:
        """SIGKILL to every process inside, those included that are being forked."""
        with contextlib.suppress(FileNotFoundError):
            (self.path / "cgroup.kill").write_text("1")

    def populated(self) -> bool:
        try:
            return b"populated 1" in read_small(f"{self.path}/cgroup.events")
        except OSError:
            return False

    def pids(self) -> list[int]:
        try:
            return [int(word) for word in (self.path / "cgroup.procs").read_text().split()]
        except OSError:
            return []

    def oom_kills(self) -> int | None:
        """Processes of this leaf that the kernel killed for memory; None where it does not count them."""
        try:
            lines = read_small(f"{self.path}/memory.events").splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) for line in lines if line.startswith(b"oom_kill ")), None)

    def remove_within(self, limit_s: float) -> bool:
        """Remove the leaf, as soon as the kernel lets it go; False where that takes longer."""
        end = time.monotonic() + limit_s
        while not self.remove():
            if time.monotonic() >= end:
                return False
            time.sleep(_REMOVE_AGAIN_S)
        return True

    def remove(self) -> bool:
        """Remove the empty leaf; False where the kernel still holds it for a moment."""
        try:
            self.path.rmdir()
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            raise
        return True
