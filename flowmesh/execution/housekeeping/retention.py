"""Removes the oldest results where `results.keep_days` or `results.keep_bytes` say so.

Only folders below RESULTS_DIR of tasks that the journal has as finished; never those of a task that the node has now,
or whose results have not been delivered.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import msgspec
from loguru import logger

from flowmesh.errors import FlowMeshError
from flowmesh.execution.boot_clock import SteadyClock
from flowmesh.files.folder import Folder
from flowmesh.files.names import shown
from flowmesh.files.removal import Left, remove_path
from flowmesh.files.safe_folder import open_folder
from flowmesh.files.walk import Troubles
from flowmesh.settings.schema import ResultsSettings
from flowmesh.tasks.journal import Finished, Journal

FIRST_AFTER_S = 1.0
INTERVAL_S = 60.0
_ASIDE = ".removed-"  # no task's id begins like this


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """The results of a finished task, or of a task that was merged into it."""

    attempt: int = 0
    task_id: str
    folder: Path
    finished_at: datetime.datetime
    size_bytes: int


class Retention:
    """
    Args:
        in_use: the results folders of tasks that the node has now.
    """

    def __init__(
        self, *, settings: ResultsSettings, results_dir: Path, journal: Journal, in_use: Callable[[], set[Path]]
    ) -> None:
        self._settings = settings
        self._results_dir = results_dir
        self._journal = journal
        self._in_use = in_use
        self._sizes: dict[tuple[str, str], int] = {}
        """By folder and time of its end: the size of finished results does not change."""
        self._stuck: set[Path] = set()
        """What could not be removed whole, so that it is reported once and not each round."""
        self._clock = SteadyClock()

    async def run(self) -> None:
        """One round each INTERVAL_S, until cancelled. An error is logged; the next round tries again."""
        await asyncio.sleep(FIRST_AFTER_S)
        while True:
            try:
                if self._settings.keep_days is None and self._settings.keep_bytes is None:
                    self._journal.forget()
                else:
                    await self.sweep()
            except (FlowMeshError, OSError) as error:
                logger.warning("old results were not removed: {}", error)
            await asyncio.sleep(INTERVAL_S)

    async def sweep(self) -> list[Kept]:
        """One round; returns what was removed as a whole, oldest first."""
        settings = self._settings
        results_dir = await asyncio.to_thread(self._results_dir.resolve)  # as the tasks' folders are
        finished = self._journal.finished()
        kept = await asyncio.to_thread(self._look, finished, self._in_use(), results_dir)
        removed = []
        for each in choose(kept, settings.keep_days, settings.keep_bytes, self._clock.now()):
            if _touches(each.folder, self._in_use()):  # a new attempt at it was accepted meanwhile
                continue
            aside = _set_aside(each.folder, results_dir)
            if left := await asyncio.to_thread(remove_at, aside):
                self._report(aside, left)
                continue
            facts = {"path": str(each.folder), "bytes": each.size_bytes, "finished_at": each.finished_at.isoformat()}
            logger.bind(task=each.task_id, **facts).info("old results removed")
            removed.append(each)
        still = {each.attempt for each in set(kept) - set(removed)}
        self._journal.forget(each.attempt for each in finished if each.attempt not in still)
        return removed

    def _look(self, finished: list[Finished], in_use: set[Path], results_dir: Path) -> list[Kept]:
        """In a thread: the folders that are there and may go. Of several attempts at a task the last one counts."""
        for aside in _set_aside_before(results_dir):
            if left := remove_at(aside):
                self._report(aside, left)
        last = {out_dir: each for each in finished for out_dir in (each.out_dir, *each.child_dirs)}
        protected = in_use | {Path(out_dir) for out_dir, each in last.items() if each.undelivered}
        found, sizes = [], {}
        for out_dir, each in last.items():
            folder = Path(out_dir)
            if results_dir not in folder.parents or _touches(folder, protected):
                continue
            key = (out_dir, each.finished_at)
            try:
                with Folder.open(folder) as top:
                    sizes[key] = self._sizes[key] if key in self._sizes else size_bytes(top)
            except OSError:  # it is gone, or a link
                continue
            finished_at = datetime.datetime.fromisoformat(each.finished_at)
            kept = Kept(
                attempt=each.attempt,
                task_id=each.task_id,
                folder=folder,
                finished_at=finished_at,
                size_bytes=sizes[key],
            )
            found.append(kept)
        self._sizes = sizes
        return found

    def _report(self, folder: Path, left: Left) -> None:
        if folder not in self._stuck:
            self._stuck.add(folder)
            logger.bind(path=shown(str(folder))).warning("old results could not all be removed: {}", left)


def choose(kept: list[Kept], keep_days: float | None, keep_bytes: int | None, now: datetime.datetime) -> list[Kept]:
    """Which results to remove: those older than `keep_days`, then the oldest until the rest is within `keep_bytes`."""
    ordered = sorted(kept, key=lambda each: each.finished_at)
    left_bytes = sum(each.size_bytes for each in ordered)
    chosen = []
    for each in ordered:
        too_old = keep_days is not None and now - each.finished_at > datetime.timedelta(days=keep_days)
        if not too_old and (keep_bytes is None or left_bytes <= keep_bytes):
            break
        chosen.append(each)
        left_bytes -= each.size_bytes
    return chosen


def _set_aside(folder: Path, results_dir: Path) -> Path:
    """Rename it, on the loop: a new attempt at the task that is accepted from now on has its own, whole folder.

    By descriptors: the folders above may be another task's, which could put links there.
    """
    aside = results_dir / f"{_ASIDE}{secrets.token_hex(8)}"
    try:
        with Folder.open(folder.parent) as source, Folder.open(results_dir) as target:
            os.rename(folder.name, aside.name, src_dir_fd=source.fd, dst_dir_fd=target.fd)
    except OSError:  # it is a mount point, or on another disk than RESULTS_DIR
        return folder
    return aside


def _set_aside_before(results_dir: Path) -> list[Path]:
    """By a node that was killed while it removed them, and what could not be removed."""
    try:
        return [results_dir / name for name in sorted(os.listdir(results_dir)) if name.startswith(_ASIDE)]
    except OSError:
        return []


def remove_at(path: Path) -> Left:
    """Remove a folder of a task, unless a link leads to it. Blocks."""
    return remove_path(path, open_folder)


def _touches(folder: Path, others: set[Path]) -> bool:
    """Whether one of the others is this folder, lies in it, or holds it."""
    return any(folder == each or folder in each.parents or each in folder.parents for each in others)


def size_bytes(folder: Folder) -> int:
    """The disk space that a task's folder takes, as far as it can be looked at."""
    return sum(each.status.st_blocks * 512 for each in folder.entries(Troubles()))
