"""What became of the tasks of a node: read from its journal, while the node runs or is down.

The journal is opened for reading only, for one short statement at a time: a node that writes never waits for it.
"""

from __future__ import annotations

import contextlib
import heapq
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.messages.text import encode_msgpack
from flowmesh.tasks.history_table import PRUNED_UNTIL, Kept
from flowmesh.tasks.journal_db import JournalError
from flowmesh.tasks.machine import State, Task

PAGE = 500
"""Rows that one statement reads."""
BUSY_S = 2.0
"""How long a statement waits for another program's lock."""
COMPRESSED_FROM = 1024
"""Bytes; less is kept as it is."""


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One attempt at a task, in short. Times are ISO 8601, UTC. None: unknown, or there is none."""

    task_id: str
    attempt: int | None = None
    """None: it was never accepted."""
    state: str = "done"
    """Of a task that has not ended: its state."""
    type: str = ""
    worker_id: str = ""
    owner: str = ""
    """Who submitted it, as `metadata` says."""
    name: str = ""
    """`metadata.name`."""
    verdict: str = ""
    """A value of `verdicts.Kind`; empty: it has not ended."""
    message: str = ""
    """Why it failed, in one line."""
    received_at: str = ""
    started_at: str | None = None
    finished_at: str = ""
    wall_s: float = 0.0
    """How long it ran."""
    gpu_s: float = 0.0
    """`wall_s` times its GPUs."""
    joules: float | None = None
    """Energy of its GPUs, and its share of the CPU's."""
    cost_usd: float | None = None
    api_usd: float | None = None
    """What its requests to endpoints have cost."""
    tokens: int | None = None
    """Read and written."""
    rows: int | None = None
    out_dir: str = ""

    @property
    def ok(self) -> bool:
        return self.verdict == "ok"


class Detail(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What else is kept of it."""

    document: dict[str, Any] | None = None
    """As it was submitted, with secrets hidden; cut short where `whole` is false."""
    whole: bool = True
    hidden: tuple[str, ...] = ()
    """Paths of the fields whose secrets are hidden."""
    document_bytes: int = 0
    marks: dict[str, float] = {}
    """When it entered each state, in seconds since 1970."""
    phases: dict[str, float] = {}
    """Seconds in each phase of the run."""
    evidence: str = ""
    retryable: bool | None = None
    exit: dict[str, Any] | None = None
    log_tail: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    resources: dict[str, Any] = {}
    energy: dict[str, Any] | None = None
    deliveries: int | None = None
    """Attempts to deliver its results."""
    urls: tuple[str, ...] = ()
    """Where its files can be downloaded."""
    children: dict[str, str] = {}
    """The results folder of each merged task, by its id."""
    versions: dict[str, str] = {}
    """Of the libraries that its process had imported, and of `flowmesh`."""
    gpus: dict[str, str] = {}
    """Names of its GPUs, by UUID."""
    traceparent: str = ""
    """The span that it belongs to; empty: none was named."""
    tracestate: str = ""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt with all that is kept of it."""

    entry: Entry
    detail: Detail
    message: bytes = b""
    """The dispatch of a task that has not ended: with its secrets, so not to be shown."""


_entry_decoder = msgspec.msgpack.Decoder(Entry)
_detail_decoder = msgspec.msgpack.Decoder(Detail)
_task_decoder = msgspec.msgpack.Decoder(Task)
_marks_decoder = msgspec.msgpack.Decoder(dict[str, float])

_TASKS = (
    "SELECT attempt, task_id, worker_id, accepted_at, started_at, finished_at, progress, out_dir, {message}, {marks}"
    " FROM tasks"
)


def pack(entry: Entry, detail: Detail) -> Kept:
    """Encode what is kept of a task."""
    data = encode_msgpack(detail)
    if len(data) >= COMPRESSED_FROM:
        data = zlib.compress(data, 1)
    return Kept(task_id=entry.task_id, finished_at=entry.finished_at, entry=encode_msgpack(entry), detail=data)


def entries(
    journal: Path,
    *,
    since: str | None = None,
    type: str | None = None,
    verdict: str | None = None,
    owner: str | None = None,
    limit: int | None = None,
) -> Iterator[Entry]:
    """The tasks that have ended on a node, the last one first.

    Args:
        journal: its `journal.sqlite`.
        since: only those that ended at this time or later; ISO 8601, UTC.
        limit: at most so many.

    Raises:
        JournalError: the journal cannot be read.
    """
    wanted = {"type": type, "verdict": verdict, "owner": owner}
    with Reader(journal) as reader:
        left = limit
        for entry in reader.ended(since or ""):
            if any(value is not None and getattr(entry, field) != value for field, value in wanted.items()):
                continue
            if left is not None and left <= 0:
                return
            yield entry
            left = None if left is None else left - 1


class Reader:
    """An open journal, for reading. As a context manager.

    Raises:
        JournalError: it cannot be read. All methods raise it.
    """

    def __init__(self, journal: Path) -> None:
        self._path = journal
        try:
            if not journal.exists():
                raise JournalError(f"{journal}: there is no journal; give --state-dir or --config of the node")
            self._db = sqlite3.connect(
                f"{journal.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_S, isolation_level=None
            )
        except (OSError, sqlite3.Error) as error:
            raise self._unreadable(error) from error
        try:
            tables = {name for (name,) in self._read("SELECT name FROM sqlite_master WHERE type = 'table'")}
            columns = {row[1] for row in self._read("PRAGMA table_info(tasks)")}
            self._has_history = "history" in tables
            self._marks = "marks" if "marks" in columns else "NULL"
            until = self._read("SELECT value FROM facts WHERE name = ?", PRUNED_UNTIL) if "facts" in tables else []
            self._pruned_until = str(until[0][0]) if until else ""
            self._has_tasks = "tasks" in tables
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def ended(self, since: str = "") -> Iterator[Entry]:
        """The attempts that ended at `since` or later, the last one first."""
        return heapq.merge(self._kept(since), self._others(since), key=lambda entry: entry.finished_at, reverse=True)

    def matching(self, prefix: str) -> list[str]:
        """The ids of the tasks that have this id, or else begin like it: a few of them."""
        first, last = prefix, f"{prefix}\x7f"
        tables = ["tasks"] * self._has_tasks + ["history"] * self._has_history
        found: set[str] = set()
        for table in tables:
            query = f"SELECT DISTINCT task_id FROM {table} WHERE task_id >= ? AND task_id < ? LIMIT 10"
            found |= {str(row[0]) for row in self._read(query, first, last)}
            if self._read(f"SELECT 1 FROM {table} WHERE task_id = ? LIMIT 1", prefix):
                return [prefix]
        return sorted(found)

    def attempts(self, task_id: str) -> list[Found]:
        """All attempts at a task that are known, the last one first."""
        found: list[Found] = []
        if self._has_history:
            rows = self._read(
                "SELECT entry, detail, attempt FROM history WHERE task_id = ? ORDER BY id DESC LIMIT 100", task_id
            )
            found = [_found(*row) for row in rows]
        have = {each.entry.attempt for each in found}
        rows = self._tasks("WHERE task_id = ? ORDER BY attempt DESC LIMIT 100", task_id, message="message")
        found += [_of_row(row) for row in rows if row[0] not in have]
        return sorted(found, key=lambda each: each.entry.finished_at or "~", reverse=True)

    def running(self) -> list[Entry]:
        """The tasks that have not ended, oldest first."""
        return [_of_row(row).entry for row in self._tasks("WHERE state != 'done' ORDER BY attempt")]

    def _kept(self, since: str) -> Iterator[Entry]:
        before = 1 << 62
        while self._has_history:
            rows = self._read(
                "SELECT id, finished_at, entry, attempt FROM history WHERE id < ? ORDER BY id DESC LIMIT ?",
                before,
                PAGE,
            )
            for _, finished_at, entry, attempt in rows:
                if finished_at < since:
                    return
                yield msgspec.structs.replace(self._decoded(entry), attempt=attempt)
            if len(rows) < PAGE:
                return
            before = rows[-1][0]

    def _decoded(self, entry: bytes) -> Entry:
        try:
            return _entry_decoder.decode(entry)
        except msgspec.MsgspecError as error:
            raise JournalError(f"{self._path}: an entry of the history cannot be read: {error}") from error

    def _others(self, since: str) -> Iterator[Entry]:
        """Attempts that ended while there was no history, or no room for it: only what the table of tasks has."""
        before = 1 << 62
        known = "AND attempt NOT IN (SELECT attempt FROM history WHERE attempt IS NOT NULL)" * self._has_history
        while True:
            rows = self._tasks(
                f"WHERE state = 'done' AND finished_at > ? AND finished_at >= ? AND attempt < ? {known}"
                " ORDER BY attempt DESC LIMIT ?",
                self._pruned_until, since, before, PAGE,
            )  # fmt: skip
            ended = [_of_row(row).entry for row in rows]
            yield from sorted(ended, key=lambda entry: entry.finished_at, reverse=True)
            if len(rows) < PAGE:
                return
            before = rows[-1][0]

    def _tasks(self, where: str, *values: object, message: str = "x''") -> list[tuple[Any, ...]]:
        if not self._has_tasks:
            return []
        return self._read(f"{_TASKS.format(message=message, marks=self._marks)} {where}", *values)

    def _read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            with contextlib.closing(self._db.execute(query, values)) as cursor:
                return cursor.fetchall()
        except sqlite3.Error as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> JournalError:
        locked = getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
        if locked:
            return JournalError(f"{self._path}: another program has locked it; try again")
        return JournalError(f"{self._path}: cannot be read ({error}); run this as the node's user, or as root")


def _found(entry: bytes, detail: bytes, attempt: int | None) -> Found:
    data = zlib.decompress(detail) if detail[:1] == b"\x78" else detail
    return Found(
        entry=msgspec.structs.replace(_entry_decoder.decode(entry), attempt=attempt),
        detail=_detail_decoder.decode(data),
    )


def _of_row(row: tuple[Any, ...]) -> Found:
    attempt, task_id, worker_id, accepted_at, started_at, finished_at, progress, out_dir, message, marks = row
    task = _task_decoder.decode(progress)
    verdict = task.verdict
    entry = Entry(
        task_id=task_id,
        attempt=attempt,
        state=State.DONE.value if finished_at else task.state.value,
        worker_id=worker_id,
        verdict=verdict.kind.value if verdict is not None else "",
        message=verdict.message if verdict is not None else "",
        received_at=accepted_at,
        started_at=started_at,
        finished_at=finished_at or "",
        out_dir=out_dir,
    )
    detail = Detail(
        evidence=verdict.evidence if verdict is not None else "",
        retryable=None if verdict is None or verdict.ok else verdict.retryable,
        exit=msgspec.to_builtins(verdict.exit) if verdict is not None and verdict.exit is not None else None,
        marks=_marks_decoder.decode(marks) if marks else {},
    )
    return Found(entry=entry, detail=detail, message=message)
