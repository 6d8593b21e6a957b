"""What waits to be sent: bounded lanes in the journal, ids once, and nothing of a copied state folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowmesh.tasks.history import Detail, Entry, pack
from flowmesh.tasks.journal import Journal
from flowmesh.tasks.machine import Task
from flowmesh.tasks.sendings_table import MOST, Sending


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.sqlite")


def accepted(journal: Journal) -> int:
    return journal.accept(task_id="t", worker_id="w", dispatched_at=None, at="2026", message=b"{}", out_dir="/r/t")


def test_a_tasks_end_and_what_is_sent_about_it_are_one_transaction(journal: Journal, tmp_path: Path) -> None:
    kept = pack(Entry(task_id="t", worker_id="w"), Detail())
    journal.finish(
        accepted(journal), Task(), "2026", "c", b"e", kept=kept, sendings=[Sending(lane="a", id="1", body=b"x")]
    )
    journal.close()
    again = Journal(tmp_path / "journal.sqlite")
    assert [(row.id, row.body) for row in again.sendings.due("a", 10)] == [("1", b"x")]
    assert again.outbox_size() == 1


def test_a_lane_is_bounded_and_drops_its_oldest(journal: Journal) -> None:
    with journal.transaction():
        for number in range(MOST + 3):
            journal.sendings.add(Sending(lane="a", id=str(number), body=b""))
        journal.sendings.add(Sending(lane="b", id="0", body=b""))
    assert journal.sendings.waiting("a") == MOST
    assert journal.sendings.due("a", 1)[0].id == "3"
    assert journal.sendings.dropped == {"a": 3}
    assert journal.sendings.waiting("b") == 1


def test_an_id_is_kept_once_and_a_refused_row_waits(journal: Journal) -> None:
    for body in (b"first", b"second"):
        journal.sendings.add(Sending(lane="a", id="1", body=body))
    (row,) = journal.sendings.due("a", 10)
    assert row.body == b"first"
    journal.sendings.later(row, 60.0)
    assert journal.sendings.due("a", 10) == []
    assert 50 < (journal.sendings.next_due_s("a") or 0) <= 60
    assert journal.sendings.has("a", "1")
    journal.sendings.sent([row.seq])
    assert not journal.sendings.has("a", "1")
    assert journal.sendings.next_due_s("a") is None


def test_lanes_that_nobody_has_and_those_of_a_copy_are_emptied(journal: Journal) -> None:
    for lane in ("a", "b"):
        journal.sendings.add(Sending(lane=lane, id="1", body=b""))
    journal.sendings.keep(["a"])
    assert (journal.sendings.waiting("a"), journal.sendings.waiting("b")) == (1, 0)
    journal.disown()
    assert journal.sendings.waiting("a") == 0
