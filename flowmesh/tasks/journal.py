"""The node's memory on disk: accepted tasks, their states, and the outbox of events. SQLite, one writer.

What a reader of Redis can see is never ahead of what stands here: a task's end and its event are one transaction,
and an event leaves the outbox only when Redis has taken it. Survives any kill of the process; after a loss of power
the last moments may be missing (WAL, synchronous=NORMAL), as the tasks themselves are then.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from flowmesh.errors import FlowMeshError
from flowmesh.tasks.machine import State, Task
from flowmesh.tasks.verdicts import Kind

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (
    attempt INTEGER PRIMARY KEY AUTOINCREMENT,
    task_id TEXT NOT NULL,
    worker_id TEXT NOT NULL,
    dispatched_at TEXT,
    accepted_at TEXT NOT NULL,
    started_at TEXT,
    finished_at TEXT,
    state TEXT NOT NULL,
    message BLOB NOT NULL,
    progress BLOB NOT NULL,
    out_dir TEXT NOT NULL,
    server TEXT,
    boot_mark TEXT
);
CREATE INDEX IF NOT EXISTS tasks_open ON tasks (state) WHERE state != 'done';
CREATE INDEX IF NOT EXISTS tasks_by_id ON tasks (task_id);
CREATE TABLE IF NOT EXISTS child_folders (attempt INTEGER NOT NULL, out_dir TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS child_folders_by_attempt ON child_folders (attempt);
CREATE TABLE IF NOT EXISTS outbox (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    channel TEXT NOT NULL,
    payload BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

RESERVE_PAGES = 1024
"""Pages (of 4 KiB) that the file, and its log, have beforehand: tasks' ends are written on a full disk, too."""
KEPT_DONE = 10_000
"""Finished tasks that stay known, for `flowmesh logs` and to tell a duplicate from a retry. Older ones stay, too, where
they still have to be delivered, or where their results are to be removed one day."""


class JournalError(FlowMeshError):
    """The journal cannot be used. Without it the node could lose tasks, so it does not run."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt as the journal knows it."""

    attempt: int
    task_id: str
    worker_id: str
    dispatched_at: str | None
    accepted_at: str
    started_at: str | None
    finished_at: str | None
    message: bytes
    """The dispatch, as it came. Empty for finished ones."""
    task: Task
    out_dir: str
    server: str | None
    """The fork server that has, or had, its process."""
    boot_mark: str | None
    """Its start as seconds since the machine's boot; see execution.clock."""


class Finished(msgspec.Struct, frozen=True):
    """A finished attempt, as long as nobody asks for more."""

    attempt: int
    task_id: str
    out_dir: str
    finished_at: str
    progress: bytes
    child_dirs: tuple[str, ...] = ()
    """Folders of the tasks that were merged into it."""

    @property
    def task(self) -> Task:
        return _task_decoder.decode(self.progress)


_task_decoder = msgspec.msgpack.Decoder(Task)
_COLUMNS = (
    "attempt, task_id, worker_id, dispatched_at, accepted_at, started_at, finished_at,"
    " message, progress, out_dir, server, boot_mark"
)


def _record(row: tuple[object, ...]) -> Record:
    names = _COLUMNS.split(", ")
    values = dict(zip(names, row, strict=True))
    values["task"] = _task_decoder.decode(values.pop("progress"))  # type: ignore[arg-type]
    return msgspec.convert(values, Record)


class Journal:
    """Open, or make, the journal at `path`. Used from one thread."""

    def __init__(self, path: Path) -> None:
        try:
            path.touch(mode=0o600)
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA busy_timeout=5000")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA_VERSION):
                raise JournalError(
                    f"{path}: written by another version (schema {version}, this one has {SCHEMA_VERSION}); "
                    "run that version, or set node.state_dir to another folder"
                )
            self._look_for_damage(path)
            self._db.executescript(_SCHEMA)
            self._add_columns()
            self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            self._sent = 0
            """Up to here Redis has taken the outbox, even where that could not be written down yet."""
            self._reserve()
        except (sqlite3.Error, OSError) as error:
            raise JournalError(
                f"{path}: cannot be used as the journal: {error}; mend its disk, or move the file away "
                "(what it knew of tasks is then lost)"
            ) from error

    def close(self) -> None:
        self._db.close()

    def _look_for_damage(self, path: Path) -> None:
        found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise JournalError(
                f"{path}: damaged ({' '.join(found.split())[:200]}); move the file away to start with an empty one "
                "(what it knew of tasks is then lost)"
            )

    def _add_columns(self) -> None:
        """What a journal of the same schema may lack. An older node does not miss them, and can have it back."""
        there = {row[1] for row in self._db.execute("PRAGMA table_info(tasks)")}
        if "boot_mark" not in there:
            self._db.execute("ALTER TABLE tasks ADD COLUMN boot_mark TEXT")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing. May be nested: the outermost one decides."""
        if self._db.in_transaction:
            yield
            return
        self._write("BEGIN IMMEDIATE")
        try:
            yield
            self._write("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _write(self, statement: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise JournalError(f"the journal cannot be written: {error}") from error

    def _reserve(self) -> None:
        """Have room in the file and in its log: what is free inside of them needs no disk when it is used."""
        try:
            self._db.execute("INSERT OR REPLACE INTO facts VALUES ('reserve', zeroblob(?))", (RESERVE_PAGES * 4096,))
            self._db.execute("DELETE FROM facts WHERE name = 'reserve'")
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")
            self._db.execute("PRAGMA shrink_memory")
        except sqlite3.OperationalError:
            return  # no room now; what was reserved before is there still

    # ---- tasks -------------------------------------------------------------------------------------------------------

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
        """Write down a task that is now ours; returns its attempt number, which is never used again."""
        task = Task()
        with self.transaction():
            cursor = self._write(
                "INSERT INTO tasks (task_id, worker_id, dispatched_at, accepted_at, state, message, progress, out_dir)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (task_id, worker_id, dispatched_at, at, task.state, message, msgspec.msgpack.encode(task), out_dir),
            )
            assert cursor.lastrowid is not None
            for child_dir in child_dirs:
                self._write("INSERT INTO child_folders VALUES (?, ?)", (cursor.lastrowid, child_dir))
        return cursor.lastrowid

    def update(self, attempt: int, task: Task) -> None:
        self._write(
            "UPDATE tasks SET state = ?, progress = ? WHERE attempt = ?",
            (task.state, msgspec.msgpack.encode(task), attempt),
        )

    def launching(self, attempt: int, task: Task, server: str) -> None:
        """Which fork server is about to get the task: where a restarted supervisor looks for it."""
        self._write(
            "UPDATE tasks SET state = ?, progress = ?, server = ? WHERE attempt = ?",
            (task.state, msgspec.msgpack.encode(task), server, attempt),
        )

    def started(self, attempt: int, task: Task, at: str, boot_mark: str) -> None:
        self._write(
            "UPDATE tasks SET state = ?, progress = ?, started_at = ?, boot_mark = ? WHERE attempt = ?",
            (task.state, msgspec.msgpack.encode(task), at, boot_mark, attempt),
        )

    def finish(self, attempt: int, task: Task, at: str, channel: str, event: bytes) -> None:
        """The task's end together with its event, in one transaction."""
        with self.transaction():
            self._write(
                "UPDATE tasks SET state = ?, progress = ?, finished_at = ?, message = x'' WHERE attempt = ?",
                (State.DONE, msgspec.msgpack.encode(task), at, attempt),
            )
            self.post(channel, event)

    def open_tasks(self) -> list[Record]:
        """Every accepted task without an end, oldest first."""
        rows = self._db.execute(f"SELECT {_COLUMNS} FROM tasks WHERE state != 'done' ORDER BY attempt")
        return [_record(row) for row in rows]

    def finished(self) -> list[Finished]:
        """Every attempt that has ended, oldest first; cheap, and to be looked into elsewhere than on the loop."""
        query = (
            "SELECT attempt, task_id, out_dir, finished_at, progress FROM tasks WHERE state = 'done' ORDER BY attempt"
        )
        children: dict[int, list[str]] = {}
        try:
            for attempt, child_dir in self._db.execute("SELECT attempt, out_dir FROM child_folders"):
                children.setdefault(attempt, []).append(child_dir)
            rows = self._db.execute(query)
            return [
                Finished(attempt, task_id, out_dir, at, progress, tuple(children.get(attempt, ())))
                for attempt, task_id, out_dir, at, progress in rows
            ]
        except sqlite3.Error as error:
            raise JournalError(f"the journal cannot be read: {error}") from error

    def forget(self, gone: Iterable[int] | None = None) -> None:
        """Drop finished attempts of long ago, but none that still has to be delivered.

        Args:
            gone: those that nothing is left of; None: nobody will ask.
        """
        last = self._db.execute("SELECT max(attempt) FROM tasks").fetchone()[0] or 0
        # a blob of msgpack has its words as they are
        drop = "DELETE FROM tasks WHERE state = 'done' AND attempt <= ? AND instr(progress, CAST(? AS BLOB)) = 0"
        values = (last - KEPT_DONE, Kind.DELIVERY_FAILED.value)
        with self.transaction():
            if gone is None:
                self._write(drop, values)
            for attempt in gone or ():
                if attempt <= last - KEPT_DONE:
                    self._write(f"{drop} AND attempt = ?", (*values, attempt))
            self._write("DELETE FROM child_folders WHERE attempt NOT IN (SELECT attempt FROM tasks)")

    def latest(self, task_id: str) -> Record | None:
        """The newest attempt at a task."""
        row = self._db.execute(
            f"SELECT {_COLUMNS} FROM tasks WHERE task_id = ? ORDER BY attempt DESC LIMIT 1", (task_id,)
        ).fetchone()
        return None if row is None else _record(row)

    def attempt(self, attempt: int) -> Record | None:
        row = self._db.execute(f"SELECT {_COLUMNS} FROM tasks WHERE attempt = ?", (attempt,)).fetchone()
        return None if row is None else _record(row)

    # ---- outbox ------------------------------------------------------------------------------------------------------

    def post(self, channel: str, payload: bytes) -> None:
        """Put a message into the outbox. It leaves in order, after all that were posted before it."""
        self._write("INSERT INTO outbox (channel, payload) VALUES (?, ?)", (channel, payload))

    def outgoing(self, limit: int = 100) -> list[tuple[int, str, bytes]]:
        """The oldest messages of the outbox: (sequence, channel, payload)."""
        query = "SELECT seq, channel, payload FROM outbox WHERE seq > ? ORDER BY seq LIMIT ?"
        return self._db.execute(query, (self._sent, limit)).fetchall()

    def sent(self, seq: int) -> None:
        """All messages up to `seq` have been taken by Redis."""
        self._sent = seq
        with contextlib.suppress(JournalError):  # with the next ones, then
            self._write("DELETE FROM outbox WHERE seq <= ?", (seq,))

    def outbox_size(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM outbox WHERE seq > ?", (self._sent,)).fetchone()[0])

    # ---- facts -------------------------------------------------------------------------------------------------------

    def fact(self, name: str, default: str) -> str:
        """A value that outlives a restart; `default` is kept where there is none yet."""
        self._db.execute("INSERT OR IGNORE INTO facts (name, value) VALUES (?, ?)", (name, default))
        return str(self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()[0])


def ensure_private_dir(path: Path) -> None:
    """Make `path` with its parents, readable for its owner only.

    Raises:
        JournalError: it cannot be made, or belongs to somebody else.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        owner = path.stat().st_uid
    except OSError as error:
        raise JournalError(
            f"{path}: cannot be made ({error.strerror}); set node.state_dir to a folder of yours"
        ) from error
    if owner != os.geteuid():
        raise JournalError(
            f"{path}: belongs to user {owner}, not to {os.geteuid()}; set node.state_dir to another folder"
        )
