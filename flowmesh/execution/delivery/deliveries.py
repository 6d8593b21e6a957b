"""Delivers the results of ended tasks: small local ones in a thread, all others in a child.

The slot was free before the first byte. `run` returns the event that ends the task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from loguru import logger

from flowmesh.errors import FlowMeshError, LaunchError
from flowmesh.execution.delivery.delivery_children import DeliveryChildren
from flowmesh.execution.delivery.jobs import Jobs
from flowmesh.execution.housekeeping.cleanup import Cleanup
from flowmesh.execution.layout import Layout
from flowmesh.execution.ports import Work
from flowmesh.execution.run import Run, progress_event
from flowmesh.messages.job import Exit
from flowmesh.processes.helper import HelperLost
from flowmesh.processes.pipe import Frame, Phase, Progress
from flowmesh.results import delivery
from flowmesh.results.job import DeliveryJob
from flowmesh.tasks import machine
from flowmesh.tasks.verdicts import describe_exit

MAX_TRIES = 3
"""A delivery whose child died this often without a report has failed."""

_CANCELLED = machine.Delivered("cancelled while delivering")


class Delivery:
    """One run's delivery."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.aborted = False
        self.waiting: asyncio.Task[bool] | None = None
        """For a place; there is no child yet that could be killed."""

    @property
    def succeeded(self) -> bool:
        """Whether the task itself did."""
        return self.run.task.verdict is not None and self.run.task.verdict.ok


class Deliveries:
    def __init__(self, children: DeliveryChildren, jobs: Jobs, layout: Layout, cleanup: Cleanup) -> None:
        self.left: set[int] = set()
        """Attempts whose sending was left to the next supervisor, because this one has to end."""
        self._children = children
        self._jobs = jobs
        self._layout = layout
        self._cleanup = cleanup
        self._suspended = False
        self._deliveries: dict[int, Delivery] = {}

    def run(self, run: Run, *, adopted: bool = False) -> Work:
        """Write the run's results, and send them if their destination says so.

        Args:
            adopted: a child that an earlier supervisor started is at it.

        Returns:
            Delivered; None if sending is left to the next supervisor.
        """
        this = self._deliveries[run.attempt] = Delivery(run)
        child = self._children.resume(run.attempt, lambda frame: _report(run, frame)) if adopted else None
        return self._run(this, child)

    def abort(self, run: Run) -> None:
        """Stop sending; `run` then returns a Delivered with an error."""
        if (this := self._deliveries.get(run.attempt)) is not None:
            this.aborted = True
            self._stop(this)

    def suspend(self) -> None:
        """Stop sending and leave it to the next supervisor: results are on disk, and the journal has the tasks."""
        self._suspended = True
        for this in self._deliveries.values():
            if this.succeeded:
                self._stop(this)

    def resume(self) -> None:
        """New deliveries send again; those that were suspended stay so."""
        self._suspended = False

    def _stop(self, this: Delivery) -> None:
        if this.waiting is not None:
            this.waiting.cancel()
        else:
            self._children.kill(this.run.attempt)

    async def _run(self, this: Delivery, child: Awaitable[Exit] | None) -> machine.Event | None:
        run = this.run
        try:
            for _ in range(MAX_TRIES):
                if child is None:
                    sent = await self._write_and_send(this)
                else:
                    sent = await self._attend_adopted(this, child)
                    child = None
                if not isinstance(sent, str):
                    return sent
                logger.bind(task=run.task_id).warning("delivery starts again: {}", sent)
            return machine.Delivered(f"the delivery failed {MAX_TRIES} times: {sent}")
        except (FlowMeshError, OSError) as error:
            return machine.Delivered(f"the delivery could not be started: {error}")
        finally:
            del self._deliveries[run.attempt]

    async def _write_and_send(self, this: Delivery) -> machine.Event | str | None:
        """One try: the event to return, None if it is left to the next supervisor, or why to try again."""
        try:
            if this.aborted:
                return _CANCELLED
            job, report = await asyncio.to_thread(self._jobs.write_small, this.run)
        finally:
            await self._cleanup.remove_tmp(this.run)
        if report is not None:
            return machine.Delivered("" if report.ok else report.error)
        if self._is_stopped(this) or not await self._take_place(this):
            return self._stopped(this)
        try:
            return await self._send(this, job)
        finally:
            self._children.places.release()

    async def _take_place(self, this: Delivery) -> bool:
        """False if the delivery was stopped while it waited."""
        this.waiting = asyncio.create_task(self._children.places.acquire())
        try:
            await asyncio.wait({this.waiting})
            return not this.waiting.cancelled()
        finally:
            this.waiting = None

    async def _send(self, this: Delivery, job: DeliveryJob) -> machine.Event | str | None:
        attempt = this.run.attempt
        await asyncio.to_thread(delivery.write_job, job, self._layout.spool(attempt))
        if self._is_stopped(this):
            return self._stopped(this)
        return await self._attend(this, self._children.run(attempt, lambda frame: _report(this.run, frame)))

    async def _attend_adopted(self, this: Delivery, child: Awaitable[Exit]) -> machine.Event | str | None:
        """It counts as one of the children that run at once, unless there are as many as may already."""
        await self._cleanup.remove_tmp(this.run)
        places = self._children.places
        held = not places.locked() and await places.acquire()
        try:
            return await self._attend(this, child)
        finally:
            if held:
                places.release()

    async def _attend(self, this: Delivery, child: Awaitable[Exit]) -> machine.Event | str | None:
        """Wait for the child; its report says how it went.

        Raises:
            LaunchError: there was no child.
        """
        try:
            exit_ = await child
            why = f"its process ended without a report ({describe_exit(exit_)})"
        except HelperLost as error:
            why = str(error)
        except LaunchError:
            if self._is_stopped(this):
                return self._stopped(this)
            raise
        report = delivery.read_report(self._layout.spool(this.run.attempt))
        if report is not None:
            for note in report.notes:
                logger.bind(task=this.run.task_id).info("delivery: {}", note)
            return machine.Delivered("" if report.ok else report.error)
        return self._stopped(this) if self._is_stopped(this) else why

    def _is_stopped(self, this: Delivery) -> bool:
        return this.aborted or (self._suspended and this.succeeded)

    def _stopped(self, this: Delivery) -> machine.Event | None:
        if this.aborted:
            return _CANCELLED
        self.left.add(this.run.attempt)
        return None


def _report(run: Run, frame: Frame) -> None:
    """What a delivery child sends, to those who watch the task."""
    if isinstance(frame, Progress):
        run.progress = frame
        run.notify(progress_event(frame))
    elif isinstance(frame, Phase):
        run.enter(frame.name)
