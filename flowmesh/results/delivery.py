"""Brings a task's results to where they belong: archives, artifacts, the result with their links, in this order.

`deliver` blocks, and may run again after it was killed at any point: what arrived already is not sent again, and a
failure leaves everything on disk. `main` is the child process around it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.errors import DeliveryError
from flowmesh.messages.job import MAX_OUTCOME_BYTES, Fault, Outcome
from flowmesh.messages.output import HttpDestination
from flowmesh.processes.pipe import VERSION, Finished, Frame, Hello, Phase, Pipe, Progress
from flowmesh.results import responses
from flowmesh.results.files import open_regular, read_note, read_regular, write_atomic
from flowmesh.results.folder import TaskFolder
from flowmesh.results.job import (
    DELIVERED_FILE,
    DELIVERY_FILE,
    STATE_FILE,
    DeliveryJob,
    DeliveryReport,
    Failure,
    State,
)
from flowmesh.results.sending import Item, Sender

Report = Callable[[Frame], object]

PROGRESS_INTERVAL_S = 0.25
_NICE = 5  # archives are packed beside the next task, and behind it

log = logging.getLogger("flowmesh.delivery")


def deliver(
    job: DeliveryJob,
    outcome: Outcome | None,
    report: Report = lambda _: None,
    *,
    spool: Path | None = None,
    token: str | None = None,
) -> DeliveryReport:
    """Write the results of a task, and send them where its destination is HTTP. Never raises for what can go wrong.

    Args:
        outcome: how the run ended; may be None where `job.failure` says why there is none.
        report: gets phases and progress (bytes sent).
        spool: where it is noted what need not be done again; None: nowhere.
        token: ORCHESTRATOR_TOKEN.
    """
    started = time.monotonic()
    delivery = _Delivery(job, outcome, report, spool, token)
    error, status = "", None
    try:
        delivery.run()
    except (DeliveryError, OSError) as failure:
        error = " ".join(str(failure).split()) or type(failure).__name__
        status = getattr(failure, "status", None)
        with contextlib.suppress(OSError):  # what failed may be this very disk; the first error counts
            delivery.record()
    return DeliveryReport(
        ok=not error,
        error=error,
        status=status,
        sent_bytes=delivery.sender.sent_bytes if delivery.sender is not None else 0,
        seconds=round(time.monotonic() - started, 6),
        urls=tuple(delivery.sender.urls) if delivery.sender is not None else (),
        notes=tuple(dict.fromkeys(delivery.notes)),
    )


def main(pipe: Pipe | None, spool: Path, token: str | None = None, *, again: bool = False) -> int:
    """Deliver what `spool`/delivery.json says; leaves delivered.json. 0 where everything arrived, else 1.

    A second process for the same spool waits for the first and then finds its work done.

    Args:
        pipe: gets frames; the delivery goes on without it where the node is gone.
        again: send everything once more, even what arrived.
    """
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    with open(open_regular(spool / DELIVERY_FILE), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if again:
            for name in (DELIVERED_FILE, STATE_FILE):
                (spool / name).unlink(missing_ok=True)
        send = _to(pipe)
        send(Hello(VERSION, os.getpid()))
        done = read_report(spool)
        if done is None or not done.ok:
            done = _deliver_spool(msgspec.json.decode(file.read(), type=DeliveryJob), spool, send, token)
            write_atomic(spool / DELIVERED_FILE, msgspec.json.encode(done), private=True)
        send(Finished(done.ok))
    return 0 if done.ok else 1


def read_report(spool: Path) -> DeliveryReport | None:
    """What the last delivery of this spool folder said; None where none has ended."""
    return read_note(spool / DELIVERED_FILE, DeliveryReport)


def write_job(job: DeliveryJob, spool: Path) -> None:
    """Leave the job for `main`. Only the node's own user may read it: a task's headers may hold its secrets."""
    write_atomic(spool / DELIVERY_FILE, msgspec.json.encode(job), private=True)


def _deliver_spool(job: DeliveryJob, spool: Path, report: Report, token: str | None) -> DeliveryReport:
    try:
        outcome = None
        with contextlib.suppress(FileNotFoundError):
            outcome = msgspec.json.decode(read_regular(spool / job.outcome_file, MAX_OUTCOME_BYTES), type=Outcome)
        done = deliver(job, outcome, report, spool=spool, token=token)
    except Exception as error:
        log.exception("delivery broke down task=%s", job.task.task_id)
        return DeliveryReport(ok=False, error=f"the delivery itself broke down: {type(error).__name__}")
    for note in done.notes:
        log.warning("%s task=%s", note, job.task.task_id)
    log.info("delivery ended task=%s ok=%s bytes=%d %s", job.task.task_id, done.ok, done.sent_bytes, done.error)
    return done


def _to(pipe: Pipe | None) -> Callable[[Frame], None]:
    last = 0.0

    def send(frame: Frame) -> None:
        nonlocal last
        if pipe is None:
            return
        now = time.monotonic()
        if isinstance(frame, Progress) and frame.done != frame.total and now - last < PROGRESS_INTERVAL_S:
            return
        last = now
        with contextlib.suppress(OSError):  # the node is gone; its successor reads delivered.json
            pipe.send(frame, drop=not isinstance(frame, Finished))

    return send


class _Delivery:
    """One run of `deliver`."""

    def __init__(
        self, job: DeliveryJob, outcome: Outcome | None, report: Report, spool: Path | None, token: str | None
    ) -> None:
        self.job = job
        self.notes: list[str] = []
        self.sender: Sender | None = None
        self._outcome = outcome
        self._report = report
        self._spool = spool
        self._token = token
        self._failure = job.failure or _failure_of(outcome)
        self._task = TaskFolder(job.task, self.notes)
        self._children = [TaskFolder(child, self.notes) for child in job.children]
        self._state = self._read_state()

    @property
    def _folders(self) -> list[TaskFolder]:
        return [self._task, *self._children]

    def run(self) -> None:
        if self._failure is not None or self._outcome is None:
            self.record()
            return
        self._task.result = responses.success(self._outcome, self.job.extra)
        if not self.job.over_http:
            self.record()
            return
        self._write_results()  # whatever the network does, what was computed is there to be read
        sender = self.sender = Sender(self.job, self._state, self._note_state, self._report, self._token)
        with contextlib.closing(sender):
            items = self._pack(sender)
            self._send(sender, items)
        if self.job.cleanup_after_upload:
            self._clean_up()

    def record(self) -> None:
        """Write responses.json and manifest.json of every folder, with what is known by now."""
        self._write_results()
        for folder in self._folders:
            folder.write_manifest({path: digest for path, (_, digest) in self._state.archives.items()})

    def _write_results(self) -> None:
        for folder in self._folders:
            if self._failure is not None:
                folder.result = responses.failure(folder.task_id, self._failure)
            elif folder is not self._task:
                folder.result = responses.child_success(folder.task_id, self._task.result)
            folder.write_result()

    # ---- HTTP --------------------------------------------------------------------------------------------------------

    def _pack(self, sender: Sender) -> list[Item]:
        """Everything that is to be sent, folders packed first; large archives leave while they are written."""
        assert self._outcome is not None
        self._report(Phase("archive"))
        items: list[Item] = []
        for folder in self._folders:
            if not isinstance(folder.target.destination, HttpDestination):
                continue
            requests = self._outcome.archives if folder is self._task else ()
            for request in requests:
                archive = folder.pack(request.folder, self.job.archive, self._state, self._note_state, sender)
                items.append(folder.archive_item(request, archive, self._state))
            child = None if folder is self._task else folder.task_id
            fields = self._task.result if child is None else _child_part(self._task.result, child)
            for upload in self._outcome.uploads:
                if upload.child == child:
                    items.append(folder.upload_item(upload, fields))
            for path in folder.target.artifacts:
                item = folder.artifact_item(path, self.job.archive, self._state, self._note_state, sender)
                if item is not None:
                    items.append(item)
        return _once(items)

    def _send(self, sender: Sender, items: list[Item]) -> None:
        self._report(Phase("upload"))
        sender.expect(items)
        for item in items:
            if not item.last:
                sender.send_file(item)
        self.record()  # with the links
        for item in items:
            if item.last:
                sender.send_file(item)
        for folder in self._folders:
            sender.send_result(folder.target, folder.result)

    def _clean_up(self) -> None:
        """Drop what was uploaded and can be had again. Only after everything arrived."""
        assert self._outcome is not None
        dropped = [name for request in self._outcome.archives for name in (request.folder, f"{request.folder}.tar.gz")]
        if not dropped:
            return
        for name in (*dropped, "checkpoints", "checkpoints.tar.gz"):
            path = self._task.path / name
            try:
                if path.is_symlink() or path.is_file():
                    path.unlink()
                elif path.is_dir():
                    shutil.rmtree(path)
            except OSError as error:  # everything has arrived: that stands
                self.notes.append(f"{name} could not be removed after its upload: {error.strerror}")
        with contextlib.suppress(OSError):
            self._task.write_manifest({})

    # ---- what need not be done again ---------------------------------------------------------------------------------

    def _read_state(self) -> State:
        state = None if self._spool is None else read_note(self._spool / STATE_FILE, State)
        if state is not None and state.attempt == self.job.attempt:
            return state
        return State(attempt=self.job.attempt)

    def _note_state(self) -> None:
        if self._spool is None:
            return
        try:
            write_atomic(self._spool / STATE_FILE, msgspec.json.encode(self._state), private=True)
        except OSError as error:  # should this process be killed, more is done again; no reason to fail
            log.warning("state not noted task=%s: %s", self.job.task.task_id, error.strerror)


def _failure_of(outcome: Outcome | None) -> Failure | None:
    """The child's own word, where the node has given no verdict."""
    if outcome is None:
        return Failure(error="the task left no result", error_kind="crash")
    if outcome.ok:
        return None
    return Failure(error=outcome.message, error_kind=(outcome.fault or Fault.ERROR).value, detail=outcome.detail)


def _child_part(result: dict[str, Any], child: str) -> dict[str, Any]:
    children = result.get("children")
    part = children.get(child) if isinstance(children, dict) else None
    return part if isinstance(part, dict) else {}


def _once(items: list[Item]) -> list[Item]:
    """Each file once, however often it was asked for. Two files of one name would overwrite each other."""
    by_key: dict[str, Item] = {}
    for item in items:
        first = by_key.setdefault(item.key, item)
        if first.path != item.path:
            raise DeliveryError(f"{first.path} and {item.path} would both be uploaded as {item.name!r}")
        if first is not item:
            first.fields += item.fields
    return list(by_key.values())
