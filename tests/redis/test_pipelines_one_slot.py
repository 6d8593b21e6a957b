"""One node with one slot is enough for submitted pipelines; and what AsyncClient and the command show of them there."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowmesh.client import AsyncClient
from tests.kit.support import until
from tests.kit.tmux import Tmux
from tests.redis.test_submitted_pipelines import Fleet, drivers_below, stage, wait_stage

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def started() -> Iterator[Fleet]:
    fleet = Fleet(nodes=1)
    yield fleet
    fleet.close()


@pytest.fixture
def fleet(started: Fleet, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    started.nodes[0].wait_status("IDLE")
    yield started
    if getattr(request.node, "failed", False):
        print(started.nodes[0].text()[-5000:])


def test_the_only_slot_runs_all_stages_with_the_driver_beside_it(fleet: Fleet) -> None:
    nodes = [wait_stage("first"), stage("other"), stage("last", m="${first.ok}", dependsOn=["other"])]
    fleet.client.submit({"spec": {"graph": {"nodes": nodes}}}, task_id="alone")
    until(lambda: fleet.state("alone.first") == "running", "the only slot has a stage")
    status = fleet.nodes[0].ask(op="status")
    assert [task["task_id"] for task in status["tasks"]] == ["alone.first"]
    assert status["queue"]["pipelines"] == ["alone"]
    assert len(drivers_below(fleet.nodes[0].pid)) == 1
    fleet.go("alone.first")
    assert fleet.client.wait("alone", 60).ok
    tasks = ("alone", "alone.first", "alone.other", "alone.last")
    assert [(fleet.count(task), fleet.ends(task)) for task in tasks] == [(1, 1)] * 4
    until(lambda: not drivers_below(fleet.nodes[0].pid), "the driver has ended")


def test_the_async_client_submits_watches_and_cancels(fleet: Fleet) -> None:
    async def story() -> None:
        async with AsyncClient(fleet.server.url) as client:
            await client.submit({"spec": {"stages": [wait_stage("one"), stage("two")]}}, task_id="watched")

            async def types() -> list[str]:
                return [event.type async for event in client.events("watched")]

            async def lines() -> list[str]:
                return [line async for line in client.logs("watched", follow=True)]

            watching = asyncio.gather(types(), lines(), client.wait("watched", 60))
            while "one" not in (stages := await client.stages("watched")) or stages["one"].state != "running":
                await asyncio.sleep(0.05)
            fleet.go("watched.one")
            events, logs, end = await watching
            assert (events[-1], end.ok, end.task_id) == ("TASK_SUCCEEDED", True, "watched")
            assert [line.split(" after")[0] for line in logs if "succeeded" in line] == [
                "one: succeeded",
                "two: succeeded",
            ]
            assert {name: each.state for name, each in (await client.stages("watched")).items()} == {
                "one": "succeeded",
                "two": "succeeded",
            }
            assert (await client.result("watched"))["stages"]["two"]["state"] == "succeeded"

            await client.queue(
                {"spec": {"stages": [wait_stage("one"), stage("two")]}}, task_id="stopped", priority="high"
            )
            while (state := await client.state("stopped.one")) is None or state.state != "running":
                await asyncio.sleep(0.05)
            assert await client.cancel("stopped", "changed my mind") == "running"
            end = await client.wait("stopped", 60)
            assert (end.verdict, end.error) == ("cancelled", "changed my mind")

    asyncio.run(story())
    assert [fleet.ends(f"stopped{each}") for each in ("", ".one", ".two")] == [1, 1, 0]
    assert fleet.verdict("stopped.one") == "cancelled"


def test_requests_that_failed_together_stay_apart_with_the_next_driver(fleet: Fleet) -> None:
    asks = {"taskType": "inference", "hold": True, "fail_together": True}
    nodes = [{"name": name, "spec": {**asks, "data": {"type": "list", "items": [name]}}} for name in ("ask1", "ask2")]
    fleet.client.queue({"spec": {"graph": {"nodes": nodes}}}, task_id="apart", retries=0)
    until(lambda: len(fleet.states("apart")) == 2, "each runs by itself")
    fleet.kill_driver("apart")
    for name in ("ask1", "ask2"):
        until(lambda name=name: fleet.state(f"apart.{name}") == "running", f"{name} runs")
        fleet.go(f"apart.{name}")
    end = fleet.client.wait("apart", 60)
    assert end.ok, end
    stages = fleet.client.result("apart")["stages"]
    assert [stages[name]["result"]["items"][0]["output"] for name in ("ask1", "ask2")] == ["ask1", "ask2"]
    assert [fleet.count(f"apart.{name}") for name in ("ask1", "ask2")] == [2, 1]


def test_the_command_shows_a_live_tree_and_leaves_the_pipeline_at_ctrl_c(fleet: Fleet, tmp_path: Path) -> None:
    document = {"spec": {"stages": [wait_stage("first"), stage("second")]}}
    (tmp_path / "p.json").write_text(json.dumps(document))
    command = [sys.executable, "-m", "flowmesh.cli.main", "submit", str(tmp_path / "p.json"), "--no-check"]
    command += ["--redis", fleet.server.url, "--task-id", "seen", "--wait"]
    with Tmux(command, columns=100, lines=20) as terminal:
        shown = terminal.wait("first", "running", "second", "waiting")
        assert shown.count("running") == 1  # drawn in place
        terminal.press("C-c")
        terminal.wait_left(130)
        shown = terminal.screen()
        assert "interrupted; seen continues: `flowmesh wait seen` waits again" in shown
        assert "Traceback" not in shown
        assert "waiting" not in shown  # the tree is gone
    assert fleet.state("seen") == "running"
    fleet.go("seen.first")
    assert fleet.client.wait("seen", 60).ok
    assert [fleet.count("seen.first"), fleet.count("seen.second"), fleet.ends("seen")] == [1, 1, 1]


def test_a_draining_node_takes_no_new_driver(fleet: Fleet) -> None:
    node = fleet.nodes[0]
    task = fleet.client.queue({"spec": wait_stage("x")["spec"]}, task_id="holds")
    until(lambda: fleet.state(task.task_id) == "running", "a task holds the node")
    node.ask(op="drain")
    fleet.client.queue({"spec": {"stages": [stage("only")]}}, task_id="later", anyway=True)
    until(lambda: node.ask(op="status")["queue"]["pipelines"] == [], "what it had of others is left")
    fleet.go(task.task_id)
    assert node.process is not None
    assert node.process.wait(60) == 0
    assert (fleet.state("later"), fleet.attempt("later"), fleet.count("later")) == ("queued", 0, 0)
    assert fleet.client.waiting_tasks()[0].task_id == "later"
    node.start()
    assert fleet.client.wait("later", 60).ok
    assert fleet.attempt("later") == 1
