"""From a slot that was granted to a process that runs: room, folders, GPUs, the fork; and the task's clock."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from loguru import logger

from flowmesh.errors import FlowMeshError
from flowmesh.execution import layout
from flowmesh.execution.launch import boot_clock
from flowmesh.execution.launch.disk_space import Shortages
from flowmesh.execution.run import Run
from flowmesh.messages.wire import utc_now
from flowmesh.processes.pipe import Pipe
from flowmesh.processes.protocol import Fork, Forked
from flowmesh.tasks import machine
from flowmesh.tasks.machine import State
from flowmesh.tasks.verdicts import Stop

if TYPE_CHECKING:
    from flowmesh.execution.executor import Executor

GONE_FOLLOWS_S = 0.5
"""An adopted task may have ended in time, while nobody looked: word of that comes right after word of its fork."""


class Launches:
    """On the loop; what may take a disk's or an import's time is waited for beside it."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._loop = asyncio.get_running_loop()

    async def start(self, run: Run) -> None:
        """Have a run that was granted its slot forked; what keeps it from that is told to its machine."""
        executor = self._executor
        if not executor.fleet.is_ready(run.accepted.type.environment) and not await self._await_server(run):
            executor.apply(run, machine.LaunchFailed("stopped before it was started"))
            return
        try:
            prepared = await asyncio.to_thread(self._prepare, run)
        except OSError as error:
            executor.apply(
                run, machine.LaunchFailed(f"cannot prepare {error.filename or 'its folders'}: {error.strerror}")
            )
            return
        lacks = prepared if isinstance(prepared, Shortages) else Shortages()
        executor.room.judge(lacks.node)
        if lacks.node and run.task.state is State.LAUNCHING and executor.draining is None:
            executor.apply(run, machine.NeverForked())
            return
        if isinstance(prepared, Shortages):
            executor.apply(run, machine.LaunchFailed(f"not started: {lacks.node or lacks.own}"))
            return
        if refusal := await executor.devices.begin(run):
            executor.apply(run, machine.LaunchFailed(refusal))
            return
        try:
            await executor.fleet.launch(
                run.accepted.type.environment,
                prepared,
                lambda server: executor.journal.launching(run.attempt, run.task, server),
            )
        except FlowMeshError as error:
            executor.apply(run, machine.LaunchFailed(str(error)))

    def _prepare(self, run: Run) -> Fork | Shortages:
        """In a thread: the task's folders and job, where there is room for them."""
        return self._executor.room.shortages(run) or layout.prepare(self._executor.layout, run)

    async def _await_server(self, run: Run) -> bool:
        """Imports take their time, and a stop does not wait for them: False where one came meanwhile."""
        executor = self._executor
        if run.task.state is State.LAUNCHING:
            run.enter("import libraries")
            run.waiting = self._loop.create_task(executor.fleet.warm(run.accepted.type.environment))
            await asyncio.wait([run.waiting])
            run.waiting = None
        return run.task.state is State.LAUNCHING

    def on_fork_failed(self, attempt: int, message: str) -> None:
        """Its fork server says that there will be no process."""
        executor = self._executor
        if attempt < 0:
            executor.deliveries.on_failed(-attempt, message)
        elif attempt in executor.devices.canaries:
            executor.devices.canaries.on_failed(attempt, message)
        elif run := executor.runs.get(attempt):
            executor.apply(run, machine.LaunchFailed(message))

    def on_forked(self, forked: Forked, pipe: Pipe) -> None:
        """Its fork server says that it has a process, new or adopted."""
        executor = self._executor
        attempt = forked.attempt
        if attempt < 0:
            executor.deliveries.on_forked(-attempt, pipe)
            return
        if attempt in executor.devices.canaries:
            executor.devices.canaries.on_forked(attempt, pipe)
            return
        run = executor.runs.get(attempt)
        if run is None:
            # A child of an earlier supervisor whose end is in the journal: nothing is owed to it.
            pipe.close()
            executor.fleet.kill(attempt)
            return
        if run.task.state in (State.RELEASING, State.DELIVERING, State.DONE):
            pipe.close()  # an earlier supervisor wrote its end down, and died before it said Forget
            return
        run.pid, run.cgroup = forked.pid, forked.cgroup
        executor.hearing.open(run, pipe)
        if run.started_at is not None and run.task.state is not State.LAUNCHING:
            self._resume_clock(run)
            executor.devices.resume(run)
            return
        executor.apply(run, machine.Launched())

    def start_clock(self, run: Run) -> None:
        """It runs from now on."""
        run.started = time.monotonic()
        run.started_at = utc_now()
        run.boot_mark = boot_clock.mark()
        run.last_heard = run.started  # in the queue it had nothing to say

    def _resume_clock(self, run: Run) -> None:
        """An adopted task's time goes on from when it began."""
        executor = self._executor
        assert run.started_at is not None
        run.started = time.monotonic() - boot_clock.age_s(run.boot_mark, run.started_at)
        self.arm_timeout(run, at_least_s=GONE_FOLLOWS_S)
        if run.task.state is State.STOPPING:
            executor.apply(run, machine.GraceOver())  # its grace ran out with the supervisor that gave it
        logger.bind(task=run.task_id, pid=run.pid).info("task adopted")

    def arm_timeout(self, run: Run, at_least_s: float = 0.0) -> None:
        """Have it stopped when its time is up, where it has one."""
        timeout_s = run.accepted.timeout_s
        if timeout_s is not None:
            left_s = max(at_least_s, timeout_s - run.runtime_s)
            detail = f"timed out after {timeout_s:g} s (spec.timeoutSec)"
            stop = machine.StopRequested(Stop.TIMEOUT, detail)
            run.timers.append(self._loop.call_later(left_s, self._executor.apply, run, stop))
