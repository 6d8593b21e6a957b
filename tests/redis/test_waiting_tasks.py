"""What waits behind a running task goes back once another worker could run it."""

from __future__ import annotations

import pytest

from tests.kit.fake_node import HARDWARE, register
from tests.kit.support import Orchestrator, until

pytestmark = pytest.mark.redis
CONFIG = "[tasks]\nreturn_waiting_after_s = 0.4\n"
LONG = {"taskType": "echo", "delaySec": 600}


def test_it_goes_back_once_and_only_what_fits(orchestrator: Orchestrator, make_node) -> None:
    node = make_node(config=CONFIG)
    running = orchestrator.dispatch("w1", LONG)
    orchestrator.wait_started(running)
    large = orchestrator.dispatch("w1", {**LONG, "resources": {"hardware": {"cpu": "64"}}})
    client = orchestrator.redis
    register(client, "stale", ttl=None)
    register(client, "busy", status="RUNNING")
    register(client, "other-types", types=["inference"])
    register(client, "off")
    client.sadd("workers:elastic_disabled", "off")
    small = orchestrator.dispatch("w1", LONG)
    until(lambda: len(node.ask(op="status")["tasks"]) == 3, "all wait")
    register(client, "idle", hardware=HARDWARE)
    end = orchestrator.wait_end(small)
    assert (end["payload"]["error_kind"], end["payload"]["retryable"]) == ("node_fault", True)
    assert end["payload"]["started_at"] is None
    assert f"behind {running}, and idle could run it" in end["error"]
    orchestrator.dispatch("w1", LONG, task_id=small)  # the orchestrator insists
    marker = orchestrator.dispatch("w1", LONG)
    assert f"behind {running}" in orchestrator.wait_end(marker)["error"]
    left = {task["task_id"] for task in node.ask(op="status")["tasks"]}
    assert left == {running, large, small}
    assert orchestrator.ends(running) == []


def test_a_free_slot_keeps_its_tasks(orchestrator: Orchestrator, make_node) -> None:
    """Only what waits behind another task is concerned."""
    make_node(config=CONFIG)
    register(orchestrator.redis, "idle")
    assert orchestrator.run("w1", {"taskType": "echo", "delaySec": 2})["type"] == "TASK_SUCCEEDED"
