"""A worker that runs is never IDLE for long, however late the orchestrator answers the end of an earlier task."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest

from flowmesh.bus import presence as module
from tests.kit.support import Node, Orchestrator, RedisServer, until
from tests.redis.test_presence import living
from tests.redis.test_presence import until as until_async

pytestmark = pytest.mark.redis
KEY = "worker:w1"


class LateOrchestrator(threading.Thread):
    """Sets a worker IDLE so long after its TASK_SUCCEEDED, and may say so on workers.events."""

    def __init__(self, server: RedisServer, delay_s: float, *, says: bool) -> None:
        super().__init__(daemon=True)
        self.redis = server.client()
        self.delay_s = delay_s
        self.says = says
        self.written = threading.Event()
        self.pubsub = self.redis.pubsub()
        self.pubsub.subscribe("tasks.events")
        self.pubsub.get_message(timeout=5)

    def run(self) -> None:
        for message in self.pubsub.listen():
            if message["type"] != "message":
                continue
            event = json.loads(message["data"])
            if event["type"] == "TASK_SUCCEEDED":
                time.sleep(self.delay_s)
                self.redis.hset(KEY, "status", "IDLE")
                self.written.set()
                if self.says:
                    said = {"type": "STATUS", "ts": "", "worker_id": "w1", "status": "IDLE", "payload": {}}
                    self.redis.publish("workers.events", json.dumps(said))
                return


@pytest.mark.parametrize(("delay_s", "says"), [(0.3, False), (2.5, True)], ids=["looked for", "heard of"])
def test_an_idle_that_comes_late_is_corrected(
    redis_server: RedisServer, orchestrator: Orchestrator, node: Node, delay_s: float, says: bool
) -> None:
    late = LateOrchestrator(redis_server, delay_s, says=says)
    late.start()
    orchestrator.dispatch("w1", {"taskType": "echo"})
    long = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 600})
    orchestrator.wait_started(long)
    assert late.written.wait(30)
    until(lambda: orchestrator.redis.hget(KEY, "status") == b"RUNNING", "it says RUNNING again")
    assert orchestrator.redis.hget(KEY, "extra_task_id") == long.encode()
    orchestrator.hear()
    last = [event for event in orchestrator.worker_events if event["type"] == "STATUS"][-1]
    assert (last["status"], last["payload"]) == ("RUNNING", {"task_id": long})


@pytest.fixture
def rare_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what follows from an event corrects the status."""
    monkeypatch.setattr(module, "CHECK_INTERVAL_S", 3600.0)


def test_the_looks_come_again_and_again(
    rare_checks: None, redis_server: RedisServer, orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOKS_S", (0.3, 0.9, 1.8))
    status = lambda: orchestrator.redis.hget(KEY, "status")  # noqa: E731

    async def live() -> None:
        async with living(redis_server, power=lambda: None) as presence:
            presence.set_status("RUNNING", "t-2")
            await until_async(lambda: status() == b"RUNNING")
            presence.look_soon()
            for _ in range(3):
                orchestrator.redis.hset(KEY, "status", "IDLE")
                await until_async(lambda: status() == b"RUNNING")

    asyncio.run(live())


def test_another_processs_word_is_enough(
    rare_checks: None, redis_server: RedisServer, orchestrator: Orchestrator
) -> None:
    status = lambda: orchestrator.redis.hget(KEY, "status")  # noqa: E731

    def said(**fields: Any) -> bytes:
        return json.dumps({"type": "STATUS", "worker_id": "w1", "status": "IDLE", **fields}).encode()

    async def live() -> None:
        async with living(redis_server, power=lambda: None) as presence:
            presence.set_status("RUNNING", "t-2")
            await until_async(lambda: status() == b"RUNNING")
            for event in (
                said(worker_id="w10"),
                said(status="RUNNING"),
                said(type="HEARTBEAT"),
                b'"STATUS" w1',
                b"\xff",
            ):
                presence.on_event(event)
            orchestrator.redis.hset(KEY, "status", "IDLE")
            await asyncio.sleep(0.3)
            assert status() == b"IDLE"
            presence.on_event(said())
            await until_async(lambda: status() == b"RUNNING")

    asyncio.run(live())


def test_an_idle_worker_leaves_idle_alone(
    rare_checks: None, redis_server: RedisServer, orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOKS_S", (0.05, 0.1, 0.2))

    async def live() -> None:
        async with living(redis_server, power=lambda: None) as presence:
            presence.set_status("IDLE")
            presence.look_soon()
            await asyncio.sleep(0.5)

    asyncio.run(live())
    orchestrator.hear()
    assert orchestrator.told.count("STATUS") <= 2
