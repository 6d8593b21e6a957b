"""A hot upgrade to another version on disk: its supervisor adopts the fork servers and the tasks of the old one."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.support import ROOT, Node, Orchestrator, until

pytestmark = pytest.mark.redis


def install(folder: Path, version: str) -> Path:
    """A copy of the program that says to be this version."""
    for package in ("flowmesh", "runners"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    module = folder / "flowmesh" / "__init__.py"
    module.write_text(re.sub(r'__version__ = ".*"', f'__version__ = "{version}"', module.read_text()))
    return folder


def test_p5_another_version_adopts_fork_servers_and_tasks(
    orchestrator: Orchestrator, make_node, tmp_path: Path
) -> None:
    old, new = install(tmp_path / "old", "0.0.1"), install(tmp_path / "new", "0.0.2")
    code = tmp_path / "code"
    code.symlink_to(old)
    node: Node = make_node(code=code)
    task = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 4})
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
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    assert orchestrator.wait_end(following)["type"] == "TASK_SUCCEEDED"
    until(lambda: set(node.servers()).isdisjoint(servers), "the old fork server ends with its last task")
    assert node.stop() == 0
