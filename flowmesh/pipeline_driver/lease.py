"""A driver's hold on its pipeline, and its calls to Redis: each waits until Redis answers, for a while at most."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable
from typing import Any, TypeVar

from flowmesh.client import Client
from flowmesh.client.requests import Request
from flowmesh.errors import FlowMeshError, UnavailableError
from flowmesh.pipeline_driver.job import Job
from flowmesh.queue import pipeline_scripts
from flowmesh.queue.lua import Script
from flowmesh.queue.records import text

T = TypeVar("T")
PING_S = 1.0
"""Between two signs of life for the supervisor."""
PAUSE_S = 0.5
GIVE_UP_LEASES = 8
"""A driver that Redis has not answered for so many leases ends: the next one connects anew."""


class Lost(Exception):
    """Another driver has the pipeline, or it has ended, or Redis is gone."""


class HandedOver(Exception):
    """The supervisor has closed this process's standard input: the node ends, or drains."""


class Lease:
    """
    Args:
        owner: standard input and output: the one ends when the driver should, the other gets signs of life.
    """

    def __init__(self, client: Client, job: Job, owner: tuple[int, int] = (0, 1)) -> None:
        self.cancelled = ""
        """The reason of a cancel; empty: there is none."""
        self.force = False
        self._client = client
        self._job = job
        self._stdin, self._stdout = owner
        self._renewed = self._answered = time.monotonic()
        self._pinged = float("-inf")

    def keep(self) -> None:
        """Renew the lease if it is time.

        Raises:
            Lost, HandedOver: the driver has to end.
        """
        self.sign_of_life()
        if time.monotonic() - self._renewed >= self._job.lease_ms / 4000:
            self.renew()

    def renew(self) -> None:
        """Renew the lease, and learn of a cancel.

        Raises:
            Lost, HandedOver: the driver has to end.
        """
        answer = self.run(pipeline_scripts.RENEW, self._job.node_id, self._job.lease_ms)
        state, reason, force = map(text, answer)
        if state != "held":
            raise Lost("another driver has the pipeline, or it has ended")
        self._renewed = time.monotonic()
        self.cancelled, self.force = reason, force == "1"

    def run(self, script: Script, *arguments: Any) -> Any:
        """Run one of the pipeline's scripts: its first arguments are the pipeline and this driver's number."""
        return self.ask(lambda: _one((script, self._job.pipeline_id, self._job.attempt, *arguments)))

    def let_go(self) -> None:
        """Leave the pipeline to the next driver; best effort."""
        script = (pipeline_scripts.LET_GO, self._job.pipeline_id, self._job.attempt, "0")
        with contextlib.suppress(FlowMeshError):
            self._client.do(_one(script))

    def ask(self, request: Callable[[], Request[T]]) -> T:
        """Run a request, made anew for each try.

        Raises:
            Lost: Redis does not answer for long.
            HandedOver: the driver has to end.
        """
        while True:
            self.sign_of_life()
            try:
                answer = self._client.do(request())
            except UnavailableError as error:
                if time.monotonic() - self._answered > GIVE_UP_LEASES * self._job.lease_ms / 1000:
                    raise Lost(str(error)) from None
                time.sleep(PAUSE_S)
                continue
            self._answered = time.monotonic()
            return answer

    def sign_of_life(self) -> None:
        """Tell the supervisor that this process does not hang.

        Raises:
            HandedOver: the supervisor wants it to end, or is gone.
        """
        if select.select([self._stdin], [], [], 0)[0]:
            raise HandedOver
        if time.monotonic() - self._pinged >= PING_S:
            self._pinged = time.monotonic()
            self._write(b".\n")

    def say(self, line: str) -> None:
        """A line for the supervisor's log."""
        self._write(f"log {line}\n".encode(errors="replace"))

    def _write(self, data: bytes) -> None:
        try:
            os.write(self._stdout, data)
        except BrokenPipeError:
            raise HandedOver from None


def _one(command: tuple[Any, ...]) -> Request[Any]:
    (answer,) = yield [command]
    return answer
