"""The table of the journal that has what became of each task. Its rows go by their own rule, `node.history_*`."""

from __future__ import annotations

import msgspec

from flowmesh.tasks.journal_db import JournalDatabase

PRUNED_AT_ONCE = 100
"""Rows: a few milliseconds of the loop."""
PRUNED_UNTIL = "history_pruned"
"""The fact that has when the newest row ended that was deleted."""


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a task, encoded; see tasks.history."""

    task_id: str
    finished_at: str
    entry: bytes
    detail: bytes


def add(db: JournalDatabase, attempt: int | None, kept: Kept) -> None:
    """Add a row, in the caller's transaction. Nothing where the disk is nearly full.

    Args:
        attempt: None: the task was never accepted.

    Raises:
        JournalError: it cannot be written.
    """
    if db.has_room():
        db.write(
            "INSERT INTO history (attempt, task_id, finished_at, entry, detail) VALUES (?, ?, ?, ?, ?)",
            (attempt, kept.task_id, kept.finished_at, kept.entry, kept.detail),
        )


def prune(db: JournalDatabase, *, before: str, keep: int, most_bytes: int) -> int:
    """Delete rows that are too old or too many, the oldest first: at most PRUNED_AT_ONCE. In the caller's transaction.

    Takes the same time however many rows there are.

    Args:
        before: rows of tasks that ended before this time go, ISO 8601, UTC.
        keep: how many rows stay at most.
        most_bytes: the oldest go while the journal takes more than this.

    Returns:
        how many were deleted; 0: nothing is left to delete.

    Raises:
        JournalError: the journal cannot be read or written.
    """
    oldest = db.read("SELECT id, finished_at FROM history ORDER BY id LIMIT ?", (PRUNED_AT_ONCE,))
    if not oldest:
        return 0
    # Rows leave in the order of their numbers, so those that are left have consecutive ones.
    surplus = db.read("SELECT max(id) FROM history")[0][0] - oldest[0][0] + 1 - keep
    if db.used_bytes() > most_bytes:
        surplus = max(surplus, PRUNED_AT_ONCE // 10)
    gone = [row for index, row in enumerate(oldest) if index < surplus or row[1] < before]
    for number, _ in gone:
        db.write("DELETE FROM history WHERE id = ?", (number,))
    if gone:
        db.write("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)", (PRUNED_UNTIL, gone[-1][1]))
    return len(gone)
