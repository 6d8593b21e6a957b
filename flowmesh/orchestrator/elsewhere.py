"""Whether a queued task fits workers of other nodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flowmesh.bus.connection import redis
from flowmesh.messages.wire import WORKER_IDS
from flowmesh.queue import names, workers
from flowmesh.queue.classes import parse


async def fits_elsewhere(client: redis.Redis, task_id: str, own: Iterable[str]) -> bool:
    """Whether a living worker that is none of `own`, and takes tasks, could take a queued task.

    Raises:
        RedisError, OSError, TimeoutError: Redis is unreachable or refused a command.
    """
    member: Any = await client.hget(names.record_key(task_id), "class_json")
    wanted = parse(member.decode(errors="replace")) if member else None
    if wanted is None:
        return False
    return workers.fits_elsewhere(await read_workers(client), wanted, own)


async def enough_other_nodes(client: redis.Redis, task_id: str, node_id: str) -> bool:
    """Whether a task on several nodes fits as many nodes as it needs without this one.

    Raises:
        RedisError, OSError, TimeoutError: Redis is unreachable or refused a command.
    """
    member: Any
    member, least = await client.hmget(names.record_key(task_id), ["class_json", "least"])
    wanted = parse(member.decode(errors="replace")) if member else None
    if wanted is None or least is None:
        return False
    return len(workers.nodes_that_fit(await read_workers(client), wanted) - {node_id}) >= int(least)


async def read_workers(client: redis.Redis) -> list[workers.Worker]:
    """The registered workers.

    Raises:
        RedisError, OSError, TimeoutError: Redis is unreachable or refused a command.
    """
    ids = workers.ids_of(await client.smembers(WORKER_IDS))
    async with client.pipeline(transaction=False) as pipeline:
        for command in workers.reads(ids):
            pipeline.execute_command(*command)
        answers = await pipeline.execute()
    return workers.workers_of(ids, answers)
