"""Writes the end of a task down: its verdict, the event that tells it, its history, and what webhooks are told."""

from __future__ import annotations

from collections.abc import Sequence

from loguru import logger

from flowmesh.execution import history_entry, task_events
from flowmesh.execution.layout import Layout
from flowmesh.execution.ports import SendingsOf
from flowmesh.execution.run import Run
from flowmesh.node.devices import GpuInfo
from flowmesh.queue import reports
from flowmesh.settings.schema import NodeSettings
from flowmesh.tasks.journal import Journal
from flowmesh.tasks.verdicts import Verdict


class Ending:
    """
    Args:
        gpus: those that the slots have.
        sendings_of: what webhooks and trace collectors are told of an end.
    """

    def __init__(
        self,
        settings: NodeSettings,
        layout: Layout,
        journal: Journal,
        gpus: Sequence[GpuInfo],
        sendings_of: SendingsOf,
    ) -> None:
        self._settings = settings
        self._layout = layout
        self._journal = journal
        self._gpu_names = {gpu.uuid: gpu.name for gpu in gpus}
        self._sendings_of = sendings_of

    def cost_per_hour(self, run: Run) -> float:
        """What its slot costs."""
        return self._settings.cost_per_hour * run.slot.plan.share

    def write(self, run: Run, verdict: Verdict, *, finished_at: str) -> bytes:
        """All of it in one transaction; returns the event.

        Raises:
            JournalError: nothing was written.
        """
        cost = self.cost_per_hour(run)
        redact = task_events.redactor(run, self._layout)
        event = task_events.ended(run, verdict, finished_at=finished_at, cost_per_hour=cost, redact=redact)
        found = history_entry.of_run(
            run, verdict, finished_at=finished_at, cost_per_hour=cost, redact=redact, gpus=self._gpu_names
        )
        stays = run.task.stop_detail.startswith(reports.PREEMPTED)
        self._journal.finish(
            run.attempt,
            run.task,
            finished_at,
            *reports.outgoing(event, run.recorded, out_dir=run.accepted.target.out_dir, stays=stays),
            kept=history_entry.packed(found),
            sendings=self._sendings_of(found),
        )
        return event


def report(run: Run, verdict: Verdict, event: bytes) -> None:
    """Log an end, and pass it on to who watches the run."""
    facts = {"verdict": verdict.kind.value, "runtime_s": round(run.runtime_s, 3), "evidence": verdict.evidence}
    bound = logger.bind(task=run.task_id, **facts)
    if verdict.ok:
        bound.info("task succeeded")
    else:
        bound.warning("task failed: {}", verdict.message)
    end = {"ok": verdict.ok, "verdict": verdict.kind.value, "error": verdict.message}
    if run.watchers:
        run.notify({"event": "end", **end, "out_dir": run.accepted.target.out_dir, **task_events.payload_of(event)})
