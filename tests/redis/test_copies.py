"""Two copies of one process, as after a machine's snapshot was resumed twice: one of them stands back."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any

import pytest

from flowmesh.bus import presence as module
from flowmesh.bus.connection import connect
from flowmesh.bus.presence import Identity, Presence
from flowmesh.cancellation import end_all
from tests.kit.support import Orchestrator, RedisServer

pytestmark = pytest.mark.redis


async def nothing() -> dict[str, Any]:
    return {}


class Copy:
    """A node's registration.

    Args:
        of: what it is a copy of, with all that the memory holds.
    """

    def __init__(self, server: RedisServer, of: Copy | None = None) -> None:
        self.said: list[str] = []
        self.client = connect(f"unix://{server.path}", timeout_s=5.0, health_check_interval_s=5.0, name="test")
        identity = Identity(
            worker_id="w1",
            pid=7,
            started_at="",
            cost_per_hour=1.0,
            tags=(),
            env={"HEARTBEAT_INTERVAL_SEC": 0.2},
            hardware={},
            owner="folder:place",
        )
        self.presence = Presence(
            self.client,
            identity,
            interval_s=0.2,
            metrics=nothing,
            power=lambda: None,
            farewell=dict,
            on_left_over=lambda: None,
            on_rival=self.said.append,
            on_copied=lambda: "another:place",
        )
        if of is not None:
            self.presence._record.ownership = copy.deepcopy(of.presence._record.ownership)
            self.presence._registered = True
        self.running: asyncio.Task[None] | None = None

    def resume(self) -> None:
        self.running = asyncio.create_task(self.presence.run())

    async def end(self) -> None:
        if self.running is not None:
            await end_all([self.running])
        await self.client.aclose()


async def become(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def test_one_of_two_copies_stands_back_while_the_other_lives(
    redis_server: RedisServer, orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECK_INTERVAL_S", 0.05)
    redis = orchestrator.redis

    async def live() -> None:
        original = Copy(redis_server)
        original.resume()
        await become(lambda: original.presence.up and redis.hexists("worker:w1", "flowmesh_token"))
        await original.end()
        copies = [Copy(redis_server, original) for _ in range(2)]
        for each in copies:
            each.resume()
        await become(lambda: any(each.said for each in copies))
        (second,) = [each for each in copies if each.said]
        (first,) = [each for each in copies if not each.said]
        assert "a copy of this node" in second.said[0]
        second.presence.set_status("RUNNING", "t")
        redis.flushall()  # the first one registers again, and the second one does not get in between
        await become(lambda: redis.hget("worker:w1", "flowmesh_owner") == b"folder:place")
        await asyncio.sleep(0.5)
        assert first.said == []
        assert second.said[1:] == []
        assert redis.hget("worker:w1", "status") == b"STARTING"
        await first.end()
        redis.delete("worker:w1:hb")
        await become(lambda: redis.hget("worker:w1", "flowmesh_owner") == b"another:place")
        assert second.said[1:] == [""]
        await second.end()

    asyncio.run(live())


def test_older_data_of_redis_is_no_copy(
    redis_server: RedisServer, orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECK_INTERVAL_S", 0.02)
    token: Callable[[], Any] = lambda: orchestrator.redis.hget("worker:w1", "flowmesh_token")  # noqa: E731

    async def live() -> None:
        node = Copy(redis_server)
        node.resume()
        await become(token)
        older = token()
        await become(lambda: token() != older)
        orchestrator.redis.hset("worker:w1", "flowmesh_token", older)
        await become(lambda: token() != older)
        assert node.said == []
        await node.end()
        next_process = Copy(redis_server)  # has written no token yet
        next_process.resume()
        await become(lambda: next_process.presence.up)
        await asyncio.sleep(0.1)
        assert next_process.said == []
        await next_process.end()

    asyncio.run(live())


def test_a_node_that_hears_another_one_register_looks_at_once(
    redis_server: RedisServer, orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two checks the database was emptied, and a new node took the id: both have it for a moment only."""
    monkeypatch.setattr(module, "CHECK_INTERVAL_S", 600.0)

    async def live() -> None:
        node = Copy(redis_server)
        node.resume()
        await become(lambda: node.presence.up)
        orchestrator.redis.flushall()
        orchestrator.redis.hset("worker:w1", mapping={"flowmesh_owner": "new", "pid": "8"})
        orchestrator.redis.set("worker:w1:hb", "now")
        node.presence.on_event(b'{"type":"UNREGISTER","worker_id":"w1"}')
        node.presence.on_event(b'{"type":"REGISTER","worker_id":"w10"}')
        await asyncio.sleep(0.1)
        assert node.said == []
        node.presence.on_event(b'{"type":"REGISTER","worker_id":"w1"}')
        await become(lambda: node.said)
        assert "owner new" in node.said[0]
        await node.end()

    asyncio.run(live())
