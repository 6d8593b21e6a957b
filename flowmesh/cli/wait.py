"""Waits for the outcome of a dispatched task on a deployment's event channels."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from flowmesh.cli import deployment
from flowmesh.cli.deployment import TaskEnd
from flowmesh.errors import BusyError, UnavailableError
from flowmesh.messages import wire

if TYPE_CHECKING:
    import redis

POLL_WORKER_S = 2.0
OUTAGE_POLL_S = 0.5
REGISTER_GRACE_S = 20.0
"""Time for a worker to register again after Redis came back, perhaps without its data."""
EVENT_GRACE_S = 5.0
"""Time between a worker's report that a task has ended and the task's event; after that the event counts as lost."""


class Wait:
    """Waits for a dispatched task on the event channels, through outages of Redis."""

    def __init__(
        self,
        client: redis.Redis,
        events: redis.client.PubSub,
        task_id: str,
        worker_id: str,
        timeout_s: float | None,
        *,
        quiet: bool,
    ) -> None:
        self._client = client
        self._events = events
        self._task_id = task_id
        self._worker_id = worker_id
        self._timeout_s = timeout_s
        self._quiet = quiet
        self._down = False
        self._back_at = float("-inf")
        self._over_since: float | None = None

    def end(self) -> TaskEnd:
        """Wait for the task's terminal event.

        Raises:
            BusyError: the task did not end in time; it continues.
            UnavailableError: the worker is gone, or the event was lost.
        """
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        poll_at = time.monotonic() + POLL_WORKER_S
        while True:
            now = time.monotonic()
            if deadline is not None and now > deadline:
                raise BusyError(
                    f"{self._task_id} has not ended after {self._timeout_s:g} s; it continues on {self._worker_id}"
                )
            if (end := self._next(min(poll_at, deadline or poll_at) - now)) is not None:
                return end
            if time.monotonic() >= poll_at:
                self._poll_worker()
                poll_at = time.monotonic() + POLL_WORKER_S

    def _next(self, timeout_s: float) -> TaskEnd | None:
        import redis

        try:
            message = self._events.get_message(timeout=max(0.01, timeout_s))
        except (redis.ConnectionError, redis.TimeoutError) as error:
            self._outage(error)
            return None
        event = deployment.decode_event(message)
        if event is None:
            return None
        if event.get("type") == "UNREGISTER" and event.get("worker_id") == self._worker_id:
            raise UnavailableError(f"{self._worker_id} left the deployment before {self._task_id} ended")
        if event.get("task_id") == self._task_id and event.get("type") == "TASK_STARTED":
            self._print("started")
        return deployment.terminal_event(event, self._task_id)

    def _poll_worker(self) -> None:
        """Check that the worker is alive and still has the task."""
        import redis

        key = wire.worker_key(self._worker_id)
        try:
            status, last = (
                value.decode() if isinstance(value, bytes) else value
                for value in self._client.hmget(key, "status", "extra_last_task")
            )
            alive = deployment.is_alive(self._client, self._worker_id)
        except (redis.ConnectionError, redis.TimeoutError) as error:
            self._outage(error)
            return
        self._outage_over()
        if not alive:
            if time.monotonic() - self._back_at < REGISTER_GRACE_S:
                return
            raise UnavailableError(
                f"{self._worker_id} is gone (no heartbeat): the outcome of {self._task_id} is unknown; "
                "its node will publish it once it is back"
            )
        if status != "IDLE" or last != self._task_id:
            self._over_since = None
            return
        self._over_since = self._over_since or time.monotonic()
        if time.monotonic() - self._over_since > EVENT_GRACE_S:
            raise UnavailableError(
                f"{self._task_id} has ended on {self._worker_id}, but its event was lost while Redis was down: "
                f"see the outcome in RESULTS_DIR/{self._task_id} there"
            )

    def _outage(self, error: Exception) -> None:
        if not self._down:
            self._print(f"Redis does not answer ({' '.join(str(error).split())}); waiting for it")
        self._down = True
        time.sleep(OUTAGE_POLL_S)

    def _outage_over(self) -> None:
        if self._down:
            self._down, self._back_at = False, time.monotonic()
            self._print("Redis answers again")

    def _print(self, text: str) -> None:
        if not self._quiet:
            print(f"  {text}", flush=True)
