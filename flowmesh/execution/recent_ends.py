"""The last tasks that ended, with their verdicts, for `flowmesh top`. In memory: a restarted node begins with none."""

from __future__ import annotations

from collections import deque
from typing import Any

from flowmesh.execution import task_events
from flowmesh.execution.layout import Layout
from flowmesh.execution.run import Run
from flowmesh.messages.text import escaped
from flowmesh.tasks.verdicts import Verdict

KEPT = 20
MESSAGE_CHARS = 300


class RecentEnds:
    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._ends: deque[dict[str, Any]] = deque(maxlen=KEPT)

    def add(self, run: Run, verdict: Verdict, *, finished_at: str, cost_per_hour: float) -> None:
        """Take in a task's end. The secrets of the node and the task are hidden in its message."""
        message = verdict.message and escaped(task_events.redactor(run, self._layout)(verdict.message))
        used = task_events.used(run, cost_per_hour)
        self._ends.append(
            {
                "task_id": run.task_id,
                "task_type": run.accepted.type.name,
                "worker_id": run.worker_id,
                "verdict": verdict.kind.value,
                "error": message[:MESSAGE_CHARS] or None,
                "finished_at": finished_at,
                "runtime_s": round(run.runtime_s, 3),
                "cost_usd": used["cost_usd"],
                "energy": used["energy"],
            }
        )

    def listed(self) -> list[dict[str, Any]]:
        """Newest first."""
        return list(reversed(self._ends))
