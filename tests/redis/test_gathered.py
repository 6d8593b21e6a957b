"""Messages that may wait for others are read together, in order, and none is lost."""

from __future__ import annotations

import asyncio

import pytest

from flowmesh.bus.connection import connect
from flowmesh.bus.subscriber import Subscriber
from tests.kit.support import RedisServer

pytestmark = pytest.mark.redis
COUNT = 50


async def wake_ups(server: RedisServer, gather_s: float) -> int:
    """In how many turns of the loop COUNT messages come, each published once the loop had time for the one before."""
    got, turns, turn = list[bytes](), set[int](), 0

    def take(data: bytes) -> None:
        got.append(data)
        turns.add(turn)

    clients = [connect(server.url, timeout_s=10, health_check_interval_s=10, name=name) for name in ("sub", "pub")]
    subscribed = asyncio.Event()
    subscriber = Subscriber(
        clients[0], {"events": take}, lambda _gap: subscribed.set(), lambda: None, silence_s=10, gather_s=gather_s
    )
    running = asyncio.create_task(subscriber.run())
    try:
        await asyncio.wait_for(subscribed.wait(), 10)
        for number in range(COUNT):
            await clients[1].publish("events", b"%d" % number)
            turn += 1
        async with asyncio.timeout(20):
            while len(got) < COUNT:
                await asyncio.sleep(0.01)
                turn += 1
    finally:
        running.cancel()
        for client in clients:
            await client.aclose()
    assert got == [b"%d" % number for number in range(COUNT)]
    return len(turns)


def test_what_may_wait_is_read_together(redis_server: RedisServer) -> None:
    at_once = asyncio.run(wake_ups(redis_server, 0.0))
    gathered = asyncio.run(wake_ups(redis_server, 0.5))
    assert gathered < at_once / 2
