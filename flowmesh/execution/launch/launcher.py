"""From a granted slot to a fork request: imports, folders, GPUs. A fault of the node puts the task back."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import msgspec

from flowmesh.errors import FieldError, FlowMeshError, LaunchError
from flowmesh.execution.conditions import Conditions
from flowmesh.execution.gpu.monitor import GpuMonitor
from flowmesh.execution.launch.environment_conditions import EnvironmentConditions
from flowmesh.execution.launch.node_folders import JOURNAL, NodeFolders, own_shortage
from flowmesh.execution.launch.preparation import prepare
from flowmesh.execution.launch.served_models import ServedModels, named_in
from flowmesh.execution.layout import Layout
from flowmesh.execution.near_disk import NearDisk
from flowmesh.execution.run import Run
from flowmesh.messages.serving import PREFIX, Served
from flowmesh.processes.child_owner import ChildOwner
from flowmesh.processes.protocol import Fork
from flowmesh.processes.server_client import EnvironmentBroken
from flowmesh.processes.server_pool import ServerPool
from flowmesh.tasks import machine
from flowmesh.tasks.journal import Journal, JournalError
from flowmesh.tasks.machine import State
from flowmesh.tasks.verdicts import Kind


class Unprepared(msgspec.Struct, frozen=True):
    """Why a task cannot be launched: faults of the node by name, else what concerns this task only."""

    faults: dict[str, str] = {}
    own: str = ""


class Launcher:
    """
    Args:
        owner: answers for the children of tasks.
        least_bytes: free space that a task's own folder needs.
    """

    def __init__(
        self,
        *,
        pool: ServerPool,
        owner: ChildOwner,
        journal: Journal,
        layout: Layout,
        folders: NodeFolders,
        conditions: Conditions,
        environments: EnvironmentConditions,
        gpus: GpuMonitor,
        served: ServedModels,
        disk: NearDisk,
        least_bytes: int,
    ) -> None:
        self._pool = pool
        self._owner = owner
        self._journal = journal
        self._layout = layout
        self._folders = folders
        self._conditions = conditions
        self._environments = environments
        self._gpus = gpus
        self._models = served
        self._disk = disk
        self._least_bytes = least_bytes

    async def start(self, run: Run) -> machine.Event | None:
        """Have the run's child forked.

        Returns:
            why there will be no child, or not now; None once it was asked for: its fork server's answer goes to the
            owner.
        """
        environment = run.accepted.type.environment
        if not self._pool.is_ready(environment):
            problem = await self._await_server(run)
            if run.task.state is not State.LAUNCHING:
                return machine.LaunchFailed("stopped before it was started")
            if problem:
                return self._environments.met(run, problem)
        try:
            run.served = await self._served(run)
        except FieldError as error:
            return machine.LaunchFailed(str(error), Kind.BAD_REQUEST)
        if run.task.state is not State.LAUNCHING:
            return machine.LaunchFailed("stopped before it was started")
        try:
            prepared = await self._prepared(run)
        except JournalError as error:
            return self._conditions.met(run, self._folders.faults[JOURNAL], str(error))
        if isinstance(prepared, Unprepared):
            if not prepared.faults:
                return machine.LaunchFailed(prepared.own)
            self._folders.report(prepared.faults)
            name, reason = next(iter(prepared.faults.items()))
            return self._conditions.met(run, self._folders.faults[name], reason)
        if (event := await self._gpus.begin(run)) is not None:
            return event
        try:
            run.fork_asked = time.monotonic()
            await self._pool.launch(
                environment,
                prepared,
                self._owner,
                lambda server: self._journal.launching(run.attempt, run.task, server),
            )
        except JournalError as error:
            self._gpus.cancel(run)
            return self._conditions.met(run, self._folders.faults[JOURNAL], str(error))
        except EnvironmentBroken as error:
            self._gpus.cancel(run)
            return self._environments.met(run, str(error))
        except LaunchError as error:
            return machine.LaunchFailed(str(error))
        return None

    async def _prepared(self, run: Run) -> Fork | Unprepared:
        """Prepare the run, where that may block; a folder that is there had a task before, and others' inside of it.

        Raises:
            JournalError: it cannot be read which these are.
        """
        folders = [each.out_dir for each in (run.accepted.target, *run.accepted.children)]
        there = [folder for folder in folders if os.path.exists(folder)]  # noqa: PTH110 - asked for each task
        if not there and all(map(self._disk.has, folders)):
            return await self._disk.run(self._prepare, run, [])
        others = [Path(each) for folder in there for each in self._journal.folders_in(folder)]
        return await asyncio.to_thread(self._prepare, run, others)

    def _prepare(self, run: Run, others: list[Path]) -> Fork | Unprepared:
        """The task's folders and job, if the node's folders and the task's own can take them."""
        if troubles := self._folders.look():
            return Unprepared(troubles)
        if own := own_shortage(Path(run.accepted.target.out_dir), self._least_bytes):
            return Unprepared(own=f"not started: {own}")
        try:
            return prepare(self._layout, run, others)
        except FlowMeshError as error:
            return Unprepared(own=str(error))
        except OSError as error:
            if troubles := self._folders.look(write=True):
                return Unprepared(troubles)
            return Unprepared(own=f"cannot prepare {error.filename or 'its folders'}: {error.strerror}")

    async def _served(self, run: Run) -> Served | None:
        """Where the model is served that the document names, once it is, or the task is stopped.

        Raises:
            FieldError: it is not in time.
        """
        named = named_in(run.accepted.task["spec"], run.accepted.type)
        if named is None or run.task.state is not State.LAUNCHING:
            return None
        field, task_id = named
        run.enter(f"wait for {PREFIX}{task_id}")
        run.waiting = waiting = asyncio.ensure_future(self._models.find(field, task_id))
        await asyncio.wait([waiting])
        run.waiting = None
        return None if waiting.cancelled() else waiting.result()

    async def _await_server(self, run: Run) -> str:
        """Wait for the imports of its environment, or until the task is stopped; returns why there is no server."""
        if run.task.state is not State.LAUNCHING:
            return ""
        run.enter("import libraries")
        waiting = run.waiting = asyncio.create_task(self._pool.await_server(run.accepted.type.environment))
        await asyncio.wait([waiting])
        run.waiting = None
        return "" if waiting.cancelled() else waiting.result()
