"""One worker's record in Redis: its hash, its heartbeat key, its id in the set of workers; and its events.

Each method is one pipeline. `presence` decides when to call which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from flowmesh.bus.connection import redis
from flowmesh.bus.exchange import Command, exchange
from flowmesh.bus.ownership import Ownership
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

DEGRADED_FIELD = "degraded"
"""In the hash and in STATUS: why the worker takes no tasks; absent while it does."""
METRICS_FIELD = "metrics_json"
"""In the hash: what the last heartbeat carried, for who was not there when it was published."""
OWNER = "flowmesh_owner"
"""The hash's field with the owner."""
TOKEN = "flowmesh_token"
"""The hash's field with the last token of that owner's process."""
_RIVAL_FIELDS = (OWNER, "pid", "env_json", TOKEN)
_WATCH_TRIES = 10
_INTERVAL_S = 30.0
"""Where a registration does not tell its heartbeat interval."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker registers with."""

    worker_id: str
    pid: int
    started_at: str
    cost_per_hour: float
    tags: tuple[str, ...]
    env: dict[str, Any]
    hardware: Any
    owner: str = ""
    """Tells nodes of one worker id apart. Empty: nothing is compared."""


class Status(msgspec.Struct, frozen=True):
    """A worker's status and the task it concerns."""

    word: str
    task_id: str | None = None
    """The task that runs (RUNNING), or the last one (IDLE)."""
    reason: str = ""
    """Why it takes no tasks (DEGRADED); empty otherwise."""


class Rival(msgspec.Struct, frozen=True):
    """Another node with the same worker id, whose heartbeat key exists."""

    owner: str
    beat: str
    """When it last renewed the key, as it wrote it."""
    pid: str
    interval_s: float
    """Between its heartbeats."""


class Displaced(Exception):
    """Another live node has registered this worker id."""

    def __init__(self, rival: Rival) -> None:
        super().__init__(f"another live node has this worker id (owner {rival.owner}, pid {rival.pid})")
        self.rival = rival


class Copied(Displaced):
    """A copy of this very process, as of a machine that was resumed twice, has registered this worker id."""

    def __str__(self) -> str:
        return "a copy of this node, as of a machine's snapshot, runs beside it and has its worker id"


class Found(msgspec.Struct, frozen=True):
    """What Redis has of the worker."""

    registered: bool
    """By this process."""
    status: str
    disabled: bool
    """Whether the orchestrator's elastic scaling has disabled it."""
    rival: Rival | None = None
    """Another live node that has the id."""


class WorkerRecord:
    """Reads and writes one worker's record.

    Args:
        interval_s: between two heartbeats; sets the TTL of the heartbeat key.

    Raises (from its methods):
        RedisError, OSError, TimeoutError: Redis is unreachable or refused a command.
    """

    def __init__(self, client: redis.Redis, *, interval_s: float) -> None:
        self.client = client
        self.ownership = Ownership()
        self._ttl_s = heartbeat_ttl_s(interval_s)
        self._degraded = True
        """Whether the hash may hold a reason why the worker takes no tasks."""

    async def is_left_over(self, worker_id: str) -> bool:
        """Whether a registration of this id exists."""
        return bool(await self.client.hexists(worker_key(worker_id), "pid"))

    async def find(self, identity: Identity) -> Found:
        member, (status, *fields), beat, disabled = await exchange(
            self.client,
            ("SISMEMBER", WORKER_IDS, identity.worker_id),
            ("HMGET", worker_key(identity.worker_id), "status", *_RIVAL_FIELDS),
            ("GET", heartbeat_key(identity.worker_id)),
            ("SISMEMBER", DISABLED, identity.worker_id),
            transaction=True,
        )
        owner, pid, *_ = fields
        ours = not identity.owner or owner == identity.owner.encode()
        registered = bool(member) and ours and pid == str(identity.pid).encode()
        rival = _rival(identity, fields, beat)
        return Found(registered, (status or b"").decode(errors="replace"), bool(disabled), rival)

    async def enable(self, worker_id: str) -> None:
        """Take the worker out of the set of those that elastic scaling has disabled."""
        await self.client.srem(DISABLED, worker_id)

    async def claim(self, identity: Identity, *, over: Rival | None = None) -> Rival | None:
        """Take the worker id, unless another live node has it. Atomic: of two nodes that try, one gets it.

        Args:
            over: a rival that is known to be dead; one that has written since is alive.

        Returns:
            the node that has it; None: it is ours.
        """

        def write(pipeline: redis.client.Pipeline) -> None:
            pipeline.hset(worker_key(identity.worker_id), OWNER, identity.owner)
            if identity.owner:
                pipeline.hset(worker_key(identity.worker_id), TOKEN, self.ownership.draw())
            self._set_heartbeat(pipeline, identity.worker_id)

        return await self._guarded(identity, write, over=over)

    async def _guarded(
        self, identity: Identity, write: Callable[[redis.client.Pipeline], None], *, over: Rival | None = None
    ) -> Rival | None:
        """`write`, in one transaction, unless a rival has the id: it is returned, and nothing is written."""
        key, beat_key = worker_key(identity.worker_id), heartbeat_key(identity.worker_id)
        async with self.client.pipeline(transaction=True) as pipeline:
            for _ in range(_WATCH_TRIES):
                await pipeline.watch(key, beat_key)
                fields: Any = await pipeline.hmget(key, *_RIVAL_FIELDS)
                beat: Any = await pipeline.get(beat_key)
                rival = _rival(identity, fields, beat)
                if rival is not None and rival != over:
                    return rival
                if rival is None:
                    self._check_token(identity, fields, beat)
                pipeline.multi()  # type: ignore[no-untyped-call]
                write(pipeline)
                try:
                    await pipeline.execute()
                except redis.WatchError:
                    continue
                self.ownership.began = True
                return None
        raise TimeoutError("the registration changes all the time")

    async def register(self, identity: Identity, status: Status, power: dict[str, Any] | None) -> None:
        """Write the whole record, and publish REGISTER.

        Args:
            power: `power_metrics`; None: left out.

        Raises:
            Displaced: another live node has the id; nothing was written.
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
            **_status_fields(status),
        }
        payload = {"env": identity.env, "hardware": identity.hardware, "cost_per_hour": identity.cost_per_hour}
        if power is not None:
            payload["power_metrics"] = power
        if identity.owner:
            fields[OWNER] = identity.owner

        self._degraded = True

        def write(pipeline: redis.client.Pipeline) -> None:
            if not status.reason:
                pipeline.hdel(worker_key(identity.worker_id), DEGRADED_FIELD)
            pipeline.execute_command(*_set(identity.worker_id, fields))
            if identity.owner:
                pipeline.hset(worker_key(identity.worker_id), TOKEN, self.ownership.draw())
            self._set_heartbeat(pipeline, identity.worker_id)
            pipeline.sadd(WORKER_IDS, identity.worker_id)
            _publish(pipeline, "REGISTER", identity.worker_id, status=status.word, tags=identity.tags, payload=payload)

        if (rival := await self._guarded(identity, write)) is not None:
            raise Displaced(rival)

    async def renew(self, identity: Identity) -> None:
        """Replace the token by the next one; does nothing where the registration is gone or another owner's.

        Raises:
            Copied: the token is none of ours.
        """
        key = worker_key(identity.worker_id)
        async with self.client.pipeline(transaction=True) as pipeline:
            for _ in range(_WATCH_TRIES if identity.owner else 0):
                await pipeline.watch(key)
                fields: Any = await pipeline.hmget(key, *_RIVAL_FIELDS)
                if fields[0] != identity.owner.encode():
                    return
                self._check_token(identity, fields, b"")
                pipeline.multi()  # type: ignore[no-untyped-call]
                pipeline.hset(key, TOKEN, self.ownership.draw())
                try:
                    await pipeline.execute()
                except redis.WatchError:
                    continue
                return

    def _check_token(self, identity: Identity, fields: Sequence[bytes | None], beat: bytes | None) -> None:
        """Raises Copied where a living registration of our owner has a token that is none of ours."""
        owner, pid, env, token = fields
        if beat is None or not identity.owner or owner != identity.owner.encode() or self.ownership.is_ours(token):
            return
        raise Copied(Rival(_text(owner), _text(beat), _text(pid or b"?"), _interval_s(env)))

    async def announce(self, worker_id: str, status: Status) -> None:
        """Write the status, and publish STATUS. No transaction: the order (hash, then event) is enough."""
        name = {"RUNNING": "task_id", "IDLE": "last_task"}.get(status.word)
        payload = {name: status.task_id} if name is not None and status.task_id is not None else {}
        if status.reason:
            payload[DEGRADED_FIELD] = status.reason
        fields = {"status": status.word, "last_seen": utc_now(), **_status_fields(status)}
        clear = () if status.reason or not self._degraded else (("HDEL", worker_key(worker_id), DEGRADED_FIELD),)
        self._degraded = True
        await exchange(
            self.client,
            _set(worker_id, fields),
            *clear,
            _publishing("STATUS", worker_id, status=status.word, payload=payload),
        )
        self._degraded = bool(status.reason)

    async def heartbeat(self, worker_id: str, metrics: dict[str, Any]) -> None:
        """Renew the heartbeat key, and publish HEARTBEAT."""
        now = utc_now()
        await exchange(
            self.client,
            ("SET", heartbeat_key(worker_id), now, "EX", str(self._ttl_s)),
            _set(worker_id, {"last_seen": now, METRICS_FIELD: encode(metrics)}),
            _publishing("HEARTBEAT", worker_id, metrics=metrics),
        )

    async def unregister(self, identity: Identity, payload: dict[str, Any]) -> None:
        """Delete the record, and publish UNREGISTER.

        Raises:
            Displaced: it is another live node's; it stays.
        """
        worker_id = identity.worker_id

        def write(pipeline: redis.client.Pipeline) -> None:
            pipeline.srem(WORKER_IDS, worker_id)
            pipeline.delete(worker_key(worker_id), heartbeat_key(worker_id))
            _publish(pipeline, "UNREGISTER", worker_id, payload=payload)

        if (rival := await self._guarded(identity, write)) is not None:
            raise Displaced(rival)

    def _set_heartbeat(self, pipeline: redis.client.Pipeline, worker_id: str) -> None:
        pipeline.set(heartbeat_key(worker_id), utc_now(), ex=self._ttl_s)


def _rival(identity: Identity, fields: Sequence[bytes | None], beat: bytes | None) -> Rival | None:
    owner, pid, env, _ = fields
    if not identity.owner or not owner or beat is None or owner == identity.owner.encode():
        return None
    return Rival(_text(owner), _text(beat), _text(pid or b"?"), _interval_s(env))


def _interval_s(env: bytes | None) -> float:
    try:
        return float(msgspec.json.decode(env or b"{}")["HEARTBEAT_INTERVAL_SEC"])
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        return _INTERVAL_S


def _text(value: bytes) -> str:
    return value.decode(errors="replace")


def _publish(pipeline: redis.client.Pipeline, kind: str, worker_id: str, **fields: Any) -> None:
    pipeline.execute_command(*_publishing(kind, worker_id, **fields))


def _publishing(kind: str, worker_id: str, **fields: Any) -> Command:
    return "PUBLISH", EVENTS_CHANNEL, encode(WorkerEvent(type=kind, ts=utc_now(), worker_id=worker_id, **fields))


def _set(worker_id: str, fields: Mapping[str, str | bytes]) -> Command:
    return "HSET", worker_key(worker_id), *(part for pair in fields.items() for part in pair)


def _status_fields(status: Status) -> dict[str, str]:
    fields = {DEGRADED_FIELD: status.reason} if status.reason else {}
    if status.task_id is not None:
        fields["extra_task_id" if status.word == "RUNNING" else "extra_last_task"] = status.task_id
    return fields
