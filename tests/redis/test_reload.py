"""New settings and versions while tasks run: a node keeps running as it is if a start would refuse them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.promises import MISBEHAVE, WAITING, let_go
from tests.kit.support import ROOT, Node, Orchestrator, RedisServer, until

pytestmark = pytest.mark.redis

TOLD = "not restarted, the node keeps its version and settings: "
NO_RUNNER = "task_types.mine.runner: missing; a type that is not built in needs module:Class"
REFUSED: dict[str, tuple[dict[str, str], str]] = {
    # what is changed in or added to a valid file, and the error
    "no Redis": ({"redis": ""}, "redis.url: missing; set REDIS_URL"),
    "not TOML": ({"more": "[redis"}, "HOME/node.toml: line "),
    "no runner": ({"more": "[task_types.mine]"}, NO_RUNNER),
    "results are a file": (
        {"results": "dir = 'HOME/file'"},
        "results.dir: HOME/file cannot be used: it is not a folder; set it to a folder",
    ),
    "no such user": ({"more": "[processes]\ntask_user = 'nobody-here'"}, "processes.task_user: there is no user"),
    "no such CPU": ({"more": "[[slots]]\nname = 'a'\ncpus = '99999'"}, "slots[0].cpus: there is no CPU 99999"),
    "log in a file": (
        {"node": "log_file = 'HOME/file/x'"},
        "node.log_file: HOME/file/x cannot be opened: HOME/file is not a folder",
    ),
    "log is a folder": ({"node": "log_file = 'HOME'"}, "node.log_file: HOME cannot be opened: is a directory"),
    "no room for sockets": ({"more": f"[environments.{'x' * 100}]"}, "node.state_dir: HOME/s has "),
}


class FileNode(Node):
    """A node with all its settings in its file."""

    def flags(self) -> list[str]:
        return ["--config", str(self.home / "node.toml")]

    def write(self, *, node: str = "", redis: str | None = None, results: str | None = None, more: str = "") -> None:
        lines = ["[node]", "worker_id = 'w1'", node if "state_dir" in node else f"{node}\nstate_dir = 'HOME/s'"]
        lines += ["[redis]", f"url = '{self.server.url}'" if redis is None else redis]
        lines += ["[results]", "dir = 'HOME/results'" if results is None else results, MISBEHAVE, more]
        (self.home / "node.toml").write_text(self.at_home("\n".join(lines)))

    def at_home(self, text: str) -> str:
        return text.replace("HOME", str(self.home))

    def told(self) -> list[str]:
        return [line.partition(TOLD)[2] for line in self.text().splitlines() if TOLD in line]


@pytest.fixture
def file_node(redis_server: RedisServer) -> Iterator[FileNode]:
    node = FileNode(redis_server)
    (node.home / "file").touch()
    node.write()
    try:
        node.start()
        yield node
    finally:
        print(node.text()[-6000:])
        node.close()


def running_task(orchestrator: Orchestrator, node: Node) -> tuple[str, int]:
    """A task that runs until it is let go, and its process."""
    task = orchestrator.dispatch("w1", WAITING)
    orchestrator.wait_started(task)
    return task, node.task_pid(task)


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_start_refuses_is_told_and_the_node_runs_on(
    orchestrator: Orchestrator, file_node: FileNode, case: str
) -> None:
    node = file_node
    wrong, said = REFUSED[case]
    said = node.at_home(said)
    task, child = running_task(orchestrator, node)
    node.write(**wrong)
    for count, number in enumerate((signal.SIGHUP, signal.SIGUSR2), 1):
        node.process.send_signal(number)
        until(lambda count=count: len(node.told()) == count, "the error is logged", 20)
    assert [line[: len(said)] for line in node.told()] == [said, said]
    assert node.text().count("ERROR") == 2, "one error line for each signal"
    assert node.task_pid(task) == child
    let_go(node, task)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    assert node.text().count("node started") == 1
    assert node.stop() == 0
    node.start(wait=False)
    assert node.process.wait(30) == 78
    assert node.text().splitlines()[-1].startswith(f"flowmesh-supervisor: {said}")
    assert "Traceback" not in node.text()


def test_the_nodes_own_folder_does_not_move_under_its_tasks(orchestrator: Orchestrator, file_node: FileNode) -> None:
    task, child = running_task(orchestrator, file_node)
    file_node.write(node="state_dir = 'HOME/other'")
    file_node.process.send_signal(signal.SIGHUP)
    until(file_node.told, "the error is logged", 20)
    assert file_node.told()[0].startswith(file_node.at_home("node.state_dir: HOME/other is not HOME/s, where"))
    assert file_node.task_pid(task) == child
    let_go(file_node, task)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"


def test_the_command_says_why_it_starts_nothing_anew(orchestrator: Orchestrator, file_node: FileNode) -> None:
    task, child = running_task(orchestrator, file_node)
    file_node.write(more="[task_types.mine]")
    command = [sys.executable, "-m", "flowmesh.cli.main", "upgrade", "--state-dir", str(file_node.state_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line.endswith(f"the node keeps its version and settings: {NO_RUNNER}")) == (1, True), line
    assert file_node.told() == [NO_RUNNER]
    assert file_node.task_pid(task) == child
    let_go(file_node, task)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"


def test_what_a_start_takes_is_taken(orchestrator: Orchestrator, file_node: FileNode) -> None:
    """With all that is checked changed to something else that is right: folders are made, and braces are letters."""
    task, child = running_task(orchestrator, file_node)
    more = "[processes]\nisolation = 'subreaper'\n[environments.mine]\n[task_types.mine]\nrunner = 'a:B'\n"
    node = "tags = ['new']\nlog_file = 'HOME/logs/{node}.jsonl'"
    file_node.write(node=node, results="dir = 'HOME/new/results'", more=more)
    file_node.process.send_signal(signal.SIGHUP)
    until(lambda: orchestrator.redis.hget("worker:w1", "tags_json") == b'["new"]', "the new tags are registered")
    assert file_node.told() == []
    assert file_node.task_pid(task) == child
    let_go(file_node, task)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    assert Path(file_node.home, "new", "results").is_dir()
    assert "node started" in Path(file_node.home, "logs", "{node}.jsonl").read_text()


def test_a_drain_is_not_lost_to_a_reload(orchestrator: Orchestrator, file_node: FileNode) -> None:
    task, _ = running_task(orchestrator, file_node)
    file_node.process.send_signal(signal.SIGTERM)
    until(lambda: file_node.ask(op="status")["draining"], "the node is draining")
    file_node.process.send_signal(signal.SIGHUP)
    until(file_node.told, "the error is logged")
    let_go(file_node, task)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    assert file_node.process.wait(30) == 0
    assert file_node.told() == ["the node is draining, and ends when its tasks have ended"]
