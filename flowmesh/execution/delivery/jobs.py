"""What there is to deliver of an ended task, and its delivery where that takes a moment only. Most of it
blocks."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.errors import DeliveryError
from flowmesh.execution import task_events
from flowmesh.execution.housekeeping import task_logs
from flowmesh.execution.layout import Layout
from flowmesh.execution.run import Run
from flowmesh.files.folder import Folder
from flowmesh.files.walk import Troubles
from flowmesh.messages.job import OUTCOME_FILE, Outcome
from flowmesh.messages.rows import document_key
from flowmesh.results import delivery
from flowmesh.results.job import DeliveryJob, DeliveryReport, Failure
from flowmesh.results.partial import has_rows
from flowmesh.results.s3_access import access_of
from flowmesh.results.safe_files import read_regular
from flowmesh.settings.schema import Settings
from flowmesh.settings.secret_files import has_token

INLINE_BYTES = 1024 * 1024
"""A task's folder up to this size is hashed in a thread of the node; a larger one in a child."""
INLINE_FILES = 200
TINY_BYTES = 64 * 1024
TINY_FILES = 16
"""Up to these it is not worth a thread."""
TAIL_LINES = 200
"""Of a failed task's log, in responses.json; at most 64 KiB."""

_outcome_decoder = msgspec.json.Decoder(Outcome)


class Jobs:
    def __init__(self, settings: Settings, layout: Layout) -> None:
        self._settings = settings
        self._layout = layout

    def write_small(
        self, run: Run, *, must_wait: bool = False, tiny: bool = False
    ) -> tuple[DeliveryJob, DeliveryReport | None, bool]:
        """Make the task's delivery job, and do what belongs on the disk at once if its results are small.

        Args:
            must_wait: what is sent over the network has to wait; else its process also writes to the disk.
            tiny: whether it is known to be small.

        Returns:
            the job, its report if it was done, and whether results are on disk.

        Raises:
            DeliveryError: the outcome that the task left is not valid.
            OSError: it cannot be read.
        """
        job = self._job(run)
        if must_wait and job.failure is not None:  # its event does not wait for a server that is away
            job = msgspec.structs.replace(job, sends_rows=False)
        if (job.over_http and not must_wait) or job.exporter or not (tiny or self._is_small(run)):
            return job, None, False
        outcome = None
        if job.failure is None:
            path = self._layout.spool(run.attempt) / OUTCOME_FILE
            try:
                outcome = _outcome_decoder.decode(read_regular(path, INLINE_BYTES))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise DeliveryError(f"the result that the task left is not valid JSON ({error})") from error
        report = delivery.deliver(delivery.only_local(job) if job.over_http else job, outcome)
        if job.over_http and report.ok:
            return job, None, True
        if not report.ok and job.failure is None:
            with contextlib.suppress(OSError):  # for `flowmesh deliver`, if this disk takes it
                delivery.write_job(job, self._layout.spool(run.attempt))
        return job, report, True

    def _job(self, run: Run) -> DeliveryJob:
        settings, accepted, verdict = self._settings, run.accepted, run.task.verdict
        assert verdict is not None, "a task is delivered when its verdict is known"
        failure = None
        out_dir = Path(accepted.target.out_dir)
        keep = accepted.spec.retainLogs or not verdict.ok
        task_logs.finish_logs(out_dir, keep=keep, limit_bytes=settings.tasks.log_max_bytes)
        if not verdict.ok:
            redact = task_events.redactor(run, self._layout)
            run.log_tail = tuple(redact(task_logs.log_tail(out_dir)).splitlines()[-TAIL_LINES:])
            failure = Failure(
                error=redact(verdict.message),
                error_kind=verdict.kind.value,
                detail=redact(run.outcome.detail) if run.outcome is not None else "",
                evidence=verdict.evidence,
                log_tail=run.log_tail,
                warnings=() if run.outcome is None else run.outcome.warnings,
            )
        sends_rows = failure is not None and any(
            has_rows(Path(each.out_dir)) for each in (accepted.target, *accepted.children)
        )
        children = {each.task_id: each.spec for each in accepted.message.merged_children or []}
        exports = _exports({run.task_id: accepted.task["spec"], **children}) if sends_rows else {}
        return DeliveryJob(
            attempt=run.attempt,
            worker_id=run.worker_id,
            task=accepted.target,
            children=accepted.children,
            failure=failure,
            sends_rows=sends_rows,
            document=document_key(accepted.task["spec"]) if sends_rows else "",
            child_documents={each: document_key(spec) for each, spec in children.items()} if sends_rows else {},
            exporter=accepted.type.exporter if exports else "",
            exports=exports,
            extra=task_events.used(run, settings.node.cost_per_hour * run.slot.plan.share),
            outcome_file=OUTCOME_FILE,
            archive=settings.archive,
            cleanup_after_upload=settings.delivery.cleanup_after_upload,
            orchestrator_url=settings.delivery.orchestrator_url,
            s3=access_of(settings.cloud),
            bandwidth_bytes_per_sec=settings.delivery.bandwidth_bytes_per_sec,
            throttle_file=str(self._layout.state_dir / "throttle"),
            total_timeout_s=settings.delivery.total_timeout_s,
            token_expected=has_token(settings.delivery),
            ends_to_wait=True,
        )

    def renewed(self, job: DeliveryJob) -> DeliveryJob:
        """An earlier job under today's settings."""
        settings = self._settings
        return msgspec.structs.replace(
            job,
            archive=settings.archive,
            cleanup_after_upload=settings.delivery.cleanup_after_upload,
            orchestrator_url=settings.delivery.orchestrator_url,
            s3=access_of(settings.cloud),
            bandwidth_bytes_per_sec=settings.delivery.bandwidth_bytes_per_sec,
            total_timeout_s=settings.delivery.total_timeout_s,
            token_expected=has_token(settings.delivery),
            ends_to_wait=True,
        )

    def is_tiny(self, run: Run) -> bool:
        """Whether all that a task has left, logs included, is a few small files. Quick enough for the loop."""
        return not run.accepted.children and self._is_within(run, TINY_BYTES, TINY_FILES)

    def _is_small(self, run: Run) -> bool:
        """Whether writing and hashing the results takes no noticeable time."""
        return self._is_within(run, INLINE_BYTES, INLINE_FILES)

    def _is_within(self, run: Run, most_bytes: int, most_files: int) -> bool:
        try:
            total = (self._layout.spool(run.attempt) / OUTCOME_FILE).lstat().st_size
        except OSError:
            total = 0
        try:
            with Folder.open(Path(run.accepted.target.out_dir)) as folder:
                for count, entry in enumerate(folder.entries(Troubles()), 1):
                    total += 0 if entry.is_folder else entry.status.st_size
                    if total > most_bytes or count > most_files:
                        return False
        except OSError:  # it was never made, or was replaced; the delivery finds out
            pass
        return total <= most_bytes


def _exports(specs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`spec.postprocess` of the tasks that ask for an export."""
    asked = {task_id: spec.get("postprocess") for task_id, spec in specs.items()}
    return {each: given for each, given in asked.items() if isinstance(given, dict) and given.get("jsonl_export")}
