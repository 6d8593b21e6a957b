"""Looks after running tasks once a second: bounds their log files, and stops tasks that have hung.

A task has hung when no frame came from it for `tasks.hang_timeout_s`. Disks and /proc are read in a thread.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path

from flowmesh.execution.housekeeping.stack_dump import FILE, StackDump
from flowmesh.execution.housekeeping.task_logs import bound_logs, log_troubles
from flowmesh.execution.ports import Begin, PostEvent
from flowmesh.execution.run import Run
from flowmesh.execution.run_table import RunTable
from flowmesh.settings.schema import TasksSettings
from flowmesh.tasks import machine
from flowmesh.tasks.machine import State
from flowmesh.tasks.verdicts import Stop

INTERVAL_S = 1.0
NODE_LOG_TURNS = 20
NODE_LOG_MAX_BYTES = 16 * 1024**2
"""Of each log of a fork server, and of `delivery.log`, which all deliveries write to."""
STACKS_WAIT_S = 1.0
"""Between the request for stacks and the stop."""


class Watchdog:
    """
    Args:
        log_dir: the logs of fork servers and deliveries.
    """

    def __init__(self, settings: TasksSettings, runs: RunTable, log_dir: Path, post: PostEvent, begin: Begin) -> None:
        self._settings = settings
        self._log_dir = log_dir
        self._runs = runs
        self._post = post
        self._begin = begin
        self._suspects: set[Run] = set()
        self._reported: set[Path] = set()
        """Folders of logs that could not all be bounded: once a task."""

    async def run(self) -> None:
        """Until cancelled."""
        for turn in itertools.count():
            await asyncio.sleep(INTERVAL_S)
            if turn % NODE_LOG_TURNS == 0:
                log_troubles(await asyncio.to_thread(bound_logs, [self._log_dir], NODE_LOG_MAX_BYTES))
            running = [run for run in self._runs if run.task.state is State.RUNNING]
            if running:
                await self._bound_logs(running)
            if self._settings.hang_timeout_s is not None:
                self._find_hung(running, self._settings.hang_timeout_s)

    async def _bound_logs(self, running: list[Run]) -> None:
        folders = [Path(run.accepted.target.out_dir, "logs") for run in running]
        troubles = await asyncio.to_thread(bound_logs, folders, self._settings.log_max_bytes)
        log_troubles({logs: each for logs, each in troubles.items() if logs not in self._reported})
        self._reported = self._reported.intersection(folders) | set(troubles)

    def _find_hung(self, running: list[Run], timeout_s: float) -> None:
        for run in running:
            if run not in self._suspects and time.monotonic() - run.last_frame_at > timeout_s:
                self._suspects.add(run)
                detail = (
                    f"hung: no frame from it for {timeout_s:g} s (tasks.hang_timeout_s); stacks are in its logs/{FILE}"
                )
                self._begin(self._stop(run, machine.StopRequested(Stop.HANG, detail)), run)

    async def _stop(self, run: Run, hung: machine.StopRequested) -> None:
        last_frame_at = run.last_frame_at
        try:
            if run.pid is None:
                self._post(run, hung)
                return
            stacks = StackDump(run.pid, Path(run.accepted.target.out_dir))
            await asyncio.to_thread(stacks.save)
            await asyncio.sleep(STACKS_WAIT_S)
            if (
                run.task.state is State.RUNNING and run.last_frame_at == last_frame_at
            ):  # else it has sent a frame meanwhile
                self._post(run, hung)
                await asyncio.to_thread(stacks.save_last_words)
        finally:
            self._suspects.discard(run)
