"""Delivery children that cannot be started are a fault of the node: results wait for them, and are not lost."""

from __future__ import annotations

import signal

import pytest

from tests.kit.http_server import Server
from tests.kit.support import Node, Orchestrator, until

pytestmark = pytest.mark.redis


def test_results_wait_for_a_broken_delivery_environment(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node()
    log = node.state_dir / "log" / "delivery.log"
    log.mkdir()
    with Server() as server:
        spec = {"taskType": "echo", "output": {"destination": {"type": "http", "url": f"{server.url}/r"}}}
        task = orchestrator.dispatch("w1", spec)
        node.wait_status("DEGRADED")
        (fault,) = node.ask(op="status")["faults"]
        assert (fault["name"], "delivery.log" in fault["reason"]) == ("environment delivery", True)
        (waiting,) = node.ask(op="status")["tasks"]
        assert "environment delivery" in waiting["waits_for"]
        second = orchestrator.dispatch("w1", spec)
        until(lambda: node.ask(op="status")["queued"] == 1, "no task starts meanwhile")
        node.kill()
        node.start(wait=False)
        node.wait_status("DEGRADED")
        assert orchestrator.ends(task) == []
        log.rmdir()
        for each in (task, second):
            assert orchestrator.wait_end(each)["type"] == "TASK_SUCCEEDED"
        node.wait_status("IDLE")
        assert len(server.received) == 2


def test_a_stop_does_not_wait_for_it(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node()
    log = node.state_dir / "log" / "delivery.log"
    log.mkdir()
    with Server() as server:
        spec = {"taskType": "echo", "output": {"destination": {"type": "http", "url": f"{server.url}/r"}}}
        task = orchestrator.dispatch("w1", spec)
        node.wait_status("DEGRADED")
        assert node.process is not None
        node.process.send_signal(signal.SIGTERM)
        until(lambda: "drain" in node.text(), "it drains")
        node.process.send_signal(signal.SIGTERM)
        assert node.process.wait(30) == 0
        log.rmdir()
        node.start()
        assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"


def test_past_the_bound_everything_is_kept(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node(config="[tasks]\nnode_fault_wait_s = 0.3\n")
    log = node.state_dir / "log" / "delivery.log"
    log.mkdir()
    with Server() as server:
        spec = {"taskType": "echo", "output": {"destination": {"type": "http", "url": f"{server.url}/r"}}}
        task = orchestrator.dispatch("w1", spec)
        end = orchestrator.wait_end(task)
        assert end["payload"]["error_kind"] == "delivery_failed"
        assert "environment delivery" in end["error"]
        log.rmdir()
        assert node.ask(op="deliver", task_id=task)["ok"]
        assert len(server.received) == 1
