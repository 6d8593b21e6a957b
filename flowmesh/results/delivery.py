"""Brings a task's results to their destination: archives, artifacts, then the result with their links.

`deliver` blocks, and may run again after it was killed at any point: what has arrived is not sent again, and a failure
leaves everything on disk. `main` is the child process around it, driven by files in the attempt's spool folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from flowmesh.errors import DeliveryError
from flowmesh.messages.cloud import Keys
from flowmesh.messages.job import MAX_OUTCOME_BYTES, Outcome
from flowmesh.messages.text import encode_json
from flowmesh.processes.pipe import VERSION, Finished, Frame, Hello, Pipe, Progress
from flowmesh.results.delivery_run import DeliveryRun, Report
from flowmesh.results.delivery_state import STATE_FILE, DeliveryState
from flowmesh.results.job import DELIVERED_FILE, DELIVERY_FILE, DeliveryJob, DeliveryReport
from flowmesh.results.request_bodies import Postponed
from flowmesh.results.s3_upload import S3Uploads
from flowmesh.results.safe_files import open_regular, read_note, read_regular, write_atomic
from flowmesh.results.throttle import Throttle

PROGRESS_INTERVAL_S = 0.25
GIVE_UP_TIMEOUT_S = 3.0
"""To connect, and for each read."""

log = logging.getLogger("flowmesh.delivery")


def deliver(
    job: DeliveryJob,
    outcome: Outcome | None,
    report: Report = lambda _: None,
    *,
    spool: Path | None = None,
    token: str | None = None,
    keys: Keys | None = None,
) -> DeliveryReport:
    """Write the results of a task, and upload them where its destination is HTTP.

    Disk, network and server errors are in the report; none is raised.

    Args:
        outcome: what the run left behind; may be None where `job.failure` gives the reason.
        report: called with phases, and with progress in bytes sent.
        spool: where the state of the delivery is saved; None: nowhere.
        token: ORCHESTRATOR_TOKEN.
        keys: the node's own access key of S3.
    """
    started = time.monotonic()
    run = DeliveryRun(job, outcome, report, spool, token, keys)
    error, status = "", None
    postponed: Postponed | None = None
    try:
        run.run()
    except Postponed as failure:
        error, status, postponed = str(failure), failure.status, failure
        if failure.attempts == 1:
            with contextlib.suppress(OSError):
                run.record()
    except (DeliveryError, OSError) as failure:
        error = " ".join(str(failure).split()) or type(failure).__name__
        status = getattr(failure, "status", None)
        with contextlib.suppress(OSError):  # the disk itself may have failed; the first error is reported
            run.record()
    finally:
        run.close()
    return DeliveryReport(
        ok=not error,
        error=error,
        status=status,
        sent_bytes=run.sender.sent_bytes,
        seconds=round(time.monotonic() - started, 6),
        urls=tuple(run.sender.urls),
        notes=tuple(dict.fromkeys(run.notes)),
        rows=run.rows,
        parts=run.parts,
        steps=run.steps,
        again_in_s=None if postponed is None else postponed.again_in_s,
        origin="" if postponed is None else postponed.origin,
        attempts=0 if postponed is None else postponed.attempts,
    )


def main(
    pipe: Pipe | None, spool: Path, token: str | None = None, *, keys: Keys | None = None, again: bool = False
) -> int:
    """Carry out `spool`/delivery.json, and leave delivered.json there.

    A second process for the same spool folder waits for the first, and then finds its work done.

    Args:
        pipe: gets frames; the delivery continues if the node is gone.
        token, keys: the node's.
        again: send everything once more, even what has arrived.

    Returns:
        0 where everything arrived, else 1.
    """
    with open(open_regular(spool / DELIVERY_FILE), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if again:
            for name in (DELIVERED_FILE, STATE_FILE):
                (spool / name).unlink(missing_ok=True)
        send = _frame_sender(pipe)
        send(Hello(VERSION, os.getpid()))
        done = read_report(spool)
        if done is None or not done.ok:
            job = msgspec.json.decode(file.read(), type=DeliveryJob)
            if job.gives_up:
                _give_up(job, spool, keys)
                return 0
            done = _deliver_spool(job, spool, send, token, keys)
            if job.only_local:
                return 0 if done.ok else 1
            write_atomic(spool / DELIVERED_FILE, encode_json(done), private=True)
        send(Finished(done.ok))
    return 0 if done.ok else 1


def read_report(spool: Path) -> DeliveryReport | None:
    """The report of the last delivery of this spool folder; None where none has ended."""
    return read_note(spool / DELIVERED_FILE, DeliveryReport)


def forget_report(spool: Path) -> None:
    """Remove the report of an attempt that failed, so that it is not taken for the next one's.

    Raises:
        OSError: it cannot be removed.
    """
    report = read_report(spool)
    if report is not None and not report.ok:
        (spool / DELIVERED_FILE).unlink()


def only_local(job: DeliveryJob) -> DeliveryJob:
    """The job without its sending."""
    return msgspec.structs.replace(job, only_local=True)


def has_begun(attempt: int, spool: Path) -> bool:
    """Whether S3 keeps parts of files for this delivery."""
    return bool(DeliveryState(attempt, spool, "").begun)


def write_give_up(spool: Path) -> None:
    """Make the job in `spool` one that gives up.

    Raises:
        OSError: it cannot be written.
    """
    job = read_note(spool / DELIVERY_FILE, DeliveryJob)
    if job is not None:
        write_job(msgspec.structs.replace(job, gives_up=True), spool)


def _give_up(job: DeliveryJob, spool: Path, keys: Keys | None) -> None:
    state = DeliveryState(job.attempt, spool, job.task.task_id)
    for url in state.begun:
        client = S3Uploads(
            job.s3,
            keys,
            timeout_s=GIVE_UP_TIMEOUT_S,
            deadline=math.inf,
            throttle=Throttle(None),
            progress=lambda _: None,
            state=state,
        )
        with contextlib.closing(client):
            client.give_up(url)


def write_job(job: DeliveryJob, spool: Path) -> None:
    """Leave the job for `main`, readable by the node's user only: a task's headers may contain secrets."""
    write_atomic(spool / DELIVERY_FILE, encode_json(job), private=True)


def _deliver_spool(
    job: DeliveryJob, spool: Path, report: Report, token: str | None, keys: Keys | None
) -> DeliveryReport:
    try:
        outcome = None
        with contextlib.suppress(FileNotFoundError):
            outcome = msgspec.json.decode(read_regular(spool / job.outcome_file, MAX_OUTCOME_BYTES), type=Outcome)
        done = deliver(job, outcome, report, spool=spool, token=token, keys=keys)
    except Exception as error:
        log.exception("unhandled error in the delivery task=%s", job.task.task_id)
        return DeliveryReport(ok=False, error=f"internal error in the delivery: {type(error).__name__}")
    for note in done.notes:
        log.warning("%s task=%s", note, job.task.task_id)
    log.info("delivery ended task=%s ok=%s bytes=%d %s", job.task.task_id, done.ok, done.sent_bytes, done.error)
    return done


def _frame_sender(pipe: Pipe | None) -> Callable[[Frame], None]:
    """Sends frames to the node, progress at most every PROGRESS_INTERVAL_S."""
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
