"""Writes a task's log lines to Redis, only while somebody follows them there."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import Any

import msgspec
from loguru import logger

from flowmesh.bus.connection import RedisError, redis
from flowmesh.errors import FlowMeshError
from flowmesh.execution import task_events
from flowmesh.execution.executor import Executor
from flowmesh.files.log_files import LogFiles, Tail
from flowmesh.messages.text import harmless
from flowmesh.messages.wire import usable_task_id
from flowmesh.queue import names
from flowmesh.redaction import Redactor
from flowmesh.tasks.machine import State

PAUSE_S = 0.3
LINES = 1000
"""Lines that a follower's stream has at most, and that it begins with."""
LINE_BYTES = 8192
FOLLOWERS = 16
"""At once, for all tasks of the node."""
KEPT_S = 60
"""How long a stream stays after its last line."""


class LogRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A `LOGS` message."""

    task_id: str
    to: str
    follow: bool = False


class LogFeeds:
    """The followers that this node serves."""

    def __init__(self, executor: Executor, client: redis.Redis) -> None:
        self._executor = executor
        self._client = client
        self._feeds: dict[str, asyncio.Task[None]] = {}

    def on_request(self, request: LogRequest) -> None:
        """Serve a follower, if the task is here."""
        if usable_task_id(request.task_id) is None or not request.to.isalnum() or request.to in self._feeds:
            return
        if self._out_dir(request.task_id) is None:
            return
        if len(self._feeds) >= FOLLOWERS:
            logger.bind(task=request.task_id).warning("logs not sent: {} followers already", FOLLOWERS)
            return
        feed = asyncio.create_task(self._feed(request))
        self._feeds[request.to] = feed
        feed.add_done_callback(lambda _: self._feeds.pop(request.to, None))

    def close(self) -> None:
        for feed in self._feeds.values():
            feed.cancel()

    def _out_dir(self, task_id: str) -> str | None:
        run = self._executor.runs.of_task(task_id)
        if run is not None:
            return run.accepted.target.out_dir
        record = self._executor.journal.latest(task_id)
        return None if record is None else record.out_dir

    def _running(self, task_id: str) -> bool:
        run = self._executor.runs.of_task(task_id)
        return run is not None and run.task.state not in (State.DELIVERING, State.DONE)

    async def _feed(self, request: LogRequest) -> None:
        try:
            await self._send(request)
        except (RedisError, OSError, TimeoutError, FlowMeshError) as error:
            logger.bind(task=request.task_id).warning("logs not sent: {}", error)

    async def _send(self, request: LogRequest) -> None:
        run = self._executor.runs.of_task(request.task_id)
        layout = self._executor.layout
        redact = layout.secrets if run is None else task_events.redactor(run, layout)
        out_dir = self._out_dir(request.task_id)
        if out_dir is None:
            return
        reader = LogLines(Path(out_dir, "logs"), redact)
        key = names.logs_key(request.to)
        if request.follow and self._running(request.task_id):  # perhaps it has written nothing yet
            await self._client.xadd(key, {"open": "1"})
            await self._client.expire(key, KEPT_S)
        while await self._client.exists(names.follow_key(request.to)):
            running = request.follow and self._running(request.task_id)  # before the files are read
            lines = await asyncio.to_thread(reader.next, at_end=not running)
            if lines or not running:
                async with self._client.pipeline(transaction=False) as pipeline:
                    for line in lines:
                        pipeline.xadd(key, {"line": line}, maxlen=LINES + 100, approximate=True)
                    if not running:
                        pipeline.xadd(key, {"end": "1"})
                    pipeline.expire(key, KEPT_S)
                    await pipeline.execute()
            if not running:
                return
            await asyncio.sleep(PAUSE_S)


class LogLines:
    """Reads the logs of one task as they grow. Blocks on the disk.

    Args:
        folder: the task's `logs`, which it can write to.
        redact: hides what may not be shown.
    """

    def __init__(self, folder: Path, redact: Redactor) -> None:
        self._logs = LogFiles(folder)
        self._redact = redact
        self._tails: dict[str, Tail] = {}
        self._began = False

    def next(self, *, at_end: bool) -> list[str]:
        """The next lines, LINES at most, each cut to LINE_BYTES; those of several files with the file's name."""
        for name in self._logs.names(None):
            if name not in self._tails:
                last = None if self._began else LINES
                self._tails[name] = Tail(functools.partial(self._logs.open, name), name.removesuffix(".log"), last)
        self._began = True
        several = sum(not tail.is_empty for tail in self._tails.values()) > 1
        found: list[str] = []
        for tail in self._tails.values():
            prefix = f"{tail.label} | " if several else ""
            while lines := tail.lines(at_end=at_end):
                found += [prefix + self._shown(line) for line in lines]
        return found[-LINES:]

    def _shown(self, line: bytes) -> str:
        text: Any = harmless(line[:LINE_BYTES], self._redact)
        return str(text.decode(errors="replace"))
