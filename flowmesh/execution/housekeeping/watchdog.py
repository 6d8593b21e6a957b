"""Looks after running tasks once a second: log files that grow too large, and tasks that no longer say anything.

Sleeps while nothing runs. What reads disks or /proc does so in a thread.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

from flowmesh.execution.housekeeping.stack_dump import FILE, Stacks
from flowmesh.execution.housekeeping.task_logs import bound_logs, tell_troubles
from flowmesh.execution.run import Run
from flowmesh.tasks import machine
from flowmesh.tasks.machine import State
from flowmesh.tasks.verdicts import Stop

if TYPE_CHECKING:
    from flowmesh.execution.executor import Executor

INTERVAL_S = 1.0
STACKS_WAIT_S = 1.0
"""Between asking for stacks and stopping the task."""


async def watch(executor: Executor) -> None:
    """Until cancelled."""
    tasks = executor.settings.tasks
    suspects: set[Run] = set()
    told: set[Path] = set()
    while True:
        await asyncio.sleep(INTERVAL_S)
        running = [run for run in executor.runs.values() if run.task.state is State.RUNNING]
        folders = [Path(run.accepted.target.out_dir, "logs") for run in running]
        if folders:
            troubles = await asyncio.to_thread(bound_logs, folders, tasks.log_max_bytes)
            tell_troubles({path: error for path, error in troubles.items() if path not in told})
            told = set(troubles)
        if tasks.hang_timeout_s is None:
            continue
        for run in running:
            if run not in suspects and time.monotonic() - run.last_heard > tasks.hang_timeout_s:
                suspects.add(run)
                executor.spawn(_stop_hung(executor, run, suspects), run)


async def _stop_hung(executor: Executor, run: Run, suspects: set[Run]) -> None:
    heard = run.last_heard
    try:
        if run.pid is None:
            executor.apply(run, _hung(executor))
            return
        stacks = Stacks(run.pid, Path(run.accepted.target.out_dir))
        await asyncio.to_thread(stacks.save)
        await asyncio.sleep(STACKS_WAIT_S)
        if run.task.state is State.RUNNING and run.last_heard == heard:  # else it has found its voice again
            executor.apply(run, _hung(executor))
            await asyncio.to_thread(stacks.save_last_words)
    finally:
        suspects.discard(run)


def _hung(executor: Executor) -> machine.StopRequested:
    after_s = executor.settings.tasks.hang_timeout_s
    detail = f"hung: no word from it for {after_s:g} s (tasks.hang_timeout_s); stacks are in its logs/{FILE}"
    return machine.StopRequested(Stop.HANG, detail)
