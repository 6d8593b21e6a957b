"""`flowmesh replay`: runs a task of this node's history again on a temporary node, and says where both runs differ."""

from __future__ import annotations

import contextlib
import copy
import os
import queue
import re
import secrets
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from flowmesh.cli import completing, locate, render, replay_diff
from flowmesh.cli.control_types import PhaseSeen, Seen
from flowmesh.cli.documents import Submission
from flowmesh.cli.follow import Follow
from flowmesh.cli.history import journal_of
from flowmesh.cli.local import LocalNode, LocalOptions
from flowmesh.cli.replay_diff import differences
from flowmesh.cli.show import find, fitted
from flowmesh.cli.signals import Interrupted, Signals
from flowmesh.cli.view import View, progress_stream, view_for
from flowmesh.errors import EXIT_OK, FieldError, FlowMeshError
from flowmesh.messages.text import escaped
from flowmesh.results.manifest import RESPONSES_FILE
from flowmesh.results.safe_files import read_regular
from flowmesh.tasks.history import Found, Reader
from flowmesh.tasks.journal_db import JOURNAL_FILE
from flowmesh.tasks.verdicts import Kind

MAX_RESULT_BYTES = 256 * 1024**2
_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


@click.command(
    help="Run a task of this node's history again, on a temporary node with the same settings, and print where the two "
    "runs differ. Nothing is sent anywhere: the result stays in a folder of its own."
)
@click.argument("task_id", metavar="TASK", shell_complete=completing.kept_ids)
@click.option("--until", metavar="PHASE", help="Stop after this phase, such as load; `flowmesh show TASK` lists them.")
@click.option(
    "--secret",
    "given",
    multiple=True,
    metavar="FIELD=VARIABLE",
    help="A field whose secret the history hides, and the environment variable that holds it; may be repeated.",
)
@click.option(
    "--results-dir", type=click.Path(file_okay=False), metavar="DIR", help="Folder for the result; default: ./replays."
)
@locate.node_options
def replay(
    *,
    task_id: str,
    until: str | None,
    given: tuple[str, ...],
    results_dir: str | None,
    config: str | None,
    state_dir: str | None,
    as_json: bool,
) -> int:
    """Run the command; returns the exit code."""
    attempts = find(journal_of(state_dir, config), task_id)
    before = next((each for each in attempts if each.detail.document is not None), attempts[0])
    document = document_of(before, dict(_pair(each) for each in given))
    until = stop_after(until, before)
    name = f"replay-{before.entry.task_id[:150]}-{secrets.token_hex(3)}"
    folder = Path(results_dir or "replays").absolute()
    roots = () if config is not None else (str(Path.cwd()),)
    options = LocalOptions(config=config, results_dir=str(folder), read_roots=roots)
    submission = Submission(source=f"replay of {before.entry.task_id}", task_id=name, document=document)
    now, stopped = _run(submission, options, until=until, as_json=as_json)
    if until is not None and not (stopped and now.entry.verdict == Kind.CANCELLED):
        print(f"note: it ended before it could be stopped after {until}", file=sys.stderr)
        until = None
    names = {now.entry.out_dir: before.entry.out_dir, name: before.entry.task_id}
    results = (_result(before), replay_diff.renamed(_result(now), names))
    entry = msgspec.structs.replace(now.entry, message=replay_diff.renamed(now.entry.message, names))
    now = msgspec.structs.replace(now, entry=entry)
    if as_json:
        found = [] if None in results or until is not None else list(differences(*results))
        render.print_json(
            {
                "task_id": before.entry.task_id,
                "replay": name,
                "out_dir": now.entry.out_dir,
                "until": until,
                "verdict": [before.entry.verdict, now.entry.verdict],
                "message": [before.entry.message, now.entry.message],
                "tokens": [before.entry.tokens, now.entry.tokens],
                "compared": None not in results and until is None,
                "differences": msgspec.to_builtins(found[:1000]),
                "versions": msgspec.to_builtins(replay_diff.in_mapping(before.detail.versions, now.detail.versions)),
                "gpus": [sorted(each.detail.gpus.values()) for each in (before, now)],
                "timings": [
                    {"name": row[0], "before_s": row[1], "now_s": row[2]} for row in replay_diff.timings(before, now)
                ],
            }
        )
        return EXIT_OK
    for line in replay_diff.lines(before, now, results, until=until):
        print("\n".join(fitted(line)))
    if now.entry.out_dir:
        print(f"result    {escaped(now.entry.out_dir)}")
    return EXIT_OK


def document_of(found: Found, given: dict[str, str]) -> dict[str, Any]:
    """The document to run: as it was kept, with its secrets, and delivered to the disk.

    Args:
        given: by field, the environment variable that has its secret.

    Raises:
        FieldError: it was not kept whole, has not ended, or a secret is missing.
    """
    detail, task_id = found.detail, found.entry.task_id
    if not found.entry.finished_at:
        raise FieldError(f"{task_id}: it has not ended yet", "task")
    if detail.document is None or not detail.whole:
        raise FieldError(
            f"{task_id}: its document ({detail.document_bytes} bytes) was not kept whole; run its file instead", "task"
        )
    document = copy.deepcopy(detail.document)
    destination = (document.get("spec") or {}).get("output")
    if isinstance(destination, dict):
        destination.pop("destination", None)  # a replay must not overwrite what was delivered
    unknown = sorted(set(given) - set(detail.hidden))
    if unknown:
        raise FieldError(f"--secret: {', '.join(unknown)}: no secret is hidden there", unknown[0])
    needed = [path for path in detail.hidden if not path.startswith("spec.output.destination")]
    if missing := [path for path in needed if os.environ.get(given.get(path, "")) is None]:
        lines = ", ".join(f"--secret {path}=VARIABLE" for path in missing)
        raise FieldError(
            f"{task_id}: the secrets of these fields are not kept: {', '.join(missing)}; "
            f"put each into an environment variable and name it: {lines}",
            missing[0],
        )
    for path in needed:
        _put(document, path, os.environ[given[path]])
    return document


def _put(document: Any, path: str, value: str) -> None:
    steps = [int(index) if index else name for name, index in _STEP.findall(path)]
    for step in steps[:-1]:
        document = document[step]
    document[steps[-1]] = value


def _pair(text: str) -> tuple[str, str]:
    field, sign, variable = text.rpartition("=")
    if not sign or not field or not variable:
        raise FieldError(f"--secret: expected FIELD=VARIABLE (found {text!r})", "secret")
    return field, variable


class _StopsAfter:
    """A view that cancels the task once a phase is over.

    Args:
        phase: its name.
    """

    def __init__(self, view: View, phase: str | None, node: LocalNode, task_id: str) -> None:
        self._view, self._phase, self._node, self._task_id = view, phase, node, task_id
        self._entered = self.asked = False
        self.step, self.note, self.stop = view.step, view.note, view.stop

    def seen(self, event: Seen) -> None:
        self._view.seen(event)
        if self._phase is None or not isinstance(event, PhaseSeen):
            return
        if self._entered and event.phase != self._phase:
            self._phase, self.asked = None, True
            with contextlib.suppress(FlowMeshError), self._node.control() as control:  # it may just have ended
                control.cancel(self._task_id, force=False)
        self._entered = self._entered or event.phase == self._phase


def _run(submission: Submission, options: LocalOptions, *, until: str | None, as_json: bool) -> tuple[Found, bool]:
    """Its record, and whether it was asked to stop after `until`."""
    happened: queue.SimpleQueue[Any] = queue.SimpleQueue()
    view = view_for(progress_stream(as_json=as_json))
    with Signals(happened).handled() as signals:
        try:
            view.step("starting the node")
            with LocalNode(options, lambda: signals.count > 1) as node:
                worker = node.wait_idle(signals.check)
                stopping = _StopsAfter(view, until, node, submission.task_id)
                Follow(
                    node, submission, worker, view=stopping, happened=happened, signals=signals, timeout_s=None
                ).run()
                if signals.count:
                    raise Interrupted(signals.last, f"interrupted: {submission.task_id} was cancelled")
                with Reader(node.state_dir / JOURNAL_FILE) as reader:
                    return reader.attempts(submission.task_id)[0], stopping.asked
        finally:
            view.stop()


def stop_after(phase: str | None, before: Found) -> str | None:
    """The phase to stop after; None: it runs to its end.

    Raises:
        FieldError: the task had no such phase.
    """
    if phase is None:
        return None
    phases = list(before.detail.phases)
    if not phases:
        raise FieldError(f"--until: {before.entry.task_id} entered no phase; leave --until out", "until")
    if phase not in phases:
        raise FieldError(
            f"--until: {before.entry.task_id} had no phase {phase!r}; it had: {', '.join(phases)}", "until"
        )
    if phase == phases[-1] and before.entry.ok:
        print(f"note: {phase} is its last phase: it runs to its end", file=sys.stderr)
        return None
    return phase


def _result(found: Found) -> Any:
    """The content of responses.json in a task's folder; None where there is none."""
    out_dir = found.entry.out_dir
    if not out_dir:
        return None
    try:
        return msgspec.json.decode(read_regular(Path(out_dir, RESPONSES_FILE), MAX_RESULT_BYTES))
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        print(f"note: no result in {escaped(out_dir)}: {escaped(str(error))}", file=sys.stderr)
        return None
