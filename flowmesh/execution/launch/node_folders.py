"""The node's folders as faults of the node: results, state with its journal, and free disk space.

They are looked at every second and before each launch, so that a task does not have to meet a fault first. What can be
made again (the parts of the state folder, the journal's file) is made again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
from loguru import logger

from flowmesh.execution.conditions import Conditions, Fault
from flowmesh.execution.launch.disk_space import shortage
from flowmesh.execution.layout import PARTS, Layout
from flowmesh.execution.run import Run
from flowmesh.node.folder_check import CheckedFolder
from flowmesh.settings.schema import ResultsSettings
from flowmesh.tasks import machine
from flowmesh.tasks.journal import Journal, JournalError

INTERVAL_S = 1.0
_MOUNT_FACT = "results_mount"
RESULTS, STATE, SPACE, JOURNAL = "results.dir", "node.state_dir", "disk space", "journal"


class NodeFolders:
    """
    Args:
        wait_s: how long tasks wait for a folder that cannot be used.
    """

    def __init__(
        self, *, settings: ResultsSettings, layout: Layout, journal: Journal, conditions: Conditions, wait_s: float
    ) -> None:
        self._settings = settings
        self._layout = layout
        self._journal = journal
        self._conditions = conditions
        self._wait_s = wait_s
        self._kept: tuple[str, str] | None = None
        """What the journal has of the mount of RESULTS_DIR."""
        self._results = CheckedFolder(RESULTS, layout.results_dir, self._kept_mount())
        self._state = CheckedFolder(STATE, layout.state_dir)
        self.faults: Mapping[str, Fault] = {
            RESULTS: Fault(name=RESULTS, probe=lambda: self._in_thread(RESULTS), wait_s=wait_s),
            STATE: Fault(name=STATE, probe=lambda: self._in_thread(STATE), wait_s=wait_s),
            SPACE: Fault(
                name=SPACE,
                probe=lambda: self._in_thread(SPACE),
                wait_s=settings.wait_for_room_s,
                longest_s=INTERVAL_S,
            ),
            # Nothing goes on without it, and who locks it, as a backup does, often has it for moments only.
            JOURNAL: Fault(
                name=JOURNAL, probe=self._probe_journal, wait_s=wait_s, longest_s=INTERVAL_S, holds_journal=True
            ),
        }

    async def watch(self) -> None:
        """Look every INTERVAL_S, until cancelled."""
        while True:
            self._keep_mount()
            await asyncio.sleep(INTERVAL_S)
            self.report(await asyncio.to_thread(self.look))
            if not self._journal.in_place():
                self.journal_failed("its file is gone or was replaced")

    def _kept_mount(self) -> Path | None:
        """Where the file system of RESULTS_DIR was mounted when an earlier supervisor looked last."""
        kept = self._journal.find_fact(_MOUNT_FACT)
        try:
            folder, mount = msgspec.json.decode(kept or b"", type=tuple[str, str])
        except msgspec.DecodeError:
            return None
        return Path(mount) if folder == str(self._layout.results_dir) else None

    def _keep_mount(self) -> None:
        now = (str(self._layout.results_dir), str(self._results.mount))
        if now != self._kept:
            with contextlib.suppress(JournalError):  # tried again
                self._journal.set_fact(_MOUNT_FACT, msgspec.json.encode(now).decode())
                self._kept = now

    def on_one_disk(self) -> bool:
        """Whether RESULTS_DIR was on the journal's file system when they were looked at last."""
        return self._results.device is not None and self._results.device == self._state.device

    async def look_first(self) -> None:
        """To be awaited before anything is written there: RESULTS_DIR may have been unmounted meanwhile."""
        self.report(await asyncio.to_thread(self.look))

    def look(self, *, write: bool = False) -> dict[str, str]:
        """What is wrong now, by fault. Called in a thread.

        Args:
            write: write small files, too: something could not be written.
        """
        found = {name: self._trouble(name, write) for name in (RESULTS, STATE, SPACE)}
        return {name: reason for name, reason in found.items() if reason}

    def report(self, troubles: Mapping[str, str]) -> None:
        """Close the slots for these reasons; their probes open them."""
        for name, reason in troubles.items():
            self._conditions.report(self.faults[name], reason)

    async def met(self, run: Run) -> machine.Event | None:
        """The next event of a task that could not be launched, if that is for these folders; None if they work."""
        troubles = await asyncio.to_thread(self.look, write=True)
        if not troubles:
            return None
        self.report(troubles)
        name, reason = next(iter(troubles.items()))
        return self._conditions.met(run, self.faults[name], reason)

    async def usable(self, run: Run) -> bool:
        """Wait while a folder that a computed result needs cannot be used; False if that takes too long."""
        deadline = time.monotonic() + self._wait_s
        while any(map(self._conditions.holds, (RESULTS, STATE))):
            if not _computed(run) or run.task.stop is not None or time.monotonic() > deadline:
                return False
            await asyncio.sleep(INTERVAL_S / 4)
        return True

    async def failed(self, run: Run) -> bool:
        """Whether a delivery that failed has met a fault of the folders, and it is over now."""
        if not _computed(run):
            return False
        troubles = await asyncio.to_thread(self.look)
        self.report(troubles)
        return bool(troubles.keys() & {RESULTS, STATE}) and await self.usable(run)

    def journal_failed(self, reason: str) -> None:
        self._conditions.report(self.faults[JOURNAL], reason)

    def _trouble(self, name: str, write: bool) -> str:
        match name:
            case "results.dir":
                return self._results.trouble(write=write)
            case "node.state_dir":
                return self._state.trouble(write=write) or self._parts(write)
            case _:
                folders = {RESULTS: self._layout.results_dir, STATE: self._layout.state_dir}
                return shortage(folders, self._settings.min_free_bytes)

    def _parts(self, write: bool) -> str:
        folder = self._layout.state_dir
        missing = [name for name in PARTS if not (folder / name).is_dir()]
        try:
            if missing:
                self._layout.make_parts()
                logger.bind(folder=str(folder)).warning("made again: {}", ", ".join(missing))
        except OSError as error:
            return f"{error.filename} ({STATE}) cannot be made again: {error.strerror}"
        parts = (CheckedFolder(STATE, folder / name) for name in PARTS) if write else ()
        return next((reason for part in parts if (reason := part.trouble(write=True))), "")

    async def _in_thread(self, name: str) -> str:
        trouble = await asyncio.to_thread(self._trouble, name, True)
        self._keep_mount()
        return trouble

    async def _probe_journal(self) -> str:
        try:
            self._journal.probe()
        except JournalError as error:
            return str(error)
        return ""


def own_shortage(out_dir: Path, least_bytes: int) -> str:
    """Too little space for one task's own folder; empty if it has enough. Called in a thread."""
    return shortage({"spec.output.destination.path": out_dir}, least_bytes, of_a_task=True)


def _computed(run: Run) -> bool:
    return run.task.verdict is not None and run.task.verdict.ok
