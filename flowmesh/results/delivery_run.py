"""The steps of one delivery: results on disk first, then archives and files, then the results with their links."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.errors import DeliveryError
from flowmesh.files.folder import Parts
from flowmesh.messages.cloud import Keys
from flowmesh.messages.job import Fault, Outcome
from flowmesh.messages.output import Remote
from flowmesh.messages.rows import ROWS_ARCHIVE, Counts, Kept
from flowmesh.messages.steps import Steps
from flowmesh.processes.pipe import Frame, Phase
from flowmesh.results import partial, responses
from flowmesh.results.delivery_state import DeliveryState
from flowmesh.results.job import DeliveryJob, Failure, PartRows
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

    def __init__(  # noqa: PLR0917
        self,
        job: DeliveryJob,
        outcome: Outcome | None,
        report: Report,
        spool: Path | None,
        token: str | None,
        keys: Keys | None = None,
    ) -> None:
        self.notes: list[str] = []
        """What was done differently than asked."""
        self.rows: Counts | None = None
        """Of a failed task."""
        self.parts: dict[str, PartRows] = {}
        """The same of it and of each merged child."""
        self.steps: Steps | None = None
        """Of a failed training run."""
        if (job.failure or _failure_of(outcome)) is not None:
            job = msgspec.structs.replace(
                job, total_timeout_s=min(job.total_timeout_s, ROWS_TIMEOUT_S), ends_to_wait=False
            )
        self._kept: dict[str, Kept] = {}
        self._exports: dict[str, dict[str, Any]] = {}
        """What their results say of the exports of finished items."""
        self._job = job
        self._outcome = outcome
        self._report = report
        self._failure = job.failure or _failure_of(outcome)
        self._task = TaskFolder(job.task)
        self._children = [TaskFolder(child) for child in job.children]
        self._folders = [self._task, *self._children]
        self._state = DeliveryState(job.attempt, spool, job.task.task_id)
        self.sender = Sender(job, self._state, report, token, keys)

    def run(self) -> None:
        outcome = self._outcome
        if self._failure is not None or outcome is None:
            self._kept = {folder.task_id: partial.read_rows(folder.top) for folder in self._folders}
            documents = {self._task.task_id: self._job.document, **self._job.child_documents}
            for task_id, kept in self._kept.items():
                document = "" if kept.head is None else kept.head.document
                if document and documents.get(task_id, "") not in ("", document):
                    self._kept[task_id] = Kept()
            counts = [kept.counts for kept in self._kept.values() if kept.head is not None]
            self.rows = partial.total(counts) if counts else None
            self.steps = partial.read_steps(self._task.top)
            exported = self._export()
            self.record()
            urls: dict[str, str] = {}
            if self._job.sends_rows and not self._job.only_local:
                urls = self._send_rows(exported)
            self.parts = {
                folder.task_id: partial.part_of(self._kept[folder.task_id], folder, urls.get(folder.task_id))
                for folder in self._folders
                if self._kept[folder.task_id].head is not None
            }
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
                rows |= self._exports.get(folder.task_id, {})
                if folder is self._task and self.steps is not None:
                    rows["steps"] = partial.steps_shown(self.steps)
                folder.result = responses.failure(folder.task_id, self._failure) | rows
            elif folder is not self._task:
                folder.result = responses.child_success(folder.task_id, self._task.result)
            folder.result = responses.with_warnings(folder.result, folder.target.warnings)
            folder.write_result()

    def _export(self) -> dict[str, Parts]:
        """Write the exports of the finished items; returns their paths by task."""
        written: dict[str, Parts] = {}
        for folder in self._folders:
            wanted, kept = self._job.exports.get(folder.task_id), self._kept[folder.task_id]
            if not self._job.exporter or wanted is None or not kept.current:
                continue
            try:
                export = partial.export(self._job.exporter, wanted, kept)
                partial.write_below(folder.top, export.parts, export.data)
            except Exception as error:  # noqa: BLE001 - loaded by name, on what a task wrote
                why = " ".join(str(error).split())
                self.notes.append(f"the finished items of {folder.task_id} were not exported: {why}")
                continue
            written[folder.task_id] = export.parts
            path = str(folder.path.joinpath(*export.parts))
            self._exports[folder.task_id] = {"jsonl_export": {"path": path, "worker_path": path, **export.shown}}
        return written

    def _send_rows(self, exported: dict[str, Parts]) -> dict[str, str]:
        """Best effort: the verdict is known, and its event must not wait long for a server that is away.

        Returns:
            where each task's rows can be downloaded.
        """
        urls: dict[str, str] = {}
        with contextlib.closing(self.sender):
            for folder in self._folders:
                kept = self._kept[folder.task_id]
                if not kept.current or not isinstance(folder.target.destination, Remote):
                    continue
                try:
                    folder.write(ROWS_ARCHIVE, partial.archive(kept))
                    item = item_of(folder, (ROWS_ARCHIVE,), [])
                    self.sender.send_file(item)
                    urls[folder.task_id] = item.url
                    if parts := exported.get(folder.task_id):
                        self.sender.send_file(item_of(folder, parts, []))
                except (DeliveryError, OSError) as error:
                    self.notes.append(
                        f"the rows of {folder.task_id} were not delivered: {' '.join(str(error).split())}"
                    )
        for folder in self._folders:
            folder.write_manifest(self._state.known())
        return urls

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
