"""Everything about one task for its page: what `flowmesh show` prints, as data for the template."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
from pathlib import Path
from typing import Any

from flowmesh.cli import loss
from flowmesh.cli.history import energy
from flowmesh.cli.show import facts, losses, size_of, what_to_do, with_document
from flowmesh.errors import FlowMeshError
from flowmesh.files.folder import Folder
from flowmesh.files.walk import Troubles
from flowmesh.messages.text import escaped
from flowmesh.node import hardware
from flowmesh.page import charts
from flowmesh.page.sources import Sources
from flowmesh.redaction import Redactor
from flowmesh.tasks.catalogue import saves_checkpoints
from flowmesh.tasks.history import Detail, Entry, Found, Reader

MOST_FILES, MOST_SEEN = 500, 10_000
LOGS = "logs"
"""Not offered as files: they are shown with secrets hidden."""


def view(sources: Sources, task_id: str) -> dict[str, Any] | None:
    """What the template gets; None: the node has no record of the task.

    Raises:
        FlowMeshError: the journal cannot be read.
    """
    with Reader(sources.journal) as reader:
        attempts = reader.attempts(task_id)
    if not attempts:
        return None
    latest, *earlier = (with_document(each) for each in attempts)
    entry, detail = latest.entry, latest.detail
    live = None if entry.finished_at else sources.live(task_id)
    hide = Redactor(prose=True)
    shown: dict[str, Any] = hide.deep(
        {
            "message": escaped(entry.message),
            "evidence": escaped(detail.evidence),
            "warnings": [escaped(each) for each in detail.warnings],
            "log_tail": [escaped(each) for each in detail.log_tail],
            "earlier": [(each.entry.finished_at, each.entry.verdict, escaped(each.entry.message)) for each in earlier],
        }
    )
    return shown | {
        "entry": entry,
        "detail": detail,
        "live": live,
        "advice": what_to_do(entry, detail),
        "timeline": charts.timeline(detail),
        "events": [(_clock(at), what) for what, at in charts.events(detail)],
        "loss": _loss(latest, live),
        "speed": _trend(live, "tokens_per_s", " tokens/s"),
        "progress": _progress(live),
        "facts": _facts(entry, detail),
        "used": [*_used(entry, detail), *_energy(detail)],
        "files": _files(entry),
        "document": _document(detail),
    }


def _progress(live: dict[str, Any] | None) -> charts.Bar | None:
    progress = (live or {}).get("progress") or {}
    done, total = progress.get("done"), progress.get("total")
    if not isinstance(done, int | float):
        return None
    share = min(100.0, 100 * done / total) if isinstance(total, int | float) and total > 0 else 0.0
    text = f"{done:g}" + (f" of {total:g}" if total else "") + f" {progress.get('unit') or ''}"
    return charts.Bar(name="progress", length=share, text=text.strip())


def _loss(found: Found, live: dict[str, Any] | None) -> charts.Line | None:
    entry = found.entry
    if live is None and entry.out_dir and saves_checkpoints(entry.type):
        with contextlib.suppress(FlowMeshError):
            return charts.line(loss.logged(Path(entry.out_dir)))
    return charts.line(list(enumerate(losses(found, live))))


def _trend(live: dict[str, Any] | None, name: str, unit: str) -> charts.Line | None:
    values = ((live or {}).get("trend") or {}).get(name) or ()
    return charts.line([(at, value) for at, value in enumerate(values) if isinstance(value, int | float)], unit)


def _facts(entry: Entry, detail: Detail) -> list[tuple[str, str]]:
    rows = facts(entry, detail)
    if entry.tokens and entry.wall_s:
        rows.append(("tokens/s", f"{entry.tokens / entry.wall_s:.4g}"))
    return [(name, escaped(text)) for name, text in rows]


def _used(entry: Entry, detail: Detail) -> list[charts.Bar]:
    """CPU time and memory, as shares of what the machine has."""
    cpus, total = hardware.logical_cores(), hardware.memory_total_bytes()
    seconds, peak = detail.resources.get("cpu_seconds"), detail.resources.get("peak_rss_bytes")
    bars = []
    if isinstance(seconds, int | float) and entry.wall_s > 0:
        busy = seconds / entry.wall_s
        text = f"{busy:.2f} of {cpus}"
        bars.append(charts.Bar(name="CPUs", length=min(100.0, 100 * busy / cpus), text=text))
    if isinstance(peak, int | float):
        text = f"{size_of(peak)} of {size_of(total)}"
        bars.append(charts.Bar(name="memory", length=min(100.0, 100 * peak / total), text=text))
    return bars


def _energy(detail: Detail) -> list[charts.Bar]:
    found = {
        name.removesuffix("_joules").upper(): (float(value), energy(value))
        for name, value in (detail.energy or {}).items()
        if name.endswith("_joules") and isinstance(value, int | float) and value > 0
    }
    return charts.compared(found)


def task_folder(entry: Entry) -> Folder:
    """Raises OSError."""
    folder = Folder.open(Path(entry.out_dir))
    if os.geteuid() != 0:  # we can open nothing that the node's user could not
        folder.owner = os.geteuid()
    return folder


def _files(entry: Entry) -> list[tuple[str, str]]:
    """Paths and sizes of what is there now and can be downloaded."""
    if not entry.out_dir:
        return []
    found: list[tuple[str, str]] = []
    with contextlib.suppress(OSError), task_folder(entry) as folder:
        for each in itertools.islice(folder.entries(Troubles(), ordered=True), MOST_SEEN):
            if each.is_file and len(found) < MOST_FILES and len(path := each.path) < 1000 and usable(path):
                found.append((path, size_of(each.status.st_size)))
    return found


def usable(path: str) -> bool:
    """Whether a file may be downloaded under this path of a task's folder."""
    parts = path.split("/")
    return parts[0] != LOGS and path.isprintable() and not any(part in ("", ".", "..") for part in parts)


def _document(detail: Detail) -> str:
    if detail.document is None:
        return ""
    import yaml

    text = yaml.safe_dump(detail.document, sort_keys=False, allow_unicode=True, width=10**6)
    return "\n".join(escaped(each) for each in text.splitlines())


def _clock(at: float) -> str:
    then = datetime.datetime.fromtimestamp(at).astimezone()
    return then.strftime("%Y-%m-%d %H:%M:%S.") + f"{then.microsecond // 1000:03d}"
