"""Two nodes and the queue: each task ends once, whoever is killed; retries, drains, cancels, preemption, logs."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from flowmesh.cli.main import cli, guarded
from flowmesh.client import NeverFits, TaskState
from tests.kit import fleet as kit
from tests.kit.support import Node, until

pytestmark = pytest.mark.redis
CONFIG = f"""{kit.CONFIG}
[task_types.misbehave]
runner = "tests.kit.runners_for_tests:MisbehavingRunner"
environment = "light"

[task_types.sft]
runner = "tests.kit.runners_for_tests:MisbehavingRunner"
environment = "light"
"""


class Fleet(kit.Fleet):
    """Two nodes."""

    def __init__(self) -> None:
        super().__init__(2, CONFIG, {"NODES_TOKEN": "s3cr3t-of-the-node"})

    def other(self, worker_id: str) -> Node:
        return next(node for node in self.nodes if node.worker_id != worker_id)

    def settle(self) -> None:
        """Both nodes are idle, and nothing is left in the queue."""
        raw = self.server.client()
        self.wait_idle()
        until(lambda: not raw.keys("flowmesh:queue:held:*"), "nothing is held")
        assert not raw.keys("flowmesh:queue:waiting")


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


def do(what: str, task_type: str = "misbehave", **fields: Any) -> dict[str, Any]:
    return {"spec": {"taskType": task_type, "do": what, **fields}}


def test_each_task_ends_once_while_nodes_and_redis_are_killed(fleet: Fleet) -> None:
    """The small version of the fault matrix's row."""
    rng = random.Random(22)
    ids = [
        fleet.client.queue(
            {"metadata": {"owner": rng.choice("abc")}, "spec": {"taskType": "echo", "delaySec": 0.02}}, retries=5
        ).task_id
        for _ in range(100)
    ]
    for step in range(4):
        time.sleep(rng.uniform(0.1, 0.3))
        if step == 1:
            fleet.server.stop(signal.SIGKILL)
            fleet.server.start()
            with contextlib.suppress(redis.RedisError):
                fleet.peer.hear()
            fleet.peer.reconnect(fleet.server)
        else:
            node = fleet.nodes[step % 2]
            node.kill()
            node.start(wait=False)
    for task_id in ids:
        end = fleet.client.wait(task_id, 60)
        assert end.ok, end
    fleet.peer.hear()
    counts = Counter(event["task_id"] for event in fleet.peer.task_events if event["type"] == "TASK_SUCCEEDED")
    assert max(counts.values()) == 1
    assert {task.state for task in fleet.client.tasks(all=True)} == {"done"}
    done = {task.task_id for task in fleet.client.tasks(all=True) if task.ok}
    assert done >= set(ids)


def test_a_dead_nodes_task_runs_elsewhere_and_ends_once(fleet: Fleet) -> None:
    task = fleet.client.queue(do("wait_for", file="go"), task_id="moves").task_id
    first = fleet.wait_state(task, "running").worker_id
    node, other = fleet.node(first), fleet.other(first)
    node.kill()
    fleet.server.client().delete(f"worker:{first}:hb")
    until(
        lambda: (fleet.client.state(task) or TaskState(task_id="", state="")).worker_id == other.worker_id, "it moved"
    )
    fleet.wait_state(task, "running")
    node.start()  # its fork server has kept the task
    until(lambda: node.ask(op="status")["tasks"] == [], "the stale attempt is stopped")
    assert fleet.client.state(task).state == "running"  # type: ignore[union-attr]
    (other.results_dir / task / "go").touch()
    end = fleet.client.wait(task, 30)
    assert (end.ok, end.worker_id, end.attempts) == (True, other.worker_id, 2)
    assert {each.error_kind for each in fleet.client.attempts(task)} >= {"supervisor_lost"}
    fleet.settle()
    assert [event["worker_id"] for event in fleet.peer.ends(task)] == [other.worker_id]


def test_a_crash_is_tried_on_the_other_node(fleet: Fleet) -> None:
    task = fleet.client.queue(do("kill_self"), retries=1).task_id
    end = fleet.client.wait(task, 30)
    assert (end.verdict, end.attempts) == ("crash", 2)
    attempts = fleet.client.attempts(task)
    assert sorted(each.worker_id for each in attempts) == ["w1", "w2"]
    assert all(each.exit and each.exit["signal"] == "SIGKILL" for each in attempts)
    assert len(fleet.peer.ends(task)) == 1
    plain = fleet.client.wait(fleet.client.queue(do("raise")).task_id, 30)
    assert (plain.verdict, plain.attempts) == ("error", 1), "what would fail anywhere is not tried again"


def test_a_draining_node_takes_nothing_and_a_direct_dispatch_runs_beside_the_queue(fleet: Fleet) -> None:
    fleet.peer.dispatch("w1", do("wait_for", file="go")["spec"], "blocks")
    fleet.peer.wait_started("blocks")
    crashes = fleet.client.queue(do("kill_self"), retries=1).task_id
    until(lambda: fleet.client.attempts(crashes), "it crashed on w2, and waits for w1")
    fleet.nodes[0].ask(op="drain", mode="finish")
    ids = [fleet.client.queue({"spec": {"taskType": "echo"}}).task_id for _ in range(6)]
    assert {fleet.client.wait(task, 30).worker_id for task in ids} == {"w2"}
    assert fleet.client.wait(crashes, 30).worker_id == "w2", "it fits no other node any more"
    fleet.nodes[0].ask(op="undrain")
    (fleet.nodes[0].results_dir / "blocks" / "go").touch()
    ids, direct = [], []
    for _ in range(10):
        ids.append(fleet.client.queue(do("alone")).task_id)
        direct.append(fleet.peer.dispatch("w1", do("alone")["spec"]))
    ends = [fleet.client.wait(task, 30) for task in ids]
    assert [(end.verdict, end.error) for end in ends] == [("ok", "")] * 10
    assert {end.worker_id for end in ends} >= {"w2"}
    assert [fleet.peer.wait_end(task)["type"] for task in direct] == ["TASK_SUCCEEDED"] * 10


def test_a_disabled_worker_takes_nothing(fleet: Fleet) -> None:
    raw = fleet.server.client()
    raw.sadd("workers:elastic_disabled", "w1")
    tags = [{"spec": {"taskType": "echo", "resources": {"tags": each}}} for each in ([], ["fast"])]
    with pytest.raises(NeverFits, match="lacks the tag 'fast'"):
        fleet.client.queue(tags[1])
    ids = [fleet.client.queue(tags[0]).task_id for _ in range(5)]
    assert {fleet.client.wait(task, 30).worker_id for task in ids} == {"w2"}
    raw.srem("workers:elastic_disabled", "w1")


def test_cancelled_from_anywhere(fleet: Fleet) -> None:
    task = fleet.client.queue(do("sleep")).task_id
    fleet.wait_state(task, "running")
    assert fleet.client.cancel(task, "not needed") == "running"
    end = fleet.client.wait(task, 30)
    assert (end.verdict, end.error) == ("cancelled", "not needed")


def test_a_record_that_redis_refuses_holds_nothing_up(fleet: Fleet) -> None:
    fleet.server.client().set("flowmesh:task:odd", "not a hash")
    fleet.peer.dispatch("w1", {"taskType": "echo"}, "odd", record={"attempt": 1})
    assert fleet.peer.wait_end("odd")["type"] == "TASK_SUCCEEDED"
    fleet.server.client().delete("flowmesh:task:odd")


def test_logs_and_result_from_anywhere(fleet: Fleet) -> None:
    task = fleet.client.queue(do("tell_secrets"), retries=0).task_id
    lines = list(fleet.client.logs(task, follow=True)) if fleet.wait_state(task, "done") else []
    assert sum("many words" in line for line in lines) == 100
    assert not any("s3cr3t" in line for line in lines)
    result = fleet.client.result(task)
    assert (result["ok"], result["error_kind"]) == (False, "error")
    assert "s3cr3t" not in json.dumps(result)
    assert not fleet.server.client().keys("flowmesh:follow:*s3cr3t*")


def test_a_running_task_that_writes_nothing_is_followed(fleet: Fleet) -> None:
    raw = fleet.server.client()
    task = fleet.client.queue(do("sleep")).task_id
    fleet.wait_state(task, "running")
    with ThreadPoolExecutor() as pool:
        lines = pool.submit(lambda: list(fleet.client.logs(task, follow=True)))
        until(lambda: any(raw.xrange(key)[0][1] == {b"open": b"1"} for key in raw.keys("flowmesh:logs:*")), "it begins")
        fleet.client.cancel(task)
        assert all(lines.result(60))


def test_a_low_training_task_makes_room_with_a_checkpoint(fleet: Fleet) -> None:
    low = [fleet.client.queue(do("checkpoint", "sft"), priority="low").task_id for _ in range(2)]
    for task in low:
        fleet.wait_state(task, "running")
    urgent = fleet.client.queue({"spec": {"taskType": "echo"}}, priority="high").task_id
    where = fleet.client.wait(urgent, 30).worker_id
    back = [task for task in low if fleet.client.attempts(task)]
    assert len(back) == 1
    (attempt,) = fleet.client.attempts(back[0])
    assert (attempt.error_kind, attempt.worker_id) == ("drained", where)
    assert attempt.error.startswith("preempted")
    again = fleet.wait_state(back[0], "running")
    assert (again.worker_id, again.failures, again.attempt) == (where, 0, 2), "back where its checkpoints are"
    assert (fleet.node(where).results_dir / back[0] / "checkpoints" / "last").read_text() == "saved"
    assert fleet.peer.ends(back[0]) == []
    for task in low:
        fleet.client.cancel(task, force=True)
        assert fleet.client.wait(task, 30).verdict == "cancelled"


def test_the_command_line_from_a_machine_without_a_node(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, message in (("a", "first"), ("b", "second")):
        (tmp_path / f"{name}.yaml").write_text(f"spec: {{taskType: echo, message: {message}, delaySec: 0.2}}\n")
    monkeypatch.setenv("REDIS_URL", fleet.server.url)
    monkeypatch.chdir(tmp_path)

    def flowmesh(*words: str) -> tuple[int, str, str]:
        code = guarded(lambda: cli.main(args=words, prog_name="flowmesh", standalone_mode=False))
        out, err = capfd.readouterr()
        return code, out, err

    def as_json(*words: str) -> Any:
        code, out, err = flowmesh(*words, "--json")
        assert (code, err) == (0, ""), (out, err)
        return json.loads(out)

    ids = [each["task_id"] for each in as_json("submit", "--queue", "a.yaml", "b.yaml", "--priority", "low")["tasks"]]
    assert {task["task_id"] for task in as_json("ps")["tasks"]} == set(ids)
    code, out, _ = flowmesh("wait", *ids)
    assert (code, out.count("succeeded in")) == (0, 2)
    assert as_json("result", ids[1])["echo"]["message"] == "second"
    listed = {task["task_id"]: task for task in as_json("ps", "--all")["tasks"]}
    assert [(listed[each]["state"], listed[each]["priority"], listed[each]["verdict"]) for each in ids] == [
        ("done", "low", "ok")
    ] * 2
    assert as_json("queue") == {"waiting": []}
    assert flowmesh("logs", ids[0], "--redis", fleet.server.url) == (0, "", "")
    assert "has ended already" in flowmesh("cancel", ids[0])[2]

    (tmp_path / "big.yaml").write_text("spec: {taskType: echo, resources: {hardware: {gpu: {count: 64}}}}\n")
    code, _, err = flowmesh("submit", "--queue", "big.yaml")
    assert (code, "no registered worker could ever run" in err) == (1, True)
    big = as_json("submit", "--queue", "--anyway", "big.yaml")["task_id"]
    assert [each["requires"]["gpus"] for each in as_json("queue")["waiting"]] == [64]
    assert flowmesh("cancel", big) == (0, f"cancelled {big}, which waited\n", "")
    code, _, err = flowmesh("wait", big)
    assert (code, "failed (cancelled)" in err) == (1, True)

    direct = as_json("submit", "a.yaml", "--wait")["task_id"]
    assert as_json("result", direct)["echo"]["message"] == "first"
    assert flowmesh("wait", "never-heard-of")[0] == 1
