"""`flowmesh submit`: one task file to one idle worker of a running deployment, and with `--wait` how it ended.

It only publishes: a worker's hash and status are the worker's and the orchestrator's to write.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click
import msgspec

from flowmesh.cli import deployment, documents, locate, render
from flowmesh.cli.deployment import TaskEnd, TaskFailed, Worker
from flowmesh.cli.documents import Submission
from flowmesh.errors import EXIT_OK, BusyError, ConfigError, UnavailableError
from flowmesh.messages import wire

if TYPE_CHECKING:
    import redis

LOOK_AT_WORKER_S = 2.0
REGISTER_GRACE_S = 20.0
"""How long a worker may take to register again after Redis came back, perhaps emptied."""
EVENT_GRACE_S = 5.0
"""How long a worker may say that a task is over before we take its event for lost."""


@click.command(help="Send a task file to a running deployment: to an idle worker that fits it, or say why none does.")
@click.argument("file", metavar="FILE.yaml")
@locate.redis_option
@locate.config_option
@click.option("--worker", "worker_id", metavar="ID", help="This worker and no other.")
@click.option("--task-id", metavar="ID", help="The task's id; else a fresh one.")
@click.option("--wait", is_flag=True, help="Wait until the task has ended, and end as it did.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="S", help="Wait no longer.")
@locate.json_option
def submit(
    *,
    file: str,
    redis_url: str | None,
    config: str | None,
    worker_id: str | None,
    task_id: str | None,
    wait: bool,
    timeout: float | None,
    as_json: bool,
) -> int:
    """The command."""
    if timeout is not None and not wait:
        raise click.UsageError("--timeout says how long to --wait")
    submission = documents.load(file, task_id)
    url, topic = locate.deployment_of(redis_url, config)
    with locate.connected(url) as client:
        try:
            worker = choose(deployment.read_workers(client), submission, worker_id)
        except NoWorkerFits as error:
            if as_json:
                render.print_json({"workers": error.reasons})
            else:
                print("\n".join(f"{name}: {why}" for name, why in error.reasons.items()), flush=True)
            raise
        message = submission.dispatch(worker.worker_id)
        with deployment.subscribed(client, wire.TASK_EVENTS_CHANNEL, wire.EVENTS_CHANNEL) as events:
            if client.publish(topic, message) == 0:
                raise UnavailableError(f"nobody listens to the channel {topic!r}: is {worker.worker_id} still there?")
            if not as_json:
                kind = submission.task_type or "no task type"
                print(f"{submission.task_id}  {kind}  on {worker.worker_id}", flush=True)
            if not wait:
                if as_json:
                    render.print_json({"task_id": submission.task_id, "worker_id": worker.worker_id})
                return EXIT_OK
            end = _Wait(client, events, submission.task_id, worker.worker_id, timeout, say=not as_json).end()
    return _report(end, as_json=as_json)


def choose(workers: list[Worker], submission: Submission, worker_id: str | None) -> Worker:
    """The worker for a task: the one named, else the cheapest that fits.

    Raises:
        BusyError: none can take it now; says why for each.
    """
    if worker_id is not None:
        known = ", ".join(each.worker_id for each in workers) or "there is none"
        workers = [each for each in workers if each.worker_id == worker_id]
        if not workers:
            raise ConfigError(f"--worker: {worker_id!r} is no registered worker (registered: {known})")
    if not workers:
        raise BusyError("no worker is registered at this Redis")
    wanted = deployment.requirements_of(submission.document)
    reasons = {each.worker_id: deployment.why_not(each, wanted, submission.task_type) for each in workers}
    fitting = [each for each in workers if not reasons[each.worker_id]]
    if not fitting:
        raise NoWorkerFits({name: "; ".join(why) for name, why in reasons.items()})
    return min(fitting, key=_preference)


def _preference(worker: Worker) -> tuple[float, int, str]:
    """The cheapest first, then the one with the fewest GPUs to leave unused."""
    cost = worker.cost_per_hour if worker.cost_per_hour is not None else float("inf")
    return cost, len(worker.gpus), worker.worker_id


class NoWorkerFits(BusyError):
    """Every worker has a reason not to take the task."""

    def __init__(self, reasons: dict[str, str]) -> None:
        count = len(reasons)
        super().__init__(
            f"none of the {count} workers can take it now" if count > 1 else "the worker cannot take it now"
        )
        self.reasons = reasons


class _Wait:
    """Follows one dispatched task on the event channels, over outages of Redis."""

    def __init__(
        self,
        client: redis.Redis,
        events: redis.client.PubSub,
        task_id: str,
        worker_id: str,
        timeout_s: float | None,
        *,
        say: bool,
    ) -> None:
        self._client = client
        self._events = events
        self._task_id = task_id
        self._worker_id = worker_id
        self._timeout_s = timeout_s
        self._say = say
        self._down = False
        self._back_at = float("-inf")
        self._over_since: float | None = None

    def end(self) -> TaskEnd:
        """Wait for the task's terminal event.

        Raises:
            BusyError: it did not come in time; the task goes on.
            UnavailableError: the worker is gone, or the event is lost.
        """
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        look = time.monotonic() + LOOK_AT_WORKER_S
        while True:
            now = time.monotonic()
            if deadline is not None and now > deadline:
                raise BusyError(f"{self._task_id} has not ended after {self._timeout_s:g} s; it goes on there")
            if (end := self._next(min(look, deadline or look) - now)) is not None:
                return end
            if time.monotonic() >= look:
                self._look_at_worker()
                look = time.monotonic() + LOOK_AT_WORKER_S

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
        if event.get("task_id") == self._task_id and event.get("type") == "TASK_STARTED" and self._say:
            print("  started", flush=True)
        return deployment.terminal_event(event, self._task_id)

    def _look_at_worker(self) -> None:
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
        self._back()
        if not alive:
            if time.monotonic() - self._back_at < REGISTER_GRACE_S:
                return
            raise UnavailableError(
                f"{self._worker_id} is gone (no heartbeat): how {self._task_id} ended is not known. "
                "It reports by itself once its node is back"
            )
        if status != "IDLE" or last != self._task_id:
            self._over_since = None
            return
        self._over_since = self._over_since or time.monotonic()
        if time.monotonic() - self._over_since > EVENT_GRACE_S:
            raise UnavailableError(
                f"{self._task_id} has ended on {self._worker_id}, and its event went past us while Redis was away: "
                "its results folder tells how"
            )

    def _outage(self, error: Exception) -> None:
        if not self._down and self._say:
            print(f"  Redis does not answer ({' '.join(str(error).split())}); waiting for it", flush=True)
        self._down = True
        time.sleep(0.5)

    def _back(self) -> None:
        if not self._down:
            return
        self._down, self._back_at = False, time.monotonic()
        if self._say:
            print("  Redis is back", flush=True)


def _report(end: TaskEnd, *, as_json: bool) -> int:
    if as_json:
        render.print_json({key: value for key, value in msgspec.to_builtins(end).items() if value != ""})
    elif end.ok:
        runtime: Any = end.payload.get("runtime_sec")
        took = f" in {render.seconds(runtime)}" if isinstance(runtime, int | float) else ""
        print(f"succeeded{took}: its results lie in RESULTS_DIR/{end.task_id} of {end.worker_id}")
    if end.ok:
        return EXIT_OK
    kind = end.payload.get("error_kind")
    verdict = f" ({kind})" if isinstance(kind, str) and kind != "error" else ""
    raise TaskFailed(f"{end.task_id} failed{verdict}: {end.error or 'no reason was given'}")
