"""A worker's Redis registration while several things happen at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
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


class Asked(Presence):
    """Requests another registration, once, in the middle of one of its steps."""

    def __init__(self, *arguments: Any, during: str, **named: Any) -> None:
        super().__init__(*arguments, **named, power=self._power_during_register)
        self._during = during

    def _ask(self, now: str) -> None:
        if now == self._during:
            self._during = ""
            self.reannounce()

    def _power_during_register(self) -> None:
        self._ask("REGISTER")

    async def _check(self) -> bool:
        registered = await super()._check()
        self._ask("check")
        return registered


@contextlib.asynccontextmanager
async def living(
    server: RedisServer,
    kind: type[Presence] = Presence,
    interval_s: float = 30.0,
    metrics: Callable[[], Awaitable[dict[str, Any]]] = nothing,
    **more: Any,
) -> AsyncIterator[Presence]:
    client = connect(f"unix://{server.path}", timeout_s=5.0, health_check_interval_s=5.0, name="test")
    identity = Identity(worker_id="w1", pid=1, started_at="", cost_per_hour=1.0, tags=(), env={}, hardware={})
    presence = kind(
        client,
        identity,
        interval_s=interval_s,
        metrics=metrics,
        farewell=dict,
        on_left_over=lambda: None,
        **more,
    )
    running = asyncio.create_task(presence.run())
    yield presence
    await end_all([running])
    await client.aclose()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("during", ["REGISTER", "check"])
def test_a_request_to_register_again_is_not_lost(
    redis_server: RedisServer, orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    monkeypatch.setattr(module, "CHECK_INTERVAL_S", 0.05)

    async def live() -> None:
        async with living(redis_server, Asked, during=during):
            await until(lambda: orchestrator.hear() or orchestrator.told.count("REGISTER") == 2)

    asyncio.run(live())
    assert orchestrator.told == ["REGISTER", "UNREGISTER", "REGISTER"]


def test_running_for_a_task_that_never_came_is_corrected(
    redis_server: RedisServer, orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The orchestrator writes RUNNING after it has dispatched, perhaps after we are IDLE again: no event follows it."""
    monkeypatch.setattr(module, "CHECK_INTERVAL_S", 0.05)
    status = lambda: orchestrator.redis.hget("worker:w1", "status")  # noqa: E731

    async def live() -> None:
        async with living(redis_server, power=lambda: None) as presence:
            presence.set_status("IDLE")
            await until(lambda: status() == b"IDLE")
            orchestrator.redis.hset("worker:w1", "status", "RUNNING")
            await until(lambda: status() == b"IDLE")

    asyncio.run(live())


def test_a_task_that_comes_while_it_registers_leaves_it_running(
    redis_server: RedisServer, orchestrator: Orchestrator
) -> None:
    presences: list[Presence] = []

    def power() -> None:
        """Called in the middle of a registration."""
        presences[0].set_status("RUNNING", "t-1")

    def words() -> list[str]:
        orchestrator.hear()
        return [event["status"] for event in orchestrator.worker_events if event["type"] == "STATUS"]

    async def live() -> None:
        async with living(redis_server, power=power) as presence:
            presences.append(presence)
            presence.set_status("IDLE")
            await until(lambda: len(words()) == 2)

    asyncio.run(live())
    assert words() == ["IDLE", "RUNNING"]
    assert orchestrator.redis.hget("worker:w1", "status") == b"RUNNING"


def test_a_loop_that_loses_its_cancel_ends_with_the_other(redis_server: RedisServer) -> None:
    """As redis-py loses one that arrives together with a reply."""
    begun = asyncio.Event()
    lost: list[bool] = []

    async def metrics() -> dict[str, Any]:
        begun.set()
        try:
            await asyncio.sleep(0.0 if lost else 3600.0)
        except asyncio.CancelledError:
            lost.append(True)
        return {}

    async def live() -> None:
        async with living(redis_server, interval_s=0.02, metrics=metrics, power=lambda: None):
            await begun.wait()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(live())
    assert lost == [True]
