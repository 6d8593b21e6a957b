"""The life of a node as an orchestrator sees it (docs/contract.md), with plain redis-py and plain JSON."""

from __future__ import annotations

import datetime
import hashlib
import json
import signal
from pathlib import Path

import pytest

from tests.kit.http_server import Answer, Server
from tests.kit.support import Node, Orchestrator, RedisServer, until

pytestmark = pytest.mark.redis


def parse_time(text: str) -> datetime.datetime:
    when = datetime.datetime.fromisoformat(text)
    assert when.utcoffset() == datetime.timedelta(0)
    return when


def test_registration(redis_server: RedisServer, orchestrator: Orchestrator, make_node) -> None:
    env = {"WORKER_TAGS": "fast,eu", "WORKER_COST_PER_HOUR": "2.5", "WORKER_NETWORK_BANDWIDTH_BYTES_PER_SEC": "1000000"}
    node = make_node(env=env)
    client = orchestrator.redis
    register = orchestrator.wait_worker_event("REGISTER", worker_id="w1")
    parse_time(register["ts"])
    assert register["tags"] == ["fast", "eu"]
    assert register["metrics"] == {}
    assert register["payload"]["cost_per_hour"] == 2.5
    assert set(register["payload"]) >= {"env", "hardware", "cost_per_hour"}

    assert client.smembers("workers:ids") == {b"w1"}
    fields = {name.decode(): value.decode() for name, value in client.hgetall("worker:w1").items()}
    assert set(fields) >= {
        "worker_id", "status", "started_at", "pid", "env_json", "hardware_json", "tags_json", "last_seen",
        "cost_per_hour",
    }  # fmt: skip
    assert fields["worker_id"] == "w1"
    assert fields["status"] == "IDLE"
    assert fields["pid"] == str(node.pid)
    assert float(fields["cost_per_hour"]) == 2.5
    assert json.loads(fields["tags_json"]) == ["fast", "eu"]
    parse_time(fields["started_at"])
    parse_time(fields["last_seen"])
    assert "echo" in json.loads(fields["env_json"])["task_types"]
    hardware = json.loads(fields["hardware_json"])
    assert hardware == register["payload"]["hardware"]
    assert hardware["cpu"]["logical_cores"] >= 1
    assert hardware["memory"]["total_bytes"] > 2**28
    assert hardware["gpu"] == {"driver_version": None, "cuda_version": None, "gpus": []} or hardware["gpu"]["gpus"]
    assert hardware["network"]["bandwidth_bytes_per_sec"] == 1000000

    idle = orchestrator.wait_worker_event("STATUS", status="IDLE")
    assert idle["worker_id"] == "w1"
    assert 100 < client.ttl("worker:w1:hb") <= 120
    parse_time(client.get("worker:w1:hb").decode())


def test_heartbeats(orchestrator: Orchestrator, node: Node) -> None:
    until(lambda: orchestrator.hear(0.1) or len(_beats(orchestrator)) >= 2, "two heartbeats")
    first, second = _beats(orchestrator)[:2]
    metrics = second["metrics"]
    assert metrics["uptime_sec"] > first["metrics"]["uptime_sec"]
    assert metrics["accrued_cost_usd"] == pytest.approx(metrics["uptime_sec"] / 3600, rel=1e-3)
    assert set(metrics["loadavg"]) == {"1m", "5m", "15m"}
    assert set(metrics["power"]) == {"timestamp", "cpu_watts", "gpu_watts"}
    assert set(metrics["power"]["gpu_watts"]) == {"total", "per_gpu"}
    assert set(metrics["power_summary"]) == {
        "uptime_sec", "avg_cpu_watts", "avg_gpu_watts", "per_gpu_avg_watts", "estimated_energy_kwh",
        "estimated_energy_breakdown", "samples",
    }  # fmt: skip
    assert "estimated_energy_kwh" in metrics
    seen = parse_time(orchestrator.redis.hget("worker:w1", "last_seen").decode())
    assert abs((datetime.datetime.now(datetime.UTC) - seen).total_seconds()) < 30


def _beats(orchestrator: Orchestrator) -> list[dict]:
    return [event for event in orchestrator.worker_events if event["type"] == "HEARTBEAT"]


def test_ttl_follows_the_interval(orchestrator: Orchestrator, make_node) -> None:
    make_node(env={"HEARTBEAT_INTERVAL_SEC": "60"})
    assert 230 < orchestrator.redis.ttl("worker:w1:hb") <= 240


def test_a_task_from_dispatch_to_disk(orchestrator: Orchestrator, node: Node) -> None:
    spec = {"taskType": "echo", "greeting": "hé", "output": {"artifacts": ["report.txt"]}}
    task_id = orchestrator.dispatch("w1", spec)
    end = orchestrator.wait_end(task_id)
    started, succeeded = orchestrator.of_task(task_id)
    assert started["type"] == "TASK_STARTED"
    assert started["worker_id"] == "w1"
    assert set(started["payload"]) >= {"taskType", "dispatched_at", "started_at"}
    assert succeeded == end
    assert end["type"] == "TASK_SUCCEEDED"
    payload = end["payload"]
    assert payload["taskType"] == "echo"
    assert payload["runtime_sec"] > 0
    assert (
        parse_time(payload["dispatched_at"]) <= parse_time(payload["started_at"]) <= parse_time(payload["finished_at"])
    )

    running = orchestrator.wait_worker_event("STATUS", status="RUNNING")
    assert running["payload"]["task_id"] == task_id
    idle = until(lambda: orchestrator.hear(0.02) or _last_idle(orchestrator, task_id), "IDLE after the task")
    assert idle["payload"]["last_task"] == task_id
    assert orchestrator.redis.hget("worker:w1", "extra_last_task").decode() == task_id
    assert orchestrator.redis.hget("worker:w1", "extra_task_id").decode() == task_id

    folder = node.results_dir / task_id
    result = json.loads((folder / "responses.json").read_text())
    assert result["ok"] is True
    assert result["echo"] == spec
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["task_id"] == task_id
    parse_time(manifest["generated_at"])
    entries = {entry["name"]: entry for entry in manifest["entries"]}
    assert entries["responses.json"]["type"] == "result"
    assert entries["responses.json"]["sha256"] == hashlib.sha256((folder / "responses.json").read_bytes()).hexdigest()
    assert entries["responses.json"]["size"] == (folder / "responses.json").stat().st_size
    assert entries["report.txt"]["status"] == "missing"
    assert entries["report.txt"]["required"] is True
    assert entries["logs"]["type"] == "logs"
    assert {entry["status"] for name, entry in entries.items() if name != "report.txt"} == {"present"}


def _last_idle(orchestrator: Orchestrator, task_id: str) -> dict | None:
    for event in orchestrator.worker_events:
        if event["type"] == "STATUS" and event["status"] == "IDLE" and event["payload"].get("last_task") == task_id:
            return event
    return None


def test_results_over_http(orchestrator: Orchestrator, make_node) -> None:
    make_node(env={"ORCHESTRATOR_TOKEN": "s3cret"})
    with Server() as server:
        destination = {"type": "http", "url": f"{server.url}/api/v1/results", "headers": {"X-Team": "blue"}}
        spec = {"taskType": "echo", "output": {"destination": destination}}
        task_id = orchestrator.dispatch("w1", spec)
        end = orchestrator.wait_end(task_id)
        assert end["type"] == "TASK_SUCCEEDED", end
        (request,) = server.received
        assert (request.method, request.path) == ("POST", "/api/v1/results")
        assert request.headers["x-team"] == "blue"
        assert "authorization" not in request.headers  # the token is sent to the orchestrator's address only
        body = json.loads(request.body)
        assert set(body) == {"task_id", "result", "worker_id"}
        assert body["task_id"] == task_id
        assert body["result"]["echo"] == spec


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"taskType": "ecko"}, ["spec.taskType", "ecko", "echo"]),
        ({}, ["taskType"]),
        ({"taskType": "echo", "timeoutSec": "soon"}, ["spec.timeoutSec", "soon"]),
        ({"taskType": "echo", "output": {"destination": {"type": "http"}}}, ["spec.output.destination.url"]),
        ({"taskType": "echo", "env": {"REDIS_URL": "x"}}, ["spec.env.REDIS_URL", "tasks.allow_env"]),
        ({"taskType": "echo", "delaySec": -1}, ["spec.delaySec", "-1"]),
    ],
)
def test_bad_requests_say_what_is_wrong(orchestrator: Orchestrator, node: Node, spec: dict, words: list[str]) -> None:
    end = orchestrator.run("w1", spec)
    assert end["type"] == "TASK_FAILED"
    assert end["payload"]["error_kind"] == "bad_request"
    assert end["payload"]["retryable"] is False
    assert "\n" not in end["error"]
    for word in words:
        assert word in end["error"]
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"


def test_malformed_messages_disturb_nobody(orchestrator: Orchestrator, node: Node) -> None:
    publish = orchestrator.redis.publish
    publish("tasks", b"w1 not json")
    publish("tasks", b'["w1"]')
    publish("tasks", b'{"assigned_worker": "w1"}')
    publish("tasks", b'{"assigned_worker": "w1", "task_id": "../../etc", "task": {}}')
    publish("tasks", b'{"assigned_worker": "w1", "task_id": ["x"], "task": {}}')
    publish("tasks", b"\xff\xfe w1")
    publish("tasks", b'{"assigned_worker":"w1","task_id":"deep","task":' + b"[" * 100_000)
    publish("tasks", json.dumps({"assigned_worker": "w1", "task_id": "no-task"}))
    publish("tasks", json.dumps({"assigned_worker": "w1", "task_id": "no-object", "task": "echo"}))
    # By default Redis disconnects a subscriber at 32 MB of output; a deployment may raise that.
    orchestrator.redis.config_set("client-output-buffer-limit", "pubsub 0 0 0")
    huge = {"assigned_worker": "w1", "task_id": "huge", "task": {"spec": {"taskType": "echo", "x": "y" * 50_000_000}}}
    publish("tasks", json.dumps(huge))
    for task_id, word in (("deep", "too deep"), ("no-task", "task"), ("no-object", "task"), ("huge", "bytes")):
        end = orchestrator.wait_end(task_id)
        assert end["type"] == "TASK_FAILED"
        assert word in end["error"]
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
    assert node.ask(op="status")["malformed"] == 6
    lines = [line for line in node.text().splitlines() if "malformed" in line or "invalid task_id" in line]
    assert len(lines) == 6
    assert max(map(len, lines)) < 400


def test_messages_for_others_are_left_alone(orchestrator: Orchestrator, node: Node) -> None:
    other = orchestrator.dispatch("w2", {"taskType": "echo", "note": "w1 is not meant"})
    mine = orchestrator.run("w1", {"taskType": "echo"})
    assert mine["type"] == "TASK_SUCCEEDED"
    assert orchestrator.of_task(other) == []


def test_the_orchestrators_own_fields_stay(orchestrator: Orchestrator, node: Node) -> None:
    orchestrator.redis.hset("worker:w1", mapping={"cache_models_json": "[1]", "cache_updated_ts": "5"})
    orchestrator.run("w1", {"taskType": "echo"})
    orchestrator.worker_events.clear()
    orchestrator.wait_worker_event("HEARTBEAT")
    assert orchestrator.redis.hmget("worker:w1", "cache_models_json", "cache_updated_ts") == [b"[1]", b"5"]


def test_registers_again_when_its_keys_vanish(orchestrator: Orchestrator, node: Node) -> None:
    orchestrator.wait_worker_event("REGISTER")
    orchestrator.worker_events.clear()
    orchestrator.redis.flushdb()
    orchestrator.wait_worker_event("REGISTER", worker_id="w1")
    node.wait_status("IDLE")
    assert orchestrator.redis.ttl("worker:w1:hb") > 0
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"


def test_farewell(orchestrator: Orchestrator, node: Node) -> None:
    assert node.stop(signal.SIGTERM) == 0
    farewell = orchestrator.wait_worker_event("UNREGISTER", worker_id="w1")
    assert set(farewell["payload"]) == {"cost_per_hour", "uptime_sec", "accrued_cost_usd", "power_summary"}
    assert orchestrator.redis.keys("worker*") == []


def test_the_next_task_may_come_before_the_last_one_is_delivered(orchestrator: Orchestrator, node: Node) -> None:
    """The slot is free once the child is gone; the terminal event is sent after the delivery."""
    with Server(Answer(status=503, headers={"Retry-After": "2"})) as server:
        destination = {"type": "http", "url": f"{server.url}/r"}
        slow = orchestrator.dispatch("w1", {"taskType": "echo", "output": {"destination": destination}})
        orchestrator.wait_started(slow)
        quick = orchestrator.dispatch("w1", {"taskType": "echo"})
        assert orchestrator.wait_end(slow)["type"] == "TASK_SUCCEEDED"  # after the server's Retry-After
        ends = [event for event in orchestrator.task_events if event["type"] != "TASK_STARTED"]
        assert [(event["type"], event["task_id"]) for event in ends] == [
            ("TASK_SUCCEEDED", quick),
            ("TASK_SUCCEEDED", slow),
        ]


def test_many_at_once_wait_in_the_queue(orchestrator: Orchestrator, node: Node) -> None:
    ids = [orchestrator.dispatch("w1", {"taskType": "echo", "n": n}) for n in range(30)]
    ends = [orchestrator.wait_end(task_id) for task_id in ids]
    assert {end["type"] for end in ends} == {"TASK_SUCCEEDED"}
    starts = [event["task_id"] for event in orchestrator.task_events if event["type"] == "TASK_STARTED"]
    assert starts == ids


def test_a_worker_that_was_said_to_run_what_it_refused_is_idle_again(orchestrator: Orchestrator, node: Node) -> None:
    """The orchestrator writes RUNNING when it dispatches, and IDLE only when it receives a TASK_SUCCEEDED.

    RUNNING for a task that has no event, as that of a duplicate, is corrected by the check in test_presence.py.
    """
    orchestrator.redis.hset("worker:w1", "status", "RUNNING")
    assert orchestrator.run("w1", {"taskType": "nope"})["type"] == "TASK_FAILED"
    until(lambda: orchestrator.redis.hget("worker:w1", "status") == b"IDLE", "its status is IDLE again")


def test_what_is_no_message_on_the_control_channel_is_ignored(orchestrator: Orchestrator, node: Node) -> None:
    for data in (b'{"type":"CANCEL","task_id":"\xff"}', b"[" * 100_000, b"7", b"{}", b""):
        orchestrator.redis.publish("flowmesh.control", data)
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
    until(lambda: node.text().count("control message ignored") == 5, "each of them is logged")


def test_duplicates_run_once_and_retries_run_again(orchestrator: Orchestrator, node: Node) -> None:
    fields = {"task_id": "twice", "dispatched_at": "2026-01-01T00:00:00+00:00"}
    orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 0.3}, **fields)
    orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 0.3}, **fields)
    orchestrator.wait_end("twice")
    orchestrator.dispatch("w1", {"taskType": "echo"}, **fields)
    orchestrator.run("w1", {"taskType": "echo"})
    assert len(orchestrator.ends("twice")) == 1
    orchestrator.dispatch("w1", {"taskType": "echo"}, task_id="twice", dispatched_at="2026-01-01T00:00:09+00:00")
    until(lambda: len(orchestrator.ends("twice")) == 2, "the retry ran")


def test_no_secret_reaches_a_task(orchestrator: Orchestrator, make_node, tmp_path: Path) -> None:
    config = '[task_types.env]\nrunner = "tests.kit.runners_for_tests:EnvRunner"\nenvironment = "light"\n'
    make_node(config=config, env={"ORCHESTRATOR_TOKEN": "s3cret-token", "AWS_SECRET_ACCESS_KEY": "hush"})
    end = orchestrator.run("w1", {"taskType": "env"}, task_id="env")
    assert end["type"] == "TASK_SUCCEEDED", end
    seen = json.dumps(json.loads((Path(end_folder(orchestrator)) / "env" / "responses.json").read_text()))
    for secret in ("s3cret-token", "hush", "redis.sock", "REDIS_URL", "ORCHESTRATOR_TOKEN"):
        assert secret not in seen
    assert "FLOWMESH_ATTEMPT" in seen


def end_folder(orchestrator: Orchestrator) -> str:
    return str(json.loads(orchestrator.redis.hget("worker:w1", "env_json"))["RESULTS_DIR"])
