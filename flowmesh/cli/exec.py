"""`flowmesh exec`: runs one command on this machine as a task, with this terminal."""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from flowmesh.cli import locate, render, running_node
from flowmesh.cli.documents import Submission
from flowmesh.cli.follow import Follow, Outcome
from flowmesh.cli.local import LocalNode, LocalOptions
from flowmesh.cli.signals import Signals
from flowmesh.cli.terminal import Terminal
from flowmesh.cli.view import SilentView
from flowmesh.errors import EXIT_BY_SIGNAL, EXIT_FAILURE, EXIT_TRY_AGAIN
from flowmesh.messages.matching import parse_bytes
from flowmesh.messages.text import escaped

EXIT_TIMEOUT = 124
"""As timeout(1)."""
PATIENCE = 3
"""The Ctrl-C that no longer goes to the program, but ends it."""
_EXITS = {
    "timeout": EXIT_TIMEOUT,
    "host_oom": EXIT_BY_SIGNAL + signal.SIGKILL,
    "node_fault": EXIT_TRY_AGAIN,
    "supervisor_lost": EXIT_TRY_AGAIN,
}


@click.command(
    name="exec",
    context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False},
    help=(
        "Run one command on this machine as a task, in this terminal: with GPUs of its own, in its own group of "
        "processes, and proof that nothing of it is left. Ends with the command's exit status. Runs on the node of "
        "this machine, else on a temporary one."
    ),
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.option("--gpus", type=click.IntRange(min=0), metavar="N", help="GPUs that it sees; else all of the slot.")
@click.option("--memory", metavar="SIZE", help="Limit of its memory, such as 40G; needs cgroups.")
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Stop it after this time (124)."
)
@click.option(
    "--preload",
    metavar="MODULES",
    help="For `python SCRIPT`: run it in a fork of a server that has imported these, such as torch,transformers.",
)
@click.option("--output", "outputs", multiple=True, metavar="GLOB", help="Files to keep in the results; repeatable.")
@locate.config_option
@click.option("--results-dir", type=click.Path(file_okay=False), metavar="DIR", help="Keep logs and outputs there.")
@click.option("--embedded", is_flag=True, help="Use a temporary node, also where a node runs on this machine.")
@click.option("--report", type=click.Path(dir_okay=False), metavar="FILE", help="Write the outcome there, as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but what the command prints, and errors.")
def execute(
    *,
    command: tuple[str, ...],
    gpus: int | None,
    memory: str | None,
    timeout: float | None,
    preload: str | None,
    outputs: tuple[str, ...],
    config: str | None,
    results_dir: str | None,
    embedded: bool,
    report: str | None,
    quiet: bool,
) -> int:
    """Run the command; returns its exit status."""
    settings = {}
    if memory is not None:
        settings["processes.task_memory_max_bytes"] = str(parse_bytes(memory, "--memory"))
    options = LocalOptions(config=config, results_dir=results_dir, settings=settings, keeps_results=False)
    with Terminal(command) as terminal:
        spec: dict[str, Any] = {"attach": str(terminal.path), "outputs": list(outputs)}
        if preload is None:
            spec |= {"taskType": "command", "command": list(command)}
        else:
            spec |= {
                "taskType": "python",
                "file": command[-1],
                "preload": [each for each in preload.split(",") if each],
            }
        if gpus is not None:
            spec["resources"] = {"hardware": {"gpu": {"count": gpus}}}
        if timeout is not None:
            spec["timeoutSec"] = timeout
        submission = Submission(source="flowmesh exec", task_id=f"exec-{secrets.token_hex(8)}", document={"spec": spec})
        outcome = _run(submission, options, terminal, embedded=embedded or memory is not None, quiet=quiet)
    if report is not None:
        Path(report).write_bytes(msgspec.json.format(msgspec.json.encode(outcome)) + b"\n")
    return _ended(outcome, quiet=quiet)


def _run(submission: Submission, options: LocalOptions, terminal: Terminal, *, embedded: bool, quiet: bool) -> Outcome:
    """Run it on the node of this machine if there is one, else on a temporary node."""
    happened: queue.SimpleQueue[Any] = queue.SimpleQueue()
    running = None if embedded else running_node.find(options.config, submission.task_type)
    with _Passing(happened, terminal).handled() as signals:
        if running is not None:
            if running.task_user is not None:
                terminal.open_to(running.task_user)

            def waits(worker_id: str, count: int) -> None:
                if count and not quiet:
                    _say(f"waiting for {worker_id}: {render.count(count, 'task')} before this one")

            return running.run(submission, happened=happened, signals=signals, waits=waits)
        with LocalNode(options, lambda: signals.count > 1) as node:
            worker = node.wait_idle(signals.check)
            return Follow(
                node, submission, worker, view=SilentView(), happened=happened, signals=signals, timeout_s=None
            ).run()


class _Passing(Signals):
    """Signals of the terminal go to the program once it runs; others, and a third Ctrl-C, cancel the task."""

    def __init__(self, happened: queue.SimpleQueue[Any], terminal: Terminal) -> None:
        super().__init__(happened)
        self._terminal = terminal
        self._pressed = 0

    @contextlib.contextmanager
    def handled(self) -> Iterator[Signals]:
        numbers = (signal.SIGQUIT, signal.SIGWINCH)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            with super().handled():
                yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            self._pressed += 1
        is_keys = number in (signal.SIGQUIT, signal.SIGWINCH) or (number == signal.SIGINT and self._pressed < PATIENCE)
        if is_keys and (self._terminal.pass_on(number) or number == signal.SIGWINCH):
            return
        super()._handle(number, frame)


def _ended(outcome: Outcome, *, quiet: bool) -> int:
    """Print what the command used, or why it ended; returns the exit status."""
    command = outcome.event.get("command") or {}
    code = 0 if outcome.ok else _EXITS.get(str(outcome.verdict), EXIT_FAILURE)
    if not outcome.ok and outcome.verdict not in _EXITS:
        if isinstance(command.get("code"), int) and command["code"] != 0:
            code = command["code"]
        elif isinstance(command.get("signal"), str):
            code = EXIT_BY_SIGNAL + getattr(signal, command["signal"], 0)
        elif outcome.verdict == "cancelled":
            code = EXIT_BY_SIGNAL + signal.SIGTERM
    for line in outcome.event.get("warnings") or ():
        _say(f"warning: {line}")
    if not outcome.ok and (not command.get("code") or outcome.verdict != "error"):
        _say(str(outcome.error))  # also where there is no such program: nothing else says so
    elif not quiet:
        _say(_used(outcome, command))
    return code


def _used(outcome: Outcome, command: dict[str, Any]) -> str:
    parts = [f"exit status {command.get('code', 0)}"]
    if outcome.runtime_sec is not None:
        parts[0] += f" in {render.seconds(outcome.runtime_sec)}"
    resources = outcome.event.get("resources") or {}
    if isinstance(peak := resources.get("peak_rss_bytes"), int | float):
        parts.append(f"peak {peak / 2**20:.0f} MiB")
    if swept := resources.get("processes_swept"):
        parts.append(f"{swept} {'process' if swept == 1 else 'processes'} left behind and killed")
    if isinstance(released := resources.get("gpu_release_ms"), int | float):
        parts.append(f"GPUs free after {released:.0f} ms")
    energy = outcome.event.get("energy") or {}
    measured = [each for name in ("gpu_joules", "cpu_joules") if isinstance(each := energy.get(name), int | float)]
    if measured:
        parts.append(f"{sum(measured):.0f} J")
    return ", ".join(parts)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"flowmesh exec: {escaped(text)}\n".encode())
