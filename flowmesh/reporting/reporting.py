"""What a node tells others besides the orchestrator: the lanes, what feeds them, and how they stand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

from flowmesh.bus.connection import connect
from flowmesh.execution.executor import Executor
from flowmesh.execution.observer import Observer
from flowmesh.execution.run import Run
from flowmesh.reporting.outgoing import Outgoing
from flowmesh.reporting.peer_watch import PeerWatch
from flowmesh.reporting.sender import Sender
from flowmesh.reporting.slot_watch import SlotWatch
from flowmesh.tasks.journal import JournalError
from flowmesh.tasks.verdicts import Kind, Verdict


class Reporting(Observer):
    """
    Args:
        name: of this node in Redis' list of its clients.
    """

    def __init__(self, outgoing: Outgoing, executor: Executor, name: str) -> None:
        journal, layout, webhooks = executor.journal, executor.layout, outgoing.webhooks
        lanes = outgoing.lanes()
        self._senders = [Sender(lane, journal.sendings, executor.parts.helpers, layout) for lane in lanes]
        with contextlib.suppress(JournalError):
            journal.sendings.keep(lane.name for lane in lanes)
        self._slots: SlotWatch | None = None
        self._peers: PeerWatch | None = None
        if lanes:
            executor.observers.add(self)
        if webhooks.wants("slot_closed", "slot_opened"):
            self._slots = SlotWatch(webhooks, journal, executor.slots, layout.secrets, self._wake)
            executor.observers.add(self._slots)
        redis = executor.settings.redis
        if webhooks.wants("node_down", "node_up") and redis.url is not None:
            client = connect(
                redis.url,
                password_file=redis.password_file,
                timeout_s=redis.timeout_s,
                health_check_interval_s=redis.health_check_interval_s,
                name=f"flowmesh-{name}-peers",
            )
            self._peers = PeerWatch(webhooks, journal, client, list(executor.slots), self._wake)

    def on_ended(self, run: Run, verdict: Verdict) -> None:  # noqa: ARG002
        self._wake()

    def on_refused(self, task_id: str, message: str, kind: Kind) -> None:  # noqa: ARG002
        self._wake()

    def _wake(self) -> None:
        for sender in self._senders:
            sender.wake()

    def works(self) -> list[Coroutine[Any, Any, None]]:
        """What runs for as long as the node does."""
        return [*(sender.run() for sender in self._senders), *([self._peers.run()] if self._peers is not None else [])]

    def look(self) -> None:
        """The node's slots are known now: compare them with what was told before."""
        if self._slots is not None:
            self._slots.look()

    def summary(self) -> list[dict[str, Any]]:
        """For `flowmesh status`: each receiver, what waits for it, and its last error."""
        return [sender.summary() for sender in self._senders]

    async def flushed(self, timeout_s: float) -> None:
        """Wait until what waits is sent; not for a receiver that does not work. The rest goes after the next start."""
        for sender in self._senders:
            sender.hurry()
        waits = [sender.emptied() for sender in self._senders if not sender.error]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*waits), timeout_s)

    async def close(self) -> None:
        if self._peers is not None:
            await self._peers.close()
