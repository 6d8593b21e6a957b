"""A worker's Redis registration while several things happen at once."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from flowmesh.bus import presence as module
from flowmesh.bus.connection import connect
from flowmesh.bus.presence import Identity, Presence
from tests.support import Orchestrator, RedisServer

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


@pytest.mark.parametrize("during", ["REGISTER", "check"])
def test_a_request_to_register_again_is_not_lost(
    redis_server: RedisServer, orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    monkeypatch.setattr(module, "CHECK_INTERVAL_S", 0.05)

    async def live() -> None:
        client = connect(f"unix://{redis_server.path}", timeout_s=5.0, health_check_interval_s=5.0, name="test")
        identity = Identity(worker_id="w1", pid=1, started_at="", cost_per_hour=1.0, tags=(), env={}, hardware={})
        asked = Asked(
            client,
            identity,
            interval_s=30.0,
            metrics=nothing,
            farewell=dict,
            on_left_over=lambda: None,
            during=during,
        )
        running = asyncio.create_task(asked.run())
        for _ in range(200):
            await asyncio.sleep(0.02)
            orchestrator.hear()
            if orchestrator.told.count("REGISTER") == 2:
                break
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await client.aclose()

    asyncio.run(live())
    assert orchestrator.told == ["REGISTER", "UNREGISTER", "REGISTER"]
