"""What a deployment with the earlier worker's documents and variables finds here."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.kit.http_server import Server
from tests.kit.paths import ROOT
from tests.kit.support import Node, Orchestrator, until
from tests.redis.test_deliveries import flowmesh, said

pytestmark = pytest.mark.redis
ELSEWHERE = {"type": "local", "path": "/ignored/by/current-worker"}
WARNED = "'/ignored/by/current-worker/{}' lies outside of the folders that tasks may write to"


def echo_to(destination: object) -> dict[str, object]:
    return {"taskType": "echo", "output": {"destination": destination}}


def test_a_result_that_may_not_go_where_it_is_sent_is_in_results_dir(orchestrator: Orchestrator, node: Node) -> None:
    end = orchestrator.run("w1", echo_to(ELSEWHERE))
    task = end["task_id"]
    assert end["type"] == "TASK_SUCCEEDED"
    (warning,) = end["payload"]["warnings"]
    assert WARNED.format(task) in warning
    assert f"the result is in {node.results_dir / task}" in warning
    assert node.result(task)["warnings"] == [warning]
    until(lambda: warning in node.text(), "the log says so")
    failed = orchestrator.run("w1", {**echo_to(ELSEWHERE), "delaySec": -1, "long": "x" * 70_000})
    assert failed["type"] == "TASK_FAILED"
    assert WARNED.format(failed["task_id"]) in failed["payload"]["warnings"][0]
    assert node.result(failed["task_id"])["warnings"] == failed["payload"]["warnings"]


def test_what_else_leads_outside_is_the_same_and_what_is_no_path_is_not(orchestrator: Orchestrator, node: Node) -> None:
    for path in ("../up", "/", str(node.results_dir) + "-other", "/proc/self/root"):
        end = orchestrator.run("w1", echo_to({"type": "local", "path": path}))
        assert end["type"] == "TASK_SUCCEEDED", path
        assert len(end["payload"]["warnings"]) == 1
        assert node.result(end["task_id"])["ok"] is True
    end = orchestrator.run("w1", echo_to({"type": "local", "path": "a\u0001b"}))
    assert end["payload"]["error_kind"] == "bad_request"


def test_a_setting_refuses_it(orchestrator: Orchestrator, make_node) -> None:
    node = make_node(config="[results]\nrefuse_outside_paths = true\n")
    end = orchestrator.run("w1", echo_to(ELSEWHERE))
    assert end["payload"]["error_kind"] == "bad_request"
    assert "results.allowed_roots" in end["error"]
    assert not (node.results_dir / end["task_id"]).exists()


def test_warnings_travel_with_an_http_delivery_and_to_people(orchestrator: Orchestrator, node: Node, tmp_path) -> None:
    with Server() as server:
        child = {"task_id": "child", "spec": echo_to(ELSEWHERE)}
        spec = echo_to({"type": "http", "url": f"{server.url}/r"})
        orchestrator.run("w1", spec, merged_children=[child])
    assert "lies outside" in node.result("child")["warnings"][0]
    document = tmp_path / "task.yaml"
    document.write_text(
        "apiVersion: flowmesh/v1\nkind: Task\nmetadata: {name: x}\nspec:\n  taskType: echo\n"
        "  output: {destination: {type: local, path: /elsewhere}}\n"
    )
    command = [sys.executable, "-m", "flowmesh.cli.main", "submit", str(document), "--wait"]
    done = subprocess.run(
        [*command, "--redis", node.server.url], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "warning: spec.output.destination.path: '/elsewhere/" in done.stdout
    command = [sys.executable, "-m", "flowmesh.cli.main", "run", str(document), "--results-dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("warning: spec.output.destination.path: '/elsewhere/") == 1


def test_old_variables_are_honoured_or_warned_of(orchestrator: Orchestrator, make_node) -> None:
    env = {"WORKER_EXECUTOR_MASK": "7", "RESULTS_UPLOAD_URL": "http://user:s3cret@old/", "WORKER_LOG_TO_STDOUT": "1"}
    node = make_node(env=env)
    for name in ("WORKER_EXECUTOR_MASK", "RESULTS_UPLOAD_URL"):
        until(lambda name=name: f"{name} is set and not used" in node.text(), "the log says so")
    assert "s3cret" not in node.text()
    assert "WORKER_LOG_TO_STDOUT is" not in node.text()
    end = orchestrator.run("w1", {"taskType": "echo"})
    until(lambda: "task succeeded" in node.text(), "the log is written")
    (line,) = [line for line in node.text().splitlines() if "task accepted" in line]
    assert f"task={end['task_id']}" in line
    assert "node_run=1" in line
    assert "attempt=" not in line


@pytest.mark.parametrize("elastic", [False, True])
def test_elastic_scaling_that_is_off_is_off(orchestrator: Orchestrator, make_node, elastic: bool) -> None:
    node = make_node(env={"ENABLE_ELASTIC_SCALING": str(elastic).lower()})
    orchestrator.redis.sadd("workers:elastic_disabled", "w1", "another")
    if elastic:
        orchestrator.run("w1", {"taskType": "echo", "delaySec": 6})
        assert orchestrator.redis.smembers("workers:elastic_disabled") == {b"w1", b"another"}
    else:
        until(lambda: orchestrator.redis.smembers("workers:elastic_disabled") == {b"another"}, "it takes itself out")
        until(lambda: "taken out again" in node.text(), "and says so")
        assert said(flowmesh(node, "status"))[0] == 0
