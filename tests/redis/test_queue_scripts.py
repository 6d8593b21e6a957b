"""The queue's scripts on a real Redis: order, fairness, the fence, what comes back, and one end for each task."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from flowmesh.client import AsyncClient, Client, NeverFits, NoResult, TaskExists, UnknownTask, WorkerGone
from flowmesh.queue import names, scripts
from flowmesh.queue.classes import class_of
from flowmesh.queue.lua import Script
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


def run(raw: redis.Redis, script: Script, *arguments: Any) -> Any:
    return raw.execute_command("EVAL", script.text, 0, *arguments)


def claim(raw: redis.Redis, worker: str = "w1") -> tuple[str, int] | None:
    """The task that a worker gets, and the number of the attempt. Its node's id is the worker's."""
    answer = run(raw, scripts.CLAIM, worker, worker, "now", "", "", "", CLASS)
    return (answer[1].decode(), answer[2]) if answer[0] == b"task" else None


def report(raw: redis.Redis, task: str, attempt: int, worker: str, kind: str = "ok", *, avoid_ms: int = 0) -> str:
    """Report an attempt's end."""
    ok = kind == "ok"
    what = "TASK_SUCCEEDED" if ok else "TASK_FAILED"
    payload = {} if ok else {"error_kind": kind, "retryable": kind != "error"}
    event = json.dumps({"type": what, "task_id": task, "worker_id": worker, "payload": payload})
    evidence = json.dumps({"attempt": attempt, "worker_id": worker, "error_kind": kind})
    result = json.dumps({"from": worker})
    answer = run(
        raw, scripts.REPORT, task, attempt, worker, worker, "end", event, "now",
        int(ok), kind, int(kind != "error"), "" if ok else "why", evidence, result, 60, avoid_ms, 0,
    )  # fmt: skip
    return str(answer.decode())


def leftovers(raw: redis.Redis) -> set[str]:
    """Keys of the queue that may not outlive the tasks."""
    kept = (
        names.CLASSES,
        "flowmesh:queue:turn",
        "flowmesh:task:",
        "flowmesh:attempts:",
        "flowmesh:result:",
        names.DONE,
    )
    return {key.decode() for key in raw.keys("flowmesh:*") if not key.decode().startswith(kept)}


def test_priority_then_owners_in_turn_then_age(raw: redis.Redis, client: Client) -> None:
    for owner in ("ann", "ann", "ann", "bob", "bob"):
        client.queue({**ECHO, "metadata": {"owner": owner}}, task_id=f"{owner}-{uuid.uuid4().hex}", priority="normal")
    client.queue(ECHO, task_id="late-but-high", priority="high")
    client.queue(ECHO, task_id="early-but-low", priority="low")
    got = [claim(raw) for _ in range(7)]
    assert [task.split("-")[0] for task, _ in filter(None, got)] == ["late", "ann", "bob", "ann", "bob", "ann", "early"]
    assert claim(raw) is None
    for task, attempt in filter(None, got):
        assert run(raw, scripts.JOURNALLED, task, attempt) == 1
        assert report(raw, task, attempt, "w1") == "published"
    assert claim(raw) is None
    assert leftovers(raw) == set()


def test_a_look_finds_what_a_claim_would_get_and_changes_nothing(raw: redis.Redis, client: Client) -> None:
    for owner in ("ann", "ann", "bob"):
        client.queue({**ECHO, "metadata": {"owner": owner}}, task_id=f"{owner}-{uuid.uuid4().hex}")
    client.queue(ECHO, task_id="low", priority="low")
    client.queue(ECHO, task_id="failed", priority="high")
    assert claim(raw, "w2") == ("failed", 1)
    assert report(raw, "failed", 1, "w2", "crash", avoid_ms=60_000) == "requeued"

    def look(worker: str = "w1", known: str = "") -> list[bytes]:
        before = {key: raw.dump(key) for key in raw.keys("flowmesh:*")}
        answer: list[bytes] = run(raw, scripts.PEEK, worker, known, CLASS)
        assert {key: raw.dump(key) for key in raw.keys("flowmesh:*")} == before
        return answer

    assert look("w2")[0].startswith(b"ann"), "not the one that failed on that node"
    for _ in range(5):
        task, document = look()
        got = claim(raw)
        assert got is not None
        assert got[0] == task.decode()
        assert json.loads(document)["spec"] == ECHO["spec"]
    assert look() == []
    client.queue(ECHO, task_id="known")
    assert look(known="known") == [b"known", b""]


def test_who_may_not_claim(raw: redis.Redis, client: Client) -> None:
    client.queue(ECHO)
    raw.sadd("workers:elastic_disabled", "w1")
    assert claim(raw, "w1") is None
    raw.delete("worker:w2:hb")
    assert claim(raw, "w2") is None
    raw.srem("workers:elastic_disabled", "w1")
    assert claim(raw, "w1") is not None


def test_a_failure_is_retried_elsewhere_and_bounded(raw: redis.Redis, client: Client) -> None:
    client.queue(ECHO, task_id="t", retries=1)
    client.queue(ECHO, task_id="later")
    assert claim(raw, "w1") == ("t", 1)
    assert report(raw, "t", 1, "w1", "crash", avoid_ms=60_000) == "requeued"
    assert report(raw, "t", 1, "w1", "crash", avoid_ms=60_000) == "again"  # a report that was sent twice
    assert claim(raw, "w1") == ("later", 1)  # not the one that failed here
    assert claim(raw, "w1") is None
    assert claim(raw, "w2") == ("t", 2)
    assert report(raw, "t", 2, "w2", "crash") == "published"
    end = client.wait("t", 1)
    assert (end.verdict, end.attempts, end.retryable) == ("crash", 2, True)
    assert [(each.worker_id, each.error_kind) for each in client.attempts("t")] == [("w1", "crash"), ("w2", "crash")]


def test_what_came_back_goes_first(raw: redis.Redis, client: Client) -> None:
    for number in range(3):
        client.queue(ECHO, task_id=f"t{number}")
    assert claim(raw, "w1") == ("t0", 1)
    assert run(raw, scripts.RELEASE, "t0", 1, "w1", "now", "") == 1
    assert claim(raw, "w2") == ("t0", 2)
    state = client.state("t0")
    assert state is not None
    assert state.failures == 0
    assert report(raw, "t0", 2, "w2", "drained") == "requeued"  # a drain is nobody's failure
    assert claim(raw, "w1") == ("t0", 3)


def test_one_end_though_a_lost_node_comes_back(raw: redis.Redis, client: Client) -> None:
    client.queue(ECHO, task_id="t")
    assert claim(raw, "w1") == ("t", 1)
    assert run(raw, scripts.TAKE_BACK, "w1", 0, "now") == 0, "it lives"
    raw.delete("worker:w1:hb")
    assert run(raw, scripts.TAKE_BACK, "w1", 60_000, "now") == 0, "not gone for long"
    assert run(raw, scripts.TAKE_BACK, "w1", 0, "now") == 1
    assert claim(raw, "w2") == ("t", 2)
    assert run(raw, scripts.JOURNALLED, "t", 1) == 0
    with raw.pubsub() as events:
        events.subscribe("tasks.events")
        events.get_message(timeout=5)
        assert report(raw, "t", 1, "w1") == "stale"
        assert events.get_message(timeout=0.1) is None
        assert report(raw, "t", 2, "w2") == "published"
        assert report(raw, "t", 2, "w2") == "again"
        heard = [events.get_message(timeout=0.1) for _ in range(2)]
    assert [message and json.loads(message["data"])["worker_id"] for message in heard] == ["w2", None]
    assert client.result("t") == {"from": "w2"}
    assert leftovers(raw) == set()


def test_a_node_killer_ends(raw: redis.Redis, client: Client) -> None:
    client.queue(ECHO, task_id="t", retries=1)
    for attempt in (1, 2):
        assert claim(raw, "w1") == ("t", attempt)
        raw.delete("worker:w1:hb")
        assert run(raw, scripts.TAKE_BACK, "w1", 0, "now") == 1
        register(raw, "w1", types=["echo"])
    end = client.wait("t", 1)
    assert (end.verdict, end.worker_id) == ("supervisor_lost", "w1")
    assert "its heartbeat ended" in end.error
    assert leftovers(raw) == set()


def test_cancelled_in_the_queue_and_before_it_comes_back(raw: redis.Redis, client: Client) -> None:
    client.queue(ECHO, task_id="waits")
    assert client.cancel("waits", reason="no need") == "queued"
    end = client.wait("waits", 1)
    assert (end.verdict, end.error, end.retryable) == ("cancelled", "no need", False)
    assert claim(raw) is None
    client.queue(ECHO, task_id="runs")
    assert claim(raw) == ("runs", 1)
    assert client.cancel("runs") == "claimed"
    assert report(raw, "runs", 1, "w1", "crash") == "published", "no other attempt follows"
    assert client.cancel("runs") == "done"
    assert client.cancel("never-heard-of") == "unknown"
    assert leftovers(raw) == set()


def test_after_the_database_was_emptied_a_report_still_ends_the_task(raw: redis.Redis, client: Client) -> None:
    client.queue(ECHO, task_id="t")
    assert claim(raw) == ("t", 1)
    raw.flushdb()
    register(raw, "w1", types=["echo"])
    assert report(raw, "t", 1, "w1", "crash") == "published"
    assert client.wait("t", 1).verdict == "crash"


def test_one_token_wakes_one_after_another(raw: redis.Redis, client: Client) -> None:
    for number in range(3):
        client.queue(ECHO, task_id=f"t{number}")
    key = names.wake_key(CLASS)
    for left in (1, 1, 0):
        assert raw.llen(key) == 1
        raw.lpop(key)
        answer = run(raw, scripts.CLAIM, "w1", "w1", "now", CLASS, "", "", CLASS)
        assert answer[0] == b"task"
        assert raw.llen(key) == left


def test_a_worker_that_may_not_claim_passes_the_token_on(raw: redis.Redis, client: Client) -> None:
    client.queue(ECHO)
    key = names.wake_key(CLASS)
    for forbid, allow in (
        (lambda: raw.delete("worker:w1:hb"), lambda: register(raw, "w1", types=["echo"])),
        (lambda: raw.sadd("workers:elastic_disabled", "w1"), lambda: raw.srem("workers:elastic_disabled", "w1")),
    ):
        forbid()
        raw.delete(key)
        assert run(raw, scripts.CLAIM, "w1", "w1", "now", CLASS, "", "", CLASS)[0] in (b"unregistered", b"disabled")
        assert raw.llen(key) == 1
        allow()


def test_classes_without_entries_leave_after_a_day(raw: redis.Redis, client: Client) -> None:
    tagged = [{"spec": {"taskType": "echo", "resources": {"tags": [tag]}}} for tag in "abc"]
    for document in tagged[:2]:
        client.queue(document, task_id=f"t-{class_of(document).key}", anyway=True)
    client.cancel(f"t-{class_of(tagged[0]).key}")
    for member in raw.zrange(names.CLASSES, 0, -1):
        raw.zincrby(names.CLASSES, -2 * 86_400_000, member)
    client.queue(tagged[2], anyway=True)
    left = {member.decode() for member in raw.zrange(names.CLASSES, 0, -1)}
    assert left == {class_of(document).member for document in tagged[1:]}, "one that waits stays"


def test_preemption_is_asked_for_once_for_each_urgent_entry(raw: redis.Redis, client: Client) -> None:
    assert run(raw, scripts.PREEMPT, CLASS) == 0
    client.queue(ECHO, priority="high")
    assert [run(raw, scripts.PREEMPT, CLASS) for _ in range(2)] == [1, 0]
    claim(raw)
    client.queue(ECHO, priority="high")
    assert [run(raw, scripts.PREEMPT, CLASS) for _ in range(2)] == [1, 0]


def test_the_client_says_what_is_wrong(raw: redis.Redis, client: Client) -> None:
    with pytest.raises(NeverFits, match="does not offer sft"):
        client.queue({"spec": {"taskType": "sft"}})
    assert client.queue({"spec": {"taskType": "sft"}}, anyway=True).worker_id is None
    with pytest.raises(NeverFits, match="lacks the tag 'fast'"):
        client.queue({"spec": {"taskType": "echo", "resources": {"tags": ["fast"]}}})
    client.queue(ECHO, task_id="t")
    with pytest.raises(TaskExists):
        client.queue(ECHO, task_id="t")
    with pytest.raises(UnknownTask):
        client.wait("never-heard-of", 1)
    with pytest.raises(NoResult, match="not ended yet"):
        client.result("t")
    with raw.pubsub() as tasks:
        tasks.subscribe("tasks")
        tasks.get_message(timeout=5)
        sent = client.submit(ECHO)
    raw.delete(f"worker:{sent.worker_id}:hb")
    with pytest.raises(WorkerGone, match=str(sent.worker_id)):
        client.wait(sent.task_id, 1)
    client.cancel(sent.task_id)
    raw.zrem(names.OPEN, sent.task_id)
    assert [each.task_id for each in client.tasks()][1:] == ["t"]
    assert [each["waiting"]["normal"] for each in client.waiting()] == [1, 1]


def test_the_async_client_does_the_same(server: RedisServer, raw: redis.Redis) -> None:
    async def story() -> None:
        async with AsyncClient(server.url) as client:
            task = await client.queue(ECHO)
            waiting = asyncio.create_task(client.wait(task.task_id, 10))
            await asyncio.sleep(0)
            got = claim(raw)
            assert got == (task.task_id, 1)
            report(raw, task.task_id, 1, "w1")
            assert (await waiting).ok
            assert await client.result(task.task_id) == {"from": "w1"}
            assert [event.type async for event in client.events(task.task_id)] == ["TASK_SUCCEEDED"]
            assert [each.worker_id for each in await client.workers()] == ["w1", "w2"]

    asyncio.run(story())


def test_what_happens_while_the_record_is_read_is_told(
    client: Client, raw: redis.Redis, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The events are listened to before the record is read: what comes between the two is in one of them."""
    read = Client.state

    def state(self: Client, task_id: str) -> Any:
        found = read(self, task_id)
        started = {"type": "TASK_STARTED", "task_id": task_id, "worker_id": "w1", "ts": "now"}
        raw.publish("tasks.events", json.dumps(started))
        assert claim(raw) == (task_id, 1)
        report(raw, task_id, 1, "w1")
        return found

    task = client.queue(ECHO)
    monkeypatch.setattr(Client, "state", state)
    assert [event.type for event in client.events(task.task_id)] == ["QUEUED", "TASK_STARTED", "TASK_SUCCEEDED"]
    monkeypatch.undo()

    async def story() -> None:
        async with AsyncClient(server.url) as other:
            task = await other.queue(ECHO)
            read = other.state

            async def state(task_id: str) -> Any:
                found = await read(task_id)
                started = {"type": "TASK_STARTED", "task_id": task_id, "worker_id": "w1", "ts": "now"}
                raw.publish("tasks.events", json.dumps(started))
                assert claim(raw) == (task_id, 1)
                report(raw, task_id, 1, "w1")
                return found

            monkeypatch.setattr(other, "state", state)
            told = [event.type async for event in other.events(task.task_id)]
            assert told == ["QUEUED", "TASK_STARTED", "TASK_SUCCEEDED"]

    asyncio.run(story())


def test_a_start_that_the_record_has_is_told_once(client: Client, raw: redis.Redis) -> None:
    task = client.queue(ECHO)
    assert claim(raw) == (task.task_id, 1)
    raw.hset(names.record_key(task.task_id), "state", "running")
    events = client.events(task.task_id)
    assert next(events).type == "TASK_STARTED"
    started = {"type": "TASK_STARTED", "task_id": task.task_id, "worker_id": "w1", "ts": "now"}
    raw.publish("tasks.events", json.dumps(started))
    report(raw, task.task_id, 1, "w1")
    assert [event.type for event in events] == ["TASK_SUCCEEDED"]
