"""One worker's Redis registration: hash, status and heartbeat, restored whatever happens to Redis.

The desired state is kept here. One loop brings Redis into agreement with it, and starts over after any error; a second
one sends the heartbeats.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from loguru import logger

from flowmesh.backoff import Backoff
from flowmesh.bus.connection import RedisError, redis
from flowmesh.bus.connection_health import ConnectionHealth, describe_redis_error
from flowmesh.bus.exchange import leave_replica
from flowmesh.bus.worker_record import Copied, Displaced, Found, Identity, Status, WorkerRecord
from flowmesh.cancellation import run_all
from flowmesh.errors import BusyError

__all__ = ["Identity", "Presence", "Status"]

CHECK_INTERVAL_S = 5.0
"""How often the registration is checked. It can disappear: the orchestrator empties its database when it exits."""
ABSENT_CHECKS = 3
"""How many checks in a row another node with our id must be missing in before we take the id."""
RIVAL_BEATS = 1.5
RIVAL_MARGIN_S = 2.0
RIVAL_LOOK_S = 0.5
"""At a start: how long another node's next heartbeat is waited for, in its intervals, and how often we look."""
LOOKS_S = (0.2, 1.0, 5.0)
"""After a task's end was reported: when to look for an IDLE that the orchestrator wrote in answer, while the next task
runs already."""


class _Event(msgspec.Struct):
    """What is read of a worker's event."""

    type: str = ""
    worker_id: str = ""
    status: str | None = None


_event_decoder = msgspec.json.Decoder(_Event)


class Presence:
    """Keeps one worker registered.

    Args:
        interval_s: between two heartbeats.
        metrics: what a heartbeat carries; awaited each time, must be quick.
        power: `power_metrics` of REGISTER; None leaves it out.
        farewell: the payload of UNREGISTER.
        on_left_over: called where a registration existed before ours: the previous process ended without unregistering,
            and what was dispatched to it since is lost.
        on_rival: called with the reason when another live node has this worker id, and with "" when it is ours again.
        on_copied: gives another owner, where the other node is a copy of this process.
        elastic: whether the orchestrator may disable the worker.
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
        on_rival: Callable[[str], None] = lambda _reason: None,
        on_copied: Callable[[], str] = lambda: secrets.token_hex(8),
        elastic: bool = True,
    ) -> None:
        self.identity = identity
        self.status = Status("STARTING")
        """The desired status."""
        self.up = False
        """Whether Redis agrees with the desired state."""
        self.disabled = False
        """Whether elastic scaling had disabled the worker when it was looked at last."""
        self.trouble = ConnectionHealth(
            "registration not up to date", "registration up to date again", worker=identity.worker_id
        )
        self.beats = ConnectionHealth("heartbeats fail", "heartbeats are sent again", worker=identity.worker_id)
        self.late_s: deque[float] = deque(maxlen=1000)
        """How late each heartbeat was, in seconds; for `flowmesh status` and the benchmark."""
        self._needle = identity.worker_id.encode()
        self._client = client
        self._record = WorkerRecord(client, interval_s=interval_s)
        self._interval_s = interval_s
        self._metrics = metrics
        self._power = power
        self._farewell = farewell
        self._on_left_over: Callable[[], None] | None = on_left_over
        self._on_rival = on_rival
        self._on_copied = on_copied
        self._suspects = False
        """Whether another node may have registered the id a moment ago."""
        self._elastic = elastic
        self._enabled_times = 0
        self._registered = False
        self._renew = False
        """Whether to unregister and register again."""
        self._differed = False
        """Whether the last check found another status than ours."""
        self._changes: deque[Status] = deque()
        self._changed = asyncio.Event()
        self._looks: list[float] = []
        """When to look at the status, monotonic, in order."""

    @property
    def worker_id(self) -> str:
        return self.identity.worker_id

    def set_status(self, word: str, task_id: str | None = None, reason: str = "") -> None:
        """Set the desired status. Returns at once; the changes are published in order."""
        status = Status(word, task_id, reason)
        if status == self.status:
            return
        self.status = status
        self._changes.append(status)
        self._changed.set()

    def restate(self) -> None:
        """Publish the status once more: the orchestrator writes that field too, and may have written an old one."""
        if not self._changes:
            self._changes.append(self.status)
            self._changed.set()

    def describe(self, identity: Identity) -> None:
        """Register with another description, if it is another one. The orchestrator keeps what it has dispatched."""
        if identity != self.identity:
            self.identity = identity
            self._registered = False
            self._changed.set()

    def look_soon(self) -> None:
        """Look at the status in a moment and a few seconds later: the orchestrator is about to write it."""
        now, earlier = time.monotonic(), 0.0
        for after_s in LOOKS_S:
            if not any(now + earlier < look <= now + after_s for look in self._looks):
                self._looks.append(now + after_s)
            earlier = after_s
        self._looks.sort()
        self._changed.set()

    def on_event(self, event: bytes) -> None:
        """A message on the channel of workers' events.

        Where another process reports this worker idle, look at once; where it may have registered it, check at once.
        """
        if self._needle not in event or not (b"REGISTER" in event or b"STATUS" in event):
            return
        if self.status.word == "IDLE" and b"REGISTER" not in event:
            return
        try:
            heard = _event_decoder.decode(event)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        if heard.worker_id != self.worker_id:
            return
        if heard.type == "REGISTER" and self.up:
            self._suspects = True
            self._changed.set()
        elif heard.type == "STATUS" and heard.status == "IDLE" and self.status.word != "IDLE":
            self._looks.insert(0, time.monotonic())
            self._changed.set()

    def reannounce(self) -> None:
        """UNREGISTER and REGISTER again: the orchestrator then requeues what it dispatched and we never received."""
        self._renew = True
        self._changed.set()

    async def claim(self) -> None:
        """Take the worker id before anything is done under it. Where Redis does not answer, `run` does it later.

        A rival that does not renew its heartbeat key while we look is dead, as after a crash of another node.

        Raises:
            BusyError: another live node has it.
        """
        try:
            rival = first = await self._record.claim(self.identity)
            if first is None:
                return
            limit_s = RIVAL_BEATS * first.interval_s + RIVAL_MARGIN_S
            logger.bind(worker=self.worker_id).warning(
                "another node has registered this worker id; looking for its next heartbeat, {:.0f} s at most", limit_s
            )
            end = time.monotonic() + limit_s
            while rival == first and time.monotonic() < end:
                await asyncio.sleep(RIVAL_LOOK_S)
                rival = await self._record.claim(self.identity)
            if rival == first:
                rival = await self._record.claim(self.identity, over=first)
        except (RedisError, OSError, TimeoutError) as error:
            logger.bind(worker=self.worker_id).warning("worker id not claimed yet: {}", describe_redis_error(error))
            return
        if rival is not None:
            raise BusyError(
                f"node.worker_id: a live node (pid {rival.pid} on its machine) is registered as {self.worker_id!r} "
                "already; stop it, or give this one another worker_id (WORKER_ID)"
            )

    async def run(self) -> None:
        """Keep the worker registered until cancelled."""
        await run_all(self._synchronise(), self._beat())

    async def unregister(self, timeout_s: float) -> None:
        """Unregister. Best effort: if Redis is unreachable, the heartbeat key's TTL ends the registration."""
        try:
            await asyncio.wait_for(self._unregister(), timeout_s)
        except Displaced:
            return  # it is the other node's registration
        except (RedisError, OSError, TimeoutError) as error:
            logger.bind(worker=self.worker_id).warning(
                "not unregistered, the heartbeat key will expire instead: {}", describe_redis_error(error)
            )

    async def _synchronise(self) -> None:
        backoff = Backoff()
        check_at = time.monotonic() + CHECK_INTERVAL_S
        while True:
            try:
                if self._renew or not self._registered:
                    await self._register()
                while self._changes:
                    await self._record.announce(self.worker_id, self._changes[0])
                    self._changes.popleft()
                if not self.up:
                    self.up = True
                    self.trouble.works()
                    backoff.reset()
                self._changed.clear()
                if self._renew or not self._registered or self._changes:
                    continue
                now = time.monotonic()
                if now >= check_at:
                    check_at = now + CHECK_INTERVAL_S
                    self._registered = await self._check()
                elif self._suspects:
                    self._suspects = False
                    await self._find()
                elif self._looks and now >= self._looks[0]:
                    self._looks = [look for look in self._looks if look > now]
                    await self._look()
                else:
                    until = min([check_at, *self._looks[:1]])
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(until - now):
                            await self._changed.wait()
            except Displaced as error:
                await self._stand_back(error)
            except (RedisError, OSError, TimeoutError) as error:
                self.up = False
                self.trouble.failed(error)
                await leave_replica(self._client, error)
                await asyncio.sleep(backoff.next_s())

    async def _stand_back(self, displaced: Displaced) -> None:
        """Wait until the other node is gone for good; meanwhile nothing is written under the id.

        Also after the orchestrator has emptied its database: the node that has the id registers again first.
        """
        self.up = self._registered = False
        if isinstance(displaced, Copied):
            self.identity = msgspec.structs.replace(self.identity, owner=self._on_copied())
        logger.bind(worker=self.worker_id).error("{}: this node takes no tasks while it lives", displaced)
        self._on_rival(str(displaced))
        absent = 0
        while absent < ABSENT_CHECKS:
            await asyncio.sleep(CHECK_INTERVAL_S)
            try:
                rival = (await self._record.find(self.identity)).rival
            except (RedisError, OSError, TimeoutError):
                absent = 0
                continue
            absent = absent + 1 if rival is None else 0
        logger.bind(worker=self.worker_id).info("the other node is gone: the worker id is this node's again")
        self._on_rival("")

    async def _beat(self) -> None:
        due = time.monotonic() + self._interval_s
        while True:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self.late_s.append(time.monotonic() - due)
            due = max(due + self._interval_s, time.monotonic())  # after a suspend, one heartbeat and not a burst
            if not self._registered:
                continue
            try:
                await self._record.heartbeat(self.worker_id, await self._metrics())
            except (RedisError, OSError, TimeoutError) as error:
                self.beats.failed(error)
                await leave_replica(self._client, error)
            else:
                self.beats.works()

    async def _check(self) -> bool:
        """Whether the registration still exists. A status that is not ours is corrected."""
        found = await self._find()
        self.disabled = found.disabled and self._elastic
        if found.disabled and not self._elastic:
            await self._enable()
        differed, self._differed = self._differed, found.registered and found.status != self.status.word
        if self._differed and (found.status == "IDLE" or differed):
            # IDLE: the orchestrator wrote it late, for an earlier task. RUNNING may be right, for a task that is on its
            # way to us; if the next check finds it again, that task was lost.
            self.restate()
        if not found.registered:
            logger.bind(worker=self.worker_id).warning("registration missing in Redis: registering again")
        return found.registered

    async def _find(self) -> Found:
        """What Redis has of the worker. Raises Displaced where that is another node's, or a copy's of this one."""
        await self._record.renew(self.identity)
        found = await self._record.find(self.identity)
        if found.rival is not None:
            raise Displaced(found.rival)
        return found

    async def _enable(self) -> None:
        """Undo what `node.elastic_scaling = false` does not allow."""
        await self._record.enable(self.worker_id)
        self._enabled_times += 1
        if self._enabled_times == 1 or self._enabled_times % 100 == 0:
            logger.bind(worker=self.worker_id, times=self._enabled_times).warning(
                "the orchestrator disabled this worker (workers:elastic_disabled); taken out again, as "
                "node.elastic_scaling is false"
            )

    async def _look(self) -> None:
        """Correct an IDLE that the orchestrator wrote for an earlier task. `_check` sees to all else."""
        found = await self._record.find(self.identity)
        if found.registered and found.status == "IDLE" and self.status.word != "IDLE":
            self.restate()

    async def _register(self) -> None:
        if self._on_left_over is not None:
            if await self._record.is_left_over(self.worker_id):
                self._on_left_over()
            self._on_left_over = None
        if self._renew:
            self._renew = False  # cleared first: a request that comes during the next line must not be lost
            try:
                await self._unregister()
            except BaseException:
                self._renew = True
                raise
        status = self.status
        self._changes.clear()
        await self._record.register(self.identity, status, self._power())
        self._registered = True
        logger.bind(worker=self.worker_id, status=status.word).info("registered")
        if status.word == "IDLE":
            # An orchestrator that waits for STATUS events only would not notice an idle worker otherwise.
            self._changes.appendleft(status)  # before a change that came while it registered

    async def _unregister(self) -> None:
        await self._record.unregister(self.identity, self._farewell())
        self._registered = False
        logger.bind(worker=self.worker_id).info("unregistered")
