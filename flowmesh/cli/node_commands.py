"""`flowmesh status`, `cancel`, `deliver`, `drain`, `recycle`, `upgrade`: this machine's node, on its control socket."""

from __future__ import annotations

import datetime
import sys
import time

import click
import msgspec

from flowmesh.cli import locate, render
from flowmesh.cli.control import Control
from flowmesh.cli.control_types import NodeStatus, TaskStatus
from flowmesh.cli.render import Column
from flowmesh.cli.view import amount
from flowmesh.errors import EXIT_OK, UnavailableError

DRAIN_POLL_S = 0.5
UPGRADE_POLL_S = 0.05
UPGRADE_TIMEOUT_S = 30.0
_WORKERS = (
    Column("WORKER", least=20),
    Column("SLOT", drop=2),
    Column("STATUS"),
    Column("TASK", least=12),
    Column("GPUS", drop=1),
)
_TASKS = (
    Column("TASK", least=12),
    Column("TYPE", drop=1),
    Column("STATE"),
    Column("PHASE", least=8),
    Column("PROGRESS", least=8),
    Column("FOR", drop=2),
)


@click.command(help="Show this machine's node: its workers, its tasks, and whether it reaches Redis.")
@locate.config_option
@locate.state_dir_option
@locate.json_option
def status(config: str | None, state_dir: str | None, as_json: bool) -> int:
    """The command."""
    with Control(locate.state_dir(state_dir, config)) as control:
        if as_json:
            render.print_json(control.status_json())
            return EXIT_OK
        found = control.status()
    print(headline(found))
    print()
    render.table(
        _WORKERS,
        [
            [each.worker_id, _text(each.slot), each.status, each.task_id or "", str(len(each.gpus) or "none")]
            for each in found.workers
        ],
    )
    for trouble in found.redis_troubles:
        print(f"\n{trouble}")
    for environment, message in found.warnings.items():
        print(f"\nenvironment {environment}: {message}")
    if found.tasks:
        print()
        render.table(_TASKS, [_task_row(each) for each in found.tasks])
    return EXIT_OK


@click.command(help="Cancel a task of this machine's node, whether it runs or waits.")
@click.argument("task_id", metavar="TASK")
@click.option("--force", is_flag=True, help="Kill it without asking it to stop.")
@locate.config_option
@locate.state_dir_option
@locate.json_option
def cancel(task_id: str, force: bool, config: str | None, state_dir: str | None, as_json: bool) -> int:
    """The command."""
    with Control(locate.state_dir(state_dir, config)) as control:
        answer = control.cancel(task_id, force=force)
    if as_json:
        render.print_json(answer)
    else:
        print(f"{'killing' if force else 'cancelling'} {task_id}")
    return EXIT_OK


@click.command(help="Send a task's results once more, after its delivery failed; waits until they have arrived.")
@click.argument("task_id", metavar="TASK")
@locate.config_option
@locate.state_dir_option
@locate.json_option
def deliver(task_id: str, config: str | None, state_dir: str | None, as_json: bool) -> int:
    """The command."""
    with Control(locate.state_dir(state_dir, config)) as control:
        answer = control.deliver(task_id)
    if as_json:
        render.print_json(msgspec.to_builtins(answer))
    else:
        print(f"delivered {task_id}: {answer.sent_bytes} bytes sent in {render.seconds(answer.seconds)}")
        for url in answer.urls:
            print(f"  {url}")
    return EXIT_OK


@click.command(help="Let this machine's node take no more tasks, and end when those it has are over.")
@click.option(
    "--mode",
    type=click.Choice(["finish", "checkpoint", "now"]),
    default="finish",
    show_default=True,
    help="Let running tasks finish, stop them at a checkpoint, or stop them now.",
)
@click.option("--wait", is_flag=True, help="Return when the node holds no task any more.")
@locate.config_option
@locate.state_dir_option
@locate.json_option
def drain(mode: str, wait: bool, config: str | None, state_dir: str | None, as_json: bool) -> int:
    """The command."""
    where = locate.state_dir(state_dir, config)
    with Control(where) as control:
        answer = control.drain(mode)
    if not as_json:
        print(f"draining ({mode})", flush=True)
    left = None
    while wait:
        try:
            with Control(where) as control:
                found = control.status()
        except UnavailableError:  # it has ended: drained as can be
            break
        held = len(found.tasks)  # queued ones are among them
        if not held:
            break
        if held != left and not as_json:
            left = held
            print(f"  {held} task{'s' if held != 1 else ''} left", flush=True)
        time.sleep(DRAIN_POLL_S)
    if as_json:
        render.print_json({**answer, "drained": wait})
    elif wait:
        print("drained")
    return EXIT_OK


@click.command(help="Replace the fork servers of ENVIRONMENT (of all); running tasks end in the old ones.")
@click.argument("environment", required=False)
@locate.config_option
@locate.state_dir_option
@locate.json_option
def recycle(environment: str | None, config: str | None, state_dir: str | None, as_json: bool) -> int:
    """The command."""
    with Control(locate.state_dir(state_dir, config)) as control:
        answer = control.recycle(environment)
    if as_json:
        render.print_json(answer)
    else:
        print("recycled: " + (", ".join(answer.get("recycled", [])) or "none was running"))
    return EXIT_OK


@click.command(help="Start the node's program anew, as it is on disk now. Tasks run on and are taken over.")
@locate.config_option
@locate.state_dir_option
@locate.json_option
def upgrade(config: str | None, state_dir: str | None, as_json: bool) -> int:
    """The command."""
    where = locate.state_dir(state_dir, config)
    with Control(where) as control:
        before = control.status()
        answer = control.upgrade()
    deadline = time.monotonic() + UPGRADE_TIMEOUT_S
    while True:
        try:
            with Control(where) as control:
                found = control.status()
            if found.uptime_s < before.uptime_s:
                break
        except UnavailableError:  # between the two programs
            pass
        if time.monotonic() > deadline:
            raise UnavailableError(f"no node answers {UPGRADE_TIMEOUT_S:.0f} s after the upgrade; see its log")
        time.sleep(UPGRADE_POLL_S)
    if as_json:
        render.print_json({**answer, "from": before.version, "to": found.version})
    else:
        print(f"{before.version} -> {found.version}, pid {found.pid}, {len(found.tasks)} tasks run on")
    return EXIT_OK


def headline(found: NodeStatus) -> str:
    """The node in one or two lines, fit for a terminal of 80 columns."""
    first = f"node {found.version}, pid {found.pid}, up {render.seconds(found.uptime_s)}, isolation {found.isolation}"
    parts = ["Redis up" if found.redis_up else "Redis DOWN", f"{found.queued} queued"]
    if found.outbox:
        parts.append(f"{found.outbox} events not sent yet")
    if found.draining:
        parts.append(f"draining ({found.draining})")
    second = ", ".join(parts)
    one = f"{first}, {second}"
    return one if len(one) <= render.width(sys.stdout) else f"{first}\n{second}"


def _task_row(task: TaskStatus) -> list[str]:
    return [
        task.task_id,
        task.task_type or "",
        task.state,
        task.phase or "",
        amount(task.progress) if task.progress is not None else "",
        _age(task.started_at),
    ]


def _age(started_at: str | None) -> str:
    try:
        started = datetime.datetime.fromisoformat(started_at or "")
    except ValueError:
        return ""
    now = datetime.datetime.now(started.tzinfo or datetime.UTC)
    return render.seconds(max(0.0, (now - started.replace(tzinfo=started.tzinfo or datetime.UTC)).total_seconds()))


def _text(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else msgspec.json.encode(value).decode()
