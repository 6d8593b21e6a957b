"""Removes the oldest results where `results.keep_days` or `results.keep_bytes` say so.

Only folders below RESULTS_DIR of tasks that the journal has as finished; never those of a task that the node has now,
or whose results have not been delivered. The journal is read once, in pages; after that a round reads only what is new
or may have changed, and remembers only attempts of which something is on disk.
"""

from __future__ import annotations

import asyncio
import datetime
import errno
import os
import secrets
from array import array
from collections.abc import Callable, Iterable
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
from flowmesh.processes import linux
from flowmesh.settings.schema import ResultsSettings
from flowmesh.tasks.journal import Journal, Placed

FIRST_AFTER_S = 1.0
INTERVAL_S = 60.0
PAGE = 500
"""Attempts that are read at once: a few milliseconds of the loop."""
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""Of a folder that is gone, or a link by now."""
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
        self._sizes: dict[tuple[int, Path], int] = {}
        """By attempt and folder: the size of finished results does not change."""
        self._stuck: set[Path] = set()
        """What could not be removed whole, so that it is reported once and not each round."""
        self._clock = SteadyClock()
        self._read_anew(None)

    def _read_anew(self, place: tuple[int, int] | None) -> None:
        """Know nothing of the journal yet."""
        self._place = place
        """Device and inode of the results folder: what is not found there may be where it was before."""
        self._seen = 0
        """The attempts up to this one were read."""
        self._open: set[int] = set()
        """Those of them that had not ended."""
        self._there: dict[int, Placed] = {}
        """Those of them that had, and of whose results something is on disk."""
        self._gone = array("q")
        """Those of them of whose results nothing is, while the journal has them."""

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
            await asyncio.to_thread(linux.trim_malloc)
            await asyncio.sleep(INTERVAL_S)

    async def sweep(self) -> list[Kept]:
        """One round; returns what was removed as a whole, oldest first."""
        settings = self._settings
        results_dir = await asyncio.to_thread(self._results_dir.resolve)  # as the tasks' folders are
        if (place := await asyncio.to_thread(self._finish_removals, results_dir)) != self._place:
            self._read_anew(place)
        await self._read(results_dir)
        kept, guarded = await self._look(self._there.values(), results_dir)
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
        still = set(kept) - set(removed)
        self._sizes = {(each.attempt, each.folder): each.size_bytes for each in still}
        self._drop({each.attempt for each in removed} - {each.attempt for each in still} - guarded)
        until = self._journal.forget(self._gone)
        self._gone = array("q", (attempt for attempt in self._gone if attempt > until))
        return removed

    async def _read(self, results_dir: Path) -> None:
        """Learn what the journal has since the last round. Of a full page only what is on disk is kept."""
        changing = sorted(self._open | {each.attempt for each in self._there.values() if each.undelivered})
        for start in range(0, len(changing), PAGE):
            page = changing[start : start + PAGE]
            self._open.difference_update(page)
            self._take(self._journal.placed_of(page))
        full = True
        while full:
            rows = self._journal.placed(self._seen, PAGE)
            self._take(rows)
            if full := len(rows) == PAGE:
                await self._look([each for each in rows if each.attempt in self._there], results_dir)

    def _take(self, rows: Iterable[Placed]) -> None:
        for each in rows:
            self._seen = max(self._seen, each.attempt)
            if each.finished_at is None:
                self._open.add(each.attempt)
            else:
                self._there[each.attempt] = each

    def _drop(self, attempts: Iterable[int]) -> None:
        """Nothing of their results is on disk."""
        for attempt in attempts:
            del self._there[attempt]
            self._gone.append(attempt)

    async def _look(self, attempts: Iterable[Placed], results_dir: Path) -> tuple[list[Kept], set[int]]:
        """Look at their folders; forget those that have none.

        Returns:
            the folders that may go, and the attempts that have others.
        """
        given = list(attempts)
        kept, guarded = await asyncio.to_thread(self._folders, given, self._in_use(), results_dir)
        self._drop({each.attempt for each in given} - {each.attempt for each in kept} - guarded)
        return kept, guarded

    def _folders(self, attempts: list[Placed], in_use: set[Path], results_dir: Path) -> tuple[list[Kept], set[int]]:
        """In a thread; see `_look`. Of several attempts at a task the last one counts."""
        last = {Path(out_dir): each for each in attempts for out_dir in (each.out_dir, *each.child_dirs)}
        protected = in_use | {folder for folder, each in last.items() if each.undelivered}
        found: list[Kept] = []
        guarded: set[int] = set()
        for folder, each in last.items():
            if results_dir not in folder.parents:
                continue
            if _touches(folder, protected):
                guarded.add(each.attempt)
                continue
            try:
                with Folder.open(folder) as top:
                    size = self._sizes.get((each.attempt, folder))
                    size = size_bytes(top) if size is None else size
            except OSError as error:
                if error.errno not in _MISSING:
                    guarded.add(each.attempt)
                continue
            self._sizes[each.attempt, folder] = size
            assert each.finished_at is not None
            finished_at = datetime.datetime.fromisoformat(each.finished_at)
            kept = Kept(
                attempt=each.attempt, task_id=each.task_id, folder=folder, finished_at=finished_at, size_bytes=size
            )
            found.append(kept)
        return found, guarded

    def _finish_removals(self, results_dir: Path) -> tuple[int, int] | None:
        """In a thread: remove what an earlier round left; returns what the results folder is, None if there is none."""
        for aside in _set_aside_before(results_dir):
            if left := remove_at(aside):
                self._report(aside, left)
        try:
            status = results_dir.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

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
