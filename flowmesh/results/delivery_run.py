"""The steps of one delivery: results on disk first, then archives and files, then the results with their links."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from flowmesh.errors import DeliveryError
from flowmesh.messages.job import Fault, Outcome
from flowmesh.messages.output import HttpDestination
from flowmesh.messages.rows import ROWS_ARCHIVE, Counts, Kept
from flowmesh.processes.pipe import Frame, Phase
from flowmesh.results import partial, responses
from flowmesh.results.delivery_state import DeliveryState
from flowmesh.results.job import DeliveryJob, Failure
from flowmesh.results.sender import Item, Sender
from flowmesh.results.task_folder import TaskFolder
from flowmesh.results.upload_plan import ARCHIVE_SUFFIX, UploadPlan, item_of

Report = Callable[[Frame], object]
ROWS_TIMEOUT_S = 60.0
"""For the rows of a failed task."""


class DeliveryRun:
    """One run of `delivery.deliver`; the arguments are the same.

    Raises (from its methods):
        DeliveryError, OSError: a file cannot be written, archived or uploaded.
    """

    def __init__(
        self, job: DeliveryJob, outcome: Outcome | None, report: Report, spool: Path | None, token: str | None
    ) -> None:
        self.notes: list[str] = []
        """What was done differently than asked."""
        self.rows: Counts | None = None
        """Of a failed task."""
        self.rows_url: str | None = None
        if (job.failure or _failure_of(outcome)) is not None:
            job = msgspec.structs.replace(
                job, total_timeout_s=min(job.total_timeout_s, ROWS_TIMEOUT_S), ends_to_wait=False
            )
        self._kept: dict[str, Kept] = {}
        self._job = job
        self._outcome = outcome
        self._report = report
        self._failure = job.failure or _failure_of(outcome)
        self._task = TaskFolder(job.task)
        self._children = [TaskFolder(child) for child in job.children]
        self._folders = [self._task, *self._children]
        self._state = DeliveryState(job.attempt, spool, job.task.task_id)
        self.sender = Sender(job, self._state, report, token)

    def run(self) -> None:
        outcome = self._outcome
        if self._failure is not None or outcome is None:
            self._kept = {folder.task_id: partial.read_rows(folder.top) for folder in self._folders}
            head = self._kept[self._task.task_id].head
            if head is not None and head.document and self._job.document not in ("", head.document):
                self._kept[self._task.task_id] = Kept()
            counts = [kept.counts for kept in self._kept.values() if kept.head is not None]
            self.rows = partial.total(counts) if counts else None
            self.record()
            if self._job.sends_rows and not self._job.only_local:
                self._send_rows()
            return
        self._task.result = responses.with_warnings(
            responses.success(outcome, self._job.extra), self._job.task.warnings
        )
        if self._job.only_local or not self._job.over_http:
            self.record()
            return
        self._write_results()  # if the network fails, what was computed can be read here
        with contextlib.closing(self.sender):
            self._report(Phase("archive"))
            plan = UploadPlan(self._job.archive, self._state, self.sender, self.notes)
            items = plan.items(self._task, self._children, outcome)
            self._report(Phase("upload"))
            self._upload(items)
        if self._job.cleanup_after_upload:
            self._clean_up(outcome)

    def record(self) -> None:
        """Write responses.json and manifest.json of every folder, with what is known by now."""
        self._write_results()
        for folder in self._folders:
            folder.write_manifest(self._state.known())

    def close(self) -> None:
        for folder in self._folders:
            folder.close()

    def _write_results(self) -> None:
        for folder in self._folders:
            if self._failure is not None:
                kept = self._kept.get(folder.task_id)
                rows = {} if kept is None else partial.fields(kept)
                folder.result = responses.failure(folder.task_id, self._failure) | rows
            elif folder is not self._task:
                folder.result = responses.child_success(folder.task_id, self._task.result)
            folder.result = responses.with_warnings(folder.result, folder.target.warnings)
            folder.write_result()

    def _send_rows(self) -> None:
        """Best effort: the verdict is known, and its event must not wait long for a server that is away."""
        with contextlib.closing(self.sender):
            for folder in self._folders:
                kept = self._kept[folder.task_id]
                if not kept.current or not isinstance(folder.target.destination, HttpDestination):
                    continue
                try:
                    folder.write(ROWS_ARCHIVE, partial.archive(kept))
                    item = item_of(folder, (ROWS_ARCHIVE,), [])
                    self.sender.send_file(item)
                except (DeliveryError, OSError) as error:
                    self.notes.append(
                        f"the rows of {folder.task_id} were not delivered: {' '.join(str(error).split())}"
                    )
                    continue
                if folder is self._task:
                    self.rows_url = item.url
        for folder in self._folders:
            folder.write_manifest(self._state.known())

    def _upload(self, items: list[Item]) -> None:
        self.sender.expect(items)
        for item in items:
            if not item.last:
                self.sender.send_file(item)
        self.record()  # with the links
        for item in items:
            if item.last:
                self.sender.send_file(item)
        for folder in self._folders:
            self.sender.send_result(folder.target, folder.result)

    def _clean_up(self, outcome: Outcome) -> None:
        """Remove what was uploaded and can be downloaded again. Only after everything has arrived."""
        names = [name for request in outcome.archives for name in (request.folder, request.folder + ARCHIVE_SUFFIX)]
        if not names:
            return
        for name in (*names, "checkpoints", "checkpoints" + ARCHIVE_SUFFIX):
            if left := self._task.remove(name):  # a note only: everything has arrived
                self.notes.append(f"not all of {name} could be removed after its upload: {left}")
        with contextlib.suppress(OSError):
            self._task.write_manifest(self._state.known())


def _failure_of(outcome: Outcome | None) -> Failure | None:
    """What the child reported, where the node has given no verdict."""
    if outcome is None:
        return Failure(error="the task left no result", error_kind="crash")
    if outcome.ok:
        return None
    return Failure(error=outcome.message, error_kind=(outcome.fault or Fault.ERROR).value, detail=outcome.detail)
