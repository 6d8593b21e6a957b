"""The queue of a worker has a bound, and a dispatch beyond it has a clear answer."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.kit.support import Node, Orchestrator, RedisServer, until

pytestmark = pytest.mark.redis
SLOW = {"taskType": "echo", "delaySec": 600}


@pytest.fixture
def node() -> Iterator[Node]:
    server = RedisServer()
    made = Node(server, "--set", "tasks.max_queued=2", "--set", "redis.stream=true").start()
    yield made
    made.close()
    server.close()


def test_a_full_queue_is_answered_and_a_stream_waits(node: Node) -> None:
    orchestrator = Orchestrator(node.server)
    first = orchestrator.dispatch("w1", SLOW)
    orchestrator.wait_started(first)
    waiting = [orchestrator.dispatch("w1", SLOW) for _ in range(2)]
    until(lambda: len(node.ask(op="status")["tasks"]) == 3, "two tasks wait")
    refused = orchestrator.run("w1", SLOW)
    assert refused["type"] == "TASK_FAILED"
    assert refused["payload"]["error_kind"] == "node_fault"
    assert refused["payload"]["retryable"] is True
    assert "tasks.max_queued" in refused["error"]
    message = {"task_id": "of-stream", "task": {"spec": {"taskType": "echo"}}, "assigned_worker": "w1"}
    node.server.client().xadd("tasks:w1", {"message": json.dumps(message)})
    for task_id in (first, *waiting):
        node.ask(op="cancel", task_id=task_id)
    assert orchestrator.wait_end("of-stream")["type"] == "TASK_SUCCEEDED"
    orchestrator.close()
