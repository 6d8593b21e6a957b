"""Free disk space: no task starts while there is too little.

A node without space accepts tasks and lets them wait; its workers are DEGRADED with the reason, and go on by
themselves. File systems are asked in a thread.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
from loguru import logger

from flowmesh.execution.layout import Layout
from flowmesh.execution.observer import Observer
from flowmesh.execution.ports import PostEvent, Pump
from flowmesh.execution.run import Run
from flowmesh.node.slots import Slot
from flowmesh.settings.schema import ResultsSettings
from flowmesh.tasks import machine
from flowmesh.tasks.verdicts import Stop

INTERVAL_S = 1.0
_MIB = 1 << 20


class Shortages(msgspec.Struct, frozen=True):
    """What keeps a task from being launched; empty if nothing does."""

    node: str = ""
    """Keeps all tasks of the node waiting."""
    own: str = ""
    """Concerns this task only."""

    def __bool__(self) -> bool:
        return bool(self.node or self.own)


class DiskSpace:
    def __init__(
        self,
        *,
        settings: ResultsSettings,
        layout: Layout,
        slots: Mapping[str, Slot[Run]],
        observer: Observer,
        post: PostEvent,
        pump: Pump,
    ) -> None:
        self._settings = settings
        self._layout = layout
        self._slots = slots
        self._observer = observer
        self._post = post
        self._pump = pump
        self._short_since = 0.0
        """Monotonic; 0 while there is enough."""

    async def watch(self) -> None:
        """Check every INTERVAL_S, until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            await self.look()

    async def look(self) -> None:
        """Pause all slots if there is too little, and let them go on if there is enough."""
        self.judge(await asyncio.to_thread(self._shortage))

    def shortages(self, run: Run) -> Shortages:
        """In a thread, just before a task is launched; the result goes to `judge`."""
        if not self._settings.min_free_bytes:
            return Shortages()
        out_dir = {"spec.output.destination.path": Path(run.accepted.target.out_dir)}
        return Shortages(self._shortage(), shortage(out_dir, self._settings.min_free_bytes))

    def _shortage(self) -> str:
        folders = {"results.dir": self._layout.results_dir, "node.state_dir": self._layout.state_dir}
        return shortage(folders, self._settings.min_free_bytes)

    def judge(self, reason: str) -> None:
        """Pause all slots for this reason; let them go on if it is empty."""
        if reason and not self._short_since:
            self._short_since = time.monotonic()
            logger.error("no task is started: {}", reason)
        elif not reason and self._short_since:
            logger.bind(short_s=round(time.monotonic() - self._short_since, 1)).info(
                "enough disk space again: tasks start"
            )
            self._short_since = 0.0
        if reason and time.monotonic() - self._short_since > self._settings.wait_for_room_s:
            self._hand_back(reason)
        for slot in self._slots.values():
            changed, slot.paused = bool(slot.paused) != bool(reason), reason
            if changed:
                self._observer.on_slot_changed(slot)
                self._pump(slot)

    def _hand_back(self, reason: str) -> None:
        for run in [run for slot in self._slots.values() for run in slot.queue]:
            self._post(run, machine.StopRequested(Stop.NODE_FAULT, f"not started: {reason}"))


def shortage(folders: dict[str, Path], least_bytes: int) -> str:
    """Which of these folders has too little space, and how much it has; empty if all have enough.

    Args:
        folders: by the setting or field that names them.
    """
    for key, folder in folders.items():
        free_bytes = free_bytes_at(folder)
        if free_bytes is not None and free_bytes < least_bytes:
            return (
                f"{folder} ({key}) has {free_bytes / _MIB:.0f} MiB free, "
                f"less than the {least_bytes / _MIB:.0f} MiB of results.min_free_bytes"
            )
    return ""


def free_bytes_at(folder: Path) -> int | None:
    """What an ordinary user may still write to a folder, or to the file system it will be made on; None: unknown."""
    for place in (folder, *folder.parents):
        try:
            found = os.statvfs(place)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        return found.f_bavail * found.f_frsize
    return None
