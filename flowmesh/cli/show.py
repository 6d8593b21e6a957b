"""`flowmesh show`: everything that this node knows of one task, while it runs and after its end."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from flowmesh.cli import completing, locate, loss, render
from flowmesh.cli.control import Control
from flowmesh.cli.history import dollars, energy, journal_of, number, short_time, whole
from flowmesh.errors import EXIT_OK, FieldError, FlowMeshError
from flowmesh.messages.text import escaped
from flowmesh.messages.wire import decode_object
from flowmesh.redaction import Redactor, document_without_secrets, in_document
from flowmesh.results.manifest import MANIFEST_FILE, Manifest
from flowmesh.results.safe_files import read_note
from flowmesh.tasks.catalogue import saves_checkpoints
from flowmesh.tasks.history import Detail, Entry, Found, Reader

_WHAT_TO_DO = {
    "bad_request": "correct the fields that the message names; `flowmesh validate FILE` checks a document",
    "missing_dependency": "install what the message names in the task's environment, or use another worker",
    "host_oom": "give it less to do at once, or a machine with more memory",
    "gpu_oom": "smaller batches, a shorter context, or a larger GPU",
    "gpu_fault": "the GPU is checked before it is used again; send the task to another worker meanwhile",
    "hang": "its stacks are in the log (`flowmesh logs TASK`)",
    "timeout": "raise spec.timeoutSec, or give it less to do",
    "delivery_failed": "its results are kept: `flowmesh deliver TASK` sends them again",
    "supervisor_lost": "send it again",
    "node_fault": "`flowmesh status` and `flowmesh doctor` say what is wrong with the node",
    "crash": "see the end of its log (`flowmesh logs TASK`)",
    "error": "see the end of its log (`flowmesh logs TASK`)",
    "drained": "send it again; the node was stopping",
}
STATES = ("received", "launching", "running", "stopping", "releasing", "delivering", "done")
LABELS = {
    "received": "received",
    "launching": "got its slot",
    "running": "started",
    "stopping": "asked to stop",
    "releasing": "processes gone",
    "delivering": "released",
    "done": "delivered",
}
_FILES = 20
_SPARK = 40
"""Characters."""


@click.command(help="Show everything about one task of this node: timeline, evidence, resources, files, document.")
@click.argument("task_id", metavar="TASK", shell_complete=completing.kept_ids)
@click.option("--endpoint", "only_endpoint", is_flag=True, help="Of a task that serves a model: its address and key.")
@locate.node_options
def show(task_id: str, config: str | None, state_dir: str | None, as_json: bool, only_endpoint: bool) -> int:
    """Run the command; returns the exit code."""
    if only_endpoint:
        return _show_endpoint(task_id, config, state_dir, as_json=as_json)
    found = find(journal_of(state_dir, config), task_id)
    found = [with_document(each) for each in found]
    latest, *earlier = found
    live = None if latest.entry.finished_at else _live(latest.entry.task_id, config, state_dir)
    manifest = manifest_of(latest.entry)
    if as_json:
        render.print_json(
            {
                "task": whole(latest.entry) | {"live": live},
                "detail": {field: getattr(latest.detail, field) for field in latest.detail.__struct_fields__},
                "timeline": [{"at": at, "event": name} for name, at in moments(latest.detail)],
                "files": None if manifest is None else msgspec.to_builtins(manifest.entries),
                "loss": losses(latest, live),
                "earlier": [whole(each.entry) for each in earlier],
            }
        )
        return EXIT_OK
    for line in lines(latest, live, manifest, earlier):
        print("\n".join(fitted(line)))
    return EXIT_OK


def _show_endpoint(task_id: str, config: str | None, state_dir: str | None, *, as_json: bool) -> int:
    from flowmesh.cli.serve import lines as endpoint_lines

    with Control(locate.state_dir(state_dir, config)) as control:
        endpoint = control.endpoint(task_id)
    if as_json:
        render.print_json(msgspec.to_builtins(endpoint))
    else:
        print("\n".join(endpoint_lines(endpoint)))
    return EXIT_OK


def find(journal: Path, prefix: str) -> list[Found]:
    """All attempts at the one task whose id is this or begins so, the last one first.

    Raises:
        FieldError: there is none, or more than one.
        JournalError: the journal cannot be read.
    """
    with Reader(journal) as reader:
        ids = reader.matching(prefix)
        if not ids:
            raise FieldError(f"{prefix}: this node has no record of this task; `flowmesh history` lists them", "task")
        if len(ids) > 1:
            raise FieldError(f"{prefix}: the beginning of several tasks' ids: {', '.join(ids[:5])}", "task")
        return reader.attempts(ids[0])


def manifest_of(entry: Entry) -> Manifest | None:
    """The manifest in a task's folder; None where it has none, or has no folder any more."""
    return read_note(Path(entry.out_dir, MANIFEST_FILE), Manifest) if entry.out_dir else None


def moments(detail: Detail) -> list[tuple[str, float]]:
    """What happened when, in order: the states that it entered."""
    return sorted(((name, detail.marks[name]) for name in STATES if name in detail.marks), key=lambda each: each[1])


def lines(found: Found, live: dict[str, Any] | None, manifest: Manifest | None, earlier: list[Found]) -> Iterator[str]:
    """The text, line by line."""
    entry, detail = found.entry, found.detail
    yield from _head(entry, detail)
    yield from _timeline(detail, live)
    if values := losses(found, live):
        yield from ("", f"loss: {loss.in_a_line(values, _SPARK)}", f"  `flowmesh loss {entry.task_id}` draws it")
    yield from _resources(entry, detail)
    yield from _files(entry, detail, manifest)
    for name, texts in (("warnings", detail.warnings), ("end of the log", detail.log_tail)):
        if texts:
            yield from ("", f"{name}:", *(f"  {text}" for text in texts))
    if earlier:
        yield from ("", "earlier attempts:")
        for each in earlier:
            yield f"  {short_time(each.entry.finished_at)}  {each.entry.verdict}  {each.entry.message}"
    yield from _document(detail)


def _head(entry: Entry, detail: Detail) -> Iterator[str]:
    named = f" ({entry.name})" if entry.name else ""
    yield f"{entry.task_id}{named}"
    facts = [entry.type or "unknown type", f"worker {entry.worker_id}"]
    facts += [f"attempt {entry.attempt}"] if entry.attempt is not None else ["never accepted"]
    facts += [f"owner {entry.owner}"] if entry.owner else []
    yield "  " + ", ".join(facts)
    if not entry.finished_at:
        yield f"  {entry.state}"
        return
    yield f"  {entry.verdict}" + (f": {entry.message}" if entry.message else "")
    if detail.evidence:
        yield f"  evidence: {detail.evidence}"
    if text := what_to_do(entry, detail):
        yield f"  what to do: {text}"


def what_to_do(entry: Entry, detail: Detail) -> str:
    """About a task that failed; empty for others."""
    if entry.verdict not in _WHAT_TO_DO:
        return ""
    retry = "; another worker may succeed" if detail.retryable else ""
    return _WHAT_TO_DO[entry.verdict].replace("TASK", entry.task_id) + retry


def _timeline(detail: Detail, live: dict[str, Any] | None) -> Iterator[str]:
    found = moments(detail)
    if not found:
        return
    yield from ("", "timeline:")
    for index, (name, at) in enumerate(found):
        until = found[index + 1][1] if index + 1 < len(found) else None
        took = "" if until is None else render.seconds(until - at)
        if name == "running" and until is None:
            took = f"{render.seconds(max(0.0, time.time() - at))} so far"
        what = LABELS[name]
        if name == "done" and detail.deliveries is not None:
            what += f" ({render.count(detail.deliveries, 'attempt')})"
        yield f"  {_clock(at)}  {what:<24} {took:>9}".rstrip()
        if name == "running":
            yield from (f"                  {phase:<22} {render.seconds(s):>9}" for phase, s in detail.phases.items())
    if live is not None:
        progress = live.get("progress") or {}
        done = (
            f", {progress['done']:g}" + (f"/{progress['total']:g}" if progress.get("total") else "") if progress else ""
        )
        yield f"  now: {live.get('state', '')} {live.get('phase') or ''}{done}".rstrip()
        if live.get("waits_for"):
            yield f"  waits for {live['waits_for']}"


def facts(entry: Entry, detail: Detail) -> list[tuple[str, str]]:
    """What a task used, as names and texts; those that are not known are left out."""
    used = detail.resources
    rows = [
        ("ran for", render.seconds(entry.wall_s) if entry.started_at and entry.finished_at else ""),
        ("GPU time", render.seconds(entry.gpu_s) if entry.gpu_s else ""),
        ("CPU time", render.seconds(used["cpu_seconds"]) if used.get("cpu_seconds") is not None else ""),
        ("peak memory", size_of(used.get("peak_rss_bytes"))),
        ("energy", energy(entry.joules)),
        ("cost", dollars(entry.cost_usd)),
        ("tokens", number(entry.tokens)),
        ("rows", number(entry.rows)),
        ("GPUs", ", ".join(f"{name or 'GPU'} ({uuid})" for uuid, name in detail.gpus.items())),
        ("versions", ", ".join(f"{name} {version}" for name, version in detail.versions.items())),
    ]
    return [(name, text) for name, text in rows if text]


def _resources(entry: Entry, detail: Detail) -> Iterator[str]:
    rows = facts(entry, detail)
    if rows:
        yield from ("", "resources:")
        yield from (f"  {name:<12} {text}" for name, text in rows)


def losses(found: Found, live: dict[str, Any] | None) -> list[float]:
    """The losses that a training task logged, or so far; empty for others."""
    if live is not None:
        return [value for value in (live.get("trend") or {}).get("loss") or [] if isinstance(value, int | float)]
    if not found.entry.out_dir or not saves_checkpoints(found.entry.type):
        return []
    with contextlib.suppress(FlowMeshError):  # its folder is gone, or it failed before it had a result
        return [value for _, value in loss.logged(Path(found.entry.out_dir))]
    return []


def _files(entry: Entry, detail: Detail, manifest: Manifest | None) -> Iterator[str]:
    if not entry.out_dir:
        return
    there = "" if Path(entry.out_dir).is_dir() else " (removed)"
    yield from ("", f"files: {entry.out_dir}{there}")
    present = [each for each in manifest.entries if each.status == "present"] if manifest is not None else []
    yield from (f"  {each.path:<28} {size_of(each.size):>10}".rstrip() for each in present[:_FILES])
    if len(present) > _FILES:
        yield f"  and {len(present) - _FILES} more"
    yield from (f"  {url}" for url in detail.urls)


def _document(detail: Detail) -> Iterator[str]:
    if detail.document is None:
        if detail.document_bytes:
            yield from ("", f"document: {detail.document_bytes} bytes, not kept")
        return
    import yaml

    notes = [] if detail.whole else [f"cut short, it has {detail.document_bytes} bytes"]
    notes += [f"{render.count(len(detail.hidden), 'secret')} hidden"] if detail.hidden else []
    yield from ("", "document" + (f" ({'; '.join(notes)})" if notes else "") + ":")
    text = yaml.safe_dump(detail.document, sort_keys=False, allow_unicode=True, width=10**6)
    yield from (f"  {line}" for line in text.splitlines())


def with_document(found: Found) -> Found:
    """A task that has not ended, with what its dispatch says, secrets hidden."""
    if not found.message:
        return found
    try:
        message = decode_object(found.message)
        task = msgspec.convert(message.get("task"), dict[str, Any])
    except (FieldError, msgspec.ValidationError):
        return found
    redact = Redactor(in_document(task, os.environ), prose=True)
    document, hidden = document_without_secrets(task, redact)
    spec, metadata = task.get("spec"), task.get("metadata")
    named = spec.get("taskType") if isinstance(spec, dict) else ""
    name = metadata.get("name") if isinstance(metadata, dict) else ""
    size = len(found.message)
    return msgspec.structs.replace(
        found,
        message=b"",
        entry=msgspec.structs.replace(found.entry, type=redact(str(named or "")), name=redact(str(name or ""))),
        detail=msgspec.structs.replace(found.detail, document=document, hidden=hidden, document_bytes=size),
    )


def _live(task_id: str, config: str | None, state_dir: str | None) -> dict[str, Any] | None:
    """What the node says of a task that it has; None where it has not, or is down."""
    with contextlib.suppress(FlowMeshError), Control(locate.state_dir(state_dir, config)) as control:
        for task in control.status().tasks:
            if task.task_id == task_id:
                found: dict[str, Any] = msgspec.to_builtins(task)
                return found
    return None


def _clock(at: float) -> str:
    then = datetime.datetime.fromtimestamp(at).astimezone()
    return then.strftime("%m-%d %H:%M:%S.") + f"{then.microsecond // 1000:03d}"


def size_of(size: Any) -> str:
    """A number of bytes for display; empty where there is none."""
    if not isinstance(size, int):
        return ""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= limit:
            return f"{size / limit:.1f} {unit}"
    return f"{size} B"


def fitted(line: str) -> list[str]:
    """A line as the terminal gets it: escaped, and folded below its first word."""
    text = escaped(line)
    indent = len(text) - len(text.lstrip())
    room = render.width(sys.stdout)
    if len(text) <= room or not render.is_terminal(sys.stdout):
        return [text]
    return textwrap.wrap(
        text, room, subsequent_indent=" " * (indent + 2), break_long_words=False, break_on_hyphens=False
    ) or [text]
