"""`flowmesh queue`: how many tasks wait, which ones and in which order, and to remove some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec

from flowmesh.cli import completing, locate, render
from flowmesh.cli.fleet import age, client_of
from flowmesh.cli.render import Column
from flowmesh.errors import EXIT_FAILURE, EXIT_OK

if TYPE_CHECKING:
    from flowmesh.client import Removal, WaitingTask

_MOST = 1000
_COUNTS = (
    Column("REQUIRES", least=20),
    Column("HIGH"),
    Column("NORMAL"),
    Column("LOW"),
    Column("CLASS", drop=1),
)
_ENTRIES = (
    Column("POS"),
    Column("TASK", least=24),
    Column("TYPE", least=9),
    Column("OWNER", least=6),
    Column("PRIORITY", drop=1),
    Column("AGE"),
    Column("TRIES", drop=2),
    Column("NODES", drop=2),
    Column("PIPELINE", least=8, drop=3),
    Column("CLASS", drop=4),
)


@click.group(
    invoke_without_command=True,
    help="Show how many tasks wait in the queue, by what they require.",
)
@locate.redis_option
@locate.config_option
@locate.json_option
@click.pass_context
def queue(context: click.Context, redis_url: str | None, config: str | None, as_json: bool) -> int:
    """Run the command; returns the exit code."""
    if context.invoked_subcommand is not None:
        return EXIT_OK
    with client_of(redis_url, config) as client:
        found = client.waiting()
    if as_json:
        render.print_json({"waiting": found})
    elif found:
        render.table(
            _COUNTS,
            [[_needs(each["requires"]), *_counts(each["waiting"]), each["class"][:8]] for each in found],
        )
    else:
        print("no task waits in the queue")
    return EXIT_OK


@queue.command(
    name="list",
    short_help="List the tasks that wait, in order.",
    help="List the tasks that wait, by class, in the order in which workers take them. Last come pipelines without "
    "a driver.",
)
@click.option("--owner", metavar="NAME", help="Only the tasks of this owner; '' for those without one.")
@click.option(
    "--class",
    "task_class",
    metavar="CLASS",
    help="Only the tasks of this type, or of the class whose key begins so.",
    shell_complete=completing.types,
)
@click.option(
    "--limit",
    type=click.IntRange(1, _MOST - 1),
    default=50,
    show_default=True,
    metavar="N",
    help="At most so many.",
)
@locate.redis_option
@locate.config_option
@locate.json_option
@click.pass_context
def list_(
    context: click.Context,
    *,
    owner: str | None,
    task_class: str | None,
    limit: int,
    redis_url: str | None,
    config: str | None,
    as_json: bool,
) -> int:
    """Run the command; returns the exit code."""
    redis_url, config, as_json = _with_parents(context, redis_url, config, as_json=as_json)
    with client_of(redis_url, config) as client:
        found = client.waiting_tasks(owner=owner, task_class=task_class, limit=limit + 1)
    more, found = len(found) > limit, found[:limit]
    if as_json:
        render.print_json({"waiting": [msgspec.to_builtins(task) for task in found], "more": more})
        return EXIT_OK
    if found:
        render.table(_ENTRIES, [_row(task) for task in found])
    else:
        print("no such task waits in the queue" if owner is not None or task_class else "no task waits in the queue")
    if more:
        print(f"more tasks wait; these are the first {limit} (--limit)")
    return EXIT_OK


@queue.command(
    short_help="Take waiting tasks out of the queue.",
    help="Take tasks out of the queue. A task that runs is left alone; exit with 0 only if all were removed.",
)
@click.argument("task_ids", metavar="TASK...", nargs=-1, required=True, shell_complete=completing.deployment_ids)
@click.option("--reason", default="removed from the queue", metavar="TEXT", help="For the error of its event.")
@locate.redis_option
@locate.config_option
@locate.json_option
@click.pass_context
def remove(
    context: click.Context,
    *,
    task_ids: tuple[str, ...],
    reason: str,
    redis_url: str | None,
    config: str | None,
    as_json: bool,
) -> int:
    """Run the command; returns the exit code."""
    redis_url, config, as_json = _with_parents(context, redis_url, config, as_json=as_json)
    removals: list[Removal] = []
    with client_of(redis_url, config) as client:
        for task_id in dict.fromkeys(task_ids):
            removals.append(client.remove(task_id, reason))
            if not as_json:
                print(_outcome(removals[-1]), flush=True)
    if as_json:
        render.print_json({"tasks": [msgspec.to_builtins(each) for each in removals]})
    return EXIT_OK if all(each.removed for each in removals) else EXIT_FAILURE


def _with_parents(
    context: click.Context, redis_url: str | None, config: str | None, *, as_json: bool
) -> tuple[str | None, str | None, bool]:
    """The options, each perhaps given before the subcommand."""
    above = context.parent.params if context.parent is not None else {}
    return redis_url or above.get("redis_url"), config or above.get("config"), as_json or bool(above.get("as_json"))


def _outcome(removal: Removal) -> str:
    task_id, where = removal.task_id, render.printable(removal.worker_id) or "a worker"
    match removal.state:
        case "queued":
            return f"removed {task_id}"
        case "done":
            return f"{task_id} has ended already; not removed"
        case "unknown":
            return f"{task_id}: no record of this task; not removed"
        case "dispatched":
            return f"{task_id} was sent to {where}; not removed. `flowmesh cancel {task_id}` stops it"
        case "claimed":
            return f"{task_id} starts on {where}; not removed. `flowmesh cancel {task_id}` stops it"
        case state:
            doing = "runs" if state == "running" else f"is {render.printable(state)}"
            return f"{task_id} {doing} on {where}; not removed. `flowmesh cancel {task_id}` stops it"


def _row(task: WaitingTask) -> list[str]:
    return [
        str(task.position),
        task.task_id,
        task.task_type,
        task.owner,
        f"{task.priority}, back" if task.came_back else task.priority,
        age(task.queued_at),
        f"{task.failures} of {task.retries + 1}" if task.class_key else "",
        task.nodes,
        f"{task.pipeline}: {task.stage}" if task.pipeline else "",
        task.class_key[:8],
    ]


def _needs(requires: dict[str, Any]) -> str:
    parts = [str(requires.get("task_type") or "any type")]
    if gpus := requires.get("gpus"):
        parts.append(f"{gpus}x {requires.get('gpu_type') or 'GPU'}")
    if memory := requires.get("gpu_memory"):
        parts.append(f"{render.gib(memory)} of GPU memory")
    if cpu := requires.get("cpu"):
        parts.append(f"{cpu:g} cores")
    if memory := requires.get("memory"):
        parts.append(f"{render.gib(memory)} of memory")
    parts += requires.get("tags", ())
    return ", ".join(parts)


def _counts(waiting: dict[str, int]) -> list[str]:
    return [str(waiting.get(name, 0)) for name in ("high", "normal", "low")]
