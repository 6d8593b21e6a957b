"""What a worker's heartbeat says of its task, its GPUs, its queue and its last ends: for `flowmesh top --redis`."""

from __future__ import annotations

from typing import Any

from flowmesh.execution import task_events
from flowmesh.execution.gpu.monitor import GpuMonitor
from flowmesh.execution.layout import Layout
from flowmesh.execution.recent_ends import RecentEnds
from flowmesh.execution.run import Run
from flowmesh.execution.run_table import RunTable
from flowmesh.node.slots import Slot
from flowmesh.tasks.machine import State

LISTED = 5
"""How many deliveries, waiting tasks and ends a heartbeat names."""
_KEPT = ("task_id", "task_type", "state", "phase", "progress", "started_at", "elapsed_s", "cost_usd", "gpu_joules")


class LiveNotes:
    """
    Args:
        cost_per_hour: of the slot, in US dollars.
    """

    def __init__(
        self,
        slot: Slot[Run],
        gpus: GpuMonitor,
        *,
        runs: RunTable,
        recent: RecentEnds,
        layout: Layout,
        cost_per_hour: float,
    ) -> None:
        self._slot = slot
        self._gpus = gpus
        self._runs = runs
        self._recent = recent
        self._layout = layout
        self._cost_per_hour = cost_per_hour

    def __call__(self) -> dict[str, Any]:
        worker_id = self._slot.plan.worker_id
        waiting = [run.task_id for run in list(self._slot.queue)[:LISTED]]
        notes: dict[str, Any] = {"queued": len(self._slot.queue), "queue": waiting}
        if uuids := self._slot.plan.gpus:
            notes["gpus"] = self._gpus.last.listed(uuids)
        if (run := self._slot.current) is not None:
            task = run.snapshot(bounded=True) | self._gpus.spent(run, self._cost_per_hour)
            redact = task_events.redactor(run, self._layout)
            notes["task"] = redact.deep({name: task[name] for name in _KEPT})
        delivering = [run for run in self._runs if run.task.state is State.DELIVERING and run.worker_id == worker_id]
        if delivering:
            shown = [{"task_id": run.task_id, "waits_for": run.waits_for or None} for run in delivering[:LISTED]]
            notes["deliveries"] = self._layout.secrets.deep(shown)
        if ends := [end for end in self._recent.listed() if end["worker_id"] == worker_id][:LISTED]:
            notes["recent"] = ends
        return notes
