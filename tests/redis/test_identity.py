"""Two nodes under one worker id: one of them has it. A copied state folder is another node."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from typing import Any

import pytest

from flowmesh.bus import presence as module
from flowmesh.bus.connection import connect
from flowmesh.bus.presence import Identity, Presence
from flowmesh.errors import EXIT_TRY_AGAIN, BusyError
from tests.kit.promises import MISBEHAVE, WAITING, let_go
from tests.kit.support import Node, Orchestrator, RedisServer, alive, until

pytestmark = pytest.mark.redis


def test_the_second_live_node_is_refused_and_a_dead_one_is_not_in_the_way(
    orchestrator: Orchestrator, make_node: Any
) -> None:
    first: Node = make_node(config=MISBEHAVE)
    running = orchestrator.dispatch("w1", WAITING)
    orchestrator.wait_started(running)
    second: Node = make_node(start=False)
    second.start(wait=False)
    assert second.process is not None
    assert second.process.wait(60) == EXIT_TRY_AGAIN
    assert "a live node" in second.text()
    assert "'w1'" in second.text()
    assert len(orchestrator.ends(orchestrator.dispatch("w1", {"taskType": "echo"}))) == 0
    let_go(first, running)
    assert orchestrator.wait_end(running)["type"] == "TASK_SUCCEEDED"
    orchestrator.redis.flushall()
    first.wait_status("IDLE")
    first.kill()
    second.start()  # its heartbeat key is still alive, and it does not renew it
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"


def test_a_killed_node_is_not_locked_out_by_its_own_registration(orchestrator: Orchestrator, make_node: Any) -> None:
    node: Node = make_node(env={"HEARTBEAT_INTERVAL_SEC": "300"})
    node.kill()
    node.start()
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
    assert "looking for its next heartbeat" not in node.text()


def heard_idle(orchestrator: Orchestrator) -> bool:
    return any(event.get("status") == "IDLE" for event in orchestrator.worker_events)


def test_a_copied_state_folder_is_another_node(orchestrator: Orchestrator, make_node: Any) -> None:
    first: Node = make_node(start=False, worker_id="", config=MISBEHAVE)
    first.start(wait=False)
    until(lambda: orchestrator.hear() or heard_idle(orchestrator), "it is idle")
    worker_id = next(iter(orchestrator.redis.smembers("workers:ids"))).decode()
    running = orchestrator.dispatch(worker_id, WAITING)
    orchestrator.wait_started(running)
    pid = first.task_pid(running)
    second: Node = make_node(start=False, worker_id="")
    shutil.copytree(first.state_dir, second.state_dir, symlinks=True, ignore=shutil.ignore_patterns("*.sock"))
    second.start(wait=False)
    until(lambda: orchestrator.redis.scard("workers:ids") == 2, "it has registered under another id")
    ids = orchestrator.redis.smembers("workers:ids")
    assert len(ids) == 2
    status = second.ask(op="status")
    assert status["tasks"] == []
    assert status["node_id"] != first.ask(op="status")["node_id"]
    assert "is a copy of another one" in second.text()
    assert alive(pid)
    assert second.stop() == 0
    let_go(first, running)
    assert orchestrator.wait_end(running)["type"] == "TASK_SUCCEEDED"
    assert len(orchestrator.ends(running)) == 1
    second.start(wait=False)
    until(lambda: orchestrator.redis.scard("workers:ids") == 2, "it has registered again")
    assert "is a copy of another one" not in second.text().rpartition("node started")[2]


async def nothing() -> dict[str, Any]:
    return {}


def node_of(server: RedisServer, owner: str, said: list[str]) -> Presence:
    client = connect(f"unix://{server.path}", timeout_s=5.0, health_check_interval_s=5.0, name="test")
    identity = Identity(
        worker_id="w1", pid=1, started_at="", cost_per_hour=1.0, tags=(), env={"HEARTBEAT_INTERVAL_SEC": 0.2},
        hardware={}, owner=owner,
    )  # fmt: skip
    return Presence(
        client, identity, interval_s=0.2, metrics=nothing, power=lambda: None, farewell=dict,
        on_left_over=lambda: None, on_rival=said.append,
    )  # fmt: skip


def test_of_two_that_start_at_once_one_gets_the_id(redis_server: RedisServer) -> None:
    async def start() -> list[Any]:
        nodes = [node_of(redis_server, f"owner-{n}", []) for n in range(6)]

        async def one(node: Presence) -> bool:
            await node.claim()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(node.run(), 6)
            return True

        results = await asyncio.gather(*(one(node) for node in nodes), return_exceptions=True)
        for node in nodes:
            await node._client.aclose()
        return results

    results = asyncio.run(start())
    assert results.count(True) == 1
    assert sum(isinstance(each, BusyError) for each in results) == 5


def test_a_flush_does_not_swap_two_nodes(
    redis_server: RedisServer, orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECK_INTERVAL_S", 0.1)
    first_said: list[str] = []
    second_said: list[str] = []
    owner = lambda: orchestrator.redis.hget("worker:w1", "flowmesh_owner")  # noqa: E731

    async def become(condition: Any) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.02)

    async def live() -> None:
        first, second = node_of(redis_server, "one", first_said), node_of(redis_server, "two", second_said)
        running = asyncio.create_task(first.run())
        await become(lambda: owner() == b"one")
        other = asyncio.create_task(second.run())
        await become(lambda: second_said)
        for _ in range(10):
            orchestrator.redis.flushall()
            await become(lambda: owner() == b"one" and orchestrator.redis.exists("worker:w1:hb"))
            await asyncio.sleep(0.15)
        assert not first_said
        await second.unregister(5)  # not its own
        assert owner() == b"one"
        # the id is taken from the first one: it says so, writes nothing, and takes it back when the other is gone
        orchestrator.redis.hset("worker:w1", "flowmesh_owner", "three")
        await become(lambda: first_said and "live node" in first_said[0])
        orchestrator.redis.hset("worker:w1", "status", "theirs")
        first.set_status("RUNNING", "t")
        await asyncio.sleep(0.5)
        assert orchestrator.redis.hget("worker:w1", "status") == b"theirs"
        orchestrator.redis.flushall()
        await become(lambda: owner() in (b"one", b"two"))
        running.cancel()
        other.cancel()
        await asyncio.gather(running, other, return_exceptions=True)
        for node in (first, second):
            await node._client.aclose()

    asyncio.run(live())


def test_a_node_that_is_displaced_takes_no_tasks(orchestrator: Orchestrator, make_node: Any) -> None:
    node: Node = make_node()
    orchestrator.redis.hset("worker:w1", "flowmesh_owner", "another")
    until(lambda: "takes no tasks while it lives" in node.text(), "it finds the other node")
    task = orchestrator.dispatch("w1", {"taskType": "echo"})
    until(lambda: "dispatch not taken: another live node" in node.text(), "it leaves the task to the other one")
    assert orchestrator.of_task(task) == []
    status = node.ask(op="status")
    assert "another live node" in status["workers"][0]["reason"]
    assert node.stop() == 0
    assert orchestrator.redis.hget("worker:w1", "flowmesh_owner") == b"another"
