"""Several commands in one write: replies in order, errors of single commands, and a connection that stays usable."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from redis.exceptions import ConnectionError, ReadOnlyError, ResponseError

from flowmesh.bus.connection import connect, redis
from flowmesh.bus.exchange import exchange, leave_replica
from flowmesh.bus.replies import ReplyLine
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
        assert len(client.connection_pool._in_use_connections) == 1

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


def test_a_connection_that_has_ended_fails_at_once(redis_server: RedisServer) -> None:
    async def work(client: redis.Redis) -> None:
        line = ReplyLine(await client.connection_pool.get_connection())
        line.end(ConnectionError("gone"))
        with pytest.raises(ConnectionError, match="gone"):
            await asyncio.wait_for(line.ask(b"*1\r\n$4\r\nPING\r\n", 1), 5)

    with_client(redis_server, work)


def test_a_server_that_does_not_answer_is_given_up(redis_server: RedisServer) -> None:
    async def work(client: redis.Redis) -> None:
        await exchange(client, ("PING",))
        redis_server.client().execute_command("CLIENT", "PAUSE", "1000", "ALL")
        with pytest.raises(TimeoutError):
            await exchange(client, ("GET", "k"), ("GET", "k"))

    with_client(redis_server, work, timeout_s=0.3)


def test_exchanges_at_once_share_a_connection_and_get_their_own_replies(redis_server: RedisServer) -> None:
    async def work(client: redis.Redis) -> None:
        found = await asyncio.gather(*(exchange(client, ("ECHO", str(n)), ("ECHO", "x")) for n in range(50)))
        assert found == [[str(n).encode(), b"x"] for n in range(50)]
        assert len(client.connection_pool._in_use_connections) == 1

    with_client(redis_server, work)


def test_a_reply_that_comes_in_parts_and_nested_ones(redis_server: RedisServer) -> None:
    async def work(client: redis.Redis) -> None:
        large = b"x" * 1_000_000
        await exchange(client, ("RPUSH", "list", *[large] * 5))
        found = await exchange(client, ("LRANGE", "list", "0", "-1"), ("HMGET", "none", "a", "b"), transaction=True)
        assert found == [[large] * 5, [None, None]]

    with_client(redis_server, work)


def test_the_next_exchange_opens_another_connection_after_one_that_was_closed(redis_server: RedisServer) -> None:
    async def work(client: redis.Redis) -> None:
        await exchange(client, ("PING",))
        redis_server.client().execute_command("CLIENT", "KILL", "TYPE", "normal")
        await asyncio.sleep(0.1)
        assert await exchange(client, ("ECHO", "x")) == [b"x"]
        assert len(client.connection_pool._in_use_connections) == 1

    with_client(redis_server, work)


def test_a_connection_that_ends_meanwhile_fails_all_exchanges_on_it(redis_server: RedisServer) -> None:
    async def work(client: redis.Redis) -> None:
        await exchange(client, ("PING",))
        redis_server.client().execute_command("CLIENT", "PAUSE", "500", "ALL")
        waiting = [asyncio.ensure_future(exchange(client, ("SET", "k", "x"))) for _ in range(3)]
        await asyncio.sleep(0)
        client.connection_pool._in_use_connections.copy().pop()._writer.transport.abort()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(each) for each in found] == [ConnectionError] * 3

    with_client(redis_server, work)


def test_an_exchange_that_is_cancelled_leaves_the_others_in_step(redis_server: RedisServer) -> None:
    async def work(client: redis.Redis) -> None:
        await exchange(client, ("PING",))
        first = asyncio.ensure_future(exchange(client, ("ECHO", "1"), ("ECHO", "2")))
        second = asyncio.ensure_future(exchange(client, ("ECHO", "3")))
        await asyncio.sleep(0)
        first.cancel()
        assert await second == [b"3"]

    with_client(redis_server, work)


def test_a_former_master_is_left(redis_server: RedisServer) -> None:
    async def work(client: redis.Redis) -> None:
        [first] = await exchange(client, ("CLIENT", "ID"))
        await leave_replica(client, ReadOnlyError("You can't write against a read only replica."))
        [second] = await exchange(client, ("CLIENT", "ID"))
        assert second != first

    with_client(redis_server, work)
