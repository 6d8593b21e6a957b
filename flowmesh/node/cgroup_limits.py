"""CPU quota and memory limit of this process's cgroup and of those above it, for cgroup v1 and v2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")

_V1_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as the largest page-aligned 63-bit number


def cpu_quotas(proc: Path = PROC, cgroups: Path = CGROUPS) -> Iterator[float]:
    """Every quota that applies, in CPUs."""
    for folder in _folders(proc, cgroups, "cpu"):
        quota = _quota_v2(folder) or _quota_v1(folder)
        if quota is not None:
            yield quota


def memory_limits_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> Iterator[int]:
    """Every memory limit that applies."""
    for folder in _folders(proc, cgroups, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _number(folder / name)
            if limit is not None and limit < _V1_UNLIMITED:
                yield limit


def lines(path: Path) -> Iterator[str]:
    """The lines of a file, read lazily; none where it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from (line.rstrip("\n") for line in file)
    except OSError:
        return


def _folders(proc: Path, cgroups: Path, controller: str) -> Iterator[Path]:
    """The folder of this process's cgroup and those above it, in each hierarchy that may limit `controller`.

    A container sees its own cgroup as the mount's root while /proc may still give the host's path; a path that does
    not exist therefore means the root.
    """
    for line in lines(proc / "self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            roots = [cgroups, cgroups / "unified"]
        elif controller in controllers.split(","):
            roots = [cgroups / controllers, cgroups / controller]
        else:
            continue
        for root in roots:
            folder = root / path.lstrip("/")
            if not folder.is_dir():
                folder = root
            while folder != root:
                yield folder
                folder = folder.parent
            yield root


def _quota_v2(folder: Path) -> float | None:
    words = next(lines(folder / "cpu.max"), "").split()
    if len(words) != 2 or not all(word.isdigit() for word in words) or int(words[1]) == 0:
        return None
    return int(words[0]) / int(words[1])


def _quota_v1(folder: Path) -> float | None:
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return None if not quota or not period else quota / period


def _number(path: Path) -> int | None:
    """The file's number; None for `max`, -1 or no such file."""
    text = next(lines(path), "").strip()
    return int(text) if text.isdigit() else None
