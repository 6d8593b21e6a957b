"""The journal's SQLite file: opened, checked, and with disk space reserved for the writes that must not fail.

WAL with synchronous=NORMAL: what is written survives any kill of the process. After a power loss the last moments may
be missing, as the tasks' processes are then.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowmesh.errors import EXIT_TRY_AGAIN, FlowMeshError

JOURNAL_FILE = "journal.sqlite"
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
    boot_mark TEXT,
    marks BLOB
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
CREATE TABLE IF NOT EXISTS history (
    id INTEGER PRIMARY KEY,
    attempt INTEGER,
    task_id TEXT NOT NULL,
    finished_at TEXT NOT NULL,
    entry BLOB NOT NULL,
    detail BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS history_by_task ON history (task_id);
CREATE INDEX IF NOT EXISTS history_by_attempt ON history (attempt);
CREATE TABLE IF NOT EXISTS sendings (
    seq INTEGER PRIMARY KEY,
    lane TEXT NOT NULL,
    id TEXT NOT NULL,
    posted_at REAL NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,
    due_at REAL NOT NULL DEFAULT 0,
    body BLOB NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS sendings_by_id ON sendings (lane, id);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

BUSY_START_MS = 5000
BUSY_MS = 25
"""How long a statement waits for another program's lock. The event loop waits meanwhile; its caller tries again."""
RESERVE_PAGES = 1024
"""Free pages (of 4 KiB) kept in the file and its log, so that the end of a task can be written on a full disk too."""

ROOM_BYTES = 32 * 1024**2
"""With less free space on its disk the journal keeps no history."""


class JournalError(FlowMeshError):
    """Raised when the journal cannot be used. Without it the node could lose tasks, so it does not run."""


class JournalDiskError(JournalError):
    """Raised at a start where that may pass: its disk is read-only, full or broken now."""

    exit_code = EXIT_TRY_AGAIN


class JournalDatabase:
    """The database at `path`, made where there is none. Used from one thread.

    Raises:
        JournalError: it cannot be opened, is damaged, or was written by another version.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.touch(mode=0o600)
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(f"PRAGMA busy_timeout={BUSY_START_MS}")
            self._check(path)
            self._db.executescript(_SCHEMA)
            self._add_columns()
            self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            self._reserve()
            self._db.execute(f"PRAGMA busy_timeout={BUSY_MS}")
            self._path, self._identity = path, _identity(path)
        except (sqlite3.Error, OSError) as error:
            passes = isinstance(error, OSError | sqlite3.OperationalError)
            raise (JournalDiskError if passes else JournalError)(
                f"{path}: cannot be used as the journal: {error}; repair its disk, or move the file away "
                "(its record of tasks is then lost)"
            ) from error

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing. May be nested: the outermost one decides."""
        if self._db.in_transaction:
            yield
            return
        self.write("BEGIN IMMEDIATE")
        try:
            yield
            self.write("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def write(self, statement: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        """Execute a statement that changes something.

        Raises:
            JournalError: it failed, as on a full disk.
        """
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise JournalError(f"the journal cannot be written: {_describe(error)}") from error

    def read(self, query: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query.

        Raises:
            JournalError: it failed, as on a broken disk.
        """
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise JournalError(f"the journal cannot be read: {_describe(error)}") from error

    def probe(self) -> None:
        """Write something, and make the file again if somebody has deleted it.

        Raises:
            JournalError: the journal cannot be written.
        """
        if not self.in_place():
            self._make_again()
        self.write("INSERT OR REPLACE INTO facts (name, value) VALUES ('probe', '')")

    def in_place(self) -> bool:
        """Whether the file that is open is the one at the journal's path. May be called in any thread."""
        try:
            return _identity(self._path) == self._identity
        except OSError:
            return False

    def _make_again(self) -> None:
        """Copy all of it into a new file, and use that."""
        if self._path.exists():
            raise JournalError(f"{self._path}: replaced by another file; move that one away, or restart the node")
        part = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            for each in (part, Path(f"{self._path}-wal"), Path(f"{self._path}-shm")):
                each.unlink(missing_ok=True)
            part.touch(mode=0o600)
            with contextlib.closing(sqlite3.connect(part)) as copy:
                self._db.backup(copy)
            part.rename(self._path)
            fresh = sqlite3.connect(self._path, isolation_level=None)
            fresh.execute("PRAGMA journal_mode=WAL")
            fresh.execute("PRAGMA synchronous=NORMAL")
            fresh.execute(f"PRAGMA busy_timeout={BUSY_MS}")
            identity = _identity(self._path)
        except (sqlite3.Error, OSError) as error:
            raise JournalError(f"{self._path}: deleted, and cannot be made again: {error}") from error
        self._db.close()
        self._db, self._identity = fresh, identity

    def _check(self, path: Path) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        _check_schema(path, version)
        found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise JournalError(
                f"{path}: damaged ({' '.join(found.split())[:200]}); move the file away to start with an empty one "
                "(its record of tasks is then lost)"
            )

    def _add_columns(self) -> None:
        """Add columns that are newer than the schema's version. Older nodes ignore them, and can use the file again."""
        present = {row[1] for row in self._db.execute("PRAGMA table_info(tasks)")}
        for name, kind in (("boot_mark", "TEXT"), ("marks", "BLOB")):
            if name not in present:
                self._db.execute(f"ALTER TABLE tasks ADD COLUMN {name} {kind}")

    def keep_reserve(self) -> None:
        """Reserve space again where half of what was reserved has been used since. May be called at any time."""
        if self.read("PRAGMA freelist_count")[0][0] < RESERVE_PAGES // 2:
            self._reserve()

    def used_bytes(self) -> int:
        """What is in use of the file, without the reserve."""
        pages, free, size = (
            self.read(f"PRAGMA {name}")[0][0] for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    def has_room(self) -> bool:
        """Whether the disk has room for more than the reserve, which is kept for the ends of tasks."""
        try:
            found = os.statvfs(self._path.parent)
        except OSError:
            return False
        return found.f_bavail * found.f_frsize > ROOM_BYTES

    def _reserve(self) -> None:
        """Grow the file and its log: pages that are free inside of them need no disk space when they are used."""
        try:
            self._db.execute("INSERT OR REPLACE INTO facts VALUES ('reserve', zeroblob(?))", (RESERVE_PAGES * 4096,))
            self._db.execute("DELETE FROM facts WHERE name = 'reserve'")
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")
            self._db.execute("PRAGMA shrink_memory")
        except sqlite3.OperationalError:
            return  # the disk is full now; what an earlier start reserved is still there


def check_version(path: Path) -> None:
    """Check that this version can use the journal at `path`; does nothing if there is none. Changes nothing.

    Raises:
        JournalError: it was written by another version, or cannot be read.
        PermissionError: this user may not read it.
    """
    try:
        if not path.exists():
            return
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            _check_schema(path, db.execute("PRAGMA user_version").fetchone()[0])
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except PermissionError:
        raise
    except (sqlite3.Error, OSError) as error:
        raise JournalError(f"{path}: cannot be read: {error}") from error


def _check_schema(path: Path, version: int) -> None:
    if version not in (0, SCHEMA_VERSION):
        raise JournalError(
            f"{path}: written by another version (schema {version}, this one has {SCHEMA_VERSION}); "
            "run that version, or set node.state_dir to another folder"
        )


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _describe(error: sqlite3.Error) -> str:
    locked = getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    return "another program has locked it" if locked else str(error)
