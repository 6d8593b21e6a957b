"""Removes the oldest results where `results.keep_days` or `results.keep_bytes` say so.

Only folders below RESULTS_DIR of tasks that the journal knows as finished; never those of a task that is here, or whose
results have not been delivered.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from loguru import logger

from flowmesh.execution import layout as files
from flowmesh.execution.launch.boot_clock import SteadyClock
from flowmesh.tasks.journal import Finished
from flowmesh.tasks.verdicts import Kind

if TYPE_CHECKING:
    from flowmesh.execution.executor import Executor

_ASIDE = ".removed-"  # no task's id begins like this


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A finished task's folder, or that of a task that was merged into it."""

    attempt: int = 0
    task_id: str
    folder: Path
    finished_at: datetime.datetime
    size_bytes: int


class Retention:
    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._settings = executor.settings.results
        self._sizes: dict[tuple[str, str], int] = {}
        """By folder and end: what is finished does not grow."""
        self._clock = SteadyClock()

    async def sweep(self) -> list[Kept]:
        """One round; returns what was removed, oldest first."""
        settings, layout, journal = self._settings, self._executor.layout, self._executor.journal
        finished = journal.finished()
        kept = await asyncio.to_thread(self._look, finished, self._in_use(), layout.results_dir)
        removed = []
        for each in choose(kept, settings.keep_days, settings.keep_bytes, self._clock.now()):
            if _touches(each.folder, self._in_use()):  # it came again meanwhile
                continue
            await asyncio.to_thread(files.remove_tree, _set_aside(each.folder, layout.results_dir))
            facts = {"path": str(each.folder), "bytes": each.size_bytes, "finished_at": each.finished_at.isoformat()}
            logger.bind(task=each.task_id, **facts).info("old results removed")
            removed.append(each)
        still = {each.attempt for each in set(kept) - set(removed)}
        journal.forget(each.attempt for each in finished if each.attempt not in still)
        return removed

    def _in_use(self) -> set[Path]:
        """Folders of the tasks that are here, with their merged children's."""
        runs = self._executor.runs.values()
        return {Path(each.out_dir) for run in runs for each in (run.accepted.target, *run.accepted.children)}

    def _look(self, finished: list[Finished], in_use: set[Path], results_dir: Path) -> list[Kept]:
        """In a thread: the folders that are there and may go. Of several attempts at a task the last one counts."""
        results_dir = results_dir.resolve()  # as the tasks' folders are
        for left in results_dir.glob(f"{_ASIDE}*"):  # by a node that was killed over it
            files.remove_tree(left)
        last = {out_dir: each for each in finished for out_dir in (each.out_dir, *each.child_dirs)}
        kinds = {out_dir: each.task.verdict.kind for out_dir, each in last.items() if each.task.verdict is not None}
        protected = in_use | {Path(out_dir) for out_dir, kind in kinds.items() if kind is Kind.DELIVERY_FAILED}
        found, sizes = [], {}
        for out_dir, each in last.items():
            folder = Path(out_dir)
            if results_dir not in folder.parents or folder.is_symlink() or not folder.is_dir():
                continue
            if _touches(folder, protected):
                continue
            key = (out_dir, each.finished_at)
            sizes[key] = self._sizes[key] if key in self._sizes else _size_bytes(folder)
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


def choose(kept: list[Kept], keep_days: float | None, keep_bytes: int | None, now: datetime.datetime) -> list[Kept]:
    """Which are to go: the too old ones, and then the oldest until the rest is small enough. Pure."""
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
    """In one step, on the loop: a task that comes again from now on has a folder of its own, whole."""
    aside = results_dir / f"{_ASIDE}{secrets.token_hex(8)}"
    try:
        folder.rename(aside)
    except OSError:  # a disk of its own
        return folder
    return aside


def _touches(folder: Path, others: set[Path]) -> bool:
    """Whether one of the others is this folder, lies in it, or holds it."""
    return any(folder == each or folder in each.parents or each in folder.parents for each in others)


def _size_bytes(folder: Path) -> int:
    """What it takes on its disk."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += Path(parent, name).lstat().st_blocks * 512
            except OSError:
                continue
    return total
