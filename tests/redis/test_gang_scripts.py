"""Gangs in a real Redis: all members are claimed at once or none, the fence, what comes back, and one end for all."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from flowmesh.client import Client, NeverFits
from flowmesh.errors import FieldError
from flowmesh.queue import gang_scripts, names, scripts
from flowmesh.queue.classes import class_of
from flowmesh.queue.lua import Script
from tests.kit.fake_node import register
from tests.kit.support import RedisServer, until

pytestmark = pytest.mark.redis
ECHO = {"spec": {"taskType": "echo"}}
CLASS = class_of(ECHO).key
WORKERS = {"a1": "a", "a2": "a", "b1": "b", "c1": "c", "d1": "d"}
"""Worker → node."""


def gang(nodes: Any) -> dict[str, Any]:
    return {"spec": {"taskType": "echo", "nodes": nodes}}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    started = RedisServer()
    yield started
    started.close()


@pytest.fixture
def raw(server: RedisServer) -> redis.Redis:
    client = server.client()
    client.flushdb()
    for worker, node in WORKERS.items():
        register(client, worker, types=["echo"], node=node)
    return client


@pytest.fixture
def client(server: RedisServer, raw: redis.Redis) -> Iterator[Client]:
    with Client(server.url) as started:
        yield started


def run(raw: redis.Redis, script: Script, *arguments: Any) -> Any:
    return raw.execute_command("EVAL", script.text, 0, *arguments)


def offer(raw: redis.Redis, worker: str, *gangs: str, settle_ms: int = 0, life_ms: int = 5000) -> tuple[str, ...]:
    """What an offer leads to: `(offered,)`, or `(member, gang, attempt, rank, size, port)`."""
    node = WORKERS[worker]
    port = 29500 + ord(node)
    answer = run(raw, gang_scripts.OFFER, worker, node, "now", f"host-{node}", port, life_ms, settle_ms, *gangs)
    if answer[0] != b"member":
        return (answer[0].decode(),)
    _, task, attempt, rank, size, host, port, rendezvous, _, document = answer
    assert json.loads(document)["spec"]["nodes"]
    assert (host.decode(), rendezvous.decode()) == (f"host-{chr(port - 29500)}", f"{task.decode()}-{attempt}")
    return "member", task.decode(), attempt, rank, size, port


def end(raw: redis.Redis, worker: str, member: tuple[Any, ...], kind: str = "ok", *, avoid_ms: int = 0) -> str:
    """Report a member's end."""
    _, task, attempt, rank = member[:4]
    ok = kind == "ok"
    payload = {"n": 1} if ok else {"error_kind": kind, "retryable": kind == "crash"}
    event = json.dumps(
        {"type": "TASK_SUCCEEDED" if ok else "TASK_FAILED", "task_id": task, "worker_id": worker, "payload": payload},
        separators=(",", ":"),
    )
    evidence = json.dumps({"attempt": attempt, "rank": rank, "worker_id": worker, "error_kind": kind})
    told = json.dumps({"rank": rank, "worker_id": worker, "verdict": kind})
    answer = run(
        raw, gang_scripts.END, task, attempt, rank, worker, WORKERS[worker], event, "now", int(ok), kind,
        int(kind == "crash"), "" if ok else "why", evidence, told, "{}", 60, avoid_ms,
    )  # fmt: skip
    return str(answer.decode())


def formed(raw: redis.Redis, client: Client, *workers: str, **terms: Any) -> list[tuple[Any, ...]]:
    """A gang `g` of these workers, whose members have joined, by rank."""
    client.queue(gang(len(workers)), task_id="g", **terms)
    return again(raw, *workers)


def again(raw: redis.Redis, *workers: str) -> list[tuple[Any, ...]]:
    for worker in workers:
        offer(raw, worker, "g")
    members = {worker: offer(raw, worker) for worker in workers}
    for worker, member in members.items():
        assert run(raw, gang_scripts.JOIN, *member[1:4], worker) == 1
    return sorted(((*member, worker) for worker, member in members.items()), key=lambda each: each[3])


def left(raw: redis.Redis) -> set[str]:
    kept = (names.CLASSES, "flowmesh:task:", "flowmesh:attempts:", "flowmesh:result:", names.DONE, names.OPEN)
    return {key.decode() for key in raw.keys("flowmesh:*") if not key.decode().startswith(kept)}


def test_the_last_offer_claims_all_members_on_different_nodes(raw: redis.Redis, client: Client) -> None:
    client.queue(gang(3), task_id="g")
    assert client.state("g").nodes == "3"  # type: ignore[union-attr]
    assert [offer(raw, worker, "g") for worker in ("a1", "a2", "b1")] == [("offered",)] * 3  # two are of one node
    assert client.state("g").state == "queued"  # type: ignore[union-attr]
    *rest, port = offer(raw, "c1", "g")
    assert rest[:3] == ["member", "g", 1]
    found = {worker: offer(raw, worker) for worker in ("a1", "a2", "b1", "c1")}
    members = [each for each in found.values() if each[0] == "member"]
    assert sorted(each[3] for each in members) == [0, 1, 2]
    assert {each[4:] for each in members} == {(3, port)}  # all have rank 0's address
    assert found["a2"] == ("none",)
    assert client.state("g").state == "claimed"  # type: ignore[union-attr]


def test_an_offer_ends_and_holds_nothing(raw: redis.Redis, client: Client) -> None:
    client.queue(gang(2), task_id="g")
    client.queue(ECHO, task_id="behind")
    offer(raw, "a1", "g")
    assert run(raw, scripts.CLAIM, "a1", "a", "now", "", "", "", CLASS)[1] == b"behind"
    assert offer(raw, "b1", "g", life_ms=1) == ("offered",)  # the claim has ended a1's offer
    until(lambda: not raw.keys("flowmesh:queue:offer:*"), "an offer ends")
    assert offer(raw, "c1", "g") == ("offered",)
    assert raw.zcard("flowmesh:queue:gangs") == 1


def test_a_member_is_not_claimed_for_anything_else(raw: redis.Redis, client: Client) -> None:
    client.queue(gang(2), task_id="g")
    client.queue(ECHO)
    offer(raw, "a1", "g")
    offer(raw, "b1", "g")
    assert run(raw, scripts.CLAIM, "a1", "a", "now", "", "", "", CLASS) == [b"member"]


def test_a_slot_that_is_taken_sends_the_whole_gang_back(raw: redis.Redis, client: Client) -> None:
    client.queue(gang(2), task_id="g", retries=0)
    offer(raw, "a1", "g")
    member = offer(raw, "b1", "g")
    assert run(raw, gang_scripts.GIVE_BACK, "a1", "now", "the slot is not free any more") == 1
    state = client.state("g")
    assert state is not None
    assert (state.state, state.failures) == ("queued", 0)
    assert run(raw, gang_scripts.JOIN, *member[1:4], "b1") == 0
    assert offer(raw, "b1", "g") == ("offered",)
    assert offer(raw, "c1", "g")[:3] == ("member", "g", 2)


def test_between_min_and_max_it_waits_a_moment_for_more(raw: redis.Redis, client: Client) -> None:
    client.queue(gang({"min": 2, "max": 3}), task_id="g")
    assert client.state("g").nodes == "2-3"  # type: ignore[union-attr]
    offer(raw, "a1", "g", settle_ms=60_000)
    assert offer(raw, "b1", "g", settle_ms=60_000) == ("offered",)
    assert offer(raw, "c1", "g", settle_ms=60_000)[4] == 3
    client.queue(gang({"min": 2, "max": 3}), task_id="h")
    offer(raw, "a2", "h", settle_ms=60_000)
    assert offer(raw, "d1", "h")[4] == 2


def test_one_end_with_every_member(raw: redis.Redis, client: Client) -> None:
    first, second = formed(raw, client, "a1", "b1")
    assert end(raw, second[-1], second) == "kept"
    assert end(raw, second[-1], second) == "again"
    assert end(raw, first[-1], first) == "published"
    assert end(raw, first[-1], first) == "stale"
    found = client.wait("g", 1)
    assert (found.ok, [each["rank"] for each in found.payload["members"]]) == (True, [0, 1])
    assert found.payload["n"] == 1
    assert client.result("g") == {}
    assert left(raw) == set()


def test_the_first_failure_decides_and_is_counted_once(raw: redis.Redis, client: Client) -> None:
    first, second = formed(raw, client, "a1", "b1", retries=1)
    assert end(raw, second[-1], second, "crash", avoid_ms=60_000) == "kept"
    assert run(raw, gang_scripts.BEAT, *first[1:4], "now", 5000, "", "") == [b"ending", b"failed", b"why"]
    assert end(raw, first[-1], first, "cancelled") == "requeued"  # its node has stopped it
    state = client.state("g")
    assert state is not None
    assert (state.state, state.failures) == ("queued", 1)
    assert [each.rank for each in client.attempts("g")] == [1, 0]
    assert offer(raw, second[-1], "g") == ("offered",)
    assert offer(raw, first[-1], "g") == ("offered",)  # the node where it failed is left out
    first, second = again(raw, first[-1], "c1")
    assert end(raw, first[-1], first) == "kept"
    assert end(raw, second[-1], second, "crash") == "published"  # rank 0's success does not count
    found = client.wait("g", 1)
    assert (found.verdict, found.attempts) == ("crash", 2)
    assert not raw.exists("flowmesh:result:g")


def test_a_drain_is_no_failure_and_goes_first(raw: redis.Redis, client: Client) -> None:
    client.queue(gang(2), task_id="older")
    members = formed(raw, client, "a1", "b1", retries=0)
    for member in members:
        end(raw, member[-1], member, "drained")
    assert raw.zrange("flowmesh:queue:gangs", 0, 0) == [b"g"]
    assert client.state("g").failures == 0  # type: ignore[union-attr]


def test_a_member_that_is_stopped_after_rank_0_has_succeeded_did_not_fail(raw: redis.Redis, client: Client) -> None:
    first, second = formed(raw, client, "a1", "b1")
    assert end(raw, first[-1], first) == "kept"
    assert run(raw, gang_scripts.BEAT, *second[1:4], "now", 5000, "", "")[:2] == [b"ending", b"finished"]
    assert end(raw, second[-1], second, "cancelled") == "published"
    assert client.wait("g", 1).ok


def test_a_member_that_is_not_heard_any_more_ends_all(raw: redis.Redis, client: Client) -> None:
    first, second = formed(raw, client, "a1", "b1")
    raw.hset("flowmesh:gang:g", "seen:1", 1)
    assert run(raw, gang_scripts.BEAT, *first[1:4], "now", 5000, "", "")[:2] == [b"ending", b"failed"]
    assert run(raw, gang_scripts.BEAT, *second[1:4], "now", 5000, "", "") == [b"stale"]  # it comes back too late
    assert end(raw, first[-1], first, "cancelled") == "requeued"
    assert end(raw, second[-1], second) == "stale"
    assert [each.error_kind for each in client.attempts("g")] == ["supervisor_lost", "cancelled"]


def test_after_an_outage_for_all_nobody_is_suspected(raw: redis.Redis, client: Client) -> None:
    first, _ = formed(raw, client, "a1", "b1")
    raw.hset("flowmesh:gang:g", mapping={"seen:0": 1, "seen:1": 1})
    assert run(raw, gang_scripts.BEAT, *first[1:4], "now", 5000, "", "") == [b"held"]
    assert run(raw, gang_scripts.BEAT, *first[1:4], "now", 5000, "", "") == [b"held"]


def test_a_gang_that_lost_all_members_is_swept(raw: redis.Redis, client: Client) -> None:
    formed(raw, client, "a1", "b1", retries=0)
    raw.hset("flowmesh:gang:g", mapping={"seen:0": 1, "seen:1": 1})
    assert run(raw, gang_scripts.SWEEP, "now", 1) == 0  # a first look may come before theirs
    until(lambda: run(raw, gang_scripts.SWEEP, "now", 1), "swept")
    assert client.wait("g", 1).verdict == "supervisor_lost"
    assert left(raw) == set()


def test_a_gang_whose_members_never_join_waits_again(raw: redis.Redis, client: Client) -> None:
    client.queue(gang(2), task_id="g", retries=0)
    offer(raw, "a1", "g")
    offer(raw, "b1", "g")
    raw.hset("flowmesh:gang:g", mapping={"seen:0": 1, "seen:1": 1})
    run(raw, gang_scripts.SWEEP, "now", 1)
    until(lambda: run(raw, gang_scripts.SWEEP, "now", 1), "swept")
    assert client.state("g").state == "queued"  # type: ignore[union-attr]


def test_a_gang_whose_members_redis_has_lost_waits_again(raw: redis.Redis, client: Client) -> None:
    first, _ = formed(raw, client, "a1", "b1", retries=0)
    raw.delete("flowmesh:gang:g")
    assert run(raw, gang_scripts.BEAT, *first[1:4], "now", 5000, "", "") == [b"stale"]
    assert end(raw, first[-1], first) == "stale"
    run(raw, gang_scripts.SWEEP, "now", 1)
    assert client.state("g").state == "queued"  # type: ignore[union-attr]


def test_cancel_and_remove(raw: redis.Redis, client: Client) -> None:
    members = formed(raw, client, "a1", "b1")
    assert client.cancel("g") == "claimed"
    assert run(raw, gang_scripts.BEAT, *members[0][1:4], "now", 5000, "", "")[:2] == [b"ending", b"cancelled"]
    for member in members:
        end(raw, member[-1], member, "cancelled")
    assert client.wait("g", 1).verdict == "cancelled"
    client.queue(gang(2), task_id="h")
    (waiting,) = client.waiting_tasks()
    assert (waiting.task_id, waiting.nodes) == ("h", "2")
    assert client.waiting()[0]["waiting"]["normal"] == 2
    assert client.remove("h").removed
    assert client.waiting_tasks() == []
    assert run(raw, gang_scripts.LIST, 10)[1] == []
    assert left(raw) == set()


def test_refusals(client: Client) -> None:
    with pytest.raises(NeverFits, match="needs 5 nodes that fit it, and there are 4"):
        client.queue(gang(5))
    with pytest.raises(FieldError, match="comes from the queue"):
        client.submit(gang(2))
    for wrong in (0, "two", {"min": 3, "max": 2}, {"min": 1}):
        with pytest.raises(FieldError, match=r"spec\.nodes"):
            client.queue(gang(wrong))
    client.queue(gang(5), anyway=True)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_in_which_order(raw: redis.Redis, client: Client, seed: int) -> None:
    """Offers, claims, refusals, ends and silences in any order: no worker in two gangs, no gang in parts, one end."""
    rng = random.Random(seed)
    bounds = {"g0": (2, 2), "g1": (3, 3), "g2": (1, 4)}
    events = raw.pubsub()
    events.subscribe("tasks.events")
    until(events.get_message, "subscribed")
    for task, (least, most) in bounds.items():
        client.queue(gang({"min": least, "max": most}), task_id=task, retries=3)
    has: dict[str, tuple[Any, ...]] = {}
    for _ in range(200):
        worker = rng.choice(list(WORKERS))
        member = has.get(worker)
        match rng.randrange(8):
            case 0 | 1 | 2 if member is None:
                gangs = rng.sample(sorted(bounds), rng.randrange(4))
                got = offer(raw, worker, *gangs, life_ms=rng.choice([1, 5000]))
                if got[0] == "member" and rng.random() < 0.9:
                    joined = run(raw, gang_scripts.JOIN, *got[1:4], worker)
                    has |= {worker: got} if joined else {}
            case 3 if member is None and rng.random() < 0.3:
                run(raw, gang_scripts.GIVE_BACK, worker, "now", "taken")
            case 4 if member is not None:
                end(raw, worker, member, rng.choice(["ok", "ok", "crash", "drained"]))
                del has[worker]
            case 5 if member is not None:
                answer = run(raw, gang_scripts.BEAT, *member[1:4], "now", 5000, "", "")
                if answer[0] == b"stale":
                    del has[worker]
            case 6 if rng.random() < 0.2:
                for task in bounds:
                    if raw.exists(f"flowmesh:gang:{task}"):
                        raw.hset(f"flowmesh:gang:{task}", f"seen:{rng.randrange(2)}", 1)
        _is_whole(raw, client, bounds)
    ends = []
    while (message := events.get_message()) is not None:
        ends.append(json.loads(message["data"])["task_id"])
    done = [task for task in bounds if client.state(task).state == "done"]  # type: ignore[union-attr]
    assert sorted(ends) == sorted(done)


def _is_whole(raw: redis.Redis, client: Client, bounds: dict[str, tuple[int, int]]) -> None:
    taken: list[bytes] = []
    for task, (least, most) in bounds.items():
        state = client.state(task)
        assert state is not None
        fields = raw.hgetall(f"flowmesh:gang:{task}")
        assert bool(fields) == (state.state in ("claimed", "running")), (task, state, fields)
        assert (raw.zscore("flowmesh:queue:gangs", task) is not None) == (state.state == "queued")
        if fields:
            size = int(fields[b"size"])
            assert least <= size <= most
            assert len({fields[f"node:{rank}".encode()] for rank in range(size)}) == size
            open_ranks = [rank for rank in range(size) if fields[f"state:{rank}".encode()] != b"done"]
            assert open_ranks
            taken += [fields[f"worker:{rank}".encode()] for rank in open_ranks if b"verdict" not in fields]
    assert len(taken) == len(set(taken))
