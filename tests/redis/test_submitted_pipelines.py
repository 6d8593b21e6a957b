"""Pipelines that nodes drive survive their client and their driver: each stage runs once, and all of it ends once."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmesh.cli.main import cli, guarded
from flowmesh.client import TaskExists
from flowmesh.errors import FieldError
from flowmesh.pipeline_driver.origins import Origins
from flowmesh.pipeline_driver.store import bounded
from flowmesh.pipelines.references import Reference, value_at
from flowmesh.queue.workers import NeverFits
from flowmesh.validation.json_paths import PathError
from tests.kit import fleet as kit
from tests.kit.support import Node, alive, until

pytestmark = pytest.mark.redis
CONFIG = f"""{kit.CONFIG}
[task_types.misbehave]
runner = "tests.kit.runners_for_tests:MisbehavingRunner"
environment = "light"

[task_types.inference]
runner = "tests.kit.pipeline_runners:ItemsRunner"
environment = "light"
"""


class Fleet(kit.Fleet):
    """Nodes, and what Redis has of tasks."""

    def __init__(self, nodes: int = 2) -> None:
        super().__init__(nodes, CONFIG)
        self.raw = self.server.client()

    def events(self, task_id: str) -> list[str]:
        return [event["type"] for event in self.peer.of_task(task_id)]

    def record(self, task_id: str, name: str) -> str:
        return (self.raw.hget(f"flowmesh:task:{task_id}", name) or b"").decode()

    def state(self, task_id: str) -> str:
        return self.record(task_id, "state")

    def worker(self, task_id: str) -> str:
        return self.record(task_id, "worker_id")

    def verdict(self, task_id: str) -> str:
        return self.record(task_id, "verdict")

    def attempt(self, task_id: str) -> int:
        return int(self.record(task_id, "attempt") or 0)

    def states(self, pipeline: str) -> list[str]:
        return [task.state for task in self.client.tasks() if task.task_id.startswith(f"{pipeline}.")]

    def count(self, task_id: str) -> int:
        """How often it started."""
        return self.events(task_id).count("TASK_STARTED")

    def ends(self, task_id: str) -> int:
        return len(self.peer.ends(task_id))

    def go(self, task_id: str) -> None:
        """Let a stage that waits go on, once it runs."""
        until(lambda: self.state(task_id) == "running", f"{task_id} runs")
        (self.node(self.worker(task_id)).results_dir / task_id / "go").touch()

    def kill_driver(self, pipeline: str) -> None:
        """Kill it, and wait until another one has the pipeline."""
        _, pid = self.driver(pipeline)
        attempt = self.attempt(pipeline)
        os.kill(pid, signal.SIGKILL)
        until(lambda: self.attempt(pipeline) > attempt, "another driver has it")

    def driver(self, pipeline: str) -> tuple[Node, int]:
        """The node that drives a pipeline, and the driver's process."""

        def there() -> tuple[Node, int] | None:
            for node in self.nodes:
                if node.process is None or node.process.poll() is not None:
                    continue
                driven = node.ask(op="status")["queue"]["pipelines"]
                told = re.findall(rf"drives a pipeline task={pipeline} pid=(\d+)", node.text())
                if pipeline in driven and told and int(told[-1]) in drivers_below(node.pid):
                    return node, int(told[-1])
            return None

        return tuple(until(there, f"{pipeline} has a driver"))


def drivers_below(pid: int) -> list[int]:
    found = []
    tasks = Path(f"/proc/{pid}/task")
    for task in tasks.iterdir():
        for child in (task / "children").read_text().split():
            if b"flowmesh.pipeline_driver" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


@pytest.fixture(scope="module")
def started() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    fleet.close()


@pytest.fixture
def fleet(started: Fleet, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    for node in started.nodes:
        node.wait_status("IDLE")
    yield started
    if getattr(request.node, "failed", False):
        started.show()


def wait_stage(name: str, note: str = "") -> dict[str, Any]:
    return {"name": name, "spec": {"taskType": "misbehave", "do": "wait_for", "file": "go", "note": note}}


def stage(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "spec": {"taskType": "echo", **fields}}


def test_a_chain_runs_on_the_nodes_and_ends_once(fleet: Fleet) -> None:
    document = {
        "metadata": {"owner": "ann"},
        "spec": {"stages": [stage("one", message="a"), stage("two", message="${one.result.echo.message}b")]},
    }
    assert fleet.client.submit(document, task_id="chain").worker_id is None
    end = fleet.client.wait("chain", 60)
    assert end.ok, end
    result = fleet.client.result("chain")
    assert {name: each["state"] for name, each in result["stages"].items()} == {"one": "succeeded", "two": "succeeded"}
    assert result["stages"]["two"]["result"]["echo"]["message"] == "ab"
    assert list(fleet.client.logs("chain", follow=True))[-1].startswith("two: succeeded")
    assert fleet.client.stages("chain")["two"].task_ids == ("chain.two",)
    for task in ("chain", "chain.one", "chain.two"):
        assert fleet.events(task) == ["TASK_STARTED", "TASK_SUCCEEDED"]
    owners = {task.task_id: task.owner for task in fleet.client.tasks(all=True)}
    assert owners["chain"] == owners["chain.one"] == "ann"


def test_another_driver_goes_on_where_a_dead_one_stopped(fleet: Fleet) -> None:
    """Its node is killed, and the driver with it, while a stage runs elsewhere and another one has ended."""
    nodes = [
        stage("done", message="x"),
        wait_stage("slow", "${done.result.echo.message}"),
        stage("last", m="${slow.ok}"),
    ]
    fleet.client.submit({"spec": {"graph": {"nodes": nodes}}}, task_id="moves")
    node, pid = fleet.driver("moves")
    until(lambda: fleet.state("moves.slow") == "running", "the slow stage runs")
    os.kill(pid, signal.SIGSTOP)  # so that it cannot hand over
    where, attempt = fleet.worker("moves.slow"), fleet.attempt("moves")
    node.kill()
    os.kill(pid, signal.SIGKILL)
    if where == node.worker_id:
        node.start()  # its fork server has kept the stage; any node may drive
    until(lambda: fleet.attempt("moves") > attempt, "another driver has it")
    (fleet.node(where).results_dir / "moves.slow" / "go").touch()
    end = fleet.client.wait("moves", 60)
    assert end.ok, end
    if where != node.worker_id:
        node.start()
    assert [fleet.count(f"moves.{name}") for name in ("done", "slow", "last")] == [1, 1, 1]
    assert fleet.ends("moves") == 1


def test_a_driver_that_came_back_can_do_nothing(fleet: Fleet) -> None:
    fleet.client.submit({"spec": {"stages": [wait_stage("first"), stage("second")]}}, task_id="zombie")
    _, pid = fleet.driver("zombie")
    until(lambda: fleet.state("zombie.first") == "running", "the stage runs")
    os.kill(pid, signal.SIGSTOP)
    attempt = fleet.attempt("zombie")
    fleet.raw.delete("flowmesh:pipeline:zombie:driver")  # as if its lease had ended
    fleet.raw.publish("flowmesh.queue", '{"type":"PIPELINE"}')
    until(lambda: fleet.attempt("zombie") > attempt, "another driver has it")
    os.kill(pid, signal.SIGCONT)
    until(lambda: not alive(pid), "the first one ends")
    fleet.go("zombie.first")
    assert fleet.client.wait("zombie", 60).ok
    assert [fleet.count("zombie.first"), fleet.count("zombie.second"), fleet.ends("zombie")] == [1, 1, 1]


def test_a_pipeline_survives_a_restart_of_redis(fleet: Fleet) -> None:
    fleet.client.submit({"spec": {"stages": [wait_stage("first"), stage("second")]}}, task_id="outage")
    until(lambda: fleet.state("outage.first") == "running", "the stage runs")
    fleet.peer.hear()
    fleet.server.stop(signal.SIGKILL)
    fleet.server.start()
    fleet.peer.reconnect(fleet.server)
    fleet.go("outage.first")
    assert fleet.client.wait("outage", 60).ok
    assert [fleet.ends(f"outage{each}") for each in ("", ".first", ".second")] == [1, 1, 1]


def test_a_cancel_ends_all_stages(fleet: Fleet) -> None:
    nodes = [wait_stage("one"), wait_stage("two"), wait_stage("three"), {**stage("four"), "dependsOn": ["one"]}]
    fleet.client.submit({"spec": {"graph": {"nodes": nodes}}}, task_id="cancelled")
    until(lambda: fleet.states("cancelled").count("running") == 2, "both slots are taken")
    assert fleet.client.cancel("cancelled", "not needed") == "running"
    end = fleet.client.wait("cancelled", 60)
    assert (end.verdict, end.error) == ("cancelled", "not needed")
    assert [fleet.ends(f"cancelled{each}") for each in ("", ".one", ".two", ".three", ".four")] == [1, 1, 1, 1, 0]
    assert {fleet.verdict(f"cancelled.{each}") for each in ("one", "two", "three")} == {"cancelled"}


def test_a_cancel_between_two_drivers_is_not_lost(fleet: Fleet) -> None:
    fleet.client.submit({"spec": {"stages": [wait_stage("first"), stage("second")]}}, task_id="between")
    until(lambda: fleet.state("between.first") == "running", "the stage runs")
    _, pid = fleet.driver("between")
    os.kill(pid, signal.SIGSTOP)
    fleet.client.cancel("between", "no more")
    os.kill(pid, signal.SIGKILL)
    end = fleet.client.wait("between", 60)
    assert (end.verdict, end.error) == ("cancelled", "no more")
    assert fleet.verdict("between.first") == "cancelled"
    assert [fleet.ends("between"), fleet.ends("between.first"), fleet.count("between.second")] == [1, 1, 0]


def test_a_stages_failure_ends_what_depends_on_it_and_nothing_else(fleet: Fleet) -> None:
    nodes = [
        {"name": "bad", "spec": {"taskType": "misbehave", "do": "raise"}},
        {**stage("after"), "dependsOn": ["bad"]},
        stage("other"),
    ]
    fleet.client.queue({"spec": {"graph": {"nodes": nodes}}}, task_id="fails")
    end = fleet.client.wait("fails", 60)
    assert end.verdict == "error"
    assert end.error.startswith("stage bad: ")
    states = {name: each["state"] for name, each in fleet.client.result("fails")["stages"].items()}
    assert states == {"bad": "failed", "after": "not run", "other": "succeeded"}
    # the same id again: only what is missing runs
    fleet.client.queue({"spec": {"graph": {"nodes": [nodes[1] | {"dependsOn": ["other"]}, nodes[2]]}}}, task_id="fails")
    assert fleet.client.wait("fails", 60).ok
    states = {name: each["state"] for name, each in fleet.client.result("fails")["stages"].items()}
    assert states == {"after": "succeeded", "other": "reused"}
    assert fleet.count("fails.other") == 1


def test_sweeps_shards_and_merged_requests_go_on_with_another_driver(fleet: Fleet) -> None:
    items = {"type": "list", "items": ["a", "b", "c", "d"]}
    divided = {"taskType": "inference", "data": items, "hold": True}
    asks = {"taskType": "inference", "hold": True, "model": {"source": {"identifier": "m"}}}
    nodes = [
        {"name": "many", "foreach": {"x": [1, 2, 3]}, "spec": {"taskType": "echo", "message": "${each.x}"}},
        stage("sum", message="${many.result.each[2].result.echo.message}"),
        {"name": "shards", "parallel": {"enabled": True}, "spec": divided, "dependsOn": ["sum"]},
        {"name": "ask1", "spec": {**asks, "data": {"type": "list", "items": ["one"]}}, "dependsOn": ["shards"]},
        {"name": "ask2", "spec": {**asks, "data": {"type": "list", "items": ["two"]}}, "dependsOn": ["shards"]},
    ]
    fleet.client.submit({"spec": {"graph": {"nodes": nodes}}}, task_id="all")
    shards = [f"all.shards.s{number}" for number in (0, 1)]
    until(lambda: all(fleet.state(each) == "running" for each in shards), "the shards run")
    fleet.kill_driver("all")
    for each in shards:
        fleet.go(each)
    until(lambda: fleet.state("all.ask1") == "running", "the merged requests run")
    fleet.kill_driver("all")
    fleet.go("all.ask1")
    end = fleet.client.wait("all", 60)
    assert end.ok, end
    result = fleet.client.result("all")["stages"]
    assert result["sum"]["result"]["echo"]["message"] == 3
    assert [item["output"] for item in result["shards"]["result"]["items"]] == ["a", "b", "c", "d"]
    assert [result[name]["result"]["items"][0]["output"] for name in ("ask1", "ask2")] == ["one", "two"]
    tasks = [task.task_id for task in fleet.client.tasks(all=True) if task.task_id.startswith("all.")]
    names = ["many.0", "many.1", "many.2", "sum", "shards.s0", "shards.s1", "ask1"]
    assert sorted(tasks) == sorted(f"all.{name}" for name in names)
    assert {fleet.count(task) for task in tasks} == {fleet.ends(task) for task in (*tasks, "all")} == {1}


def test_a_draining_node_hands_over_and_one_slot_is_enough(fleet: Fleet) -> None:
    fleet.client.submit({"spec": {"stages": [wait_stage("first"), stage("second")]}}, task_id="drains")
    until(lambda: fleet.state("drains.first") == "running", "the stage runs")
    node, pid = fleet.driver("drains")
    if fleet.worker("drains.first") == node.worker_id:
        fleet.go("drains.first")  # it ends with its tasks
    node.process.send_signal(signal.SIGTERM)
    other = next(each for each in fleet.nodes if each is not node)
    until(lambda: not alive(pid), "the driver has left it")
    if fleet.state("drains.first") == "running":
        until(lambda: drivers_below(other.pid), "the other node drives it")
        fleet.go("drains.first")
    assert fleet.client.wait("drains", 60).ok
    node.process.wait(30)
    node.start()
    assert fleet.attempt("drains") == 2
    assert fleet.record("drains", "failures") == "0"


def test_what_cannot_be_is_said_at_once(fleet: Fleet) -> None:
    with pytest.raises(NeverFits, match="the stage 'big'"):
        fleet.client.submit({"spec": {"stages": [stage("big", resources={"hardware": {"gpu": {"count": 99}}})]}})
    with pytest.raises(FieldError, match=r"spec\.stages\[0\]\.dependsOn\[0\]"):
        fleet.client.submit({"spec": {"stages": [{**stage("a"), "dependsOn": ["b"]}]}})
    with pytest.raises(FieldError, match="worker"):
        fleet.client.submit({"spec": {"stages": [stage("a")]}}, worker="w1")
    fleet.client.submit({"spec": {"stages": [wait_stage("first")]}}, task_id="twice")
    with pytest.raises(TaskExists):
        fleet.client.submit({"spec": {"stages": [stage("a")]}}, task_id="twice")
    fleet.client.cancel("twice", force=True)
    assert fleet.client.wait("twice", 60).verdict == "cancelled"


def test_the_command_shows_its_stages_and_where_a_path_came_from(
    fleet: Fleet, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A stage that fails with a path of another node is told so; a reference into what Redis lacks is an error."""
    (tmp_path / "p.json").write_text(
        json.dumps({"spec": {"stages": [stage("one"), stage("two", x="${one.result.no}")]}})
    )
    words = ["submit", str(tmp_path / "p.json"), "--redis", fleet.server.url, "--task-id", "shown", "--wait"]
    code = guarded(lambda: cli.main(args=words, prog_name="flowmesh", standalone_mode=False))
    out, err = capfd.readouterr()
    assert code == 1
    assert "shown  pipeline of 2 stages  submitted; follow it with" in out
    assert "one: succeeded" in out
    assert "two: failed: spec.stages[1].spec.x: ${one.result.no}" in out
    assert "stage two: spec.stages[1].spec.x" in err
    origins = Origins()
    origins.learn({"final_model_path": "/results/a/final_model"}, "w1")
    load = {"spec": {"checkpoint": {"load": {"path": "/results/a/final_model"}}}}
    assert "is a path of w1, and this task ran on w2" in origins.explain(load, "w2")
    assert origins.explain(load, "w1") == ""
    short = {"one": {"ok": True, "items": {"omitted": "list", "length": 9}, "truncated": True, "size_bytes": 2 << 20}}
    with pytest.raises(PathError, match="does not lie in Redis as a whole"):
        value_at(Reference("one", "result.items", "one.result.items"), short)
    assert value_at(Reference("one", "result.ok", "one.result.ok"), short) is True


def test_a_large_pipelines_result_leaves_out_the_largest() -> None:
    stages = {name: {"state": "succeeded", "result": {"x": name * size}} for name, size in (("a", 10), ("b", 2 << 20))}
    kept = json.loads(bounded({"ok": True, "stages": stages}))["stages"]
    assert kept["a"] == stages["a"]
    assert kept["b"] == {"state": "succeeded", "result_omitted": True}
