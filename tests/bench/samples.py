"""Samples of all that a node holds: memory, descriptors, threads, files; and how each grows by the task."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import redis

from flowmesh.processes.tree import descendants
from tests.bench.measure import own_bytes, pss_bytes
from tests.bench.ratios import Slope, slope
from tests.kit.support import Node, with_mark

LOWEST_OF = 5
"""Samples of which the lowest counts: what is cleaned up once a minute rises and falls between."""


@dataclass(frozen=True)
class Sample:
    """Of a node without a task; sizes in bytes.

    Memory is without pages of files: which part of them counts to a process changes with other programs on the machine.
    """

    supervisor_memory: int
    servers_memory: dict[str, int]
    """Of each environment's fork servers, with the children that they have ahead."""
    others_memory: int
    all_memory: int
    all_pss: int
    """With pages of files."""
    supervisor_fds: int
    all_fds: int
    threads: int
    processes: int
    journal: int
    state_disk: int
    state_inodes: int
    results_disk: int
    redis_memory: int
    cpu_s: float
    """Of the supervisor, its fork servers and all their children that have ended."""


def sample(node: Node, client: redis.Redis) -> Sample:
    pids = sorted({node.pid, *with_mark(str(node.home))})
    memory = {pid: _or_zero(own_bytes, pid) for pid in pids}
    kinds = _kinds(node, pids)
    fds = {pid: _or_zero(_fds, pid) for pid in pids}
    state_disk, state_inodes = _size(node.state_dir)
    return Sample(
        supervisor_memory=memory[node.pid],
        servers_memory={name: sum(memory[pid] for pid in members) for name, members in kinds.items()},
        others_memory=sum(memory.values()) - memory[node.pid] - sum(memory[pid] for pid in _flat(kinds.values())),
        all_memory=sum(memory.values()),
        all_pss=sum(_or_zero(pss_bytes, pid) for pid in pids),
        supervisor_fds=fds[node.pid],
        all_fds=sum(fds.values()),
        threads=sum(_or_zero(_threads, pid) for pid in pids),
        processes=len(pids),
        journal=sum(file.stat().st_size for file in node.state_dir.glob("journal.sqlite*")),
        state_disk=state_disk,
        state_inodes=state_inodes,
        results_disk=_size(node.results_dir)[0],
        redis_memory=int(client.info("memory")["used_memory"]),
        cpu_s=processes_cpu_s(node),
    )


def _kinds(node: Node, pids: Sequence[int]) -> dict[str, set[int]]:
    """The fork servers and their children, by environment."""
    kinds: dict[str, set[int]] = {}
    for server in node.ask(op="status")["servers"]:
        members = kinds.setdefault(server["environment"], set())
        members |= {server["pid"], *descendants(server["pid"])} & set(pids)
    return kinds


def _flat(groups: Iterable[set[int]]) -> set[int]:
    return set().union(*groups)


def processes_cpu_s(node: Node) -> float:
    """CPU time of the supervisor, its fork servers and all their children that have ended."""
    return sum(_cpu_s(pid) for pid in {node.pid, *node.servers()})


def growth(tasks: Sequence[int], values: Sequence[float]) -> Slope:
    """By the task, of the lowest of each few samples."""
    groups = [range(at, at + LOWEST_OF) for at in range(0, len(values) - LOWEST_OF + 1, LOWEST_OF)]
    lowest = [min(group, key=values.__getitem__) for group in groups]
    return slope([tasks[at] for at in lowest], [values[at] for at in lowest])


def _or_zero(read, pid: int) -> int:  # type: ignore[no-untyped-def]
    with contextlib.suppress(OSError, RuntimeError):
        return int(read(pid))
    return 0  # it has ended meanwhile


def _fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def _cpu_s(pid: int) -> float:
    """With children that were reaped."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _size(folder: Path) -> tuple[int, int]:
    """Disk space and number of all that lies below."""
    disk = inodes = 0
    for top, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(OSError):
                disk += Path(top, name).lstat().st_blocks * 512
                inodes += 1
    return disk, inodes
