"""Removes what a task left in the node's own folders and in shared memory, when no process of it is left."""

from __future__ import annotations

import asyncio
import datetime
import time

from loguru import logger

from flowmesh.execution.housekeeping.removal import remove_tree, removed_empty
from flowmesh.execution.layout import Layout
from flowmesh.execution.run import Run
from flowmesh.messages.job import JOB_FILE, OUTCOME_FILE
from flowmesh.processes import shm

_MOST_LOGGED = 10
"""Names of shared memory in one line."""


class Cleanup:
    """An empty folder is removed on the loop, anything else in a thread."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    async def remove_tmp(self, run: Run) -> None:
        """Remove its TMPDIR, and its files in /dev/shm unless it was a light task that succeeded."""
        shared = not run.accepted.type.is_light or run.task.verdict is None or not run.task.verdict.ok
        if not removed_empty(self._layout.tmp(run.attempt)) or shared:
            await asyncio.to_thread(self._remove_tmp, run, shared)

    def _remove_tmp(self, run: Run, shared: bool) -> None:
        remove_tree(self._layout.tmp(run.attempt))
        if shared:
            removed = shm.sweep(_started_by_any_clock(run) - 1.0, self._layout.task_uid)
            if removed:
                logger.bind(task=run.task_id, names=removed[:_MOST_LOGGED], count=len(removed)).info(
                    "removed shared memory that the task left"
                )

    async def remove_spool(self, attempt: int) -> None:
        spool = self._layout.spool(attempt)
        if not removed_empty(spool, but=(JOB_FILE, OUTCOME_FILE)):
            await asyncio.to_thread(remove_tree, spool)


def _started_by_any_clock(run: Run) -> float:
    """Seconds since the epoch: the earlier of the recorded start and now minus its runtime, as the clock may be set."""
    counted_back = time.time() - run.runtime_s
    if run.started_at is None:
        return counted_back
    return min(counted_back, datetime.datetime.fromisoformat(run.started_at).timestamp())
