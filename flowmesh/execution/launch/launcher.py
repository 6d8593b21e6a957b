"""From a granted slot to a fork request: imports, disk space, folders, GPUs."""

from __future__ import annotations

import asyncio
from pathlib import Path

from flowmesh.errors import FlowMeshError
from flowmesh.execution.gpu.monitor import GpuMonitor
from flowmesh.execution.launch.disk_space import DiskSpace, Shortages
from flowmesh.execution.launch.preparation import prepare
from flowmesh.execution.layout import Layout
from flowmesh.execution.run import Run
from flowmesh.processes.child_owner import ChildOwner
from flowmesh.processes.protocol import Fork
from flowmesh.processes.server_pool import ServerPool
from flowmesh.tasks import machine
from flowmesh.tasks.journal import Journal
from flowmesh.tasks.machine import State


class Launcher:
    """
    Args:
        owner: answers for the children of tasks.
    """

    def __init__(
        self,
        *,
        pool: ServerPool,
        owner: ChildOwner,
        journal: Journal,
        layout: Layout,
        disk_space: DiskSpace,
        gpus: GpuMonitor,
    ) -> None:
        self._pool = pool
        self._owner = owner
        self._journal = journal
        self._layout = layout
        self._disk_space = disk_space
        self._gpus = gpus
        self._loop = asyncio.get_running_loop()

    async def start(self, run: Run) -> machine.Event | None:
        """Have the run's child forked.

        Returns:
            why there will be no child; None once it was asked for: its fork server's answer goes to the owner.
        """
        environment = run.accepted.type.environment
        if not self._pool.is_ready(environment) and not await self._await_server(run):
            return machine.LaunchFailed("stopped before it was started")
        try:
            prepared = await asyncio.to_thread(self._prepare, run, self._nested(run))
        except OSError as error:
            return machine.LaunchFailed(f"cannot prepare {error.filename or 'its folders'}: {error.strerror}")
        except FlowMeshError as error:
            return machine.LaunchFailed(str(error))
        if isinstance(prepared, Shortages):
            self._disk_space.judge(prepared.node)
            if prepared.node and run.task.state is State.LAUNCHING:
                return machine.NeverForked()
            return machine.LaunchFailed(f"not started: {prepared.node or prepared.own}")
        self._disk_space.judge("")
        if refusal := await self._gpus.begin(run):
            return machine.LaunchFailed(refusal)
        try:
            await self._pool.launch(
                environment,
                prepared,
                self._owner,
                lambda server: self._journal.launching(run.attempt, run.task, server),
            )
        except FlowMeshError as error:
            return machine.LaunchFailed(str(error))
        return None

    def _nested(self, run: Run) -> list[Path]:
        """Folders of other tasks inside this task's, which it had before if it is there."""
        folders = [each.out_dir for each in (run.accepted.target, *run.accepted.children)]
        return [Path(each) for folder in folders if Path(folder).exists() for each in self._journal.folders_in(folder)]

    def _prepare(self, run: Run, others: list[Path]) -> Fork | Shortages:
        """In a thread: the task's folders and job, if there is disk space for them."""
        return self._disk_space.shortages(run) or prepare(self._layout, run, others)

    async def _await_server(self, run: Run) -> bool:
        """Wait for the imports of its environment. False if the task was stopped meanwhile."""
        if run.task.state is State.LAUNCHING:
            run.enter("import libraries")
            run.waiting = self._loop.create_task(self._pool.warm(run.accepted.type.environment))
            await asyncio.wait([run.waiting])
            run.waiting = None
        return run.task.state is State.LAUNCHING
