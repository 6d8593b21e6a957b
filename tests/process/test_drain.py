"""A drain outlives a crash and can be taken back; a reload tells the service manager when the new one is ready."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kit.promises import MISBEHAVE, WAITING, let_go
from tests.kit.support import ROOT, Node, Orchestrator, until

pytestmark = pytest.mark.redis


@pytest.fixture
def node(make_node) -> Node:
    return make_node(config=MISBEHAVE)


def cli(node: Node, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flowmesh.cli.main", *args, "--state-dir", str(node.state_dir)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)


def busy(orchestrator: Orchestrator) -> str:
    task = orchestrator.dispatch("w1", WAITING)
    orchestrator.wait_started(task)
    return task


def test_a_drain_outlives_a_crash_until_it_is_done(orchestrator: Orchestrator, node: Node) -> None:
    running = busy(orchestrator)
    assert cli(node, "drain").returncode == 0
    node.kill()
    node.start(wait=False)
    node.wait_status("DRAINING")
    assert node.ask(op="status")["draining"] == "finish"
    refused = orchestrator.dispatch("w1", {"taskType": "echo"})
    let_go(node, running)
    assert orchestrator.wait_end(running)["type"] == "TASK_SUCCEEDED"
    assert node.process is not None
    assert node.process.wait(30) == 0
    assert orchestrator.of_task(refused) == []
    node.start()
    node.wait_status("IDLE")
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED", "it was done: not drained again"


def test_a_queued_task_is_sent_back_and_not_started_after_the_crash(orchestrator: Orchestrator, node: Node) -> None:
    running = busy(orchestrator)
    node.ask(op="drain", mode="finish")
    with sqlite3.connect(node.state_dir / "journal.sqlite") as db:
        assert db.execute("SELECT value FROM facts WHERE name = 'drain'").fetchone() == ("finish",)
    node.kill()
    node.start(wait=False)
    let_go(node, running)
    assert orchestrator.wait_end(running)["type"] == "TASK_SUCCEEDED"
    assert node.process is not None
    assert node.process.wait(30) == 0


def test_a_drain_is_taken_back(orchestrator: Orchestrator, node: Node) -> None:
    done = cli(node, "drain", "--cancel")
    assert (done.returncode, "not draining" in done.stderr) == (1, True)
    running = busy(orchestrator)
    cli(node, "drain")
    node.wait_status("DRAINING")
    missed = orchestrator.dispatch("w1", {"taskType": "echo"})
    assert cli(node, "drain", "--cancel").stdout == "drain cancelled\n"
    node.wait_status("RUNNING")
    following = orchestrator.dispatch("w1", {"taskType": "echo"})
    let_go(node, running)
    assert orchestrator.wait_end(running)["type"] == "TASK_SUCCEEDED"
    assert orchestrator.wait_end(following)["type"] == "TASK_SUCCEEDED"
    orchestrator.wait_worker_event("UNREGISTER")
    node.wait_status("IDLE")
    assert orchestrator.of_task(missed) == [], "the orchestrator queues it again at UNREGISTER"
    node.kill()
    node.start()
    assert node.ask(op="status")["draining"] is None
    assert node.stop() == 0


def test_what_a_signal_began_is_not_taken_back(orchestrator: Orchestrator, node: Node) -> None:
    running = busy(orchestrator)
    os.kill(node.pid, signal.SIGTERM)
    until(lambda: node.ask(op="status")["draining"], "it drains")
    assert "a signal told the node to end" in cli(node, "drain", "--cancel").stderr
    let_go(node, running)
    assert node.process is not None
    assert node.process.wait(30) == 0


def test_a_reload_is_over_when_the_new_one_is_ready_or_the_old_one_has_refused(
    orchestrator: Orchestrator, make_node, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        address = tmp_path / "notify"
        systemd.bind(str(address))
        systemd.settimeout(30)

        def next_of(*names: str) -> dict[str, str]:
            while True:
                fields = dict(line.split("=", 1) for line in systemd.recv(4096).decode().splitlines())
                if fields.keys() & set(names):
                    return fields

        node: Node = make_node(env={"NOTIFY_SOCKET": str(address)}, config=f"{MISBEHAVE}[node]\n")
        assert next_of("READY")["READY"] == "1"
        task = busy(orchestrator)
        before_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        os.kill(node.pid, signal.SIGHUP)
        begun = next_of("RELOADING", "READY")
        assert begun["RELOADING"] == "1"
        assert before_us <= int(begun["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        next_of("READY")
        assert node.text().count("node started") == 2, "READY is said by the new one"
        assert f"task adopted task={task}" in node.text(), "which has taken over the task by then"
        (node.home / "node.toml").write_text("[node]\nno_such_setting = 1\n")
        os.kill(node.pid, signal.SIGHUP)
        assert "MONOTONIC_USEC" in next_of("RELOADING", "READY")
        refused = next_of("READY", "RELOADING")
        assert refused["READY"] == "1"
        assert "no_such_setting" in refused["STATUS"]
        let_go(node, task)
        assert node.stop() == 0


def test_a_version_that_cannot_read_the_journal_is_not_started(orchestrator: Orchestrator, node: Node) -> None:
    task = busy(orchestrator)
    with sqlite3.connect(node.state_dir / "journal.sqlite") as db:
        db.execute("PRAGMA user_version=99")  # as if the version on disk knew another schema
    done = cli(node, "upgrade")
    assert done.returncode == 1
    assert "schema 99" in done.stderr
    let_go(node, task)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    assert node.text().count("node started") == 1
    check = [sys.executable, "-m", "flowmesh.cli.supervisor", "--check", *node.flags()]
    checked = subprocess.run(check, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)
    assert checked.returncode == 1
    assert "schema 99" in checked.stderr
