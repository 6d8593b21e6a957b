"""The tasks that the node has, from acceptance to their terminal event: by attempt, by task id, by slot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flowmesh.execution.run import Run
from flowmesh.node.slots import Slot


class RunTable:
    def __init__(self) -> None:
        self._by_attempt: dict[int, Run] = {}
        self._by_task: dict[str, Run] = {}

    def __iter__(self) -> Iterator[Run]:
        """A snapshot: runs may be added and removed while it is walked."""
        return iter(list(self._by_attempt.values()))

    def __len__(self) -> int:
        return len(self._by_attempt)

    def add(self, run: Run) -> None:
        self._by_attempt[run.attempt] = run
        self._by_task[run.task_id] = run

    def remove(self, run: Run) -> None:
        del self._by_attempt[run.attempt]
        if self._by_task.get(run.task_id) is run:
            del self._by_task[run.task_id]

    def get(self, attempt: int) -> Run | None:
        return self._by_attempt.get(attempt)

    def of_task(self, task_id: str) -> Run | None:
        """The latest attempt at this task that has not ended."""
        return self._by_task.get(task_id)

    def of_gang(self, task_id: str) -> Run | None:
        """The latest member here of a task on several nodes that has not ended."""
        return next((run for run in reversed(self._by_attempt.values()) if run.gang_id == task_id), None)

    def has_any_of(self, slot: Slot[Run]) -> bool:
        """Whether a task of this slot has not ended; one whose results are being delivered has not."""
        return any(run.slot is slot for run in self._by_attempt.values())

    def folders(self) -> set[Path]:
        """The results folders in use, those of merged children included."""
        targets = (each for run in self for each in (run.accepted.target, *run.accepted.children))
        return {Path(each.out_dir) for each in targets}
