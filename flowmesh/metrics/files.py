"""Files that monitoring reads: the metrics for node_exporter's textfile collector, and which task is on which GPU.

Written in a thread, each file in one piece. What cannot be written is said once, until it can be again.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from loguru import logger

from flowmesh.execution.executor import Executor
from flowmesh.execution.observer import Observer
from flowmesh.execution.run import Run
from flowmesh.node.slots import Slot
from flowmesh.settings.schema import MetricsSettings
from flowmesh.tasks.machine import State

MODE = 0o644
"""Monitoring runs as another user."""


class MetricsFiles(Observer):
    """
    Args:
        text: gives the metrics.
        indices: each GPU's index by UUID, as the driver counts.
    """

    def __init__(
        self, executor: Executor, settings: MetricsSettings, text: Callable[[], str], indices: Mapping[str, int]
    ) -> None:
        self._executor = executor
        self._settings = settings
        self._text = text
        self._indices = indices
        self._changed = asyncio.Event()
        self._trouble = ""
        if settings.job_mapping_dir is not None:
            executor.observers.add(self)

    def on_slot_taken(self, slot: Slot[Run], run: Run) -> None:  # noqa: ARG002
        self._changed.set()

    def on_slot_free(self, slot: Slot[Run], last: Run) -> None:  # noqa: ARG002
        self._changed.set()

    def works(self) -> list[Coroutine[Any, Any, None]]:
        """What runs for as long as the node does; nothing if no file is wanted."""
        wanted = self._settings.textfile is not None or self._settings.job_mapping_dir is not None
        return [self._run()] if wanted else []

    async def _run(self) -> None:
        """Write until cancelled; then remove what would no longer be true."""
        try:
            while True:
                files = self._files()
                self._changed.clear()
                await asyncio.to_thread(self._write, files)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), self._settings.interval_s)
        finally:
            for path in self._files():
                path.unlink(missing_ok=True)

    def _files(self) -> dict[Path, str]:
        files: dict[Path, str] = {}
        if self._settings.textfile is not None:
            files[Path(self._settings.textfile)] = self._text()
        if self._settings.job_mapping_dir is not None:
            on = {
                uuid: run.task_id
                for run in self._executor.runs
                if run.task.state in (State.LAUNCHING, State.RUNNING, State.STOPPING, State.RELEASING)
                for uuid in run.gpus
            }
            for index in sorted(set(self._indices.values())):
                tasks = dict.fromkeys(on[uuid] for uuid, each in self._indices.items() if each == index and uuid in on)
                files[Path(self._settings.job_mapping_dir, str(index))] = "".join(f"{task}\n" for task in tasks)
        return files

    def _write(self, files: Mapping[Path, str]) -> None:
        """Runs in a thread."""
        try:
            for path, text in files.items():
                partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
                try:
                    partial.write_text(text)
                    partial.chmod(MODE)
                    partial.replace(path)
                except OSError:
                    partial.unlink(missing_ok=True)
                    raise
        except OSError as error:
            if not self._trouble:
                logger.bind(path=error.filename).warning("metrics cannot be written: {}", error.strerror)
            self._trouble = str(error)
        else:
            self._trouble = ""
