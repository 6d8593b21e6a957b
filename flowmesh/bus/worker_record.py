"""One worker's record in Redis: its hash, its heartbeat key, its id in the set of workers; and its events.

Each method is one pipeline. `presence` decides when to call which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from flowmesh.bus.connection import redis
from flowmesh.messages.wire import (
    DISABLED,
    EVENTS_CHANNEL,
    WORKER_IDS,
    WorkerEvent,
    encode,
    heartbeat_key,
    heartbeat_ttl_s,
    utc_now,
    worker_key,
)


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker registers with."""

    worker_id: str
    pid: int
    started_at: str
    cost_per_hour: float
    tags: tuple[str, ...]
    env: dict[str, Any]
    hardware: Any


class Status(msgspec.Struct, frozen=True):
    """A worker's status and the task it concerns."""

    word: str
    task_id: str | None = None
    """The task that runs (RUNNING), or the last one (IDLE)."""


class Found(msgspec.Struct, frozen=True):
    """What Redis has of the worker."""

    registered: bool
    """By this process."""
    status: str
    disabled: bool
    """Whether the orchestrator's elastic scaling has disabled it."""


class WorkerRecord:
    """Reads and writes one worker's record.

    Args:
        interval_s: between two heartbeats; sets the TTL of the heartbeat key.

    Raises (from its methods):
        RedisError, OSError, TimeoutError: Redis is unreachable or refused a command.
    """

    def __init__(self, client: redis.Redis, *, interval_s: float) -> None:
        self.client = client
        self._ttl_s = heartbeat_ttl_s(interval_s)

    async def is_left_over(self, worker_id: str) -> bool:
        """Whether a registration of this id exists."""
        return bool(await self.client.hexists(worker_key(worker_id), "pid"))

    async def find(self, identity: Identity) -> Found:
        async with self.client.pipeline(transaction=False) as pipeline:
            pipeline.sismember(WORKER_IDS, identity.worker_id)
            pipeline.hmget(worker_key(identity.worker_id), "pid", "status")
            pipeline.sismember(DISABLED, identity.worker_id)
            member, (pid, status), disabled = await pipeline.execute()
        registered = bool(member) and pid == str(identity.pid).encode()
        return Found(registered, (status or b"").decode(errors="replace"), bool(disabled))

    async def enable(self, worker_id: str) -> None:
        """Take the worker out of the set of those that elastic scaling has disabled."""
        await self.client.srem(DISABLED, worker_id)

    async def register(self, identity: Identity, status: Status, power: dict[str, Any] | None) -> None:
        """Write the whole record, and publish REGISTER.

        Args:
            power: `power_metrics`; None: left out.
        """
        fields: dict[str, str | bytes] = {
            "worker_id": identity.worker_id,
            "status": status.word,
            "started_at": identity.started_at,
            "pid": str(identity.pid),
            "env_json": encode(identity.env),
            "hardware_json": encode(identity.hardware),
            "tags_json": msgspec.json.encode(identity.tags),
            "last_seen": utc_now(),
            "cost_per_hour": str(identity.cost_per_hour),
            **_task_field(status),
        }
        payload = {"env": identity.env, "hardware": identity.hardware, "cost_per_hour": identity.cost_per_hour}
        if power is not None:
            payload["power_metrics"] = power
        async with self.client.pipeline(transaction=True) as pipeline:
            _write(pipeline, identity.worker_id, fields)
            self._set_heartbeat(pipeline, identity.worker_id)
            pipeline.sadd(WORKER_IDS, identity.worker_id)
            _publish(pipeline, "REGISTER", identity.worker_id, status=status.word, tags=identity.tags, payload=payload)
            await pipeline.execute()

    async def announce(self, worker_id: str, status: Status) -> None:
        """Write the status, and publish STATUS. No transaction: the order (hash, then event) is enough."""
        async with self.client.pipeline(transaction=False) as pipeline:
            _write(pipeline, worker_id, {"status": status.word, "last_seen": utc_now(), **_task_field(status)})
            name = {"RUNNING": "task_id", "IDLE": "last_task"}.get(status.word)
            payload = {name: status.task_id} if name is not None and status.task_id is not None else {}
            _publish(pipeline, "STATUS", worker_id, status=status.word, payload=payload)
            await pipeline.execute()

    async def heartbeat(self, worker_id: str, metrics: dict[str, Any]) -> None:
        """Renew the heartbeat key, and publish HEARTBEAT."""
        async with self.client.pipeline(transaction=False) as pipeline:
            self._set_heartbeat(pipeline, worker_id)
            pipeline.hset(worker_key(worker_id), "last_seen", utc_now())
            _publish(pipeline, "HEARTBEAT", worker_id, metrics=metrics)
            await pipeline.execute()

    async def unregister(self, worker_id: str, payload: dict[str, Any]) -> None:
        """Delete the record, and publish UNREGISTER."""
        async with self.client.pipeline(transaction=True) as pipeline:
            pipeline.srem(WORKER_IDS, worker_id)
            pipeline.delete(worker_key(worker_id), heartbeat_key(worker_id))
            _publish(pipeline, "UNREGISTER", worker_id, payload=payload)
            await pipeline.execute()

    def _set_heartbeat(self, pipeline: redis.client.Pipeline, worker_id: str) -> None:
        pipeline.set(heartbeat_key(worker_id), utc_now(), ex=self._ttl_s)


def _publish(pipeline: redis.client.Pipeline, kind: str, worker_id: str, **fields: Any) -> None:
    event = WorkerEvent(type=kind, ts=utc_now(), worker_id=worker_id, **fields)
    pipeline.publish(EVENTS_CHANNEL, encode(event))


def _write(pipeline: redis.client.Pipeline, worker_id: str, fields: Mapping[str, str | bytes]) -> None:
    pipeline.hset(worker_key(worker_id), items=[part for pair in fields.items() for part in pair])


def _task_field(status: Status) -> dict[str, str]:
    if status.task_id is None:
        return {}
    return {"extra_task_id" if status.word == "RUNNING" else "extra_last_task": status.task_id}
