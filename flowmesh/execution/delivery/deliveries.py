"""Delivers the results of ended tasks: small local ones here, all others in a child.

The slot was free before the first byte. `run` returns the event that ends the task.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from loguru import logger

from flowmesh.errors import FlowMeshError, LaunchError
from flowmesh.execution.delivery.attempts import Attempts, Ended
from flowmesh.execution.delivery.delivery_children import DeliveryChildren
from flowmesh.execution.delivery.jobs import Jobs
from flowmesh.execution.housekeeping.cleanup import Cleanup
from flowmesh.execution.layout import Layout
from flowmesh.execution.near_disk import NearDisk
from flowmesh.execution.ports import Work
from flowmesh.execution.run import Run, progress_event
from flowmesh.messages.job import Exit
from flowmesh.processes.pipe import Frame, Phase, Progress
from flowmesh.results.job import DeliveryReport
from flowmesh.tasks import machine
from flowmesh.tasks.catalogue import DELIVERY

MAX_TRIES = 3
"""A delivery whose child died this often without a report has failed."""


class DeliveryEnvironment(Protocol):
    """The node's conditions, as far as deliveries need them: see `EnvironmentConditions`."""

    @property
    def wait_s(self) -> float: ...

    def report(self, environment: str, reason: str) -> None: ...

    async def works(self, environment: str, stopped: Callable[[], bool], until: float) -> bool: ...


_CANCELLED = machine.Delivered("cancelled while delivering")


class Delivery:
    """One run's delivery."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.aborted = False
        self.attempts: Attempts | None = None
        self.until = 0.0
        """How long it may wait for its environment, monotonic; 0: it has not had to."""

    @property
    def succeeded(self) -> bool:
        """Whether the task itself did."""
        return self.run.task.verdict is not None and self.run.task.verdict.ok


class Deliveries:
    """
    Args:
        environment: where it is reported, and awaited, that delivery children cannot be started.
    """

    def __init__(
        self,
        children: DeliveryChildren,
        jobs: Jobs,
        layout: Layout,
        cleanup: Cleanup,
        *,
        environment: DeliveryEnvironment,
        disk: NearDisk,
    ) -> None:
        self.left: set[int] = set()
        """Attempts whose sending was left to the next supervisor, because this one has to end."""
        self._children = children
        self._jobs = jobs
        self._layout = layout
        self._cleanup = cleanup
        self._environment = environment
        self._disk = disk
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
        this.attempts = Attempts(
            self._children,
            self._layout,
            attempt=run.attempt,
            task_id=run.task_id,
            targets=(run.accepted.target, *run.accepted.children) if this.succeeded else (),
            stopped=lambda: self._is_stopped(this),
            on_frame=lambda frame: _report(run, frame),
            on_wait=run.wait_for,
        )
        child = self._children.resume(run.attempt, lambda frame: _report(run, frame)) if adopted else None
        return self._run(this, this.attempts, child)

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
        if this.attempts is not None:
            this.attempts.stop()

    async def _run(self, this: Delivery, attempts: Attempts, child: Awaitable[Exit] | None) -> machine.Event | None:
        run = this.run
        why, tries = "", 0
        try:
            while tries < MAX_TRIES:
                tries += 1
                try:
                    sent = await self._once(this, attempts, child)
                except LaunchError as error:
                    child = None
                    if not await self._can_start(this, str(error)):
                        return self._stopped(this) if self._is_stopped(this) else _not_started(error)
                    tries -= 1
                    continue
                child = None
                match sent:
                    case DeliveryReport():
                        run.delivered = sent
                        return machine.Delivered("" if sent.ok else sent.error)
                    case None:
                        if this.aborted:
                            await attempts.give_up()
                        return self._stopped(this)
                    case str(why):
                        logger.bind(task=run.task_id).warning("delivery starts again: {}", why)
            return machine.Delivered(f"the delivery failed {MAX_TRIES} times: {why}")
        except (FlowMeshError, OSError) as error:
            return _not_started(error)
        finally:
            del self._deliveries[run.attempt]

    async def _once(self, this: Delivery, attempts: Attempts, child: Awaitable[Exit] | None) -> Ended:
        if child is None:
            return await self._write_and_send(this, attempts)
        await self._cleanup.remove_tmp(this.run)
        return await attempts.attend(child)

    async def _can_start(self, this: Delivery, reason: str) -> bool:
        """Report that delivery children cannot be started; wait until they can, if there is a computed result."""
        self._environment.report(DELIVERY, reason)
        if not this.succeeded:
            return False
        this.until = this.until or time.monotonic() + self._environment.wait_s
        this.run.wait_for(reason)
        works = await self._environment.works(DELIVERY, lambda: self._is_stopped(this), this.until)
        this.run.wait_for("")
        return works

    async def _write_and_send(self, this: Delivery, attempts: Attempts) -> DeliveryReport | str | None:
        """Its report; why to try again; None: it was stopped."""
        must_wait = attempts.must_wait
        try:
            if this.aborted:
                return None
            if self._disk.has(this.run.accepted.target.out_dir) and self._jobs.is_tiny(this.run):
                written_small = self._disk.run(self._jobs.write_small, this.run, must_wait=must_wait, tiny=True)
            else:
                written_small = asyncio.to_thread(self._jobs.write_small, this.run, must_wait=must_wait)
            job, report, written = await written_small
        finally:
            await self._cleanup.remove_tmp(this.run)
        if report is not None:
            return report
        if must_wait and not written and job.over_http:
            await attempts.write_locally(job)
        return None if self._is_stopped(this) else await attempts.send(job)

    def _is_stopped(self, this: Delivery) -> bool:
        return this.aborted or (self._suspended and this.succeeded)

    def _stopped(self, this: Delivery) -> machine.Event | None:
        if this.aborted:
            return _CANCELLED
        self.left.add(this.run.attempt)
        return None


def _not_started(error: Exception) -> machine.Event:
    return machine.Delivered(f"the delivery could not be started: {error}")


def _report(run: Run, frame: Frame) -> None:
    """What a delivery child sends, to those who watch the task."""
    if isinstance(frame, Progress):
        run.progress = frame
        run.notify(progress_event(frame))
    elif isinstance(frame, Phase):
        run.enter(frame.name)
