"""Several commands to Redis in one write, and all their replies, under one time limit.

For what every task needs. redis-py takes a connection from its pool and gives it back for each command, and awaits each
reply and its time limit by themselves; that is most of their processor time. Here a client keeps one connection, on
which exchanges follow each other without waiting; one that fails closes it, and the next one opens another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError

from flowmesh.bus.connection import redis
from flowmesh.bus.replies import ReplyLine

Command = Sequence[str | bytes]
_LEAVE = (RedisConnectionError, ReadOnlyError)
"""Errors of commands after which another connection may work: a login that is over, a master that became a replica."""
_lines: WeakKeyDictionary[redis.Redis, ReplyLine] = WeakKeyDictionary()
_opened: WeakKeyDictionary[redis.Redis, asyncio.Task[ReplyLine]] = WeakKeyDictionary()
"""Those that are being opened, for all exchanges that wait for them."""


async def exchange(client: redis.Redis, *commands: Command, transaction: bool = False) -> list[Any]:
    """Send the commands, and return their replies as Redis gives them.

    Args:
        transaction: all or none of them, with nothing of other clients between.

    Raises:
        RedisError, OSError: Redis is unreachable, or refused one of them: the first error.
        TimeoutError: they took longer than the client's socket timeout.
    """
    sent = (("MULTI",), *commands, ("EXEC",)) if transaction else commands
    line = _lines.get(client)
    if line is None or line.ended is not None:
        line = await _opening(client)
    limit_s = line.connection.socket_timeout
    answer = line.ask(_packed(sent), len(sent))
    timer = asyncio.get_running_loop().call_later(limit_s, line.end, TimeoutError(f"no answer for {limit_s:g} s"))
    try:
        replies = await answer
        return _checked(replies[-1] if transaction and not _errors(replies) else replies)
    except _LEAVE as error:
        line.end(error)
        raise
    finally:
        timer.cancel()


async def leave_replica(client: redis.Redis, error: BaseException) -> None:
    """Drop connections to a master that became a replica in a failover behind one address: the next try reconnects."""
    if isinstance(error, ReadOnlyError):
        if (line := _lines.get(client)) is not None:
            line.end(error)
        await client.connection_pool.disconnect(inuse_connections=False)


async def _opening(client: redis.Redis) -> ReplyLine:
    if (task := _opened.get(client)) is None:
        task = _opened[client] = asyncio.create_task(_open(client))

        def done(task: asyncio.Task[ReplyLine]) -> None:
            _opened.pop(client, None)
            if not task.cancelled():
                task.exception()  # nobody may wait for it any more

        task.add_done_callback(done)
    return await asyncio.shield(task)


async def _open(client: redis.Redis) -> ReplyLine:
    """A connection for this client's exchanges, in place of one that has ended."""
    pool = client.connection_pool
    if (ended := _lines.pop(client, None)) is not None:
        await ended.connection.disconnect(nowait=True)
        await pool.release(ended.connection)
    line = _lines[client] = ReplyLine(await pool.get_connection())  # type: ignore[no-untyped-call]
    return line


def _errors(replies: Sequence[Any]) -> list[Exception]:
    return [reply for reply in replies if isinstance(reply, Exception)]


def _checked(replies: list[Any]) -> list[Any]:
    for error in _errors(replies):
        raise error
    return replies


def _packed(commands: Sequence[Command]) -> bytes:
    """As Redis reads them: the number of a command's words, then each with its length."""
    parts: list[bytes] = []
    for command in commands:
        parts.append(b"*%d\r\n" % len(command))
        for word in command:
            data = word.encode() if isinstance(word, str) else word
            parts += b"$%d\r\n" % len(data), data, b"\r\n"
    return b"".join(parts)
