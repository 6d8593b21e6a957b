"""Dispatch by a worker's Redis stream: each entry is taken exactly once, whatever is killed at any time."""

from __future__ import annotations

import datetime
import json
import signal
import uuid
from typing import Any

import pytest

from tests.kit.support import Node, Orchestrator, RedisServer, until

pytestmark = pytest.mark.redis
CONFIG = "[redis]\nstream = true\ntimeout_s = 1.0\nhealth_check_interval_s = 1.0\n"


@pytest.fixture
def node(make_node) -> Node:
    return make_node(config=CONFIG)


def add(orchestrator: Orchestrator, spec: dict[str, Any], **extra: Any) -> str:
    """Add an entry to the worker's stream; a field that is None is left out."""
    task_id = extra.pop("task_id", None) or f"task-{uuid.uuid4().hex[:12]}"
    fields = {
        "task_id": task_id,
        "task": {"apiVersion": "flowmesh/v1", "kind": "Task", "spec": spec},
        "assigned_worker": "w1",
        "dispatched_at": datetime.datetime.now(datetime.UTC).isoformat(),
        **extra,
    }
    message = json.dumps({name: value for name, value in fields.items() if value is not None})
    orchestrator.redis.xadd("tasks:w1", {"message": message})
    return task_id


def left(orchestrator: Orchestrator) -> tuple[int, int]:
    """How many entries the stream has, and how many of them are pending: delivered, not acknowledged."""
    groups = orchestrator.redis.xinfo_groups("tasks:w1")
    assert [group["name"] for group in groups] == [b"flowmesh"]
    assert all(each["name"] == b"w1" for each in orchestrator.redis.xinfo_consumers("tasks:w1", "flowmesh"))
    return orchestrator.redis.xlen("tasks:w1"), groups[0]["pending"]


def wait_taken(orchestrator: Orchestrator) -> None:
    until(lambda: left(orchestrator) == (0, 0), "all entries are acknowledged and removed")


def test_entries_run_beside_messages(orchestrator: Orchestrator, node: Node) -> None:
    tasks = [add(orchestrator, {"taskType": "echo", "n": n}) for n in range(40)]
    tasks.append(orchestrator.dispatch("w1", {"taskType": "echo"}))
    assert {orchestrator.wait_end(task)["type"] for task in tasks} == {"TASK_SUCCEEDED"}
    starts = [event["task_id"] for event in orchestrator.task_events if event["type"] == "TASK_STARTED"]
    assert [task for task in starts if task != tasks[-1]] == tasks[:-1]
    wait_taken(orchestrator)


def test_the_same_task_both_ways_runs_once(orchestrator: Orchestrator, node: Node) -> None:
    both = {"task_id": "both", "dispatched_at": "2026-01-01T00:00:00+00:00"}
    orchestrator.dispatch("w1", {"taskType": "echo"}, **both)
    add(orchestrator, {"taskType": "echo"}, **both)
    orchestrator.wait_end("both")
    add(orchestrator, {"taskType": "echo"}, **both)
    orchestrator.wait_end(add(orchestrator, {"taskType": "echo"}))
    assert len(orchestrator.ends("both")) == 1
    wait_taken(orchestrator)
    assert node.ask(op="status")["duplicates"] == 2


def test_what_cannot_be_a_task_is_told_once_and_leaves(orchestrator: Orchestrator, node: Node) -> None:
    bad = add(orchestrator, {"taskType": "ecko"})
    add(orchestrator, {"taskType": "echo"}, assigned_worker="w2")
    orchestrator.redis.xadd("tasks:w1", {"message": b"\xff no json"})
    orchestrator.redis.xadd("tasks:w1", {"massage": "{}"})
    end = orchestrator.wait_end(bad)
    assert (end["type"], end["payload"]["error_kind"]) == ("TASK_FAILED", "bad_request")
    wait_taken(orchestrator)
    text = node.text()
    assert "dropped a stream entry without a `message` field" in text
    assert "it is for worker 'w2'" in text
    assert node.ask(op="status")["malformed"] == 1


def test_what_comes_while_the_node_is_down_waits_for_it(orchestrator: Orchestrator, make_node) -> None:
    before = add(orchestrator, {"taskType": "echo"})  # no node has run yet
    node = make_node(config=CONFIG)
    assert orchestrator.wait_end(before)["type"] == "TASK_SUCCEEDED"
    assert node.stop() == 0
    meanwhile = [add(orchestrator, {"taskType": "echo", "n": n}) for n in range(3)]
    node.start()
    assert {orchestrator.wait_end(task)["type"] for task in meanwhile} == {"TASK_SUCCEEDED"}
    wait_taken(orchestrator)


def test_what_comes_in_a_drain_stays_for_the_next_start(orchestrator: Orchestrator, node: Node) -> None:
    running = add(orchestrator, {"taskType": "echo", "delaySec": 2})
    orchestrator.wait_started(running)
    node.process.send_signal(signal.SIGTERM)
    node.wait_status("DRAINING")
    later = add(orchestrator, {"taskType": "echo"})
    until(lambda: left(orchestrator) == (1, 1), "it is pending, and not accepted")
    assert node.process.wait(30) == 0
    assert orchestrator.wait_end(running)["type"] == "TASK_SUCCEEDED"
    assert orchestrator.of_task(later) == []
    node.start()
    assert orchestrator.wait_end(later)["type"] == "TASK_SUCCEEDED"
    wait_taken(orchestrator)


@pytest.mark.parametrize("dispatched_at", ["2026-01-01T00:00:00+00:00", None])
def test_a_kill_between_the_journal_and_the_acknowledgement(
    orchestrator: Orchestrator, node: Node, dispatched_at: str | None
) -> None:
    """Redis refuses the acknowledgement: when the node dies, the task is in the journal and still in the stream."""
    wait_taken(orchestrator)
    orchestrator.redis.execute_command("ACL", "SETUSER", "default", "-xack", "-xdel")
    task = add(orchestrator, {"taskType": "echo"}, dispatched_at=dispatched_at)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    assert left(orchestrator) == (1, 1)
    node.kill()
    orchestrator.redis.execute_command("ACL", "SETUSER", "default", "+xack", "+xdel")
    node.start()
    wait_taken(orchestrator)
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
    assert len({event["ts"] for event in orchestrator.ends(task)}) == 1  # the same event may be sent again


def test_a_kill_between_the_delivery_and_the_journal(orchestrator: Orchestrator, node: Node) -> None:
    """An entry is delivered to the node's consumer, but the node has not read it: as after a kill at that moment."""
    wait_taken(orchestrator)
    node.kill()
    task = add(orchestrator, {"taskType": "echo"})
    given = orchestrator.redis.xreadgroup("flowmesh", "w1", {"tasks:w1": ">"})
    assert len(given[0][1]) == 1
    gone = add(orchestrator, {"taskType": "echo"})
    ((_, ((entry, _),)),) = orchestrator.redis.xreadgroup("flowmesh", "w1", {"tasks:w1": ">"})
    orchestrator.redis.xdel("tasks:w1", entry)
    assert left(orchestrator) == (1, 2)
    node.start()
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    wait_taken(orchestrator)
    assert orchestrator.of_task(gone) == []


def test_many_kills_lose_and_repeat_nothing(orchestrator: Orchestrator, node: Node) -> None:
    tasks = []
    for _ in range(4):
        tasks += [add(orchestrator, {"taskType": "echo", "delaySec": 0.05}) for _ in range(8)]
        orchestrator.wait_started(tasks[-5])
        node.kill()
        node.start()
    assert {orchestrator.wait_end(task)["type"] for task in tasks} == {"TASK_SUCCEEDED"}
    wait_taken(orchestrator)
    assert {(event["task_id"], event["ts"]) for task in tasks for event in orchestrator.ends(task)} == {
        (task, orchestrator.ends(task)[0]["ts"]) for task in tasks
    }


def test_the_stream_heals_after_outages(redis_server: RedisServer, orchestrator: Orchestrator, node: Node) -> None:
    orchestrator.redis.flushall()
    assert orchestrator.wait_end(add(orchestrator, {"taskType": "echo"}))["type"] == "TASK_SUCCEEDED"
    redis_server.stop()
    until(lambda: "stream not read" in node.text(), "the outage is logged")
    redis_server.start()
    orchestrator.reconnect(redis_server)
    node.wait_status("IDLE")
    assert orchestrator.wait_end(add(orchestrator, {"taskType": "echo"}))["type"] == "TASK_SUCCEEDED"
    wait_taken(orchestrator)


def test_without_the_setting_no_stream_is_made(orchestrator: Orchestrator, make_node) -> None:
    make_node()
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
    assert orchestrator.redis.keys("tasks:*") == []
