"""The tasks of a status answer, as `flowmesh top` asks for them. All of it is known already: nothing is sampled."""

from __future__ import annotations

from typing import Any

from flowmesh.execution.executor import Executor
from flowmesh.execution.run import Run
from flowmesh.tasks.machine import State

_WAITING = (State.QUEUED, State.DELIVERING)


def tasks(executor: Executor, limit: int | None) -> tuple[list[dict[str, Any]], int]:
    """The entries of the node's tasks.

    Args:
        limit: at most so many that wait for a slot, and at most so many that are delivered, each with bounded
            progress and with its trend; every task that has a slot is listed. None: all tasks, whole.

    Returns:
        the entries, and how many tasks were left out.
    """
    runs = list(executor.runs)
    if limit is None:
        return [_entry(executor, run) for run in runs], 0
    chosen = [run for run in runs if run.task.state not in _WAITING]
    for state in _WAITING:
        chosen += [run for run in runs if run.task.state is state][:limit]
    entries = [{**_entry(executor, run, bounded=True), "trend": run.trend.points()} for run in chosen]
    return entries, len(runs) - len(chosen)


def _entry(executor: Executor, run: Run, *, bounded: bool = False) -> dict[str, Any]:
    cost = executor.settings.node.cost_per_hour * run.slot.plan.share
    return run.snapshot(bounded=bounded) | executor.parts.gpus.spent(run, cost)
