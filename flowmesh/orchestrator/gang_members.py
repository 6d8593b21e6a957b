"""Keeps the members of gangs that run here together with the others: signs of life, and the end of one is that of all.

Each member's node renews a time in Redis. One that is not heard for too long is ended there by another member's sign of
life, and no later report of it counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

import msgspec

from flowmesh.bus.connection import RedisError, redis
from flowmesh.bus.scripts import run_script
from flowmesh.execution.executor import Executor
from flowmesh.execution.run import Run
from flowmesh.messages.nodes import Gang
from flowmesh.messages.wire import utc_now
from flowmesh.orchestrator.record_sender import stop_stale
from flowmesh.queue import gang_scripts
from flowmesh.tasks import machine
from flowmesh.tasks.machine import State
from flowmesh.tasks.verdicts import Stop

BEAT_S = 1.0
LONGEST_SILENCE_S = 20.0
SHORTEST_SILENCE_S = 3.0
GRACE_S = 5.0
"""Between the request to stop, after another member failed, and SIGKILL: a member may hang in a collective."""
FINISH_S = 30.0
"""How long a member may go on after rank 0 has succeeded."""


class Ends(msgspec.Struct, frozen=True, kw_only=True):
    """A `GANG_ENDS` message."""

    task_id: str
    attempt: int
    kind: str
    reason: str = ""


def silence_ms(take_over_after_s: float) -> int:
    """After which a member counts as gone: sooner where nodes are taken over sooner."""
    return int(max(SHORTEST_SILENCE_S, min(LONGEST_SILENCE_S, take_over_after_s / 3)) * 1000)


class GangMembers:
    """
    Args:
        take_over_after_s: `queue.take_over_after_s`.
    """

    def __init__(self, executor: Executor, client: redis.Redis, take_over_after_s: float) -> None:
        self._executor = executor
        self._client = client
        self._silence_ms = silence_ms(take_over_after_s)
        self._asked: dict[int, float] = {}
        """By run, when it was first to end (monotonic)."""

    async def run(self) -> None:
        """Keep them together until cancelled."""
        while True:
            await asyncio.sleep(BEAT_S)
            runs = [run for run in self._executor.runs if _gang(run) is not None]
            self._asked = {run.attempt: self._asked[run.attempt] for run in runs if run.attempt in self._asked}
            for run in runs:
                with contextlib.suppress(RedisError, OSError, TimeoutError):  # the claims report it
                    await self._beat(run)

    def on_ends(self, told: Ends) -> None:
        """A gang is to end."""
        run = self._executor.runs.of_gang(told.task_id)
        if run is None or run.recorded is None or run.recorded.attempt != told.attempt:
            return
        if told.kind == "back":
            stop_stale(self._executor, run)
        else:
            self._end(run, told.kind, told.reason)

    async def _beat(self, run: Run) -> None:
        gang, recorded, task = _gang(run), run.recorded, run.task
        assert gang is not None
        assert recorded is not None
        stop = "" if task.stop is None else str(task.stop)
        answer = await run_script(
            self._client, gang_scripts.BEAT, gang.task_id, recorded.attempt, gang.rank, utc_now(), self._silence_ms,
            stop, f"member {gang.rank} on {run.worker_id}: {task.stop_detail or stop}",
        )  # fmt: skip
        match answer[0]:
            case b"stale" if self._is_on(run) or task.state is State.STOPPING:
                stop_stale(self._executor, run)
            case b"ending":
                self._end(run, answer[1].decode(), answer[2].decode())

    def _end(self, run: Run, kind: str, reason: str) -> None:
        """End a member as its gang ends; again and again, until it has ended."""
        asked_s = time.monotonic() - self._asked.setdefault(run.attempt, time.monotonic())
        match kind:
            case "cancelled":
                self._stop(run, machine.StopRequested(Stop.CANCEL, reason))
            case "drained":
                detail = f"another member stops: {reason}"
                self._stop(run, machine.StopRequested(Stop.DRAIN, detail, checkpoint=True))
            case "finished" if asked_s > FINISH_S:
                detail = "rank 0 has succeeded, and this member did not end by itself"
                self._stop(run, machine.StopRequested(Stop.CANCEL, detail, force=asked_s > FINISH_S + GRACE_S))
            case "failed":
                detail = f"another member has failed: {reason}"
                self._stop(run, machine.StopRequested(Stop.CANCEL, detail, force=asked_s > GRACE_S))

    def _stop(self, run: Run, stop: machine.StopRequested) -> None:
        if self._is_on(run) or (stop.force and run.task.state is State.STOPPING):
            self._executor.apply(run, stop)

    @staticmethod
    def _is_on(run: Run) -> bool:
        return run.task.state in (State.QUEUED, State.LAUNCHING, State.RUNNING)


def _gang(run: Run) -> Gang | None:
    return None if run.recorded is None else run.recorded.gang
