"""The children of tasks: what their fork servers report of them becomes events of their runs."""

from __future__ import annotations

import asyncio

from loguru import logger

from flowmesh.execution.gpu.monitor import GpuMonitor
from flowmesh.execution.launch.child_pipe import ChildPipes
from flowmesh.execution.launch.environment_conditions import EnvironmentConditions
from flowmesh.execution.launch.node_folders import NodeFolders
from flowmesh.execution.launch.spool import read_outcome
from flowmesh.execution.layout import Layout
from flowmesh.execution.ports import Begin, PostEvent
from flowmesh.execution.run import Run
from flowmesh.execution.run_table import RunTable
from flowmesh.execution.timers import Timers
from flowmesh.messages.job import EXIT_SETUP, Exit
from flowmesh.processes.pipe import Pipe
from flowmesh.processes.protocol import Forked
from flowmesh.processes.server_pool import ServerPool
from flowmesh.tasks import machine
from flowmesh.tasks.machine import State
from flowmesh.tasks.verdicts import Kind

GONE_FOLLOWS_S = 0.5
"""An adopted task may have ended in time while no supervisor looked: its Gone comes right after its Forked."""

MOST_UNREADY = 3
"""A task whose process could not be set up so often, for a reason of its own, ends."""

_ALIVE = (State.LAUNCHING, State.RUNNING, State.STOPPING)


class TaskChildren:
    """Their owner; see `child_owner.ChildOwner`."""

    def __init__(
        self,
        *,
        runs: RunTable,
        pool: ServerPool,
        pipes: ChildPipes,
        layout: Layout,
        gpus: GpuMonitor,
        environments: EnvironmentConditions,
        folders: NodeFolders,
        timers: Timers,
        post: PostEvent,
        begin: Begin,
    ) -> None:
        self._runs = runs
        self._pool = pool
        self._pipes = pipes
        self._layout = layout
        self._gpus = gpus
        self._environments = environments
        self._folders = folders
        self._timers = timers
        self._post = post
        self._begin = begin

    def on_forked(self, forked: Forked, pipe: Pipe) -> None:
        run = self._runs.get(forked.attempt)
        if run is None:  # adopted, and its terminal event is already in the journal: kill it
            pipe.close()
            self._pool.kill(forked.attempt)
            return
        if run.task.state in (State.RELEASING, State.DELIVERING, State.DONE):
            pipe.close()  # adopted; the earlier supervisor journalled its end, but died before it sent Forget
            return
        run.pid, run.cgroup = forked.pid, forked.cgroup
        self._pipes.open(run, pipe)
        if run.started_at is not None and run.task.state is not State.LAUNCHING:
            self._adopt(run)
        else:
            self._post(run, machine.Launched())

    def _adopt(self, run: Run) -> None:
        run.resume_clock()
        self._timers.arm_timeout(run, at_least_s=GONE_FOLLOWS_S)
        if run.task.state is State.STOPPING:
            self._post(run, machine.GraceOver())  # the grace ran out while no supervisor was there
        logger.bind(task=run.task_id, pid=run.pid).info("task adopted")
        self._gpus.resume(run)

    def on_fork_failed(self, attempt: int, message: str, own: bool) -> None:
        if run := self._runs.get(attempt):
            self._gpus.cancel(run)
            self._begin(self._not_forked(run, message, own), run)

    async def _not_forked(self, run: Run, message: str, own: bool) -> machine.Event:
        """The fault that kept its process from being set up: of the node's folders, of this task, else of all."""
        if (event := await self._folders.met(run)) is not None:
            return event
        if own:  # its folders are made again; not for ever, as another task may remove them each time
            run.unready += 1
            if run.unready < MOST_UNREADY:
                return machine.NeverForked()
            return machine.LaunchFailed(f"not started: {message}")
        return self._environments.met(run, f"environment {run.accepted.type.environment}: {message}")

    def on_gone(self, attempt: int, exit_: Exit) -> None:
        run = self._runs.get(attempt)
        if run is not None and run.task.state in _ALIVE:
            self._begin(self._collect(run, exit_), run)
        elif run is None or run.task.state in (State.DELIVERING, State.DONE):
            self._pool.forget(attempt)

    def on_lost(self, attempt: int, message: str) -> None:
        if run := self._runs.get(attempt):
            self._begin(self.lost(run, message, Kind.NODE_FAULT), run)

    async def _collect(self, run: Run, exit_: Exit) -> machine.Event:
        self._pipes.read(run)
        run.exit = exit_
        run.outcome = await read_outcome(self._layout, run.attempt)
        if run.outcome is None and (exit_.code == EXIT_SETUP or run.finished_frame):
            self._folders.report(await asyncio.to_thread(self._folders.look, write=True))
        fault = await self._gpus.fault_of(run, exit_, run.outcome) if run.gpus else ""
        return machine.ChildGone(exit_, run.outcome, fault, run.finished_frame)

    async def lost(self, run: Run, message: str, kind: Kind) -> machine.Event | None:
        """The child is gone and its exit status is unknown; an outcome that it left still counts."""
        run.pid = None
        run.outcome = await read_outcome(self._layout, run.attempt)
        return machine.ChildLost(message, run.outcome, kind) if run.task.state in _ALIVE else None
