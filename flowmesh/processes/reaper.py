"""The children of a fork server that have a task: reaps them, kills what they left, and reports when all is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

import msgspec

from flowmesh.messages.job import Exit
from flowmesh.processes import cgroup, proc_files, tree
from flowmesh.processes.cgroup import Leaf
from flowmesh.processes.child_record import Entry
from flowmesh.processes.spares import Spares

SWEEP_LIMIT_S = 5.0
"""A tree that is not gone after this (a process stuck in the kernel) is reported with what is left of it."""


class Reaper:
    """
    Args:
        spares: the children without a task; they are reaped here too.
        on_gone: called when a child has ended and nothing of its tree is left.
    """

    def __init__(self, spares: Spares, on_gone: Callable[[Entry], None]) -> None:
        self._spares = spares
        self._on_gone = on_gone
        self._entries: dict[int, Entry] = {}
        self._by_pid: dict[int, Entry] = {}
        self._emptied: list[tuple[Leaf, float]] = []
        """Cgroups to remove that no process is in any more, and until when (monotonic) to try."""

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def attempts(self) -> tuple[int, ...]:
        return tuple(self._entries)

    @property
    def sweeping(self) -> bool:
        """Whether something that has ended is not gone yet."""
        return bool(self._emptied) or any(not entry.running and not entry.gone for entry in self)

    @property
    def all_gone(self) -> bool:
        return all(entry.gone for entry in self)

    def get(self, attempt: int) -> Entry | None:
        return self._entries.get(attempt)

    def add(self, entry: Entry) -> None:
        self._entries[entry.attempt] = self._by_pid[entry.pid] = entry

    def forget(self, attempt: int) -> None:
        """Drop a child that is gone and reported."""
        if (entry := self._entries.get(attempt)) and entry.gone:
            entry.close()
            del self._entries[attempt]

    def kill(self, entry: Entry) -> None:
        """SIGKILL to its whole tree; what is not in its cgroup follows when it is swept."""
        entry.killed_by_us = True
        if entry.leaf is not None:
            entry.leaf.kill()
        if entry.running:
            with contextlib.suppress(OSError):  # one that is nice would also be slow to die; only root may change that
                os.setpriority(os.PRIO_PROCESS, entry.pid, 0)
            tree.send(entry.pid, signal.SIGKILL)

    def close(self) -> None:
        """Remove the cgroups that are left. Bounded by SWEEP_LIMIT_S for each."""
        for leaf, until_s in self._emptied:
            leaf.remove_within(until_s - time.monotonic())

    def reap(self) -> bool:
        """Collect the exit statuses of children that have ended; returns whether there were any."""
        ended = False
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return ended
            if pid == 0:
                return ended
            ended = True
            self._spares.reaped(pid)
            entry = self._by_pid.pop(pid, None)
            if entry is None:
                continue  # an orphan of a task, or a spare
            entry.ended_at = time.monotonic()
            killed = os.WIFSIGNALED(status)
            entry.exit = Exit(
                code=None if killed else os.WEXITSTATUS(status),
                signal=os.WTERMSIG(status) if killed else None,
                oom_kills=self._oom_kills(entry, killed and os.WTERMSIG(status) == signal.SIGKILL),
                ran_s=entry.ended_at - entry.forked_at,
                user_cpu_s=usage.ru_utime,
                system_cpu_s=usage.ru_stime,
                peak_rss_bytes=usage.ru_maxrss * 1024,
            )

    @staticmethod
    def _oom_kills(entry: Entry, killed: bool) -> int:
        """The kernel's count for this child; one that includes others is evidence only of a kill that was not ours."""
        if entry.leaf is not None and (kills := entry.leaf.oom_kills()) is not None:
            return kills
        if killed and not entry.killed_by_us:
            return cgroup.oom_kills_near() - entry.near_oom_kills
        return 0

    def sweep(self) -> None:
        """Kill what ended children left behind, and report those of which nothing is left.

        A task's first process is a subreaper. So a child of the fork server that it did not fork was left by an ended
        task, or reparented on purpose by a running one: it is killed either way.
        """
        ending = [entry for entry in self if not entry.running and not entry.gone]
        orphans = self._orphans()
        if orphans:
            tree.kill_all(orphans)
            self.reap()
        for entry in ending:
            entry.swept += len(orphans)
            self._settle(entry, self._orphans() if orphans else [])
        now = time.monotonic()
        self._emptied = [(leaf, until_s) for leaf, until_s in self._emptied if not leaf.remove() and now < until_s]

    def _orphans(self) -> list[int]:
        """Processes below the fork server that belong neither to a running child nor to a spare."""
        own = self._by_pid.keys() | self._spares.pids
        if own.issuperset(proc_files.own_children()):
            return []
        return tree.descendants(os.getpid(), besides=own)

    def _settle(self, entry: Entry, left: list[int]) -> None:
        assert entry.ended_at is not None
        assert entry.exit is not None
        if entry.leaf is not None and entry.leaf.populated():
            inside = entry.leaf.pids()
            entry.swept += len(set(inside) - set(left))
            entry.leaf.kill()
            left += inside
        for_s = time.monotonic() - entry.ended_at
        if left and for_s < SWEEP_LIMIT_S:
            return
        entry.exit = msgspec.structs.replace(
            entry.exit, swept=entry.swept, left=len(set(left)), gone_ms=round(for_s * 1000, 3)
        )
        entry.gone = True
        self._on_gone(entry)
        if entry.leaf is not None:
            self._emptied.append((entry.leaf, time.monotonic() + SWEEP_LIMIT_S))
