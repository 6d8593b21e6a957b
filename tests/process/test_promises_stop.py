"""Cancel and drain: with bounded steps, in every state of a task, by every interface."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.kit.http_server import Server, Stall
from tests.kit.promises import (
    CONFIG,
    assert_serves,
    ended,
    mark_of,
    misbehave,
    of_tasks,
    responses,
    wait_state,
)
from tests.kit.support import ROOT, Node, Orchestrator, until

pytestmark = pytest.mark.redis
NEVER_S = 120


@pytest.fixture
def node(make_node: Callable[..., Node]) -> Node:
    return make_node(config=CONFIG)


def assert_cancelled(orchestrator: Orchestrator, node: Node, task_id: str, started: bool = True) -> dict:
    end = orchestrator.wait_end(task_id)
    assert end["type"] == "TASK_FAILED"
    assert end["payload"]["error_kind"] == "cancelled"
    assert end["payload"]["retryable"] is False
    assert (end["payload"]["started_at"] is not None) is started
    assert [event["type"] for event in orchestrator.of_task(task_id)] == ["TASK_STARTED"] * started + ["TASK_FAILED"]
    assert responses(node, task_id)["error_kind"] == "cancelled"
    return end


def test_cancel_while_running(orchestrator: Orchestrator, node: Node) -> None:
    task_id = orchestrator.dispatch("w1", misbehave("sleep"))
    orchestrator.wait_started(task_id)
    wait_state(node, task_id, "running")
    assert node.ask(op="cancel", task_id=task_id) == {"ok": True, "state": "running"}
    end = assert_cancelled(orchestrator, node, task_id)
    assert end["payload"]["exit"]["code"] == 1, "it received the cancel frame and exited by itself"
    assert_serves(orchestrator, node)


def test_cancel_in_the_queue(orchestrator: Orchestrator, node: Node) -> None:
    first = orchestrator.dispatch("w1", misbehave("sleep", seconds=NEVER_S))
    second = orchestrator.dispatch("w1", {"taskType": "echo"})
    third = orchestrator.dispatch("w1", {"taskType": "echo"})
    wait_state(node, second, "queued")
    assert node.ask(op="cancel", task_id=second) == {"ok": True, "state": "queued"}
    assert_cancelled(orchestrator, node, second, started=False)
    node.ask(op="cancel", task_id=first)
    assert_cancelled(orchestrator, node, first)
    assert orchestrator.wait_end(third)["type"] == "TASK_SUCCEEDED"


def test_cancel_before_the_task_comes(orchestrator: Orchestrator, node: Node) -> None:
    answer = node.ask(op="cancel", task_id="later")
    assert answer["ok"] is False
    assert "if it is dispatched here later, it is cancelled" in answer["error"]
    orchestrator.dispatch("w1", misbehave("sleep"), task_id="later")
    assert_cancelled(orchestrator, node, "later", started=False)
    assert_serves(orchestrator, node)


def test_cancel_of_a_task_that_has_ended_says_so(orchestrator: Orchestrator, node: Node) -> None:
    task_id = orchestrator.run("w1", {"taskType": "echo"})["task_id"]
    answer = node.ask(op="cancel", task_id=task_id)
    assert answer["ok"] is False
    assert "has ended already (ok)" in answer["error"]


def test_cancel_while_it_is_launched(orchestrator: Orchestrator, node: Node) -> None:
    """Its fork server is stopped meanwhile: the cancel takes effect once there is a process to stop."""
    (server,) = node.servers()
    os.kill(server, signal.SIGSTOP)
    task_id = orchestrator.dispatch("w1", misbehave("sleep"))
    wait_state(node, task_id, "launching")
    assert node.ask(op="cancel", task_id=task_id)["state"] == "launching"
    os.kill(server, signal.SIGCONT)
    assert_cancelled(orchestrator, node, task_id)
    assert_serves(orchestrator, node)


def test_cancel_escalates_for_the_deaf(orchestrator: Orchestrator, node: Node) -> None:
    task_id = orchestrator.dispatch("w1", misbehave("deaf"))
    wait_state(node, task_id, "running", "deaf")
    node.ask(op="cancel", task_id=task_id)
    assert node.ask(op="cancel", task_id=task_id)["state"] == "stopping", "a second cancel changes nothing"
    end = assert_cancelled(orchestrator, node, task_id)
    assert end["payload"]["exit"]["signal"] == "SIGKILL"


def test_cancel_by_force_waits_for_no_grace(orchestrator: Orchestrator, make_node: Callable[..., Node]) -> None:
    node = make_node("--set", "tasks.cancel_grace_s=600", config=CONFIG)
    task_id = orchestrator.dispatch("w1", misbehave("deaf"))
    wait_state(node, task_id, "running", "deaf")
    node.ask(op="cancel", task_id=task_id)
    wait_state(node, task_id, "stopping")
    node.ask(op="cancel", task_id=task_id, force=True)
    end = assert_cancelled(orchestrator, node, task_id)
    assert end["payload"]["exit"]["signal"] == "SIGKILL"


def test_cancel_by_the_control_channel(orchestrator: Orchestrator, node: Node) -> None:
    task_id = orchestrator.dispatch("w1", misbehave("sleep"))
    orchestrator.wait_started(task_id)
    orchestrator.redis.publish("flowmesh.control", b"no json")
    orchestrator.redis.publish("flowmesh.control", json.dumps({"type": "CANCEL", "task_id": "somebody-elses"}))
    orchestrator.redis.publish("flowmesh.control", json.dumps({"type": "REBOOT", "task_id": task_id}))
    message = {"type": "CANCEL", "task_id": task_id, "reason": "no longer needed"}
    orchestrator.redis.publish("flowmesh.control", json.dumps(message))
    assert assert_cancelled(orchestrator, node, task_id)["error"] == "no longer needed"


def test_cancel_while_delivering(orchestrator: Orchestrator, node: Node) -> None:
    with Server(Stall()) as server:
        spec = {"taskType": "echo", "output": {"destination": {"type": "http", "url": server.url, "timeoutSec": 60}}}
        task_id = orchestrator.dispatch("w1", spec)
        until(lambda: server.requests, "the upload has started")
        wait_state(node, task_id, "delivering")
        assert_serves_beside(orchestrator)
        assert node.ask(op="cancel", task_id=task_id)["state"] == "delivering"
        end = orchestrator.wait_end(task_id)
    assert end["payload"]["error_kind"] == "cancelled"
    assert end["error"] == "cancelled while delivering"
    assert responses(node, task_id)["echo"]["taskType"] == "echo", "the computed result stays on disk"
    until(lambda: of_tasks(mark_of(node)) == [], "its delivery child is gone")
    assert_serves(orchestrator, node)


def test_cancel_while_waiting_for_a_place_to_deliver(
    orchestrator: Orchestrator, make_node: Callable[..., Node]
) -> None:
    node = make_node("--set", "delivery.concurrency=1", config=CONFIG)
    with Server(Stall()) as server:
        spec = {"taskType": "echo", "output": {"destination": {"type": "http", "url": server.url, "timeoutSec": 60}}}
        first = orchestrator.dispatch("w1", spec)
        until(lambda: server.requests, "the first upload has started")
        second = orchestrator.dispatch("w1", spec)
        wait_state(node, second, "delivering")
        assert node.ask(op="cancel", task_id=second)["state"] == "delivering"
        assert orchestrator.wait_end(second, 10)["payload"]["error_kind"] == "cancelled"
        for number in range(12):  # also while its results are written, before it waits
            another = orchestrator.dispatch("w1", spec)
            wait_state(node, another, "delivering")
            time.sleep(number / 2000)
            assert node.ask(op="cancel", task_id=another)["state"] == "delivering"
            assert orchestrator.wait_end(another, 10)["payload"]["error_kind"] == "cancelled"
        assert orchestrator.ends(first) == []
        node.ask(op="cancel", task_id=first)
        assert orchestrator.wait_end(first)["payload"]["error_kind"] == "cancelled"
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"


def assert_serves_beside(orchestrator: Orchestrator) -> None:
    """Another task runs at the same time."""
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"


@pytest.mark.parametrize("how", ["signal", "command"])
def test_drain_finish(orchestrator: Orchestrator, node: Node, how: str) -> None:
    mark = mark_of(node)
    running = orchestrator.dispatch("w1", misbehave("sleep", seconds=1))
    waiting = orchestrator.dispatch("w1", {"taskType": "echo"})
    orchestrator.wait_started(running)
    wait_state(node, waiting, "queued")
    if how == "signal":
        os.kill(node.pid, signal.SIGTERM)
    else:
        assert node.ask(op="drain", mode="finish") == {"ok": True, "tasks": 2}
    orchestrator.wait_worker_event("STATUS", status="DRAINING")
    late = orchestrator.dispatch("w1", {"taskType": "echo"})
    back = orchestrator.wait_end(waiting)
    assert (back["payload"]["error_kind"], back["payload"]["retryable"]) == ("drained", True)
    assert orchestrator.wait_end(running)["type"] == "TASK_SUCCEEDED"
    orchestrator.wait_worker_event("UNREGISTER")
    assert ended(node) == 0
    assert orchestrator.of_task(late) == [], "the orchestrator dispatches later tasks elsewhere"
    assert of_tasks(mark) == []
    assert list((node.state_dir / "run").iterdir()) == []


def test_the_drain_command_waits_until_the_node_has_ended(orchestrator: Orchestrator, node: Node) -> None:
    running = orchestrator.dispatch("w1", misbehave("sleep", seconds=1))
    orchestrator.wait_started(running)
    command = [sys.executable, "-m", "flowmesh.cli.main", "drain", "--wait", "--state-dir", str(node.state_dir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "drained"), done.stderr
    assert ended(node) == 0
    assert orchestrator.wait_end(running)["type"] == "TASK_SUCCEEDED"


def test_drain_checkpoint(orchestrator: Orchestrator, node: Node) -> None:
    task_id = orchestrator.dispatch("w1", misbehave("checkpoint"))
    wait_state(node, task_id, "running", "work")
    node.ask(op="drain", mode="checkpoint")
    end = orchestrator.wait_end(task_id)
    assert (end["payload"]["error_kind"], end["payload"]["retryable"]) == ("drained", True)
    assert (node.results_dir / task_id / "checkpoints" / "last").read_text() == "saved"
    assert ended(node) == 0


def test_drain_now(orchestrator: Orchestrator, node: Node) -> None:
    task_id = orchestrator.dispatch("w1", misbehave("deaf"))
    wait_state(node, task_id, "running", "deaf")
    node.ask(op="drain", mode="now")
    end = orchestrator.wait_end(task_id)
    assert (end["payload"]["error_kind"], end["payload"]["exit"]["signal"]) == ("drained", "SIGKILL")
    assert ended(node) == 0


def test_the_second_sigterm_forces(orchestrator: Orchestrator, node: Node) -> None:
    mark = mark_of(node)
    task_id = orchestrator.dispatch("w1", misbehave("deaf"))
    wait_state(node, task_id, "running", "deaf")
    os.kill(node.pid, signal.SIGTERM)
    orchestrator.wait_worker_event("STATUS", status="DRAINING")
    wait_state(node, task_id, "running", "deaf")
    assert orchestrator.ends(task_id) == [], "the first SIGTERM lets it finish"
    os.kill(node.pid, signal.SIGTERM)
    assert orchestrator.wait_end(task_id)["payload"]["error_kind"] == "drained"
    assert ended(node) == 0
    assert of_tasks(mark) == []


def test_a_forced_stop_does_not_wait_for_a_delivery(orchestrator: Orchestrator, node: Node) -> None:
    """The result stays on disk, and is delivered after the next start."""
    with Server(Stall()) as server:
        spec = {"taskType": "echo", "output": {"destination": {"type": "http", "url": server.url, "timeoutSec": 60}}}
        task_id = orchestrator.dispatch("w1", spec)
        until(lambda: server.requests, "the upload has started")
        os.kill(node.pid, signal.SIGTERM)
        orchestrator.wait_worker_event("STATUS", status="DRAINING")
        os.kill(node.pid, signal.SIGTERM)
        assert ended(node) == 0
        assert orchestrator.ends(task_id) == []
        node.start()
        assert orchestrator.wait_end(task_id)["type"] == "TASK_SUCCEEDED"
        assert len(server.results()) == 1
