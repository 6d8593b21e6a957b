"""`flowmesh deliver`: sends results again whose delivery failed.

The task's terminal event was sent when its delivery failed, and is not sent again: only the journal's verdict changes.
A try that is interrupted changes nothing; the next one continues where it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
from loguru import logger

from flowmesh.errors import DeliveryError, LaunchError
from flowmesh.execution.delivery.attempts import Attempts, Ended
from flowmesh.execution.delivery.delivery_children import DeliveryChildren
from flowmesh.execution.delivery.jobs import Jobs
from flowmesh.execution.housekeeping.removal import remove_tree
from flowmesh.execution.layout import Layout
from flowmesh.results import delivery
from flowmesh.results.delivery_state import DeliveryState
from flowmesh.results.job import DELIVERY_FILE, DeliveryJob, DeliveryReport
from flowmesh.results.safe_files import read_note
from flowmesh.tasks.journal import Journal, Record
from flowmesh.tasks.verdicts import Kind, Verdict


class Redelivery:
    """One try."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.stopped = ""
        """Why it was stopped; empty if it was not."""
        self.attempts: Attempts | None = None
        self.waits_for = ""


class Redeliveries:
    """
    Args:
        on_change: called when a try begins or ends.
    """

    def __init__(
        self, children: DeliveryChildren, jobs: Jobs, layout: Layout, journal: Journal, on_change: Callable[[], None]
    ) -> None:
        self._children = children
        self._jobs = jobs
        self._layout = layout
        self._journal = journal
        self._on_change = on_change
        self._tries: dict[int, Redelivery] = {}
        """By attempt."""

    def __bool__(self) -> bool:
        return bool(self._tries)

    async def send(self, record: Record) -> DeliveryReport:
        """Send it within `delivery.total_timeout_s`; an attempt waits until another delivery to that origin may run.

        Raises:
            DeliveryError: there is nothing to send, or it did not arrive; everything is kept for another try.
        """
        self._check(record)
        attempt = record.attempt
        this = self._tries[attempt] = Redelivery(record)
        self._on_change()
        try:
            report = await self._send(this)
        finally:
            del self._tries[attempt]
            self._on_change()
        self._note(record)
        await asyncio.to_thread(remove_tree, self._layout.spool(attempt))
        return report

    def stop(self, why: str, task_id: str | None = None) -> None:
        """Stop the tries of a task, or all. What has arrived is not sent again by the next try."""
        for this in self._tries.values():
            if task_id in (None, this.record.task_id):
                this.stopped = why
                if this.attempts is not None:
                    this.attempts.stop()

    def _check(self, record: Record) -> None:
        verdict, task_id = record.task.verdict, record.task_id
        if record.attempt in self._tries:
            raise DeliveryError(f"{task_id}: it is being delivered now")
        if verdict is None:
            raise DeliveryError(f"{task_id}: it has not ended yet; it is delivered when it has")
        if verdict.ok:
            raise DeliveryError(f"{task_id}: it was delivered already; its results are in {record.out_dir}")
        if verdict.kind is not Kind.DELIVERY_FAILED:
            raise DeliveryError(f"{task_id}: it has no result to deliver ({verdict.kind}: {verdict.message})")

    async def _send(self, this: Redelivery) -> DeliveryReport:
        record = this.record
        spool = self._layout.spool(record.attempt)
        bound = logger.bind(task=record.task_id)
        report: Ended = None
        why = ""
        try:
            job = await asyncio.to_thread(self._renew, record, spool)
            if not this.stopped:
                bound.info("delivery started again on request")
                this.attempts = self._attempts(this, job)
                report = await this.attempts.send(job)
        except LaunchError as error:
            why = str(error)
        except OSError as error:
            raise DeliveryError(f"{record.task_id}: {error.filename or spool}: {error.strerror}") from error
        if not isinstance(report, DeliveryReport):
            why = this.stopped or report or why
            raise DeliveryError(f"{record.task_id}: the delivery was interrupted ({why}); try again")
        if not report.ok:
            bound.warning("delivery failed again: {}", report.error)
            raise DeliveryError(f"{record.task_id}: {report.error}")
        return report

    def waits(self) -> dict[str, str]:
        """By task id, what each delivery waits for; empty: it is being sent."""
        return {this.record.task_id: this.waits_for for this in self._tries.values()}

    def _attempts(self, this: Redelivery, job: DeliveryJob) -> Attempts:
        def on_wait(what: str) -> None:
            this.waits_for = what

        return Attempts(
            self._children,
            self._layout,
            attempt=this.record.attempt,
            task_id=this.record.task_id,
            targets=(job.task, *job.children),
            stopped=lambda: bool(this.stopped),
            on_wait=on_wait,
        )

    def _renew(self, record: Record, spool: Path) -> DeliveryJob:
        """The job under today's settings; the last try's failure and its attempts are forgotten."""
        job = read_note(spool / DELIVERY_FILE, DeliveryJob)
        if job is None:
            message = f"{record.task_id}: this node keeps nothing of it for delivery; see {record.out_dir}"
            raise DeliveryError(message)
        delivery.forget_report(spool)
        DeliveryState(record.attempt, spool, record.task_id).forget_tries()
        return self._jobs.renewed(job)

    def _note(self, record: Record) -> None:
        verdict = record.task.verdict
        assert verdict is not None, "checked before it was sent"
        evidence = f"delivered on request, after: {verdict.message}"
        task = msgspec.structs.replace(record.task, verdict=Verdict(kind=Kind.OK, evidence=evidence, exit=verdict.exit))
        self._journal.update(record.attempt, task)
        logger.bind(task=record.task_id).info("task delivered")
