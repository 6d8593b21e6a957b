"""What bounds a running task: silence, log files, its user and niceness, its own /dev/shm; and logs not kept."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from tests.support import Node, Orchestrator, until

pytestmark = pytest.mark.redis
CONFIG = """
[tasks]
cancel_grace_s = 0.5
term_grace_s = 0.5
{tasks}
[processes]
{processes}
[environments.own]
[task_types.misbehave]
runner = "tests.runners_for_tests:MisbehavingRunner"
environment = "{environment}"
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user or mount")


def config(*, tasks: str = "", processes: str = "", environment: str = "light") -> str:
    return CONFIG.format(tasks=tasks, processes=processes, environment=environment)


def test_a_silent_task_is_stopped_and_its_stacks_are_saved(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node(config=config(tasks="hang_timeout_s = 1.0"))
    end = orchestrator.run("w1", {"taskType": "misbehave", "do": "deaf"}, task_id="silent")
    assert end["payload"]["error_kind"] == "hang"
    assert end["payload"]["retryable"] is True
    assert "tasks.hang_timeout_s" in end["error"]
    logs = node.results_dir / "silent" / "logs"
    assert "waits in" in (logs / "stacks.txt").read_text()
    assert "do_deaf" in (logs / "stderr.log").read_text()  # Python's own stack, by faulthandler
    spoken = orchestrator.run("w1", {"taskType": "echo", "delaySec": 2.5})
    assert spoken["type"] == "TASK_SUCCEEDED"  # it reports progress all the while


def test_a_log_that_grows_too_large_keeps_its_end(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node(config=config(tasks="log_max_bytes = 1048576"))
    end = orchestrator.run("w1", {"taskType": "misbehave", "do": "log_flood", "megabytes": 20}, task_id="flood")
    assert end["type"] == "TASK_SUCCEEDED"
    log = node.results_dir / "flood" / "logs" / "stdout.log"
    assert log.stat().st_size <= 1048576
    assert b"bytes of this log were dropped here" in log.read_bytes()


def test_logs_that_were_not_wanted_are_dropped_but_not_those_of_a_failure(
    orchestrator: Orchestrator, make_node
) -> None:
    node: Node = make_node(config=config())
    orchestrator.run("w1", {"taskType": "misbehave", "do": "write", "retainLogs": False}, task_id="good")
    orchestrator.run("w1", {"taskType": "misbehave", "do": "raise", "retainLogs": False}, task_id="bad")
    assert list((node.results_dir / "good" / "logs").iterdir()) == []
    assert "the runner's own error" in (node.results_dir / "bad" / "logs" / "stderr.log").read_text()


@needs_root
def test_tasks_run_as_another_user(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node(start=False, config=config(processes='task_user = "nobody"\ntask_nice = 3'))
    node.home.chmod(0o755)
    node.start()
    # echo: all that it needs is imported already, should that user not be able to read this interpreter's folder
    task = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 30}, task_id="other")
    orchestrator.wait_started(task)
    pid = node.task_pid(task)
    uid = str(pwd.getpwnam("nobody").pw_uid)

    def status() -> dict[str, str]:
        return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())

    until(lambda: status()["Uid"].split() == [uid] * 4, "it has become that user")
    until(lambda: status()["NoNewPrivs"] == "1", "it can gain nothing")
    assert os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, node.pid) + 3
    assert node.ask(op="cancel", task_id=task)["ok"] is True
    assert orchestrator.wait_end(task)["payload"]["error_kind"] == "cancelled"
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"


def test_an_unknown_task_user_is_a_settings_error(make_node) -> None:
    node: Node = make_node(start=False, config=config(processes='task_user = "no-such-user"'))
    node.start(wait=False)
    assert node.process is not None
    assert node.process.wait(20) == 78
    assert "processes.task_user" in node.text()


@needs_root
def test_a_heavy_environments_tasks_have_a_shm_of_their_own(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node(config=config(environment="own"))
    orchestrator.run("w1", {"taskType": "misbehave", "do": "shm", "then": "die"}, task_id="own")
    name = (node.results_dir / "own" / "shm").read_text()
    assert not Path("/dev/shm", name).exists()


def test_without_one_what_a_killed_task_left_is_swept(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node(config=config(environment="own", processes="private_shm = false"))
    orchestrator.run("w1", {"taskType": "misbehave", "do": "shm", "then": "die"}, task_id="swept")
    name = (node.results_dir / "swept" / "shm").read_text()
    until(lambda: not Path("/dev/shm", name).exists(), "the block is gone", 10)
