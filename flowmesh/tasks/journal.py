"""The node's memory on disk: accepted tasks, their states, and the outbox of events. One writer.

What a reader of Redis can see is never ahead of the journal: a task's end and its event are one transaction, and an
event leaves the outbox only after Redis has taken it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.messages.text import encode_msgpack
from flowmesh.messages.wire import RECORDS_LANE
from flowmesh.tasks import history_table
from flowmesh.tasks.history_table import Kept
from flowmesh.tasks.journal_db import JournalDatabase, JournalError
from flowmesh.tasks.machine import State, Task
from flowmesh.tasks.sendings_table import Sending, Sendings
from flowmesh.tasks.verdicts import Kind

__all__ = ["Journal", "JournalError", "Kept", "Placed", "Record", "ensure_private_dir"]

KEPT_DONE = 10_000
"""Finished attempts that are kept, for `flowmesh logs` and to distinguish a duplicate from a retry. Older ones stay too
while they must be delivered again, or while their results must be removed some day."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt, with everything that the journal has of it."""

    attempt: int
    task_id: str
    worker_id: str
    dispatched_at: str | None
    accepted_at: str
    started_at: str | None
    finished_at: str | None
    message: bytes
    """The dispatch as it was received. Empty for finished attempts."""
    task: Task
    out_dir: str
    server: str | None
    """The fork server that has, or had, its process."""
    boot_mark: str | None
    """When it started, in seconds since the machine booted, with the boot's id; see execution.boot_clock."""
    marks: dict[str, float] = {}
    """When it entered each state, in seconds since 1970."""


class Placed(msgspec.Struct, frozen=True):
    """Where an attempt's results are: what retention needs."""

    attempt: int
    task_id: str
    out_dir: str
    finished_at: str | None
    """None: it has not ended."""
    undelivered: bool
    """Whether its results could not be delivered, so that they must stay."""
    child_dirs: tuple[str, ...] = ()
    """Folders of the tasks that were merged into it."""


_task_decoder = msgspec.msgpack.Decoder(Task)
_marks_decoder = msgspec.msgpack.Decoder(dict[str, float])
_COLUMNS = (
    "attempt, task_id, worker_id, dispatched_at, accepted_at, started_at, finished_at,"
    " message, progress, out_dir, server, boot_mark, marks"
)


class Journal:
    """The journal at `path`, made where there is none. Used from one thread.

    Raises:
        JournalError: the file cannot be used. Every method raises it where the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._db = JournalDatabase(path)
        self.sendings = Sendings(self._db)
        self._sent = 0
        """The outbox up to this sequence number was taken by Redis, even if the deletion could not be written yet."""
        self._reported = 0
        """The same for reports."""
        self._outbox_size = 0
        """When it was last read."""

    def close(self) -> None:
        self._db.close()

    def transaction(self) -> contextlib.AbstractContextManager[None]:
        """All or nothing. May be nested: the outermost one decides."""
        return self._db.transaction()

    def accept(
        self,
        *,
        task_id: str,
        worker_id: str,
        dispatched_at: str | None,
        at: str,
        message: bytes,
        out_dir: str,
        child_dirs: Iterable[str] = (),
    ) -> int:
        """Record an accepted task.

        Returns:
            Its attempt number, which is never used again.
        """
        task = Task()
        with self.transaction():
            cursor = self._db.write(
                "INSERT INTO tasks (task_id, worker_id, dispatched_at, accepted_at, state, message, progress, out_dir)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (task_id, worker_id, dispatched_at, at, task.state, message, encode_msgpack(task), out_dir),
            )
            assert cursor.lastrowid is not None
            for child_dir in child_dirs:
                self._db.write("INSERT INTO child_folders VALUES (?, ?)", (cursor.lastrowid, child_dir))
        return cursor.lastrowid

    def update(self, attempt: int, task: Task, marks: Mapping[str, float] | None = None) -> None:
        """Record the task's state.

        Args:
            marks: when it entered each state; None: as it was recorded before.
        """
        if marks is None:
            self._set(attempt, task)
        else:
            self._set(attempt, task, marks=encode_msgpack(marks))

    def launching(self, attempt: int, task: Task, server: str) -> None:
        """Record which fork server is about to get the task: a restarted supervisor looks for it there."""
        self._set(attempt, task, server=server)

    def started(
        self, attempt: int, task: Task, at: str, boot_mark: str, marks: Mapping[str, float] | None = None
    ) -> None:
        self._set(attempt, task, started_at=at, boot_mark=boot_mark, marks=encode_msgpack(marks or {}))

    def finish(
        self,
        attempt: int,
        task: Task,
        at: str,
        channel: str,
        event: bytes,
        *,
        kept: Kept | None = None,
        sendings: Sequence[Sending] = (),
    ) -> None:
        """Record the task's end together with its event and its history, in one transaction.

        Args:
            kept: its history, which is left out where there is no room for it.
            sendings: what is sent about it elsewhere, likewise.
        """

        def end(kept: Kept | None, sendings: Sequence[Sending]) -> None:
            with self.transaction():
                self._set(attempt, task, state=State.DONE, finished_at=at, message=b"")
                self.post(channel, event)
                self._keep(attempt, kept, sendings)

        try:
            end(kept, sendings)
        except JournalError:
            if kept is None and not sendings:
                raise
            end(None, ())

    def refuse(self, channel: str, event: bytes, kept: Kept | None = None, sendings: Sequence[Sending] = ()) -> None:
        """Record the event of a task that was never accepted, its history, and what is sent about it elsewhere."""
        with self.transaction():
            self.post(channel, event)
            self._keep(None, kept, sendings)

    def _keep(self, attempt: int | None, kept: Kept | None, sendings: Sequence[Sending]) -> None:
        if kept is not None:
            history_table.add(self._db, attempt, kept)
        for sending in sendings:
            self.sendings.add(sending)

    def prune_history(self, *, before: str, keep: int, most_bytes: int) -> int:
        """Delete some of the history; see `history_table.prune`."""
        with self.transaction():
            return history_table.prune(self._db, before=before, keep=keep, most_bytes=most_bytes)

    def keep_reserve(self) -> None:
        """Reserve disk space again for the ends of tasks, where much of it has been used."""
        self._db.keep_reserve()

    def open_tasks(self) -> list[Record]:
        """Every accepted task without an end, oldest first."""
        return self._records("WHERE state != 'done' ORDER BY attempt")

    def latest(self, task_id: str) -> Record | None:
        """The newest attempt at a task."""
        return next(iter(self._records("WHERE task_id = ? ORDER BY attempt DESC LIMIT 1", task_id)), None)

    def attempt(self, attempt: int) -> Record | None:
        return next(iter(self._records("WHERE attempt = ?", attempt)), None)

    def placed(self, after: int, limit: int) -> list[Placed]:
        """The next attempts after this one, in their order: at most `limit`."""
        return self._placed("attempt > ? ORDER BY attempt LIMIT ?", after, limit)

    def placed_of(self, attempts: Sequence[int]) -> list[Placed]:
        """These attempts, as far as they are there: at most a few hundred."""
        return self._placed(f"attempt IN ({', '.join('?' * len(attempts))}) ORDER BY attempt", *attempts)

    def _placed(self, where: str, *values: int) -> list[Placed]:
        # msgpack stores strings verbatim, so the verdict's kind can be searched for in the blob
        rows = self._db.read(
            "SELECT attempt, task_id, out_dir, iif(state = 'done', finished_at, NULL),"
            f" instr(progress, CAST(? AS BLOB)) > 0 FROM tasks WHERE {where}",
            (Kind.DELIVERY_FAILED.value, *values),
        )
        children: dict[int, list[str]] = {}
        if rows:
            for attempt, child_dir in self._db.read(
                "SELECT attempt, out_dir FROM child_folders WHERE attempt BETWEEN ? AND ?", (rows[0][0], rows[-1][0])
            ):
                children.setdefault(attempt, []).append(child_dir)
        return [
            Placed(attempt, task_id, out_dir, at, bool(undelivered), tuple(children.get(attempt, ())))
            for attempt, task_id, out_dir, at, undelivered in rows
        ]

    def folders_in(self, folder: str) -> list[str]:
        """Folders of tasks, and of merged children, inside this one."""
        first, last = f"{folder}/", f"{folder}0"  # "0" comes after "/"
        return [
            out_dir
            for table in ("tasks", "child_folders")
            for (out_dir,) in self._db.read(
                f"SELECT out_dir FROM {table} WHERE out_dir > ? AND out_dir < ?", (first, last)
            )
        ]

    def forget(self, gone: Iterable[int] | None = None) -> int:
        """Delete finished attempts beyond the last KEPT_DONE, except those that must be delivered again.

        Args:
            gone: delete only these, of which nothing is left on disk; None: any.

        Returns:
            the attempt up to which they may be deleted now.
        """
        last: int = self._db.read("SELECT max(attempt) FROM tasks")[0][0] or 0
        until = last - KEPT_DONE
        drop = "DELETE FROM tasks WHERE state = 'done' AND attempt <= ? AND instr(progress, CAST(? AS BLOB)) = 0"
        values = (until, Kind.DELIVERY_FAILED.value)
        with self.transaction():
            if gone is None:
                self._db.write(drop, values)
            for attempt in gone or ():
                if attempt <= until:
                    self._db.write(f"{drop} AND attempt = ?", (*values, attempt))
            self._db.write("DELETE FROM child_folders WHERE attempt NOT IN (SELECT attempt FROM tasks)")
        return until

    def post(self, channel: str, payload: bytes) -> None:
        """Put a message into the outbox. Messages leave in the order they were posted."""
        self._db.write("INSERT INTO outbox (channel, payload) VALUES (?, ?)", (channel, payload))

    def outgoing(self, limit: int = 100) -> list[tuple[int, str, bytes]]:
        """The oldest messages of the outbox, without reports: (sequence number, channel, payload)."""
        return self._db.read(
            "SELECT seq, channel, payload FROM outbox WHERE seq > ? AND channel != ? ORDER BY seq LIMIT ?",
            (self._sent, RECORDS_LANE, limit),
        )

    def sent(self, seq: int) -> None:
        """Redis has taken all messages up to `seq`."""
        self._sent = seq
        with contextlib.suppress(JournalError):  # deleted with the next ones, then
            self._db.write("DELETE FROM outbox WHERE seq <= ? AND channel != ?", (seq, RECORDS_LANE))

    def reports(self, limit: int = 100) -> list[tuple[int, bytes]]:
        """The oldest reports of the outbox: (sequence number, payload)."""
        return self._db.read(
            "SELECT seq, payload FROM outbox WHERE seq > ? AND channel = ? ORDER BY seq LIMIT ?",
            (self._reported, RECORDS_LANE, limit),
        )

    def reported(self, seq: int) -> None:
        """Redis has taken all reports up to `seq`."""
        self._reported = seq
        with contextlib.suppress(JournalError):  # deleted with the next ones, then
            self._db.write("DELETE FROM outbox WHERE seq <= ? AND channel = ?", (seq, RECORDS_LANE))

    def outbox_size(self) -> int:
        """How many messages wait in the outbox; the last known number while the journal cannot be read."""
        with contextlib.suppress(JournalError):
            rows = self._db.read(
                "SELECT count(*) FROM outbox WHERE seq > iif(channel = ?, ?, ?)",
                (RECORDS_LANE, self._reported, self._sent),
            )
            self._outbox_size = int(rows[0][0])
        return self._outbox_size

    def fact(self, name: str, default: str) -> str:
        """A value that outlives a restart; `default` is stored where there is none yet."""
        self._db.write("INSERT OR IGNORE INTO facts (name, value) VALUES (?, ?)", (name, default))
        return str(self._db.read("SELECT value FROM facts WHERE name = ?", (name,))[0][0])

    def set_fact(self, name: str, value: str | None) -> None:
        """Store a value that outlives a restart; None removes it."""
        if value is None:
            self._db.write("DELETE FROM facts WHERE name = ?", (name,))
        else:
            self._db.write("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)", (name, value))

    def find_fact(self, name: str) -> str | None:
        """A value that `set_fact` or `fact` stored; None if there is none."""
        rows = self._db.read("SELECT value FROM facts WHERE name = ?", (name,))
        return str(rows[0][0]) if rows else None

    def probe(self) -> None:
        """Check that it can be written, by writing. A file that somebody has deleted is made again."""
        self._db.probe()

    def in_place(self) -> bool:
        """Whether its file is still where it was opened. May be called in any thread."""
        return self._db.in_place()

    def disown(self, *facts: str) -> int:
        """Forget these facts, all open tasks and all events: they are another node's, of which this is a copy.

        Returns:
            how many tasks were open.
        """
        with self.transaction():
            for name in facts:
                self._db.write("DELETE FROM facts WHERE name = ?", (name,))
            self._db.write("DELETE FROM outbox")
            self._db.write("DELETE FROM sendings")
            return self._db.write("DELETE FROM tasks WHERE state != 'done'").rowcount

    def _set(self, attempt: int, task: Task, **columns: object) -> None:
        columns = {"state": task.state, "progress": encode_msgpack(task), **columns}
        names = ", ".join(f"{name} = ?" for name in columns)
        self._db.write(f"UPDATE tasks SET {names} WHERE attempt = ?", (*columns.values(), attempt))

    def _records(self, where: str, *values: object) -> list[Record]:
        return [_record(row) for row in self._db.read(f"SELECT {_COLUMNS} FROM tasks {where}", values)]


def _record(row: tuple[Any, ...]) -> Record:
    values = dict(zip(_COLUMNS.split(", "), row, strict=True))
    values["task"] = _task_decoder.decode(values.pop("progress"))
    marks = values.pop("marks")
    values["marks"] = _marks_decoder.decode(marks) if marks else {}
    return msgspec.convert(values, Record)


def ensure_private_dir(path: Path) -> None:
    """Make `path` with its parents, readable for its owner only.

    Raises:
        JournalError: it cannot be made, or belongs to another user.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        owner = path.stat().st_uid
    except OSError as error:
        raise JournalError(
            f"{path}: cannot be created ({error.strerror}); set node.state_dir to a folder of your own"
        ) from error
    if owner != os.geteuid():
        raise JournalError(
            f"{path}: belongs to user {owner}, not to {os.geteuid()}; set node.state_dir to another folder"
        )
