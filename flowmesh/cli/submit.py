"""`flowmesh submit`: sends one task file to an idle worker of a deployment, and with `--wait` waits for its outcome.

It only publishes a message. The workers and the orchestrator write the workers' state in Redis.
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

POLL_WORKER_S = 2.0
REGISTER_GRACE_S = 20.0
"""Time for a worker to register again after Redis came back, perhaps without its data."""
EVENT_GRACE_S = 5.0
"""Time between a worker's report that a task has ended and the task's event; after that the event counts as lost."""


@click.command(
    help="Send a task file to the cheapest idle worker of a deployment that fits it. "
    "If none fits, print the reason for each worker."
)
@click.argument("file", metavar="FILE.yaml")
@locate.redis_option
@locate.config_option
@click.option("--worker", "worker_id", metavar="ID", help="Send it to this worker only.")
@click.option("--task-id", metavar="ID", help="The task's id; else a new one.")
@click.option("--wait", is_flag=True, help="Wait until the task has ended; exit with 0 only if it succeeded.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="With --wait: wait no longer than this. The task itself continues.",
)
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
        raise click.UsageError("--timeout needs --wait")
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
                raise UnavailableError(
                    f"no subscriber on the channel {topic!r}: check that the node of {worker.worker_id} is connected, "
                    "and that its redis.task_topic is the same"
                )
            if not as_json:
                kind = submission.task_type or "no task type"
                print(f"{submission.task_id}  {kind}  on {worker.worker_id}", flush=True)
            if not wait:
                if as_json:
                    render.print_json({"task_id": submission.task_id, "worker_id": worker.worker_id})
                return EXIT_OK
            end = _Wait(client, events, submission.task_id, worker.worker_id, timeout, quiet=as_json).end()
    return _report(end, as_json=as_json)


def choose(workers: list[Worker], submission: Submission, worker_id: str | None) -> Worker:
    """Choose the worker for a task: the one named, else the cheapest that fits.

    Raises:
        ConfigError: no worker of that name is registered.
        NoWorkerFits: no worker can run it now; has the reason for each.
        BusyError: no worker is registered at all.
    """
    if worker_id is not None:
        known = ", ".join(each.worker_id for each in workers) or "none"
        workers = [each for each in workers if each.worker_id == worker_id]
        if not workers:
            raise ConfigError(f"--worker: {worker_id!r} is not registered; registered: {known}")
    if not workers:
        raise BusyError("no worker is registered in this Redis: start a node, or check --redis")
    wanted = deployment.requirements_of(submission.document)
    reasons = {each.worker_id: deployment.why_not(each, wanted, submission.task_type) for each in workers}
    fitting = [each for each in workers if not reasons[each.worker_id]]
    if not fitting:
        raise NoWorkerFits({name: "; ".join(why) for name, why in reasons.items()})
    return min(fitting, key=_preference)


def _preference(worker: Worker) -> tuple[float, int, str]:
    """The cheapest worker first; of equal ones that with the fewest GPUs, to leave larger ones free."""
    cost = worker.cost_per_hour if worker.cost_per_hour is not None else float("inf")
    return cost, len(worker.gpus), worker.worker_id


class NoWorkerFits(BusyError):
    """No registered worker can run the task now."""

    def __init__(self, reasons: dict[str, str]) -> None:
        count = len(reasons)
        super().__init__(
            f"none of the {count} workers can run this task now" if count > 1 else "the worker cannot run this task now"
        )
        self.reasons = reasons


class _Wait:
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
        time.sleep(0.5)

    def _outage_over(self) -> None:
        if self._down:
            self._down, self._back_at = False, time.monotonic()
            self._print("Redis answers again")

    def _print(self, text: str) -> None:
        if not self._quiet:
            print(f"  {text}", flush=True)


def _report(end: TaskEnd, *, as_json: bool) -> int:
    if as_json:
        render.print_json({key: value for key, value in msgspec.to_builtins(end).items() if value != ""})
    elif end.ok:
        runtime: Any = end.payload.get("runtime_sec")
        took = f" in {render.seconds(runtime)}" if isinstance(runtime, int | float) else ""
        print(f"succeeded{took}: results are in RESULTS_DIR/{end.task_id} on {end.worker_id}")
    if end.ok:
        return EXIT_OK
    kind = end.payload.get("error_kind")
    verdict = f" ({kind})" if isinstance(kind, str) and kind != "error" else ""
    raise TaskFailed(f"{end.task_id} failed{verdict}: {end.error or 'no reason was given'}")
