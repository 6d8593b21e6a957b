"""A hot upgrade to another version on disk: its supervisor adopts the fork servers and the tasks of the old one."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.kit.promises import MISBEHAVE, WAITING, let_go
from tests.kit.support import ROOT, Node, Orchestrator, until

pytestmark = pytest.mark.redis


def install(folder: Path, version: str) -> Path:
    """A copy of the program that says to be this version."""
    for package in ("flowmesh", "runners"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = folder / f"flowmesh_supervisor-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: flowmesh-supervisor\nVersion: {version}\n")
    return folder


def test_p5_another_version_adopts_fork_servers_and_tasks(
    orchestrator: Orchestrator, make_node, tmp_path: Path
) -> None:
    old, new = install(tmp_path / "old", "0.0.1"), install(tmp_path / "new", "0.0.2")
    code = tmp_path / "code"
    code.symlink_to(old)
    node: Node = make_node(code=code, config=MISBEHAVE, env={"PYTHONPATH": f"{code}:{ROOT}"})
    task = orchestrator.dispatch("w1", WAITING)
    orchestrator.wait_started(task)
    pid, servers = node.task_pid(task), node.servers()
    code.unlink()
    code.symlink_to(new)
    shutil.rmtree(old)  # as an installer does: what the old processes have not imported yet is gone
    os.kill(node.pid, signal.SIGUSR2)
    until(lambda: "(FlowMesh 0.0.2)" in node.text(), "the new version starts")
    until(lambda: node.text().count("subscribed") == 2, "the new supervisor listens")
    assert node.ask(op="status")["version"] == "0.0.2"
    assert node.task_pid(task) == pid
    assert set(servers) < set(node.servers()), "adopted for its task, beside the one for the next tasks"
    following = orchestrator.dispatch("w1", {"taskType": "echo"})
    let_go(node, task)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    assert orchestrator.wait_end(following)["type"] == "TASK_SUCCEEDED"
    until(lambda: set(node.servers()).isdisjoint(servers), "the old fork server ends with its last task")
    assert node.stop() == 0


def test_a_version_that_does_not_start_is_not_started(orchestrator: Orchestrator, make_node, tmp_path: Path) -> None:
    old, new = install(tmp_path / "old", "0.0.1"), install(tmp_path / "new", "0.0.2")
    (new / "flowmesh" / "supervisor.py").write_text("import no_such_library\n")
    code = tmp_path / "code"
    code.symlink_to(old)
    node: Node = make_node(code=code, config=MISBEHAVE, env={"PYTHONPATH": f"{code}:{ROOT}"})
    task = orchestrator.dispatch("w1", WAITING)
    orchestrator.wait_started(task)
    code.unlink()
    code.symlink_to(new)
    os.kill(node.pid, signal.SIGUSR2)
    until(lambda: "the program on disk does not start: ModuleNotFoundError" in node.text(), "it says why")
    assert "no_such_library" in node.text()
    assert node.ask(op="status")["version"] == "0.0.1"
    let_go(node, task)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    code.unlink()
    code.symlink_to(old)
    assert node.stop() == 0


def test_without_its_start_folder_a_node_runs_on(orchestrator: Orchestrator, make_node, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    node: Node = make_node(cwd=here, config=MISBEHAVE)
    task = orchestrator.dispatch("w1", WAITING)
    orchestrator.wait_started(task)
    here.rmdir()
    os.kill(node.pid, signal.SIGHUP)
    until(lambda: "the folder that the node was started in is gone" in node.text(), "it says why")
    let_go(node, task)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    assert node.stop() == 0


@pytest.mark.parametrize("following", [signal.SIGHUP, signal.SIGUSR2, signal.SIGTERM], ids=lambda each: each.name)
def test_signals_during_the_exchange_wait_for_the_new_one(
    orchestrator: Orchestrator, make_node, following: signal.Signals
) -> None:
    """Each comes a little later than the one before, so that some meet the moment between exec and new handlers."""
    node: Node = make_node(config=MISBEHAVE)
    task = orchestrator.dispatch("w1", WAITING)
    orchestrator.wait_started(task)
    os.kill(node.pid, signal.SIGUSR2)
    until(lambda: "handing over" in node.text(), "the exchange begins")
    for _ in range(1 if following is signal.SIGTERM else 8):
        os.kill(node.pid, following)
        time.sleep(0.04)  # the moment under test is as long as an interpreter takes to start
    until(lambda: "task adopted" in node.text(), "a new supervisor has it")
    let_go(node, task)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    if following is not signal.SIGTERM:
        until(lambda: node.ask(op="status")["pid"] == node.pid, "the last new supervisor answers")
        node.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
    assert node.process is not None
    assert node.process.wait(30) == 0
