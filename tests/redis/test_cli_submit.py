"""`flowmesh submit` and `flowmesh workers` against a real Redis, with plain redis-py as the other side."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from flowmesh.cli.embedded import EmbeddedRedis
from flowmesh.client import Client
from tests.kit.fake_node import HARDWARE, finish, register

pytestmark = pytest.mark.redis
GIB = 2**30


@pytest.fixture(scope="module")
def server():
    with EmbeddedRedis() as running:
        yield running


@pytest.fixture
def client(server):
    with redis.Redis.from_url(server.url, decode_responses=True) as found:
        found.flushall()
        yield found


@pytest.fixture
def tasks(client):
    """A subscription to `tasks`."""
    with client.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe("tasks")
        assert channel.get_message(timeout=5) is None
        yield channel


@pytest.fixture
def flowmesh(server, tmp_path):
    """Starts the command in a folder with a task.yaml."""
    (tmp_path / "task.yaml").write_text("spec: {taskType: echo, resources: {hardware: {cpu: 2, memory: 1Gi}}}\n")
    started = []

    def start(*arguments, **env):
        clean = {name: value for name, value in os.environ.items() if name not in ("REDIS_URL", "TASK_TOPIC")}
        process = subprocess.Popen(
            [sys.executable, "-m", "flowmesh.cli.main", *arguments],
            cwd=tmp_path,
            env={**clean, "PYTHONPATH": str(Path.cwd()), "REDIS_URL": server.url, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def done(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def received(channel, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while (message := channel.get_message(timeout=1)) is None:
        assert time.monotonic() < deadline, "nothing was published"
    return json.loads(message["data"])


def gpus(*sizes, name="NVIDIA H100"):
    found = [
        {"index": n, "name": name, "uuid": f"GPU-{n}", "memory_total_bytes": size * GIB} for n, size in enumerate(sizes)
    ]
    return {**HARDWARE, "gpu": {"driver_version": "1", "cuda_version": "13", "gpus": found}}


def test_dispatches_to_the_idle_worker_and_writes_a_record_only(flowmesh, client, tasks):
    register(client, "busy", status="RUNNING", extra_task_id="t0")
    register(client, "free", types=["echo", "inference"])
    before = {key: client.dump(key) for key in client.keys("*")}
    code, out, err = done(flowmesh("submit", "task.yaml"))
    assert (code, err) == (0, "")
    message = received(tasks)
    assert out == f"{message['task_id']}  echo  on free\n"
    assert message["assigned_worker"] == "free"
    assert message["task_type"] == "echo"
    assert message["parent_task_id"] is None
    assert message["dispatched_at"].endswith("+00:00")
    assert message["task"]["spec"]["taskType"] == "echo"
    after = {key: client.dump(key) for key in client.keys("*")}
    own = {f"flowmesh:task:{message['task_id']}", "flowmesh:tasks:open"}
    assert {key: value for key, value in after.items() if key not in own} == before
    assert own <= after.keys()
    assert message["record"] == {"attempt": 1}


def test_the_cheapest_that_fits(flowmesh, client, tasks):
    register(client, "a-dear", cost="9.0")
    register(client, "b-small", cost="0.1", hardware={**HARDWARE, "memory": {"total_bytes": 1}})
    register(client, "c-gpus", cost="2.0", hardware=gpus(80))
    register(client, "d-fine", cost="2.0")
    code, out, _ = done(flowmesh("submit", "task.yaml", "--json", "--task-id", "mine"))
    assert code == 0
    assert json.loads(out) == {"task_id": "mine", "worker_id": "d-fine"}
    assert received(tasks)["task_id"] == "mine"


def test_says_for_each_worker_why_not(flowmesh, client, tasks, tmp_path):
    (tmp_path / "big.yaml").write_text(
        "spec: {taskType: inference, model: {source: {identifier: a}}, data: {type: list, items: [a]}, "
        "resources: {hardware: {cpu: '4', memory: 4Gi, gpu: {type: H100, memory: 40Gi}}}}"
    )
    register(client, "busy", status="RUNNING", extra_task_id="t0", hardware=gpus(80))
    register(client, "cpu-only")
    register(client, "dead", ttl=None, hardware=gpus(80))
    register(client, "immortal", ttl=0, hardware=gpus(80))
    register(client, "off", hardware=gpus(80))
    register(client, "other", hardware=gpus(80), types=["echo"])
    register(client, "small", hardware=gpus(16))
    register(client, "strange", hardware=["?"])
    client.sadd("workers:elastic_disabled", "off")
    code, out, err = done(flowmesh("submit", "big.yaml"))
    assert code == 75
    assert err == "flowmesh: none of the 8 workers can run this task now\n"
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert lines["busy"] == "is RUNNING (t0)"
    assert lines["cpu-only"] == "no GPU, needs 1"
    assert lines["dead"].startswith("stale: no heartbeat")
    assert lines["immortal"].startswith("stale: no heartbeat")
    assert lines["off"] == "disabled by the orchestrator's elastic scaling"
    assert lines["other"] == "does not offer inference (offers echo)"
    assert lines["small"] == "no GPU with 40 GiB, needs 1 (the largest has 16 GiB)"
    assert lines["strange"] == "reports no valid hardware description"
    code, out, _ = done(flowmesh("submit", "big.yaml", "--json"))
    workers = json.loads(out)["workers"]
    for name in ("dead", "immortal"):  # the text contains the seconds since, which may differ by one
        assert workers.pop(name).startswith("stale: no heartbeat")
        del lines[name]
    assert (code, workers) == (75, lines)
    assert tasks.get_message(timeout=0.1) is None


def test_a_worker_by_name(flowmesh, client, tasks):
    register(client, "a", cost="0.1")
    register(client, "b", cost="5")
    assert done(flowmesh("submit", "task.yaml", "--worker", "b"))[0] == 0
    assert received(tasks)["assigned_worker"] == "b"
    client.hset("worker:b", "status", "DRAINING")
    code, out, err = done(flowmesh("submit", "task.yaml", "--worker", "b"))
    assert (code, out, err) == (75, "b: is DRAINING\n", "flowmesh: the worker cannot run this task now\n")
    code, _, err = done(flowmesh("submit", "task.yaml", "--worker", "nobody"))
    assert (code, err) == (78, "flowmesh: --worker: 'nobody' is not registered; registered: a, b\n")


def test_no_worker_and_no_listener(flowmesh, client):
    code, _, err = done(flowmesh("submit", "task.yaml"))
    assert (code, err) == (75, "flowmesh: no worker is registered in this Redis: start a node, or check --redis\n")
    register(client, "deaf")
    code, _, err = done(flowmesh("submit", "task.yaml"))
    assert code == 69
    assert err.startswith("flowmesh: no subscriber on the channel 'tasks': check that the node of deaf is connected")


def test_the_topic_is_a_setting(flowmesh, client):
    register(client, "w")
    with client.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe("other")
        channel.get_message(timeout=5)
        assert done(flowmesh("submit", "task.yaml", TASK_TOPIC="other"))[0] == 0
        assert received(channel)["assigned_worker"] == "w"


def test_redis_from_a_flag_the_environment_or_a_file(flowmesh, client, tasks, server, tmp_path):
    register(client, "w")
    (tmp_path / "node.toml").write_text(f'[redis]\nurl = "{server.url}"\n')
    wrong = "redis://:secret@127.0.0.1:1/0"
    assert done(flowmesh("submit", "task.yaml", "--redis", server.url, REDIS_URL=wrong))[0] == 0
    assert done(flowmesh("submit", "task.yaml", "--config", "node.toml", REDIS_URL=""))[0] == 0
    code, out, err = done(flowmesh("submit", "task.yaml", "--config", "node.toml", REDIS_URL=wrong))
    assert (code, out) == (69, "")
    assert err.startswith("flowmesh: Redis at redis://")
    assert "does not answer" in err
    assert "secret" not in err
    assert err.count("\n") == 1
    code, _, err = done(flowmesh("submit", "task.yaml", REDIS_URL=""))
    assert code == 78
    assert "no Redis address" in err


def test_wait_for_success(flowmesh, client, tasks):
    register(client, "w")
    process = flowmesh("submit", "task.yaml", "--wait")
    task_id = received(tasks)["task_id"]
    finish(client, "w", "another-task", error="not ours")
    client.publish("tasks.events", "not json")
    client.publish("tasks.events", json.dumps({"type": "TASK_STARTED", "task_id": task_id, "worker_id": "w"}))
    finish(client, "w", task_id)
    code, out, err = done(process)
    assert (code, err) == (0, "")
    assert out.splitlines()[1:] == ["  started", f"succeeded in 0.50 s: results are in RESULTS_DIR/{task_id} on w"]


def test_wait_for_failure(flowmesh, client, tasks):
    register(client, "w")
    process = flowmesh("submit", "task.yaml", "--wait", "--json")
    task_id = received(tasks)["task_id"]
    finish(client, "w", task_id, error="out of\nmemory", error_kind="gpu_oom", retryable=True)
    code, out, err = done(process)
    assert (code, err) == (1, f"flowmesh: {task_id} failed (gpu_oom): out of memory\n")
    said = json.loads(out)
    assert (said["ok"], said["task_id"], said["worker_id"]) == (False, task_id, "w")
    assert said["payload"]["retryable"] is True


def test_wait_tells_of_a_worker_that_dies(flowmesh, client, tasks):
    register(client, "w")
    process = flowmesh("submit", "task.yaml", "--wait")
    received(tasks)
    client.delete("worker:w:hb")
    code, _, err = done(process)
    assert code == 69
    assert "w is gone (no heartbeat)" in err


def test_wait_tells_of_a_worker_that_leaves(flowmesh, client, tasks):
    register(client, "w")
    process = flowmesh("submit", "task.yaml", "--wait")
    task_id = received(tasks)["task_id"]
    client.publish("workers.events", json.dumps({"type": "UNREGISTER", "worker_id": "another"}))
    client.publish("workers.events", json.dumps({"type": "UNREGISTER", "worker_id": "w"}))
    code, _, err = done(process)
    assert (code, err) == (69, f"flowmesh: w left the deployment before {task_id} ended\n")


def test_wait_has_a_limit(flowmesh, client, tasks):
    register(client, "w")
    code, _, err = done(flowmesh("submit", "task.yaml", "--wait", "--timeout", "0.3"))
    assert code == 75
    assert "has not ended after 0.3 s" in err
    code, _, err = done(flowmesh("submit", "task.yaml", "--timeout", "1"))
    assert code == 2


def test_ctrl_c_ends_the_wait_and_says_that_the_task_continues(flowmesh, client, server, tasks):
    register(client, "w")
    process = flowmesh("submit", "task.yaml", "--wait", "--task-id", "one")
    received(tasks)
    client.publish("tasks.events", json.dumps({"type": "TASK_STARTED", "task_id": "one", "worker_id": "w"}))
    while process.stdout.readline() != "  started\n":
        pass
    process.send_signal(signal.SIGINT)
    code, _, err = done(process)
    how = "`flowmesh wait one` waits again, `flowmesh cancel one` ends it"
    assert (code, err) == (130, f"flowmesh: interrupted; one continues: {how}\n")
    finish(client, "w", "one")
    assert done(flowmesh("submit", "task.yaml", "--queue", "--anyway", "--task-id", "two"))[0] == 0
    assert done(flowmesh("submit", "task.yaml", "--queue", "--anyway", "--task-id", "three"))[0] == 0
    with Client(server.url) as remover:
        assert remover.remove("two").removed
    process = flowmesh("wait", "two", "three")
    assert "two failed" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    code, _, err = done(process)
    assert code == 130
    assert "interrupted; three continues: `flowmesh wait three`" in err


def test_wait_outlives_redis(tmp_path, flowmesh):
    """Redis is restarted during the wait, and a later event still arrives."""
    folder = tmp_path / "r"
    folder.mkdir()
    first = EmbeddedRedis(folder)
    first.start()
    client = redis.Redis.from_url(first.url)
    register(client, "w")
    with client.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe("tasks")
        channel.get_message(timeout=5)
        process = flowmesh("submit", "task.yaml", "--wait", REDIS_URL=first.url)
        task_id = received(channel)["task_id"]
    client.close()
    first.close()
    try:
        while "does not answer" not in (line := process.stdout.readline()):
            assert line, "it did not report the lost connection"
    finally:
        second = EmbeddedRedis(folder)
        second.start()
    try:
        client = redis.Redis.from_url(second.url)
        register(client, "w")
        until = time.monotonic() + 30
        while client.pubsub_numsub("tasks.events")[0][1] == 0:
            assert time.monotonic() < until, "it did not reconnect"
            time.sleep(0.02)
        finish(client, "w", task_id)
        code, out, err = done(process)
        client.close()
    finally:
        second.close()
    assert (code, err) == (0, "")
    assert "succeeded" in out


def test_an_event_that_went_past_is_not_waited_for(flowmesh, client, tasks):
    register(client, "w")
    process = flowmesh("submit", "task.yaml", "--wait")
    client.hset("worker:w", "extra_last_task", received(tasks)["task_id"])
    code, _, err = done(process)
    assert code == 69
    assert "its event was lost" in err


def test_the_table(flowmesh, client):
    assert done(flowmesh("workers")) == (0, "no worker is registered in this Redis\n", "")
    register(client, "gpu-1", hardware=gpus(80, 80), tags=["fast", "eu"], status="RUNNING", extra_task_id="t1")
    register(client, "old", ttl=None, cost="0.25", status="STARTING")
    register(client, "idle", extra_task_id="t0")
    client.sadd("workers:elastic_disabled", "idle")
    client.sadd("workers:ids", "half")
    code, out, _ = done(flowmesh("workers"))
    assert code == 0
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in out.splitlines()]
    assert rows[0] == ["WORKER", "STATUS", "TASK", "GPUS", "MEMORY", "TAGS", "SEEN", "COST/H"]
    assert rows[1][:6] == ["gpu-1", "RUNNING", "t1", "2x H100 80G", "8.0G", "fast,eu"]
    assert rows[1][6].endswith(" ago")
    assert rows[2] == ["half", "stale (?)", "-", "none", "-", "-", "never", "-"]
    assert rows[3][:4] == ["idle", "IDLE (disabled)", "-", "none"]
    assert (rows[4][1], rows[4][7]) == ("stale (STARTING)", "0.25")


def test_as_json(flowmesh, client):
    register(client, "w", hardware=gpus(80), types=["echo"], tags=["a"])
    code, out, _ = done(flowmesh("workers", "--json"))
    assert code == 0
    [worker] = json.loads(out)["workers"]
    assert (worker["worker_id"], worker["status"], worker["alive"], worker["disabled"]) == ("w", "IDLE", True, False)
    assert (worker["task_types"], worker["tags"], worker["cost_per_hour"]) == (["echo"], ["a"], 1.0)
    assert worker["hardware"]["gpu"]["gpus"][0]["memory_total_bytes"] == 80 * GIB


def test_a_peer_that_writes_nonsense_is_still_listed(flowmesh, client):
    client.sadd("workers:ids", "odd")
    client.hset(
        "worker:odd",
        mapping={
            "status": "\x1b[31mEVIL",
            "hardware_json": "{",
            "tags_json": "7",
            "last_seen": "?",
            "cost_per_hour": "x",
        },
    )
    code, out, _ = done(flowmesh("workers"))
    assert code == 0
    assert "odd" in out
    assert "\x1b" not in out
