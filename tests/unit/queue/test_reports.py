"""Reports: events of tasks with a record go another way than all others, and keep what their script needs."""

from __future__ import annotations

import json
from pathlib import Path

from flowmesh.messages.wire import RECORDS_LANE, TASK_EVENTS_CHANNEL, Recorded, TaskEvent, encode
from flowmesh.queue.reports import decode, outgoing
from flowmesh.tasks.journal import Journal

FAILED = encode(
    TaskEvent(
        type="TASK_FAILED",
        ts="2026-01-01T00:00:00+00:00",
        worker_id="w1",
        task_id="t1",
        error="killed by SIGSEGV",
        payload={"error_kind": "crash", "retryable": True, "exit": {"signal": "SIGSEGV"}, "log_tail": ["last words"]},
    )
)


def test_an_event_of_an_orchestrators_task_goes_as_it_is() -> None:
    assert outgoing(FAILED, None) == (TASK_EVENTS_CHANNEL, FAILED)


def test_a_report_has_the_event_the_attempt_and_the_evidence() -> None:
    lane, payload = outgoing(FAILED, Recorded(attempt=3, priority="low"), out_dir="/r/t1", stays=True)
    report = decode(payload)
    assert lane == RECORDS_LANE
    assert (report.task_id, report.worker_id, report.attempt) == ("t1", "w1", 3)
    assert (report.queued, report.started, report.stays, report.event) == (True, False, True, FAILED)
    kept = json.loads(report.evidence)
    assert (kept["attempt"], kept["error_kind"], kept["exit"], kept["log_tail"]) == (
        3,
        "crash",
        {"signal": "SIGSEGV"},
        ["last words"],
    )
    assert not decode(outgoing(FAILED, Recorded(attempt=1))[1]).queued, "dispatched directly"


def test_reports_wait_apart_from_events(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    for number in range(3):
        journal.post(TASK_EVENTS_CHANNEL, b"event %d" % number)
        journal.post(RECORDS_LANE, b"report %d" % number)
    assert [payload for _, _, payload in journal.outgoing()] == [b"event 0", b"event 1", b"event 2"]
    assert [payload for _, payload in journal.reports()] == [b"report 0", b"report 1", b"report 2"]
    journal.sent(journal.outgoing()[2][0])
    journal.reported(journal.reports()[0][0])
    assert journal.outbox_size() == 2
    journal.close()
    again = Journal(tmp_path / "journal.sqlite")
    assert again.outgoing() == []
    assert [payload for _, payload in again.reports()] == [b"report 1", b"report 2"]
    again.close()
