"""Has each ended task's results written and sent: small local ones in a thread, all others in a child of their own.

A delivery child is forked from a server of its own kind, under the attempt's negative number: it is adopted, killed and
reaped like a task. How many run at once is bounded; the slot was free before the first byte.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from loguru import logger

from flowmesh.errors import DeliveryError, FlowMeshError
from flowmesh.execution import layout as files
from flowmesh.execution import task_events
from flowmesh.execution.delivery.redelivery import Redeliveries
from flowmesh.execution.housekeeping import task_logs
from flowmesh.execution.run import Run, progress_event
from flowmesh.messages.job import OUTCOME_FILE, Exit, Outcome
from flowmesh.processes import environ
from flowmesh.processes.limits import Limits
from flowmesh.processes.pipe import Credentials, FrameError, Phase, Pipe, Progress
from flowmesh.processes.protocol import Fork
from flowmesh.results import delivery
from flowmesh.results.files import below, read_regular
from flowmesh.results.job import DeliveryJob, DeliveryReport, Failure
from flowmesh.tasks import machine
from flowmesh.tasks.machine import State
from flowmesh.tasks.types import DELIVERY
from flowmesh.tasks.verdicts import describe_exit

if TYPE_CHECKING:
    from flowmesh.execution.executor import Executor

ENTRY = "flowmesh.results.child:main"
INLINE_BYTES = 1024 * 1024
"""A task's folder up to this size is hashed in a thread of the node's; a larger one in a child."""
INLINE_FILES = 200
TAIL_LINES = 200
"""What responses.json has of a failed task's log, at most 64 KiB."""
MAX_TRIES = 3
"""Times that a delivery child may die without a word before the delivery counts as failed."""


_outcome_decoder = msgspec.json.Decoder(Outcome)


class Deliveries:
    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._pipes: dict[int, Pipe] = {}
        self._tries: dict[int, int] = {}
        self._aborted: set[int] = set()
        self._places = asyncio.Semaphore(executor.settings.delivery.concurrency)
        self._holding: set[int] = set()
        self._waiting: set[int] = set()
        """For a place; they have no child that could be told to stop."""
        self.left: set[int] = set()
        """Attempts whose sending is left to the next supervisor, because this one has to end now."""
        self._suspended = False
        self.again = Redeliveries(executor, self._places)

    # ---- start -------------------------------------------------------------------------------------------------------

    async def start(self, run: Run) -> None:
        """Write, and where the destination says so send, what a task left."""
        if (job := await self.write(run)) is not None:
            await self.send(run, job)

    async def write(self, run: Run) -> DeliveryJob | None:
        """Write what a task left, where that is a matter of a moment; else the job that `send` is to do."""
        if run.attempt in self._aborted:
            self._done(run, "cancelled while delivering")
            return None
        try:
            job, report = await asyncio.to_thread(self._write_small, run)
            if report is None:
                return job
            if not report.ok and job.failure is None:  # for another try, if this disk takes it
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(delivery.write_job, job, self._executor.layout.spool(run.attempt))
            self._done(run, "" if report.ok else report.error)
        except OSError as error:
            self._not_started(run, error)
        return None

    async def send(self, run: Run, job: DeliveryJob) -> None:
        """Have a child of its own do the job, once one of the places is free."""
        executor = self._executor
        try:
            if run.attempt in self._aborted:
                self._done(run, "cancelled while delivering")
                return
            if self._suspended and job.failure is None:
                self._leave(run)
                return
            self._waiting.add(run.attempt)
            await self._places.acquire()
            self._holding.add(run.attempt)
            self._waiting.discard(run.attempt)
            if run.task.state is not State.DELIVERING or run.attempt in self.left:  # stopped while it waited
                self._give_back(run.attempt)
                return
            await asyncio.to_thread(delivery.write_job, job, executor.layout.spool(run.attempt))
            await executor.fleet.launch(DELIVERY, self.fork(run.attempt), lambda _server: None)
            if run.attempt in self._aborted or (self._suspended and job.failure is None):  # since before it had a child
                executor.fleet.kill(-run.attempt)
        except (FlowMeshError, OSError) as error:
            self._not_started(run, error)

    def _not_started(self, run: Run, error: object) -> None:
        self._done(run, f"the delivery could not be started: {error}")

    def abort(self, run: Run) -> None:
        """Stop sending; the report then says so."""
        if run.attempt in self._waiting:
            self._done(run, "cancelled while delivering")
            return
        self._aborted.add(run.attempt)
        self._executor.fleet.kill(-run.attempt)

    def suspend(self) -> None:
        """Stop all sending, and leave it to the next supervisor: results are on disk, and the journal knows of them."""
        self._suspended = True
        self.again.stop("the node ends")
        for run in list(self._executor.runs.values()):
            if run.task.state is State.DELIVERING and run.task.verdict is not None and run.task.verdict.ok:
                self._executor.fleet.kill(-run.attempt)
                if run.attempt in self._waiting:
                    self._leave(run)

    def _leave(self, run: Run) -> None:
        self._close(run.attempt)
        self._give_back(run.attempt)
        self.left.add(run.attempt)
        self._executor.look_idle()

    def _job(self, run: Run) -> DeliveryJob:
        settings, accepted = self._executor.settings, run.accepted
        verdict = run.task.verdict
        assert verdict is not None, "a task is delivered when its verdict is known"
        failure = None
        out_dir = Path(accepted.target.out_dir)
        task_logs.tell_troubles(task_logs.bound_logs([out_dir / "logs"], settings.tasks.log_max_bytes))
        task_logs.finish_logs(out_dir, keep=accepted.spec.retainLogs or not verdict.ok)
        if not verdict.ok:
            run.log_tail = tuple(task_logs.log_tail(out_dir).splitlines()[-TAIL_LINES:])
            failure = Failure(
                error=verdict.message,
                error_kind=verdict.kind.value,
                detail=run.outcome.detail if run.outcome is not None else "",
                evidence=verdict.evidence,
                log_tail=run.log_tail,
            )
        return DeliveryJob(
            attempt=run.attempt,
            worker_id=run.worker_id,
            task=accepted.target,
            children=accepted.children,
            failure=failure,
            extra=task_events.used(run, settings.node.cost_per_hour * run.slot.plan.share),
            outcome_file=OUTCOME_FILE,
            archive=settings.archive,
            cleanup_after_upload=settings.delivery.cleanup_after_upload,
            orchestrator_url=settings.delivery.orchestrator_url,
            bandwidth_bytes_per_sec=settings.delivery.bandwidth_bytes_per_sec,
            throttle_file=str(self._executor.layout.state_dir / "throttle"),
            total_timeout_s=settings.delivery.total_timeout_s,
        )

    def _write_small(self, run: Run) -> tuple[DeliveryJob, DeliveryReport | None]:
        """In a thread: the job, and where it is a matter of a moment, its report."""
        job = self._job(run)
        if job.over_http or not _is_small(run, self._executor.layout):
            return job, None
        outcome = None
        if job.failure is None:
            path = self._executor.layout.spool(run.attempt) / OUTCOME_FILE
            try:
                outcome = _outcome_decoder.decode(read_regular(path, INLINE_BYTES))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise DeliveryError(f"the result that the task left is no JSON ({error})") from error
        return job, delivery.deliver(job, outcome)

    def fork(self, attempt: int) -> Fork:
        """How an attempt's delivery child is made."""
        layout = self._executor.layout
        spool = layout.spool(attempt)
        log = str(layout.log_dir / "delivery.log")
        return Fork(
            attempt=-attempt,
            target=ENTRY,
            spool=str(spool),
            cwd=str(layout.work_dir),
            stdout=log,
            stderr=log,
            env=environ.for_task(
                layout.base_env,
                task_env={},
                tmp_dir=str(spool),
                threads=1,
                gpus=(),
                mark=layout.mark_of(-attempt),
            ),
            limits=Limits(),
        )

    # ---- the child ---------------------------------------------------------------------------------------------------

    def on_forked(self, attempt: int, pipe: Pipe) -> None:
        if attempt in self.again:
            self.again.on_forked(attempt, pipe)
            return
        run = self._executor.runs.get(attempt)
        if run is None or run.task.state is not State.DELIVERING:
            pipe.close()
            self._executor.fleet.kill(-attempt)
            return
        self._pipes[attempt] = pipe
        asyncio.get_running_loop().add_reader(pipe.fileno(), self._read, run)
        try:
            pipe.send(Credentials(self._executor.settings.delivery.orchestrator_token), drop=True)
        except OSError as error:
            logger.bind(task=run.task_id).debug("a delivery child did not listen: {}", error)

    def on_failed(self, attempt: int, message: str) -> None:
        if attempt in self.again:
            self.again.on_over(attempt, message)
        elif run := self._executor.runs.get(attempt):
            self._not_started(run, message)

    def on_gone(self, attempt: int, exit_: Exit) -> None:
        self._executor.fleet.forget(-attempt)
        self._close(attempt)
        if attempt in self.again:
            self.again.on_over(attempt, exit_)
            return
        run = self._executor.runs.get(attempt)
        if run is None or run.task.state is not State.DELIVERING:
            return
        report = delivery.read_report(self._executor.layout.spool(attempt))
        if report is not None:
            for note in report.notes:
                logger.bind(task=run.task_id).info("delivery: {}", note)
            self._done(run, "" if report.ok else report.error)
        elif attempt in self._aborted:
            self._done(run, "cancelled while delivering")
        elif self._suspended:
            self._leave(run)
        else:
            self._again(run, f"its process ended without a report ({describe_exit(exit_)})")

    def on_lost(self, attempt: int) -> None:
        self._close(attempt)
        if attempt in self.again:
            self.again.on_over(attempt, "its fork server died")
            return
        run = self._executor.runs.get(attempt)
        if run is not None and run.task.state is State.DELIVERING:
            self._again(run, "its fork server died")

    def adopted(self, run: Run) -> None:
        """A delivery that an earlier supervisor started goes on; it holds one of the places."""
        if not self._places.locked():
            self._executor.spawn(self._hold(run))

    async def _hold(self, run: Run) -> None:
        await self._places.acquire()
        self._holding.add(run.attempt)
        if run.task.state is not State.DELIVERING:  # it was over before it could be counted
            self._give_back(run.attempt)

    def _again(self, run: Run, why: str) -> None:
        """What has arrived is not sent again; what has not is tried once more."""
        tries = self._tries[run.attempt] = self._tries.get(run.attempt, 0) + 1
        self._give_back(run.attempt)
        if tries >= MAX_TRIES:
            self._done(run, f"the delivery failed {tries} times: {why}")
            return
        logger.bind(task=run.task_id).warning("delivery begins again: {}", why)
        self._executor.spawn(self.start(run), run)

    def _read(self, run: Run) -> None:
        pipe = self._pipes.get(run.attempt)
        try:
            while pipe is not None and (frame := pipe.poll()) is not None:
                if isinstance(frame, Progress):
                    run.progress = frame
                    run.tell(progress_event(frame))
                elif isinstance(frame, Phase):
                    run.enter(frame.name)
        except (EOFError, FrameError):
            self._close(run.attempt)

    def _close(self, attempt: int) -> None:
        if (pipe := self._pipes.pop(attempt, None)) is not None:
            asyncio.get_running_loop().remove_reader(pipe.fileno())
            pipe.close()

    def _give_back(self, attempt: int) -> None:
        if attempt in self._holding:
            self._holding.discard(attempt)
            self._places.release()

    def _done(self, run: Run, error: str) -> None:
        self._close(run.attempt)
        self._give_back(run.attempt)
        self._tries.pop(run.attempt, None)
        self._aborted.discard(run.attempt)
        if run.task.state is State.DELIVERING:
            self._executor.apply(run, machine.Delivered(error))


def _is_small(run: Run, layout: files.Layout) -> bool:
    """Whether writing and hashing what the task left takes no noticeable time."""
    try:
        total = (layout.spool(run.attempt) / OUTCOME_FILE).lstat().st_size
    except OSError:
        total = 0
    for count, entry in enumerate(below(run.accepted.target.out_dir), 1):
        with contextlib.suppress(OSError):
            total += entry.stat(follow_symlinks=False).st_size
        if total > INLINE_BYTES or count > INLINE_FILES:
            return False
    return total <= INLINE_BYTES
