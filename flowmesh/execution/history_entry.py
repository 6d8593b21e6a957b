"""What the journal's history gets of a task: built once, at its end. Bounded, whatever the document and the run are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from flowmesh import installed
from flowmesh.errors import FieldError
from flowmesh.execution import task_events
from flowmesh.execution.run import Run
from flowmesh.messages.text import escaped
from flowmesh.messages.trace import parent_of
from flowmesh.messages.wire import decode_object, utc_now
from flowmesh.redaction import Redactor, document_without_secrets, in_document
from flowmesh.tasks.history import Detail, Entry, Found, pack
from flowmesh.tasks.history_table import Kept
from flowmesh.tasks.verdicts import Verdict

WHOLE_BYTES = 128 * 1024
"""A longer message's document is kept cut short."""
CUT_CHARS, CUT_ITEMS, CUT_VALUES = 200, 5, 1000
"""What stays of such a document: the beginning of each text, the first items of each list, so many values in all."""
MESSAGE_CHARS = 500
WARNINGS = 20
OWNER_FIELDS = ("owner", "user", "submitted_by", "created_by", "team", "project")
"""Of `metadata`; the first that is there names who submitted the task."""
TOKEN_FIELDS = ("total_tokens", "num_tokens", "num_input_tokens_seen")


def of_run(
    run: Run, verdict: Verdict, *, finished_at: str, cost_per_hour: float, redact: Redactor, gpus: Mapping[str, str]
) -> Found:
    """What is kept of a task that has ended.

    Args:
        finished_at: ISO 8601, UTC.
        cost_per_hour: of its slot, in US dollars.
        redact: hides the secrets of the node and of the task.
        gpus: names of the node's GPUs, by UUID.
    """
    used = task_events.used(run, cost_per_hour)
    rows = used["resources"].get("rows")
    metadata = run.accepted.message.task.metadata or {}
    entry = Entry(
        task_id=run.task_id,
        attempt=run.attempt,
        type=run.accepted.type.name,
        worker_id=run.worker_id,
        owner=redact(owner_of(metadata)),
        name=redact(_text(metadata.get("name"))),
        verdict=verdict.kind.value,
        message=escaped(redact(verdict.message))[:MESSAGE_CHARS],
        received_at=run.timeline.received_at,
        started_at=run.started_at,
        finished_at=finished_at,
        wall_s=round(run.runtime_s, 6),
        gpu_s=round(run.runtime_s * len(run.gpus), 6),
        joules=_joules(run.energy),
        cost_usd=used["cost_usd"],
        api_usd=(None if run.outcome is None else run.outcome.spent_usd) or None,
        tokens=None if run.outcome is None else tokens_of(run.outcome.result),
        rows=rows["done"] if isinstance(rows, dict) else None,
        out_dir=run.accepted.target.out_dir,
    )
    document, whole, hidden = _document(run.accepted.task, run.accepted.size_bytes, redact)
    delivered = run.delivered
    parent, _ = run.accepted.message.parent
    detail = Detail(
        document=document,
        whole=whole,
        hidden=hidden,
        document_bytes=run.accepted.size_bytes,
        marks=run.timeline.marks,
        phases=dict(list(run.outcome.phases.items())[:100]) if run.outcome is not None else {},
        evidence=redact(verdict.evidence),
        retryable=None if verdict.ok else verdict.retryable,
        exit=None if verdict.exit is None else msgspec.to_builtins(verdict.exit),
        log_tail=() if verdict.ok else tuple(escaped(redact(line[:MESSAGE_CHARS])) for line in run.log_tail[-20:]),
        warnings=tuple(redact(line[:MESSAGE_CHARS]) for line in task_events.warnings_of(run)[:WARNINGS]),
        resources=used["resources"],
        energy=run.energy,
        deliveries=None if delivered is None else delivered.attempts + int(delivered.ok),
        urls=() if delivered is None else tuple(redact(url) for url in delivered.urls[:WARNINGS]),
        children={child.task_id: child.out_dir for child in run.accepted.children[:CUT_VALUES]},
        versions={"flowmesh": installed.version()} | (run.outcome.versions if run.outcome is not None else {}),
        gpus={uuid: gpus.get(uuid, "") for uuid in run.gpus},
        traceparent="" if parent is None else parent.header,
        tracestate="" if parent is None else parent.state,
    )
    return Found(entry=entry, detail=detail)


def of_refusal(worker_id: str, task_id: str, verdict: Verdict, data: bytes, secrets: Redactor) -> Found:
    """What is kept of a task that was refused.

    Args:
        data: the dispatch, which may be anything.
        secrets: the node's.
    """
    now = utc_now()
    detail = Detail(document_bytes=len(data), whole=False, retryable=verdict.retryable)
    entry = Entry(
        task_id=task_id,
        worker_id=worker_id,
        verdict=verdict.kind.value,
        message=escaped(secrets(verdict.message[:MESSAGE_CHARS])),
        received_at=now,
        finished_at=now,
    )
    if len(data) > WHOLE_BYTES:
        return Found(entry=entry, detail=detail)
    try:
        raw = decode_object(data)
        found = msgspec.convert(raw["task"], dict[str, Any])
        redact = Redactor([*secrets.known, *in_document(found, {})], prose=True)
        document, _, hidden = _document(found, len(data), redact)
    except (FieldError, KeyError, TypeError, ValueError, RecursionError):
        return Found(entry=entry, detail=detail)
    metadata = found.get("metadata")
    spec = found.get("spec")
    parent, _ = parent_of(raw.get("traceparent"), raw.get("tracestate"), metadata if isinstance(metadata, dict) else {})
    if parent is not None:
        detail = msgspec.structs.replace(detail, traceparent=parent.header, tracestate=parent.state)
    entry = msgspec.structs.replace(
        entry,
        type=redact(_text(spec.get("taskType"))) if isinstance(spec, dict) else "",
        owner=redact(owner_of(metadata)) if isinstance(metadata, dict) else "",
        name=redact(_text(metadata.get("name"))) if isinstance(metadata, dict) else "",
        message=escaped(redact(verdict.message[:MESSAGE_CHARS])),
    )
    return Found(entry=entry, detail=msgspec.structs.replace(detail, document=document, whole=True, hidden=hidden))


def owner_of(metadata: Mapping[str, Any]) -> str:
    """Who submitted a task, as its `metadata` says; empty: it does not."""
    labels = metadata.get("labels")
    for place in (metadata, labels if isinstance(labels, dict) else {}):
        for field in OWNER_FIELDS:
            if text := _text(place.get(field)):
                return text
    return ""


def tokens_of(result: Mapping[str, Any] | None) -> int | None:
    """How many tokens a task read and wrote, as its result says."""
    for section in ("usage", "metrics"):
        part = (result or {}).get(section)
        numbers = [part.get(field) for field in TOKEN_FIELDS] if isinstance(part, dict) else []
        for number in numbers:
            if isinstance(number, int | float) and 0 <= number < 2**53:
                return int(number)
    return None


def _document(task: dict[str, Any], size: int, redact: Redactor) -> tuple[dict[str, Any] | None, bool, tuple[str, ...]]:
    """The document, whether it is whole, and the paths of what is hidden in it."""
    whole = size <= WHOLE_BYTES
    try:
        document, hidden = document_without_secrets(task if whole else shortened(task), redact)
    except RecursionError:
        return None, False, ()
    return document, whole, hidden


def packed(found: Found) -> Kept:
    """Encoded; without the document where that cannot be stored, such as for an integer of more than 64 bits."""
    try:
        return pack(found.entry, found.detail)
    except (OverflowError, RecursionError, TypeError, ValueError):
        return pack(found.entry, msgspec.structs.replace(found.detail, document=None, whole=False, hidden=()))


def shortened(task: dict[str, Any]) -> dict[str, Any]:
    """The beginning of a document, in bounded time and size."""
    left = CUT_VALUES

    def cut(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > 50:
            return "…"
        match value:
            case str() if len(value) > CUT_CHARS:
                return f"{value[:CUT_CHARS]}… ({len(value)} characters)"
            case dict():
                kept = {str(key)[:CUT_CHARS]: cut(item, depth + 1) for key, item in list(value.items())[:100]}
                return kept if len(value) <= 100 else kept | {"…": f"{len(value) - 100} more"}
            case list():
                first = [cut(item, depth + 1) for item in value[:CUT_ITEMS]]
                return first if len(value) <= CUT_ITEMS else [*first, f"… {len(value) - CUT_ITEMS} more"]
        return value

    found: dict[str, Any] = cut(task, 0)
    return found


def _joules(energy: Mapping[str, Any] | None) -> float | None:
    known = [value for name in ("gpu_joules", "cpu_joules") if (value := (energy or {}).get(name)) is not None]
    return round(sum(known), 3) if known else None


def _text(value: Any) -> str:
    return value[:CUT_CHARS] if isinstance(value, str) else ""
