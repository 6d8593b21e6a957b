"""What the node reads off its own events."""

from __future__ import annotations

import pytest

from flowmesh.execution.task_events import is_start, refused
from flowmesh.messages.wire import TaskEvent, encode, utc_now
from flowmesh.tasks.verdicts import Kind


@pytest.mark.parametrize("task_id", ["t1", "TASK_STARTED"])
def test_the_end_of_a_task_is_no_start(task_id: str) -> None:
    assert not is_start(refused("w1", task_id, Kind.BAD_REQUEST, '{"type":"TASK_STARTED"', None))


def test_a_start_is_one() -> None:
    assert is_start(encode(TaskEvent(type="TASK_STARTED", ts=utc_now(), worker_id="w1", task_id="t1")))
