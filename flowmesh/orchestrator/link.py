"""The node's connections to Redis: dispatches and control messages in; events, statuses and heartbeats out."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Coroutine
from typing import Any

from flowmesh.bus.connection import connect
from flowmesh.bus.outbox import Outbox
from flowmesh.bus.stream import Stream
from flowmesh.bus.subscriber import Subscriber
from flowmesh.cancellation import run_all
from flowmesh.execution.executor import Executor
from flowmesh.execution.observer import Observer
from flowmesh.execution.run import Run
from flowmesh.messages.wire import EVENTS_CHANNEL, worker_key
from flowmesh.node.slots import Slot
from flowmesh.orchestrator import control_channel
from flowmesh.orchestrator.dispatcher import Dispatcher
from flowmesh.orchestrator.endpoints import Endpoints
from flowmesh.orchestrator.queue_link import QueueLink
from flowmesh.orchestrator.registration import Registration
from flowmesh.orchestrator.waiting_tasks import WaitingTasks
from flowmesh.orchestrator.worker_description import NodeDescription

GATHER_S = 0.05
"""How long other workers' events may wait to be read. With many nodes, a wake-up for each costs more than they do."""


class Link(Observer):
    """
    Args:
        name: shows in Redis' list of its clients.
    """

    def __init__(self, node: NodeDescription, executor: Executor, name: str) -> None:
        redis = executor.settings.redis
        assert redis.url is not None, "checked before the node starts"
        reach = functools.partial(
            connect,
            redis.url,
            password_file=redis.password_file,
            timeout_s=redis.timeout_s,
            health_check_interval_s=redis.health_check_interval_s,
        )
        users = 2 * len(executor.slots) + 3  # each worker's status and heartbeat, outbox, waiting tasks, endpoints
        client = reach(name=f"flowmesh-{name}-bus", users=users)
        listener, events = reach(name=f"flowmesh-{name}-sub"), reach(name=f"flowmesh-{name}-events")
        self._clients = [client, listener, events]
        self._slots = executor.slots
        self.registration = Registration(node, executor, client)
        self.outbox = Outbox(
            client,
            executor.journal,
            self.registration.on_events_sent,
            guard=f"{worker_key(name)}:guard",
            hold_s=redis.hold_events_s,
        )
        self.dispatcher = dispatcher = Dispatcher(executor)
        self._intake = Subscriber(
            listener,
            {
                redis.task_topic: dispatcher.on_message,
                control_channel.CHANNEL: functools.partial(control_channel.on_message, executor),
            },
            self.registration.on_subscribed,
            self.registration.on_unsubscribed,
            silence_s=redis.health_check_interval_s,
        )
        self._others = Subscriber(
            events,
            {EVENTS_CHANNEL: self.registration.on_worker_event},
            lambda _gap: None,  # the registration is checked every few seconds, too
            lambda: None,
            silence_s=redis.health_check_interval_s,
            what=EVENTS_CHANNEL,
            gather_s=GATHER_S,
        )
        self._streams: list[Stream] = []
        for worker_id, slot in executor.slots.items() if redis.stream else ():
            client = reach(name=f"flowmesh-{worker_id}-stream")
            self._clients.append(client)
            may_read = functools.partial(_has_its_id, slot)
            stream = Stream(client, worker_id, dispatcher.take, block_s=redis.timeout_s / 2, may_read=may_read)
            self._streams.append(stream)
        self._waiting = WaitingTasks(executor, self._clients[0], executor.settings.tasks.return_waiting_after_s)
        self._endpoints = Endpoints(executor, self._clients[0])
        executor.observers.add(self.registration)
        executor.observers.add(self)
        self.queue = QueueLink(executor, dispatcher, self.registration, reach, name=name, node_id=node.node_id)

    def on_posted(self) -> None:
        self.outbox.wake()

    @property
    def up(self) -> bool:
        """Whether everything that talks to Redis can."""
        ups = [self._intake.up, self._others.up, *(each.up for each in self.registration.presences.values())]
        return not self.troubles() and all(ups) and all(stream.up for stream in self._streams)

    def troubles(self) -> list[str]:
        """What does not work, and why; empty if all does."""
        troubles = [self._intake.trouble, self._others.trouble, self.outbox.trouble]
        troubles += [stream.trouble for stream in self._streams]
        for presence in self.registration.presences.values():
            troubles += presence.trouble, presence.beats
        reasons = [trouble.reason for trouble in troubles if trouble] + self.queue.troubles()
        return list(dict.fromkeys([*reasons, *(slot.displaced for slot in self._slots.values() if slot.displaced)]))

    def works(self) -> list[Coroutine[Any, Any, None]]:
        """What runs for as long as the node takes tasks."""
        presences = [presence.run() for presence in self.registration.presences.values()]
        streams = [stream.run() for stream in self._streams]
        own = self._intake.run(), self._others.run(), self._waiting.run(), self._endpoints.run()
        return [*own, *presences, *streams, *self.queue.works()]

    async def send_events(self) -> None:
        """Send the outbox until cancelled; not before dispatches can be received, which an event may cause."""
        await self.registration.subscribed.wait()
        await self.send_last_events()

    async def send_last_events(self) -> None:
        """Send the outbox until cancelled, whether dispatches can be received or not."""
        await run_all(self.outbox.run(), self.queue.sender.run())

    async def flushed(self, timeout_s: float) -> bool:
        """Wait until all events are sent; False where they are not within `timeout_s`, or nobody listens."""
        waits = self.outbox.flushed(timeout_s), self.queue.sender.flushed(timeout_s)
        return all(await asyncio.gather(*waits))

    async def close(self) -> None:
        await self._endpoints.remove_all()
        await self.queue.close()
        for client in self._clients:
            await client.aclose()


def _has_its_id(slot: Slot[Run]) -> bool:
    return not slot.displaced
