"""Sends again what was computed and did not arrive: `flowmesh deliver`.

The task's end was told when its delivery failed, and is not told again: only the journal's verdict changes. A try that
is cut short, by whatever, changes nothing; the next one goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from loguru import logger

from flowmesh.errors import DeliveryError
from flowmesh.execution import layout
from flowmesh.messages.job import Exit
from flowmesh.processes.pipe import Credentials, FrameError, Pipe
from flowmesh.processes.protocol import Fork
from flowmesh.results import delivery
from flowmesh.results.files import read_note
from flowmesh.results.job import DELIVERED_FILE, DELIVERY_FILE, DeliveryJob, DeliveryReport
from flowmesh.tasks.journal import Record
from flowmesh.tasks.types import DELIVERY
from flowmesh.tasks.verdicts import Kind, Verdict, describe_exit

if TYPE_CHECKING:
    from flowmesh.execution.executor import Executor


class Redelivery:
    """One try."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.over: asyncio.Future[Exit | str] = asyncio.get_running_loop().create_future()
        """How its child ended, or why there is none."""
        self.pipe: Pipe | None = None
        self.stopped = ""
        """Why it is not to go on."""


class Redeliveries:
    """Shares the places of all deliveries. By attempt, as they are."""

    def __init__(self, executor: Executor, places: asyncio.Semaphore) -> None:
        self._executor = executor
        self._places = places
        self._tries: dict[int, Redelivery] = {}

    def __bool__(self) -> bool:
        return bool(self._tries)

    def __contains__(self, attempt: int) -> bool:
        return attempt in self._tries

    def check(self, record: Record) -> None:
        """Whether there is something to send.

        Raises:
            DeliveryError: there is not, and why.
        """
        verdict, task_id = record.task.verdict, record.task_id
        if record.attempt in self._tries:
            raise DeliveryError(f"{task_id}: it is being delivered now")
        if verdict is None:
            raise DeliveryError(f"{task_id}: it has not ended yet; it is delivered when it has")
        if verdict.ok:
            raise DeliveryError(f"{task_id}: it was delivered already; its results are in {record.out_dir}")
        if verdict.kind is not Kind.DELIVERY_FAILED:
            raise DeliveryError(f"{task_id}: it has no result to deliver ({verdict.kind}: {verdict.message})")

    async def send(self, record: Record, make_fork: Callable[[int], Fork]) -> DeliveryReport:
        """Try once more, within `delivery.total_timeout_s`; waits for one of the places first.

        Args:
            make_fork: says how an attempt's delivery child is to be made.

        Raises:
            DeliveryError: it did not arrive; everything is still there for another try.
        """
        self.check(record)
        attempt = record.attempt
        this = self._tries[attempt] = Redelivery(record)
        self._executor.look_idle()
        try:
            async with self._places:
                report = await self._send(this, make_fork(attempt))
        finally:
            self._close(this)
            del self._tries[attempt]
            self._executor.look_idle()
        self._note(record)
        await asyncio.to_thread(layout.remove_tree, self._executor.layout.spool(attempt))
        return report

    async def _send(self, this: Redelivery, fork: Fork) -> DeliveryReport:
        record, executor = this.record, self._executor
        spool = executor.layout.spool(record.attempt)
        told = logger.bind(task=record.task_id)
        try:
            await asyncio.to_thread(self._renew, record, spool)
            if not this.stopped:
                told.info("delivery tried again, as asked")
                await executor.fleet.launch(DELIVERY, fork, lambda _server: None)
        except OSError as error:
            raise DeliveryError(f"{record.task_id}: {error.filename or spool}: {error.strerror}") from error
        end = this.stopped or await this.over
        report = await asyncio.to_thread(delivery.read_report, spool)
        if report is None:
            why = this.stopped or (end if isinstance(end, str) else f"its process ended: {describe_exit(end)}")
            raise DeliveryError(f"{record.task_id}: the delivery was cut short ({why}); try again")
        for note in report.notes:
            told.info("delivery: {}", note)
        if not report.ok:
            told.warning("delivery failed again: {}", report.error)
            raise DeliveryError(f"{record.task_id}: {report.error}")
        return report

    def _renew(self, record: Record, spool: Path) -> None:
        """The job under the settings of today, and no word of the last try's failure."""
        job = read_note(spool / DELIVERY_FILE, DeliveryJob)
        if job is None:
            message = f"{record.task_id}: nothing of it waits here any more; what there is lies in {record.out_dir}"
            raise DeliveryError(message)
        settings = self._executor.settings
        renewed = msgspec.structs.replace(
            job,
            archive=settings.archive,
            cleanup_after_upload=settings.delivery.cleanup_after_upload,
            orchestrator_url=settings.delivery.orchestrator_url,
            bandwidth_bytes_per_sec=settings.delivery.bandwidth_bytes_per_sec,
            total_timeout_s=settings.delivery.total_timeout_s,
        )
        delivery.write_job(renewed, spool)
        last = delivery.read_report(spool)
        if last is not None and not last.ok:
            (spool / DELIVERED_FILE).unlink()

    def _note(self, record: Record) -> None:
        verdict = record.task.verdict
        assert verdict is not None, "checked before it was sent"
        said = f"delivered when asked again, after: {verdict.message}"
        task = msgspec.structs.replace(record.task, verdict=Verdict(kind=Kind.OK, evidence=said, exit=verdict.exit))
        self._executor.journal.update(record.attempt, task)
        logger.bind(task=record.task_id).info("task delivered")

    # ---- stops -------------------------------------------------------------------------------------------------------

    def stop(self, why: str, task_id: str | None = None) -> None:
        """End those of a task, or all; what has arrived is not sent again by the next try."""
        for attempt, this in self._tries.items():
            if task_id in (None, this.record.task_id):
                this.stopped = why
                self._executor.fleet.kill(-attempt)

    # ---- the child ---------------------------------------------------------------------------------------------------

    def on_forked(self, attempt: int, pipe: Pipe) -> None:
        this = self._tries[attempt]
        this.pipe = pipe
        asyncio.get_running_loop().add_reader(pipe.fileno(), self._read, this)
        if this.stopped:
            self._executor.fleet.kill(-attempt)
            return
        with contextlib.suppress(OSError):  # it is gone already, and on_gone comes
            pipe.send(Credentials(self._executor.settings.delivery.orchestrator_token), drop=True)

    def on_over(self, attempt: int, end: Exit | str) -> None:
        over = self._tries[attempt].over
        if not over.done():
            over.set_result(end)

    def _read(self, this: Redelivery) -> None:
        """Nobody watches its progress; but a pipe that is full would hold it up."""
        try:
            while this.pipe is not None and this.pipe.poll() is not None:
                pass
        except (EOFError, FrameError):
            self._close(this)

    def _close(self, this: Redelivery) -> None:
        if this.pipe is not None:
            asyncio.get_running_loop().remove_reader(this.pipe.fileno())
            this.pipe.close()
            this.pipe = None
