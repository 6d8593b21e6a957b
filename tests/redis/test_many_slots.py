"""A node with many slots: each is a worker, and all share one connection pool."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kit.support import Node, Orchestrator, until

pytestmark = pytest.mark.redis

SLOTS = 12


def test_every_slot_keeps_its_heartbeat(make_node: Callable[..., Node], orchestrator: Orchestrator) -> None:
    """All workers send their heartbeats at the same moment."""
    slots = "\n".join(f'[[slots]]\nname = "s{n}"' for n in range(SLOTS))
    node = make_node(start=False, config=slots)
    node.start(wait=False)
    workers = {f"w1-s{n}" for n in range(SLOTS)}

    def beats() -> bool:
        orchestrator.hear(0.05)
        senders = [event["worker_id"] for event in orchestrator.worker_events if event["type"] == "HEARTBEAT"]
        return all(senders.count(worker) >= 3 for worker in workers)

    until(beats, "three heartbeats of each worker")
    assert "lost" not in node.text()
    ids = [orchestrator.dispatch(worker, {"taskType": "echo"}) for worker in sorted(workers)]
    assert {orchestrator.wait_end(task_id)["type"] for task_id in ids} == {"TASK_SUCCEEDED"}
    assert "Redis is unreachable" not in node.text()


def test_a_failure_at_one_worker_is_nothing_to_its_neighbour(
    make_node: Callable[..., Node], orchestrator: Orchestrator
) -> None:
    """The neighbour may have just been dispatched a task; if IDLE were sent again, it would get another one."""
    node = make_node(start=False, config="".join(f'[[slots]]\nname = "{name}"\n' for name in "ab"))
    node.start(wait=False)
    for worker in ("w1-a", "w1-b"):
        orchestrator.wait_worker_event("STATUS", worker_id=worker, status="IDLE")
    before = orchestrator.told.count("STATUS")
    refused = orchestrator.dispatch("w1-a", {"taskType": "nope"})
    assert orchestrator.wait_end(refused)["type"] == "TASK_FAILED"
    until(lambda: orchestrator.hear(0.05) or orchestrator.told.count("STATUS") > before, "its status is sent again")
    assert orchestrator.run("w1-b", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
    said = [(e["worker_id"], e["status"]) for e in orchestrator.worker_events if e["type"] == "STATUS"][before:]
    assert said[:2] == [("w1-a", "IDLE"), ("w1-b", "RUNNING")]
