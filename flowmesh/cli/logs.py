"""`flowmesh logs`: prints the log files in a task's folder on this machine, and follows them."""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path

import click

from flowmesh.cli import completing, locate, render
from flowmesh.cli.control import Control, Refused
from flowmesh.cli.control_types import LogsPlace
from flowmesh.cli.fleet import client_of
from flowmesh.errors import EXIT_OK, FlowMeshError, UnavailableError
from flowmesh.files.log_files import LogFiles, Tail
from flowmesh.messages import wire
from flowmesh.messages.nodes import MOST, member_id
from flowmesh.messages.text import harmless
from flowmesh.redaction import Redactor

POLL_S = 0.25


@click.command(
    help="Print the logs of a running or finished task: of this machine's node, else, through Redis, of any."
)
@click.argument("task_id", metavar="TASK", shell_complete=completing.task_ids)
@click.option("-f", "--follow", is_flag=True, help="Print new lines until the task ends.")
@click.option(
    "--member",
    type=click.IntRange(0, MOST - 1),
    metavar="RANK",
    help="Of a task on several nodes: the logs of this member; else of rank 0.",
)
@click.option("-n", "last_lines", type=click.IntRange(min=0), metavar="LINES", help="Start with the last lines.")
@click.option("--stdout", "only", flag_value="stdout", help="Print standard output only.")
@click.option("--stderr", "only", flag_value="stderr", help="Print standard error only.")
@click.option(
    "--raw", is_flag=True, help="Print the bytes as they are; else secrets are hidden and control characters escaped."
)
@locate.redis_option
@locate.config_option
@locate.state_dir_option
@click.option(
    "--results-dir",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Look for the task in this folder, without asking the node.",
)
@locate.json_option
def logs(
    *,
    task_id: str,
    follow: bool,
    member: int | None,
    last_lines: int | None,
    only: str | None,
    raw: bool,
    redis_url: str | None,
    config: str | None,
    state_dir: str | None,
    results_dir: str | None,
    as_json: bool,
) -> int:
    """Run the command; returns the exit code."""
    if wire.usable_task_id(task_id) is None:
        raise click.UsageError(f"TASK: invalid task id {task_id!r}")
    task_id = member_id(task_id, member or 0)
    where = _Where(task_id, config, state_dir, results_dir)
    try:
        if redis_url is not None:
            raise FlowMeshError("asked through Redis")
        place = where.find()
    except FlowMeshError as error:
        if results_dir is not None or not _may_ask_others(redis_url, config):
            raise
        if raw or only or last_lines is not None or as_json:
            raise FlowMeshError(
                f"{error}; of another node's task, -n, --stdout, --stderr, --raw and --json are not available"
            ) from None
        return _through_redis(task_id, redis_url, config, follow=follow)
    if as_json:
        shown = {"out_dir": place.out_dir, "logs_dir": place.logs_dir, "running": place.running}
        render.print_json(
            {**shown, "files": [f"{place.logs_dir}/{name}" for name in LogFiles(Path(place.logs_dir)).names(only)]}
        )
        return EXIT_OK
    _print(where, place, only, last_lines, follow=follow, raw=raw)
    return EXIT_OK


def _may_ask_others(redis_url: str | None, config: str | None) -> bool:
    try:
        locate.deployment_of(redis_url, config)
    except FlowMeshError:
        return False
    return True


def _through_redis(task_id: str, redis_url: str | None, config: str | None, *, follow: bool) -> int:
    with client_of(redis_url, config) as client:
        for line in client.logs(task_id, follow=follow):
            print(line, flush=True)
    return EXIT_OK


class _Where:
    """Finds a task's folder: asks the node, else looks in the results folder."""

    def __init__(self, task_id: str, config: str | None, state_dir: str | None, results_dir: str | None) -> None:
        self._task_id = task_id
        self._state_dir = locate.state_dir(state_dir, config)
        self._folder = locate.results_dir(results_dir, config).resolve() / task_id
        self._ask = results_dir is None

    def find(self) -> LogsPlace:
        """The task's folder.

        Raises:
            FlowMeshError: neither the node nor the results folder has the task.
        """
        answer = "not asked (--results-dir)"
        if self._ask:
            try:
                with Control(self._state_dir) as control:
                    return control.logs(self._task_id)
            except (Refused, UnavailableError) as error:
                answer = str(error)
        if not self._folder.is_dir():
            raise FlowMeshError(f"task {self._task_id} not found: {self._folder} does not exist; node: {answer}")
        ended = (self._folder / "manifest.json").exists()
        return LogsPlace(out_dir=str(self._folder), logs_dir=str(self._folder / "logs"), running=not ended)


def _print(
    where: _Where, place: LogsPlace, only: str | None, last_lines: int | None, *, follow: bool, raw: bool
) -> None:
    tails: dict[str, Tail] = {}
    redact = Redactor((bytes.fromhex(each).decode(errors="replace") for each in place.secrets), prose=True)
    out = sys.stdout.buffer
    first = True
    while True:
        running = follow and place.running  # taken before the files are read, so that the last lines are not missed
        logs = LogFiles(Path(place.logs_dir))
        for name in logs.names(only):
            if name not in tails:
                label = name.removesuffix(".log")
                tails[name] = Tail(functools.partial(logs.open, name), label, last_lines if first else None)
        first = False
        written = [tail for tail in tails.values() if not tail.is_empty]
        size = max((len(tail.label) for tail in written), default=0)
        more = False
        for tail in tails.values():
            prefix = f"{tail.label:<{size}} | ".encode() if len(written) > 1 else b""
            while lines := tail.lines(at_end=not running):
                more = True
                out.write(b"".join(prefix + (line if raw else harmless(line, redact)) + b"\n" for line in lines))
        out.flush()
        if not running and not more:
            return
        if running and not more:
            time.sleep(POLL_S)
        if running:
            place = where.find()
