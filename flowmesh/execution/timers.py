"""A run's timers: the grace between two steps of a stop, and `spec.timeoutSec`."""

from __future__ import annotations

import asyncio

from flowmesh.execution.ports import PostEvent
from flowmesh.execution.run import Run
from flowmesh.settings.schema import TasksSettings
from flowmesh.tasks import machine
from flowmesh.tasks.machine import Level
from flowmesh.tasks.verdicts import Stop


class Timers:
    def __init__(self, settings: TasksSettings, post: PostEvent) -> None:
        self._settings = settings
        self._post = post
        self._loop = asyncio.get_running_loop()

    def arm_grace(self, run: Run, level: Level) -> None:
        """Post GraceOver when the grace of this level is over."""
        grace_s = self._settings.cancel_grace_s if level is Level.ASK else self._settings.term_grace_s
        self._arm(run, grace_s, machine.GraceOver())

    def arm_timeout(self, run: Run, at_least_s: float = 0.0) -> None:
        """Have a task with a timeout stopped when its time is up.

        Args:
            at_least_s: not before that, even if its time is up already.
        """
        timeout_s = run.accepted.timeout_s
        if timeout_s is not None:
            detail = f"timed out after {timeout_s:g} s (spec.timeoutSec)"
            left_s = max(at_least_s, timeout_s - run.runtime_s)
            self._arm(run, left_s, machine.StopRequested(Stop.TIMEOUT, detail))

    def _arm(self, run: Run, after_s: float, event: machine.Event) -> None:
        run.timers.append(self._loop.call_later(after_s, self._post, run, event))
