"""Sends reports of tasks with a record in Redis: in order, at least once, and each through the script that fences it.

The result is read when its report is sent, so it is in Redis before the event is out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
from loguru import logger
from redis.exceptions import ResponseError

from flowmesh.backoff import Backoff
from flowmesh.bus.connection import RedisError, redis
from flowmesh.bus.connection_health import ConnectionHealth
from flowmesh.bus.exchange import leave_replica
from flowmesh.bus.scripts import is_forbidden, run_script
from flowmesh.execution.executor import Executor
from flowmesh.execution.run import Run
from flowmesh.messages.nodes import Gang
from flowmesh.messages.wire import TASK_EVENTS_CHANNEL
from flowmesh.orchestrator.elsewhere import enough_other_nodes, fits_elsewhere
from flowmesh.orchestrator.stored_result import stored_result
from flowmesh.queue import gang_scripts, scripts
from flowmesh.queue.reports import Report, decode
from flowmesh.tasks import machine
from flowmesh.tasks.verdicts import Kind, Stop

AVOID_MS = 86_400_000
"""How long a task that failed here is kept from this node at most; while it fits another one."""
AVOID_GANG_MS = 60_000
"""How long a task on several nodes is kept from the node whose member failed, while enough others fit it."""
MOST_REFUSED = 5
"""How often Redis may refuse a report with an error of its own, as of a key of another type, before it is given up."""
STAY_MS = 60_000
"""How long a task that made room here is kept for this node, which has its checkpoints."""


class RecordSender:
    """
    Args:
        node_id: of the whole node, whose slots fail alike.
        on_sent: called with the events that were published.
    """

    def __init__(
        self, executor: Executor, client: redis.Redis, node_id: str, on_sent: Callable[[list[bytes]], None]
    ) -> None:
        self.trouble = ConnectionHealth("events of queued tasks are held back", "events of queued tasks are sent again")
        self._executor = executor
        self._journal = executor.journal
        self._client = client
        self._node_id = node_id
        self._on_sent = on_sent
        self._posted = asyncio.Event()
        self._empty = asyncio.Event()

    def wake(self) -> None:
        self._empty.clear()
        self._posted.set()

    def pending(self) -> set[tuple[str, int]]:
        """The attempts whose reports were not taken yet: (task id, attempt)."""
        found = set()
        for _, payload in self._journal.reports(10_000):
            if (report := _read(payload)) is not None:
                found.add((report.task_id, report.attempt))
        return found

    async def run(self) -> None:
        """Send until cancelled."""
        backoff, refused = Backoff(), 0
        self.wake()
        while True:
            batch = self._journal.reports()
            if not batch:
                self._posted.clear()
                self._empty.set()
                await self._posted.wait()
                continue
            seq, payload = batch[0]
            report = _read(payload)
            try:
                if report is not None:
                    await self._send(report)
            except (RedisError, OSError, TimeoutError) as error:
                refused = refused + 1 if type(error) is ResponseError else 0
                if not is_forbidden(error) and refused < MOST_REFUSED:
                    self.trouble.failed(error, waiting=self._journal.outbox_size())
                    await leave_replica(self._client, error)
                    await asyncio.sleep(backoff.next_s())
                    continue
                logger.bind(task=report and report.task_id).error(
                    "Redis refuses a report: its event is published without the task's record: {}", error
                )
                if not await self._published(report):
                    continue
            refused = 0
            self.trouble.works()
            backoff.reset()
            self._journal.reported(seq)

    async def flushed(self, timeout_s: float) -> bool:
        """Wait until every report was taken; False where that is not within `timeout_s`."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def _published(self, report: Report | None) -> bool:
        """Publish an event as it is; whether Redis took it."""
        if report is None:
            return True
        try:
            await self._client.publish(TASK_EVENTS_CHANNEL, report.event)
        except (RedisError, OSError, TimeoutError) as error:
            self.trouble.failed(error)
            return False
        self._on_sent([report.event])
        return True

    async def _send(self, report: Report) -> None:
        if report.gang is not None:
            self._answered(report, (await self._send_member(report, report.gang)).decode())
            return
        event = report.decoded
        payload = event.payload
        common = (report.task_id, report.attempt, report.worker_id, self._node_id)
        if report.started:
            answer = await run_script(self._client, scripts.REPORT, *common, "started", report.event, event.ts)
        else:
            ok = event.type == "TASK_SUCCEEDED"
            retryable = payload.get("retryable") is True
            avoid = (
                report.queued
                and retryable
                and payload.get("error_kind") != Kind.DRAINED  # its checkpoints are here, where the node comes back
                and await fits_elsewhere(self._client, report.task_id, self._executor.slots)
            )
            ttl_s = self._executor.settings.queue.result_ttl_s
            result = await asyncio.to_thread(stored_result, report.out_dir) if ttl_s and report.out_dir else b""
            answer = await run_script(
                self._client, scripts.REPORT, *common, "end", report.event, event.ts,
                int(ok), "ok" if ok else str(payload.get("error_kind", "error")), int(retryable),
                "" if event.error is msgspec.UNSET else event.error, report.evidence, result, ttl_s,
                AVOID_MS if avoid else 0, STAY_MS if report.stays else 0,
            )  # fmt: skip
        self._answered(report, answer.decode())

    async def _send_member(self, report: Report, gang: Gang) -> bytes:
        """Report the start or the end of a member of a task on several nodes."""
        event = report.decoded
        payload = event.payload
        common = (gang.task_id, report.attempt, gang.rank, report.worker_id, self._node_id, report.event, event.ts)
        if report.started:
            started: bytes = await run_script(self._client, gang_scripts.STARTED, *common)
            return started
        ok, retryable = event.type == "TASK_SUCCEEDED", payload.get("retryable") is True
        avoid = (
            retryable
            and payload.get("error_kind") != Kind.DRAINED  # of another member's node, perhaps
            and await enough_other_nodes(self._client, gang.task_id, self._node_id)
        )
        ttl_s = self._executor.settings.queue.result_ttl_s
        wants_result = ok and gang.rank == 0 and ttl_s and report.out_dir
        result = await asyncio.to_thread(stored_result, report.out_dir) if wants_result else b""
        answer: bytes = await run_script(
            self._client, gang_scripts.END, *common,
            int(ok), "ok" if ok else str(payload.get("error_kind", "error")), int(retryable),
            "" if event.error is msgspec.UNSET else event.error, report.evidence, report.member(gang, self._node_id),
            result, ttl_s, AVOID_GANG_MS if avoid else 0,
        )  # fmt: skip
        return answer

    def _answered(self, report: Report, answer: str) -> None:
        if answer in ("published", "again"):
            self._on_sent([report.event])
            return
        bound = logger.bind(task=report.task_id, attempt=report.attempt)
        if answer == "kept":
            return
        if answer == "requeued":
            bound.info("the task goes back to the queue for another attempt")
            return
        bound.warning("report dropped: another node has taken this task over, or it has ended")
        run = self._executor.runs.of_task(report.task_id)
        if run is not None and run.recorded is not None and run.recorded.attempt == report.attempt:
            stop_stale(self._executor, run)


def stop_stale(executor: Executor, run: Run) -> None:
    """Stop an attempt that is not the current one any more: its report would be dropped."""
    logger.bind(task=run.task_id).warning("stopped: another node has taken this task over, or it has ended")
    executor.apply(run, machine.StopRequested(Stop.CANCEL, "another node has taken this task over", force=True))


def _read(payload: bytes) -> Report | None:
    try:
        return decode(payload)
    except msgspec.DecodeError as error:
        logger.error("a report of another version was dropped: {}", error)
        return None
