"""`flowmesh status`, `deliver`, `drain`, `recycle`, `upgrade`: operate the node on this machine."""

from __future__ import annotations

import datetime
import sys
import time
from pathlib import Path

import click
import msgspec

from flowmesh.cli import completing, locate, node_ends, notify, render
from flowmesh.cli.control import Control, NodeProcess
from flowmesh.cli.control_types import NodeStatus, TaskStatus
from flowmesh.cli.render import Column
from flowmesh.cli.view import amount
from flowmesh.errors import EXIT_OK, UnavailableError

DRAIN_POLL_S = 0.5
UPGRADE_POLL_S = 0.05
UPGRADE_TIMEOUT_S = 300.0
"""How long a new program may take to answer: on a busy machine its start takes minutes. Tasks run on meanwhile."""
RESTART_TIMEOUT_S = 30.0
"""How long it may take where the node's process has ended: a service manager starts another one."""
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
    Column("TIME", drop=2),
)


@click.command(help="Print the metrics of the node on this machine, in Prometheus' text format.")
@locate.config_option
@locate.state_dir_option
def metrics(config: str | None, state_dir: str | None) -> int:
    """Run the command; returns the exit code."""
    with Control(locate.state_dir(state_dir, config)) as control:
        sys.stdout.write(control.metrics())
    return EXIT_OK


@click.command(help="Show the node on this machine: its workers, its tasks, and whether Redis answers.")
@locate.node_options
def status(config: str | None, state_dir: str | None, as_json: bool) -> int:
    """Run the command; returns the exit code."""
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
            [worker.worker_id, _text(worker.slot), worker.status, worker.task_id or "", str(len(worker.gpus) or "none")]
            for worker in found.workers
        ],
    )
    for line in node_ends.lines(found.ends):
        print(f"\n{line}")
    for trouble in found.redis_troubles:
        print(f"\n{trouble}")
    for fault in found.faults:
        concerned = "" if len(fault.workers) == len(found.workers) else f" {', '.join(fault.workers)}"
        word = f"degraded{concerned}" if fault.workers else fault.name
        print(f"\n{word} (for {render.seconds(fault.since_s)}): {fault.reason}")
    known = [fault.reason for fault in found.faults]
    for environment, message in found.warnings.items():
        if message not in known:
            print(f"\nenvironment {environment}: {message}")
    if found.page is not None and found.page.error:
        print(f"\nno page at {found.page.listen}: {render.printable(found.page.error)}")
    for line in notify.troubles(found.notify):
        print(f"\n{line}")
    if found.tasks:
        print()
        render.table(_TASKS, [_task_row(task) for task in found.tasks])
    waits = {task.task_id: task.waits_for for task in found.tasks if task.waits_for} | found.redeliveries
    if waits:
        print()
    for task_id, what in waits.items():
        print(f"delivery of {task_id}: " + (f"waits for {render.printable(what)}" if what else "being sent"))
    return EXIT_OK


@click.command(help="Retry the delivery of a task's results after it failed. Returns once they have arrived.")
@click.argument("task_id", metavar="TASK", shell_complete=completing.task_ids)
@locate.node_options
def deliver(task_id: str, config: str | None, state_dir: str | None, as_json: bool) -> int:
    """Run the command; returns the exit code."""
    with Control(locate.state_dir(state_dir, config)) as control:
        answer = control.deliver(task_id)
    if as_json:
        render.print_json(msgspec.to_builtins(answer))
    else:
        print(f"delivered {task_id}: {answer.sent_bytes} bytes sent in {render.seconds(answer.seconds)}")
        for url in answer.urls:
            print(f"  {url}")
    return EXIT_OK


@click.command(help="Stop accepting tasks on this node, and exit when running ones finish.")
@click.option(
    "--mode",
    type=click.Choice(["finish", "checkpoint", "now"]),
    default="finish",
    show_default=True,
    help="What running tasks do: finish, stop after saving a checkpoint, or stop now.",
)
@click.option("--wait", is_flag=True, help="Return when the node has no tasks left.")
@click.option("--cancel", "take_back", is_flag=True, help="Take a drain back: accept tasks again.")
@locate.node_options
def drain(*, mode: str, wait: bool, take_back: bool, config: str | None, state_dir: str | None, as_json: bool) -> int:
    """Run the command; returns the exit code."""
    where = locate.state_dir(state_dir, config)
    if take_back:
        with Control(where) as control:
            answer = control.undrain()
        if as_json:
            render.print_json(answer)
        else:
            print("drain cancelled")
        return EXIT_OK
    with Control(where) as control:
        answer = control.drain(mode)
    if not as_json:
        print(f"draining ({mode})", flush=True)
    left = None
    while wait:
        try:
            with Control(where) as control:
                found = control.status()
        except UnavailableError:  # the drained node has exited
            break
        held = len(found.tasks)  # includes queued ones
        if not held:
            break
        if held != left and not as_json:
            left = held
            print(f"  {render.count(held, 'task')} left", flush=True)
        time.sleep(DRAIN_POLL_S)
    if as_json:
        render.print_json({**answer, "drained": wait})
    elif wait:
        print("drained")
    return EXIT_OK


@click.command(
    help="Replace the fork servers of ENVIRONMENT (default: all), which import their packages again. "
    "Running tasks finish in the old ones."
)
@click.argument("environment", required=False, shell_complete=completing.environments)
@locate.node_options
def recycle(environment: str | None, config: str | None, state_dir: str | None, as_json: bool) -> int:
    """Run the command; returns the exit code."""
    with Control(locate.state_dir(state_dir, config)) as control:
        answer = control.recycle(environment)
    if as_json:
        render.print_json(answer)
    else:
        print("recycled: " + (", ".join(answer.get("recycled", [])) or "none was running"))
    return EXIT_OK


@click.command(help="Restart the node's program in the version that is installed now. Running tasks continue.")
@locate.node_options
def upgrade(config: str | None, state_dir: str | None, as_json: bool) -> int:
    """Run the command; returns the exit code."""
    where = locate.state_dir(state_dir, config)
    with Control(where) as control, control.process() as node:
        before = control.status()
        asked_at = time.monotonic()
        answer = control.upgrade()
        found = _successor(where, asked_at, node)
    if as_json:
        render.print_json({**answer, "from": before.version, "to": found.version})
    else:
        running = render.count(len(found.tasks), "task")
        print(f"{before.version} -> {found.version}, pid {found.pid}, continuing {running}")
    return EXIT_OK


def _successor(where: Path, asked_at: float, node: NodeProcess) -> NodeStatus:
    """Wait for the node's new program, which is the one that has started since `asked_at` (monotonic).

    Args:
        node: the old program's process, which the new one keeps.

    Raises:
        UnavailableError: it does not come.
    """
    deadline, limit_s = time.monotonic() + UPGRADE_TIMEOUT_S, UPGRADE_TIMEOUT_S
    while True:
        now = time.monotonic()
        try:
            with Control(where) as control:
                found = control.status()
            if now - found.uptime_s > asked_at:
                return found
        except UnavailableError:  # the old program is gone, the new one not ready yet
            pass
        if limit_s == UPGRADE_TIMEOUT_S and node.ended():
            deadline, limit_s = time.monotonic() + RESTART_TIMEOUT_S, RESTART_TIMEOUT_S
        if time.monotonic() > deadline:
            after = "the upgrade" if limit_s == UPGRADE_TIMEOUT_S else "its process had ended"
            raise UnavailableError(f"the node did not come back within {limit_s:.0f} s after {after}: see its log")
        time.sleep(UPGRADE_POLL_S)


def headline(found: NodeStatus) -> str:
    """The node's state in one line, or in two on a narrow terminal."""
    first = f"node {found.version}, pid {found.pid}, up {render.seconds(found.uptime_s)}, isolation {found.isolation}"
    parts = ["Redis up" if found.redis_up else "Redis DOWN", f"{found.queued} queued"]
    if found.outbox:
        parts.append(render.count(found.outbox, "unsent event"))
    if found.nobody_listens:
        parts.append("nobody listens to tasks.events")
    if found.log_dropped:
        parts.append(f"{render.count(found.log_dropped, 'line')} of the log dropped")
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
