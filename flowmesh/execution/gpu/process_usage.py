"""What a running task's process tree has used so far, read from its cgroup or from /proc. Called in a thread.

At the end the kernel reports the usage of the first process and of the children that it waited for. What other
processes of the task used can only be read while they live.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from flowmesh.processes import tree

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class TreeUse(msgspec.Struct, frozen=True, kw_only=True):
    """None: this system does not report it."""

    cpu_s: float | None = None
    peak_rss_bytes: int | None = None
    """Of the largest process."""
    read_bytes: int | None = None
    written_bytes: int | None = None

    def most(self, other: TreeUse) -> TreeUse:
        """The larger of each number: what was counted once never becomes less."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in self.__struct_fields__}
        known = {name: [each for each in pair if each is not None] for name, pair in pairs.items()}
        return TreeUse(**{name: max(each) for name, each in known.items() if each})


def look(pid: int, cgroup: str | None) -> TreeUse:
    """What the tree below `pid` has used. A process that is gone, or not ours to read, counts as nothing."""
    found = [use for each in (pid, *tree.descendants(pid)) if (use := _process(each)) is not None]
    read, written = [use[2] for use in found if use[2] is not None], [use[3] for use in found if use[3] is not None]
    from_proc = TreeUse(
        cpu_s=sum(use[0] for use in found) if found else None,
        peak_rss_bytes=max((use[1] for use in found), default=None),
        read_bytes=sum(read) if read else None,
        written_bytes=sum(written) if written else None,
    )
    return from_proc if cgroup is None else from_proc.most(_leaf(Path(cgroup)))


def _process(pid: int) -> tuple[float, int, int | None, int | None] | None:
    """CPU seconds and I/O (those of children that it waited for included), and resident bytes."""
    try:
        data = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = data[data.rindex(b")") + 2 :].split()
    cpu_s = sum(map(int, fields[11:15])) / _TICKS
    read = written = None
    try:
        for line in Path(f"/proc/{pid}/io").read_text().splitlines():
            name, _, value = line.partition(": ")
            if name == "read_bytes":
                read = int(value)
            elif name == "write_bytes":
                written = int(value)
    except OSError:  # another user's, or gone
        read = written = None
    return cpu_s, int(fields[21]) * _PAGE, read, written


def _leaf(folder: Path) -> TreeUse:
    try:
        lines = (folder / "cpu.stat").read_text().splitlines()
    except OSError:
        return TreeUse()
    usage = next((int(line.split()[1]) for line in lines if line.startswith("usage_usec ")), None)
    return TreeUse(cpu_s=None if usage is None else usage / 1e6)
