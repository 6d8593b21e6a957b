"""Drives submitted pipelines: each in a small process beside this supervisor, outside the slots.

A driver holds its pipeline by a lease in Redis, which it renews itself. One that hangs or dies, or whose node dies, is
followed by another one, on any node. It has this process's end of two pipes: it ends when its input is closed, and
its output has signs of life. Its exit status is not used; the supervisor's SIGCHLD handler collects it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import msgspec
from loguru import logger

from flowmesh.bus.connection import RedisError, redis
from flowmesh.bus.scripts import is_forbidden, run_script
from flowmesh.errors import FlowMeshError
from flowmesh.execution.executor import Executor
from flowmesh.messages.wire import utc_now
from flowmesh.orchestrator.registration import Registration
from flowmesh.pipeline_driver.job import Job
from flowmesh.processes import environ
from flowmesh.queue import pipeline_scripts
from flowmesh.settings import addresses
from flowmesh.settings.secret_files import read_secret

LOOK = (0.25, 0.5)
"""Between two looks for a pipeline whose driver is gone, in leases."""
SHORTEST_LEASE_MS = 3000
STEP_S = 1.0
"""Between two looks at whether this node drains."""
SILENCE_S = 120.0
"""A driver that gives no sign of life for so long is killed. Its lease has ended long before."""
FAREWELL_S = 3.0
"""How long a driver may take to leave its pipeline to another one when the node ends."""
AGAIN_S = 2.0
"""After a driver could not be started."""


class _Process:
    """One driver's process."""

    def __init__(self, job: Job) -> None:
        """Start it. Blocks for a moment.

        Raises:
            OSError: it cannot be started.
        """
        self.job = job
        command = [sys.executable, "-P", "-m", "flowmesh.pipeline_driver"]
        process = subprocess.Popen(
            command,
            env=environ.with_package(environ.base(os.environ, ())),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",  # our own folder may be deleted
            start_new_session=True,
        )
        process.returncode = 0  # the supervisor's SIGCHLD handler reaps it, not this object
        assert process.stdin is not None
        assert process.stdout is not None
        self.pid = process.pid
        self.stdin, self.stdout = process.stdin, process.stdout
        with contextlib.suppress(OSError):
            self.stdin.write(msgspec.json.encode(job) + b"\n")
            self.stdin.flush()

    def ask_to_end(self) -> None:
        with contextlib.suppress(OSError):
            self.stdin.close()


class PipelineDrivers:
    """
    Args:
        client: for commands.
    """

    def __init__(self, executor: Executor, registration: Registration, client: redis.Redis, node_id: str) -> None:
        settings = executor.settings
        self.most = settings.queue.pipelines
        self._settings = settings
        self._lease_ms = _lease_ms(settings.queue.take_over_after_s)
        self._executor = executor
        self._registration = registration
        self._client = client
        self._node_id = node_id
        self._again = asyncio.Event()
        self._processes: dict[str, _Process] = {}
        """By pipeline."""
        self._watches: set[asyncio.Task[None]] = set()

    @property
    def pipelines(self) -> list[str]:
        """Those that this node drives now."""
        return sorted(self._processes)

    def look_again(self) -> None:
        """Look at once: a pipeline was submitted, or its driver has left it."""
        self._again.set()

    async def run(self) -> None:
        """Drive pipelines until cancelled; the drivers then leave theirs to other nodes."""
        await self._registration.subscribed.wait()
        next_look = time.monotonic()
        try:
            while True:
                asked = self._again.is_set()
                self._again.clear()  # in each turn: a wait for an event that is set gives nobody else a turn
                if self._executor.draining is not None:
                    self._end_drivers()
                elif asked or time.monotonic() >= next_look:
                    next_look = time.monotonic() + random.uniform(*LOOK) * self._lease_ms / 1000
                    await self._look()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(STEP_S):
                        await self._again.wait()
        finally:
            self._end_drivers()

    async def close(self) -> None:
        """Wait until the drivers have left their pipelines, for a moment; kill those that have not."""
        self._end_drivers()
        if self._watches:
            await asyncio.wait(self._watches, timeout=FAREWELL_S)
        for process in self._processes.values():
            _kill(process)
        for watch in self._watches:
            watch.cancel()

    def _end_drivers(self) -> None:
        for process in self._processes.values():
            process.ask_to_end()

    async def _look(self) -> None:
        """Take pipelines that no driver has, as many as this node may."""
        try:
            while len(self._processes) < self.most and self._executor.draining is None:
                answer = await run_script(
                    self._client, pipeline_scripts.DRIVE, self._node_id, utc_now(), self._lease_ms
                )
                if not answer:
                    return
                await self._start(answer[0].decode(), int(answer[1]))
        except (RedisError, OSError, TimeoutError) as error:
            if not is_forbidden(error):  # else the claims say so
                logger.debug("no look for pipelines: {}", error)

    async def _start(self, pipeline_id: str, attempt: int) -> None:
        try:
            job = self._job(pipeline_id, attempt)
            process = await asyncio.to_thread(_Process, job)
        except (OSError, FlowMeshError) as error:
            logger.bind(task=pipeline_id).warning("the driver of a pipeline cannot be started: {}", error)
            await run_script(self._client, pipeline_scripts.LET_GO, pipeline_id, attempt, "0")
            await asyncio.sleep(AGAIN_S)
            return
        logger.bind(task=pipeline_id, pid=process.pid).info("drives a pipeline")
        self._processes[pipeline_id] = process
        watch = asyncio.create_task(self._watch(process))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)

    def _job(self, pipeline_id: str, attempt: int) -> Job:
        settings = self._settings.redis
        assert settings.url is not None, "checked before the node starts"
        url = settings.url
        if settings.password_file is not None:
            url = addresses.with_password(url, read_secret(settings.password_file, "redis.password_file"))
        return Job(
            url=url,
            topic=settings.task_topic,
            pipeline_id=pipeline_id,
            attempt=attempt,
            node_id=self._node_id,
            lease_ms=self._lease_ms,
            result_ttl_s=self._settings.queue.result_ttl_s,
        )

    async def _watch(self, process: _Process) -> None:
        """Wait for a driver's end, and leave its pipeline to the next one if it has not."""
        job = process.job
        try:
            await self._until_silent(process)
        finally:
            process.ask_to_end()
            process.stdout.close()
            if self._processes.get(job.pipeline_id) is process:
                del self._processes[job.pipeline_id]
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            # it says 0, and changes nothing, where the driver has done so itself
            await run_script(self._client, pipeline_scripts.LET_GO, job.pipeline_id, job.attempt, "1")
        self._again.set()

    async def _until_silent(self, process: _Process) -> None:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), process.stdout
        )
        try:
            while line := await asyncio.wait_for(reader.readline(), SILENCE_S):
                if line.startswith(b"log "):
                    text = line[4:].decode(errors="replace").strip()
                    logger.bind(task=process.job.pipeline_id).warning("pipeline driver: {}", text)
        except (TimeoutError, ValueError):
            logger.bind(task=process.job.pipeline_id).warning("the driver of a pipeline hangs: it is killed")
            _kill(process)
        finally:
            transport.close()


def _lease_ms(take_over_after_s: float) -> int:
    """The usual lease, or a shorter one where nodes are taken over sooner."""
    return max(SHORTEST_LEASE_MS, min(pipeline_scripts.LEASE_MS, int(take_over_after_s * 250)))


def _kill(process: _Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
