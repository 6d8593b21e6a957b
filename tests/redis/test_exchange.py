"""Several commands in one write: replies in order, errors of single commands, and a connection that stays usable."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from redis.exceptions import ReadOnlyError, ResponseError

from flowmesh.bus.connection import connect, redis
from flowmesh.bus.exchange import exchange
from tests.kit.support import RedisServer

pytestmark = pytest.mark.redis


def with_client(
    server: RedisServer, work: Callable[[redis.Redis], Awaitable[None]], *, timeout_s: float = 10.0
) -> None:
    async def live() -> None:
        client = connect(server.url, timeout_s=timeout_s, health_check_interval_s=30.0, name="test")
        try:
            await work(client)
        finally:
            await client.aclose()

    asyncio.run(live())


def test_replies_come_in_order_and_words_of_any_bytes_arrive(redis_server: RedisServer) -> None:
    async def work(client: redis.Redis) -> None:
        value = b"\r\n$3\r\n\x00\xff" * 1000
        found = await exchange(client, ("HSET", "h", "é", value), ("HGET", "h", "é"), ("HGET", "h", "missing"))
        assert found == [1, value, None]
        assert await exchange(client, ("SET", "k", ""), ("GET", "k"), transaction=True) == [b"OK", b""]

    with_client(redis_server, work)


@pytest.mark.parametrize("transaction", [False, True])
def test_the_first_error_is_raised_and_the_connection_stays_in_step(
    redis_server: RedisServer, transaction: bool
) -> None:
    async def work(client: redis.Redis) -> None:
        await exchange(client, ("SET", "text", "x"))
        with pytest.raises(ResponseError, match="not an integer"):
            await exchange(client, ("INCR", "text"), ("SET", "after", "1"), transaction=transaction)
        with pytest.raises(ResponseError, match="unknown command"):
            await exchange(client, ("NOSUCH",), ("SET", "never", "1"), transaction=transaction)
        assert await exchange(client, ("GET", "after"), ("EXISTS", "never")) == [b"1", int(not transaction)]
        assert len(client.connection_pool._available_connections) == 1

    with_client(redis_server, work)


def test_a_replica_refuses_the_whole_transaction(redis_server: RedisServer) -> None:
    async def work(client: redis.Redis) -> None:
        await client.replicaof("127.0.0.1", "1")
        try:
            with pytest.raises(ReadOnlyError):
                await exchange(client, ("DEL", "guard"), ("PUBLISH", "c", "x"), transaction=True)
        finally:
            await client.replicaof("NO", "ONE")

    with_client(redis_server, work)


def test_a_server_that_does_not_answer_is_given_up(redis_server: RedisServer) -> None:
    async def work(client: redis.Redis) -> None:
        await exchange(client, ("PING",))
        redis_server.client().execute_command("CLIENT", "PAUSE", "1000", "ALL")
        with pytest.raises(TimeoutError):
            await exchange(client, ("GET", "k"), ("GET", "k"))

    with_client(redis_server, work, timeout_s=0.3)
