"""Tells when another node of the deployment is down, as its heartbeats show, and when it is back.

For each receiver one node at a time looks, under a lease in Redis. What it told is in Redis too, so that each outage is
told once, whichever node looks then. A node that unregistered is not down: its workers are no longer listed.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from loguru import logger

from flowmesh.bus.connection import RedisError, redis
from flowmesh.bus.scripts import is_forbidden
from flowmesh.bus.worker_record import OWNER
from flowmesh.messages.wire import WORKER_IDS, heartbeat_key, worker_key
from flowmesh.reporting import webhook_message
from flowmesh.reporting.webhooks import Webhooks
from flowmesh.tasks.journal import Journal, JournalError
from flowmesh.tasks.sendings_table import Sending

PREFIX = "flowmesh:notify:"
LONGEST_PAUSE_S = 10.0
INTERVALS = 2.5
"""A node counts as down after so many of its own heartbeat intervals at the earliest."""
TOLD_S = 30 * 86400
"""How long Redis keeps which nodes are down."""


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """Another node, as its workers' records have it."""

    key: str
    """Names it, and shows nothing of its secret name."""
    workers: tuple[str, ...]
    beats: tuple[str, ...]
    """What its heartbeat keys have; empty: none has one."""
    last_seen: str
    interval_s: float
    tasks: tuple[str, ...]
    """Those that it ran last."""


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """A node that was told down."""

    id: str
    beats: tuple[str, ...]
    """What its heartbeat keys had then."""


class _Seen(msgspec.Struct):
    beats: tuple[str, ...]
    since: float
    """Monotonic: since when they have not changed."""


class _Env(msgspec.Struct):
    HEARTBEAT_INTERVAL_SEC: float = 30.0


class PeerWatch:
    """
    Args:
        own: the worker ids of this node.
        client: its own connection; closed by `close`.
        on_told: called when a notification was added.
    """

    def __init__(
        self,
        webhooks: Webhooks,
        journal: Journal,
        client: redis.Redis,
        own: Sequence[str],
        on_told: Callable[[], None],
    ) -> None:
        self._webhooks = webhooks
        self._journal = journal
        self._client = client
        self._own = frozenset(own)
        self._on_told = on_told
        self._after_s = webhooks.settings.node_down_after_s
        self._pause_s = min(LONGEST_PAUSE_S, self._after_s / 4)
        self._holder: str = webhooks.node["node_id"]
        self._seen: dict[str, _Seen] = {}
        self._forbidden = False
        self._sending: dict[tuple[str, str], tuple[str, Told | None]] = {}
        """By receiver and node: the id of what is being sent, and what Redis gets then; None: the node is back."""

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(self._pause_s * random.uniform(0.8, 1.2))
            try:
                held = [key for key in self._webhooks.keys if await self._hold(key)]
                if held:
                    await self._look(held)
                else:
                    self._seen.clear()
            except (RedisError, OSError, TimeoutError, JournalError) as error:
                self._seen.clear()  # heartbeats were missed by Redis or by us: count anew
                if is_forbidden(error) and not self._forbidden:
                    self._forbidden = True
                    logger.warning(
                        "other nodes are not watched: Redis' user may not use the keys {}*: {}", PREFIX, error
                    )
            except Exception as error:  # noqa: BLE001 - the boundary: anybody may write into Redis
                self._seen.clear()
                logger.opt(exception=error).error("unhandled error in the look at other nodes")

    async def close(self) -> None:
        """Leave the leases to others."""
        try:
            async with asyncio.timeout(1.0):
                for key in self._webhooks.keys:
                    if await self._is_holder(key):
                        await self._client.delete(_lease(key))
        except (RedisError, OSError, TimeoutError):
            pass  # they expire
        await self._client.aclose()

    async def _hold(self, key: str) -> bool:
        """Take or renew the lease. Two that hold it for a moment tell with the same ids, which receivers recognise."""
        lease_ms = int(self._pause_s * 3000)
        if await self._client.set(_lease(key), self._holder, nx=True, px=lease_ms):
            return True
        return await self._is_holder(key) and bool(await self._client.pexpire(_lease(key), lease_ms))

    async def _is_holder(self, key: str) -> bool:
        holder: Any = await self._client.get(_lease(key))
        return bool(holder == self._holder.encode())

    async def _look(self, held: Sequence[str]) -> None:
        peers = await self._peers()
        now = time.monotonic()
        for peer in peers:
            seen = self._seen.setdefault(peer.key, _Seen(peer.beats, now))
            if set(peer.beats) - set(seen.beats):  # a key that expired is no sign of life
                seen.beats, seen.since = peer.beats, now
        for gone in self._seen.keys() - {peer.key for peer in peers}:
            del self._seen[gone]
        for key in held:
            await self._settle(key)
            found: Any = await self._client.hgetall(_told(key))
            told = {name.decode(errors="replace"): _decoded(value) for name, value in found.items()}
            for peer in peers:
                if (key, peer.key) not in self._sending:
                    self._compare(key, peer, told.get(peer.key))

    def _compare(self, key: str, peer: Peer, told: Told | None) -> None:
        """Tell what has changed about one node."""
        if told is None:
            silent_s = time.monotonic() - self._seen[peer.key].since
            if silent_s < max(self._after_s, INTERVALS * peer.interval_s):
                return
            id_ = "msg_" + hashlib.sha256(f"{key} {peer.key} {peer.last_seen} down".encode()).hexdigest()[:32]
            self._tell("node_down", key, peer, Told(id=id_, beats=peer.beats), id_)
        elif set(peer.beats) - set(told.beats):
            id_ = "msg_" + hashlib.sha256(f"{told.id} up".encode()).hexdigest()[:32]
            self._tell("node_up", key, peer, None, id_)

    def _tell(self, event: str, key: str, peer: Peer, told: Told | None, id_: str) -> None:
        down = event == "node_down"
        if self._webhooks.wants(event):
            body = webhook_message.of_node(peer.workers, peer.tasks, peer.last_seen, self._webhooks.node, down=down)
            self._journal.sendings.add(Sending(lane=key, id=id_, body=body), must=True)
            logger.bind(workers=",".join(peer.workers[:8])).warning("a node is {}", "down" if down else "back")
            self._on_told()
        self._sending[key, peer.key] = id_, told

    async def _settle(self, key: str) -> None:
        """Note in Redis what has been sent: from then on it is told for good, and before, by whoever looks next."""
        for (receiver, name), (id_, told) in list(self._sending.items()):
            if receiver != key or self._journal.sendings.has(key, id_):
                continue
            if told is not None:
                await self._client.hset(_told(key), name, msgspec.json.encode(told))
                await self._client.expire(_told(key), TOLD_S)
            else:
                await self._client.hdel(_told(key), name)
            del self._sending[receiver, name]

    async def _peers(self) -> list[Peer]:
        members: Any = await self._client.smembers(WORKER_IDS)
        ids = sorted(worker.decode(errors="replace") for worker in members)
        async with self._client.pipeline(transaction=False) as pipeline:
            for worker_id in ids:
                pipeline.hmget(worker_key(worker_id), OWNER, "last_seen", "env_json", "status", "extra_task_id")
                pipeline.get(heartbeat_key(worker_id))
            answers: Sequence[Any] = await pipeline.execute()
        nodes: dict[str, list[tuple[str, list[bytes | None], bytes | None]]] = {}
        for index, worker_id in enumerate(ids):
            if worker_id not in self._own:
                fields, beat = answers[2 * index], answers[2 * index + 1]
                owner = (fields[0] or b"").partition(b":")[0] or b"worker " + worker_id.encode()
                nodes.setdefault(hashlib.sha256(owner).hexdigest()[:16], []).append((worker_id, fields, beat))
        return [_peer(key, found) for key, found in nodes.items()]


def _peer(key: str, found: Sequence[tuple[str, list[bytes | None], bytes | None]]) -> Peer:
    def texts(index: int) -> list[str]:
        return [(fields[index] or b"").decode(errors="replace") for _, fields, _ in found]

    running = [task for status, task in zip(texts(3), texts(4), strict=True) if status == "RUNNING" and task]
    return Peer(
        key=key,
        workers=tuple(worker_id for worker_id, _, _ in found),
        beats=tuple(beat.decode(errors="replace") for _, _, beat in found if beat is not None),
        last_seen=max(texts(1)),
        interval_s=max(_interval_s(env) for env in texts(2)),
        tasks=tuple(running),
    )


def _interval_s(env: str) -> float:
    try:
        return msgspec.json.decode(env or "{}", type=_Env).HEARTBEAT_INTERVAL_SEC
    except (msgspec.DecodeError, UnicodeEncodeError):
        return _Env().HEARTBEAT_INTERVAL_SEC


def _decoded(value: bytes) -> Told | None:
    try:
        return msgspec.json.decode(value, type=Told)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _lease(key: str) -> str:
    return f"{PREFIX}{key}:watcher"


def _told(key: str) -> str:
    return f"{PREFIX}{key}:down"
