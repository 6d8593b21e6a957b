"""Which nodes are told down, by real heartbeats in a real Redis, and by whom."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from flowmesh.bus.connection import connect
from flowmesh.messages.wire import WORKER_IDS, heartbeat_key, worker_key
from flowmesh.reporting.peer_watch import PeerWatch
from flowmesh.reporting.webhooks import Webhooks
from flowmesh.settings.schema import NotifySettings
from flowmesh.tasks.journal import Journal
from tests.kit.support import RedisServer

pytestmark = pytest.mark.redis
AFTER_S = 0.5
INTERVAL_S = 0.05


class Watcher:
    """The watch of one node, whose messages arrive as soon as `deliver` says so."""

    def __init__(self, redis: RedisServer, folder: Path, name: str) -> None:
        folder.mkdir()
        self.journal = Journal(folder / "journal.sqlite")
        settings = NotifySettings(url=("http://127.0.0.1:1/a", "http://127.0.0.1:1/b"), node_down_after_s=AFTER_S)
        self.webhooks = Webhooks(settings, name)
        client = connect(redis.url, timeout_s=5, health_check_interval_s=15, name=name)
        self.watch = PeerWatch(self.webhooks, self.journal, client, [name], lambda: None)
        self.told: list[tuple[str, str, str]] = []

    def deliver(self) -> None:
        for lane in self.webhooks.keys:
            for row in self.journal.sendings.due(lane, 100):
                self.told.append((lane, row.id, row.body.decode()))
                self.journal.sendings.sent([row.seq])

    @property
    def waiting(self) -> int:
        return sum(self.journal.sendings.waiting(lane) for lane in self.webhooks.keys)

    def of(self, worker: str) -> list[tuple[str, str]]:
        """(lane, id) of what was told about a worker."""
        return [(lane, id_) for lane, id_, body in self.told if f'"workers":["{worker}"]' in body]


def test_a_dead_node_is_told_once_and_one_that_unregistered_never(tmp_path: Path) -> None:
    redis = RedisServer()
    try:
        asyncio.run(_watched(redis, tmp_path))
    finally:
        redis.close()


async def _watched(redis: RedisServer, folder: Path) -> None:
    client, beats = redis.client(), {"dead", "left", "lives"}
    env = f'{{"HEARTBEAT_INTERVAL_SEC": {INTERVAL_S}}}'
    for worker in beats:
        client.sadd(WORKER_IDS, worker)
        client.hset(worker_key(worker), mapping={"flowmesh_owner": f"{worker}:x", "env_json": env, "last_seen": "then"})

    async def beat() -> None:
        number = 0
        while True:
            number += 1
            for worker in beats:
                client.set(heartbeat_key(worker), str(number), ex=120)
            await asyncio.sleep(INTERVAL_S)

    watchers = [Watcher(redis, folder / name, name) for name in ("n1", "n2")]
    beating = asyncio.create_task(beat())
    runs = [asyncio.create_task(watchers[0].watch.run())]
    await _until(lambda: len(client.keys("flowmesh:notify:*:watcher")) == 2)
    runs.append(asyncio.create_task(watchers[1].watch.run()))
    beats.discard("dead")
    beats.discard("left")
    client.srem(WORKER_IDS, "left")
    client.delete(worker_key("left"), heartbeat_key("left"))
    first, other = watchers
    await _until(lambda: first.waiting == 2)
    # Whoever looks is cut off before its message is sent: another one tells, with the same id.
    assert other.waiting == 0
    runs[0].cancel()
    await _until(lambda: other.waiting == 2)
    for each in watchers:
        each.deliver()
    assert sorted(first.of("dead")) == sorted(other.of("dead"))
    assert {lane for lane, _ in other.of("dead")} == set(other.webhooks.keys)
    await _until(lambda: len(client.keys("flowmesh:notify:*:down")) == 2)
    beats.add("dead")
    await _until(lambda: other.waiting == 2)
    other.deliver()
    await _until(lambda: not client.keys("flowmesh:notify:*:down"))
    assert [body.count('"type":"node.up"') for _, _, body in other.told] == [0, 0, 1, 1]
    assert all(not each.of("left") and not each.of("lives") for each in watchers)
    for task in (*runs, beating):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    for each in watchers:
        await each.watch.close()
        each.journal.close()
    assert not client.keys("flowmesh:notify:*:watcher")


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)
