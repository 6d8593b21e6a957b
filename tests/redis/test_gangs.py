"""Three nodes and tasks on several of them: whatever happens to one member, the gang ends as one, or starts again."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmesh.cli.main import cli, guarded
from flowmesh.client import TaskState
from tests.kit import fleet as kit
from tests.kit.support import Node, until

pytestmark = pytest.mark.redis
CONFIG = f"""{kit.CONFIG}allow_command = ["*"]
"""


class Fleet(kit.Fleet):
    """Three nodes."""

    def __init__(self) -> None:
        super().__init__(3, CONFIG)

    def member(self, task_id: str) -> tuple[Node, int]:
        """The node of a running member, and its process."""

        def there() -> tuple[Node, int] | None:
            for node in self.nodes:
                if node.process is not None and node.process.poll() is None:
                    for task in node.ask(op="status")["tasks"]:
                        if task["task_id"] == task_id and task["state"] == "running" and task["pid"]:
                            return node, task["pid"]
            return None

        return until(there, f"{task_id} runs")

    def has_one_end(self, task_id: str) -> None:
        self.peer.wait_end(task_id)
        self.settle()
        assert len(self.peer.ends(task_id)) == 1

    def settle(self) -> None:
        """All nodes are idle, and nothing of a gang is left."""
        raw = self.server.client()
        self.wait_idle()
        until(lambda: not raw.keys("flowmesh:queue:gangs*"), "no gang is left")


@pytest.fixture(scope="module")
def started() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    fleet.close()


@pytest.fixture
def fleet(started: Fleet, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    started.settle()
    yield started
    if getattr(request.node, "failed", False):
        started.show()


def echo(nodes: Any, **fields: Any) -> dict[str, Any]:
    return {"spec": {"taskType": "echo", "nodes": nodes, **fields}}


def program(nodes: Any, script: str) -> dict[str, Any]:
    return {"spec": {"taskType": "command", "nodes": nodes, "command": ["sh", "-c", script]}}


def until_file(path: Path) -> str:
    return f"until test -e {path}; do sleep 0.05; done"


def test_all_members_run_and_one_event_says_so(fleet: Fleet) -> None:
    fleet.client.queue(program(2, 'echo "$NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT"'), task_id="all")
    end = fleet.client.wait("all", 30)
    assert (end.verdict, end.attempts, end.error) == ("ok", 1, "")
    members = end.payload["members"]
    assert [(each["rank"], each["verdict"]) for each in members] == [(0, "ok"), (1, "ok")]
    assert len({each["node_id"] for each in members}) == 2
    assert end.worker_id == members[0]["worker_id"]
    fleet.has_one_end("all")
    assert [event["type"] for event in fleet.peer.of_task("all")] == ["TASK_STARTED", "TASK_SUCCEEDED"]
    assert fleet.peer.of_task("all.m1") == []
    own, other = (list(fleet.client.logs(task)) for task in ("all", "all.m1"))
    assert own[0].startswith("0 of 2 at 127.0.0.1:")
    assert other == [own[0].replace("0 of", "1 of")]
    assert fleet.client.result("all")["ok"]
    assert fleet.client.tasks() == []


def test_as_many_as_there_are(fleet: Fleet) -> None:
    end = fleet.client.wait(fleet.client.queue(echo({"min": 2, "max": 8})).task_id, 30)
    assert len(end.payload["members"]) == 3


def test_too_few_nodes_hold_no_slot(fleet: Fleet) -> None:
    fleet.client.queue(echo(4), task_id="four", anyway=True, priority="high")
    ids = [fleet.client.queue({"spec": {"taskType": "echo"}}).task_id for _ in range(6)]
    assert all(fleet.client.wait(task, 30).ok for task in ids)
    assert fleet.client.state("four").state == "queued"  # type: ignore[union-attr]
    fleet.client.cancel("four")


def test_a_gang_comes_before_less_urgent_tasks_that_always_wait(fleet: Fleet) -> None:
    ids = [
        fleet.client.queue({"spec": {"taskType": "echo", "delaySec": 0.4}}, priority="low").task_id for _ in range(60)
    ]
    gang = fleet.client.queue(echo(3)).task_id
    assert fleet.client.wait(gang, 30).ok
    assert any(task.task_id in ids for task in fleet.client.tasks()), "it did not wait for all of them"
    for task in ids:
        fleet.client.cancel(task)
    for task in ids:
        fleet.client.wait(task, 30)


def test_a_killed_member_ends_all_and_all_start_again(fleet: Fleet, tmp_path: Path) -> None:
    script = f"trap '' TERM; echo here; {until_file(tmp_path / 'go')}"
    fleet.client.queue(program(2, script), task_id="killed", retries=1)
    first, _ = fleet.member("killed")
    node, pid = fleet.member("killed.m1")
    os.kill(pid, signal.SIGKILL)
    until(lambda: (fleet.client.state("killed") or TaskState(task_id="", state="")).failures == 1, "it starts again")
    assert {each.rank for each in fleet.client.attempts("killed")} == {0, 1}
    failed = next(each for each in fleet.client.attempts("killed") if each.rank == 1)
    assert (failed.error_kind, failed.worker_id) == ("crash", node.worker_id)
    (tmp_path / "go").touch()
    end = fleet.client.wait("killed", 30)
    assert (end.ok, end.attempts) == (True, 2)
    assert node.worker_id not in {each["worker_id"] for each in end.payload["members"]}, "the other two fit"
    assert end.worker_id == first.worker_id, "its folder is there"
    fleet.has_one_end("killed")


def test_the_failing_members_verdict_is_the_tasks(fleet: Fleet, tmp_path: Path) -> None:
    script = f'test "$NODE_RANK" = 0 || {{ echo broken; exit 3; }}; {until_file(tmp_path / "never")}'
    fleet.client.queue(program(2, script), task_id="fails")
    end = fleet.client.wait("fails", 30)
    assert (end.verdict, end.attempts, end.payload["members"][0]["verdict"]) == ("error", 1, "cancelled")
    assert end.error.startswith(f"member 1 on {end.worker_id}: ")
    assert "another member has failed" in end.payload["members"][0]["error"]
    fleet.has_one_end("fails")


def test_a_dead_node_ends_all_and_fewer_go_on(fleet: Fleet, tmp_path: Path) -> None:
    fleet.client.queue(program({"min": 2, "max": 3}, until_file(tmp_path / "go")), task_id="fewer")
    assert fleet.wait_state("fewer", "running").nodes == "3"
    node, _ = fleet.member("fewer.m1")
    node.kill()
    until(lambda: (fleet.client.state("fewer") or TaskState(task_id="", state="")).failures == 1, "it starts again")
    assert fleet.wait_state("fewer", "running").nodes == "2"
    node.start()  # its fork server has kept the member
    until(lambda: node.ask(op="status")["tasks"] == [], "the stale member is stopped")
    (tmp_path / "go").touch()
    end = fleet.client.wait("fewer", 30)
    assert (end.ok, len(end.payload["members"])) == (True, 2)
    assert "supervisor_lost" in {each.error_kind for each in fleet.client.attempts("fewer")}
    fleet.has_one_end("fewer")


def test_a_node_that_drains_sends_all_back_without_a_failure(fleet: Fleet, tmp_path: Path) -> None:
    fleet.client.queue(program(2, until_file(tmp_path / "go")), task_id="drains", retries=0)
    node, _ = fleet.member("drains.m1")
    fleet.member("drains")
    node.ask(op="drain", mode="checkpoint")
    until(lambda: (fleet.client.state("drains") or TaskState(task_id="", state="")).attempt == 2, "on the other two")
    (tmp_path / "go").touch()
    end = fleet.client.wait("drains", 30)
    assert (end.ok, end.attempts) == (True, 2)
    assert fleet.client.state("drains").failures == 0  # type: ignore[union-attr]
    assert node.process is not None
    node.process.wait(30)
    node.start()


def test_cancelled_everywhere(fleet: Fleet, tmp_path: Path) -> None:
    fleet.client.queue(program(3, until_file(tmp_path / "never")), task_id="cancelled")
    fleet.member("cancelled.m2")
    assert fleet.client.cancel("cancelled", "not needed") in ("claimed", "running")
    end = fleet.client.wait("cancelled", 30)
    assert (end.verdict, {each["verdict"] for each in end.payload["members"]}) == ("cancelled", {"cancelled"})
    assert end.error.endswith("not needed")


def test_only_the_queue_has_gangs(fleet: Fleet) -> None:
    fleet.peer.dispatch("w1", echo(2)["spec"], "direct")
    end = fleet.peer.wait_end("direct")
    assert (end["payload"]["error_kind"], "comes from the queue" in end["error"]) == ("bad_request", True)


def test_the_command_line(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REDIS_URL", fleet.server.url)
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(json.dumps(program(1, f"echo line of $NODE_RANK; {until_file(tmp_path / 'go')}")))

    def flowmesh(*words: str) -> tuple[int, str, str]:
        code = guarded(lambda: cli.main(args=words, prog_name="flowmesh", standalone_mode=False))
        out, err = capfd.readouterr()
        return code, out, err

    assert flowmesh("submit", "--queue", "a.yaml", "--nodes", "2", "--task-id", "line", "--no-check")[0] == 0
    fleet.member("line.m1")
    fleet.wait_state("line", "running")
    assert "(2 nodes)" in flowmesh("ps")[1]
    (tmp_path / "go").touch()
    assert flowmesh("wait", "line")[0] == 0
    assert flowmesh("logs", "line", "--member", "1", "--redis", fleet.server.url)[1] == "line of 1\n"
    code, _, err = flowmesh("submit", "--queue", "a.yaml", "--nodes", "5-9", "--no-check")
    assert (code, "spec.nodes: this task needs 5 nodes that fit it, and there are 3" in err) == (1, True)
    again = ("submit", "--queue", "--anyway", "a.yaml", "--nodes", "5-9", "--task-id", "waits", "--no-check")
    assert flowmesh(*again)[0] == 0
    assert "5-9" in flowmesh("queue", "list")[1]
    assert flowmesh("queue", "remove", "waits")[0] == 0
    assert "--nodes needs --queue" in flowmesh("submit", "a.yaml", "--nodes", "2", "--no-check")[2]
    Path("b.yaml").write_text(json.dumps(echo(2)))
    assert "comes from the queue" in flowmesh("submit", "b.yaml", "--no-check")[2]
