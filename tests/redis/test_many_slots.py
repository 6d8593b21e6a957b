"""A node with many slots: each is a worker of its own, all of them on one connection pool."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support import Node, Orchestrator, until

pytestmark = pytest.mark.redis

SLOTS = 12


def test_every_slot_keeps_its_heartbeat(make_node: Callable[..., Node], orchestrator: Orchestrator) -> None:
    """All of them beat at the same moment."""
    slots = "\n".join(f'[[slots]]\nname = "s{n}"' for n in range(SLOTS))
    node = make_node(start=False, config=slots)
    node.start(wait=False)
    workers = {f"w1-s{n}" for n in range(SLOTS)}

    def beats() -> bool:
        orchestrator.hear(0.05)
        heard = [event["worker_id"] for event in orchestrator.worker_events if event["type"] == "HEARTBEAT"]
        return all(heard.count(worker) >= 3 for worker in workers)

    until(beats, "three heartbeats of each worker")
    assert "lost" not in node.text()
    ids = [orchestrator.dispatch(worker, {"taskType": "echo"}) for worker in sorted(workers)]
    assert {orchestrator.wait_end(task_id)["type"] for task_id in ids} == {"TASK_SUCCEEDED"}
    assert "Redis is away" not in node.text()
