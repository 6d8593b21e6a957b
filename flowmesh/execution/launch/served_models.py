"""Finds where a task serves the model that another task's document names: here, else by what others know of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from flowmesh.errors import FieldError
from flowmesh.execution.run_table import RunTable
from flowmesh.messages.serving import Served, task_of
from flowmesh.tasks.catalogue import TaskType

POLL_S = 0.5

Source = Callable[[str], Awaitable[Served | str | None]]
"""Where a task serves; a text: it has ended, and why; None: not known now."""


class ServedModels:
    """
    Args:
        wait_s: how long a task waits for one that does not serve yet.
    """

    def __init__(self, runs: RunTable, wait_s: float) -> None:
        self._runs = runs
        self._wait_s = wait_s
        self._sources: list[Source] = []

    def add(self, source: Source) -> None:
        """Ask this one, too, about tasks that do not run here."""
        self._sources.append(source)

    async def find(self, field: str, task_id: str) -> Served:
        """Where a task serves its model; waits until it does.

        Args:
            field: the document's that names the task, for errors.

        Raises:
            FieldError: it has ended, or does not serve in time.
        """
        deadline = time.monotonic() + self._wait_s
        while True:
            found = self._here(task_id) or await self._elsewhere(task_id)
            if isinstance(found, Served):
                return found
            if found is not None:
                raise FieldError(f"{field}: the task {task_id!r} serves no model any more: {found}", field)
            if time.monotonic() >= deadline:
                raise FieldError(
                    f"{field}: no task {task_id!r} has served a model within {self._wait_s:g} s "
                    "(tasks.served_model_wait_s); give the id of a running task of the type serve",
                    field,
                )
            await asyncio.sleep(POLL_S)

    def _here(self, task_id: str) -> Served | None:
        run = self._runs.of_task(task_id)
        if run is None or run.endpoint is None or run.serving is None:
            return None
        found = run.serving
        return Served(task_id=task_id, base_url=found.base_url, model=found.model, api_key=found.api_key, own=True)

    async def _elsewhere(self, task_id: str) -> Served | str | None:
        for source in self._sources:
            if (found := await source(task_id)) is not None:
                return found
        return None


def named_in(spec: dict[str, Any], kind: TaskType) -> tuple[str, str] | None:
    """The field of a task's spec that names a serving task, and the task's id; None: none does."""
    value: Any = spec
    for part in kind.served_field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    task_id = task_of(value) if isinstance(value, str) else None
    return None if task_id is None else (f"spec.{kind.served_field}", task_id)
