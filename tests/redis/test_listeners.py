"""Events wait for somebody who listens, in order and within bounds; a queue that is full says so."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from flowmesh.bus import outbox as module
from flowmesh.bus.connection import connect
from flowmesh.bus.outbox import Outbox
from tests.kit.promises import MISBEHAVE, WAITING, let_go
from tests.kit.support import Node, Orchestrator, RedisServer, until

pytestmark = pytest.mark.redis


class Queue:
    """The journal's part of an outbox, in memory."""

    def __init__(self) -> None:
        self.events: list[tuple[int, str, bytes]] = []
        self.posted = 0

    def post(self, count: int) -> None:
        for _ in range(count):
            self.posted += 1
            self.events.append((self.posted, "tasks.events", b"%d" % self.posted))

    def outgoing(self, limit: int = 100) -> list[tuple[int, str, bytes]]:
        return self.events[:limit]

    def sent(self, seq: int) -> None:
        self.events = [each for each in self.events if each[0] > seq]

    def outbox_size(self) -> int:
        return len(self.events)


def deaf(orchestrator: Orchestrator) -> None:
    orchestrator._pubsub.unsubscribe("tasks.events")
    until(lambda: orchestrator.redis.pubsub_numsub("tasks.events")[0][1] == 0, "nobody listens")


def test_an_orchestrator_that_restarts_gets_every_event(orchestrator: Orchestrator, make_node: Any) -> None:
    node: Node = make_node()
    orchestrator.run("w1", {"taskType": "echo"})
    deaf(orchestrator)
    tasks = [orchestrator.dispatch("w1", {"taskType": "echo", "n": n}) for n in range(20)]
    until(lambda: node.ask(op="status")["outbox"] == 40, "all events wait")
    status = node.ask(op="status")
    assert status["nobody_listens"]
    node.kill()
    node.start()
    orchestrator._pubsub.subscribe("tasks.events")
    ends = [orchestrator.wait_end(task) for task in tasks]
    assert {end["type"] for end in ends} == {"TASK_SUCCEEDED"}
    order = [event["task_id"] for event in orchestrator.task_events if event["type"] == "TASK_SUCCEEDED"]
    # Not the order of dispatch: a result that takes longer to deliver does not hold back the next task's.
    assert order == re.findall(r"task succeeded task=(\S+)", node.log.read_text())
    assert sorted(order[1:]) == sorted(tasks)
    until(lambda: not node.ask(op="status")["nobody_listens"], "somebody listens again")
    deaf(orchestrator)
    orchestrator.dispatch("w1", {"taskType": "echo"})
    until(lambda: node.ask(op="status")["nobody_listens"], "its events wait")
    assert node.stop() == 0


def test_nobody_who_ever_listens_costs_nothing(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_HELD", 30)

    async def live() -> None:
        client = connect(redis_server.url, timeout_s=5.0, health_check_interval_s=5.0, name="test")
        queue = Queue()
        outbox = Outbox(client, queue, lambda _: None, guard="g", hold_s=0.5)
        running = asyncio.create_task(outbox.run())
        queue.post(50)
        outbox.wake()
        async with asyncio.timeout(30):
            while queue.outbox_size() > 30:
                await asyncio.sleep(0.01)
            assert outbox.holding
            while queue.events:
                await asyncio.sleep(0.01)
        assert (outbox.unheard, outbox.nobody_listens, outbox.holding) == (50, True, False)
        queue.post(100)
        outbox.wake()
        assert await outbox.flushed(30)
        assert outbox.unheard == 150
        async with client.pubsub() as pubsub:
            await pubsub.subscribe("tasks.events")
            await pubsub.get_message(timeout=5)
            queue.post(1)
            outbox.wake()
            assert await outbox.flushed(30)
            assert not outbox.nobody_listens
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await client.aclose()

    asyncio.run(live())


def test_a_full_queue_answers(orchestrator: Orchestrator, make_node: Any) -> None:
    node: Node = make_node(config="[tasks]\nmax_queued = 3\n[redis]\nstream = true\ntimeout_s = 1.0\n" + MISBEHAVE)
    running = orchestrator.dispatch("w1", WAITING)
    orchestrator.wait_started(running)
    waiting = [orchestrator.dispatch("w1", {"taskType": "echo", "n": n}) for n in range(3)]
    end = orchestrator.run("w1", {"taskType": "echo"})
    assert (end["payload"]["error_kind"], end["payload"]["retryable"]) == ("node_fault", True)
    assert "tasks.max_queued" in end["error"]
    later = []
    for n in range(30):
        later.append(f"later-{n}")
        fields = {"task_id": later[-1], "task": {"spec": {"taskType": "echo"}}, "assigned_worker": "w1"}
        orchestrator.redis.xadd("tasks:w1", {"message": json.dumps(fields)})
    let_go(node, running)
    ends = [orchestrator.wait_end(task)["type"] for task in (running, *waiting, *later)]
    assert set(ends) == {"TASK_SUCCEEDED"}
    starts = [event["task_id"] for event in orchestrator.task_events if event["type"] == "TASK_STARTED"]
    assert [task for task in starts if task in later] == later
    assert node.ask(op="status")["queued"] == 0
