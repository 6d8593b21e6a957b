"""`flowmesh submit`: sends one task file to an idle worker of a deployment, and with `--wait` waits for its outcome.

It only publishes a message. The workers and the orchestrator write the workers' state in Redis.
"""

from __future__ import annotations

import sys

import click
import msgspec

from flowmesh.cli import deployment, documents, locate, redis_limits, render
from flowmesh.cli.checked_file import refuse_faults
from flowmesh.cli.deployment import TaskEnd, TaskFailed
from flowmesh.cli.wait import Wait
from flowmesh.errors import EXIT_OK, UnavailableError
from flowmesh.messages import wire
from flowmesh.queue.workers import NoWorkerFits, choose
from flowmesh.tasks.catalogue import known_types


@click.command(
    help="Send a task file to the cheapest idle worker of a deployment that fits it. "
    "If none fits, print the reason for each worker."
)
@click.argument("file", metavar="FILE.yaml")
@locate.redis_option
@locate.config_option
@click.option("--worker", "worker_id", metavar="ID", help="Send it to this worker only.")
@click.option("--task-id", metavar="ID", help="The task's id; else a new one.")
@click.option("--no-check", is_flag=True, help="Send it unchecked: the worker has another version or runner.")
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
    no_check: bool,
    wait: bool,
    timeout: float | None,
    as_json: bool,
) -> int:
    """Run the command; returns the exit code."""
    if timeout is not None and not wait:
        raise click.UsageError("--timeout needs --wait")
    submission = documents.load(file, task_id)
    if not no_check:
        refuse_faults([submission], known_types(locate.settings(config)))
    url, topic = locate.deployment_of(redis_url, config)
    with locate.connected(url) as client:
        try:
            worker = choose(deployment.read_workers(client), submission.document, worker_id)
        except NoWorkerFits as error:
            if as_json:
                render.print_json({"workers": error.reasons})
            else:
                print("\n".join(f"{name}: {why}" for name, why in error.reasons.items()), flush=True)
            raise
        message = submission.dispatch(worker.worker_id)
        if warning := redis_limits.check_size(client, message):
            print(f"flowmesh: {warning}", file=sys.stderr)
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
            end = Wait(client, events, submission.task_id, worker.worker_id, timeout, quiet=as_json).end()
    return _report(end, as_json=as_json)


def _report(end: TaskEnd, *, as_json: bool) -> int:
    if as_json:
        render.print_json({key: value for key, value in msgspec.to_builtins(end).items() if value != ""})
    elif end.ok:
        took = render.succeeded(end.payload.get("runtime_sec"))
        print(f"{took}: results are in RESULTS_DIR/{end.task_id} on {end.worker_id}")
    if not as_json:
        render.warnings(end.payload.get("warnings"))
    if end.ok:
        return EXIT_OK
    raise TaskFailed.of(end.task_id, end.payload.get("error_kind"), end.error)
