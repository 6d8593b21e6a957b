"""The journal: what was written stands after any kill, ends and events are one, the outbox keeps its order."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from flowmesh.tasks.journal import Journal, JournalError, ensure_private_dir
from flowmesh.tasks.machine import State, Task
from flowmesh.tasks.verdicts import Kind, Verdict


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.sqlite")


def accept(journal: Journal, task_id: str = "t", date: str | None = "d") -> int:
    return journal.accept(
        task_id=task_id, worker_id="w", dispatched_at=date, at="2026-01-01", message=b"{}", out_dir="/r/t"
    )


def test_a_task_from_accepted_to_done(journal: Journal) -> None:
    attempt = accept(journal)
    (record,) = journal.open_tasks()
    assert (record.attempt, record.task_id, record.task.state) == (attempt, "t", State.QUEUED)
    journal.launching(attempt, Task(state=State.LAUNCHING), "light-1")
    journal.started(attempt, Task(state=State.RUNNING), "2026-01-02", "boot 1.5")
    (record,) = journal.open_tasks()
    assert (record.server, record.started_at, record.task.state) == ("light-1", "2026-01-02", State.RUNNING)
    assert record.boot_mark == "boot 1.5"
    journal.finish(attempt, Task(state=State.DONE), "2026-01-03", "tasks.events", b"end")
    assert journal.open_tasks() == []
    assert [row[1:] for row in journal.outgoing()] == [("tasks.events", b"end")]
    latest = journal.latest("t")
    assert latest is not None
    assert (latest.task.state, latest.finished_at, latest.message) == (State.DONE, "2026-01-03", b"")


def test_attempt_numbers_are_never_used_again(journal: Journal) -> None:
    first = accept(journal)
    journal.finish(first, Task(state=State.DONE), "t", "c", b"")
    assert accept(journal) == first + 1
    latest = journal.latest("t")
    assert latest is not None
    assert latest.attempt == first + 1


def test_the_outbox_keeps_its_order_and_forgets_only_what_was_sent(journal: Journal) -> None:
    for n in range(5):
        journal.post("c", b"%d" % n)
    rows = journal.outgoing(3)
    assert [payload for _, _, payload in rows] == [b"0", b"1", b"2"]
    journal.sent(rows[1][0])
    assert [payload for _, _, payload in journal.outgoing()] == [b"2", b"3", b"4"]
    assert journal.outbox_size() == 3


def test_a_transaction_is_whole_or_not_there(journal: Journal) -> None:
    def broken() -> None:
        with journal.transaction():
            journal.post("c", b"lost")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert journal.outbox_size() == 0


def test_facts_stay(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    assert journal.fact("node_id", "a") == "a"
    journal.close()
    assert Journal(tmp_path / "j").fact("node_id", "b") == "a"


_KILLED = """
import os, sys
from pathlib import Path
from flowmesh.tasks.journal import Journal
journal = Journal(Path(sys.argv[1]))
n = 0
while True:
    with journal.transaction():
        n += 1
        attempt = journal.accept(task_id=f"t{n}", worker_id="w", dispatched_at=None, at="", message=b"{}", out_dir="/")
        journal.post("c", b"%d" % attempt)
    print(attempt, flush=True)
"""


def test_what_was_said_to_be_written_survives_kill_9(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(tmp_path / "j")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [int(process.stdout.readline()) for _ in range(200)]
    os.kill(process.pid, signal.SIGKILL)
    said += [int(line) for line in process.stdout.read().split()]
    process.wait()
    process.stdout.close()
    journal = Journal(tmp_path / "j")
    there = [record.attempt for record in journal.open_tasks()]
    assert there[: len(said)] == said
    assert [int(payload) for _, _, payload in journal.outgoing(10**6)] == there


def test_what_cannot_be_a_journal_says_so(tmp_path: Path) -> None:
    (tmp_path / "j").write_text("no database, but long enough to be looked at" * 100)
    with pytest.raises(JournalError, match="cannot be used as the journal"):
        Journal(tmp_path / "j")


def test_a_journal_of_another_version_is_left_alone(tmp_path: Path) -> None:
    import sqlite3

    with sqlite3.connect(tmp_path / "j") as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(JournalError, match="another version"):
        Journal(tmp_path / "j")


def test_its_folder_is_private(tmp_path: Path) -> None:
    ensure_private_dir(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    Journal(tmp_path / "a" / "b" / "j")
    assert (tmp_path / "a" / "b" / "j").stat().st_mode & 0o777 == 0o600


def test_a_journal_that_lacks_a_column_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    Journal(path).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("ALTER TABLE tasks DROP COLUMN boot_mark")
    journal = Journal(path)
    attempt = accept(journal)
    journal.started(attempt, Task(state=State.RUNNING), "2026-01-02", "boot 1.5")
    (record,) = journal.open_tasks()
    assert record.boot_mark == "boot 1.5"


def test_what_is_no_journal_is_told_in_one_line_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(JournalError, match=r"cannot be used as the journal: file is not a database; .*move the file"):
        Journal(path)


def test_a_damaged_journal_is_found_before_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    journal = Journal(path)
    with journal.transaction():
        for n in range(2000):
            accept(journal, f"task-{n}")
    journal.close()
    data = bytearray(path.read_bytes())
    for at in range(2 * 4096, len(data), 4096):
        data[at : at + 64] = b"\xff" * 64
    path.write_bytes(data)
    with pytest.raises(JournalError, match="move the file away") as told:
        Journal(path)
    assert "\n" not in str(told.value)


def test_another_versions_journal_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    Journal(path).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version=7")
    before = path.read_bytes()
    with pytest.raises(JournalError, match=r"schema 7, this one has 1\); run that version, or set node.state_dir"):
        Journal(path)
    assert path.read_bytes() == before


def test_what_was_long_ago_goes_but_not_what_still_has_to_be_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowmesh.tasks.journal.KEPT_DONE", 3)
    journal = Journal(tmp_path / "j")
    for kind in (Kind.OK, Kind.DELIVERY_FAILED, Kind.OK, Kind.ERROR, Kind.OK, Kind.OK, Kind.OK):
        attempt = journal.accept(task_id="t", worker_id="w", dispatched_at=None, at="", message=b"{}", out_dir="/t")
        journal.finish(attempt, Task(state=State.DONE, verdict=Verdict(kind=kind)), "", "c", b"{}")
    journal.forget(gone=[1, 2, 3, 6])
    assert [each.attempt for each in journal.placed(0, 10)] == [2, 4, 5, 6, 7]
    journal.forget()
    assert [each.attempt for each in journal.placed(0, 10)] == [2, 5, 6, 7]
