"""Looks after running tasks once a second: log files that grow too large, and tasks that no longer say anything.

Sleeps while nothing runs. What reads disks or /proc does so in a thread.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

from flowmesh.execution import files
from flowmesh.execution.run import Run
from flowmesh.processes import tree
from flowmesh.tasks import machine
from flowmesh.tasks.machine import State
from flowmesh.tasks.verdicts import Stop

if TYPE_CHECKING:
    from flowmesh.execution.executor import Executor

INTERVAL_S = 1.0
KEPT_OF_LOG = 4
"""A log that grew too large keeps its last quarter."""
STACKS_WAIT_S = 1.0
"""Between asking for stacks and stopping the task."""


async def watch(executor: Executor) -> None:
    """Until cancelled."""
    tasks = executor.settings.tasks
    while True:
        await asyncio.sleep(INTERVAL_S)
        running = [run for run in executor.runs.values() if run.task.state is State.RUNNING]
        folders = [Path(run.accepted.target.out_dir, "logs") for run in running]
        if folders:
            await asyncio.to_thread(bound_logs, folders, tasks.log_max_bytes)
        if tasks.hang_timeout_s is not None:
            for run in running:
                if time.monotonic() - run.last_heard > tasks.hang_timeout_s:
                    executor.spawn(_stop_hung(executor, run, tasks.hang_timeout_s))


async def _stop_hung(executor: Executor, run: Run, after_s: float) -> None:
    asked = run.last_heard = time.monotonic()  # once is enough
    pid = run.pid
    if pid is not None:
        await asyncio.to_thread(save_stacks, pid, Path(run.accepted.target.out_dir, "logs"))
        await asyncio.sleep(STACKS_WAIT_S)
    if run.task.state is State.RUNNING and run.last_heard == asked:  # else it has found its voice again
        detail = f"hung: no word from it for {after_s:g} s (tasks.hang_timeout_s); stacks are in its logs"
        executor.apply(run, machine.StopRequested(Stop.HANG, detail))


def bound_logs(folders: list[Path], limit_bytes: int) -> None:
    """Cut each log file over the limit down to its end. What is written meanwhile may be lost with the middle."""
    for folder in folders:
        for path in files.log_files(folder):
            try:
                if path.lstat().st_size > limit_bytes:
                    _cut(path, limit_bytes // KEPT_OF_LOG)
            except OSError as error:
                logger.bind(path=str(path)).warning("a log could not be cut: {}", error)


def _cut(path: Path, kept_bytes: int) -> None:
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size - kept_bytes)
        tail = file.read(kept_bytes)
        file.truncate(0)
    with open(path, "ab") as file:  # the task appends too: its next line comes after ours
        file.write(f"[flowmesh: {size - kept_bytes} bytes of this log were dropped here]\n".encode() + tail)


def save_stacks(pid: int, logs: Path) -> None:
    """Where every process of a task is: Python's stacks to its stderr.log, the kernel's view to logs/stacks.txt."""
    lines = []
    for each in (pid, *tree.descendants(pid)):
        lines.append(_describe(each))
        if _catches(each, signal.SIGUSR1):  # faulthandler's, inherited by forks; it would end anybody else
            tree.send(each, signal.SIGUSR1)
    (logs / "stacks.txt").write_text("\n".join(lines))


def _describe(pid: int) -> str:
    command = _read(f"/proc/{pid}/cmdline").replace("\0", " ").strip()[:500]
    lines = [f"pid {pid}: {command}"]
    try:
        threads = sorted(os.listdir(f"/proc/{pid}/task"), key=int)
    except OSError:
        return f"pid {pid}: gone"
    for tid in threads:
        name, waits = _read(f"/proc/{pid}/task/{tid}/comm").strip(), _read(f"/proc/{pid}/task/{tid}/wchan")
        status = _read(f"/proc/{pid}/task/{tid}/status")
        state = next((line.split("\t")[1] for line in status.splitlines() if line.startswith("State:")), "?")
        lines.append(f"  thread {tid} {name}: {state}, waits in {waits or '?'}")
        lines += [f"    {line}" for line in _read(f"/proc/{pid}/task/{tid}/stack").splitlines()]
    return "\n".join(lines) + "\n"


def _catches(pid: int, number: int) -> bool:
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
