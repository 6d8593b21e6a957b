"""The spans of a task that has ended: itself, and below it queued, launch, run with its phases, stop, release, deliver.

Built from what the history keeps, in which secrets are hidden; sent by reporting.span_child. The ids depend on the
attempt only, so what comes twice is the same span.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from flowmesh.messages import trace
from flowmesh.messages.trace import Context
from flowmesh.settings.schema import OtelSettings
from flowmesh.tasks.history import Found
from flowmesh.tasks.sendings_table import Sending

LANE = "otel"
PREFIX = "flowmesh."
"""Of the attributes that no convention of OpenTelemetry has."""
MOST_PHASES = 100
TEXT_CHARS = 500
_STAGES = {
    "queued": "queued",
    "launching": "launch",
    "running": "run",
    "stopping": "stop",
    "releasing": "release",
    "delivering": "deliver",
}
"""The name of the span of each state."""
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""OpenTelemetry's variables with the collector's address."""


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """A span, without OpenTelemetry's library, which the supervisor does not import."""

    name: str
    span_id: str
    parent_id: str
    """Empty: it has none."""
    start_ns: int
    end_ns: int
    attributes: dict[str, Any] = {}
    ok: bool | None = None
    """None: nothing is said about it."""
    message: str = ""


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """The spans of one task."""

    trace_id: str
    state: str
    spans: tuple[Span, ...]


def wanted(settings: OtelSettings, environ: Mapping[str, str]) -> bool:
    """Whether spans are sent: where the settings or OpenTelemetry's own variables say where to."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
        return False
    return settings.endpoint is not None or any(environ.get(name, "").strip() for name in ENDPOINTS)


class Spans:
    """
    Args:
        node_id: of this node; as in the names of attempts.
    """

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id

    def of_end(self, found: Found) -> Sequence[Sending]:
        """What is sent about a task's end; nothing in a trace that is not recorded."""
        entry, detail = found.entry, found.detail
        parent = trace.parse(detail.traceparent, detail.tracestate)
        attempt = f"refused:{entry.task_id}:{entry.finished_at}" if entry.attempt is None else entry.attempt
        own = trace.of_task(f"{self._node_id}:{attempt}", parent)
        if not own.sampled:
            return ()
        spans = Trace(trace_id=own.trace_id, state=own.state, spans=tuple(_spans(found, own, parent, self._node_id)))
        return [Sending(lane=LANE, id=own.span_id, body=msgspec.msgpack.encode(spans))]


def _spans(found: Found, own: Context, parent: Context | None, node_id: str) -> list[Span]:
    entry, detail = found.entry, found.detail
    marks, end = detail.marks, _seconds(entry.finished_at)
    start = min(marks.get("received", _seconds(entry.received_at)), end)
    task = Span(
        name=f"task {entry.type or 'unknown'}",
        span_id=own.span_id,
        parent_id=parent.span_id if parent is not None else "",
        start_ns=_ns(start),
        end_ns=_ns(end),
        attributes=_attributes(found, node_id),
        ok=entry.ok,
        message="" if entry.ok else (entry.message or entry.verdict)[:TEXT_CHARS],
    )
    spans, stages = [task], sorted((at, state) for state, at in marks.items() if state in _STAGES)
    for index, (at, state) in enumerate(stages):
        until = stages[index + 1][0] if index + 1 < len(stages) else end
        stage = _below(task, _STAGES[state], at, until)
        spans.append(stage)
        if state == "running":
            spans += _phases(stage, detail.phases)
    return spans


def _phases(run: Span, phases: Mapping[str, float]) -> list[Span]:
    """The phases that a task reported, one after the other from the start of its run. Their times are its own."""
    spans, at = [], run.start_ns / 1e9
    for name, seconds in list(phases.items())[:MOST_PHASES]:
        until = min(at + max(seconds, 0.0), run.end_ns / 1e9)
        spans.append(_below(run, name[:64], at, until))
        at = until
    return spans


def _below(parent: Span, name: str, start: float, end: float) -> Span:
    return Span(
        name=name,
        span_id=trace.digest(f"{parent.span_id} {name}", 16),
        parent_id=parent.span_id,
        start_ns=_ns(start),
        end_ns=_ns(max(start, end)),
    )


def _attributes(found: Found, node_id: str) -> dict[str, Any]:
    entry, detail = found.entry, found.detail
    values = {
        "task.id": entry.task_id,
        "task.name": entry.name,
        "task.type": entry.type,
        "task.owner": entry.owner,
        "task.attempt": entry.attempt,
        "task.verdict": entry.verdict,
        "task.evidence": detail.evidence[:TEXT_CHARS],
        "task.retryable": detail.retryable,
        "task.tokens": entry.tokens,
        "task.rows": entry.rows,
        "task.joules": entry.joules,
        "task.cost_usd": entry.cost_usd,
        "node.id": node_id,
        "worker.id": entry.worker_id,
        "gpu.uuids": list(detail.gpus),
    }
    failed = {} if entry.ok else {"error.type": entry.verdict}
    return failed | {f"{PREFIX}{name}": value for name, value in values.items() if value not in (None, "", [])}


def _seconds(at: str) -> float:
    return datetime.datetime.fromisoformat(at).timestamp()


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
