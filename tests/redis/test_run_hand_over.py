"""`flowmesh run` where a node runs on this machine: it takes the documents, as a temporary node would."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.paths import ROOT
from tests.kit.support import Node, RedisServer, running, until

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with contextlib.closing(RedisServer()) as server:
        node = Node(server)
        with running(node):
            (node.home / "run.toml").write_text(f'[node]\nstate_dir = "{node.state_dir}"\n')
            (node.home / "echo.yaml").write_text("spec: {taskType: echo, text: hello}\n")
            (node.home / "slow.yaml").write_text("spec: {taskType: echo, delaySec: 600}\n")
            (node.home / "p.yaml").write_text(
                "spec: {taskType: echo, stages: [{name: a, n: 1}, {name: b, got: '${a.result.echo.n}'}]}\n"
            )
            yield node


def start(node: Node, *arguments: str) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("STATE_DIRECTORY", "REDIS_URL")}
    return subprocess.Popen(
        [sys.executable, "-m", "flowmesh.cli.main", "run", "--config", "run.toml", *arguments],
        cwd=node.home,
        env={**env, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(node: Node, *arguments: str) -> tuple[int, str, str]:
    process = start(node, *arguments)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_the_node_takes_a_task_and_keeps_its_result(node: Node) -> None:
    code, out, err = run(node, "--task-id", "mine", "echo.yaml")
    assert code == 0, (out, err)
    assert out.splitlines()[0] == f"on the node that runs here ({node.state_dir}); --embedded starts a temporary one"
    assert out.splitlines()[-1] == f"results: {node.results_dir}/mine"
    (node.home / "echo.yaml").write_text("spec: {taskType: echo, text: again}\n")
    code, out, err = run(node, "--task-id", "mine", "--json", "echo.yaml")
    assert code == 0, err
    outcome = json.loads(out)
    assert outcome["result"]["echo"]["text"] == "again"
    assert outcome["worker_id"] == "w1"
    assert outcome["runtime_sec"] is not None


def test_a_pipeline_runs_on_it_and_goes_on_there(node: Node) -> None:
    code, out, err = run(node, "--task-id", "pipe", "--json", "p.yaml")
    assert code == 0, err
    assert json.loads(out)["stages"]["b"]["result"]["echo"]["got"] == 1
    assert json.loads(out)["out_dir"] == str(node.results_dir / "pipe")
    assert node.result("pipe.b")["echo"]["got"] == 1
    code, out, err = run(node, "--task-id", "pipe", "p.yaml")
    assert [line.split()[1] for line in out.splitlines() if line[:1] in "ab" and "result" in line] == ["reused"]
    assert node.result("pipe")["stages"]["b"]["state"] == "reused"


def test_a_busy_node_says_how_long_to_wait_and_ctrl_c_cancels_there(node: Node) -> None:
    first = start(node, "--task-id", "slow", "slow.yaml")
    until(lambda: node.ask(op="status")["tasks"], "the first task")
    second = start(node, "--task-id", "next", "echo.yaml")
    until(lambda: len(node.ask(op="status")["tasks"]) == 2, "the second task")
    pipeline = start(node, "--task-id", "busy", "p.yaml")
    until(lambda: len(node.ask(op="status")["tasks"]) == 3, "all three")
    pipeline.send_signal(signal.SIGINT)
    out, err = pipeline.communicate(timeout=30)
    assert pipeline.returncode == 130, (out, err)
    assert "busy.a waits for" in out
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=30)
    assert first.returncode == 130, (out, err)
    out, err = second.communicate(timeout=30)
    assert second.returncode == 0, (out, err)
    assert "waiting for w1: 1 task before this one" in out
    assert node.ask(op="status")["verdicts"].get("cancelled") == 2


def test_a_restart_of_the_supervisor_is_not_seen(node: Node) -> None:
    (node.home / "long.yaml").write_text("spec: {taskType: echo, delaySec: 4}\n")
    process = start(node, "--task-id", "long", "long.yaml")
    until(lambda: [task["state"] for task in node.ask(op="status")["tasks"]] == ["running"], "it runs")
    before = node.ask(op="status")["uptime_s"]
    os.kill(node.pid, signal.SIGHUP)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, (out, err)
    assert node.ask(op="status")["uptime_s"] < before + 4
    assert "succeeded" in out


def test_a_document_that_cannot_run_there_ends_at_once(node: Node) -> None:
    (node.home / "env.yaml").write_text("spec: {taskType: echo, env: {NOT_ALLOWED: x}}\n")
    code, out, err = run(node, "env.yaml")
    assert code == 1, out
    assert "spec.env.NOT_ALLOWED: this node does not allow a task to set it" in err


def test_what_the_node_would_do_otherwise_runs_on_a_temporary_one(node: Node, tmp_path: Path) -> None:
    code, out, err = run(node, "--results-dir", str(tmp_path), "echo.yaml")
    assert code == 0, err
    assert out.splitlines()[:2] == [
        f"not on the node that runs here: its results go to {node.results_dir}",
        "starting the node",
    ]
    assert len(list(tmp_path.iterdir())) == 1
