"""`flowmesh cancel`: cancels a task on this machine's node, else wherever it is, through Redis."""

from __future__ import annotations

import click

from flowmesh.cli import completing, locate, render
from flowmesh.cli.control import Control
from flowmesh.cli.fleet import client_of
from flowmesh.errors import EXIT_OK, ConfigError, FlowMeshError, UnavailableError


@click.command(
    help="Cancel a running or waiting task: ask it to stop, then SIGTERM, then SIGKILL. "
    "On this machine's node, else on the deployment's node that has it."
)
@click.argument("task_id", metavar="TASK", shell_complete=completing.task_ids)
@click.option("--force", is_flag=True, help="Kill it at once, without grace time.")
@click.option("--reason", default="cancelled by a user", metavar="TEXT", help="For the error of its event.")
@locate.redis_option
@locate.node_options
def cancel(
    task_id: str,
    *,
    force: bool,
    reason: str,
    redis_url: str | None,
    config: str | None,
    state_dir: str | None,
    as_json: bool,
) -> int:
    """Run the command; returns the exit code."""
    state = _locally(task_id, force=force, config=config, state_dir=state_dir) if redis_url is None else None
    if state is None:
        state = _through_redis(task_id, reason, force=force, redis_url=redis_url, config=config, state_dir=state_dir)
    if as_json:
        render.print_json({"ok": True, "state": state})
    elif state == "unknown":
        print(f"{task_id}: no record of it; all nodes were told to cancel it")
    elif state == "queued":
        print(f"cancelled {task_id}, which waited")
    else:
        print(f"{'killing' if force else 'cancelling'} {task_id}")
    return EXIT_OK


def _locally(task_id: str, *, force: bool, config: str | None, state_dir: str | None) -> str | None:
    """Cancel it on this machine's node; None where no node is here, or it does not have the task."""
    try:
        with Control(locate.state_dir(state_dir, config)) as control:
            if all(task.task_id != task_id for task in control.status().tasks):
                return None
            return str(control.cancel(task_id, force=force).get("state", ""))
    except UnavailableError:
        return None


def _through_redis(
    task_id: str, reason: str, *, force: bool, redis_url: str | None, config: str | None, state_dir: str | None
) -> str:
    try:
        client = client_of(redis_url, config)
    except ConfigError:
        # only this machine's node is left to ask, and it says why it cannot
        with Control(locate.state_dir(state_dir, config)) as control:
            return str(control.cancel(task_id, force=force).get("state", ""))
    with client:
        state = client.cancel(task_id, reason, force=force)
    if state == "done":
        raise FlowMeshError(f"{task_id}: it has ended already; see `flowmesh ps --all`")
    return state
