"""What waits in the queue is listed in the order in which claims take it, and a removal leaves what runs alone."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from flowmesh.cli.main import cli, guarded
from flowmesh.client import AsyncClient, Client, WaitingTask
from flowmesh.errors import FieldError
from flowmesh.queue import names, pipeline_scripts, scripts
from flowmesh.queue.classes import class_of
from tests.kit.fake_node import register
from tests.kit.support import RedisServer

pytestmark = pytest.mark.redis
ECHO = {"spec": {"taskType": "echo"}}
CLASS = class_of(ECHO).key


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    started = RedisServer()
    yield started
    started.close()


@pytest.fixture
def raw(server: RedisServer) -> redis.Redis:
    client = server.client()
    client.flushdb()
    for number in (1, 2):
        register(client, f"w{number}", types=["echo"])
    return client


@pytest.fixture
def client(server: RedisServer, raw: redis.Redis) -> Iterator[Client]:
    with Client(server.url) as started:
        yield started


@pytest.fixture
def flowmesh(server: RedisServer, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*words: str) -> tuple[int, str]:
        code = guarded(
            lambda: cli.main(args=[*words, "--redis", server.url], prog_name="flowmesh", standalone_mode=False)
        )
        out, err = capfd.readouterr()
        return code, out + err

    return run


def claim(raw: redis.Redis, left_s: str = "") -> str | None:
    """The task that a worker gets, whose node is there for so long; empty: without an end."""
    answer = raw.execute_command("EVAL", scripts.CLAIM.text, 0, "w1", "w1", "now", "", left_s, "3600", CLASS)
    return answer[1].decode() if answer[0] == b"task" else None


def give_back(raw: redis.Redis, task_id: str) -> None:
    attempt = raw.hget(names.record_key(task_id), "attempt")
    assert raw.execute_command("EVAL", scripts.RELEASE.text, 0, task_id, attempt, "w1", "now", "") == 1


def queue(client: Client, task_id: str, owner: str = "", priority: str = "normal", **options: Any) -> None:
    client.queue({**ECHO, "metadata": {"owner": owner}}, task_id=task_id, priority=priority, anyway=True, **options)


def ids(found: list[WaitingTask]) -> list[str]:
    return [task.task_id for task in found]


@pytest.mark.parametrize("seed", range(3))
def test_the_list_is_the_order_of_the_claims(raw: redis.Redis, client: Client, seed: int) -> None:
    chance = random.Random(seed)
    for number in range(120):
        owner = chance.choice(["", "ann", "ann", "ann", "ann", "ann", "bob", "bo:b", "cy"])
        priority = chance.choice(["high", "normal", "normal", "low"])
        spec = {"taskType": "echo", "timeoutSec": chance.choice([1, 60])}
        client.queue({"metadata": {"owner": owner}, "spec": spec}, task_id=f"t{number}", priority=priority)
        if chance.random() < 0.1:
            left_s = chance.choice(["", "", "10"])  # with an end, it passes over what takes longer
            taken = claim(raw, left_s)
            if taken is not None and left_s:
                assert raw.execute_command("EVAL", scripts.JOURNALLED.text, 0, taken, 1) == 1
            elif taken is not None and chance.random() < 0.7:
                give_back(raw, taken)
    for number in chance.sample(range(120), 10):
        client.remove(f"t{number}")
    listed = client.waiting_tasks(limit=1000)
    assert [task.position for task in listed] == list(range(1, len(listed) + 1))
    assert sum(client.waiting()[0]["waiting"].values()) == len(listed) > 80
    for owner in ("", "ann", "bo:b", "cy"):
        assert client.waiting_tasks(owner=owner, limit=1000) == [task for task in listed if task.owner == owner]
    for limit in (1, 7, 50):
        assert client.waiting_tasks(limit=limit) == listed[:limit]
        assert (
            client.waiting_tasks(owner="ann", limit=limit) == [each for each in listed if each.owner == "ann"][:limit]
        )
    claimed = []
    while (taken := claim(raw)) is not None:
        claimed.append(taken)
    assert ids(listed) == claimed


def test_what_is_known_of_a_waiting_task(raw: redis.Redis, client: Client) -> None:
    queue(client, "back", "ann", retries=4)
    assert claim(raw) == "back"
    give_back(raw, "back")
    client.queue({"spec": {"taskType": "sft", "resources": {"tags": ["x"]}}}, task_id="other", anyway=True)
    stages = {"spec": {"stages": [{"name": "one", "spec": {"taskType": "echo"}}]}}
    client.queue(stages, task_id="p", anyway=True)
    queue(client, "p.one", "cy")
    raw.hset(names.record_key("p.one"), "pipeline", "p")
    other, back, stage, pipeline = client.waiting_tasks()
    assert (back.position, back.came_back, back.attempts, back.failures, back.retries) == (1, True, 1, 0, 4)
    assert (back.task_type, back.owner, back.priority, back.requires) == (
        "echo",
        "ann",
        "normal",
        {"task_type": "echo"},
    )
    assert (stage.task_id, stage.position, stage.pipeline, stage.stage) == ("p.one", 2, "p", "one")
    assert (other.position, other.requires["tags"]) == (1, ("x",))
    assert (pipeline.task_id, pipeline.position, pipeline.class_key, pipeline.task_type) == ("p", 1, "", "pipeline")
    assert ids(client.waiting_tasks(task_class="sft")) == ids(client.waiting_tasks(task_class=other.class_key[:6]))
    assert ids(client.waiting_tasks(task_class="pipeline")) == ["p"]
    assert client.waiting_tasks(task_class=other.class_key[:2]) == []
    assert client.waiting_tasks(owner="nobody") == []
    for limit in (0, 1001, "1"):
        with pytest.raises(FieldError, match="limit"):
            client.waiting_tasks(limit=limit)  # type: ignore[arg-type]
    assert client.remove("p").removed
    assert raw.execute_command("EVAL", pipeline_scripts.DRIVE.text, 0, "n", "now", 1000) == []


def test_a_removal_ends_a_task_once_or_leaves_it_alone(server: RedisServer, raw: redis.Redis, client: Client) -> None:
    """Claims and removals race for the same tasks: each goes to one of both."""
    for number in range(60):
        queue(client, f"t{number}", f"o{number % 3}")
    claimed: list[str] = []

    def worker() -> None:
        with server.client() as own:
            while (taken := claim(own)) is not None:
                claimed.append(taken)

    with raw.pubsub() as events:
        events.subscribe("tasks.events", names.CONTROL_CHANNEL)
        thread = threading.Thread(target=worker)
        thread.start()
        removals = [client.remove(f"t{number}", "not needed") for number in reversed(range(60))]
        thread.join()
        heard = [
            json.loads(each["data"])
            for each in iter(lambda: events.get_message(timeout=0.2), None)
            if each["type"] == "message"
        ]
    removed = [each.task_id for each in removals if each.removed]
    assert sorted(removed + claimed) == sorted(f"t{number}" for number in range(60))
    assert {(each.state, each.worker_id) for each in removals if not each.removed} <= {("claimed", "w1")}
    assert [event["task_id"] for event in heard] == removed  # one end each, and no cancel of anything
    assert client.waiting() == client.waiting_tasks() == []
    if removed:
        assert client.wait(removed[0], 1).error == "not needed"
    assert (client.remove("t59").state, client.remove("unheard-of").state) in {
        ("done", "unknown"),
        ("claimed", "unknown"),
    }
    with pytest.raises(FieldError):
        client.remove("../x")


def test_the_async_client_lists_and_removes(server: RedisServer, client: Client) -> None:
    async def story() -> None:
        async with AsyncClient(server.url) as other:
            queue(client, "t", "ann")
            queue(client, "u", "bob")
            assert ids(await other.waiting_tasks(owner="bob")) == ["u"]
            assert (await other.remove("u")).removed
            assert (await other.remove("u")).state == "done"
            assert ids(await other.waiting_tasks()) == ["t"]

    asyncio.run(story())


def test_the_commands(raw: redis.Redis, client: Client, flowmesh: Callable[..., tuple[int, str]]) -> None:
    assert flowmesh("queue", "list") == (0, "no task waits in the queue\n")
    queue(client, "runs")
    assert claim(raw) == "runs"
    for number in range(3):
        queue(client, f"t{number}", "a\x1b[31mnn", "low")
    raw.hset(names.record_key("t0"), "type", "ec\x1b]0;x\x07ho\n")
    code, out = flowmesh("queue", "list", "--limit", "2")
    assert code == 0
    header, *rows, more = out.splitlines()
    assert header.split() == ["POS", "TASK", "TYPE", "OWNER", "PRIORITY", "AGE", "TRIES", "NODES", "PIPELINE", "CLASS"]
    assert [row.split()[:5] for row in rows] == [
        ["1", "t0", "echo", "ann", "low"],
        ["2", "t1", "echo", "ann", "low"],
    ]
    assert more == "more tasks wait; these are the first 2 (--limit)"
    assert "\x1b" not in out
    code, out = flowmesh("queue", "--json", "list", "--class", CLASS[:8])
    assert (code, "\x1b" in out) == (0, False)
    listed = json.loads(out)
    assert (listed["more"], [task["task_id"] for task in listed["waiting"]]) == (False, ["t0", "t1", "t2"])
    assert listed["waiting"][1]["owner"] == "a\x1b[31mnn"
    assert flowmesh("queue", "list", "--owner", "cy") == (0, "no such task waits in the queue\n")
    assert flowmesh("queue", "remove", "t1") == (0, "removed t1\n")
    code, out = flowmesh("queue", "remove", "t0", "runs", "t1", "what", "--reason", "over")
    assert (code, out.splitlines()) == (
        1,
        [
            "removed t0",
            "runs starts on w1; not removed. `flowmesh cancel runs` stops it",
            "t1 has ended already; not removed",
            "what: no record of this task; not removed",
        ],
    )
    assert client.wait("t0", 1).error == "over"
    raw.hset(names.record_key("runs"), "state", "running")
    code, out = flowmesh("queue", "remove", "runs", "--json")
    assert (code, json.loads(out)["tasks"]) == (
        1,
        [{"task_id": "runs", "removed": False, "state": "running", "worker_id": "w1"}],
    )
    assert json.loads(flowmesh("queue", "--json")[1])["waiting"][0]["class"] == CLASS
