"""The node's side of the deployment's queue: claims, reports, take-overs, preemption, logs; on its own connections.

A login that may not use the queue's keys or channel loses the queue and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from flowmesh.bus.connection import redis
from flowmesh.bus.subscriber import Subscriber
from flowmesh.execution.executor import Executor
from flowmesh.execution.observer import Observer
from flowmesh.orchestrator.claims import Claims
from flowmesh.orchestrator.dispatcher import Dispatcher
from flowmesh.orchestrator.gang_members import Ends, GangMembers
from flowmesh.orchestrator.log_feed import LogFeeds, LogRequest
from flowmesh.orchestrator.next_task import NextTask
from flowmesh.orchestrator.pipeline_drivers import PipelineDrivers
from flowmesh.orchestrator.preemption import Preemption
from flowmesh.orchestrator.record_sender import RecordSender
from flowmesh.orchestrator.registration import Registration
from flowmesh.orchestrator.take_over import TakeOver
from flowmesh.orchestrator.wake_ups import POLL_S
from flowmesh.queue import names

Reach = Callable[..., redis.Redis]
"""`bus.connection.connect` for this node's Redis: `name`, `users`, `timeout_s`."""


class _Message(msgspec.Struct, frozen=True):
    type: str = ""


_decoder = msgspec.json.Decoder(_Message)
_request_decoder = msgspec.json.Decoder(LogRequest)
_ends_decoder = msgspec.json.Decoder(Ends)


class QueueLink(Observer):
    """
    Args:
        reach: makes a client.
        name: shows in Redis' list of its clients.
    """

    def __init__(
        self,
        executor: Executor,
        dispatcher: Dispatcher,
        registration: Registration,
        reach: Reach,
        *,
        name: str,
        node_id: str,
    ) -> None:
        settings = executor.settings
        self._enabled = settings.queue.enabled
        client = reach(name=f"flowmesh-{name}-queue", users=8)
        self._clients = [client]
        self.sender = RecordSender(executor, client, node_id, registration.on_events_sent)
        self._feeds = LogFeeds(executor, client)
        self._members = GangMembers(executor, client, settings.queue.take_over_after_s)
        self.claims: Claims | None = None
        self.drivers: PipelineDrivers | None = None
        self._works: list[Callable[[], Coroutine[Any, Any, None]]] = []
        executor.observers.add(self)
        listener = reach(name=f"flowmesh-{name}-queue-sub")
        self._subscriber = Subscriber(
            listener,
            {names.CHANNEL: self._on_message},
            self._on_subscribed,
            lambda: None,
            silence_s=settings.redis.health_check_interval_s,
            what=names.CHANNEL,
        )
        self._clients.append(listener)
        self._works.append(self._members.run)
        if not self._enabled:
            return
        timeout_s = settings.redis.timeout_s + POLL_S[1]
        blocked = reach(name=f"flowmesh-{name}-queue-wait", timeout_s=timeout_s)
        self._clients.append(blocked)
        self.claims = Claims(
            executor, dispatcher, registration, self.sender, client=client, blocked=blocked, node_id=node_id
        )
        executor.observers.add(self.claims)
        self._works.append(self.claims.run)
        if settings.tasks.prepare_next:
            self._works.append(NextTask(executor, self.claims).run)
        self._works.append(TakeOver(client, node_id, settings.queue.take_over_after_s).run)
        if settings.queue.pipelines:
            self.drivers = PipelineDrivers(executor, registration, client, node_id)
            self._works.append(self.drivers.run)
        self._preemption = Preemption(executor, self.claims, client)
        if settings.queue.preempt:
            self._works.append(self._preemption.run)

    def on_posted(self) -> None:
        self.sender.wake()

    def works(self) -> list[Coroutine[Any, Any, None]]:
        """What runs for as long as the node takes tasks."""
        return [self._subscriber.run(), *(work() for work in self._works)]

    def troubles(self) -> list[str]:
        """What does not work, and why; empty if all does."""
        parts = [self.sender.trouble, *([] if self.claims is None else [self.claims.trouble])]
        return [part.reason for part in parts if part]

    def summary(self) -> dict[str, Any]:
        """For `flowmesh status`: how many tasks were taken since the start, and why none are; null: some are."""
        if self.claims is None:
            return {"claimed": 0, "off": "queue.enabled is false"}
        driven = [] if self.drivers is None else self.drivers.pipelines
        return {"claimed": self.claims.claimed, "off": self.claims.refused or None, "pipelines": driven}

    async def close(self) -> None:
        self._feeds.close()
        if self.drivers is not None:
            await self.drivers.close()
        await asyncio.gather(*(client.aclose() for client in self._clients))

    def _on_subscribed(self, gap: bool) -> None:
        if gap and self.claims is not None:
            self.claims.look_again()
        if gap and self.drivers is not None:
            self.drivers.look_again()

    def _on_message(self, data: bytes) -> None:
        """A message on the queue's channel; what is not understood is another version's."""
        try:
            kind = _decoder.decode(data).type
            if kind == "LOGS":
                self._feeds.on_request(_request_decoder.decode(data))
            elif kind == "GANG_ENDS":
                self._members.on_ends(_ends_decoder.decode(data))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        if self.claims is None:
            return
        if kind in ("CLASS", "GANG") or (kind == "URGENT" and self.claims.gangs.any_wait):
            self.claims.look_again()
        if kind == "URGENT":
            self._preemption.on_urgent()
        elif kind == "PIPELINE" and self.drivers is not None:
            self.drivers.look_again()
