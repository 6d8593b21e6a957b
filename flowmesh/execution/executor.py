"""Runs tasks: feeds what happens into each task's state machine, and does what the machine then says.

Everything here is on the event loop. Whatever touches a disk that may be slow runs in a thread and comes back as an
event. The journal is written before an action is taken, so a crash at any line finds the truth on disk.
"""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Callable, Coroutine
from typing import Any

from loguru import logger

from flowmesh.errors import FlowMeshError
from flowmesh.execution import deliveries, events, files
from flowmesh.execution.early import EarlyCancels
from flowmesh.execution.hearing import Hearing
from flowmesh.execution.hooks import Counters, Hooks
from flowmesh.execution.launches import Launches
from flowmesh.execution.release import Devices
from flowmesh.execution.room import Room
from flowmesh.execution.run import Run
from flowmesh.messages.job import JOB_FILE, OUTCOME_FILE, Exit, Outcome
from flowmesh.messages.wire import (
    TASK_EVENTS_CHANNEL,
    utc_now,
)
from flowmesh.node.slots import Slot
from flowmesh.processes import shm
from flowmesh.processes.fleet import Callbacks, Fleet
from flowmesh.processes.pipe import Cancel
from flowmesh.settings_schema import Settings
from flowmesh.tasks import machine
from flowmesh.tasks.journal import Journal, JournalError
from flowmesh.tasks.machine import Level, State, step
from flowmesh.tasks.types import LIGHT, Catalogue
from flowmesh.tasks.verdicts import Kind, Stop, Verdict

JOURNAL_RETRY_S = 1.0
NOT_STARTED = "the node drains; the task had not started"


class Executor:
    def __init__(
        self,
        *,
        settings: Settings,
        catalogue: Catalogue,
        journal: Journal,
        slots: dict[str, Slot[Run]],
        layout: files.Layout,
        hooks: Hooks,
    ) -> None:
        self.runs: dict[int, Run] = {}
        self.by_id: dict[str, Run] = {}
        self.counters = Counters()
        self.draining: str | None = None
        self.fleet: Fleet  # set by the supervisor, which builds it with `callbacks`
        self.devices: Devices  # likewise
        self.settings = settings
        self.catalogue = catalogue
        self.journal = journal
        self.slots = slots
        self.layout = layout
        self.hooks = hooks
        self.deliveries = deliveries.Deliveries(self)
        self.launches = Launches(self)
        self.hearing = Hearing()
        self.room = Room(self)
        self.early_cancels = EarlyCancels()
        self._idle = asyncio.Event()
        self._idle.set()
        self._background: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    @property
    def callbacks(self) -> Callbacks:
        return Callbacks(
            on_forked=self.launches.on_forked,
            on_fork_failed=self.launches.on_fork_failed,
            on_gone=self._on_gone,
            on_lost=self._on_lost,
        )

    # ---- what the node wants -----------------------------------------------------------------------------------------

    def adopt(self, run: Run) -> None:
        """Have the run among those that the executor answers for."""
        self.runs[run.attempt] = run
        self.by_id[run.task_id] = run
        self._idle.clear()
        self.deliveries.again.stop("the task came again", run.task_id)

    def holds(self, slot: Slot[Run]) -> bool:
        """Whether a task of this slot has not ended yet; one that is being delivered has not."""
        return any(run.slot is slot for run in self.runs.values())

    def pump(self, slot: Slot[Run]) -> None:
        """Give the slot to the next task that waits, where it is free."""
        while (run := slot.next()) is not None:
            self.apply(run, machine.SlotGranted())

    def cancel(self, task_id: str, *, reason: str = "cancelled", force: bool = False, checkpoint: bool = False) -> str:
        """Stop a task; says in which state it was met. One that is unknown is remembered, should it still come."""
        run = self.by_id.get(task_id)
        if run is None:
            self.early_cancels.add(task_id)
            return "unknown"
        state = run.task.state
        self.apply(run, machine.StopRequested(Stop.CANCEL, reason, checkpoint=checkpoint, force=force))
        return state.value

    def drain(self, mode: str) -> None:
        """Take no more tasks. Waiting ones go back; running ones finish, or stop with or without a checkpoint."""
        self.draining = mode
        for run in list(self.runs.values()):
            if run.task.state is State.QUEUED:
                self.apply(run, machine.StopRequested(Stop.DRAIN, NOT_STARTED))
            elif mode != "finish":
                detail = "the node drains"
                stop = machine.StopRequested(Stop.DRAIN, detail, checkpoint=mode == "checkpoint", force=mode == "now")
                self.apply(run, stop)
        if mode == "now":
            self.deliveries.suspend()

    async def idle(self) -> None:
        """Wait until no task is left here, delivered ones included; in a drain "now" their sending is left undone."""
        await self._idle.wait()

    def look_idle(self) -> None:
        """Tell `idle()` where nothing keeps the node any more."""
        if self.runs.keys() <= self.deliveries.left and not self.deliveries.again:
            self._idle.set()
        else:
            self._idle.clear()

    # ---- the machine -------------------------------------------------------------------------------------------------

    def apply(self, run: Run, event: machine.Event) -> None:
        """One step of a run's life: decide, write down, act."""
        before = run.task
        try:
            task, actions = step(run.task, event)
        except machine.InvalidTransition as error:
            logger.bind(task=run.task_id).error("event ignored: {}", error)
            return
        run.task = task
        try:
            if machine.AnnounceStarted() in actions:
                self.launches.start_clock(run)
                with self.journal.transaction():
                    self.journal.started(run.attempt, run.task, run.started_at or utc_now(), run.boot_mark)
                    self.journal.post(TASK_EVENTS_CHANNEL, events.started(run))
                self.hooks.on_posted()
            elif not isinstance(event, machine.Delivered):
                self.journal.update(run.attempt, run.task)
        except JournalError as error:
            run.task = before
            self._later(run, error, self.apply, run, event)
            return
        if run.task.state is State.STOPPING and run.waiting is not None:
            run.waiting.cancel()
        if run.task.state is not before.state:
            run.tell({"event": "state", "state": run.task.state.value})
        for action in actions:
            self._do(run, action)

    def _later(self, run: Run, error: JournalError, step: Callable[..., None], *arguments: Any) -> None:
        """What could not be written down has not happened; it is tried again, for as long as it takes."""
        logger.bind(task=run.task_id).error("{}; tried again in {:g} s", error, JOURNAL_RETRY_S)
        self._loop.call_later(JOURNAL_RETRY_S, step, *arguments)

    def _do(self, run: Run, action: machine.Action) -> None:
        match action:
            case machine.Launch():
                self.hooks.on_slot_taken(run.slot, run)
                self.spawn(self.launches.start(run), run)
            case machine.AnnounceStarted():
                self.launches.arm_timeout(run)
            case machine.AskToStop(reason=reason, checkpoint=checkpoint):
                self.hearing.say(run, Cancel(reason, checkpoint))
            case machine.Terminate():
                self.fleet.terminate(run.attempt)
            case machine.KillTree():
                self.fleet.kill(run.attempt)
            case machine.ArmGrace(level=level):
                grace_s = self.settings.tasks.cancel_grace_s if level is Level.ASK else self.settings.tasks.term_grace_s
                run.timers.append(self._loop.call_later(grace_s, self.apply, run, machine.GraceOver()))
            case machine.Release():
                self._end_process(run)
                self.spawn(self.release(run), run)
            case machine.LeaveQueue():
                run.slot.queue.remove(run)
            case machine.Requeue():
                self._requeue(run)
            case machine.FreeSlot():
                self._free(run)
            case machine.Deliver():
                self.spawn(self.deliver(run), run)
            case machine.AbortDelivery():
                self.deliveries.abort(run)
            case machine.Finish(verdict=verdict):
                self._finish(run, verdict)

    def spawn(self, work: Coroutine[Any, Any, None], run: Run | None = None) -> None:
        """Run something beside the loop's callbacks; an error in it is the node's, and is logged once.

        Args:
            run: who waits for it. It goes on where the node failed at it: every task ends.
        """
        task = self._loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(lambda task: self._ended(task, run))

    def _ended(self, task: asyncio.Task[None], run: Run | None) -> None:
        self._background.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        logger.bind(task=run and run.task_id).opt(exception=error).error("the node failed at a task")
        if run is None:
            return
        message = f"the node failed at it: {type(error).__name__}: {error}"
        match run.task.state:
            case State.LAUNCHING | State.RUNNING | State.STOPPING if run.pid is not None and run.exit is None:
                self.fleet.kill(run.attempt)  # and then hears how it ended
            case State.LAUNCHING | State.RUNNING | State.STOPPING:
                self.apply(run, machine.ChildLost(message))
            case State.RELEASING:
                self.apply(run, machine.Released())
            case State.DELIVERING:
                self.apply(run, machine.Delivered(message))
            case _:
                pass  # it goes on without

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _on_gone(self, attempt: int, exit_: Exit) -> None:
        if attempt < 0:
            self.deliveries.on_gone(-attempt, exit_)
        elif attempt in self.devices.canaries:
            self.devices.canaries.on_gone(attempt, exit_)
        elif run := self.runs.get(attempt):
            if run.task.state in (State.LAUNCHING, State.RUNNING, State.STOPPING):
                self.spawn(self._collect(run, exit_), run)
            elif run.task.state in (State.DELIVERING, State.DONE):
                self.fleet.forget(attempt)
        else:
            self.fleet.forget(attempt)

    async def _collect(self, run: Run, exit_: Exit) -> None:
        self.hearing.read(run)
        run.exit = exit_
        run.outcome = await self.read_outcome(run)
        fault = await self.devices.fault_of(run, exit_, run.outcome) if run.gpus else ""
        self.apply(run, machine.ChildGone(exit_, run.outcome, fault))

    def _on_lost(self, attempt: int, message: str) -> None:
        if attempt < 0:
            self.deliveries.on_lost(-attempt)
        elif attempt in self.devices.canaries:
            self.devices.canaries.on_failed(attempt, message)
        elif run := self.runs.get(attempt):
            self.spawn(self.lose(run, message, Kind.NODE_FAULT), run)

    async def lose(self, run: Run, message: str, kind: Kind) -> None:
        """Its process is gone and nobody knows how; what it left on disk still counts."""
        run.pid = None
        run.outcome = await self.read_outcome(run)
        if run.task.state in (State.LAUNCHING, State.RUNNING, State.STOPPING):
            self.apply(run, machine.ChildLost(message, run.outcome, kind))

    async def read_outcome(self, run: Run) -> Outcome | None:
        path = self.layout.spool(run.attempt)
        try:
            small = files.outcome_is_small(path)
            if small:
                outcome = files.read_outcome(path, files.SMALL_BYTES)
            else:
                outcome = await asyncio.to_thread(files.read_outcome, path)
        except FlowMeshError as error:
            logger.bind(task=run.task_id).warning("{}", error)
            return None
        return outcome if outcome is not None and outcome.attempt == run.attempt else None

    def _end_process(self, run: Run) -> None:
        run.end_clock()
        run.end_timers()
        self.hearing.close(run)

    async def release(self, run: Run) -> None:
        """Nothing of it is left but, perhaps, what it had on its GPUs.

        Its notes must be gone before the journal has it as being delivered: after a restart they are the delivery's.
        """
        if not files.taken_back(self.layout, run.attempt):
            await asyncio.to_thread(files.remove_strays, self.layout.spool(run.attempt))
        run.resources = files.usage(run)
        await self.devices.end(run)
        self.apply(run, machine.Released())

    def _requeue(self, run: Run) -> None:
        run.slot.free(run)
        run.slot.queue.appendleft(run)
        if self.draining is not None:  # which waits for nobody
            self.apply(run, machine.StopRequested(Stop.DRAIN, NOT_STARTED))
        self.pump(run.slot)
        self.hooks.on_slot_changed(run.slot)

    def _free(self, run: Run) -> None:
        run.slot.free(run)
        self.fleet.forget(run.attempt)
        self.pump(run.slot)
        if run.slot.current is None:
            self.hooks.on_slot_free(run.slot, run)

    async def deliver(self, run: Run) -> None:
        """Results first, where they take a moment; then what it left behind goes; then what takes longer is sent."""
        try:
            job = await self.deliveries.write(run)
        finally:
            await self.clean(run)
        if job is not None:
            await self.deliveries.send(run, job)

    async def clean(self, run: Run) -> None:
        """Have what a task left in the node's own places removed, once nobody of it is there to use it."""
        shared = run.accepted.type.environment != LIGHT or run.task.verdict is None or not run.task.verdict.ok
        if not files.removed_empty(self.layout.tmp(run.attempt)) or shared:
            await asyncio.to_thread(self._clean_up, run, shared)

    def _clean_up(self, run: Run, shared: bool) -> None:
        files.remove_tree(self.layout.tmp(run.attempt))
        if shared:
            for name in shm.sweep(_started_by_any_clock(run) - 1.0):
                logger.bind(task=run.task_id, name=name).info("shared memory that it left was removed")

    def _finish(self, run: Run, verdict: Verdict) -> None:
        now = utc_now()
        cost = self.settings.node.cost_per_hour * run.slot.plan.share
        base_env = self.layout.base_env
        event = events.ended(run, verdict, finished_at=now, cost_per_hour=cost, base_env=base_env)
        try:
            self.journal.finish(run.attempt, run.task, now, TASK_EVENTS_CHANNEL, event)
        except JournalError as error:
            self._later(run, error, self._finish, run, verdict)
            return
        self.hooks.on_posted()
        del self.runs[run.attempt]
        if self.by_id.get(run.task_id) is run:
            del self.by_id[run.task_id]
        self.count(verdict.kind)
        facts = {"verdict": verdict.kind.value, "runtime_s": round(run.runtime_s, 3), "evidence": verdict.evidence}
        told = logger.bind(task=run.task_id, **facts)
        if verdict.ok:
            told.info("task succeeded")
        else:
            told.warning("task failed: {}", verdict.message)
        run.tell(
            {
                "event": "end",
                "ok": verdict.ok,
                "verdict": verdict.kind.value,
                "error": verdict.message,
                "out_dir": run.accepted.target.out_dir,
            }
        )
        if verdict.kind is not Kind.DELIVERY_FAILED:  # what was computed and not delivered stays, for another try
            self.spawn(self._forget(run))
        self.look_idle()

    async def _forget(self, run: Run) -> None:
        if not files.removed_empty(spool := self.layout.spool(run.attempt), but=(JOB_FILE, OUTCOME_FILE)):
            await asyncio.to_thread(files.remove_tree, spool)

    def count(self, kind: Kind) -> None:
        self.counters.verdicts[kind.value] = self.counters.verdicts.get(kind.value, 0) + 1


def _started_by_any_clock(run: Run) -> float:
    """Seconds of the epoch, the earlier of what it was then and of what it would be by now: the clock may be set."""
    counted_back = time.time() - run.runtime_s
    if run.started_at is None:
        return counted_back
    return min(counted_back, datetime.datetime.fromisoformat(run.started_at).timestamp())
