"""Recovery after a restart: finds the real state of each open task of the journal, and continues from it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import time
from pathlib import Path

from loguru import logger

from flowmesh.errors import FieldError
from flowmesh.execution import boot_clock, task_events
from flowmesh.execution.admission import accept
from flowmesh.execution.executor import Executor
from flowmesh.execution.housekeeping.removal import remove_tree
from flowmesh.execution.launch.spool import read_outcome
from flowmesh.execution.layout import Layout
from flowmesh.execution.run import Run
from flowmesh.messages.job import OUTCOME_FILE
from flowmesh.messages.wire import address, recorded_in, utc_now
from flowmesh.processes.cgroup import Leaf
from flowmesh.processes.remains import end_leaves, end_remains
from flowmesh.queue import reports
from flowmesh.tasks import machine
from flowmesh.tasks.journal import Record
from flowmesh.tasks.machine import State
from flowmesh.tasks.verdicts import Kind, Verdict

ANSWER_TIMEOUT_S = 10.0
"""A fork server that does not answer within this time is killed with its tasks."""
_ATTEMPT = re.compile(r"[1-9][0-9]{0,17}")
_ASIDE = re.compile(r"left-[1-9][0-9]{0,17}-[0-9a-f]{8}")
"""Folders of attempts that are to be removed."""


async def recover(executor: Executor) -> None:
    """Adopt running tasks, end lost ones, queue those that had not started, and deliver those that had ended."""
    records = executor.journal.open_tasks()
    runs = [run for record in records if (run := _restore(executor, record)) is not None]
    for run in runs:
        executor.add(run)
        if run.task.state is State.QUEUED:
            run.slot.queue.append(run)
        elif run.task.state in (State.LAUNCHING, State.RUNNING, State.STOPPING, State.RELEASING):
            run.slot.resume(run)
    found = {run.attempt: run.task.state for run in runs}  # a state may change while other runs are recovered
    alive = await executor.pool.adopt(ANSWER_TIMEOUT_S, executor.owner_of)
    living = {server.id for server in executor.pool.servers if server.ready is not None}
    left = _left_over(executor.layout, living)  # listed before new servers start, whose leaves must stay
    dead = {record.attempt: record.server for record in records if record.server not in {*living, None}}
    for run in runs:
        await _continue(executor, run, found[run.attempt], alive, dead.get(run.attempt))
    for slot in executor.slots.values():
        executor.pump(slot)
    executor.parts.helpers.kill_unclaimed()
    keep = {run.attempt for run in runs} | {abs(attempt) for attempt in alive}
    await asyncio.to_thread(end_leaves, left)
    executor.begin(_remove(_left_folders(executor.layout, keep, _undelivered(executor))))  # it may be much
    if runs:
        logger.bind(tasks=len(runs), alive=len(alive)).info("tasks of the previous supervisor adopted")


def _restore(executor: Executor, record: Record) -> Run | None:
    """The run of a journal record; None if today's settings refuse its task, which is then failed here."""
    try:
        accepted = accept(
            record.message,
            settings=executor.settings,
            catalogue=executor.catalogue,
            results_dir=executor.layout.results_dir,
        )
    except FieldError as error:
        # It was accepted under other settings. If it has a process, that is killed like one of an unknown attempt.
        message = f"the node was restarted with settings that refuse this task: {error}"
        earlier = record.task.verdict
        computed = record.task.state is State.DELIVERING and earlier is not None and earlier.ok
        verdict = Verdict(kind=Kind.DELIVERY_FAILED if computed else Kind.NODE_FAULT, message=message)
        event = task_events.lost(record.worker_id, record.task_id, verdict, record.dispatched_at)
        task = machine.Task(state=State.DONE, verdict=verdict)
        outgoing = reports.outgoing(event, recorded_in(address(record.message).record))
        executor.journal.finish(record.attempt, task, utc_now(), *outgoing)
        logger.bind(task=record.task_id).error("{}", message)
        return None
    slot = executor.slots.get(record.worker_id) or next(iter(executor.slots.values()))
    run = Run(record.attempt, accepted, slot)
    run.task = record.task
    run.started_at, run.boot_mark = record.started_at, record.boot_mark or ""
    run.timeline.resume(record.marks, record.accepted_at)
    return run


async def _continue(executor: Executor, run: Run, found: State, alive: set[int], dead_server: str | None) -> None:
    """Continue a run.

    Args:
        found: its state in the journal.
        alive: the attempts whose children the adopted fork servers have.
        dead_server: the id of its fork server, if that is gone.
    """
    match found:
        case State.QUEUED:
            pass  # it is in its slot's queue already
        case State.LAUNCHING | State.RUNNING | State.STOPPING if run.attempt in alive:
            pass  # its Forked, and its Gone if it has ended, arrive from the fork server
        case State.LAUNCHING if dead_server is None:
            executor.apply(run, machine.NeverForked())
        case State.LAUNCHING | State.RUNNING | State.STOPPING:
            _set_clock(executor, run)
            mark = executor.layout.mark_of(run.attempt)
            base = executor.layout.cgroup
            leaves = Leaf.of_server(base, dead_server) if base is not None and dead_server is not None else []
            swept = await asyncio.to_thread(end_remains, mark, None, leaves, dead_server)
            logger.bind(task=run.task_id).warning("task lost: no fork server has it; {} processes killed", swept)
            message = "the supervisor died, and no fork server has the task any more"
            executor.begin(executor.parts.children.lost(run, message, Kind.SUPERVISOR_LOST), run)
        case State.RELEASING:
            _set_clock(executor, run)
            executor.begin(executor.release(run), run)
        case State.DELIVERING if -run.attempt in alive:
            _set_clock(executor, run)
            run.outcome = await read_outcome(executor.layout, run.attempt)
            executor.begin(executor.deliver(run, adopted=True), run)
        case State.DELIVERING:
            _set_clock(executor, run)
            run.outcome = await read_outcome(executor.layout, run.attempt)
            executor.begin(executor.deliver(run), run)
        case State.DONE:
            pass


def _set_clock(executor: Executor, run: Run) -> None:
    """Set when the run started and ended.

    Its end is what its fork server measured; else when its outcome was written; else now.
    """
    if run.started_at is None:
        return
    now = time.monotonic()
    run.started = now - boot_clock.age_s(run.boot_mark, run.started_at)
    if run.task.verdict is not None and run.task.verdict.exit is not None:
        run.exit = run.task.verdict.exit
        run.resources = run.usage()
    run.end_clock()
    if run.exit is None or not run.exit.ran_s:
        try:
            left_at = (executor.layout.spool(run.attempt) / OUTCOME_FILE).lstat().st_mtime
        except OSError:
            return
        run.finished = max(run.started, now - max(0.0, time.time() - left_at))


def _left_folders(layout: Layout, keep: set[int], undelivered: set[int]) -> list[Path]:
    """Folders of attempts that have ended, renamed before new attempts have any: a new journal begins with 1 again.

    Args:
        keep: attempts whose folders stay.
        undelivered: attempts whose spool folders stay, too.
    """
    parts = ((layout.state_dir / "spool", keep | undelivered), (layout.state_dir / "tmp", keep))
    found = []
    for parent, kept in parts:
        found += [parent / name for name in _names(parent) if _ASIDE.fullmatch(name)]
        for attempt in _attempts(parent):
            if attempt not in kept:
                folder = parent / str(attempt)
                with contextlib.suppress(OSError):  # something may be mounted there
                    folder = folder.rename(parent / f"left-{attempt}-{secrets.token_hex(4)}")
                found.append(folder)
    return found


async def _remove(folders: list[Path]) -> None:
    for folder in folders:
        await asyncio.to_thread(remove_tree, folder)


def _left_over(layout: Layout, living: set[str]) -> list[Leaf]:
    """The cgroups of fork servers that are gone."""
    leaves = [] if layout.cgroup is None else [Leaf(path) for path in layout.cgroup.glob("*.*/")]
    return [leaf for leaf in leaves if leaf.server_id not in living]


def _undelivered(executor: Executor) -> set[int]:
    """Attempts whose delivery failed: their spool folders are kept for `flowmesh deliver`."""
    found = set()
    for attempt in _attempts(executor.layout.state_dir / "spool"):
        record = executor.journal.attempt(attempt)
        verdict = None if record is None else record.task.verdict
        if verdict is not None and verdict.kind is Kind.DELIVERY_FAILED:
            found.add(attempt)
    return found


def _attempts(parent: Path) -> list[int]:
    """Numbers that name folders here. A task may have made others: whatever is no attempt's is left alone."""
    return [int(name) for name in _names(parent) if _ATTEMPT.fullmatch(name)]


def _names(parent: Path) -> list[str]:
    try:
        return os.listdir(parent)
    except OSError:
        return []
