"""One worker's face in Redis: its registration, status and heartbeat, kept true whatever happens to Redis.

What is wanted is state here; one loop makes Redis agree with it, and starts over after any error.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from loguru import logger

from flowmesh.bus.backoff import Backoff
from flowmesh.bus.connection import RedisError, leave_replica, redis
from flowmesh.bus.trouble import Trouble, in_words
from flowmesh.messages.wire import (
    EVENTS_CHANNEL,
    WORKER_IDS,
    WorkerEvent,
    encode,
    heartbeat_key,
    heartbeat_ttl_s,
    utc_now,
    worker_key,
)

CHECK_INTERVAL_S = 5.0
"""How often it looks whether the registration is still there (the orchestrator empties its database when it exits)."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of itself when it registers."""

    worker_id: str
    pid: int
    started_at: str
    cost_per_hour: float
    tags: tuple[str, ...]
    env: dict[str, Any]
    hardware: Any


class Status(msgspec.Struct, frozen=True):
    word: str
    task_id: str | None = None
    """The task that runs (RUNNING), or the last one (IDLE)."""


class Presence:
    """Announces one worker.

    Args:
        metrics: what a heartbeat carries; awaited each time, must be quick.
        farewell: the payload of UNREGISTER.
        on_left_over: told where our registration was there before we made it: the node before us went without a word,
            and what was dispatched to it since is gone.
    """

    def __init__(
        self,
        client: redis.Redis,
        identity: Identity,
        *,
        interval_s: float,
        metrics: Callable[[], Awaitable[dict[str, Any]]],
        power: Callable[[], dict[str, Any] | None],
        farewell: Callable[[], dict[str, Any]],
        on_left_over: Callable[[], None],
    ) -> None:
        self.identity = identity
        self.status = Status("STARTING")
        self.up = False
        """Whether Redis knows what we want it to."""
        self.trouble = Trouble("not announced", "announced again", worker=identity.worker_id)
        self.beats = Trouble("heartbeats are lost", "heartbeats arrive again", worker=identity.worker_id)
        self.late_s: deque[float] = deque(maxlen=1000)
        """How late each heartbeat left; for `flowmesh status` and the benchmark."""
        self._client = client
        self._interval_s = interval_s
        self._metrics = metrics
        self._power = power
        self._farewell = farewell
        self._on_left_over: Callable[[], None] | None = on_left_over
        self._registered = False
        self._gone = False
        """To be announced anew, with a farewell first."""
        self._differs = False
        """Whether the last check found another status than ours."""
        self._changes: deque[Status] = deque()
        self._changed = asyncio.Event()

    @property
    def worker_id(self) -> str:
        return self.identity.worker_id

    # ---- what the supervisor says ------------------------------------------------------------------------------------

    def set_status(self, word: str, task_id: str | None = None) -> None:
        """From now on this is the status. Returns at once; Redis hears of it in order."""
        status = Status(word, task_id)
        if status == self.status:
            return
        self.status = status
        self._changes.append(status)
        self._changed.set()

    def restate(self) -> None:
        """Say the status once more: the orchestrator writes that field too, and may have been behind."""
        if not self._changes:
            self._changes.append(self.status)
            self._changed.set()

    def reannounce(self) -> None:
        """UNREGISTER and REGISTER anew: what was dispatched to us and never arrived is then queued again."""
        self._gone = True
        self._changed.set()

    # ---- the loop ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep Redis in agreement until cancelled."""
        await asyncio.gather(self._agree(), self._beat())

    async def unregister(self, timeout_s: float) -> None:
        """Say farewell. Where Redis does not answer, the heartbeat key's TTL says it for us."""
        try:
            await asyncio.wait_for(self._unregister(), timeout_s)
        except (RedisError, OSError, TimeoutError) as error:
            logger.bind(worker=self.worker_id).warning("left without a farewell: {}", in_words(error))

    async def _agree(self) -> None:
        backoff = Backoff()
        while True:
            try:
                if self._gone or not self._registered:
                    await self._register()
                while self._changes:
                    await self._announce(self._changes[0])
                    self._changes.popleft()
                if not self.up:
                    self.up = True
                    self.trouble.over()
                    backoff.reset()
                self._changed.clear()
                if self._gone or not self._registered or self._changes:
                    continue
                try:
                    async with asyncio.timeout(CHECK_INTERVAL_S):
                        await self._changed.wait()
                except TimeoutError:
                    self._registered = await self._is_registered()
            except (RedisError, OSError, TimeoutError) as error:
                self.up = False
                self.trouble.met(error)
                await leave_replica(self._client, error)
                await asyncio.sleep(backoff.next_s())

    async def _beat(self) -> None:
        due = time.monotonic() + self._interval_s
        while True:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self.late_s.append(time.monotonic() - due)
            due = max(due + self._interval_s, time.monotonic())  # after a suspended machine, one beat and not a burst
            if not self._registered:
                continue
            try:
                await self._heartbeat()
            except (RedisError, OSError, TimeoutError) as error:
                self.beats.met(error)
                await leave_replica(self._client, error)
            else:
                self.beats.over()

    # ---- what Redis is told ------------------------------------------------------------------------------------------

    async def _is_registered(self) -> bool:
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.sismember(WORKER_IDS, self.worker_id)
            pipeline.hmget(worker_key(self.worker_id), "pid", "status")
            member, (pid, status) = await pipeline.execute()
        there = bool(member) and pid == str(self.identity.pid).encode()
        differed, self._differs = self._differs, there and status != self.status.word.encode()
        if self._differs and (status == b"IDLE" or differed):
            # The orchestrator said so of an earlier task, and was behind. Or it said RUNNING of one that never ran
            # here: at the second look, as at the first one may be on its way to us.
            self.restate()
        if not there:
            logger.bind(worker=self.worker_id).warning("the registration is gone: registering again")
        return there

    async def _register(self) -> None:
        if self._on_left_over is not None:
            if await self._client.hexists(worker_key(self.worker_id), "pid"):
                self._on_left_over()
            self._on_left_over = None
        if self._gone:
            self._gone = False  # before: should it be asked for once more meanwhile, it is done once more
            try:
                await self._unregister()
            except BaseException:
                self._gone = True
                raise
        identity, status = self.identity, self.status
        self._changes.clear()
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
            **_extra(status),
        }
        payload = {"env": identity.env, "hardware": identity.hardware, "cost_per_hour": identity.cost_per_hour}
        if (power := self._power()) is not None:
            payload["power_metrics"] = power
        async with self._client.pipeline(transaction=True) as pipeline:
            _write(pipeline, identity.worker_id, fields)
            self._set_heartbeat(pipeline)
            pipeline.sadd(WORKER_IDS, identity.worker_id)
            self._publish(pipeline, "REGISTER", status=status.word, tags=identity.tags, payload=payload)
            await pipeline.execute()
        self._registered = True
        logger.bind(worker=identity.worker_id, status=status.word).info("registered")
        if status.word == "IDLE":
            # The orchestrator learns of an idle worker from a STATUS event too; without it, one that
            # listens only to changes would leave us waiting.
            self._changes.append(status)

    async def _announce(self, status: Status) -> None:
        async with self._client.pipeline(transaction=False) as pipeline:  # in order is enough: the hash, then the word
            _write(pipeline, self.worker_id, {"status": status.word, "last_seen": utc_now(), **_extra(status)})
            name = {"RUNNING": "task_id", "IDLE": "last_task"}.get(status.word)
            payload = {name: status.task_id} if name is not None and status.task_id is not None else {}
            self._publish(pipeline, "STATUS", status=status.word, payload=payload)
            await pipeline.execute()

    async def _heartbeat(self) -> None:
        metrics = await self._metrics()
        async with self._client.pipeline(transaction=False) as pipeline:
            self._set_heartbeat(pipeline)
            pipeline.hset(worker_key(self.worker_id), "last_seen", utc_now())
            self._publish(pipeline, "HEARTBEAT", metrics=metrics)
            await pipeline.execute()

    async def _unregister(self) -> None:
        async with self._client.pipeline(transaction=True) as pipeline:
            pipeline.srem(WORKER_IDS, self.worker_id)
            pipeline.delete(worker_key(self.worker_id), heartbeat_key(self.worker_id))
            self._publish(pipeline, "UNREGISTER", payload=self._farewell())
            await pipeline.execute()
        self._registered = False
        logger.bind(worker=self.worker_id).info("unregistered")

    def _set_heartbeat(self, pipeline: redis.client.Pipeline) -> None:
        pipeline.set(heartbeat_key(self.worker_id), utc_now(), ex=heartbeat_ttl_s(self._interval_s))

    def _publish(self, pipeline: redis.client.Pipeline, kind: str, **fields: Any) -> None:
        event = WorkerEvent(type=kind, ts=utc_now(), worker_id=self.worker_id, **fields)
        pipeline.publish(EVENTS_CHANNEL, encode(event))


def _write(pipeline: redis.client.Pipeline, worker_id: str, fields: Mapping[str, str | bytes]) -> None:
    pipeline.hset(worker_key(worker_id), items=[part for pair in fields.items() for part in pair])


def _extra(status: Status) -> dict[str, str]:
    if status.task_id is None:
        return {}
    return {"extra_task_id" if status.word == "RUNNING" else "extra_last_task": status.task_id}
