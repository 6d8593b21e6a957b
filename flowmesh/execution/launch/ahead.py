"""Prepares the next task of a slot while another one runs there.

A child downloads what the task's document names and has the kernel read its files (`runners.ahead`); its environment's
fork server is started before, if there is none. The child takes only what is left of CPUs and disks, and is killed when
its task gets the slot: what it has done until then stays in the caches. The task knows nothing of it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping

import msgspec
import psutil
from loguru import logger

from flowmesh.errors import LaunchError
from flowmesh.execution.admission import Accepted
from flowmesh.execution.delivery.gateway_process import GatewayProcess
from flowmesh.execution.helper_fork import helper_fork
from flowmesh.execution.housekeeping.removal import remove_tree
from flowmesh.execution.launch.preparation import task_limits
from flowmesh.execution.layout import Layout
from flowmesh.execution.observer import Observer
from flowmesh.execution.run import Run
from flowmesh.messages.job import JOB_FILE, Job
from flowmesh.messages.text import encode_json
from flowmesh.node.slots import Slot
from flowmesh.processes import linux
from flowmesh.processes.helper import Helpers
from flowmesh.processes.pipe import Frame, Progress
from flowmesh.processes.protocol import Fork
from flowmesh.tasks.machine import State

EVERYTHING, WHAT_IS_HERE = "runners.ahead:everything", "runners.ahead:what_is_here"
FIRST_ATTEMPT = 1 << 41
"""Their attempt numbers are far above those of tasks, and canaries."""
LOOK_S = 0.5
AFTER_S = 1.0
"""How long the task must have waited, and the one before it have run: short tasks are over before that pays."""
NICE = 10
"""Of the imports of an environment that no running task uses."""
LEAST_FREE = 0.25
"""Nothing is prepared where less than this part of the machine's memory is available."""


class Prepared(msgspec.Struct):
    """What was done for one task."""

    began: float
    """Monotonic."""
    read_bytes: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class Ahead(Observer):
    """Does nothing unless it is run (`tasks.prepare_next`)."""

    def __init__(
        self, slots: Mapping[str, Slot[Run]], helpers: Helpers, layout: Layout, gateway: GatewayProcess
    ) -> None:
        self._slots = slots
        self._helpers = helpers
        self._layout = layout
        self._gateway = gateway
        self._attempts = itertools.count(FIRST_ATTEMPT + int(time.time()))
        self._nice = NICE if linux.may_raise_priority() else 0
        self._offered: dict[str, Accepted] = {}
        """By worker: the task that it would get from the queue next."""
        self._works: dict[str, tuple[str, asyncio.Task[None]]] = {}
        """By worker: the task that is prepared, and the work."""
        self._last: dict[str, tuple[str, Prepared]] = {}
        """By worker: the task that was prepared last."""

    def wants(self, slot: Slot[Run]) -> bool:
        """Whether a task that the queue would give to the slot next could be prepared now."""
        return _is_busy(slot) and not slot.queue

    def offer(self, slot: Slot[Run], accepted: Accepted | None) -> None:
        """The queue would give this task to the slot next, if no other node gets it before; None: it has none."""
        if accepted is None:
            self._offered.pop(slot.plan.worker_id, None)
        else:
            self._offered[slot.plan.worker_id] = accepted

    def offered(self, slot: Slot[Run]) -> str:
        """The id of the task that was offered last, and has no slot yet; empty: none."""
        accepted = self._offered.get(slot.plan.worker_id)
        return "" if accepted is None else accepted.message.task_id

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                await asyncio.sleep(LOOK_S)
                for worker_id, slot in self._slots.items():
                    self._look(worker_id, slot)
        finally:
            for worker_id in self._works:
                self._stop(worker_id)
            await asyncio.gather(*(work for _, work in self._works.values()), return_exceptions=True)

    def on_slot_taken(self, slot: Slot[Run], run: Run) -> None:
        worker_id = slot.plan.worker_id
        self._offered.pop(worker_id, None)
        self._stop(worker_id)  # also for another task: what it downloads would keep this one waiting
        task_id, prepared = self._last.pop(worker_id, ("", None))
        if prepared is not None and task_id == run.task_id:
            run.prepared = {name: round(value, 3) for name, value in _told(prepared).items()}

    def _look(self, worker_id: str, slot: Slot[Run]) -> None:
        waiting = next(iter(slot.queue), None)
        accepted = self._offered.get(worker_id) if waiting is None else waiting.accepted
        if (working := self._works.get(worker_id)) is not None:
            if accepted is None or accepted.message.task_id != working[0]:
                self._stop(worker_id)
            return
        if accepted is None or not accepted.type.reads_ahead or self._is_done(worker_id, accepted):
            return
        if not _is_busy(slot) or (waiting is not None and time.monotonic() - waiting.queued_at < AFTER_S):
            return
        memory = psutil.virtual_memory()
        if memory.available < LEAST_FREE * memory.total:
            return
        work = asyncio.get_running_loop().create_task(self._prepare(slot, accepted, is_ours=waiting is not None))
        self._works[worker_id] = accepted.message.task_id, work
        work.add_done_callback(lambda _: self._works.pop(worker_id, None))

    def _stop(self, worker_id: str) -> None:
        working = self._works.get(worker_id)
        if working is not None and not working[1].cancelling():  # a second cancel would end its clean-up
            working[1].cancel()

    def _is_done(self, worker_id: str, accepted: Accepted) -> bool:
        return worker_id in self._last and self._last[worker_id][0] == accepted.message.task_id

    async def _prepare(self, slot: Slot[Run], accepted: Accepted, *, is_ours: bool) -> None:
        """Run the child. What goes wrong is the task's own to meet.

        Args:
            is_ours: whether no other node can get the task.
        """
        task_id, environment = accepted.message.task_id, accepted.type.environment
        prepared = Prepared(began=time.monotonic())
        self._last[slot.plan.worker_id] = task_id, prepared
        attempt = next(self._attempts)

        def on_frame(frame: Frame) -> None:
            prepared.seconds = time.monotonic() - prepared.began
            if isinstance(frame, Progress):
                prepared.read_bytes = frame.done

        if is_ours:
            self._gateway.need()
        written = asyncio.ensure_future(asyncio.to_thread(self._write, attempt, slot, accepted, is_ours))
        try:
            await self._helpers.warm(environment, nice=self._nice)
            exit_ = await self._helpers.run(environment, await asyncio.shield(written), on_frame=on_frame)
            prepared.seconds = time.monotonic() - prepared.began
            prepared.cpu_seconds = exit_.user_cpu_s + exit_.system_cpu_s
        except (LaunchError, OSError) as error:
            logger.bind(task=task_id).debug("not prepared while it waits: {}", error)
        finally:
            await asyncio.wait([written])
            await asyncio.to_thread(remove_tree, self._layout.tmp(attempt))

    def _write(self, attempt: int, slot: Slot[Run], accepted: Accepted, is_ours: bool) -> Fork:
        """In a thread: the child's folder and job."""
        layout, target = self._layout, accepted.target
        folder = layout.tmp(attempt)
        folder.mkdir(parents=True, mode=0o700)
        job = Job(
            attempt=attempt,
            task_id=target.task_id,
            task_type=accepted.type.name,
            runner=accepted.type.runner,
            extra=accepted.type.extra,
            task=accepted.task,
            out_dir=str(target.out_dir),
            results_dir=str(layout.results_dir),
            cache_dir=str(layout.cache_dir),
            tmp_dir=str(folder),
            limits=layout.limits,
            permits=layout.permits,
            gateway=layout.gateway,
        )
        (folder / JOB_FILE).write_bytes(encode_json(job))
        log = f"ahead-{slot.plan.name}.log"
        (layout.log_dir / log).write_bytes(b"")
        for given in (folder / JOB_FILE, folder):
            layout.give(given)
        entry = EVERYTHING if is_ours else WHAT_IS_HERE
        limits = task_limits(layout, cpus=slot.plan.cpus, private_shm=False)
        return helper_fork(layout, attempt, entry, folder, log, env=accepted.spec.env, limits=limits, as_task=True)


def _is_busy(slot: Slot[Run]) -> bool:
    """Whether a task has run in the slot for some time that will end: a served model is seldom over soon."""
    run = slot.current
    return run is not None and run.task.state is State.RUNNING and run.runtime_s >= AFTER_S and run.serving is None


def _told(prepared: Prepared) -> dict[str, float]:
    return {
        "seconds": prepared.seconds,
        "read_bytes": prepared.read_bytes,
        **({"cpu_seconds": prepared.cpu_seconds} if prepared.cpu_seconds else {}),
    }
