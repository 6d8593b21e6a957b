"""Many nodes in one process: the node's own code for Redis, and in place of the tasks an end at once.

A program: `python -m tests.bench.wire_nodes URL FIRST COUNT`. The nodes are w<FIRST> and on. They take tasks from the
channel, from a stream of their own and from the queue. It writes `ready` when all are registered and subscribed, and
ends at the end of its input.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import random
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

from loguru import logger

from flowmesh.bus.connection import RedisError, connect
from flowmesh.bus.outbox import Outbox
from flowmesh.bus.presence import Identity, Presence
from flowmesh.bus.scripts import run_script
from flowmesh.bus.stream import Stream
from flowmesh.bus.subscriber import Subscriber
from flowmesh.messages.wire import (
    EVENTS_CHANNEL,
    TASK_EVENTS_CHANNEL,
    TaskEvent,
    address,
    encode,
    utc_now,
    worker_key,
)
from flowmesh.orchestrator.control_channel import CHANNEL as CONTROL
from flowmesh.orchestrator.dispatcher import Dispatcher
from flowmesh.orchestrator.link import GATHER_S
from flowmesh.orchestrator.wake_ups import POLL_S, WakeUps
from flowmesh.queue import names, scripts
from flowmesh.queue.classes import class_of
from tests.kit.fake_node import HARDWARE

SPEC: dict[str, Any] = {"taskType": "echo", "resources": {"tags": ["simulated"]}}
"""Of the tasks that these nodes take from the queue; a real one beside them does not."""
INTERVAL_S = 30.0
"""Between two heartbeats, as by default."""
TIMEOUT_S = 60.0
"""Of Redis' answers: the machine is loaded on purpose."""
METRICS: dict[str, Any] = {
    "uptime_sec": 1000.0,
    "accrued_cost_usd": 0.3,
    "loadavg": {"1m": 1.0, "5m": 1.0, "15m": 1.0},
    "power": {"timestamp": "2026-01-01T00:00:00+00:00", "cpu_watts": None, "gpu_watts": {"total": 0.0, "per_gpu": []}},
    "estimated_energy_kwh": 0.0,
}


class Events:
    """What waits to be sent, as the journal keeps it for a node; here in memory."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, str, bytes]] = []
        self._numbers = itertools.count(1)

    def post(self, event: TaskEvent) -> None:
        self._waiting.append((next(self._numbers), TASK_EVENTS_CHANNEL, encode(event)))

    def outgoing(self, limit: int = 100) -> list[tuple[int, str, bytes]]:
        return self._waiting[:limit]

    def sent(self, seq: int) -> None:
        self._waiting = [each for each in self._waiting if each[0] > seq]

    def outbox_size(self) -> int:
        return len(self._waiting)


class WireNode(Dispatcher):
    """One node with one slot. The search for its id in each message is the dispatcher's own."""

    def __init__(self, url: str, worker_id: str) -> None:
        super().__init__(types.SimpleNamespace(slots={worker_id: None}))  # type: ignore[arg-type]
        self._worker_id = worker_id
        reach = {"timeout_s": TIMEOUT_S, "health_check_interval_s": INTERVAL_S}
        self._client = connect(url, name=f"{worker_id}-bus", users=6, **reach)  # type: ignore[arg-type]
        self._blocked = connect(url, name=f"{worker_id}-wait", **reach)  # type: ignore[arg-type]
        streaming = connect(url, name=f"{worker_id}-stream", **reach)  # type: ignore[arg-type]
        listener = connect(url, name=f"{worker_id}-sub", **reach)  # type: ignore[arg-type]
        event_listener = connect(url, name=f"{worker_id}-events", **reach)  # type: ignore[arg-type]
        queue_listener = connect(url, name=f"{worker_id}-queue-sub", **reach)  # type: ignore[arg-type]
        identity = Identity(
            worker_id=worker_id, pid=1, started_at=utc_now(), cost_per_hour=1.0, tags=("simulated",), owner=worker_id,
            env={"task_types": ["echo"], "HEARTBEAT_INTERVAL_SEC": INTERVAL_S}, hardware=HARDWARE,
        )  # fmt: skip
        self.presence = Presence(
            self._client,
            identity,
            interval_s=INTERVAL_S,
            metrics=_metrics,
            power=lambda: None,
            farewell=dict,
            on_left_over=lambda: None,
        )
        self._events = Events()
        self._outbox = Outbox(self._client, self._events, lambda _sent: None, guard=f"{worker_key(worker_id)}:guard")
        tasks, events = {"tasks": self.on_message, CONTROL: _ignore}, {EVENTS_CHANNEL: self.presence.on_event}
        aside = functools.partial(Subscriber, on_subscribed=_ignore, on_unsubscribed=lambda: None, silence_s=INTERVAL_S)
        self._subscribers = [
            Subscriber(listener, tasks, self._subscribed, lambda: None, silence_s=INTERVAL_S),
            aside(event_listener, events, gather_s=GATHER_S),
            aside(queue_listener, {names.CHANNEL: _ignore}),
        ]
        self._stream = Stream(streaming, worker_id, self.take, block_s=TIMEOUT_S / 2)

    @property
    def ready(self) -> bool:
        reading = self._stream.up and all(each.up for each in self._subscribers)
        return reading and self.presence.up and self.presence.status.word == "IDLE"

    async def run(self, registered: asyncio.Event) -> None:
        """Until cancelled. It subscribes when `registered` is set."""

        async def take_tasks() -> None:
            await registered.wait()
            listening = [each.run() for each in self._subscribers]
            await asyncio.gather(*listening, self._outbox.run(), self._stream.run(), self._claim())

        await asyncio.gather(self.presence.run(), take_tasks())

    def take(self, data: bytes, entry: str | None = None) -> bool:
        to = address(data)
        if to.assigned_worker == self._worker_id:
            task_id = str(to.task_id)
            self.presence.set_status("RUNNING", task_id)
            self._events.post(self._event("TASK_STARTED", task_id))
            self._events.post(self._event("TASK_SUCCEEDED", task_id))
            self._outbox.wake()
            self.presence.set_status("IDLE", task_id)
        return True

    def _event(self, kind: str, task_id: str) -> TaskEvent:
        payload = {"taskType": "echo", "started_at": utc_now(), "runtime_sec": 0.01}
        return TaskEvent(type=kind, ts=utc_now(), worker_id=self._worker_id, task_id=task_id, payload=payload)

    def _subscribed(self, gap: bool) -> None:
        self.presence.set_status("IDLE")

    async def _claim(self) -> None:
        """As orchestrator.claims does it for one class, which all tasks here have."""
        key, wake_ups, never = class_of({"spec": SPEC}).key, WakeUps(self._blocked), asyncio.Event()
        await asyncio.sleep(random.uniform(0, POLL_S[1]))
        while True:
            with contextlib.suppress(RedisError):
                woken = await wake_ups.token([key], never) or ""
                while await self._claimed(key, woken):
                    woken = ""

    async def _claimed(self, key: str, woken: str) -> bool:
        worker = self._worker_id
        answer = await run_script(self._client, scripts.CLAIM, worker, worker, utc_now(), woken, "", "", key)
        if answer[0] != b"task":
            return False
        task_id, attempt = answer[1].decode(), answer[2]
        self.presence.set_status("RUNNING", task_id)
        await run_script(self._client, scripts.JOURNALLED, task_id, attempt)
        common = (task_id, attempt, worker, worker)
        started, ended = self._event("TASK_STARTED", task_id), self._event("TASK_SUCCEEDED", task_id)
        await run_script(self._client, scripts.REPORT, *common, "started", encode(started), utc_now())
        end = (1, "ok", 0, "", "{}", '{"ok": true}', 86400, 0, 0)
        await run_script(self._client, scripts.REPORT, *common, "end", encode(ended), utc_now(), *end)
        self.presence.set_status("IDLE", task_id)
        return True


async def _metrics() -> dict[str, Any]:
    return METRICS


def _ignore(_data: object) -> None:
    pass


async def main(url: str, first: int, count: int) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    threading.Thread(target=lambda: (sys.stdin.read(), loop.call_soon_threadsafe(ended.set)), daemon=True).start()
    nodes = [WireNode(url, f"w{number}") for number in range(first, first + count)]
    registered, running = asyncio.Event(), []
    for node in nodes:
        running.append(asyncio.create_task(node.run(registered)))
        await asyncio.sleep(INTERVAL_S / count)  # their heartbeats then come evenly, as those of nodes of all ages do

    async def until(condition: Callable[[WireNode], bool]) -> None:
        while not all(map(condition, nodes)):
            if failed := [task for task in running if task.done()]:
                failed[0].result()
            await asyncio.sleep(0.1)

    await until(lambda node: node.presence.up)
    registered.set()  # only now: each registration is a message to all that are subscribed
    await until(lambda node: node.ready)
    print("ready", flush=True)
    await ended.wait()
    os._exit(0)  # nothing here has to be put in order


if __name__ == "__main__":
    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
