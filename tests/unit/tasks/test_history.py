"""The journal's history: kept with a task's end, read without the node, bounded, and known to older versions."""

from __future__ import annotations

import asyncio
import datetime
import sqlite3
from pathlib import Path

import pytest

from flowmesh.execution.history_entry import owner_of, shortened, tokens_of
from flowmesh.execution.housekeeping.old_history import prune
from flowmesh.messages.text import encode_msgpack
from flowmesh.redaction import Redactor, document_without_secrets, in_document
from flowmesh.settings.schema import NodeSettings
from flowmesh.tasks import history, journal_db
from flowmesh.tasks.history import Detail, Entry, Reader, entries, pack
from flowmesh.tasks.journal import Journal, JournalError
from flowmesh.tasks.machine import State, Task
from flowmesh.tasks.verdicts import Kind, Verdict


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


def day(number: int) -> str:
    return datetime.datetime(2026, 11, number, tzinfo=datetime.UTC).isoformat()


def add(journal: Journal, number: int, *, kept: bool = True, **fields: str) -> None:
    task_id = f"task-{number}"
    attempt = journal.accept(
        task_id=task_id, worker_id="w", dispatched_at=None, at=day(number), message=b"{}", out_dir="/r"
    )
    verdict = Verdict(kind=Kind(fields.get("verdict", "ok")), evidence="seen")
    entry = Entry(task_id=task_id, finished_at=day(number), **{"verdict": "ok", **fields})
    detail = Detail(document={"spec": {"prompts": ["x" * 3000]}})
    packed = pack(entry, detail) if kept else None
    journal.finish(attempt, Task(state=State.DONE, verdict=verdict), day(number), "c", b"event", kept=packed)


def test_entries_are_read_newest_first_and_filtered(path: Path) -> None:
    journal = Journal(path)
    add(journal, 1, owner="ana", type="sft")
    add(journal, 2, owner="bo", type="echo", verdict="crash")
    add(journal, 3, owner="ana", type="echo")
    assert [each.task_id for each in entries(path)] == ["task-3", "task-2", "task-1"]
    assert [each.task_id for each in entries(path, since=day(2))] == ["task-3", "task-2"]
    assert [each.task_id for each in entries(path, owner="ana")] == ["task-3", "task-1"]
    assert [each.task_id for each in entries(path, type="echo", verdict="ok")] == ["task-3"]
    assert [each.task_id for each in entries(path, limit=1)] == ["task-3"]
    with Reader(path) as reader:
        (found,) = reader.attempts("task-1")
        assert found.detail.document == {"spec": {"prompts": ["x" * 3000]}}
        assert (reader.matching("task-"), reader.matching("task-2")) == (["task-1", "task-2", "task-3"], ["task-2"])
        assert reader.matching("other") == []


def test_many_pages_are_read_in_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "PAGE", 2)
    journal = Journal(path)
    for number in range(1, 8):
        add(journal, number, kept=number % 3 != 0)
    assert [each.task_id for each in entries(path)] == [f"task-{number}" for number in range(7, 0, -1)]


def test_a_task_without_history_has_what_the_journal_knows(path: Path) -> None:
    journal = Journal(path)
    add(journal, 1, kept=False, verdict="crash")
    (entry,) = entries(path)
    assert (entry.task_id, entry.verdict, entry.finished_at) == ("task-1", "crash", day(1))
    with Reader(path) as reader:
        assert reader.attempts("task-1")[0].detail.evidence == "seen"


def test_a_running_task_is_found_and_is_not_among_those_that_ended(path: Path) -> None:
    journal = Journal(path)
    attempt = journal.accept(task_id="t", worker_id="w", dispatched_at=None, at=day(1), message=b"{1}", out_dir="/r")
    journal.update(attempt, Task(state=State.LAUNCHING), {"received": 1.0, "launching": 2.0})
    assert list(entries(path)) == []
    with Reader(path) as reader:
        (found,) = reader.attempts("t")
        assert (found.entry.state, found.message) == ("launching", b"{1}")
        assert found.detail.marks == {"received": 1.0, "launching": 2.0}
        assert [each.task_id for each in reader.running()] == ["t"]


def test_what_is_too_old_or_too_much_goes_in_steps_and_does_not_come_back(path: Path) -> None:
    journal = Journal(path)
    for number in range(1, 29):
        add(journal, number)
    now = datetime.datetime(2026, 11, 28, tzinfo=datetime.UTC)
    asyncio.run(prune(NodeSettings(history_days=20.5), journal, now))
    assert [each.task_id for each in entries(path)] == [f"task-{number}" for number in range(28, 7, -1)]
    asyncio.run(prune(NodeSettings(history_days=20.5, history_max=2), journal, now))
    assert [each.task_id for each in entries(path)] == ["task-28", "task-27"]
    assert journal.prune_history(before=day(1), keep=2, most_bytes=1 << 40) == 0
    assert journal.prune_history(before=day(1), keep=2, most_bytes=1) == 2, "the journal is too large"
    assert list(entries(path)) == []


def test_the_end_of_a_task_is_written_where_its_history_cannot_be(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path)
    with sqlite3.connect(path) as db:
        db.execute("CREATE TRIGGER full BEFORE INSERT ON history BEGIN SELECT RAISE(ABORT, 'full'); END")
    add(journal, 1)
    assert [row[2] for row in journal.outgoing()] == [b"event"], "once"
    assert journal.open_tasks() == []
    with sqlite3.connect(path) as db:
        db.execute("DROP TRIGGER full")
    monkeypatch.setattr(journal_db, "ROOM_BYTES", 1 << 62)
    add(journal, 2)
    assert journal.open_tasks() == []
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM history").fetchone() == (0,)


def test_a_reader_neither_waits_for_the_node_nor_makes_it_wait(path: Path) -> None:
    journal = Journal(path)
    add(journal, 1)
    with Reader(path) as reader, journal.transaction():
        add(journal, 2)
        assert [each.task_id for each in reader.ended()] == ["task-1"]
    assert len(list(entries(path))) == 2
    with pytest.raises(JournalError, match="no journal; give --state-dir"):
        Reader(path.with_name("none"))
    path.with_name("bad").write_bytes(b"not a database at all" * 99)
    with pytest.raises(JournalError, match="cannot be read"):
        Reader(path.with_name("bad"))


OLD_TABLES = """
CREATE TABLE tasks (attempt INTEGER PRIMARY KEY AUTOINCREMENT, task_id TEXT NOT NULL, worker_id TEXT NOT NULL,
 dispatched_at TEXT, accepted_at TEXT NOT NULL, started_at TEXT, finished_at TEXT, state TEXT NOT NULL,
 message BLOB NOT NULL, progress BLOB NOT NULL, out_dir TEXT NOT NULL, server TEXT, boot_mark TEXT);
CREATE TABLE outbox (seq INTEGER PRIMARY KEY AUTOINCREMENT, channel TEXT NOT NULL, payload BLOB NOT NULL);
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
PRAGMA user_version=1;
"""
"""As versions without a history made them."""
OLD_ACCEPT = (
    "INSERT INTO tasks (task_id, worker_id, dispatched_at, accepted_at, state, message, progress, out_dir)"
    " VALUES (?, 'w', NULL, ?, 'done', x'', ?, '/r')"
)
OLD_READ = (
    "SELECT attempt, task_id, worker_id, dispatched_at, accepted_at, started_at, finished_at, message, progress,"
    " out_dir, server, boot_mark FROM tasks"
)


def test_a_journal_of_an_older_version_is_read_and_taken_over_and_given_back(path: Path) -> None:
    done = encode_msgpack(Task(state=State.DONE, verdict=Verdict(kind=Kind.OK)))
    with sqlite3.connect(path) as db:
        db.executescript(OLD_TABLES)
        db.execute(OLD_ACCEPT, ("task-1", day(1), done))
        db.execute("UPDATE tasks SET finished_at = ?", (day(1),))
    assert [each.task_id for each in entries(path)] == ["task-1"], "before a new node has opened it"
    journal = Journal(path)
    add(journal, 2)
    assert [each.task_id for each in entries(path)] == ["task-2", "task-1"]
    journal.close()
    with sqlite3.connect(path) as db:  # what the old version does, after a downgrade
        db.execute(OLD_ACCEPT, ("task-3", day(3), done))
        db.execute("UPDATE tasks SET finished_at = ? WHERE task_id = 'task-3'", (day(3),))
        assert len(db.execute(OLD_READ).fetchall()) == 3
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
    Journal(path).close()
    assert [each.task_id for each in entries(path)] == ["task-3", "task-2", "task-1"]


def test_a_document_is_kept_without_its_secrets() -> None:
    document = {
        "metadata": {"owner": "ana"},
        "spec": {
            "api_key": "k1",
            "pad_token": "<pad>",
            "env": {"HF_TOKEN": "x", "LANG": "C"},
            "output": {"destination": {"headers": {"Authorization": "Bearer abc", "Accept": "text/plain"}}},
            "data": [{"url": "https://u:secret-word@host/a?token=t0psecret99"}],
            "prompt": "the known one is sesame-open",
        },
    }
    shown, hidden = document_without_secrets(
        document, Redactor(["sesame-open", *in_document(document, {})], prose=True)
    )
    assert hidden == (
        "spec.api_key",
        "spec.env.HF_TOKEN",
        "spec.output.destination.headers.Authorization",
        "spec.data[0].url",
        "spec.prompt",
    )
    spec = shown["spec"]
    assert (spec["api_key"], spec["pad_token"], spec["env"]) == (
        "[hidden]",
        "<pad>",
        {"HF_TOKEN": "[hidden]", "LANG": "C"},
    )
    assert "secret" not in str(shown)
    assert "sesame" not in str(shown)


def test_a_long_document_is_cut_in_bounded_time() -> None:
    task = {"spec": {"prompts": ["y" * 1000] * 100_000, "deep": [[[["z"]]]], **{f"k{n}": n for n in range(500)}}}
    spec = shortened(task)["spec"]
    assert spec["prompts"][-1] == "… 99995 more"
    assert spec["prompts"][0] == "y" * 200 + "… (1000 characters)"
    assert len(spec) == 101


def test_owner_and_tokens_are_found_where_people_write_them() -> None:
    assert owner_of({"name": "n", "labels": {"team": "vision"}}) == "vision"
    assert owner_of({"owner": 7, "user": "bo"}) == "bo"
    assert tokens_of({"usage": {"total_tokens": 12}}) == 12
    assert tokens_of({"metrics": {"num_tokens": 3.0}}) == 3
    assert tokens_of({"usage": "none"}) is None
