"""The node's connections to Redis, and what goes over them: dispatches and control in, events and presences out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flowmesh.bus.connection import connect
from flowmesh.bus.intake import Intake
from flowmesh.bus.outbox import Outbox
from flowmesh.bus.stream import Stream
from flowmesh.execution.executor import Executor
from flowmesh.messages.wire import worker_key
from flowmesh.orchestrator.dispatcher import Dispatcher
from flowmesh.orchestrator.registration import Workers

CONTROL_CHANNEL = "flowmesh.control"
"""Ours: `{"type": "CANCEL", "task_id", "force"?}` to every node; see README."""


class Uplink:
    def __init__(self, executor: Executor, workers: Workers, name: str, on_control: Callable[[bytes], None]) -> None:
        """
        Args:
            name: shows in Redis' list of its clients.
            on_control: gets what comes on the deployment's control channel.
        """
        redis = executor.settings.redis
        assert redis.url is not None, "checked before the node starts"
        reach = functools.partial(
            connect,
            redis.url,
            timeout_s=redis.timeout_s,
            health_check_interval_s=redis.health_check_interval_s,
        )
        asking = 2 * len(executor.slots) + 1  # each worker's status and heartbeat, and the outbox
        self.bus = reach(name=f"flowmesh-{name}-bus", users=asking)
        listener = reach(name=f"flowmesh-{name}-sub")
        self._clients = [self.bus, listener]
        self._workers = workers
        dispatcher = Dispatcher(executor)
        self.outbox = Outbox(self.bus, executor.journal, workers.on_events_sent, guard=f"{worker_key(name)}:guard")
        self.intake = Intake(
            listener,
            {redis.task_topic: dispatcher.on_message, CONTROL_CHANNEL: on_control},
            workers.on_subscribed,
            silence_s=redis.health_check_interval_s,
        )
        self.streams: list[Stream] = []
        for worker_id in executor.slots if redis.stream else ():
            client = reach(name=f"flowmesh-{worker_id}-stream")
            self._clients.append(client)
            self.streams.append(Stream(client, worker_id, dispatcher.take, block_s=redis.timeout_s / 2))

    @property
    def up(self) -> bool:
        """Whether all of it gets on with Redis."""
        ups = [self.intake.up, *(each.up for each in self._workers.presences.values())]
        return not self.troubles() and all(ups) and all(stream.up for stream in self.streams)

    def troubles(self) -> list[str]:
        """Why parts of it do not; empty where all do."""
        troubles = [self.intake.trouble, self.outbox.trouble, *(stream.trouble for stream in self.streams)]
        for presence in self._workers.presences.values():
            troubles += presence.trouble, presence.beats
        return list(dict.fromkeys(trouble.reason for trouble in troubles if trouble))

    def works(self) -> list[Any]:
        """What is to run for as long as the node listens."""
        presences = [presence.run() for presence in self._workers.presences.values()]
        return [self.intake.run(), *presences, *(stream.run() for stream in self.streams)]

    async def send_events(self) -> None:
        """Until cancelled. What an event makes the orchestrator send must find us listening."""
        await self._workers.subscribed.wait()
        await self.outbox.run()

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()
