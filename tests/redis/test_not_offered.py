"""Task types that a worker does not offer are refused at once, each with the right kind."""

from __future__ import annotations

import pytest

from tests.kit.support import Orchestrator

pytestmark = pytest.mark.redis

CONFIG = """
[environments.bare]
python = "/usr/bin/env"

[task_types.rag]
environment = "bare"
"""


def test_what_another_worker_may_offer_is_retryable(orchestrator: Orchestrator, make_node) -> None:
    make_node(config=CONFIG)
    busy = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 600})
    orchestrator.wait_started(busy)
    here = orchestrator.run("w1", {"taskType": "rag"})  # it does not wait for the task that runs
    assert here["type"] == "TASK_FAILED"
    assert (here["payload"]["error_kind"], here["payload"]["retryable"]) == ("missing_dependency", True)
    assert "cannot run on this node" in here["error"]
    nowhere = orchestrator.run("w1", {"taskType": "raggg"})
    assert (nowhere["payload"]["error_kind"], nowhere["payload"]["retryable"]) == ("bad_request", False)
