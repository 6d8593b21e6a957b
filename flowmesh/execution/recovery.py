"""After a restart: finds out what became of each task that the journal has without an end, and goes on from there."""

from __future__ import annotations

import asyncio
import time

from loguru import logger

from flowmesh.errors import FieldError
from flowmesh.execution import layout as files
from flowmesh.execution import task_events
from flowmesh.execution.admission import accept
from flowmesh.execution.executor import Executor
from flowmesh.execution.launch import boot_clock
from flowmesh.execution.run import Run
from flowmesh.messages.job import OUTCOME_FILE
from flowmesh.messages.wire import TASK_EVENTS_CHANNEL, utc_now
from flowmesh.processes.cgroup import Leaf
from flowmesh.processes.server_pool import end_leaves, end_remains
from flowmesh.tasks import machine
from flowmesh.tasks.journal import Record
from flowmesh.tasks.machine import State
from flowmesh.tasks.verdicts import Kind, Verdict

ANSWER_TIMEOUT_S = 10.0
"""A fork server that keeps silent for this long when it is asked for its tasks is given up."""


async def recover(executor: Executor) -> None:
    """Adopt what lives, end what is lost, queue what had not begun, deliver what was computed."""
    records = executor.journal.open_tasks()
    runs = [run for record in records if (run := _restore(executor, record)) is not None]
    for run in runs:
        executor.adopt(run)
        if run.task.state is State.QUEUED:
            run.slot.queue.append(run)
        elif run.task.state in (State.LAUNCHING, State.RUNNING, State.STOPPING, State.RELEASING):
            run.slot.resume(run)
    found = {run.attempt: run.task.state for run in runs}  # while others are looked at, some of them go on
    alive = await executor.fleet.adopt(ANSWER_TIMEOUT_S)
    living = {server.id for server in executor.fleet.servers if server.ready is not None}
    left = _left_over(executor.layout, living)  # before any server is started anew: its leaves are none of these
    dead = {record.attempt: record.server for record in records if record.server not in {*living, None}}
    for run in runs:
        await _go_on(executor, run, found[run.attempt], alive, dead.get(run.attempt))
    for slot in executor.slots.values():
        executor.pump(slot)
    keep = {run.attempt for run in runs} | {abs(attempt) for attempt in alive}
    await asyncio.to_thread(_sweep, executor.layout, keep, _undelivered(executor) - keep, left)
    if runs:
        logger.bind(tasks=len(runs), alive=len(alive)).info("tasks of the supervisor before this one taken over")


def _restore(executor: Executor, record: Record) -> Run | None:
    try:
        accepted = accept(
            record.message,
            settings=executor.settings,
            catalogue=executor.catalogue,
            results_dir=executor.layout.results_dir,
        )
    except FieldError as error:
        # It was fine when it came: the settings have changed since. Its process, if any, is swept as a stranger.
        message = f"the node was restarted with settings that refuse this task: {error}"
        had = record.task.verdict
        computed = record.task.state is State.DELIVERING and had is not None and had.ok
        verdict = Verdict(kind=Kind.DELIVERY_FAILED if computed else Kind.NODE_FAULT, message=message)
        event = task_events.lost(record.worker_id, record.task_id, verdict, record.dispatched_at)
        task = machine.Task(state=State.DONE, verdict=verdict)
        executor.journal.finish(record.attempt, task, utc_now(), TASK_EVENTS_CHANNEL, event)
        logger.bind(task=record.task_id).error("{}", message)
        return None
    slot = executor.slots.get(record.worker_id) or next(iter(executor.slots.values()))
    run = Run(record.attempt, accepted, slot)
    run.task = record.task
    run.started_at, run.boot_mark = record.started_at, record.boot_mark or ""
    return run


async def _go_on(executor: Executor, run: Run, found: State, alive: set[int], dead_server: str | None) -> None:
    match found:
        case State.QUEUED:
            pass  # it waits in its slot's queue since before anybody was asked
        case State.LAUNCHING | State.RUNNING | State.STOPPING if run.attempt in alive:
            pass  # its Forked, and perhaps its Gone, have come or are about to
        case State.LAUNCHING if dead_server is None:
            executor.apply(run, machine.NeverForked())
        case State.LAUNCHING | State.RUNNING | State.STOPPING:
            _set_clock(executor, run)
            mark = executor.layout.mark_of(run.attempt)
            base = executor.layout.cgroup
            leaves = Leaf.of_server(base, dead_server) if base is not None and dead_server is not None else []
            swept = await asyncio.to_thread(end_remains, mark, None, leaves, dead_server)
            logger.bind(task=run.task_id).warning("its process did not survive the supervisor ({} ended)", swept)
            message = "the supervisor died, and no fork server has the task any more"
            await executor.lose(run, message, Kind.SUPERVISOR_LOST)
        case State.RELEASING:
            _set_clock(executor, run)
            executor.spawn(executor.release(run), run)
        case State.DELIVERING if -run.attempt in alive:
            _set_clock(executor, run)
            run.outcome = await executor.read_outcome(run)
            executor.deliveries.adopted(run)
            executor.spawn(executor.clean(run))
        case State.DELIVERING:
            _set_clock(executor, run)
            run.outcome = await executor.read_outcome(run)
            executor.spawn(executor.deliver(run), run)
        case State.DONE:
            pass


def _set_clock(executor: Executor, run: Run) -> None:
    """What its event says of its time: what its fork server saw; else until it left its outcome, or until now."""
    if run.started_at is None:
        return
    now = time.monotonic()
    run.started = now - boot_clock.age_s(run.boot_mark, run.started_at)
    if run.task.verdict is not None and run.task.verdict.exit is not None:
        run.exit = run.task.verdict.exit
        run.resources = files.usage(run)
    run.end_clock()
    if run.exit is None or not run.exit.ran_s:
        try:
            left_at = (executor.layout.spool(run.attempt) / OUTCOME_FILE).lstat().st_mtime
        except OSError:
            return
        run.finished = max(run.started, now - max(0.0, time.time() - left_at))


def _sweep(layout: files.Layout, keep: set[int], undelivered: set[int], left: list[Leaf]) -> None:
    """Folders and cgroups of attempts that are over. In a thread: the journal belongs to the loop's."""
    for parent, kept in ((layout.state_dir / "spool", keep | undelivered), (layout.state_dir / "tmp", keep)):
        for folder in parent.glob("[0-9]*"):
            if int(folder.name) not in kept:
                files.remove_tree(folder)
    end_leaves(left)


def _left_over(layout: files.Layout, living: set[str]) -> list[Leaf]:
    """The cgroups of fork servers that live no more."""
    leaves = [] if layout.cgroup is None else [Leaf(path) for path in layout.cgroup.glob("*.*/")]
    return [leaf for leaf in leaves if leaf.server_id not in living]


def _undelivered(executor: Executor) -> set[int]:
    """A delivery that failed keeps its spool folder: it can be tried again."""
    found = set()
    for folder in (executor.layout.state_dir / "spool").glob("[0-9]*"):
        record = executor.journal.attempt(int(folder.name))
        verdict = None if record is None else record.task.verdict
        if verdict is not None and verdict.kind is Kind.DELIVERY_FAILED:
            found.add(int(folder.name))
    return found
