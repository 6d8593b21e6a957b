"""Runs tasks: feeds events into each task's state machine, and carries out the actions that it returns.

Everything here is on the event loop. What may block runs in a thread or a child, as a coroutine that returns the next
event. The journal is written before an action is taken, so after a crash at any line the truth is on disk.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from loguru import logger

from flowmesh.execution import task_events
from flowmesh.execution.background import Background
from flowmesh.execution.counters import Counters
from flowmesh.execution.early_cancels import EarlyCancels
from flowmesh.execution.ending import Ending, report
from flowmesh.execution.gpu.canary import FIRST_ATTEMPT as FIRST_CANARY
from flowmesh.execution.gpu.idle_check import IdleCheck, Notes
from flowmesh.execution.gpu.live_notes import LiveNotes
from flowmesh.execution.housekeeping.old_history import keep_pruned
from flowmesh.execution.housekeeping.retention import Retention
from flowmesh.execution.housekeeping.watchdog import Watchdog
from flowmesh.execution.launch import spool
from flowmesh.execution.launch.node_folders import JOURNAL
from flowmesh.execution.layout import Layout
from flowmesh.execution.observer import Observers
from flowmesh.execution.parts import make_parts
from flowmesh.execution.ports import Ports, SendingsOf, Work
from flowmesh.execution.recent_ends import RecentEnds
from flowmesh.execution.run import Run
from flowmesh.execution.run_table import RunTable
from flowmesh.execution.time_left import TimeLeft
from flowmesh.execution.timers import Timers
from flowmesh.execution.unwritten import Unwritten
from flowmesh.messages.wire import utc_now
from flowmesh.node.devices import GpuInfo
from flowmesh.node.metrics import HeartbeatObserver
from flowmesh.node.nvml.client import Nvml
from flowmesh.node.power import PowerMeter
from flowmesh.node.slots import Slot
from flowmesh.processes.child_owner import ChildOwner
from flowmesh.processes.pipe import Cancel
from flowmesh.processes.server_pool import ServerPool
from flowmesh.queue import reports
from flowmesh.settings.schema import Settings
from flowmesh.tasks import machine
from flowmesh.tasks.catalogue import Catalogue
from flowmesh.tasks.journal import Journal, JournalError
from flowmesh.tasks.machine import State, step
from flowmesh.tasks.verdicts import Kind, Stop, Verdict

NOT_STARTED = "the node is draining; the task had not started"


class Executor:
    """
    Args:
        slots: by worker id.
        gpus: those that the slots have.
        sendings_of: what webhooks are told of a task's end.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        catalogue: Catalogue,
        journal: Journal,
        slots: dict[str, Slot[Run]],
        layout: Layout,
        pool: ServerPool,
        nvml: Nvml,
        power: PowerMeter,
        gpus: Sequence[GpuInfo],
        sendings_of: SendingsOf = lambda _: (),
    ) -> None:
        self.sendings_of = sendings_of
        self.settings = settings
        self.catalogue = catalogue
        self.journal = journal
        self.slots = slots
        self.layout = layout
        self.pool = pool
        self.runs = RunTable()
        self.counters = Counters()
        self.recent = RecentEnds(layout)
        self.early_cancels = EarlyCancels()
        self.observers = Observers()
        self.time_left = TimeLeft.of(settings)
        self.draining: str | None = None
        """The mode of the drain, if the node is draining."""
        self.begin = Background(self.apply, self._after_error, self._check_idle).begin
        self._unwritten = Unwritten()
        self._idle = asyncio.Event()
        self._idle.set()
        self._timers = Timers(settings.tasks, self.apply)
        self.parts = parts = make_parts(
            settings=settings,
            catalogue=catalogue,
            journal=journal,
            slots=slots,
            layout=layout,
            pool=pool,
            nvml=nvml,
            power=power,
            gpus=gpus,
            runs=self.runs,
            observers=self.observers,
            timers=self._timers,
            ports=Ports(
                post=self.apply,
                begin=self.begin,
                pump=self.pump,
                on_fault_over=self._on_fault_over,
                check_idle=self._check_idle,
            ),
        )
        self._ending = Ending(settings.node, layout, journal, gpus, sendings_of)
        self._pipes, self._launcher, self._folders = parts.pipes, parts.launcher, parts.folders
        self._deliveries, self._redeliveries = parts.deliveries, parts.redeliveries

    def works(self) -> list[Coroutine[Any, Any, None]]:
        """What runs for as long as the node does."""
        watchdog = Watchdog(self.settings.tasks, self.runs, self.layout.log_dir, self.apply, self.begin)
        retention = Retention(
            settings=self.settings.results,
            results_dir=self.layout.results_dir,
            journal=self.journal,
            in_use=self.runs.folders,
        )
        pruning = keep_pruned(self.settings.node, self.journal)
        works = [watchdog.run(), retention.run(), pruning, self.parts.gpus.sample(), self._folders.watch()]
        return [*works, self.parts.ahead.run()] if self.settings.tasks.prepare_next else works

    async def look_first(self) -> None:
        """Before tasks of an earlier supervisor are taken over: whether the node's folders are where they were."""
        await self._folders.look_first()

    def owner_of(self, attempt: int) -> ChildOwner:
        """Who answers for a child that an earlier supervisor forked: its attempt number shows what it is."""
        return self.parts.helpers if attempt < 0 or attempt >= FIRST_CANARY else self.parts.children

    def heartbeat_observer(self, slot: Slot[Run]) -> HeartbeatObserver:
        live = LiveNotes(
            slot,
            self.parts.gpus,
            runs=self.runs,
            recent=self.recent,
            layout=self.layout,
            cost_per_hour=self.settings.node.cost_per_hour * slot.plan.share,
        )
        return IdleCheck(self.parts.gpus, slot, self.begin, live) if slot.plan.gpus else Notes(slot, live)

    def offered_types(self) -> list[str]:
        """The task types that can run now, sorted."""
        broken = self.parts.environments.broken
        return sorted(each.name for each in self.catalogue.offered.values() if each.environment not in broken)

    def add(self, run: Run) -> None:
        """Answer for this run from now on."""
        self.runs.add(run)
        self._idle.clear()
        self._redeliveries.stop("there is a new attempt at the task", run.task_id)

    def pump(self, slot: Slot[Run]) -> None:
        """Give the slot to the next task that waits for it, if it is free."""
        while self.draining is None and not self._unwritten and (run := slot.next()) is not None:
            self.apply(run, machine.SlotGranted())
        if slot.current is None and slot.queue:
            self.observers.on_slot_changed(slot)  # what waits there waits for a fault, and the slot may say so now

    def cancel(self, task_id: str, *, reason: str = "cancelled", force: bool = False, checkpoint: bool = False) -> str:
        """Stop a task; if the node does not have it, remember the cancel in case it still comes.

        Returns:
            the state that the task was in; "unknown" if the node does not have it.
        """
        run = self.runs.of_task(task_id) or self.runs.of_gang(task_id)
        if run is None:
            self.early_cancels.add(task_id)
            return "unknown"
        state = run.task.state
        self.apply(run, machine.StopRequested(Stop.CANCEL, reason, checkpoint=checkpoint, force=force))
        return state.value

    def drain(self, mode: str) -> None:
        """Take no more tasks. Waiting ones go back; running ones finish, or stop with or without a checkpoint."""
        self.draining = mode
        for run in self.runs:
            if run.task.state is State.QUEUED:
                self.apply(run, machine.StopRequested(Stop.DRAIN, NOT_STARTED))
            elif mode != "finish":
                detail = "the node is draining"
                stop = machine.StopRequested(Stop.DRAIN, detail, checkpoint=mode == "checkpoint", force=mode == "now")
                self.apply(run, stop)
        if mode == "now":
            if self._unwritten:  # their stop could not be written down; the journal says that they ran
                for run in self.runs:
                    self.pool.kill(run.attempt)
            self._deliveries.suspend()
            self._redeliveries.stop("the node ends")

    def resume(self) -> None:
        """Take tasks again, after a drain."""
        self.draining = None
        self._deliveries.resume()
        for slot in self.slots.values():
            self.pump(slot)

    async def idle(self) -> None:
        """Wait until every task has ended and was delivered; a drain "now" leaves deliveries to the next supervisor."""
        await self._idle.wait()

    def _check_idle(self) -> None:
        left = self._deliveries.left
        only_left = len(self.runs) <= len(left) and all(run.attempt in left for run in self.runs)
        if only_left and not self._redeliveries:
            self._idle.set()
        else:
            self._idle.clear()

    def apply(self, run: Run, event: machine.Event) -> None:
        """One step of a task's life: decide, write down, act."""
        if self._unwritten:
            self._unwritten.add(functools.partial(self.apply, run, event))
            return
        before = run.task
        try:
            task, actions = step(run.task, event)
        except machine.InvalidTransition as error:
            logger.bind(task=run.task_id).error("event ignored: {}", error)
            return
        run.task = task
        if task.state is not before.state:
            run.timeline.enter(task.state)
        try:
            if machine.AnnounceStarted() in actions:
                run.start_clock()
                with self.journal.transaction():
                    started_at = run.started_at or utc_now()
                    self.journal.started(run.attempt, run.task, started_at, run.boot_mark, run.timeline.marks)
                    self.journal.post(*reports.outgoing(task_events.started(run), run.recorded))
                self.observers.on_posted()
            elif not isinstance(event, machine.Delivered):
                self.journal.update(run.attempt, run.task, run.timeline.marks)
        except JournalError as error:
            run.task = before
            self._when_written(error, functools.partial(self.apply, run, event))
            return
        if run.task.state is State.STOPPING and run.waiting is not None:
            run.waiting.cancel()
        if run.task.state is not before.state:
            run.notify({"event": "state", "state": run.task.state.value})
        for action in actions:
            self._act(run, action)

    def _when_written(self, error: JournalError, step: Callable[[], None]) -> None:
        """A step that could not be journalled has not happened; it is repeated when the journal can be written."""
        self._unwritten.add(step)
        self.on_journal_error(error)

    def on_journal_error(self, error: JournalError) -> None:
        """Something could not be written down: no task is started until the journal can be written again."""
        self._folders.journal_failed(str(error))

    def _on_fault_over(self, name: str) -> None:
        if name == JOURNAL:
            self._unwritten.repeat()

    def _act(self, run: Run, action: machine.Action) -> None:
        match action:
            case machine.Launch():
                self.parts.gateway.need()
                self.observers.on_slot_taken(run.slot, run)
                self.begin(self._launcher.start(run), run)
            case machine.AnnounceStarted():
                self._timers.arm_timeout(run)
            case machine.AskToStop(reason=reason, checkpoint=checkpoint):
                self._pipes.send(run, Cancel(reason, checkpoint, str(run.task.stop or "")))
            case machine.Terminate():
                self.pool.terminate(run.attempt)
            case machine.KillTree():
                self.pool.kill(run.attempt)
            case machine.ArmGrace(level=level):
                self._timers.arm_grace(run, level)
            case machine.Release():
                self.begin(self.release(run), run)
            case machine.LeaveQueue():
                run.slot.queue.remove(run)
                self.observers.on_slot_changed(run.slot)
            case machine.Requeue():
                self._requeue(run)
            case machine.FreeSlot():
                self._free_slot(run)
            case machine.Deliver():
                self.begin(self.deliver(run), run)
            case machine.AbortDelivery():
                self._deliveries.abort(run)
            case machine.Finish(verdict=verdict):
                self._finish(run, verdict)

    def _after_error(self, run: Run, message: str) -> machine.Event | None:
        """What an unhandled error means for a run: whatever happens, its task ends."""
        match run.task.state:
            case State.LAUNCHING | State.RUNNING | State.STOPPING if run.pid is not None and run.exit is None:
                self.pool.kill(run.attempt)  # its end is reported by its fork server
                return None
            case State.LAUNCHING | State.RUNNING | State.STOPPING:
                return machine.ChildLost(message)
            case State.RELEASING:
                return machine.Released()
            case State.DELIVERING:
                return machine.Delivered(message)
            case _:
                return None

    async def release(self, run: Run) -> machine.Event:
        """No process of the task is left: take back its spool folder, and wait until its GPUs are proven free."""
        run.end_clock()
        run.end_timers()
        self._pipes.close(run)
        await spool.take_back(self.layout, run.attempt)
        run.resources = run.usage()
        await self.parts.gpus.end(run)
        return machine.Released()

    def deliver(self, run: Run, *, adopted: bool = False) -> Work:
        """Deliver the run's results; wait while the node's folders cannot be used, and try again what met that.

        Args:
            adopted: a child that an earlier supervisor started is at it; it is claimed at once.
        """
        return self._deliver(run, self._deliveries.run(run, adopted=True) if adopted else None)

    async def _deliver(self, run: Run, work: Work | None) -> machine.Event | None:
        while True:
            if work is None:
                await self._folders.usable(run)
                work = self._deliveries.run(run)
            event, work = await work, None
            if not isinstance(event, machine.Delivered) or not event.error or not await self._folders.failed(run):
                return event

    def _requeue(self, run: Run) -> None:
        run.slot.free(run)
        run.slot.queue.appendleft(run)
        if self.draining is not None:
            self.apply(run, machine.StopRequested(Stop.DRAIN, NOT_STARTED))
        self.pump(run.slot)
        self.observers.on_slot_changed(run.slot)

    def _free_slot(self, run: Run) -> None:
        run.slot.free(run)
        self.pool.forget(run.attempt)
        self.pump(run.slot)
        if run.slot.current is None:
            self.observers.on_slot_free(run.slot, run)

    def _finish(self, run: Run, verdict: Verdict) -> None:
        now = utc_now()
        try:
            event = self._ending.write(run, verdict, finished_at=now)
        except JournalError as error:
            self._when_written(error, functools.partial(self._finish, run, verdict))
            return
        self.observers.on_posted()
        self.runs.remove(run)
        self.counters.add_verdict(verdict.kind)
        self.recent.add(run, verdict, finished_at=now, cost_per_hour=self._ending.cost_per_hour(run))
        self.observers.on_ended(run, verdict)
        report(run, verdict, event)
        if verdict.kind is not Kind.DELIVERY_FAILED:  # its spool folder is kept for `flowmesh deliver`
            self.begin(self.parts.cleanup.remove_spool(run.attempt))
        self._check_idle()
