"""What a delivery that waits holds up: nothing. And what it says meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.kit.http_server import Answer, Server, Stall
from tests.kit.support import Node, Orchestrator, until
from tests.redis.test_deliveries import config, flowmesh, model_to, refused, said

pytestmark = pytest.mark.redis


def waits(node: Node) -> dict[str, str]:
    return {task["task_id"]: task["waits_for"] for task in node.ask(op="status")["tasks"] if task["waits_for"]}


def small_to(server: Server, **fields: Any) -> dict[str, Any]:
    return {**model_to(server, **fields), "taskType": "echo"}


def test_two_dead_servers_hold_up_nobody_else(orchestrator: Orchestrator, make_node) -> None:
    node = make_node(config=config(concurrency=1))
    with Server(*[Stall()] * 9) as first, Server(*[Stall()] * 9) as second, Server() as alive:
        dead = [orchestrator.dispatch("w1", model_to(server, timeoutSec=600)) for server in (first, second) * 2]
        until(lambda: len(first.requests) == len(second.requests) == 1, "each dead server has one request")
        local = orchestrator.run("w1", {"taskType": "model"})  # large enough for a child
        assert local["type"] == "TASK_SUCCEEDED"
        assert orchestrator.run("w1", small_to(alive))["type"] == "TASK_SUCCEEDED"
        until(lambda: len(waits(node)) == 2, "the second delivery of each waits")
        for task in dead[2:]:
            assert "a place: delivery.concurrency deliveries to http://127.0.0.1:" in waits(node)[task]
            assert node.result(task)["ok"] is True, "what was computed is on the disk before it is sent"
            assert (node.results_dir / task / "manifest.json").exists()
        assert len(first.requests) == len(second.requests) == 1
        first.plan, second.plan = [], []
        first.release()
        second.release()
        assert [orchestrator.wait_end(task)["type"] for task in dead] == ["TASK_SUCCEEDED"] * 4


def test_a_delivery_that_waits_for_its_next_attempt_gives_its_place_back(orchestrator: Orchestrator, make_node) -> None:
    node = make_node(config=config(total_s=900, concurrency=1))
    with Server(Answer(503, b"closed for lunch", headers={"Retry-After": "200"})) as server:
        waiting = orchestrator.dispatch("w1", model_to(server))
        until(lambda: waiting in waits(node), "it waits")
        assert "attempt 2 in" in waits(node)[waiting]
        assert "closed for lunch" in waits(node)[waiting]
        code, out, _ = said(flowmesh(node, "status"))
        assert code == 0
        assert f"delivery of {waiting}: waits for attempt 2 in" in out
        until(lambda: "delivery attempt 1 failed" in node.text(), "the log says so")
        log = [line for line in node.text().splitlines() if "delivery attempt 1 failed" in line]
        assert len(log) == 1
        assert "WARNING" in log[0]
        assert "closed for lunch" in log[0]
        assert node.result(waiting)["ok"] is True
        assert orchestrator.run("w1", small_to(server))["type"] == "TASK_SUCCEEDED"
        node.ask(op="cancel", task_id=waiting)
        assert orchestrator.wait_end(waiting)["payload"]["error_kind"] == "cancelled"


def test_a_delivery_that_waits_outlives_the_supervisor(orchestrator: Orchestrator, make_node) -> None:
    node = make_node(config=config(total_s=900))
    with Server(Answer(503, headers={"Retry-After": "250"})) as server:
        task = orchestrator.dispatch("w1", model_to(server))
        until(lambda: task in waits(node), "it waits")
        node.kill()
        node.start()
        assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
        assert len(server.results()) == 1


def test_time_and_attempts_add_up_over_the_attempts(orchestrator: Orchestrator, make_node) -> None:
    node = make_node(config=config(total_s=2.0))
    with Server() as server:
        task = refused(orchestrator, server, status=500)
        error = orchestrator.ends(task)[0]["error"]
        attempts = int(error.rpartition(" attempts")[0].rpartition(" ")[2])
        sent = len([path for _, path in server.requests if path.endswith("/files")])
        assert attempts - sent in (0, 1), "the last one may have found no time left"
        assert attempts > 1
        assert said(flowmesh(node, "deliver", task))[0] == 1
        again = lambda: node.text().count("delivery attempt 1 failed") == 2  # noqa: E731
        until(again, "a delivery on request begins with its whole time, and its first attempt")


def test_a_token_that_changes_reaches_the_next_attempt(orchestrator: Orchestrator, make_node, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("old-token\n")
    with Server() as server:
        answers = [Answer(401, b"who are you")] * 40
        server.plan = list(answers)
        lines = f'orchestrator_url = "{server.url}"\norchestrator_token_file = "$CREDENTIALS_DIRECTORY/token"\n'
        node = make_node(
            config=config(total_s=300).replace("[delivery]\n", f"[delivery]\n{lines}"),
            env={"CREDENTIALS_DIRECTORY": str(tmp_path)},
        )
        task = orchestrator.dispatch("w1", small_to(server))
        until(lambda: "refuses the node's token" in waits(node).get(task, ""), "the status says so")
        assert orchestrator.ends(task) == []
        until(lambda: "refuses the node's token" in node.text(), "the log says so")
        token.unlink()
        until(lambda: "in a file that cannot be read now" in waits(node).get(task, ""), "the status says so")
        until(lambda: node.text().count("deliveries have no token") == 1, "the log says so, once")
        token.write_text("new-token")
        server.plan = []
        assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
        assert server.received[-1].headers["authorization"] == "Bearer new-token"
