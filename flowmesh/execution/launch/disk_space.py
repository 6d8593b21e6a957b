"""Room on the disks: no task starts where there is too little, and old results go where the settings say so.

A node without room takes tasks and lets them wait; its workers say DEGRADED with the reason, and go on by themselves.
What asks a file system does so in a thread.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from loguru import logger

from flowmesh.errors import FlowMeshError
from flowmesh.execution.housekeeping.retention import Retention
from flowmesh.execution.run import Run
from flowmesh.tasks import machine
from flowmesh.tasks.verdicts import Stop

if TYPE_CHECKING:
    from flowmesh.execution.executor import Executor

INTERVAL_S = 1.0
RETENTION_INTERVAL_S = 60.0
_MIB = 1 << 20


class Shortages(msgspec.Struct, frozen=True):
    """What keeps a task from being launched; empty where nothing does."""

    node: str = ""
    """All the node's tasks have to wait for this."""
    own: str = ""
    """Only this task lacks it."""

    def __bool__(self) -> bool:
        return bool(self.node or self.own)


class Room:
    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._settings = executor.settings.results
        self._retention = Retention(executor)
        self._short_since = 0.0
        """Monotonic; 0 while there is room."""

    async def watch(self) -> None:
        """Until cancelled."""
        settings, last = self._settings, -RETENTION_INTERVAL_S
        while True:
            await asyncio.sleep(INTERVAL_S)
            if settings.min_free_bytes:
                await self.look()
            if time.monotonic() - last >= RETENTION_INTERVAL_S:
                last = time.monotonic()
                await self._sweep()

    async def _sweep(self) -> None:
        keeps_all = self._settings.keep_days is None and self._settings.keep_bytes is None
        try:
            if keeps_all:
                self._executor.journal.forget()
            else:
                await self._retention.sweep()
        except (FlowMeshError, OSError) as error:
            logger.warning("old results stay: {}", error)

    async def look(self) -> None:
        """Pause all slots where there is too little, and have them go on where there is enough."""
        self.judge(await asyncio.to_thread(self._shortage))

    def shortages(self, run: Run) -> Shortages:
        """In a thread, just before a task is launched; what it says is then told to `judge`."""
        if not self._settings.min_free_bytes:
            return Shortages()
        out_dir = {"spec.output.destination.path": Path(run.accepted.target.out_dir)}
        return Shortages(self._shortage(), shortage(out_dir, self._settings.min_free_bytes))

    def _shortage(self) -> str:
        layout = self._executor.layout
        folders = {"results.dir": layout.results_dir, "node.state_dir": layout.state_dir}
        return shortage(folders, self._settings.min_free_bytes)

    def judge(self, reason: str) -> None:
        """Pause all slots for this reason, or have them go on where there is none."""
        if reason and not self._short_since:
            self._short_since = time.monotonic()
            logger.error("no task is started: {}", reason)
        elif not reason and self._short_since:
            logger.bind(short_s=round(time.monotonic() - self._short_since, 1)).info("there is room again: tasks start")
            self._short_since = 0.0
        if reason and time.monotonic() - self._short_since > self._settings.wait_for_room_s:
            self._hand_back(reason)
        for slot in self._executor.slots.values():
            changed, slot.paused = bool(slot.paused) != bool(reason), reason
            if changed:
                self._executor.hooks.on_slot_changed(slot)
                self._executor.pump(slot)

    def _hand_back(self, reason: str) -> None:
        for run in [run for slot in self._executor.slots.values() for run in slot.queue]:
            stop = machine.StopRequested(Stop.NODE_FAULT, f"not started: {reason}")
            self._executor.apply(run, stop)


def shortage(folders: dict[str, Path], least_bytes: int) -> str:
    """Which of these has too little room, and how little; empty where all have enough."""
    for key, folder in folders.items():
        free_bytes = free_bytes_at(folder)
        if free_bytes is not None and free_bytes < least_bytes:
            return (
                f"{folder} ({key}) has {free_bytes / _MIB:.0f} MiB free, "
                f"less than the {least_bytes / _MIB:.0f} MiB of results.min_free_bytes"
            )
    return ""


def free_bytes_at(folder: Path) -> int | None:
    """What an ordinary user may still write there, or where it will be made; None where nobody can say."""
    for place in (folder, *folder.parents):
        try:
            found = os.statvfs(place)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        return found.f_bavail * found.f_frsize
    return None
