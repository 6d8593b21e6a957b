"""Decides on each dispatch: a task that is accepted, one that is refused with an event, or a message to ignore."""

from __future__ import annotations

import msgspec
from loguru import logger

from flowmesh.errors import FieldError, NotOfferedError
from flowmesh.execution import history_entry, task_events
from flowmesh.execution.admission import Accepted, accept, check_fields, with_all_faults
from flowmesh.execution.executor import Executor
from flowmesh.execution.run import Run
from flowmesh.messages.wire import (
    MAX_MESSAGE_BYTES,
    Recorded,
    address,
    recorded_in,
    salvaged_address,
    usable_task_id,
    utc_now,
)
from flowmesh.node.slots import Slot
from flowmesh.queue import reports
from flowmesh.tasks import machine
from flowmesh.tasks.journal import JournalError
from flowmesh.tasks.verdicts import Kind, Stop, Verdict

QUEUED_MAX_BYTES = 1024**3
"""Of the documents of all tasks that wait: they are in memory."""


class _Dispatch(msgspec.Struct, frozen=True, kw_only=True):
    """A message for one of this node's workers."""

    task_id: str
    dispatched_at: str | None
    data: bytes
    entry: str | None
    """The id of its stream entry."""
    fault: str
    """What makes the message unreadable; empty where it can be read."""
    recorded: Recorded | None = None
    """Which attempt it is, of a task with a record in Redis."""


class Dispatcher:
    """Used on the loop; an accepted task is in the journal before `take` returns."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._needles = tuple(worker_id.encode() for worker_id in executor.slots)

    def on_message(self, data: bytes) -> None:
        """A message on the tasks channel. One for another worker costs a search for this node's worker ids in it."""
        if any(needle in data for needle in self._needles) or data[:1] != b"{":
            self.take(data)

    def take(self, data: bytes, entry: str | None = None) -> bool:
        """Act on a dispatch.

        Args:
            entry: the id of its stream entry, which is kept until it is taken; None: it came over pub/sub.

        Returns:
            False if nothing of it is in the journal, so that a stream must deliver it again.
        """
        fault = ""
        try:
            to = address(data)
        except FieldError as error:
            fault, to = str(error), salvaged_address(data)
            if to.assigned_worker is None or to.task_id is None:
                self._executor.counters.malformed += 1
                logger.bind(bytes=len(data)).warning("malformed message ignored: {}", error)
                return True
        slot = self._executor.slots.get(to.assigned_worker) if isinstance(to.assigned_worker, str) else None
        if slot is None:
            if entry is not None:
                logger.bind(entry=entry).warning("entry ignored: it is for worker {!r}", str(to.assigned_worker)[:80])
            return True
        task_id = usable_task_id(to.task_id)
        dispatched_at = to.dispatched_at if isinstance(to.dispatched_at, str) else None
        if task_id is None:
            self._executor.counters.malformed += 1
            shown = str(to.task_id)[:80]
            logger.bind(bytes=len(data)).warning("message for this node ignored: invalid task_id {!r}", shown)
            return True
        try:
            return self._dispatch(
                slot,
                _Dispatch(
                    task_id=task_id,
                    dispatched_at=dispatched_at,
                    data=data,
                    entry=entry,
                    fault=fault,
                    recorded=recorded_in(to.record),
                ),
            )
        except JournalError as error:
            logger.bind(task=task_id).error("dispatch not taken: {}", error)
            self._executor.on_journal_error(error)
            if entry is None:
                self._executor.observers.on_missed(slot)
            return False

    def claimed(self, slot: Slot[Run], task_id: str, recorded: Recorded, data: bytes) -> bool:
        """Take a task of the queue that this slot has claimed.

        Args:
            data: the dispatch, made from the task's record.

        Returns:
            False if nothing of it is in the journal, so that it must go back to the queue: a dispatch came first, or
            the node takes no more tasks.
        """
        if slot.displaced or self._executor.draining is not None or not slot.idle:
            return False
        if self._executor.runs.of_task(task_id) is not None:
            return False  # an earlier attempt is not gone yet
        sent = _Dispatch(task_id=task_id, dispatched_at=utc_now(), data=data, entry=None, fault="", recorded=recorded)
        try:
            return self._accept(slot, sent, sent.dispatched_at)
        except JournalError as error:
            logger.bind(task=task_id).error("claim not taken: {}", error)
            self._executor.on_journal_error(error)
            return False

    def _dispatch(self, slot: Slot[Run], sent: _Dispatch) -> bool:
        task_id, dispatched_at, entry = sent.task_id, sent.dispatched_at, sent.entry
        if slot.displaced:
            logger.bind(task=task_id).warning("dispatch not taken: {}", slot.displaced)
            return False
        if self._executor.draining is not None:
            if entry is not None:
                return False
            logger.bind(task=task_id).info("dispatch not taken: draining; the orchestrator queues it again")
            return True
        known_by = f"entry {entry}" if dispatched_at is None and entry is not None else dispatched_at
        if self._is_duplicate(task_id, known_by):
            self._executor.counters.duplicates += 1
            logger.bind(task=task_id).info("dispatch ignored: the node has this task already")
            return True
        if full := self._is_full(slot):
            if entry is not None:
                return False
            self._refuse(slot, sent, Kind.NODE_FAULT, f"{full}; send it to another worker, or later")
            return True
        return self._accept(slot, sent, known_by)

    def _accept(self, slot: Slot[Run], sent: _Dispatch, known_by: str | None) -> bool:
        task_id = sent.task_id
        try:
            accepted = self._check(sent.data, sent.fault)
            if self._executor.journal.latest(task_id) is None:  # a retry's child also answers for earlier rows
                check_fields(accepted, self._executor.settings, self._executor.layout.secrets)
        except FieldError as error:
            kind = Kind.MISSING_DEPENDENCY if isinstance(error, NotOfferedError) else Kind.BAD_REQUEST
            self._refuse(slot, sent, kind, str(error))
            return True
        if why := self._executor.time_left.why_not(accepted.timeout_s):
            self._refuse(slot, sent, Kind.DRAINED, f"not started: {why}")
            return True
        attempt = self._executor.journal.accept(
            task_id=task_id,
            worker_id=slot.plan.worker_id,
            dispatched_at=known_by,
            at=utc_now(),
            message=sent.data,
            out_dir=accepted.target.out_dir,
            child_dirs=(child.out_dir for child in accepted.children),
        )
        run = Run(attempt, accepted, slot)
        self._executor.add(run)
        slot.queue.append(run)
        self._executor.observers.on_accepted(run)
        logger.bind(task=task_id, type=accepted.type.name, node_run=attempt).info("task accepted")
        for warning in accepted.warnings:
            logger.bind(task=task_id).warning("{}", warning)
        if self._executor.early_cancels.take(task_id):
            self._executor.apply(run, machine.StopRequested(Stop.CANCEL, "cancelled before it was dispatched"))
        self._executor.pump(slot)
        return True

    def _check(self, data: bytes, fault: str) -> Accepted:
        if len(data) > MAX_MESSAGE_BYTES:
            raise FieldError(f"the message has {len(data)} bytes; at most {MAX_MESSAGE_BYTES} are taken", "task")
        if fault:
            raise FieldError(fault, "")
        settings, catalogue = self._executor.settings, self._executor.catalogue
        try:
            return accept(data, settings=settings, catalogue=catalogue, results_dir=self._executor.layout.results_dir)
        except FieldError as error:
            raise with_all_faults(error, data, settings, catalogue.offered) from error
        except (ArithmeticError, RecursionError, TypeError, ValueError, OSError) as error:
            # Whatever a document makes a check do, its task is answered, and the node goes on.
            logger.opt(exception=error).error("unhandled error in the check of a document")
            raise FieldError(f"the document cannot be checked: {type(error).__name__}: {error}", "task") from error

    def _is_duplicate(self, task_id: str, dispatched_at: str | None) -> bool:
        """Whether the same dispatch came before; the same task with another `dispatched_at` is a retry."""
        if self._executor.runs.of_task(task_id) is not None:
            return True
        last = self._executor.journal.latest(task_id)
        return last is not None and dispatched_at is not None and last.dispatched_at == dispatched_at

    def _is_full(self, slot: Slot[Run]) -> str:
        """Why no more task may wait for this slot; empty: it may."""
        most = self._executor.settings.tasks.max_queued
        if len(slot.queue) >= most:
            return f"{most} tasks wait for worker {slot.plan.worker_id} already (tasks.max_queued)"
        waiting = [run for each in self._executor.slots.values() for run in each.queue]
        if sum(run.accepted.size_bytes for run in waiting) >= QUEUED_MAX_BYTES:
            return f"the documents of {len(waiting)} waiting tasks take {QUEUED_MAX_BYTES >> 20} MiB already"
        return ""

    def _refuse(self, slot: Slot[Run], sent: _Dispatch, kind: Kind, message: str) -> None:
        task_id, worker_id, executor = sent.task_id, slot.plan.worker_id, self._executor
        event = task_events.refused(worker_id, task_id, kind, message, sent.dispatched_at)
        verdict = Verdict(kind=kind, message=message)
        found = history_entry.of_refusal(worker_id, task_id, verdict, sent.data, executor.layout.secrets)
        kept, sendings = history_entry.packed(found), executor.sendings_of(found)
        executor.journal.refuse(*reports.outgoing(event, sent.recorded), kept, sendings)
        self._executor.counters.refused += 1
        self._executor.counters.add_verdict(kind)
        logger.bind(task=task_id).warning("task refused: {}", message)
        self._executor.observers.on_refused(task_id, message, kind)
        self._executor.observers.on_posted()


def dispatch_of(worker_id: str, task_id: str, recorded: Recorded, document: bytes) -> bytes:
    """The message with which an orchestrator would dispatch a task of the queue.

    Args:
        document: as its record has it.
    """
    head = {
        "task_id": task_id,
        "assigned_worker": worker_id,
        "dispatched_at": utc_now(),
        "parent_task_id": None,
        "record": msgspec.to_builtins(recorded),
    }
    return b'{"task":' + document + b"," + msgspec.json.encode(head)[1:]
