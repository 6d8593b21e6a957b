"""Ends a node by itself: before its time is over (`node.ends_at`), or when it had no task for long.

Both are drains, so that the node ends with exit code 0 and its workers are unregistered. Neither is kept in the
journal: the same node, started again with more time, takes tasks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from loguru import logger

from flowmesh.bus.connection import RedisError
from flowmesh.control.drain import Drain
from flowmesh.execution.executor import Executor
from flowmesh.execution.observer import Observer
from flowmesh.execution.run import Run
from flowmesh.orchestrator.link import Link
from flowmesh.settings.moments import iso
from flowmesh.tasks import machine
from flowmesh.tasks.machine import State
from flowmesh.tasks.verdicts import Kind, Stop, Verdict

LONGEST_PAUSE_S = 5.0
"""The wall clock may be set, and a machine may sleep."""
FORCED_PART = 0.25
"""In the last quarter of the margin, tasks that are still there are killed, so that the node itself can end."""


class NodeEnd(Observer):
    """
    Args:
        clock: monotonic seconds.
    """

    def __init__(
        self, executor: Executor, link: Link, drain: Drain, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._executor = executor
        self._link = link
        self._drain = drain
        self._clock = clock
        self._time = executor.time_left
        self._idle_limit_s = executor.settings.node.exit_when_idle_s
        self._idle_since = clock()
        self._changed = asyncio.Event()
        executor.observers.add(self)

    def on_accepted(self, run: Run) -> None:  # noqa: ARG002 - the observer's signature
        self._changed.set()

    def on_ended(self, run: Run, verdict: Verdict) -> None:  # noqa: ARG002
        self._idle_since = self._clock()
        self._changed.set()

    def on_refused(self, task_id: str, message: str, kind: Kind) -> None:  # noqa: ARG002
        self._changed.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        if self._time.ends_at is not None:
            logger.info("the node ends at {}, and drains {:g} s before", iso(self._time.ends_at), self._time.margin_s)
        if self._time.ends_at is None and self._idle_limit_s is None:
            return
        while True:
            self._changed.clear()
            pause_s = min(self._look_at_end(), await self._look_at_idleness(), LONGEST_PAUSE_S)
            try:
                async with asyncio.timeout(max(pause_s, 0.05)):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def listed(self) -> dict[str, Any]:
        """For `flowmesh status`."""
        idle_s = None if len(self._executor.runs) else round(self._clock() - self._idle_since, 1)
        return {"end": self._time.listed(), "exit_when_idle_s": self._idle_limit_s, "idle_s": idle_s}

    def _look_at_end(self) -> float:
        """Drain when it is due, and send back what cannot finish any more; returns when to look again, in seconds."""
        left_s = self._time.left_s()
        if left_s is None:
            return LONGEST_PAUSE_S
        if left_s <= 0:
            forced_in_s = left_s + self._time.margin_s * (1 - FORCED_PART)
            self._drain.at_end("checkpoint" if forced_in_s > 0 else "now")
            return forced_in_s if forced_in_s > 0 else LONGEST_PAUSE_S
        waits_s = [left_s]
        for run in [run for run in self._executor.runs if run.task.state is State.QUEUED]:
            if why := self._time.why_not(run.accepted.timeout_s):
                self._executor.apply(run, machine.StopRequested(Stop.DRAIN, f"not started: {why}"))
            else:
                waits_s.append(left_s - (run.accepted.timeout_s or self._time.default_s))
        return min(waits_s)

    async def _look_at_idleness(self) -> float:
        limit_s, executor = self._idle_limit_s, self._executor
        if limit_s is None or executor.draining is not None:
            return LONGEST_PAUSE_S
        drivers = self._link.queue.drivers
        if len(executor.runs) or executor.parts.redeliveries or (drivers is not None and drivers.pipelines):
            self._idle_since = self._clock()
            return LONGEST_PAUSE_S
        left_s = self._idle_since + limit_s - self._clock()
        if left_s > 0:
            return left_s
        if not self._link.up or not await self._nothing_waits():
            return LONGEST_PAUSE_S
        logger.info("no task for {:g} s (node.exit_when_idle_s): the node ends", limit_s)
        self._drain.at_end("finish")
        return LONGEST_PAUSE_S

    async def _nothing_waits(self) -> bool:
        """Look at the queue once more; False where it gave a task, or cannot be read."""
        if (claims := self._link.queue.claims) is not None and not claims.refused:
            try:
                await claims.look()
            except (RedisError, OSError, TimeoutError):
                return False
            if claims.gangs.any_fits:
                return False
        return not len(self._executor.runs)
