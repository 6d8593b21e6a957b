"""`flowmesh run`: runs task files on this machine: on the node that runs here, else with a temporary Redis and node."""

from __future__ import annotations

import contextlib
import functools
import queue
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import click
import msgspec

from flowmesh.cli import documents, locate, render
from flowmesh.cli.batch_file import is_batch_file, submission_of
from flowmesh.cli.checked_file import refuse_faults
from flowmesh.cli.deployment import TaskFailed, Worker
from flowmesh.cli.documents import Submission
from flowmesh.cli.follow import Follow, Outcome
from flowmesh.cli.hand_over import Choice, absolute, choose, task_types
from flowmesh.cli.local import LocalNode, LocalOptions
from flowmesh.cli.pipelines.run import PipelineRun
from flowmesh.cli.running_node import RunningNode
from flowmesh.cli.signals import Interrupted, Signals
from flowmesh.cli.summary import summary
from flowmesh.cli.view import View, progress_stream, view_for
from flowmesh.errors import EXIT_OK, FlowMeshError
from flowmesh.pipelines.document import is_pipeline
from flowmesh.tasks.catalogue import LIGHT, TaskType, known_types

_NODES_OWN = ("node_fault", "supervisor_lost")
"""Verdicts for which the task is not at fault; the node's log is printed for them."""


@click.command(
    help="Run task files and pipelines on this machine, one after another: on the node that runs here, else on a "
    "temporary one. Needs no Redis and no orchestrator. "
    "A .jsonl file is a batch of requests as for OpenAI's Batch API, and needs --model."
)
@click.argument("files", nargs=-1, required=True, metavar="FILE.yaml|FILE.jsonl...")
@click.option("--model", metavar="MODEL", help="Of batch files: a hub id or a local folder.")
@click.option("--engine", type=click.Choice(["auto", "vllm", "transformers"]), help="Of batch files; default: auto.")
@click.option(
    "--served-model-name",
    "served",
    multiple=True,
    metavar="NAME",
    help="A name that the lines of batch files give the model, besides MODEL; may be repeated.",
)
@locate.config_option
@click.option(
    "--results-dir", type=click.Path(file_okay=False), metavar="DIR", help="Folder for results; else from --config."
)
@click.option(
    "--read-root",
    "read_roots",
    multiple=True,
    type=click.Path(exists=True, file_okay=False),
    metavar="DIR",
    help="A folder whose files the documents may name, besides their own folder; may be repeated.",
)
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Cancel a task after this time."
)
@click.option("--task-id", metavar="ID", help="The task's id, for a single file; else a new one.")
@click.option("--embedded", is_flag=True, help="Use a temporary node, also where a node runs on this machine.")
@click.option("-k", "--keep-going", is_flag=True, help="Run the remaining files after one has failed.")
@locate.json_option
def run(
    *,
    files: tuple[str, ...],
    model: str | None,
    engine: str | None,
    served: tuple[str, ...],
    config: str | None,
    results_dir: str | None,
    read_roots: tuple[str, ...],
    timeout: float | None,
    task_id: str | None,
    embedded: bool,
    keep_going: bool,
    as_json: bool,
) -> int:
    """Run the command; returns the exit code."""
    if task_id is not None and len(files) > 1:
        raise click.UsageError("--task-id: allowed for a single file only; leave it out, or run the files one by one")
    batches = [file for file in files if is_batch_file(file)]
    if batches and model is None:
        raise click.UsageError(f"--model: missing; {batches[0]} is a batch file, which needs the model that answers it")
    if not batches and (model or engine or served):
        raise click.UsageError("--model, --engine, --served-model-name: for batch files (.jsonl); a task names its own")
    submissions = [
        submission_of(file, model, engine=engine, served=served, task_id=task_id)
        if model is not None and is_batch_file(file)
        else documents.load(file, task_id)
        for file in files
    ]
    types = known_types(locate.settings(config))
    folders = [Path.cwd() if file == "-" else Path(file).absolute().parent for file in files]
    if model is not None and Path(model).is_dir():
        folders.append(Path(model))
    roots = tuple(dict.fromkeys(str(folder.resolve()) for folder in (*folders, *map(Path, read_roots))))
    warm = warm_at_start(submissions, types)
    options = LocalOptions(config=config, results_dir=results_dir, read_roots=roots, settings=warm)
    choice = Choice(None, "") if embedded else choose(options, submissions)
    check = functools.partial(refuse_faults, submissions, types)
    return run_all(submissions, options, choice, check, timeout_s=timeout, keep_going=keep_going, as_json=as_json)


def warm_at_start(submissions: Sequence[Submission], types: Mapping[str, TaskType]) -> dict[str, str]:
    """The setting by which a temporary node imports the libraries of the first task from its start on."""
    for name in task_types(submissions[0].document):
        if (kind := types.get(name)) is not None and kind.environment != LIGHT:
            return {f"environments.{kind.environment}.warm": "at start"}
    return {}


def run_all(
    submissions: Sequence[Submission],
    options: LocalOptions,
    choice: Choice = Choice(None, ""),  # noqa: B008 - frozen
    check: Callable[[], None] = lambda: None,
    *,
    timeout_s: float | None = None,
    keep_going: bool = False,
    as_json: bool = False,
) -> int:
    """Run the tasks one after another on one node, and print the outcome of each.

    Args:
        choice: the node that runs here, if they run on it; by default a temporary one.
        check: checks them, while a temporary node starts; whatever it raises ends that node and the command.
        timeout_s: limit for each task; None: no limit.
        keep_going: run the remaining tasks after a failure.

    Raises:
        FlowMeshError: the last failure.
    """
    happened: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stream = progress_stream(as_json=as_json)
    view = view_for(stream)
    failure: FlowMeshError | None = None
    with Signals(happened).handled() as signals:
        run = _Run(view, stream, happened, signals, timeout_s, as_json=as_json)
        try:
            if choice.why:
                view.note(choice.why)
            with contextlib.ExitStack() as stack:
                if choice.node is not None and choice.results_dir is not None:
                    check()
                    each = functools.partial(run.on_running, choice.node, choice.results_dir)
                else:
                    view.step("starting the node")
                    node = _checked_meanwhile(stack, options, signals, check)
                    each = functools.partial(run.on_local, node, node.wait_idle(signals.check), options)
                latest: FlowMeshError | None = None
                for submission in submissions:
                    if latest is not None:
                        view.note(f"flowmesh: {latest}")
                    latest = each(submission)
                    failure = latest or failure
                    if signals.count:
                        raise Interrupted(signals.last, str(failure or f"interrupted after {submission.task_id}"))
                    if failure is not None and not keep_going:
                        break
        finally:
            view.stop()
    if failure is not None:
        raise failure
    return EXIT_OK


def _checked_meanwhile(
    stack: contextlib.ExitStack, options: LocalOptions, signals: Signals, check: Callable[[], None]
) -> LocalNode:
    """A temporary node, which starts while the documents are checked. Where they are refused, nothing of it is left."""
    checked = False
    results_dir = locate.results_dir(options.results_dir, options.config)
    if not results_dir.exists():
        stack.callback(lambda: None if checked else _remove_empty(results_dir))
    node = stack.enter_context(LocalNode(options, lambda: signals.count > 1 or not checked))
    check()
    checked = True
    return node


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


class _Run:
    """What the documents of one command have in common. Its methods return the error of one that failed."""

    def __init__(
        self,
        view: View,
        stream: TextIO | None,
        happened: queue.SimpleQueue[Any],
        signals: Signals,
        timeout_s: float | None,
        *,
        as_json: bool,
    ) -> None:
        self._view = view
        self._stream = stream
        self._happened = happened
        self._signals = signals
        self._timeout_s = timeout_s
        self._as_json = as_json

    def on_local(
        self, node: LocalNode, worker: Worker, options: LocalOptions, submission: Submission
    ) -> FlowMeshError | None:
        """On the temporary node."""
        if is_pipeline(submission.document):
            results_dir = locate.results_dir(options.results_dir, options.config)
            check = functools.partial(node.raise_if_gone, "while the pipeline ran")
            return self._pipeline(submission, node.state_dir, results_dir, check)
        outcome = Follow(
            node,
            submission,
            worker,
            view=self._view,
            happened=self._happened,
            signals=self._signals,
            timeout_s=self._timeout_s,
        ).run()
        self._view.stop()
        if outcome.verdict in _NODES_OWN:
            node.show_log()  # it is removed with the node
        return _report(outcome, as_json=self._as_json)

    def on_running(self, node: RunningNode, results_dir: Path, submission: Submission) -> FlowMeshError | None:
        """On the node that runs here."""
        submission = msgspec.structs.replace(submission, document=absolute(submission.document))
        if is_pipeline(submission.document):
            return self._pipeline(submission, node.state_dir, results_dir, lambda: None)

        def waits(worker_id: str, count: int) -> None:
            if count:
                self._view.note(f"waiting for {worker_id}: {render.count(count, 'task')} before this one")

        self._view.note(f"{submission.task_id}  {submission.task_type or 'no task type'}  {submission.source}")
        outcome = node.run(
            submission,
            happened=self._happened,
            signals=self._signals,
            seen=self._view.seen,
            waits=waits,
            timeout_s=self._timeout_s,
        )
        self._view.stop()
        return _report(outcome, as_json=self._as_json)

    def _pipeline(
        self, submission: Submission, state_dir: Path, results_dir: Path, check: Callable[[], None]
    ) -> FlowMeshError | None:
        self._view.stop()
        return PipelineRun(
            submission,
            state_dir,
            results_dir,
            happened=self._happened,
            signals=self._signals,
            stream=self._stream,
            timeout_s=self._timeout_s,
            check=check,
        ).run(as_json=self._as_json)


def _report(outcome: Outcome, *, as_json: bool) -> FlowMeshError | None:
    """Print a task's outcome; returns the error for a task that failed."""
    if as_json:
        render.print_json(msgspec.to_builtins(outcome))
    elif outcome.ok:
        print(render.succeeded(outcome.runtime_sec))
        if isinstance(outcome.result, dict):
            print("\n".join(summary(outcome.result, render.width(sys.stdout))))
        print(f"results: {outcome.out_dir}")
    elif outcome.out_dir is not None and (logs := Path(outcome.out_dir, "logs")).is_dir():
        print(f"logs: {logs}")
    if not as_json:
        own = outcome.result.get("warnings") if isinstance(outcome.result, dict) else None
        render.warnings(own or outcome.event.get("warnings"))
    if outcome.ok:
        return None
    return TaskFailed.of(outcome.task_id, outcome.verdict, outcome.error)
