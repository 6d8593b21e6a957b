"""Who watches a task: gets its states, phases, progress and end, also if it has not been dispatched yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowmesh.execution.executor import Executor
from flowmesh.execution.observer import Observer
from flowmesh.execution.run import Run, progress_event
from flowmesh.tasks.verdicts import Kind

Put = Callable[[dict[str, Any]], None]


class Watchers(Observer):
    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._waiting: dict[str, set[Put]] = {}
        """By id: of tasks that have not come yet."""
        executor.observers.add(self)

    def subscribe(self, task_id: str, put: Put) -> Callable[[], None]:
        """Pass what happens to a task to `put`, beginning with its present state.

        Returns:
            what ends the subscription.
        """
        run = self._executor.runs.of_task(task_id)
        record = self._executor.journal.latest(task_id) if run is None else None
        if run is not None:
            put({"event": "state", "state": run.task.state.value})
            if run.phase:
                put({"event": "phase", "phase": run.phase})
            if run.progress is not None:
                put(progress_event(run.progress))
            run.watchers.add(put)
        elif record is not None and record.task.verdict is not None:
            verdict = record.task.verdict
            end = {"ok": verdict.ok, "verdict": verdict.kind.value, "error": verdict.message}
            put({"event": "end", **end, "out_dir": record.out_dir})
        else:
            self._waiting.setdefault(task_id, set()).add(put)

        def unsubscribe() -> None:
            if run is not None:
                run.watchers.discard(put)
            if (waiting := self._waiting.get(task_id)) is not None:
                waiting.discard(put)
                if not waiting:
                    del self._waiting[task_id]
            if (later := self._executor.runs.of_task(task_id)) is not None:
                later.watchers.discard(put)

        return unsubscribe

    def on_accepted(self, run: Run) -> None:
        run.watchers |= self._waiting.pop(run.task_id, set())
        run.notify({"event": "state", "state": run.task.state.value})

    def on_refused(self, task_id: str, message: str, kind: Kind) -> None:
        for put in self._waiting.pop(task_id, set()):
            put({"event": "end", "ok": False, "verdict": kind.value, "error": message, "out_dir": None})
