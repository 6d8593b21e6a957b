"""`flowmesh submit`: sends one task file to an idle worker of a deployment, or queues files for whoever is idle.

With `--wait` it waits for their outcome.
"""

from __future__ import annotations

import sys
from typing import Any

import click
import msgspec

from flowmesh.cli import completing, deployment, documents, locate, redis_limits, render
from flowmesh.cli.checked_file import refuse_faults
from flowmesh.cli.deployment import TaskEnd, TaskFailed
from flowmesh.cli.documents import Submission
from flowmesh.cli.fleet import report_ends, wait_for
from flowmesh.cli.pipelines.remote import follow, followed_by
from flowmesh.cli.signals import continuing
from flowmesh.cli.view import progress_stream
from flowmesh.cli.wait import Wait
from flowmesh.errors import EXIT_OK, FieldError, UnavailableError
from flowmesh.messages import wire
from flowmesh.messages.nodes import FROM_QUEUE, WHERE, nodes_of
from flowmesh.pipelines.document import is_pipeline, read
from flowmesh.queue.workers import NoWorkerFits, choose
from flowmesh.tasks.catalogue import known_types


@click.command(
    help="Send a task file to the cheapest idle worker of a deployment that fits it. "
    "If none fits, print the reason for each worker. With --queue, any number of files wait for a worker instead. "
    "A pipeline is driven by one of the nodes, and its stages wait in the queue."
)
@click.argument("files", metavar="FILE.yaml...", nargs=-1, required=True)
@locate.redis_option
@locate.config_option
@click.option("--queue", "queued", is_flag=True, help="Queue the tasks: each runs when a worker that fits it is idle.")
@click.option(
    "--priority",
    type=click.Choice(["high", "normal", "low"]),
    help="Of a queued task or a pipeline: before or after others.",
)
@click.option(
    "--retries",
    type=click.IntRange(min=0, max=100),
    metavar="N",
    help="Of a queued task or a pipeline's stages: attempts after a failure that another node may not have; default 2.",
)
@click.option(
    "--nodes",
    metavar="N|MIN-MAX",
    help="Of a queued task: run it on so many nodes at once, in place of the document's spec.nodes.",
)
@click.option("--anyway", is_flag=True, help="Queue it even if no registered worker could ever run it.")
@click.option(
    "--worker", "worker_id", metavar="ID", help="Send it to this worker only.", shell_complete=completing.worker_ids
)
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
    files: tuple[str, ...],
    redis_url: str | None,
    config: str | None,
    queued: bool,
    priority: str | None,
    retries: int | None,
    nodes: str | None,
    anyway: bool,
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
    if queued and worker_id is not None:
        raise click.UsageError("--worker and --queue exclude each other: the queue goes to whoever is idle")
    if len(files) > 1 and not queued:
        raise click.UsageError("several files need --queue: each waits there for an idle worker")
    if len(files) > 1 and task_id is not None:
        raise click.UsageError("--task-id needs a single file")
    if nodes is not None and not queued:
        raise click.UsageError("--nodes needs --queue: a task on several nodes waits there until all of them are idle")
    submissions = [documents.load(file, task_id) for file in files]
    if nodes is not None:
        submissions = [_on_nodes(each, nodes) for each in submissions]
    queued = queued or is_pipeline(submissions[0].document)
    if not queued and (priority or retries is not None or anyway):
        raise click.UsageError("--priority, --retries and --anyway need --queue or a pipeline")
    if queued and worker_id is not None:
        raise click.UsageError("--worker: a pipeline goes to no single worker: its stages run on those that fit")
    if not no_check:
        refuse_faults(submissions, known_types(locate.settings(config)))
    url, topic = locate.deployment_of(redis_url, config)
    if queued:
        how = {"priority": priority or "normal", "retries": 2 if retries is None else retries, "anyway": anyway}
        return _queue(url, submissions, how, wait=wait, timeout_s=timeout, as_json=as_json)
    return _send(url, topic, submissions[0], worker_id, wait=wait, timeout_s=timeout, as_json=as_json)


def _on_nodes(submission: Submission, nodes: str) -> Submission:
    """The same with `spec.nodes`, from what `--nodes` says."""
    if is_pipeline(submission.document):
        raise click.UsageError("--nodes: a pipeline's stages say themselves on how many nodes they run (spec.nodes)")
    least, dash, most = nodes.partition("-")
    if not least.isdecimal() or not (most if dash else "1").isdecimal():
        raise click.UsageError(f"--nodes: expected a number, or MIN-MAX such as 2-4, found {nodes!r}")
    wanted = {"min": int(least), "max": int(most)} if dash else int(least)
    document = {**submission.document, "spec": {**submission.document["spec"], "nodes": wanted}}
    return msgspec.structs.replace(submission, document=document)


def _queued(submission: Submission) -> str:
    if not is_pipeline(submission.document):
        return f"{submission.task_id}  {submission.task_type or 'no task type'}  queued"
    return followed_by(submission.task_id, len(read(submission.document).stages))


def _queue(
    url: str,
    submissions: list[Submission],
    how: dict[str, Any],
    *,
    wait: bool,
    timeout_s: float | None,
    as_json: bool,
) -> int:
    from flowmesh.client import Client

    with Client(url) as client:
        for each in submissions:
            client.queue(each.document, task_id=each.task_id, **how)
            if not as_json:
                print(_queued(each), flush=True)
        if wait and len(submissions) == 1 and is_pipeline(submissions[0].document):
            with continuing((submissions[0].task_id,)):
                end = follow(client, submissions[0], progress_stream(as_json=as_json), timeout_s, as_json=as_json)
            return report_ends([end], as_json=as_json)
        if wait:
            return wait_for(client, tuple(each.task_id for each in submissions), timeout_s, as_json=as_json)
    if as_json:
        ids = [{"task_id": each.task_id, "file": each.source} for each in submissions]
        render.print_json(ids[0] if len(ids) == 1 else {"tasks": ids})
    return EXIT_OK


def _send(
    url: str,
    topic: str,
    submission: Submission,
    worker_id: str | None,
    *,
    wait: bool,
    timeout_s: float | None,
    as_json: bool,
) -> int:
    if nodes_of(submission.document).is_gang:
        raise FieldError(FROM_QUEUE, WHERE)
    with locate.connected(url) as client:
        try:
            worker = choose(deployment.read_workers(client), submission.document, worker_id)
        except NoWorkerFits as error:
            if as_json:
                render.print_json({"workers": error.reasons})
            else:
                print("\n".join(f"{name}: {why}" for name, why in error.reasons.items()), flush=True)
            raise
        message = submission.dispatch(worker.worker_id, deployment.record(client, submission, worker.worker_id))
        if warning := redis_limits.check_size(client, message):
            print(f"flowmesh: {warning}", file=sys.stderr)
        with deployment.subscribed(client, wire.TASK_EVENTS_CHANNEL, wire.EVENTS_CHANNEL) as events:
            if client.publish(topic, message) == 0:
                deployment.forget(client, submission.task_id)
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
            with continuing((submission.task_id,)):
                end = Wait(client, events, submission.task_id, worker.worker_id, timeout_s, quiet=as_json).end()
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
