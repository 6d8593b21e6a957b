"""A node with an end takes no task that cannot finish before it, and drains with a checkpoint; an idle one exits."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from flowmesh.client import Client
from flowmesh.queue import names
from tests.kit.promises import wait_state
from tests.kit.support import Node, Orchestrator, RedisServer, running, until

pytestmark = pytest.mark.redis
SLOW_CHECKPOINT = """
[node]
on_sigterm = "checkpoint"

[task_types.sft]
runner = "tests.kit.runners_for_tests:MisbehavingRunner"
environment = "light"
"""


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    started = RedisServer()
    yield started
    started.close()


def echo(**spec: Any) -> dict[str, Any]:
    return {"kind": "Task", "spec": {"taskType": "echo", **spec}}


def test_what_cannot_finish_is_not_taken(server: RedisServer) -> None:
    orchestrator, at = Orchestrator(server), time.time() + 3600
    config = "[node]\nends_margin_s = 60\n"
    with running(Node(server, config=config, env={"SLURM_JOB_END_TIME": str(int(at))})) as node:
        ends = node.ask(op="status")["ends"]
        assert 3000 < ends["end"]["left_s"] < 3541
        refused = orchestrator.run("w1", {"taskType": "echo", "timeoutSec": 7200})
        assert (refused["payload"]["error_kind"], refused["payload"]["retryable"]) == ("drained", True)
        assert "the node ends at" in refused["error"]
        assert "spec.timeoutSec is 7200 s" in refused["error"]
        assert orchestrator.run("w1", {"taskType": "echo", "timeoutSec": 30})["type"] == "TASK_SUCCEEDED"
        with Client(server.url) as client:
            busy = client.queue(echo(delaySec=1))
            ids = [client.queue(echo(timeoutSec=limit)).task_id for limit in (7200, 7201)]
            server.client().hdel(names.record_key(ids[1]), "timeout")  # as an older client writes it
            behind = client.queue(echo(timeoutSec=30))
            assert client.wait(behind.task_id, timeout_s=30).ok
            assert client.wait(busy.task_id, timeout_s=30).ok
            found = [client.state(each) for each in ids]
            assert [(each.state, each.attempt) for each in found if each] == [("queued", 0)] * 2, "never claimed"
            for each in ids:
                client.cancel(each)
        long = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 600})
        orchestrator.wait_started(long)
        assert node.stop(signal.SIGTERM) == 0, "with an end, SIGTERM does not wait for the task"
        assert orchestrator.wait_end(long)["payload"]["error_kind"] == "drained"
    orchestrator.close()


def test_before_its_end_it_drains_with_a_checkpoint_and_exits_with_0(server: RedisServer) -> None:
    orchestrator = Orchestrator(server)
    with running(Node(server, config="[node]\n")) as node:
        long = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 600})
        orchestrator.wait_started(long)
        waits = orchestrator.dispatch("w1", {"taskType": "echo", "timeoutSec": 7200})
        until(lambda: node.ask(op="status")["queued"] == 1, "it waits")
        (node.home / "node.toml").write_text(f"[node]\nends_at = {time.time() + 3600}\n")
        assert node.process is not None
        node.process.send_signal(signal.SIGHUP)
        back = orchestrator.wait_end(waits)
        assert (back["payload"]["error_kind"], "not started: the node ends at" in back["error"]) == ("drained", True)
        until(lambda: node.ask(op="status")["tasks"], "the long one runs on")
        (node.home / "node.toml").write_text(f"[node]\nends_at = {time.time() + 30}\nends_margin_s = 60\n")
        node.process.send_signal(signal.SIGHUP)
        assert orchestrator.wait_end(long)["payload"]["error_kind"] == "drained"
        assert node.process.wait(30) == 0
        assert "draining mode=checkpoint" in node.text()
    orchestrator.close()


def test_a_second_sigterm_leaves_a_checkpoint_time_to_be_saved(server: RedisServer) -> None:
    orchestrator = Orchestrator(server)
    with running(Node(server, config=SLOW_CHECKPOINT)) as node:
        task = orchestrator.dispatch("w1", {"taskType": "sft", "do": "checkpoint", "slow": True})
        wait_state(node, task, "running", "work")
        assert node.process is not None
        node.process.send_signal(signal.SIGTERM)
        checkpoints = node.results_dir / task / "checkpoints"
        until(checkpoints.exists, "it saves")
        node.process.send_signal(signal.SIGTERM)
        assert node.ask(op="status")["tasks"], "the signal is handled before"
        (checkpoints / "go").touch()
        assert orchestrator.wait_end(task)["payload"]["error_kind"] == "drained"
        assert (checkpoints / "last").read_text() == "saved"
        assert node.process.wait(30) == 0
    orchestrator.close()


def test_an_idle_node_exits_with_0_after_what_waits(server: RedisServer) -> None:
    with Client(server.url) as client:
        task = client.queue(echo(), anyway=True)
        with running(Node(server, config="[node]\nexit_when_idle_s = 0.5\n")) as node:
            assert node.process is not None
            assert node.process.wait(30) == 0
            assert "node.exit_when_idle_s" in node.text()
        assert client.wait(task.task_id, timeout_s=5).ok
