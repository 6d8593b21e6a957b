"""`flowmesh ps`, `wait` and `result`: a deployment's tasks, from any machine that reaches its Redis."""

from __future__ import annotations

import datetime
import sys
import time
from typing import TYPE_CHECKING, Any

import click
import msgspec

from flowmesh.cli import completing, locate, render
from flowmesh.cli.deployment import TaskFailed
from flowmesh.cli.render import Column
from flowmesh.cli.signals import continuing
from flowmesh.cli.summary import summary
from flowmesh.errors import EXIT_FAILURE, EXIT_OK, BusyError

if TYPE_CHECKING:
    from flowmesh.client import Client, End, TaskState

_TASKS = (
    Column("TASK", least=12),
    Column("STATE"),
    Column("TYPE", drop=2),
    Column("OWNER", least=6, drop=4),
    Column("PRIORITY", drop=5),
    Column("WORKER", least=8),
    Column("TRIES", drop=3),
    Column("AGE", drop=1),
)


def client_of(redis_url: str | None, config: str | None) -> Client:
    """A client of the deployment that the options, the environment or the node's file name."""
    from flowmesh.client import Client

    url, topic = locate.deployment_of(redis_url, config)
    return Client(url, topic=topic)


@click.command(help="List the tasks of a deployment that wait or run.")
@locate.redis_option
@locate.config_option
@click.option("--all", "every", is_flag=True, help="Also those that ended within a day.")
@locate.json_option
def ps(redis_url: str | None, config: str | None, every: bool, as_json: bool) -> int:
    """Run the command; returns the exit code."""
    with client_of(redis_url, config) as client:
        found = client.tasks(all=every)
    if as_json:
        render.print_json({"tasks": [msgspec.to_builtins(task) for task in found]})
    elif found:
        render.table(_TASKS, [_row(task) for task in found])
    else:
        print("no task waits or runs")
    return EXIT_OK


def _row(task: TaskState) -> list[str]:
    state = task.state if not task.ended else "succeeded" if task.ok else f"failed ({task.verdict})"
    tries = "" if not task.priority else f"{task.failures + (not task.ended and task.state != 'queued')}"
    return [
        task.task_id,
        state,
        task.task_type,
        task.owner,
        task.priority,
        f"{task.worker_id} ({task.nodes} nodes)".strip() if task.nodes else task.worker_id,
        f"{tries} of {task.retries + 1}" if tries and not task.ended else str(task.attempt or ""),
        age(task.ended_at or task.started_at or task.queued_at),
    ]


def age(moment: str) -> str:
    """How long ago a moment in ISO 8601 was; empty for what is none."""
    try:
        at = datetime.datetime.fromisoformat(moment)
        return render.seconds(max(0.0, (datetime.datetime.now(datetime.UTC) - at).total_seconds()))
    except (ValueError, TypeError):
        return ""


@click.command(help="Wait until tasks have ended; exit with 0 only if all of them succeeded.")
@click.argument("task_ids", metavar="TASK...", nargs=-1, required=True, shell_complete=completing.deployment_ids)
@locate.redis_option
@locate.config_option
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Wait no longer than this for all of them together. The tasks themselves continue.",
)
@locate.json_option
def wait(
    task_ids: tuple[str, ...], redis_url: str | None, config: str | None, timeout: float | None, as_json: bool
) -> int:
    """Run the command; returns the exit code."""
    with client_of(redis_url, config) as client:
        return wait_for(client, task_ids, timeout, as_json=as_json)


def wait_for(client: Client, task_ids: tuple[str, ...], timeout_s: float | None, *, as_json: bool) -> int:
    """Wait for tasks and print how each ended; returns EXIT_OK if all succeeded.

    Raises:
        TaskFailed: the only task failed.
        BusyError: a task has not ended in time.
        Interrupted: by Ctrl-C; the tasks continue.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    ends: list[End] = []
    open_ids = list(task_ids)
    with continuing(open_ids):
        for task_id in task_ids:
            left = None if deadline is None else max(0.01, deadline - time.monotonic())
            try:
                ends.append(client.wait(task_id, left))
            except BusyError:
                raise BusyError(f"{task_id} has not ended after {timeout_s:g} s; it continues") from None
            open_ids.remove(task_id)
            if not as_json:
                _print_end(ends[-1], alone=len(task_ids) == 1)
    return report_ends(ends, as_json=as_json)


def report_ends(ends: list[End], *, as_json: bool) -> int:
    """Print ends as JSON if that is wanted; returns EXIT_OK if all are successes.

    Raises:
        TaskFailed: the only task failed.
    """
    if as_json:
        shown = [_json(end) for end in ends]
        render.print_json(shown[0] if len(shown) == 1 else {"tasks": shown})
    if len(ends) == 1 and not ends[0].ok:
        raise TaskFailed.of(ends[0].task_id, ends[0].verdict, ends[0].error)
    return EXIT_OK if all(end.ok for end in ends) else EXIT_FAILURE


def _json(end: End) -> dict[str, Any]:
    return {"task_id": end.task_id, "ok": end.ok, **msgspec.to_builtins(end)}


def _print_end(end: End, *, alone: bool) -> None:
    if end.ok:
        where = f" on {end.worker_id}" if end.worker_id != "queue" else ""
        print(f"{end.task_id} {render.succeeded(end.runtime_s)}{where}", flush=True)
    elif not alone:
        print(f"{end.task_id} failed ({end.verdict}): {render.printable(end.error)}", flush=True)
    render.warnings(list(end.warnings))


@click.command(help="Print the result of a task that was queued or submitted, as long as it lies in Redis.")
@click.argument("task_id", metavar="TASK", shell_complete=completing.deployment_ids)
@locate.redis_option
@locate.config_option
@locate.json_option
def result(task_id: str, redis_url: str | None, config: str | None, as_json: bool) -> int:
    """Run the command; returns the exit code."""
    with client_of(redis_url, config) as client:
        found = client.result(task_id)
    if as_json:
        render.print_json(found)
    else:
        print("\n".join(summary(found, render.width(sys.stdout))))
    return EXIT_OK
